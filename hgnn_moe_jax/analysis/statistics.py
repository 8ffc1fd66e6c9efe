"""Means over seeds, intervals, paired differences; a row for each group of runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from hgnn_moe_jax.analysis import timing
from hgnn_moe_jax.analysis.answer import at_the_end
from hgnn_moe_jax.analysis.runs import RunData
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
    seconds: of training, mean over the seeds.
    timed_perplexity: validation token perplexity at the comparison's time; None without one, nan
      where a run was not evaluated by then.
    timed_difference: the same, from the baseline's.
    weight_specialization, output_specialization, effective_experts: by layer; empty if one of the
      runs has not logged it.
    chance: the scores of independent random experts.
    experts: in a layer.
  """

  name: str
  seeds: list[int]
  perplexity: Interval
  word_perplexity: Interval
  difference: Difference | None
  seconds: float
  timed_perplexity: Interval | None
  timed_difference: Difference | None
  weight_specialization: list[float]
  output_specialization: list[float]
  effective_experts: list[float]
  chance: Mapping[str, float]
  experts: int


class Comparison(NamedTuple):
  """Attributes:
  rows: one per group.
  baseline: name of the group that the others are paired with; None without one.
  seconds: the longest training time that every run has reached; None if one does not tell it.
  """

  rows: list[Row]
  baseline: str | None
  seconds: float | None


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


def compare(groups: Mapping[str, Sequence[RunData]], baseline: str | None = None) -> Comparison:
  """A row per group.

  Args:
    groups: name -> finished runs, one per seed; see `compare.group_runs`.
    baseline: name of the group that the others are paired with, seed by seed.

  Raises:
    UserError: no group of that name.
  """
  if baseline is not None and baseline not in groups:
    raise UserError(f"--baseline={baseline}: no such group; use one of {', '.join(groups)}")
  seconds = timing.common_seconds(run for runs in groups.values() for run in runs)
  last = {name: _by_seed(runs, "token_perplexity") for name, runs in groups.items()}
  timed: dict[str, dict[int, float]] = {}
  if seconds is not None:
    for name, runs in groups.items():
      timed[name] = {r.config.seed: float(timing.perplexity_at(r, seconds)) for r in runs}
  rows = []
  for name, runs in groups.items():
    other = baseline if name != baseline else None
    rows.append(
      Row(
        name=name,
        seeds=[run.config.seed for run in runs],
        perplexity=interval(list(last[name].values())),
        word_perplexity=interval(list(_by_seed(runs, "word_perplexity").values())),
        difference=paired_difference(last[name], last[other]) if other else None,
        seconds=float(np.mean([_summary(run)["train_seconds"] for run in runs])),
        timed_perplexity=interval(list(timed[name].values())) if timed else None,
        timed_difference=(
          paired_difference(timed[name], timed[other]) if other and timed else None
        ),
        weight_specialization=_at_the_end(runs, "weight_specialization"),
        output_specialization=_at_the_end(runs, "output_specialization"),
        effective_experts=_at_the_end(runs, "effective_experts"),
        chance=runs[0].chance,
        experts=runs[0].config.model.num_experts,
      )
    )
  return Comparison(rows, baseline, seconds)


def _summary(run: RunData) -> dict[str, Any]:
  assert run.summary is not None
  return run.summary


def _by_seed(runs: Sequence[RunData], field: str) -> dict[int, float]:
  return {run.config.seed: _summary(run)["last"][field] for run in runs}


def _at_the_end(runs: Sequence[RunData], field: str) -> list[float]:
  if any(run.lacks(field) for run in runs):
    return []
  return np.mean([at_the_end(run, field) for run in runs], axis=0).tolist()
