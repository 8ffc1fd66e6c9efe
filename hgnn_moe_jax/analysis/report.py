"""The page about a run: the answer, figures, tables, config."""

import dataclasses

from hgnn_moe_jax.analysis import page
from hgnn_moe_jax.analysis.answer import answer, at_the_end
from hgnn_moe_jax.analysis.page import Figure, Section
from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.config import Config


def report(
  run: RunData, figures: list[Figure], left_out: list[str], baseline: RunData | None = None
) -> str:
  """The report as HTML.

  Args:
    run: what it is about.
    figures: embedded, in this order.
    left_out: what could not be shown, and why.
    baseline: a run to be compared with, if there is one.
  """
  where = f"{run.folder}, seed {run.config.seed}"
  if run.summary is None:
    where += f", not finished: step {run.train['step'][-1]} of {run.total_steps}"
  tables = _layers(run) + _evaluations(run) + _events(run)
  return page.document(
    run.config.name,
    where,
    answer(run, baseline),
    left_out,
    [
      *map(page.figure, figures),
      Section("tables", "Tables", tables),
      Section("config", "Config", _config(run.config)),
    ],
  )


def _layers(run: RunData) -> str:
  fields = {
    "output_specialization": "output specialization",
    "weight_specialization": "weight specialization",
    "effective_experts": "effective experts",
    "output_strength": "output strength",
    "weight_strength": "weight strength",
  }
  ends = {name: at_the_end(run, name) for name in fields if not run.lacks(name)}
  if not ends or run.config.model.num_experts == 1:
    return ""
  chance = [f"{run.chance[f]:.4f}" if f in run.chance else "" for f in ends]
  rows = [["chance", *chance]] if any(chance) else []
  rows += [
    [str(layer), *(f"{ends[name][layer]:.4f}" for name in ends)]
    for layer in range(run.config.model.num_layers)
  ]
  shown = page.table(["layer", *(fields[name] for name in ends)], rows)
  return f"<h3>Layers, mean over the last tenth of the steps</h3>{shown}"


def _evaluations(run: RunData) -> str:
  rows = [
    [
      str(e["step"]),
      f"{e['token_perplexity']:.2f}",
      f"{e['word_perplexity']:.1f}",
      f"{e['bits_per_byte']:.4f}",
    ]
    for e in run.evaluations
  ]
  head = ["step", "token perplexity", "word perplexity", "bits per byte"]
  return "<h3>Validation</h3>" + (page.table(head, rows) if rows else "<p>None yet.</p>")


def _events(run: RunData) -> str:
  told = [e for e in run.events if e["name"] not in ("checkpoint", "best")]
  rows = [[str(e["step"]), e["name"], str(e.get("layer", ""))] for e in told]
  if not rows:
    return "<h3>Events</h3><p>None but checkpoints.</p>"
  return page.folded(f"Events ({len(rows)})", page.table(["step", "event", "layer"], rows))


def _config(config: Config) -> str:
  parts = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      rows = [[f.name, str(getattr(value, f.name))] for f in dataclasses.fields(value)]
      parts.append(page.folded(field.name, page.table(["field", "value"], rows)))
  return "".join(parts)
