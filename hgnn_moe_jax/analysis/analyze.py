"""From a run folder to its figures and its report."""

import pathlib
from collections.abc import Callable

from hgnn_moe_jax.analysis import curves, experts, report
from hgnn_moe_jax.analysis.report import Figure
from hgnn_moe_jax.analysis.runs import RunData, read_run

_CURVES: list[tuple[Callable[[RunData, pathlib.Path], None], str, str]] = [
  (curves.loss, "Loss and perplexity", "Cross-entropy in training and on the validation split."),
  (
    curves.specialization,
    "Specialization",
    "1 - mean |cosine| between experts, by their weights and by what they do, and the effective "
    "number of experts. Dashed: what unrelated experts would score.",
  ),
  (curves.strengths, "Strengths", "What the penalties counted in each layer, and events."),
  (curves.emergencies, "Timeline", "When the controller saw an emergency, convergence, a plateau."),
  (
    curves.correlation,
    "Correlations",
    "Rank correlations over the steps, of means over layers. All of these drift with training, so "
    "a correlation is no cause.",
  ),
  (curves.throughput, "Gradients and speed", "Gradient norm, and tokens per second."),
  (curves.gates, "Gate load", "Each expert's share in the pooled update; dashed: equal shares."),
]


def analyze(
  folder: pathlib.Path, output: pathlib.Path, baseline: pathlib.Path | None
) -> pathlib.Path:
  """Writes figures and report.html into `output`; returns the report's path.

  Raises:
    UserError: nothing to read.
  """
  run = read_run(folder)
  other = read_run(baseline) if baseline is not None else None
  figures = []
  for draw, title, caption in _CURVES:
    path = output / f"{draw.__name__}.png"
    draw(run, path)
    figures.append(Figure(path, title, caption))
  if run.config.model.num_experts > 1:
    figures += _of_the_experts(run, output)
  path = output / "report.html"
  path.write_text(report.page(run, figures, other), encoding="utf-8")
  return path


def _of_the_experts(run: RunData, output: pathlib.Path) -> list[Figure]:
  found = experts.load_experts(run)
  experts.similarity(found, output / "similarity.png")
  figures = [
    Figure(
      output / "similarity.png",
      "Similarity of experts",
      f"Mean |cosine| of weights, and of centred updates to the same validation tokens, at step "
      f"{found.step}.",
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
