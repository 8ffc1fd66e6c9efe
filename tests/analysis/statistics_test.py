"""Intervals, paired differences and rows, by hand."""

import math

import pytest

from hgnn_moe_jax.analysis import statistics
from hgnn_moe_jax.errors import UserError


def test_intervals_by_hand():
  """n = 3: s = 2, t(0.975, 2) = 4.302653; n = 1 has no width."""
  mean, half_width = statistics.interval([10.0, 12.0, 14.0])
  assert mean == 12.0 and half_width == pytest.approx(4.302653 * 2.0 / math.sqrt(3.0))
  mean, half_width = statistics.interval([3.0])
  assert mean == 3.0 and math.isnan(half_width)


def test_paired_difference_by_hand():
  """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3) with 2 degrees of freedom.

  For two degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
  """
  values, baseline = {1: 11.0, 2: 14.0, 3: 17.0, 9: 0.0}, {1: 10.0, 2: 12.0, 3: 14.0}
  d = statistics.paired_difference(values, baseline)
  t = 2.0 * math.sqrt(3.0)
  assert (d.seeds, d.mean) == (3, 2.0)
  assert d.half_width == pytest.approx(4.302653 / math.sqrt(3.0))
  assert d.p == pytest.approx(1.0 - t / math.sqrt(2.0 + t * t))


def test_pairing_removes_what_seeds_share():
  """Seeds differ by 100, the groups by about 1: unpaired, nothing could be seen."""
  d = statistics.paired_difference({0: 1.0, 1: 101.1, 2: 201.2}, {0: 0.0, 1: 100.0, 2: 200.0})
  assert d.mean == pytest.approx(1.1) and d.p < 0.01


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (2.0, 0.0)])
def test_equal_differences(shift, p):
  d = statistics.paired_difference({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
  assert d == statistics.Difference(2, shift, 0.0, p)


def test_one_pair_has_no_test():
  d = statistics.paired_difference({0: 3.0}, {0: 1.0, 1: 5.0})
  assert (d.seeds, d.mean) == (1, 2.0) and math.isnan(d.p) and math.isnan(d.half_width)


def test_no_common_seed():
  with pytest.raises(UserError, match="no seed in common"):
    statistics.paired_difference({0: 1.0}, {1: 1.0})


def test_rows(groups):
  comparison = statistics.compare(groups, "a")
  b, a = comparison.rows
  assert (a.name, b.name, comparison.baseline) == ("a", "b", "a")
  assert a.perplexity.mean == 12.0 and a.word_perplexity.mean == 120.0 and a.difference is None
  assert b.seeds == [0, 1] and b.difference.mean == 2.0 and b.difference.seeds == 2
  assert a.weight_specialization == pytest.approx([0.9, 0.8])
  assert a.effective_experts == pytest.approx([3.0, 2.0])
  assert (a.seconds, b.seconds) == (20.0, 25.0)


def test_rows_at_equal_time_by_hand(groups):
  """All have reached 20 seconds: the end of "a", and step 16 of "b".

  There "b" is three fifths of the way from its evaluation after 12.5 seconds, at a loss higher by
  1, to that after 25: its perplexities are e^0.4 times those of the end.
  """
  comparison = statistics.compare(groups, "a")
  b, a = comparison.rows
  assert comparison.seconds == pytest.approx(20.0)
  assert a.timed_perplexity.mean == pytest.approx(12.0) and a.timed_difference is None
  late = math.exp(0.4)
  assert b.timed_perplexity.mean == pytest.approx(13.0 * late)
  assert b.timed_perplexity.half_width == pytest.approx(12.706205 * 2.0 * late, rel=1e-6)
  first, second = 11.0 * late - 10.0, 15.0 * late - 12.0
  assert b.timed_difference.mean == pytest.approx((first + second) / 2)
  # One degree of freedom: P(|T| > t) = 1 - 2 atan(t) / pi, and t = (first + second) / |difference|.
  t = (first + second) / (second - first)
  assert b.timed_difference.p == pytest.approx(1.0 - 2.0 * math.atan(t) / math.pi)


def test_a_run_that_was_not_evaluated_by_then(groups):
  slow = [run._replace(evaluations=run.evaluations[1:]) for run in groups["b"]]
  b, a = statistics.compare({**groups, "b": slow}, "a").rows
  assert math.isnan(b.timed_perplexity.mean) and math.isnan(b.timed_difference.mean)
  assert a.timed_perplexity.mean == pytest.approx(12.0) and b.perplexity.mean == 13.0


def test_what_one_run_has_not_logged_has_no_number(groups):
  first, *others = groups["b"]
  del first.train["effective_experts"], first.train["tokens"]
  comparison = statistics.compare(groups, "a")
  b, a = comparison.rows
  assert b.effective_experts == [] and a.effective_experts == pytest.approx([3.0, 2.0])
  assert comparison.seconds is None and others
  assert a.timed_perplexity is None and b.timed_difference is None


def test_scores_are_those_of_the_last_tenth(groups):
  for run in groups["b"]:
    run.train["effective_experts"][-2:] = [1.0, 4.0]
  b, _ = statistics.compare(groups).rows
  assert b.effective_experts == [1.0, 4.0]


def test_unknown_baseline(groups):
  with pytest.raises(UserError, match="--baseline=c: no such group; use one of b, a"):
    statistics.compare(groups, "c")
