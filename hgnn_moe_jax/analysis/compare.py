"""Several configs, several seeds each: means, intervals and paired differences.

python -m hgnn_moe_jax.analysis.compare runs/study/* --baseline=none --output=runs/study-compared

Runs of one config with different seeds are a group, named by the config's name. Writes a table
(comparison.md, .csv) and a figure (comparison.png, .svg) into the output folder.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import stats

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis.runs import RunData, read_run
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import UserError


class Interval(NamedTuple):
  """A mean and the half-width of its 95 % interval by Student's t; nan for one value."""

  mean: float
  half_width: float


class Difference(NamedTuple):
  """Mean over the seeds that both have of value - baseline, its interval, and the p-value.

  p: two-sided paired t-test of no difference; nan for fewer than two seeds in common.
  """

  seeds: int
  mean: float
  half_width: float
  p: float


class Row(NamedTuple):
  """One group. Scores are means over seeds and over the last tenth of the steps, by layer.

  Attributes:
    name: of the group.
    seeds: in order.
    perplexity: validation token perplexity at the end.
    word_perplexity: the same per word.
    difference: of the token perplexity from the baseline's; None without one.
    weight_specialization, output_specialization, effective_experts: by layer.
  """

  name: str
  seeds: list[int]
  perplexity: Interval
  word_perplexity: Interval
  difference: Difference | None
  weight_specialization: list[float]
  output_specialization: list[float]
  effective_experts: list[float]


def interval(values: Sequence[float]) -> Interval:
  """Mean and 95 % half-width `t(0.975, n - 1) s / sqrt(n)`."""
  n = len(values)
  if n < 2:
    return Interval(float(np.mean(values)), math.nan)
  half_width = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
  return Interval(float(np.mean(values)), float(half_width))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
  """Of two mappings seed -> value, over the seeds in both.

  Raises:
    UserError: no seed in common.
  """
  seeds = sorted(set(values) & set(baseline))
  if not seeds:
    raise UserError("the runs and the baseline have no seed in common; train some with the same")
  differences = [values[s] - baseline[s] for s in seeds]
  mean, half_width = interval(differences)
  if len(seeds) < 2:
    p = math.nan
  elif np.std(differences) == 0.0:
    p = 1.0 if mean == 0.0 else 0.0
  else:
    t = mean / (np.std(differences, ddof=1) / math.sqrt(len(seeds)))
    p = float(2.0 * stats.t.sf(abs(t), len(seeds) - 1))
  return Difference(len(seeds), mean, half_width, p)


