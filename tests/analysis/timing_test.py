"""Training seconds and perplexities at equal time, by hand and against a real run's clock."""

import math

import numpy as np
import pytest

from hgnn_moe_jax.analysis import timing
from hgnn_moe_jax.analysis.runs import read_run


def steps(*rates, tokens=100, numbers=None):
  """Train records with these rates, of the steps 1, 2, ... or of these numbers."""
  numbers = numbers or range(1, len(rates) + 1)
  return [
    {"step": n, "tokens": tokens, "tokens_per_second": rate}
    for n, rate in zip(numbers, rates, strict=True)
  ]


def test_every_step_takes_its_tokens_by_its_rate(write_run):
  run = read_run(write_run("run", steps(50.0, 50.0, 200.0)))
  np.testing.assert_allclose(timing.training_seconds(run), [2.0, 4.0, 4.5])


def test_a_record_stands_for_the_steps_before_it(write_run):
  """log_every=2 and five steps: records of steps 2, 4 and, being the last, 5."""
  run = read_run(write_run("run", steps(50.0, 100.0, 200.0, numbers=[2, 4, 5])))
  np.testing.assert_allclose(timing.training_seconds(run), [4.0, 6.0, 6.5])


@pytest.mark.parametrize(
  "changes",
  [
    {"training.log_every": 1},
    # One record of each dispatch: all rates are seen, each with its four steps.
    {"training.log_every": 4, "evaluation.every": 8},
  ],
  ids=["every step", "every fourth"],
)
def test_it_is_the_clock_of_the_run(train, changes):
  """Evaluations and checkpoints between the steps: summary.json's train_seconds has neither."""
  same = {"model.num_layers": 1, "training.steps": 24, "training.steps_per_dispatch": 4}
  run = read_run(train("run", **same, **changes))
  seconds = timing.training_seconds(run)
  assert len(seconds) == 24 // changes["training.log_every"] and np.all(np.diff(seconds) > 0.0)
  assert seconds[-1] == pytest.approx(run.summary["train_seconds"], rel=0.01, abs=1e-3)


@pytest.fixture
def run(write_run):
  """Step n ends after 2 n seconds; evaluated at steps 2 and 4: 4 and 8 seconds, losses 3 and 1."""
  return read_run(write_run("run", steps(*[50.0] * 4), evaluations=[(2, 3.0), (4, 1.0)]))


def test_evaluations_are_at_the_time_of_their_step(run, write_run):
  np.testing.assert_allclose(timing.evaluation_seconds(run), [4.0, 8.0])
  # Steps 3 and 6 are logged, each after 3 x 2 seconds; step 1 is a third of the way, 5 two thirds.
  sparse = steps(50.0, 50.0, numbers=[3, 6])
  sparse = read_run(write_run("sparse", sparse, evaluations=[(1, 3.0), (5, 1.0)]))
  np.testing.assert_allclose(timing.evaluation_seconds(sparse), [2.0, 10.0])


@pytest.mark.parametrize(
  ("seconds", "perplexity"),
  [
    (4.0, math.exp(3.0)),
    (5.0, math.exp(2.5)),  # a quarter of the way: in the logarithm, not the mean of perplexities
    (6.0, math.exp(2.0)),
    (8.0, math.e),
    (3.9, math.nan),
    (8.1, math.nan),
  ],
)
def test_perplexity_between_evaluations_by_hand(run, seconds, perplexity):
  assert timing.perplexity_at(run, seconds) == pytest.approx(perplexity, nan_ok=True)
  np.testing.assert_allclose(timing.perplexity_at(run, np.array([seconds])), [perplexity])


def test_the_time_that_every_run_has_reached(run, write_run):
  faster = read_run(write_run("faster", steps(*[80.0] * 4), evaluations=[(4, 2.0)]))
  assert timing.common_seconds([run, faster]) == 5.0
  assert timing.common_seconds([run]) == 8.0


def test_a_run_that_does_not_tell_its_time(run, write_run):
  silent = read_run(write_run("silent", [{"tokens": 1}], evaluations=[(1, 1.0)]))
  unseen = read_run(write_run("unseen", steps(50.0)))
  assert timing.common_seconds([run, silent]) is None
  assert timing.common_seconds([run, unseen]) is None
