#!/usr/bin/env bash
# Six ways to set the orthogonality, 3 seeds each, at equal steps. Continues what was stopped.
#
#   launch/adaptive_study.sh runs/adaptive_study [options of hgnn_moe_jax.main, e.g. --config.training.steps=400]
#
# DRY_RUN=1 prints the commands.
set -euo pipefail
folder=${1:?give the folder of the runs}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
shift
cd "$(dirname "$0")/.."
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@" </dev/null
  fi
}
for seed in 0 1 2; do
  while read -r arm config options; do
    # shellcheck disable=SC2086  # options are words
    run "${PYTHON:-python}" -m hgnn_moe_jax.main --config="configs/$config.py" --quiet \
      --workdir="$folder/$arm-$seed" --config.name="$arm" --config.seed="$seed" \
      $options "$@"
  done <<ARMS
none wikitext2_small
static_weight static
adaptive_weight wikitext2_small --config.adaptive.controller=adaptive --config.orthogonality.warmup_steps=60
static_output static_output
adaptive_output adaptive_output
feedback adaptive_feedback
ARMS
done
