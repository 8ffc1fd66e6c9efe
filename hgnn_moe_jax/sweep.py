"""A grid of runs: every combination of values, several seeds each, then the comparison.

python -m hgnn_moe_jax.sweep --config=configs/adaptive_output.py --workdir=runs/schedules \\
  --grid='adaptive.decay_schedule=cosine,exponential,linear' --seeds=3

Each run is a process of its own, one after the other: `hgnn_moe_jax.main` with the same --config
flags, in WORKDIR/CELL-SEED. The same command continues a sweep that was stopped: finished runs are
skipped, others continue; another config in the same folder is refused. --slurm=FILE writes an array
job with those commands instead.
"""

import itertools
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.errors import ConfigError, NonFiniteError, Preempted, UserError
from hgnn_moe_jax.training import run_folder
from hgnn_moe_jax.training.processes import stop_requests

_POLL_SECONDS = 0.2
# Runs that differ in these cannot be compared by `analysis.compare`: told before they are trained.
_APART = (
  *("model.num_layers", "training.steps", "training.epochs", "training.log_every"),
  *("evaluation.stride", "data.source", "data.path", "data.name", "data.text_field", "data.rows"),
  *("data.split_seed", "data.tokenizer", "data.vocab_size", "data.protocol"),
)


class Cell(NamedTuple):
  """One combination of values: its name, and field -> value."""

  name: str
  values: dict[str, Any]


class Job(NamedTuple):
  """One run: its cell and seed, the folder, the whole config, and the command's words."""

  cell: Cell
  seed: int
  folder: pathlib.Path
  config: Config
  words: list[str]


def parse_grid(grid: Sequence[str], config: Config, flag: str = "--grid") -> list[Cell]:
  """The product of all axes, the last one varying fastest.

  Args:
    grid: "group.field=value,value,..." each; commas inside brackets belong to a value.
    config: has the fields, and with them their types.
    flag: what gave the grid, for messages.

  Raises:
    UserError: no such field, a value of another type, or one that is not valid.
  """
  axes: list[list[tuple[str, Any]]] = []
  for text in grid:
    field, equals, values = text.partition("=")
    if not equals or not values:
      raise UserError(
        f"{flag}={text}: give a field and its values: training.learning_rate=1e-3,4e-3"
      )
    axes.append(
      [(field, _convert(f"{flag}={text}", field, value, config)) for value in _split(values)]
    )
  cells = []
  for combination in itertools.product(*axes):
    name = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in combination)
    cell = Cell(_file_name(name) or config.name, dict(combination))
    try:
      with_fields(config, cell.values).validate()
    except ConfigError as error:
      raise UserError(f"{flag}: {cell.name} cannot be trained: {error}") from None
    cells.append(cell)
  if len({cell.name for cell in cells}) < len(cells):
    raise UserError(f"{flag}={' '.join(grid)}: a combination comes twice; give each value once")
  return cells


def require_comparable(grid: Sequence[str], config: Config) -> None:
  """Raises UserError if runs of this grid could not be compared in the end.

  Args:
    grid: as in `parse_grid`, which has read it.
    config: what the grid does not set.
  """
  apart = list(_APART)
  if config.training.epochs:
    apart += ["training.batch_size", "model.max_length"]  # They decide how many steps there are.
  if config.data.protocol == "lines":
    apart.append("model.max_length")  # Lines are cut there: another text is scored.
  for text in grid:
    field, _, values = text.partition("=")
    if field in ("name", "seed"):
      cure = "the sweep names its runs" if field == "name" else "use --seeds=N for 0, 1, ... N - 1"
      raise UserError(f"--grid={text}: not a field of a grid; {cure}")
    if field in apart and len(_split(values)) > 1:
      raise UserError(
        f"--grid={text}: runs that differ in {field} cannot be compared layer by layer and step by "
        "step; make a sweep for each value"
      )


def _split(values: str) -> list[str]:
  parts, depth = [""], 0
  for character in values:
    depth += (character in "[(") - (character in "])")
    if character == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += character
  return parts


def _convert(given: str, field: str, value: str, config: Config) -> Any:
  group, _, name = field.partition(".")
  owner = getattr(config, group, None) if name else config
  if not hasattr(owner, name or group) or hasattr(getattr(owner, name or group), "__slots__"):
    raise UserError(f"{given}: no field {field}; they are in hgnn_moe_jax/config.py")
  kind = type(getattr(owner, name or group))
  try:
    return {"True": True, "False": False}[value] if kind is bool else kind(value)
  except (KeyError, ValueError):
    raise UserError(f"{given}: {value!r} is not of type {kind.__name__}") from None


def _file_name(name: str) -> str:
  return "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in name)


def make_jobs(
  config: Config, cells: Sequence[Cell], seeds: int, folder: pathlib.Path, given: Sequence[str]
) -> list[Job]:
  """Every run of a sweep, seeds outermost: a sweep that is cut short compares all cells.

  Args:
    config: of the --config flag, with its overrides.
    cells: of `parse_grid`.
    seeds: 0 ... seeds - 1.
    folder: of the sweep.
    given: the flags that made `config`, without seed and name.
  """
  jobs = []
  for seed, cell in itertools.product(range(seeds), cells):
    run = folder / f"{cell.name}-{seed}"
    changes = {**cell.values, "name": cell.name, "seed": seed}
    flag = [f"--config.{field}={value}" for field, value in changes.items()]
    words = ["-m", "hgnn_moe_jax.main", *given, *flag, f"--workdir={run}", "--quiet"]
    jobs.append(Job(cell, seed, run, with_fields(config, changes), words))
  return jobs


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


