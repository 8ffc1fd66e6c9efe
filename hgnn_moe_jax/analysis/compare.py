"""Several configs, several seeds each: means, intervals and paired differences.

python -m hgnn_moe_jax.analysis.compare runs/study/* --baseline=none --output=runs/study-compared

Runs of one config with different seeds are a group, named by the config's name. Writes a page with
the answer (comparison.html), the table (comparison.md, .csv) and figures (comparison.png,
comparison_curves.png, and SVG) into the output folder.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis import tables, timing
from hgnn_moe_jax.analysis.runs import RunData, read_run
from hgnn_moe_jax.analysis.statistics import compare
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import UserError

Groups = Mapping[str, Sequence[RunData]]


def group_runs(named: Sequence[tuple[str, RunData]]) -> dict[str, list[RunData]]:
  """Name -> runs, one per seed and in their order; groups in the order of the runs.

  Args:
    named: the group's name and a run, one or more.

  Raises:
    UserError: runs that cannot be compared: unfinished ones, other text, another number of layers
      or of steps, scored with another context, one name for two configs, or a seed twice in a
      group.
  """
  if not named:
    raise UserError("nothing to compare: give the folders of finished runs")
  first = named[0][1]
  groups: dict[str, list[RunData]] = {}
  for name, run in named:
    if run.summary is None:
      raise UserError(f"{run.folder}: the run is not finished; continue it or leave it out")
    for what, of in _MUST_AGREE.items():
      if of(run) != of(first):
        raise UserError(
          f"{run.folder} cannot be compared with {first.folder}: {what} {_brief(of(run))} and "
          f"{_brief(of(first))}"
        )
    group = groups.setdefault(name, [])
    if group and _meaning(group[0]) != _meaning(run):
      raise UserError(
        f"{run.folder} and {group[0].folder} have the name {name!r} and differ in more "
        "than the seed; give each a name of its own: NAME=FOLDER"
      )
    if any(other.config.seed == run.config.seed for other in group):
      raise UserError(f"{run.folder}: seed {run.config.seed} is there twice in its group")
    group.append(run)
  return {name: sorted(group, key=lambda run: run.config.seed) for name, group in groups.items()}


# The fields that decide these are known to `sweep`, which refuses a grid over them beforehand.
_MUST_AGREE: dict[str, Any] = {
  "text": lambda run: run.data.get("fingerprint"),
  "steps": lambda run: run.summary["steps"],
  "layers": lambda run: run.config.model.num_layers,
  "logged steps": lambda run: len(run.train["step"]),
  "evaluation.stride": lambda run: run.config.evaluation.stride,
}


def _brief(value: Any) -> str:
  """Of a fingerprint the beginning."""
  text = str(value)
  return text if len(text) <= 12 else f"{text[:8]}..."


def _meaning(run: RunData) -> str:
  """What decides the result, but for the seed; to be compared."""
  content = run.config.to_dict()
  del content["seed"], content["name"]
  for group in dataclasses.fields(Config):
    owner = getattr(run.config, group.name)
    for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
      if not field.metadata.get("meaning", True):
        del content[group.name][field.name]
  return json.dumps({**content, "unknown": run.unknown}, sort_keys=True)


def left_out(groups: Groups) -> list[str]:
  """What the comparison says nothing about, and why; for runs of another version."""
  runs = [run for group in groups.values() for run in group]
  told = [f"{run.folder}: {oddity}" for run in runs for oddity in run.oddities()]
  for what, fields in _NEEDS.items():
    if lacking := [run for run in runs if run.lacks(*fields)]:
      told.append(f"{what}: {lacking[0].folder}: {lacking[0].lacks(*fields)}")
  told += [
    f"Equal time: {run.folder}: metrics.jsonl has no evaluation; restore the file"
    for run in runs
    if not run.evaluations
  ]
  return told


_NEEDS = {
  "Equal time": timing.NEEDS,
  "Effective experts": ("effective_experts",),
  "Weight specialization": ("weight_specialization",),
  "Output specialization": ("output_specialization",),
  "Strength of the weight penalty": ("weight_strength",),
  "Strength of the output penalty": ("output_strength",),
}


def write(groups: Groups, output: pathlib.Path, baseline: str | None = None) -> pathlib.Path:
  """Writes comparison.md, .csv, .html and the figures into a folder; returns the first's path.

  Args:
    groups: of `group_runs`.
    output: the folder; made if it is not there.
    baseline: name of the group that the others are paired with, seed by seed.

  Raises:
    UserError: no such baseline, or `output` cannot be written.
  """
  from hgnn_moe_jax.analysis import comparison_page, style  # Figures need matplotlib, an extra.

  comparison = compare(groups, baseline)
  style.make_folder(output)
  path = output / "comparison.md"
  path.write_text(tables.markdown(comparison), encoding="utf-8")
  (output / "comparison.csv").write_text(tables.as_csv(comparison), encoding="utf-8")
  figures = comparison_page.draw(groups, comparison, output)
  content = comparison_page.comparison_page(groups, comparison, figures, left_out(groups))
  (output / "comparison.html").write_text(content, encoding="utf-8")
  return path


def _named(word: str) -> tuple[str, RunData]:
  """A run and its config's name, or of NAME=FOLDER that name."""
  name, _, folder = word.partition("=")
  if folder and not pathlib.Path(word).exists() and pathlib.Path(folder).exists():
    return name, read_run(pathlib.Path(folder))
  run = read_run(pathlib.Path(word))
  return run.config.name, run


def main() -> None:
  """The command."""
  baseline = flags.DEFINE_string("baseline", None, "Name of the group to compare the others with.")
  folder = flags.DEFINE_string("output", "runs/comparison", "Folder for page, table and figures.")

  def run(argv: list[str]) -> None:
    groups = group_runs(list(map(_named, argv[1:])))
    path = write(groups, pathlib.Path(folder.value), baseline.value)
    for reason in left_out(groups):
      print("left out:", reason, file=sys.stderr)
    print(path.read_text(encoding="utf-8"), end="")

  cli.start(run)


if __name__ == "__main__":
  main()
