"""A comparison's numbers as text: cells for the page, Markdown, CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hgnn_moe_jax.analysis.answer import levels
from hgnn_moe_jax.analysis.statistics import Comparison, Difference, Interval, Row

NOT_LOGGED = "not logged"
NOT_YET = "not evaluated by then"


class Column(NamedTuple):
  """A title and what stands below it, of each group."""

  title: str
  text: Callable[[Row], str]


GROUP = (Column("group", lambda r: r.name), Column("seeds", lambda r: str(len(r.seeds))))


def equal_steps(comparison: Comparison) -> list[Column]:
  """Perplexities at the end of training."""
  columns = [Column("token perplexity", lambda r: interval_text(r.perplexity, 2))]
  if comparison.baseline is not None:
    columns.append(Column("difference from the baseline", lambda r: difference_text(r.difference)))
  return [*columns, Column("word perplexity", lambda r: interval_text(r.word_perplexity, 1))]


def equal_time(comparison: Comparison) -> list[Column]:
  """Training time, and perplexities at the longest time that every run has reached."""
  columns = [Column("training seconds", lambda r: f"{r.seconds:.4g}")]
  if comparison.seconds is None:
    return columns
  after = seconds_text(comparison.seconds)
  columns.append(
    Column(f"token perplexity after {after}", lambda r: interval_text(r.timed_perplexity, 2))
  )
  if comparison.baseline is not None:
    columns.append(
      Column(f"difference after {after}", lambda r: difference_text(r.timed_difference))
    )
  return columns


def scores(comparison: Comparison) -> list[Column]:
  """What the experts were at the end, layer by layer; the chance levels are in the titles."""
  rows = comparison.rows
  return [
    Column(
      f"weight specialization{_chance_text(rows, 'weight_specialization', 4)}",
      lambda r: levels_text(r.weight_specialization, 4),
    ),
    Column(
      f"output specialization{_chance_text(rows, 'output_specialization', 3)}",
      lambda r: levels_text(r.output_specialization, 3),
    ),
    Column("effective experts", lambda r: levels_text(r.effective_experts, 2)),
  ]


def cells(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Head and body of a table of these columns, the group's name and seeds in front."""
  whole = (*GROUP, *columns)
  return [c.title for c in whole], [[c.text(row) for c in whole] for row in rows]


def markdown(comparison: Comparison) -> str:
  """Everything in one table."""
  columns = equal_steps(comparison) + equal_time(comparison) + scores(comparison)
  head, body = cells(columns, comparison.rows)
  lines = [head, ["---"] * len(head), *body]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(comparison: Comparison) -> str:
  """Everything, with a column per number; empty where there is none."""
  table = []
  for r in comparison.rows:
    line = {"group": r.name, "seeds": len(r.seeds), "train_seconds": r.seconds}
    line["compared_after_seconds"] = comparison.seconds
    for prefix, kind, value in (
      ("token_perplexity", Interval, r.perplexity),
      ("difference", Difference, r.difference),
      ("word_perplexity", Interval, r.word_perplexity),
      ("timed_perplexity", Interval, r.timed_perplexity),
      ("timed_difference", Difference, r.timed_difference),
    ):
      line |= {f"{prefix}_{name}": getattr(value, name, None) for name in kind._fields}
    for field in ("weight_specialization", "output_specialization", "effective_experts"):
      line |= {f"{field}_layer{layer}": value for layer, value in enumerate(getattr(r, field))}
    table.append(line)
  file = io.StringIO()
  names = dict.fromkeys(name for line in table for name in line)
  writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
  writer.writeheader()
  writer.writerows(table)
  return file.getvalue()


def interval_text(interval: Interval | None, digits: int) -> str:
  """12.00 ± 4.97; without the width for one seed."""
  if interval is None:
    return ""
  if math.isnan(interval.mean):
    return NOT_YET
  return f"{interval.mean:.{digits}f}" + _width_text(interval.half_width, digits)


def difference_text(difference: Difference | None) -> str:
  if difference is None:
    return ""
  d = difference
  if math.isnan(d.mean):
    return NOT_YET
  p = "" if math.isnan(d.p) else f"p = {d.p:.2g}, "
  return f"{d.mean:+.2f}{_width_text(d.half_width, 2)} ({p}{d.seeds} pairs)"


def _width_text(half_width: float, digits: int) -> str:
  return "" if math.isnan(half_width) else f" ± {half_width:.{digits}f}"


def levels_text(values_L: Sequence[float], digits: int) -> str:
  """0.452 / 0.347, layer by layer."""
  if not values_L:
    return NOT_LOGGED
  return levels(values_L, digits)


def seconds_text(seconds: float) -> str:
  return f"{seconds:.3g} s" if seconds < 1000.0 else f"{seconds:,.0f} s"


def _chance_text(rows: Sequence[Row], field: str, digits: int) -> str:
  """(chance 0.929); models of several widths have several."""
  levels = sorted({f"{r.chance[field]:.{digits}f}" for r in rows if field in r.chance})
  return f" (chance {' or '.join(levels)})" if levels else ""
