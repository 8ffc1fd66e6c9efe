"""Figures of several runs: the arms of a drill, the groups of a comparison."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import (
  COLUMNS,
  colour,
  draw_chance,
  layer_panels,
  legend,
  line_style,
  log_axis,
  panels,
  say,
  smooth,
  step_axis,
)
from hgnn_moe_jax.analysis.timing import evaluation_seconds, perplexity_at

_SMOOTHING = 5
_ROWS = {
  "weight_specialization": "weight\nspecialization",
  "output_specialization": "output\nspecialization",
  "weight_strength": "strength of the\nweight penalty",
  "output_strength": "strength of the\noutput penalty",
}
_GRID = 200


def collapse_drill(runs: Mapping[str, RunData], fault_step: int, path: pathlib.Path) -> None:
  """Score, effective number of experts and strength around the fault; a column per layer.

  Args:
    runs: arm -> the damaged run.
    fault_step: drawn as a vertical line.
    path: of the PNG; an SVG of the same name is written, too.
  """
  first = next(iter(runs.values()))
  layers, experts = first.config.model.num_layers, first.config.model.num_experts
  rows = [
    ("output_specialization", "output\nspecialization", (0.0, 1.02)),
    ("effective_experts", "effective number\nof experts", (0.9, experts + 0.1)),
    ("output_strength", "strength of the\noutput penalty", None),
  ]
  groups = {arm: [run] for arm, run in runs.items()}
  with panels(len(rows), layers, path, 5.0 * layers, 7.5, sharex=True, sharey="row") as (
    figure,
    axes_RL,
  ):
    for (field, label, limits), axes_L in zip(rows, axes_RL, strict=True):
      _curves(axes_L, groups, field, label)
      for axes in axes_L:
        axes.axvline(fault_step, color="0.4", linestyle=":", linewidth=1.2)
        if limits is not None:
          axes.set_ylim(*limits)
    for axes in axes_RL[0]:
      level = first.chance.get("output_specialization")
      draw_chance(axes, level, named=axes is axes_RL[0][-1])
    axes_RL[0][0].annotate("fault", (fault_step, 0.05), xytext=(4, 0), textcoords="offset points")
    _finish(figure, axes_RL)


def comparison(groups: Mapping[str, Sequence[RunData]], path: pathlib.Path) -> bool:
  """Specialization and strengths over time, a column per layer; mean and range over the seeds.

  A row of panels that not all runs have logged, or a penalty that none had, is not there.

  Args:
    groups: label -> the runs of one config, one per seed; all with the same logged steps.
    path: of the PNG; an SVG of the same name is written, too.

  Returns:
    Whether there was anything to draw.
  """
  runs = [run for group in groups.values() for run in group]
  logged = {f: label for f, label in _ROWS.items() if not any(run.lacks(f) for run in runs)}
  rows = {f: label for f, label in logged.items() if any(run.train[f].any() for run in runs)}
  if not rows:
    return False
  size = (len(rows), runs[0].config.model.num_layers)
  with layer_panels(*size, path, 5.0, 2.5, sharex=True, sharey="row") as (figure, axes_KL):
    for (field, label), axes_L in zip(rows.items(), axes_KL, strict=True):
      _curves(axes_L, groups, field, label)
      for axes in axes_L:
        # Models of several widths have several.
        for level in {run.chance.get(field) for run in runs}:
          draw_chance(axes, level, named=axes is axes_L[:COLUMNS][-1])
    _finish(figure, axes_KL)
  return True


def comparison_curves(
  groups: Mapping[str, Sequence[RunData]], seconds: float | None, path: pathlib.Path
) -> None:
  """Validation token perplexity over steps and over training time; mean and range over the seeds.

  Over steps: where every seed was evaluated. Over time: from the last of the seeds' first
  evaluations to the first of their last ones, interpolated as the table's; dots are evaluations.

  Args:
    groups: label -> the runs of one config, one per seed, with evaluations.
    seconds: drawn as a vertical line, the time at which the table compares; None if the runs do not
      tell their time.
    path: of the PNG; an SVG of the same name is written, too.
  """
  with panels(1, 2, path, 11.0, 4.6, sharey=True) as (figure, axes):
    by_step, by_time = axes[0]
    for index, (name, runs) in enumerate(groups.items()):
      steps = sorted(set.intersection(*({e["step"] for e in run.evaluations} for run in runs)))
      losses = [[e["loss"] for e in run.evaluations if e["step"] in steps] for run in runs]
      _band(by_step, np.array(steps), np.exp(losses), index, name)
      by_step.plot(steps, np.exp(losses).mean(axis=0), "o", color=colour(index), markersize=4)
      if seconds is not None:
        _over_time(by_time, runs, index)
    by_step.set_ylabel("validation token perplexity")
    step_axis(by_step)
    log_axis(by_step)
    by_time.set_xlabel("training time, seconds")
    if seconds is None:
      say(by_time, "not every run tells its training time")
    else:
      by_time.axvline(seconds, color="0.4", linestyle=":", linewidth=1.2)
      by_time.annotate(
        "every run got so far", (seconds, 1.0), xycoords=("data", "axes fraction"),
        ha="center", va="bottom", size=10,
      )  # fmt: skip
      by_time.set_xlim(left=0.0)
    legend(figure, by_step)


def _over_time(axes, runs: Sequence[RunData], index: int) -> None:
  """One group's curve over the time that all of its seeds cover, and every evaluation."""
  times = [evaluation_seconds(run) for run in runs]
  first, last = max(t[0] for t in times), min(t[-1] for t in times)
  if first < last:
    grid = np.linspace(first, last, _GRID)
    _band(axes, grid, np.stack([perplexity_at(run, grid) for run in runs]), index, None)
  for run, seconds in zip(runs, times, strict=True):
    values = np.exp([e["loss"] for e in run.evaluations])
    axes.plot(seconds, values, "o-", color=colour(index), markersize=3, linewidth=0.6, alpha=0.5)


def _band(axes, x: np.ndarray, values_RS: np.ndarray, index: int, label: str | None) -> None:
  """The mean over runs as a line, their range shaded."""
  look = {"color": colour(index)}
  axes.plot(
    x, values_RS.mean(axis=0), **look, linestyle=line_style(index), linewidth=1.6, label=label
  )
  if len(values_RS) > 1:
    low, high = values_RS.min(axis=0), values_RS.max(axis=0)
    axes.fill_between(x, low, high, **look, alpha=0.2, linewidth=0)


def _curves(axes_L, groups: Mapping[str, Sequence[RunData]], field: str, label: str) -> None:
  """One row of panels: the groups' means over seeds, layer by layer, with their range."""
  for layer, axes in enumerate(axes_L):
    for index, (name, runs) in enumerate(groups.items()):
      values = np.stack([smooth(run.train[field][:, layer], _SMOOTHING) for run in runs])
      _band(axes, runs[0].train["step"], values, index, name)
  for axes in axes_L[::COLUMNS]:
    axes.set_ylabel(label)


def _finish(figure, axes_RL) -> None:
  for layer, axes in enumerate(axes_RL[0]):
    axes.set_title(f"layer {layer}")
  for axes in axes_RL[-1]:
    step_axis(axes)
    axes.tick_params(labelbottom=True)  # also where no panel is below
  legend(figure, axes_RL[0][0])
