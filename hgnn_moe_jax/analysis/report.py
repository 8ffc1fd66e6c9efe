"""One self-contained HTML page about a run: the answer, figures, tables, config. No network."""

import base64
import dataclasses
import html
import pathlib
from typing import NamedTuple

from hgnn_moe_jax.analysis.answer import answer, at_the_end
from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.config import Config


class Figure(NamedTuple):
  """A PNG and what it shows, in one sentence."""

  path: pathlib.Path
  title: str
  caption: str


_CSS = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --back: #fff;
  --card: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #a8a8a8; --line: #3a3a3a;
  --back: #16181b; --card: #202327; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p.where { color: var(--soft); margin-top: 0; overflow-wrap: anywhere; }
dl.answer { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; margin: 1rem 0; }
dl.answer dt { font-weight: 600; } dl.answer dd { margin: 0 0 .6rem; }
nav a { margin-right: .9rem; } a { color: #0072b2; }
@media (prefers-color-scheme: dark) { a { color: #6bb7e8; } }
figure { margin: 1rem 0 2rem; } figcaption { color: var(--soft); }
figure div { overflow-x: auto; }
figure img { width: 100%; min-width: 34rem; height: auto; background: #fff; border-radius: .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left;
  vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
"""


def page(run: RunData, figures: list[Figure], baseline: RunData | None = None) -> str:
  """The report as HTML.

  Args:
    run: what it is about.
    figures: embedded, in this order.
    baseline: a run to be compared with, if there is one.
  """
  text = html.escape
  answers = "".join(
    f"<dt>{text(question)}</dt><dd>{text(told)}</dd>" for question, told in answer(run, baseline)
  )
  links = "".join(f'<a href="#{f.path.stem}">{text(f.title)}</a> ' for f in figures)
  shown = "".join(_figure(f) for f in figures)
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(run.config.name)} - hgnn_moe_jax</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{text(run.config.name)}</h1>
<p class="where">{text(str(run.folder))}, seed {run.config.seed}</p>
<dl class="answer">{answers}</dl>
<nav>{links}<a href="#tables">Tables</a> <a href="#config">Config</a></nav>
{shown}
<h2 id="tables">Tables</h2>
{_layers(run)}
{_evaluations(run)}
{_events(run)}
<h2 id="config">Config</h2>
{_config(run.config)}
</body>
</html>
"""


def _figure(figure: Figure) -> str:
  data = base64.b64encode(figure.path.read_bytes()).decode()
  title, caption = html.escape(figure.title), html.escape(figure.caption)
  return (
    f'<h2 id="{figure.path.stem}">{title}</h2><figure><div>'
    f'<img src="data:image/png;base64,{data}" alt="{title}: {caption}"></div>'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _table(head: list[str], rows: list[list[str]]) -> str:
  """Cells are escaped; those that begin with a digit or a minus sign are set as numbers."""
  cell = lambda c: (  # noqa: E731
    f'<td class="n">{html.escape(c)}</td>' if c[:1].isdigit() or c[:1] == "-" else
    f"<td>{html.escape(c)}</td>"
  )  # fmt: skip
  titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
  body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
  return f'<div class="scroll"><table><tr>{titles}</tr>{body}</table></div>'


def _layers(run: RunData) -> str:
  fields = {
    "output_specialization": "output specialization",
    "weight_specialization": "weight specialization",
    "effective_experts": "effective experts",
    "output_strength": "output strength",
    "weight_strength": "weight strength",
  }
  ends = {name: at_the_end(run, name) for name in fields}
  rows = [
    [str(layer), *(f"{ends[name][layer]:.4f}" for name in fields)]
    for layer in range(run.config.model.num_layers)
  ]
  rows.append(["chance", *(f"{run.chance[f]:.4f}" if f in run.chance else "" for f in fields)])
  return "<h3>Layers, mean over the last tenth of the steps</h3>" + _table(
    ["layer", *fields.values()], rows
  )


def _evaluations(run: RunData) -> str:
  rows = [
    [
      str(e["step"]),
      f"{float(e['token_perplexity']):.2f}",
      f"{float(e['word_perplexity']):.1f}",
      f"{float(e['bits_per_byte']):.4f}",
    ]
    for e in run.evaluations
  ]
  head = ["step", "token perplexity", "word perplexity", "bits per byte"]
  return "<h3>Validation</h3>" + (_table(head, rows) if rows else "<p>None yet.</p>")


def _events(run: RunData) -> str:
  told = [e for e in run.events if e["name"] not in ("checkpoint", "best")]
  rows = [[str(e["step"]), e["name"], str(e.get("layer", ""))] for e in told]
  if not rows:
    return "<h3>Events</h3><p>None but checkpoints.</p>"
  shown = _table(["step", "event", "layer"], rows)
  return f"<details><summary>Events ({len(rows)})</summary>{shown}</details>"


def _config(config: Config) -> str:
  parts = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      rows = [[f.name, str(getattr(value, f.name))] for f in dataclasses.fields(value)]
      table = _table(["field", "value"], rows)
      parts.append(f"<details><summary>{field.name}</summary>{table}</details>")
  return "".join(parts)
