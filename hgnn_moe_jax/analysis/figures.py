"""Figures of several runs: the arms of a drill, the groups of a comparison."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import colour, draw_chance, line_style, panels, smooth

_SMOOTHING = 5


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
      draw_chance(axes, first.chance.get("output_specialization"))
    axes_RL[0][0].annotate("fault", (fault_step, 0.05), xytext=(4, 0), textcoords="offset points")
    _finish(figure, axes_RL)


def comparison(groups: Mapping[str, Sequence[RunData]], path: pathlib.Path) -> None:
  """Specialization and strengths over time, a column per layer; mean and range over the seeds.

  Args:
    groups: label -> the runs of one config, one per seed; all with the same logged steps.
    path: of the PNG; an SVG of the same name is written, too.
  """
  first = next(iter(groups.values()))[0]
  layers = first.config.model.num_layers
  rows = [
    ("weight_specialization", "weight\nspecialization"),
    ("output_specialization", "output\nspecialization"),
    ("weight_strength", "strength of the\nweight penalty"),
    ("output_strength", "strength of the\noutput penalty"),
  ]
  with panels(len(rows), layers, path, 5.0 * layers, 10.0, sharex=True, sharey="row") as (
    figure,
    axes_RL,
  ):
    for (field, label), axes_L in zip(rows, axes_RL, strict=True):
      _curves(axes_L, groups, field, label)
      draw_chance(axes_L[0], first.chance.get(field))
    _finish(figure, axes_RL)


def _curves(axes_L, groups: Mapping[str, Sequence[RunData]], field: str, label: str) -> None:
  """One row of panels: the groups' means over seeds, layer by layer, with their range."""
  for layer, axes in enumerate(axes_L):
    for index, (name, runs) in enumerate(groups.items()):
      values = np.stack([smooth(run.train[field][:, layer], _SMOOTHING) for run in runs])
      steps, look = runs[0].train["step"], {"color": colour(index)}
      axes.plot(
        steps, values.mean(axis=0), **look, label=name, linestyle=line_style(index), linewidth=1.6
      )
      if len(runs) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(steps, low, high, **look, alpha=0.2, linewidth=0)
  axes_L[0].set_ylabel(label)


def _finish(figure, axes_RL) -> None:
  for layer, axes in enumerate(axes_RL[0]):
    axes.set_title(f"layer {layer}")
  for axes in axes_RL[-1]:
    axes.set_xlabel("training step")
  figure.legend(*axes_RL[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
