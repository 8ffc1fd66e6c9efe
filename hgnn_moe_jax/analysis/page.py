"""One self-contained HTML page: answers, figures, tables. No network; for phones and for the dark.

What runs and comparisons say is put together in `report` and `comparison_page`.
"""

import base64
import html
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

# CSS pixels per pixel of a figure, which has 150 to an inch and letters of 12 points (25 pixels):
# letters of 10 pixels at least, where the figure is scrolled, and of 16 at most.
_LEAST_SCALE, _MOST_SCALE = 0.42, 0.64

_CSS = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --back: #fff;
  --card: #f6f7f9; --link: #0072b2; --warn: #b25000; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --soft: #a8a8a8; --line: #3a3a3a;
  --back: #16181b; --card: #202327; --link: #6bb7e8; --warn: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p.where { color: var(--soft); margin-top: 0; }
dl.answer { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; margin: 1rem 0; }
dl.answer dt { font-weight: 600; } dl.answer dd { margin: 0 0 .6rem; }
.left-out { border-left: .25rem solid var(--warn); padding-left: 1rem; margin: 1rem 0; }
.left-out p { margin: 0; font-weight: 600; } ul { margin: .2rem 0; padding-left: 1.2rem; }
nav a { margin-right: .9rem; } a { color: var(--link); }
figure { margin: 1rem 0 2rem; } figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1rem .25rem 0; text-align: left;
  vertical-align: top; }
th { vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; max-width: min(14rem, 56vw);
  background: var(--back); overflow-wrap: break-word; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
summary { cursor: pointer; padding: .2rem 0; }
"""


class Figure(NamedTuple):
  """A PNG and what it shows, in one sentence."""

  path: pathlib.Path
  title: str
  caption: str


class Section(NamedTuple):
  """A heading with an anchor, and the HTML below it."""

  anchor: str
  title: str
  body: str


def document(
  title: str,
  where: str,
  answers: Sequence[tuple[str, str]],
  left_out: Sequence[str],
  sections: Sequence[Section],
) -> str:
  """The whole page.

  Args:
    title, where: heading and the line below it.
    answers: question and answer; plain text.
    left_out: what a reader may miss, and why; plain text.
    sections: in this order; linked below the answers.
  """
  text = html.escape
  answered = "".join(f"<dt>{text(q)}</dt><dd>{text(a)}</dd>" for q, a in answers)
  links = " ".join(f'<a href="#{s.anchor}">{text(s.title)}</a>' for s in sections)
  bodies = "".join(f'<h2 id="{s.anchor}">{text(s.title)}</h2>\n{s.body}\n' for s in sections)
  missing = f'<div class="left-out"><p>Left out</p>{bullets(left_out)}</div>' if left_out else ""
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)} - hgnn_moe_jax</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{text(title)}</h1>
<p class="where">{text(where)}</p>
<dl class="answer">{answered}</dl>
{missing}
<nav>{links}</nav>
{bodies}</body>
</html>
"""


def figure(shown: Figure) -> Section:
  """The figure itself is in the page; its anchor is the file's name."""
  content = shown.path.read_bytes()
  width = int.from_bytes(content[16:20], "big")  # PNG: the header chunk begins with it
  title, caption = html.escape(shown.title), html.escape(shown.caption)
  size = f"min-width: {_LEAST_SCALE * width:.0f}px; max-width: {_MOST_SCALE * width:.0f}px"
  return Section(
    shown.path.stem,
    shown.title,
    f'<figure><div class="scroll"><img src="data:image/png;base64,'
    f'{base64.b64encode(content).decode()}" style="{size}" alt="{title}: {caption}"></div>'
    f"<figcaption>{caption}</figcaption></figure>",
  )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Cells are escaped. A column in which all that is said are numbers is set as numbers."""
  said = [[cell for cell in column if cell] for column in zip(*rows, strict=True)]
  number = [bool(cells) and all(c.lstrip("+-")[:1].isdigit() for c in cells) for cells in said]
  kinds = [' class="n"' if is_number else "" for is_number in number]

  def line(tag: str, cells: Sequence[str]) -> str:
    shown = zip(cells, kinds, strict=True)
    return f"<tr>{''.join(f'<{tag}{k}>{html.escape(c)}</{tag}>' for c, k in shown)}</tr>"

  body = "".join(line("td", row) for row in rows)
  return f'<div class="scroll"><table>{line("th", head)}{body}</table></div>'


def bullets(lines: Sequence[str]) -> str:
  return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def folded(summary: str, body: str) -> str:
  """Content that is shown on a click."""
  return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"
