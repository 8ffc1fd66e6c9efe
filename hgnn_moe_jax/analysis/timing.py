"""When in its training a run was how good: seconds from the run folder, perplexity between them."""

from collections.abc import Iterable

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData

NEEDS = ("tokens", "tokens_per_second")


def training_seconds(run: RunData) -> np.ndarray:
  """Training time up to each logged step, in seconds; [S].

  A record's `tokens_per_second` is the rate of its dispatch: tokens by the time from the result
  before it to its own. So the sum over all steps of tokens / tokens_per_second is `train_seconds`
  of summary.json. It has the steps in it, the making of their batches, and the writing of
  records; not compilation, evaluation, the waiting for checkpoints, nor the time between the parts
  of an interrupted run. It is the clock's on that machine, with whatever else ran there.

  Where not every step is logged (training.log_every), a record stands for the steps since the one
  before it. Their rates may have been others, so the seconds are then an estimate.

  Args:
    run: with `NEEDS` in its train records.
  """
  steps_S = np.diff(run.train["step"], prepend=0)
  return np.cumsum(steps_S * run.train["tokens"] / run.train["tokens_per_second"])


def evaluation_seconds(run: RunData) -> np.ndarray:
  """Training time at each evaluation, in seconds; [N]. Between logged steps it is interpolated."""
  steps = np.concatenate([[0], run.train["step"]])
  seconds = np.concatenate([[0.0], training_seconds(run)])
  return np.interp([e["step"] for e in run.evaluations], steps, seconds)


def perplexity_at(run: RunData, seconds: np.ndarray | float) -> np.ndarray:
  """Validation token perplexity after so much training.

  Between two evaluations its logarithm, the loss, is interpolated; before the first and after the
  last it is nan.
  """
  losses = [e["loss"] for e in run.evaluations]
  times = evaluation_seconds(run)
  return np.exp(np.interp(seconds, times, losses, left=np.nan, right=np.nan))


def common_seconds(runs: Iterable[RunData]) -> float | None:
  """The longest training time that every run has reached; None if one does not tell its time."""
  runs = list(runs)
  if any(run.lacks(*NEEDS) or not run.evaluations for run in runs):
    return None
  return float(min(evaluation_seconds(run)[-1] for run in runs))
