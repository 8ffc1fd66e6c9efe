#!/usr/bin/env bash
# What docs/performance.md says of a GPU, measured on this one: a JSON file and a log of each figure.
#
#   launch/gpu_figures.sh runs/gpu_figures
#
# Nothing else may use the GPU meanwhile. What has its file in the folder is not measured again, so
# the same command continues what was stopped; a whole run that was stopped begins again. What fails
# is named at the end, with its log, and leaves the others alone; the exit status is then 1.
# WIKITEXT=FOLDER reads WikiText-2 from train.txt, valid.txt and test.txt there instead of the
# hub's. DRY_RUN=1 prints the commands. The tests of the GPU, one of the steps, need pytest:
# pip install -e '.[cuda12,analysis,dev]'
set -euo pipefail
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
folder=$(absolute "${1:?give the folder of the results}")
wikitext=${WIKITEXT:+$(absolute "$WIKITEXT")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
cache=$folder/cache_of_runs
# Unless the caller says otherwise, each command fails where JAX finds no GPU: else a CPU's figures
# would be kept as a GPU's.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
failed=()
running=

stop() {  # What runs is asked to stop as well, or it would go on using the GPU.
  if [ -n "$running" ]; then
    kill "$running" && wait "$running" || true
  fi
  exit 130
}
trap stop INT TERM

attempt() {  # attempt NAME FILE COMMAND...: runs it, unless its file is there
  local name=$1 file=$2 started
  shift 2
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
    return
  fi
  if [ -n "$file" ] && [ -e "$file" ]; then
    echo "$name: there already"
    return
  fi
  mkdir -p "$folder"
  started=${EPOCHREALTIME/[.,]/}  # microseconds; bash 5
  "$@" >"$folder/$name.log" 2>&1 </dev/null &
  running=$!
  if wait "$running"; then
    running=
    grep -E '^\||passed' "$folder/$name.log" || true
    local tenths=$(((${EPOCHREALTIME/[.,]/} - started) / 100000))
    echo "$name: $((tenths / 10)).$((tenths % 10)) s" | tee -a "$folder/$name.log"
  else
    running=
    echo "$name: failed, see $folder/$name.log"
    failed+=("$name")
  fi
}

measure() {  # measure NAME BENCHMARK OPTIONS...
  attempt "$1" "$folder/$1.json" "$python" -m "benchmarks.$2" "${@:3}" --out="$folder/$1.json"
}

headline() {  # headline NAME: the original's protocol, whole; NAME.log ends with the wall time
  local text=()
  # A run that was stopped begins again, since its time is the figure; the first with no cache, and
  # the others only with the one that it has filled.
  if [ "${DRY_RUN:-0}" != 1 ] && [ ! -e "$folder/$1/summary.json" ]; then
    rm -rf "${folder:?}/$1"
    if [ "$1" = cold ]; then
      rm -rf "${cache:?}" "$folder"/cached_?
    elif [ ! -e "$folder/cold/summary.json" ] || [ ! -d "$cache" ]; then
      echo "$1: failed, for want of the programs that cold compiles; remove $folder/cold, if it is there, and begin anew"
      failed+=("$1")
      return
    fi
  fi
  if [ -n "$wikitext" ]; then
    text=(--config.data.source=text --config.data.path="$wikitext")
  fi
  attempt "$1" "$folder/$1/summary.json" "$python" -m hgnn_moe_jax.main --quiet \
    --config=configs/original.py --config.seed=42 --config.data.cache_dir="$cache" \
    --workdir="$folder/$1" ${text[@]+"${text[@]}"}
}

# What XLA puts into the CUDA graphs of these programs by default, and loops besides.
graphs=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE

measure shapes train_step --shape=original,d384 --coupler=graph,hypergraph
measure large train_step --shape=large --nocached
measure large_in_turn train_step --shape=large --sweep=model.unrolled_layers=4,12 \
  --sweep=training.steps_per_dispatch=4 --in_turn --nocached
# What has been planned and not timed: a loop in a CUDA graph, products in place as JAX has them.
measure dispatch train_step --shape=original --sweep=training.steps_per_dispatch=8,40 --in_turn \
  --nocached --compiler_option=xla_gpu_enable_command_buffer="$graphs" \
  --compiler_option=xla_gpu_enable_dynamic_slice_fusion=true
# And a loop over layers whose stacks are not filled with zeros first, in front of what fills them.
measure zeros train_step --shape=large --in_turn --nocached \
  --compiler_option=xla_gpu_enable_dus_accumulator_zero_init_elimination=true
measure overhead overhead --config=configs/original.py --vocab_size=50257 --steps=32 \
  --variant="adaptive both"
headline cold
headline cached_1
headline cached_2
attempt tests "" env JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
  "$python" -m pytest -p no:cacheprovider tests/gpu_test.py
measure parts_original parts --shape=original
measure parts_large parts --shape=large
measure generation generation --shape=original --coupler=graph,hypergraph
measure data data
measure experts train_step --shape=original --nocached --sweep=model.num_experts=2,4,8,16,32,64
measure length train_step --shape=original --nocached --sweep=model.max_length=128,256,512,1024,2048
measure layers train_step --shape=original --nocached --sweep=model.num_layers=1,2,4,8,16
measure accumulation train_step --shape=original --nocached --in_turn \
  --sweep=training.accumulation=1,2,4
measure selected train_step --shape=original --nocached --in_turn \
  --sweep=model.selected_experts=0,1,2

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
