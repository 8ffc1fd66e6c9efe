"""What a checkpoint's experts are: how alike, and who hears whom."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hgnn_moe_jax import extensions, trained
from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import colour, layer_panels
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.data.examples import gather
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.models.coupling import Ties, learned_ties
from hgnn_moe_jax.orthogonality import outputs, weights

_BATCHES = 8


class Experts(NamedTuple):
  """Attributes:
  step: of the checkpoint.
  weight_similarity: `[L, E, E]`, mean over roles of |cos| between flattened matrices.
  output_similarity: `[L, E, E]`, mean over validation tokens of |cos| between centred updates,
    without dropout.
  other_tokens_similarity: `[L, E, E]`, the same of updates to different tokens: what directions
    that experts share bring by themselves.
  ties: one per round of messages, each for all layers; empty where nothing is learned.
  """

  step: int
  weight_similarity: np.ndarray
  output_similarity: np.ndarray
  other_tokens_similarity: np.ndarray
  ties: list[Ties]


def load_experts(run: RunData) -> Experts:
  """Reads the run's best checkpoint, or its last if none was scored, and compares its experts.

  Raises:
    UserError: no readable checkpoint, the text is not at hand, or this version cannot tell what
      model it was.
  """
  config = run.config
  if run.unknown:
    raise UserError(
      f"{run.folder}: the model may be one that this version does not know ("
      f"{', '.join(run.unknown)}); look at it with the version that trained it"
    )
  extensions.require_outside(run.folder, config)
  config.validate()
  corpus = load_corpus(config)
  if corpus.fingerprint != run.data.get("fingerprint"):
    raise UserError(
      f"{run.folder}: the text at config.data.path={config.data.path!r} is not the one this run "
      "was trained on; restore it"
    )
  _, _, params, tokenizer, step, _ = trained.load(run.folder)
  examples = corpus.splits["validation"].examples
  size, fill = config.training.batch_size, tokenizer.end_of_text
  model = language_model.build(config.model, tokenizer.vocab_size, _similarities)

  @jax.jit
  def similarities(params, batch):
    _, aux = model.features(params, batch.inputs_BT, batch.weights_BT, None)
    return jnp.stack(aux.measured)

  found = []
  # Whole batches; of fewer examples than a batch, one that goes round.
  for first in range(0, max(1, min(_BATCHES * size, examples.num_examples - size + 1)), size):
    rows = np.arange(first, first + size) % examples.num_examples
    batch = gather(examples, rows.astype(np.int32), config.model.max_length, fill)
    found.append(np.asarray(similarities(params, batch)))
  same, other = np.mean(found, axis=0)
  roles = model.expert_matrices(params, config.orthogonality.weight_target)
  return Experts(
    step=step,
    weight_similarity=np.asarray(jax.jit(weights.absolute_cosine)(roles)),
    output_similarity=same,
    other_tokens_similarity=other,
    ties=jax.tree.map(np.asarray, learned_ties(config.model, params["layers"])),
  )


def _similarities(updates_EBTD: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """|cos| of updates to the same tokens, and to others."""
  return (
    outputs.update_overlap(updates_EBTD, weights_BT).absolute_cosine_EE,
    outputs.other_tokens_cosine(updates_EBTD, weights_BT, jax.random.key(0)),
  )


def similarity(experts: Experts, path: pathlib.Path) -> None:
  """Matrices of |cos|: weights, outputs, outputs for different tokens; a column per layer."""
  rows = {
    "weights": experts.weight_similarity,
    "outputs": experts.output_similarity,
    "other tokens": experts.other_tokens_similarity,
  }
  layers, count = experts.weight_similarity.shape[:2]
  with layer_panels(len(rows), layers, path, 3.4, 3.5) as (figure, axes_KL):
    image = None
    for (kind, values_LEE), axes_L in zip(rows.items(), axes_KL, strict=True):
      for layer, axes in enumerate(axes_L):
        axes.grid(visible=False)
        image = axes.imshow(values_LEE[layer], vmin=0.0, vmax=1.0, cmap="viridis")
        axes.set_title(f"layer {layer}, {kind}")
        _numbers(axes, values_LEE[layer])
        axes.set_xticks(range(count))
        axes.set_yticks(range(count))
    figure.supxlabel("expert", size=12)
    figure.supylabel("expert", size=12)
    bar = figure.colorbar(image, ax=axes_KL, location="top", fraction=0.03, aspect=40)
    bar.set_label("mean |cosine| between experts")


def _numbers(axes, values_EE: np.ndarray) -> None:
  if len(values_EE) > 8:  # too many to read
    return
  for i, row in enumerate(values_EE):
    for j, value in enumerate(row):
      shade = "black" if value > 0.6 else "white"
      axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=shade, size=10)


def couplings(experts: Experts, path: pathlib.Path) -> None:
  """Experts as nodes; a row per round of messages, a column per layer.

  A line joins two experts, as wide as the weight learned for the two; a hyperedge of three or more
  is a shaded area, as dark as its weight. Both relative to the largest of the panel. Nothing is
  drawn for couplers that learn no weights between experts.
  """
  if not experts.ties:
    return
  layers, count = experts.output_similarity.shape[:2]
  angles = np.pi / 2 + 2 * np.pi * np.arange(count) / count
  places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  widest = min(7.0, 20.0 / count)  # points; many experts have many lines
  with layer_panels(len(experts.ties), layers, path, 3.6, 3.8) as (_, axes_RL):
    for number, (ties, axes_L) in enumerate(zip(experts.ties, axes_RL, strict=True)):
      for layer, axes in enumerate(axes_L):
        largest = max(float(np.abs(ties.weight_LM[layer]).max()), 1e-12)
        smallest = float(np.abs(ties.weight_LM[layer]).min())
        for members, weight in zip(ties.members, ties.weight_LM[layer], strict=True):
          _tie(axes, places[list(members)], abs(float(weight)) / largest, widest)
        axes.scatter(*places.T, s=420, color=colour(5), edgecolors="black", zorder=3)
        for expert, (x, y) in enumerate(places):
          axes.text(x, y, str(expert), ha="center", va="center", zorder=4)
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
        axes.set_title(f"layer {layer}, round {number}\nweights {smallest:.2f} to {largest:.2f}")
        axes.axis("off")


def _tie(axes, places: np.ndarray, share: float, widest: float) -> None:
  if len(places) == 2:
    axes.plot(*places.T, color="0.3", linewidth=0.5 + widest * share, alpha=0.8, zorder=2)
  else:
    axes.fill(*places.T, color=colour(0), alpha=0.05 + 0.3 * share, zorder=1)
