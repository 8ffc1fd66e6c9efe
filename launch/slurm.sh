#!/usr/bin/env bash
# One run on several nodes, one process per GPU; queued again when time is up, continued from there.
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/adaptive.py --workdir=runs/adaptive
#
# --workdir lies on a file system that all nodes see. DRY_RUN=1 launch/slurm.sh ... prints the
# command and stops. JAX gives task i of a node its GPU i, so all tasks have to see all of them: no
# --gpus-per-task. A sweep is an array job: `python -m
# hgnn_moe_jax.sweep --slurm=FILE` writes it.
#
#SBATCH --job-name=hgnn_moe
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
# All stop after the same step, but do not end at the same moment: killed by the first one's status
# the others would hide the 75. What is left 90 seconds after it counts as hanging, and is killed.
command=(srun --kill-on-bad-exit=0 --wait=90 python -m hgnn_moe_jax.main --distributed "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
"${command[@]}"
status=$?
if [ "$status" -eq 75 ]; then  # stopped on request, everything is saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