def _config_flags() -> list[str]:
  """The config file and its overrides as the runs get them, however they were written."""
  flag = flags.FLAGS["config"]
  overrides = config_flags.get_override_values(flag)
  return [
    f"--config={config_flags.get_config_filename(flag)}",
    *(f"--config.{k}={v}" for k, v in overrides.items() if k not in ("name", "seed")),
  ]


def ended(job: Job) -> str | None:
  """How the job's run has ended: "finished", "diverged" (as it would again), or None: it has not.

  Raises:
    UserError: it has, and was another run than this one.
  """
  if (job.folder / "summary.json").exists():
    how = "finished"
  elif b'"name": "non_finite"' in _last_line(job.folder / "metrics.jsonl"):
    how = "diverged"
  else:
    return None
  run_folder.require_same(job.folder, job.config)
  return how


def _last_line(path: pathlib.Path) -> bytes:
  *_, last = [b"", *path.read_bytes().splitlines()] if path.exists() else [b""]
  return last


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
    require_comparable(grid.value, config)
    names = [cell.name for cell in cells]
    if baseline.value is not None and baseline.value not in names:
      raise UserError(f"--baseline={baseline.value}: use one of {' '.join(names)}")
    folder = pathlib.Path(workdir.value or cli.default_folder(config.name, "-sweep"))
    jobs = make_jobs(config, cells, seeds.value, folder, _config_flags())
    if slurm.value:
      _write(pathlib.Path(slurm.value), slurm_script([job.words for job in jobs], config.name))
      print(f"sbatch {slurm.value}   # {len(jobs)} runs; then the same command without --slurm")
      return
    before = [ended(job) for job in jobs]  # Of all, so that what is refused is so before any runs.
    if dry_run.value:
      for job, how in zip(jobs, before, strict=True):
        print(f"# {how}" if how else "", shlex.join(["python", *job.words]))
      return
    with stop_requests() as stop:
      numbered = enumerate(zip(jobs, before, strict=True), 1)
      well = [_run_one(f"{n}/{len(jobs)}", job, how, stop) for n, (job, how) in numbered]
    left = list(itertools.compress(jobs, well))
    if diverged := [str(job.folder) for job in jobs if job not in left]:
      print("diverged, and left out:", *diverged, file=sys.stderr)
    if left:
      _compare(left, folder, _baseline(baseline.value, names, {job.cell.name for job in left}))
    if diverged:
      sys.exit(NonFiniteError.exit_status)

  cli.start(run)


def _baseline(wanted: str | None, names: Sequence[str], left: set[str]) -> str:
  """The wanted combination, else the first, of those that are left."""
  found = next(name for name in [wanted, *names] if name in left)
  if wanted not in (None, found):
    print(f"--baseline={wanted} has diverged: compared with {found}", file=sys.stderr)
  return found


def _run_one(number: str, job: Job, before: str | None, stop: threading.Event) -> bool:
  """False if its training diverged. That is a result; after any other error the sweep ends."""
  if before:
    print(f"{number} {job.folder}: {before} before", flush=True)
    return before == "finished"
  print(f"{number} {job.folder}", flush=True)
  status = _run_process([sys.executable, *job.words], stop)
  if status == NonFiniteError.exit_status:
    return False
  if status:  # The run has said why.
    print(f"stopped at {job.folder}; the same command continues", file=sys.stderr)
    sys.exit(status)
  summary = json.loads((job.folder / "summary.json").read_text())
  perplexity = float(summary["last"]["token_perplexity"])  # "inf" is a string there.
  print(f"{number} {job.folder}: validation token perplexity {perplexity:.2f}", flush=True)
  return True


def _run_process(words: Sequence[str], stop: threading.Event) -> int:
  """Runs a command to its end; its exit status. A request to stop is handed on, and waited for."""
  if stop.is_set():
    return Preempted.exit_status
  # In a group of its own: Ctrl-C would reach the run twice, and the second one ends it unsaved.
  with subprocess.Popen(words, stdout=subprocess.DEVNULL, process_group=0) as process:
    try:
      while process.poll() is None and not stop.wait(_POLL_SECONDS):
        pass
      if process.poll() is None:
        process.terminate()
      status = process.wait()
    finally:  # A second request: the run gets a second one, too.
      if process.poll() is None:
        process.terminate()
  if stop.is_set() and status == -signal.SIGTERM:  # It came before the run had anything to save.
    return Preempted.exit_status
  return status if status >= 0 else 128 - status  # As shells tell of a signal.


def _write(path: pathlib.Path, text: str) -> None:
  try:
    path.write_text(text)
  except OSError as error:
    raise UserError(f"--slurm={path}: cannot be written ({error.strerror})") from None


def _compare(jobs: Sequence[Job], folder: pathlib.Path, baseline: str) -> None:
  from hgnn_moe_jax.analysis import compare
  from hgnn_moe_jax.analysis.runs import read_run

  named = [(job.cell.name, read_run(job.folder)) for job in jobs]
  several = len({job.cell.name for job in jobs}) > 1
  path = compare.write(
    compare.group_runs(named), folder / "comparison", baseline if several else None
  )
  print(path.read_text(), end="")


if __name__ == "__main__":
  main()
