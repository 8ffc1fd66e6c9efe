"""Figures of one run over its steps, from metrics.jsonl alone."""

import pathlib
from typing import Any

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import (
  colour,
  draw_chance,
  layer_panels,
  legend,
  line_style,
  log_axis,
  marker,
  panels,
  say,
  smooth,
  step_axis,
)

# Event name -> marker and what it says in a legend.
_EVENTS = {
  "emergency_on": ("v", "emergency begins"),
  "emergency_off": ("^", "emergency ends"),
  "converged": ("o", "converged"),
  "plateau": ("s", "validation plateau"),
  "fault": ("X", "fault"),
}


CORRELATED = (
  *("weight_strength", "output_strength", "weight_specialization", "output_specialization"),
  *("effective_experts", "lm_loss"),
)


def _window(run: RunData) -> int:
  """Curves are smoothed over a fiftieth of the run; raw values stay behind them, pale."""
  return max(1, len(run.train["step"]) // 50)


def _curve(axes: Any, run: RunData, values: np.ndarray, index: int, label: str | None) -> None:
  """A smoothed line, the raw values behind it."""
  look = {"color": colour(index), "linestyle": line_style(index), "marker": marker(values)}
  axes.plot(run.train["step"], values, **look, alpha=0.25, linewidth=0.8)
  axes.plot(run.train["step"], smooth(values, _window(run)), **look, linewidth=1.8, label=label)


def _layers(axes: Any, run: RunData, field: str) -> None:
  """A curve per layer."""
  for layer, values in enumerate(run.train[field].T):
    _curve(axes, run, values, layer, f"layer {layer}")


def _events(axes: Any, run: RunData, field: str | None = None) -> None:
  """Markers on the layer's own line where an event has a layer, else at the bottom."""
  steps, seen = run.train["step"], set()
  for event in run.events:
    if event["name"] not in _EVENTS:
      continue
    marker, label = _EVENTS[event["name"]]
    layer = event.get("layer")
    look: dict[str, Any] = {"marker": marker, "markersize": 8, "linestyle": "none"}
    look |= {"label": None if label in seen else label, "markeredgecolor": "black"}
    seen.add(label)
    if layer is None or field is None:
      axes.plot([event["step"]], [0.02], **look, color="0.6", transform=axes.get_xaxis_transform())
      continue
    at = min(int(np.searchsorted(steps, event["step"])), len(steps) - 1)
    axes.plot([event["step"]], [run.train[field][at, layer]], **look, color=colour(layer))


def loss(run: RunData, path: pathlib.Path) -> None:
  """Training loss per token, and validation token perplexity on an axis of its own."""
  with panels(1, 2, path, 10.0, 4.2) as (_, axes):
    left, right = axes[0]
    _curve(left, run, run.train["lm_loss"], 0, "training")
    step_axis(left)
    step_axis(right)
    left.set_ylabel("cross-entropy, nats per token")
    right.set_ylabel("validation token perplexity")
    if run.evaluations:
      at = [e["step"] for e in run.evaluations]
      losses = np.array([e["loss"] for e in run.evaluations], np.float64)
      left.plot(at, losses, "o-", color=colour(1), label="validation")
      right.plot(at, np.exp(losses), "o-", color=colour(1))
      right.annotate(
        f"{np.exp(losses[-1]):.4g}", (at[-1], np.exp(losses[-1])), xytext=(8, 0),
        textcoords="offset points", va="center",
      )  # fmt: skip
      log_axis(right)
    else:
      say(right, "not evaluated yet")
    left.legend()


def strengths(run: RunData, path: pathlib.Path) -> None:
  """Strength of both penalties, layer by layer, with the controller's events."""
  with panels(1, 2, path, 10.0, 4.2, sharex=True) as (figure, axes):
    for panel, kind in zip(axes[0], ("weight", "output"), strict=True):
      step_axis(panel)
      panel.set_ylabel(f"strength of the {kind} penalty")
      if not run.train[f"{kind}_strength"].any():
        say(panel, f"no {kind} penalty acted")
        continue
      _layers(panel, run, f"{kind}_strength")
      _events(panel, run, f"{kind}_strength")
      panel.set_ylim(bottom=0.0)
    legend(figure, axes)


def specialization(run: RunData, path: pathlib.Path) -> None:
  """Both specializations with their chance levels, and the effective number of experts."""
  fields = ("weight_specialization", "output_specialization", "effective_experts")
  labels = ("weight specialization", "output specialization", "effective number of experts")
  with panels(1, 3, path, 13.0, 4.2, sharex=True) as (figure, axes):
    for panel, field, label in zip(axes[0], fields, labels, strict=True):
      _layers(panel, run, field)
      draw_chance(panel, run.chance.get(field))
      panel.set_ylabel(label)
      step_axis(panel)
    axes[0][2].set_ylim(0.9, run.config.model.num_experts + 0.1)
    legend(figure, axes)


def emergencies(run: RunData, path: pathlib.Path) -> None:
  """When which layer was in emergency or converged, and when validation was on a plateau."""
  layers, steps = run.config.model.num_layers, run.train["step"]
  lanes = [(f"layer {n}", run.train["emergency"][:, n], run.train["converged"][:, n])
           for n in range(layers)]  # fmt: skip
  with panels(1, 1, path, 9.0, 1.6 + 0.45 * (layers + 1)) as (figure, axes):
    panel = axes[0][0]
    for lane, (_, emergency, converged) in enumerate(lanes):
      _bars(panel, steps, converged, lane, colour(2), "converged")
      _bars(panel, steps, emergency, lane, colour(1), "emergency")
    _bars(panel, steps, run.train["plateau"], layers, colour(0), "validation plateau")
    step_axis(panel)
    panel.set(xlim=(0, steps[-1]), ylim=(layers + 0.6, -0.6))
    panel.set_yticks(range(layers + 1), [*(name for name, *_ in lanes), "validation"])
    if not panel.collections:
      panel.set_title("nothing happened: no emergency, no convergence, no plateau", size=12)
    legend(figure, axes)


def _bars(panel: Any, steps: np.ndarray, on: np.ndarray, lane: int, face: str, label: str) -> None:
  """A bar for each stretch of steps in which `on` holds."""
  edges = np.diff(np.concatenate([[0], on.astype(int), [0]]))
  spans = [
    (steps[a], max(steps[b] - steps[a], 1))
    for a, b in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1, strict=True)
  ]
  if spans:
    panel.broken_barh(spans, (lane - 0.4, 0.8), facecolors=face, label=label)


