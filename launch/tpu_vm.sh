#!/usr/bin/env bash
# One run on all workers of a Cloud TPU VM that is there already.
#
#   launch/tpu_vm.sh NAME ZONE --config=configs/adaptive.py --workdir=/mnt/runs/adaptive
#
# Copies the checkout to every worker, installs it there and starts the run; JAX finds the workers
# by itself. --workdir lies on a disk or bucket that all of them mount. The same command continues.
# DRY_RUN=1 prints the commands and stops.
set -euo pipefail
name=${1:?give the name of the TPU VM}
zone=${2:?give its zone}
shift 2
do_it() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
do_it git -C "$(dirname "$0")/.." archive --output="$archive" HEAD
do_it gcloud compute tpus tpu-vm scp "$archive" "$name:hgnn_moe_jax.tar.gz" --zone="$zone" --worker=all
do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="\
mkdir -p hgnn_moe_jax && tar -xzf hgnn_moe_jax.tar.gz -C hgnn_moe_jax && cd hgnn_moe_jax && \
pip install --quiet '.[tpu]' && exec python -m hgnn_moe_jax.main --distributed ${*@Q}"
