"""Statistics by hand, and runs that must not be compared."""

import csv
import math

import pytest

from hgnn_moe_jax.analysis import compare
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError

STEP = {
  "weight_specialization": [0.9, 0.8],
  "output_specialization": [0.5, 0.25],
  "effective_experts": [3.0, 2.0],
  "weight_strength": [0.1, 0.1],
  "output_strength": [0.0, 0.0],
}


def group(runs):
  return compare.group_runs([(run.config.name, run) for run in runs])


@pytest.fixture
def groups(write_run):
  """Two groups, "a" of seeds 0 to 2 and "b" of seeds 0 and 1; perplexities as in the tests."""
  perplexities = {"a": [10.0, 12.0, 14.0], "b": [11.0, 15.0]}
  runs = []
  for name, values in perplexities.items():
    for seed, value in enumerate(values):
      last = {"token_perplexity": value, "word_perplexity": 10 * value}
      strength = 0.1 if name == "a" else 0.2
      changes = {"name": name, "seed": seed, "orthogonality.weight_strength": strength}
      runs.append(read_run(write_run(f"{name}-{seed}", [STEP] * 20, (), last, **changes)))
  return group(runs[::-1])


def test_intervals_by_hand():
  """n = 3: s = 2, t(0.975, 2) = 4.302653; n = 1 has no width."""
  mean, half_width = compare.interval([10.0, 12.0, 14.0])
  assert mean == 12.0 and half_width == pytest.approx(4.302653 * 2.0 / math.sqrt(3.0))
  mean, half_width = compare.interval([3.0])
  assert mean == 3.0 and math.isnan(half_width)


def test_paired_difference_by_hand():
  """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3) with 2 degrees of freedom.

  For two degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
  """
  d = compare.paired_difference({1: 11.0, 2: 14.0, 3: 17.0, 9: 0.0}, {1: 10.0, 2: 12.0, 3: 14.0})
  t = 2.0 * math.sqrt(3.0)
  assert (d.seeds, d.mean) == (3, 2.0)
  assert d.half_width == pytest.approx(4.302653 / math.sqrt(3.0))
  assert d.p == pytest.approx(1.0 - t / math.sqrt(2.0 + t * t))


def test_pairing_removes_what_seeds_share():
  """Seeds differ by 100, the groups by about 1: unpaired, nothing could be seen."""
  d = compare.paired_difference({0: 1.0, 1: 101.1, 2: 201.2}, {0: 0.0, 1: 100.0, 2: 200.0})
  assert d.mean == pytest.approx(1.1) and d.p < 0.01


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (2.0, 0.0)])
def test_equal_differences(shift, p):
  d = compare.paired_difference({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
  assert d == compare.Difference(2, shift, 0.0, p)


def test_one_pair_has_no_test():
  d = compare.paired_difference({0: 3.0}, {0: 1.0, 1: 5.0})
  assert (d.seeds, d.mean) == (1, 2.0) and math.isnan(d.p) and math.isnan(d.half_width)


def test_no_common_seed():
  with pytest.raises(UserError, match="no seed in common"):
    compare.paired_difference({0: 1.0}, {1: 1.0})


def test_rows(groups):
  assert list(groups) == ["b", "a"] and [r.config.seed for r in groups["a"]] == [0, 1, 2]
  b, a = compare.compare(groups, "a")
  assert a.perplexity.mean == 12.0 and a.word_perplexity.mean == 120.0 and a.difference is None
  assert b.seeds == [0, 1] and b.difference.mean == 2.0 and b.difference.seeds == 2
  assert a.weight_specialization == pytest.approx([0.9, 0.8])
  assert a.effective_experts == pytest.approx([3.0, 2.0])


def test_scores_are_those_of_the_last_tenth(write_run):
  train = [STEP] * 18 + [{**STEP, "effective_experts": [1.0, 4.0]}] * 2
  last = {"token_perplexity": 1.0, "word_perplexity": 1.0}
  run = read_run(write_run("run", train, (), last))
  (row,) = compare.compare(group([run]))
  assert row.effective_experts == [1.0, 4.0]


def test_tables(groups):
  rows = compare.compare(groups, "a")
  text = compare.markdown(rows, {"weight_specialization": 0.99, "output_specialization": 0.8})
  assert "chance 0.9900" in text and "chance 0.800" in text
  assert "| a | 3 | 12.00 ± 4.97 |  | 120.0 ± 49.7 | 0.9000 / 0.8000 |" in text
  assert "| b | 2 | 13.00 ± 25.41 | +2.00 ± 12.71 (p = 0.3, 2 pairs) |" in text
  table = {row["group"]: row for row in csv.DictReader(compare.as_csv(rows).splitlines())}
  assert float(table["b"]["difference_mean"]) == 2.0 and table["a"]["difference_mean"] == ""
  assert float(table["a"]["output_specialization_layer1"]) == pytest.approx(0.25)


LAST = {"token_perplexity": 1.0, "word_perplexity": 1.0}


@pytest.mark.parametrize(
  ("second", "message"),
  [
    ({"last": None}, "not finished"),
    ({"fingerprint": "other"}, "cannot be compared with .*: text other and text"),
    ({"train": [STEP] * 3}, "steps 3 and 2"),
    ({"model.num_layers": 3}, "layers 3 and 2"),
    ({"seed": 1, "training.learning_rate": 0.5}, "differ in more than the seed"),
    ({}, "seed 42 is there twice"),
  ],
)
def test_runs_that_cannot_be_compared(write_run, second, message):
  settings = {"train": [STEP] * 2, "last": LAST}
  runs = [write_run("one", **settings), write_run("two", **{**settings, **second})]
  with pytest.raises(UserError, match=message) as error:
    group([read_run(run) for run in runs])
  assert "two" in str(error.value)


def test_what_does_not_decide_the_result_may_differ(write_run):
  first = write_run("one", [STEP], (), LAST, seed=0)
  second = write_run("two", [STEP], (), LAST, **{"seed": 1, "training.steps_per_dispatch": 5})
  assert len(group([read_run(first), read_run(second)])["tiny"]) == 2


def test_nothing_to_compare_and_unknown_baseline(groups):
  with pytest.raises(UserError, match="nothing to compare"):
    group([])
  with pytest.raises(UserError, match="--baseline=c: no such group; use one of b, a"):
    compare.compare(groups, "c")
