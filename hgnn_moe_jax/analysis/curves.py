"""Figures of one run over its steps, from metrics.jsonl alone."""

import pathlib
from typing import Any

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import (
  colour,
  draw_chance,
  line_style,
  panels,
  plain_numbers,
  smooth,
)

# Event name -> marker and what it says in a legend.
_EVENTS = {
  "emergency_on": ("v", "emergency begins"),
  "emergency_off": ("^", "emergency ends"),
  "converged": ("o", "converged"),
  "plateau": ("s", "validation plateau"),
  "fault": ("X", "fault"),
}


def _window(run: RunData) -> int:
  """Curves are smoothed over a fiftieth of the run; raw values stay behind them, pale."""
  return max(1, len(run.train["step"]) // 50)


def _layers(axes: Any, run: RunData, field: str) -> None:
  """A line per layer, the raw values behind it."""
  steps, values = run.train["step"], run.train[field]
  for layer in range(values.shape[1]):
    look = {"color": colour(layer), "linestyle": line_style(layer)}
    axes.plot(steps, values[:, layer], **look, alpha=0.2, linewidth=0.8)
    axes.plot(
      steps, smooth(values[:, layer], _window(run)), **look, linewidth=1.8, label=f"layer {layer}"
    )


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
    steps, values = run.train["step"], run.train["lm_loss"]
    left.plot(steps, values, color=colour(0), alpha=0.25, linewidth=0.8)
    left.plot(steps, smooth(values, _window(run)), color=colour(0), linewidth=1.8, label="training")
    if run.evaluations:
      at = [e["step"] for e in run.evaluations]
      losses = [float(e["loss"]) for e in run.evaluations]
      left.plot(at, losses, "o-", color=colour(1), label="validation")
      right.plot(at, np.exp(losses), "o-", color=colour(1))
      right.annotate(
        f"{np.exp(losses[-1]):.1f}", (at[-1], np.exp(losses[-1])), xytext=(0, 8),
        textcoords="offset points", ha="right",
      )  # fmt: skip
    left.set(xlabel="training step", ylabel="cross-entropy, nats per token")
    left.legend()
    right.set(xlabel="training step", ylabel="validation token perplexity", yscale="log")
    plain_numbers(right)


def strengths(run: RunData, path: pathlib.Path) -> None:
  """Strength of both penalties, layer by layer, with the controller's events."""
  with panels(1, 2, path, 10.0, 4.2, sharex=True) as (figure, axes):
    for panel, kind in zip(axes[0], ("weight", "output"), strict=True):
      _layers(panel, run, f"{kind}_strength")
      if run.train[f"{kind}_strength"].any():
        _events(panel, run, f"{kind}_strength")
      panel.set(xlabel="training step", ylabel=f"strength of the {kind} penalty")
      panel.set_ylim(bottom=0.0)
    by_label: dict[str, Any] = {}
    for panel in axes[0]:
      handles, labels = panel.get_legend_handles_labels()
      by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=4)


def specialization(run: RunData, path: pathlib.Path) -> None:
  """Both specializations with their chance levels, and the effective number of experts."""
  fields = ("weight_specialization", "output_specialization", "effective_experts")
  labels = ("weight specialization", "output specialization", "effective number of experts")
  with panels(1, 3, path, 13.0, 4.2, sharex=True) as (figure, axes):
    for panel, field, label in zip(axes[0], fields, labels, strict=True):
      _layers(panel, run, field)
      draw_chance(panel, run.chance.get(field))
      panel.set(xlabel="training step", ylabel=label)
    axes[0][2].set_ylim(0.9, run.config.model.num_experts + 0.1)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6)


def emergencies(run: RunData, path: pathlib.Path) -> None:
  """When which layer was in emergency or converged, and when validation was on a plateau."""
  layers, steps = run.config.model.num_layers, run.train["step"]
  lanes = [(f"layer {n}", run.train["emergency"][:, n], run.train["converged"][:, n])
           for n in range(layers)]  # fmt: skip
  with panels(1, 1, path, 9.0, 1.6 + 0.45 * (layers + 1)) as (_, axes):
    panel = axes[0][0]
    for lane, (_, emergency, converged) in enumerate(lanes):
      _bars(panel, steps, converged, lane, colour(2), "converged")
      _bars(panel, steps, emergency, lane, colour(1), "emergency")
    _bars(panel, steps, run.train["plateau"], layers, colour(0), "validation plateau")
    panel.set(xlabel="training step", xlim=(0, steps[-1]), ylim=(layers + 0.6, -0.6))
    panel.set_yticks(range(layers + 1), [*(name for name, *_ in lanes), "validation"])
    handles, labels = panel.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if by_label:
      panel.legend(by_label.values(), by_label.keys(), loc="upper center",
                   bbox_to_anchor=(0.5, 1.35), ncols=3)  # fmt: skip
    else:
      panel.set_title("nothing happened: no emergency, no convergence, no plateau", size=12)


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
  fields = {
    "weight strength": run.train["weight_strength"].mean(axis=1),
    "output strength": run.train["output_strength"].mean(axis=1),
    "weight specialization": run.train["weight_specialization"].mean(axis=1),
    "output specialization": run.train["output_specialization"].mean(axis=1),
    "effective experts": run.train["effective_experts"].mean(axis=1),
    "training loss": run.train["lm_loss"],
  }
  names, values = list(fields), rank_correlation(np.stack(list(fields.values())))
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
  steps = run.train["step"]
  with panels(1, 2, path, 10.0, 4.2, sharex=True) as (_, axes):
    left, right = axes[0]
    norms = run.train["grad_norm"]
    left.plot(steps, norms, color=colour(0), alpha=0.25, linewidth=0.8)
    left.plot(steps, smooth(norms, _window(run)), color=colour(0), linewidth=1.8)
    if clip := run.config.training.clip_norm:
      left.axhline(clip, color="0.35", linestyle=":", label="clipping")
      left.legend()
    left.set(xlabel="training step", ylabel="gradient norm before clipping", yscale="log")
    plain_numbers(left)
    right.plot(steps, run.train["tokens_per_second"], color=colour(2), linewidth=1.2)
    right.set(xlabel="training step", ylabel="tokens per second")
    right.set_ylim(bottom=0.0)


def gates(run: RunData, path: pathlib.Path) -> None:
  """Each expert's mean share in the pooled update, a panel per layer."""
  load, steps = run.train["gate_load"], run.train["step"]
  layers, experts = load.shape[1:]
  with panels(1, layers, path, 4.5 * layers, 4.2, sharey=True) as (figure, axes):
    for layer, panel in enumerate(axes[0]):
      for expert in range(experts):
        look = {"color": colour(expert), "linestyle": line_style(expert)}
        values = smooth(load[:, layer, expert], _window(run))
        panel.plot(steps, values, **look, label=f"expert {expert}")
      panel.axhline(1.0 / experts, color="0.35", linestyle="--", linewidth=1.2)
      panel.set(xlabel="training step", title=f"layer {layer}")
      panel.set_ylim(0.0, min(1.0, 2.5 * max(float(load.max()), 1.0 / experts)))
    axes[0][0].set_ylabel("share in the pooled update")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
