"""From a run folder to its figures and its report."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hgnn_moe_jax.analysis import curves, experts
from hgnn_moe_jax.analysis.answer import levels
from hgnn_moe_jax.analysis.page import Figure
from hgnn_moe_jax.analysis.report import report
from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.style import make_folder
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.orthogonality.outputs import output_specialization


class Report(NamedTuple):
  """Where the page is, and what it had to leave out, with the reason, a sentence each."""

  path: pathlib.Path
  left_out: list[str]


class _Curve(NamedTuple):
  """A figure from the train records.

  Attributes:
    draw: writes it.
    title, caption: on the page.
    needs: fields of the train records.
    of_experts: it says nothing about a model with one.
    of_selected: it says nothing where every expert feeds every token forward.
  """

  draw: Callable[[RunData, pathlib.Path], None]
  title: str
  caption: str
  needs: tuple[str, ...]
  of_experts: bool = True
  of_selected: bool = False


_CURVES = [
  _Curve(
    curves.loss,
    "Loss and perplexity",
    "Cross-entropy in training and on the validation split.",
    ("lm_loss",),
    of_experts=False,
  ),
  _Curve(
    curves.specialization,
    "Specialization",
    "1 - mean |cosine| between experts, by their weights and by what they do, and the effective "
    "number of experts. Dashed: what unrelated experts would score.",
    ("weight_specialization", "output_specialization", "effective_experts"),
  ),
  _Curve(
    curves.strengths,
    "Strengths",
    "What the penalties counted in each layer, and events.",
    ("weight_strength", "output_strength"),
  ),
  _Curve(
    curves.emergencies,
    "Timeline",
    "When the controller saw an emergency, convergence, a plateau.",
    ("emergency", "converged", "plateau"),
  ),
  _Curve(
    curves.correlation,
    "Correlations",
    "Rank correlations over the steps, of means over layers. All of these drift with training, so "
    "a correlation is no cause.",
    curves.CORRELATED,
  ),
  _Curve(
    curves.throughput,
    "Gradients and speed",
    "Gradient norm, and tokens per second.",
    ("grad_norm", "tokens_per_second"),
    of_experts=False,
  ),
  _Curve(
    curves.gates,
    "Gate load",
    "Each expert's share in the pooled update; dashed: equal shares.",
    ("gate_load",),
  ),
  _Curve(
    curves.loads,
    "Feed-forward load",
    "Each expert's share of the tokens that selected experts feed forward; dashed: equal shares.",
    ("ffn_load",),
    of_selected=True,
  ),
]


def analyze(run: RunData, output: pathlib.Path, baseline: RunData | None) -> Report:
  """Writes figures and report.html into `output`; what cannot be drawn is left out and told.

  Raises:
    UserError: `output` cannot be written.
  """
  make_folder(output)
  several = run.config.model.num_experts > 1
  figures, left_out = [], run.oddities()
  for curve in _CURVES:
    if curve.of_experts and not several:
      continue
    if curve.of_selected and not run.config.model.selected_experts:
      continue
    if reason := run.lacks(*curve.needs):
      left_out.append(f"{curve.title}: {reason}")
      continue
    path = output / f"{curve.draw.__name__}.png"
    curve.draw(run, path)
    figures.append(Figure(path, curve.title, curve.caption))
  if several:
    try:
      figures += _of_the_experts(run, output)
    except UserError as error:
      reason = str(error).removeprefix(f"{run.folder}: ")
      left_out.append(f"Similarity of experts, Couplings: {reason}")
  path = output / "report.html"
  path.write_text(report(run, figures, left_out, baseline), encoding="utf-8")
  return Report(path, left_out)


def _of_the_experts(run: RunData, output: pathlib.Path) -> list[Figure]:
  found = experts.load_experts(run)
  experts.similarity(found, output / "similarity.png")
  same, other = (
    levels(np.asarray(output_specialization(jnp.asarray(matrix_LEE))))
    for matrix_LEE in (found.output_similarity, found.other_tokens_similarity)
  )
  figures = [
    Figure(
      output / "similarity.png",
      "Similarity of experts",
      f"Mean |cosine| at step {found.step}: of weights; of centred updates to the same validation "
      f"tokens (specialization {same}); of updates to different tokens "
      f"({other}: as far below chance as the directions that "
      "experts share bring it by themselves).",
    )
  ]
  if found.ties:
    experts.couplings(found, output / "couplings.png")
    figures.append(
      Figure(
        output / "couplings.png",
        "Couplings",
        "What each round of messages has learned about who hears whom, before content gates.",
      )
    )
  return figures
