"""A grid of runs: every combination of values, several seeds each, then the comparison.

python -m hgnn_moe_jax.sweep --config=configs/adaptive_output.py --workdir=runs/schedules \\
  --grid='adaptive.decay_schedule=cosine,exponential,linear' --seeds=3

Each run is a process of its own, one after the other: `hgnn_moe_jax.main` with the same --config
flags, in WORKDIR/CELL-SEED. The same command continues a sweep that was stopped: finished runs are
skipped, others continue. --slurm=FILE writes an array job with those commands instead.
"""

import itertools
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.errors import ConfigError, UserError


class Cell(NamedTuple):
  """One combination of values: its name, and field -> value."""

  name: str
  values: dict[str, Any]


def parse_grid(grid: Sequence[str], config: Config) -> list[Cell]:
  """The product of all axes, the last one varying fastest.

  Args:
    grid: "group.field=value,value,..." each; commas inside brackets belong to a value.
    config: has the fields, and with them their types.

  Raises:
    UserError: no such field, a value of another type, or one that is not valid.
  """
  axes: list[list[tuple[str, Any]]] = []
  for text in grid:
    field, equals, values = text.partition("=")
    if not equals or not values:
      raise UserError(
        f"--grid={text}: give a field and its values: training.learning_rate=1e-3,4e-3"
      )
    axes.append([(field, _convert(text, field, value, config)) for value in _split(values)])
  cells = []
  for combination in itertools.product(*axes):
    name = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in combination)
    cell = Cell(_file_name(name) or config.name, dict(combination))
    try:
      with_fields(config, cell.values).validate()
    except ConfigError as error:
      raise UserError(f"--grid: {cell.name} cannot be trained: {error}") from None
    cells.append(cell)
  if len({cell.name for cell in cells}) < len(cells):
    raise UserError(f"--grid={' '.join(grid)}: a combination comes twice; give each value once")
  return cells


def _split(values: str) -> list[str]:
  parts, depth = [""], 0
  for character in values:
    depth += (character in "[(") - (character in "])")
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  return parts


def _convert(text: str, field: str, value: str, config: Config) -> Any:
  group, _, name = field.partition(".")
  owner = getattr(config, group, None) if name else config
  if not hasattr(owner, name or group) or hasattr(getattr(owner, name or group), "__slots__"):
    raise UserError(f"--grid={text}: no field {field}; they are in hgnn_moe_jax/config.py")
  kind = type(getattr(owner, name or group))
  try:
    return {"True": True, "False": False}[value] if kind is bool else kind(value)
  except (KeyError, ValueError):
    raise UserError(f"--grid={text}: {value!r} is not of type {kind.__name__}") from None


def _file_name(name: str) -> str:
  return "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in name)


def command(config_flags: Sequence[str], cell: Cell, seed: int, workdir: pathlib.Path) -> list[str]:
  """The command line of one run, without the interpreter."""
  return [
    *("-m", "hgnn_moe_jax.main", *config_flags, f"--config.name={cell.name}"),
    *(f"--config.{field}={value}" for field, value in cell.values.items()),
    *(f"--config.seed={seed}", f"--workdir={run_folder(workdir, cell, seed)}", "--quiet"),
  ]


def run_folder(workdir: pathlib.Path, cell: Cell, seed: int) -> pathlib.Path:
  return workdir / f"{cell.name}-{seed}"


def slurm_script(commands: Sequence[Sequence[str]], name: str) -> str:
  """An array job with one task per command; a task that is preempted asks to be queued again."""
  lines = "\n".join(f"  {shlex.quote(shlex.join(['python', *words]))}" for words in commands)
  return f"""#!/usr/bin/env bash
# sbatch this file: one task per run. Finished runs end at once, stopped ones continue.
#SBATCH --job-name={shlex.quote(name)}
#SBATCH --array=0-{len(commands) - 1}
#SBATCH --gpus=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -uo pipefail
commands=(
{lines}
)
srun bash -c "exec ${{commands[$SLURM_ARRAY_TASK_ID]}}"
status=$?
if [ "$status" -eq 75 ]; then  # stopped on request, everything is saved
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


def _config_flags(words: Sequence[str]) -> list[str]:
  """Those of the command line that the runs get, too; `--config FILE` may be two words."""
  found = []
  for word, after in itertools.pairwise([*words, ""]):
    if word.startswith("--config"):
      found.append(word if "=" in word else f"{word}={after}")
  return found


def finished(folder: pathlib.Path) -> bool:
  return (folder / "summary.json").exists()


def main() -> None:
  """The command."""
  given_config = cli.define_config()
  grid = flags.DEFINE_multi_string("grid", [], "FIELD=VALUE,VALUE,...; several make a product.")
  seeds = flags.DEFINE_integer("seeds", 1, "Seeds of each combination: 0, 1, ...", 1)
  workdir = flags.DEFINE_string(
    "workdir", None, "Folder of the runs; runs/NAME-sweep if not given."
  )
  baseline = flags.DEFINE_string("baseline", None, "Combination to compare with; else the first.")
  slurm = flags.DEFINE_string("slurm", None, "Write an array job into this file and stop.")
  dry_run = flags.DEFINE_boolean("dry_run", False, "Print the commands and stop.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    config = cli.validated(given_config.value)
    cells = parse_grid(grid.value, config)
    names = [cell.name for cell in cells]
    if baseline.value is not None and baseline.value not in names:
      raise UserError(f"--baseline={baseline.value}: use one of {' '.join(names)}")
    folder = pathlib.Path(workdir.value or f"runs/{config.name}-sweep")
    config_flags = _config_flags(sys.argv[1:])
    jobs = [
      (cell, seed, command(config_flags, cell, seed, folder))
      for seed in range(seeds.value)  # Seeds outermost: a sweep cut short compares all cells.
      for cell in cells
    ]
    if slurm.value:
      pathlib.Path(slurm.value).write_text(slurm_script([job[2] for job in jobs], config.name))
      print(f"sbatch {slurm.value}   # {len(jobs)} runs; then the same command without --slurm")
      return
    if dry_run.value:
      for cell, seed, words in jobs:
        done = finished(run_folder(folder, cell, seed))
        print("# finished" if done else "", shlex.join(["python", *words]))
      return
    for number, (cell, seed, words) in enumerate(jobs, 1):
      _run_one(f"{number}/{len(jobs)}", run_folder(folder, cell, seed), words)
    _compare(jobs, folder, baseline.value or names[0])

  cli.start(run)


def _run_one(number: str, folder: pathlib.Path, words: list[str]) -> None:
  if finished(folder):
    print(f"{number} {folder}: finished before", flush=True)
    return
  print(f"{number} {folder}", flush=True)
  status = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL).returncode
  if status:  # The run has said why.
    print(f"stopped at {folder}; the same command continues", file=sys.stderr)
    sys.exit(status)
  perplexity = json.loads((folder / "summary.json").read_text())["last"]["token_perplexity"]
  print(f"{number} {folder}: validation token perplexity {perplexity:.2f}", flush=True)


def _compare(
  jobs: Sequence[tuple[Cell, int, list[str]]], folder: pathlib.Path, baseline: str
) -> None:
  from hgnn_moe_jax.analysis import compare
  from hgnn_moe_jax.analysis.runs import read_run

  named = [(cell.name, read_run(run_folder(folder, cell, seed))) for cell, seed, _ in jobs]
  several = len({cell.name for cell, *_ in jobs}) > 1
  path = compare.write(
    compare.group_runs(named), folder / "comparison", baseline if several else None
  )
  print(path.read_text(), end="")


if __name__ == "__main__":
  main()