def correlation(run: RunData, path: pathlib.Path) -> None:
  """Spearman's rank correlation over the steps between strengths, scores and training loss.

  Means over layers. Steps follow one another, so a correlation is no cause, and its size no test.
  """
  steps = len(run.train["step"])
  rows = [run.train[field].reshape(steps, -1).mean(axis=1) for field in CORRELATED]
  names = [field.replace("lm_", "training ").replace("_", " ") for field in CORRELATED]
  values = rank_correlation(np.stack(rows))
  with panels(1, 1, path, 7.5, 6.0) as (figure, axes):
    panel = axes[0][0]
    panel.grid(visible=False)
    image = panel.imshow(values, cmap="RdBu_r", vmin=-1.0, vmax=1.0)
    panel.set_xticks(range(len(names)), names, rotation=35, ha="right")
    panel.set_yticks(range(len(names)), names)
    for i in range(len(names)):
      for j in range(len(names)):
        text = "-" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}"
        shade = "white" if abs(values[i, j]) > 0.6 else "black"
        panel.text(j, i, text, ha="center", va="center", color=shade)
    figure.colorbar(image, label="rank correlation over steps", shrink=0.8)


def rank_correlation(values_FS: np.ndarray) -> np.ndarray:
  """Spearman's rho between rows; NaN where a row is constant. Ties share their mean rank."""
  from scipy import stats

  ranks_FS = stats.rankdata(values_FS, axis=1)
  centred_FS = ranks_FS - ranks_FS.mean(axis=1, keepdims=True)
  norms_F = np.linalg.norm(centred_FS, axis=1)
  norms_F[norms_F == 0.0] = np.nan
  return (centred_FS @ centred_FS.T) / np.outer(norms_F, norms_F)


def throughput(run: RunData, path: pathlib.Path) -> None:
  """Gradient norm before clipping, and tokens per second."""
  speed = run.train["tokens_per_second"]
  with panels(1, 2, path, 10.0, 4.2, sharex=True) as (_, axes):
    left, right = axes[0]
    _curve(left, run, run.train["grad_norm"], 0, None)
    if clip := run.config.training.clip_norm:
      left.axhline(clip, color="0.35", linestyle=":", label="clipping")
      left.legend()
    left.set_ylabel("gradient norm before clipping")
    log_axis(left)
    right.plot(run.train["step"], speed, color=colour(2), linewidth=1.2, marker=marker(speed))
    right.set_ylabel("tokens per second")
    right.set_ylim(bottom=0.0)
    step_axis(left)
    step_axis(right)


def gates(run: RunData, path: pathlib.Path) -> None:
  """Each expert's mean share in the pooled update, a panel per layer."""
  _shares(run, path, "gate_load", "share in the pooled update")


def loads(run: RunData, path: pathlib.Path) -> None:
  """Each expert's share of the tokens that are fed forward, a panel per layer."""
  _shares(run, path, "ffn_load", "share of the tokens fed forward")


def _shares(run: RunData, path: pathlib.Path, field: str, label: str) -> None:
  load = run.train[field]
  layers, experts = load.shape[1:]
  top = min(1.0, 2.5 * float(np.max(load, initial=1.0 / experts, where=np.isfinite(load))))
  with layer_panels(1, layers, path, 4.5, 4.2, sharey=True) as (figure, axes_KL):
    for layer, panel in enumerate(axes_KL[0]):
      for expert in range(experts):
        _curve(panel, run, load[:, layer, expert], expert, f"expert {expert}")
      panel.axhline(1.0 / experts, color="0.35", linestyle="--", linewidth=1.2)
      panel.set_title(f"layer {layer}")
      panel.set_ylim(0.0, top)
      step_axis(panel)
    figure.supylabel(label, size=12)
    legend(figure, axes_KL)
