#!/usr/bin/env bash
# One run on this machine, continued for as long as it is stopped on request (exit status 75).
#
#   launch/local.sh --config=configs/adaptive.py --workdir=runs/adaptive
#
# All devices that JAX finds train together. PROCESSES=2 starts so many processes that share the
# run, each with the devices that it is given: on a machine with two GPUs one each, on a CPU one
# virtual device each. DRY_RUN=1 prints the commands and stops.
set -euo pipefail
python=${PYTHON:-python}
processes=${PROCESSES:-1}
port=${PORT:-12355}

start() {  # start INDEX OPTIONS...: prints the command, or runs it in the background
  local index=$1 words
  shift
  words=("$python" -m hgnn_moe_jax.main "$@")
  if [ "$processes" -gt 1 ]; then
    words=(env CUDA_VISIBLE_DEVICES="$index" "${words[@]}" --distributed
      --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$index")
  fi
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${words[@]}"
    echo
  else
    "${words[@]}" &
    children+=($!)
  fi
}

stopped=0
trap 'stopped=1; kill -TERM "${children[@]}" 2>/dev/null || true' TERM INT
while :; do
  children=()
  for ((index = 0; index < processes; index++)); do start "$index" "$@"; done
  if [ "${DRY_RUN:-0}" = 1 ]; then exit 0; fi
  status=0
  for child in "${children[@]}"; do
    code=0
    wait "$child" || code=$?
    # A trapped signal ends `wait` early; the child is still saving.
    while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      # The others would wait for it.
      if [ "$code" -ne 75 ]; then kill -KILL "${children[@]}" 2>/dev/null || true; fi
    fi
  done
  if [ "$status" -ne 75 ] || [ "$stopped" = 1 ]; then exit "$status"; fi
done
