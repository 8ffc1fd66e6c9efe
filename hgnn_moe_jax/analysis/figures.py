"""Figures of runs, as PNG and SVG. Colours of Okabe and Ito (2008), safe for the colour-blind."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.errors import UserError

try:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
except ImportError:
  raise UserError("figures need matplotlib: pip install 'hgnn_moe_jax[analysis]'") from None

_COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442"]
_STYLE: Any = {
  "font.size": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
  "legend.frameon": False,
  "figure.constrained_layout.use": True,
}


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
  with plt.rc_context(_STYLE):
    figure, axes_RL = plt.subplots(
      len(rows), layers, figsize=(5.0 * layers, 7.5), sharex=True, sharey="row", squeeze=False
    )
    for (field, label, limits), axes_L in zip(rows, axes_RL, strict=True):
      for layer, axes in enumerate(axes_L):
        for colour, (arm, run) in zip(_COLOURS, runs.items(), strict=False):
          values = smooth(run.train[field][:, layer], 5)
          axes.plot(run.train["step"], values, color=colour, label=arm, linewidth=1.6)
        axes.axvline(fault_step, color="0.4", linestyle=":", linewidth=1.2)
        if limits is not None:
          axes.set_ylim(*limits)
      axes_L[0].set_ylabel(label)
    for layer, axes in enumerate(axes_RL[0]):
      axes.set_title(f"layer {layer}")
      _chance(axes, first.chance.get("output_specialization"))
    axes_RL[0][0].annotate("fault", (fault_step, 0.05), xytext=(4, 0), textcoords="offset points")
    for axes in axes_RL[-1]:
      axes.set_xlabel("training step")
    figure.legend(*axes_RL[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    save(figure, path)


def comparison(groups: Mapping[str, list[RunData]], path: pathlib.Path) -> None:
  """Specialization and strengths over time, a column per layer; mean and range over the seeds.

  Args:
    groups: label -> the runs of one config, one per seed; all with the same logged steps.
    path: of the PNG; an SVG of the same name is written, too.
  """
  first = next(iter(groups.values()))[0]
  layers = first.config.model.num_layers
  rows = [
    ("weight_specialization", "weight\nspecialization", first.chance.get("weight_specialization")),
    ("output_specialization", "output\nspecialization", first.chance.get("output_specialization")),
    ("weight_strength", "strength of the\nweight penalty", None),
    ("output_strength", "strength of the\noutput penalty", None),
  ]
  with plt.rc_context(_STYLE):
    figure, axes_RL = plt.subplots(
      len(rows), layers, figsize=(5.0 * layers, 10.0), sharex=True, sharey="row", squeeze=False
    )
    for (field, label, chance), axes_L in zip(rows, axes_RL, strict=True):
      for layer, axes in enumerate(axes_L):
        for colour, (name, runs) in zip(_COLOURS, groups.items(), strict=False):
          values = np.stack([smooth(run.train[field][:, layer], 5) for run in runs])
          steps = runs[0].train["step"]
          axes.plot(steps, values.mean(axis=0), color=colour, label=name, linewidth=1.6)
          axes.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0
          )
      axes_L[0].set_ylabel(label)
      _chance(axes_L[0], chance)
    for layer, axes in enumerate(axes_RL[0]):
      axes.set_title(f"layer {layer}")
    for axes in axes_RL[-1]:
      axes.set_xlabel("training step")
    figure.legend(*axes_RL[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, path)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the last `window` values, of fewer at the start."""
  sums = np.cumsum(np.concatenate([np.zeros(window), values]))
  counts = np.minimum(np.arange(1, len(values) + 1), window)
  return (sums[window:] - sums[:-window]) / counts


def save(figure: Any, path: pathlib.Path) -> None:
  """Writes PNG and SVG, and forgets the figure."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  figure.savefig(path.with_suffix(".svg"))
  plt.close(figure)


def _chance(axes: Any, level: float | None) -> None:
  if level is not None:
    axes.axhline(level, color="0.4", linestyle="--", linewidth=1.0)
    axes.annotate("chance", (0.005, level), xycoords=("axes fraction", "data"), va="bottom", size=9)
