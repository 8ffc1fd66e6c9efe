"""Numbers as text: Markdown, CSV, and what stands for a number that is not there."""

import csv
import math

import pytest

from hgnn_moe_jax.analysis import tables
from hgnn_moe_jax.analysis.statistics import Difference, Interval, compare


def test_markdown(groups):
  head, rule, b, a = tables.markdown(compare(groups, "a")).splitlines()
  assert "(chance 0.9900)" in head and "(chance 0.800)" in head
  assert "| token perplexity after 20 s | difference after 20 s |" in head
  assert a.startswith("| a | 3 | 12.00 ± 4.97 |  | 120.0 ± 49.7 | 20 | 12.00 ± 4.97 |  |")
  assert a.endswith("| 0.9000 / 0.8000 | 0.500 / 0.250 | 3.00 / 2.00 |")
  assert "| b | 2 | 13.00 ± 25.41 | +2.00 ± 12.71 (p = 0.3, 2 pairs) |" in b
  assert "| 25 | 19.39 ± 37.91 | +8.39 ±" in b
  assert len({line.count("|") for line in (head, rule, b, a)}) == 1


def test_without_a_baseline_there_is_no_difference(groups):
  assert "difference" not in tables.markdown(compare(groups))


def test_csv(groups):
  table = {row["group"]: row for row in csv.DictReader(tables.as_csv(compare(groups, "a")).split())}
  a, b = table["a"], table["b"]
  assert float(b["difference_mean"]) == 2.0 and a["difference_mean"] == ""
  assert float(a["output_specialization_layer1"]) == pytest.approx(0.25)
  assert float(b["train_seconds"]) == 25.0 and float(b["compared_after_seconds"]) == 20.0
  assert float(b["timed_perplexity_mean"]) == pytest.approx(13.0 * math.exp(0.4))
  assert float(b["timed_difference_mean"]) == pytest.approx(13.0 * math.exp(0.4) - 11.0)


def test_what_is_not_there(groups):
  for run in groups["b"]:
    del run.train["effective_experts"], run.train["tokens"]
    run.chance.clear()
  comparison = compare(groups, "a")
  head, _, b, a = tables.markdown(comparison).splitlines()
  assert b.endswith("| not logged |") and a.endswith("| 3.00 / 2.00 |")
  assert "after" not in head and "(chance 0.800)" in head
  (line,) = [r for r in csv.DictReader(tables.as_csv(comparison).split()) if r["group"] == "b"]
  assert line["effective_experts_layer0"] == line["timed_perplexity_mean"] == ""


def test_levels_of_several_widths(groups):
  for run in groups["b"]:
    run.chance["output_specialization"] = 0.9
  assert "(chance 0.800 or 0.900)" in tables.markdown(compare(groups))


@pytest.mark.parametrize(
  ("text", "told"),
  [
    (tables.interval_text(Interval(12.0, 1.234), 2), "12.00 ± 1.23"),
    (tables.interval_text(Interval(12.0, math.nan), 1), "12.0"),
    (tables.interval_text(Interval(math.nan, math.nan), 1), "not evaluated by then"),
    (tables.interval_text(None, 1), ""),
    (tables.difference_text(Difference(3, -1.5, 0.5, 0.0312)), "-1.50 ± 0.50 (p = 0.031, 3 pairs)"),
    (tables.difference_text(Difference(1, 1.5, math.nan, math.nan)), "+1.50 (1 pairs)"),
    (tables.difference_text(Difference(2, *[math.nan] * 3)), "not evaluated by then"),
    (tables.difference_text(None), ""),
    (tables.seconds_text(0.6944), "0.694 s"),
    (tables.seconds_text(86400.0), "86,400 s"),
  ],
)
def test_texts(text, told):
  assert text == told