def group_runs(named: Sequence[tuple[str, RunData]]) -> dict[str, list[RunData]]:
  """Name -> runs, one per seed and in their order; groups in the order of the runs.

  Args:
    named: the group's name and a run, one or more.

  Raises:
    UserError: runs that cannot be compared: unfinished ones, other text, another number of layers
      or of steps, one name for two configs, or a seed twice in a group.
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
          f"{run.folder} cannot be compared with {first.folder}: {what} {of(run)} and {of(first)}"
        )
    group = groups.setdefault(name, [])
    if group and _meaning(group[0].config) != _meaning(run.config):
      raise UserError(
        f"{run.folder} and {group[0].folder} have the name {name!r} and differ in more "
        "than the seed; give them different names (--config.name)"
      )
    if any(other.config.seed == run.config.seed for other in group):
      raise UserError(f"{run.folder}: seed {run.config.seed} is there twice in its group")
    group.append(run)
  return {name: sorted(group, key=lambda run: run.config.seed) for name, group in groups.items()}


_MUST_AGREE: dict[str, Any] = {
  "text": lambda run: run.data.get("fingerprint"),
  "steps": lambda run: run.summary["steps"],
  "layers": lambda run: run.config.model.num_layers,
  "logged steps": lambda run: len(run.train["step"]),
}


def _meaning(config: Config) -> str:
  """What decides the result, but for the seed; to be compared."""
  content = config.to_dict()
  del content["seed"]
  for group in dataclasses.fields(Config):
    owner = getattr(config, group.name)
    for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
      if not field.metadata.get("meaning", True):
        del content[group.name][field.name]
  return json.dumps(content, sort_keys=True)


def compare(groups: Mapping[str, Sequence[RunData]], baseline: str | None = None) -> list[Row]:
  """A row per group.

  Args:
    groups: of `group_runs`.
    baseline: name of the group that the others are paired with, seed by seed.

  Raises:
    UserError: no group of that name.
  """
  if baseline is not None and baseline not in groups:
    raise UserError(f"--baseline={baseline}: no such group; use one of {', '.join(groups)}")
  rows = []
  for name, runs in groups.items():
    difference = None
    if baseline is not None and name != baseline:
      difference = paired_difference(_perplexities(runs), _perplexities(groups[baseline]))
    rows.append(
      Row(
        name=name,
        seeds=[run.config.seed for run in runs],
        perplexity=interval(list(_perplexities(runs).values())),
        word_perplexity=interval([_last(run)["word_perplexity"] for run in runs]),
        difference=difference,
        weight_specialization=_at_the_end(runs, "weight_specialization"),
        output_specialization=_at_the_end(runs, "output_specialization"),
        effective_experts=_at_the_end(runs, "effective_experts"),
      )
    )
  return rows


def _last(run: RunData) -> dict[str, Any]:
  assert run.summary is not None
  return run.summary["last"]


def _perplexities(runs: Sequence[RunData]) -> dict[int, float]:
  return {run.config.seed: _last(run)["token_perplexity"] for run in runs}


def _at_the_end(runs: Sequence[RunData], field: str) -> list[float]:
  tenth = max(1, len(runs[0].train["step"]) // 10)
  return np.mean([run.train[field][-tenth:].mean(axis=0) for run in runs], axis=0).tolist()


def markdown(rows: Sequence[Row], chance: Mapping[str, float]) -> str:
  """The rows as a table, with the chance levels in its head."""
  weight, output = (chance.get(f"{s}_specialization", math.nan) for s in ("weight", "output"))
  lines = [
    "| group | seeds | token perplexity | difference from the baseline | word perplexity "
    f"| weight specialization (chance {weight:.4f}) | output specialization (chance {output:.3f}) "
    "| effective experts |",
    "|---|---|---|---|---|---|---|---|",
  ]
  layers = lambda a, digits: " / ".join(f"{x:.{digits}f}" for x in a)  # noqa: E731
  for r in rows:
    lines.append(
      f"| {r.name} | {len(r.seeds)} | {r.perplexity.mean:.2f} ± {r.perplexity.half_width:.2f} "
      f"| {_difference_text(r.difference)} "
      f"| {r.word_perplexity.mean:.1f} ± {r.word_perplexity.half_width:.1f} "
      f"| {layers(r.weight_specialization, 4)} | {layers(r.output_specialization, 3)} "
      f"| {layers(r.effective_experts, 2)} |"
    )
  return "\n".join(lines) + "\n"


def _difference_text(difference: Difference | None) -> str:
  if difference is None:
    return ""
  d = difference
  return f"{d.mean:+.2f} ± {d.half_width:.2f} (p = {d.p:.2g}, {d.seeds} pairs)"


def as_csv(rows: Sequence[Row]) -> str:
  """The rows with a column per number."""
  file = io.StringIO()
  table = [
    {
      "group": r.name,
      "seeds": len(r.seeds),
      **_prefixed("token_perplexity", r.perplexity._asdict()),
      **_prefixed("word_perplexity", r.word_perplexity._asdict()),
      **_prefixed("difference", r.difference._asdict() if r.difference else {}),
      **{
        f"{field}_layer{layer}": value
        for field in ("weight_specialization", "output_specialization", "effective_experts")
        for layer, value in enumerate(getattr(r, field))
      },
    }
    for r in rows
  ]
  names = max(table, key=len)
  writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows(table)
  return file.getvalue()


def _prefixed(prefix: str, fields: Mapping[str, float]) -> dict[str, float]:
  return {f"{prefix}_{name}": value for name, value in fields.items()}


def write(
  groups: Mapping[str, Sequence[RunData]], output: pathlib.Path, baseline: str | None = None
) -> pathlib.Path:
  """Writes comparison.md, .csv, .png and .svg into a folder; returns the path of the first."""
  from hgnn_moe_jax.analysis import figures

  rows = compare(groups, baseline)
  output.mkdir(parents=True, exist_ok=True)
  path = output / "comparison.md"
  path.write_text(markdown(rows, next(iter(groups.values()))[0].chance))
  (output / "comparison.csv").write_text(as_csv(rows))
  figures.comparison(groups, output / "comparison.png")
  return path


def main() -> None:
  """The command."""
  baseline = flags.DEFINE_string("baseline", None, "Name of the group to compare the others with.")
  folder = flags.DEFINE_string("output", "runs/comparison", "Folder for the table and the figure.")

  def run(argv: list[str]) -> None:
    runs = [read_run(pathlib.Path(word)) for word in argv[1:]]
    groups = group_runs([(run.config.name, run) for run in runs])
    print(write(groups, pathlib.Path(folder.value), baseline.value).read_text(), end="")

  cli.start(run)


if __name__ == "__main__":
  main()
