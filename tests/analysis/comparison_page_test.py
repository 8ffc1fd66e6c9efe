"""What the page says about groups whose story is known."""

import math

import pytest

from hgnn_moe_jax.analysis.comparison_page import answer
from hgnn_moe_jax.analysis.statistics import Difference, Interval, compare


def told(comparison):
  return dict(answer(comparison))


def test_the_answer(groups):
  lines = told(compare(groups, "a"))
  assert lines == {
    "Which group has the lowest perplexity?": (
      "a: validation token perplexity 12.00 ± 4.97, mean of 3 seeds. The highest is b with "
      "13.00 ± 25.41."
    ),
    "Which groups differ from the baseline?": (
      "Difference from a, by a paired t-test over seeds at 0.05: not distinguishable from zero: "
      "b +2.00 (p = 0.3)."
    ),
    "Whose experts exceed chance?": (
      "By what they do, in some layers: b (1 of 2); in no layer: a. Chance is what unrelated "
      "experts score."
    ),
    "What did it cost in time?": "Training, mean over seeds: b 25 s (+25 %), a 20 s.",
    "And after equal time?": (
      "After 20 s of training, which every run has reached, a is lowest with 12.00 ± 4.97. "
      "Difference from a, by a paired t-test over seeds at 0.05: not distinguishable from zero: "
      "b +8.39 (p = 0.15)."
    ),
  }


def test_the_lowest_is_so_by_its_perplexity(groups):
  comparison = compare(groups)
  b, a = comparison.rows
  low = b._replace(perplexity=Interval(5.0, math.nan), seeds=[0])
  assert told(comparison._replace(rows=[low, a]))["Which group has the lowest perplexity?"] == (
    "b: validation token perplexity 5.00, one seed. The highest is a with 12.00 ± 4.97."
  )


def differing(comparison, **differences):
  """The comparison with a row for each of these differences from "a"."""
  template = comparison.rows[0]
  rows = [template._replace(name=n, difference=d) for n, d in differences.items()]
  return comparison._replace(rows=[comparison.rows[1], *rows])


def test_groups_are_told_apart_by_the_test(groups):
  comparison = differing(
    compare(groups, "a"),
    better=Difference(3, -1.0, 0.2, 0.01),
    edge=Difference(3, 1.0, 1.0, 0.05),
    single=Difference(1, 2.0, math.nan, math.nan),
  )
  assert told(comparison)["Which groups differ from the baseline?"] == (
    "Difference from a, by a paired t-test over seeds at 0.05: distinguishable from zero: better "
    "-1.00 (p = 0.01); not distinguishable from zero: edge +1.00 (p = 0.05); not tested, for want "
    "of a second seed in common: single +2.00. Uncorrected for 2 comparisons."
  )


def test_without_a_test_no_test_is_named(groups):
  comparison = differing(compare(groups, "a"), single=Difference(1, 2.0, math.nan, math.nan))
  line = told(comparison)["Which groups differ from the baseline?"]
  assert line.startswith("Difference from a: not tested, for want of") and "Uncorrec" not in line


def test_without_a_baseline_the_names_are_told(groups):
  lines = told(compare(groups))
  assert lines["Which groups differ from the baseline?"].endswith("--baseline=NAME, one of b, a.")
  assert lines["What did it cost in time?"] == "Training, mean over seeds: b 25 s, a 20 s."
  assert "Difference" not in lines["And after equal time?"]


@pytest.mark.parametrize(
  ("change", "verdict"),
  [
    ({"output_specialization": [0.9, 0.83]}, "in every layer: b; in no layer: a."),
    ({"output_specialization": [0.9, 0.81]}, "in some layers: b (1 of 2); in no layer: a."),
    ({"output_specialization": []}, "in no layer: a; unknown: b."),
    ({"chance": {}}, "in no layer: a; unknown: b."),
    ({"experts": 1}, "in no layer: a; unknown: b has one expert."),
  ],
)
def test_chance(groups, change, verdict):
  comparison = compare(groups, "a")
  b, a = comparison.rows
  lines = told(comparison._replace(rows=[b._replace(**change), a]))
  assert lines["Whose experts exceed chance?"].startswith(f"By what they do, {verdict}")


def test_who_was_too_slow_for_equal_time(groups):
  slow = [run._replace(evaluations=run.evaluations[1:]) for run in groups["b"]]
  line = told(compare({**groups, "b": slow}, "a"))["And after equal time?"]
  assert "a is lowest with 12.00 ± 4.97. Not evaluated by then: b." in line


def test_no_time_no_question(groups):
  for run in groups["b"]:
    del run.train["tokens_per_second"]
  assert "And after equal time?" not in told(compare(groups, "a"))
