"""When to act: four small state machines, each with hysteresis, vectorised over layers.

                 on                                          off
  below_target   score < target - tolerance                  score >= target
  plateau        no improvement for `window` steps           an improvement
  converged      a window of scores at or above the target   score < target - tolerance
                 whose range is at most the tolerance
  collapse       a sudden fall of the score or of the        recovered, or out of time; then a
                 effective number of experts                 refractory period

Scores lie in [0, 1], thresholds are in their units, and windows count updates, one per training
step. The machines do not know one another: any of them can hold together. Measurements that are not
finite leave every `active` as it is. Decisions deserve smoothed scores: see
`filters.exponential_mean`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import require, require_count
from hgnn_moe_jax.control.filters import Window, is_full, latest, sliding_window


class Trigger(NamedTuple):
  """`init() -> state` and `update(state, measured ...) -> state`, pure; see each factory."""

  init: Callable[[], Any]
  update: Callable[..., Any]


class BelowTarget(NamedTuple):
  """active_L: bool, whether the score has been too low and not yet back at its target."""

  active_L: jax.Array


class Plateau(NamedTuple):
  """State of `plateau`.

  Attributes:
    best: float32 scalar, the loss at the last improvement; inf before the first loss.
    since: int32 scalar, the step of that improvement.
    active: bool scalar.
  """

  best: jax.Array
  since: jax.Array
  active: jax.Array


class Converged(NamedTuple):
  """State of `converged`: the recent scores, and active_L, bool."""

  scores: Window
  active_L: jax.Array


class Collapse(NamedTuple):
  """State of `collapse`.

  Attributes:
    scores: the recent scores.
    effective: the recent effective numbers of experts.
    score_before_L: best score of the window in which the latest fault struck.
    effective_before_L: the same for the effective number of experts.
    duration_L: int32, steps since the emergency began; 0 outside of one.
    refractory_L: int32, steps for which no new emergency can begin.
    active_L: bool, emergency.
  """

  scores: Window
  effective: Window
  score_before_L: jax.Array
  effective_before_L: jax.Array
  duration_L: jax.Array
  refractory_L: jax.Array
  active_L: jax.Array


def require_target(target: float, tolerance: float) -> None:
  """Raises ValueError unless target is in (0, 1] and tolerance in (0, target)."""
  require("target", target, 0.0 < target <= 1.0, "in (0, 1]")
  require("tolerance", tolerance, 0.0 < tolerance < target, f"in (0, target={target})")


def below_target(num_layers: int, target: float, tolerance: float) -> Trigger:
  """On below `target - tolerance`, off from `target` on; between the two it stays as it was.

  Args:
    num_layers: L, at least 1.
    target: score in (0, 1].
    tolerance: in units of the score, in (0, target).

  Returns:
    A Trigger with `update(state, score_L) -> BelowTarget`.
  """
  require_count("num_layers", num_layers, at_least=1)
  require_target(target, tolerance)

  def init() -> BelowTarget:
    return BelowTarget(jnp.zeros(num_layers, bool))

  def update(state: BelowTarget, score_L: jax.Array) -> BelowTarget:
    active_L = (state.active_L | (score_L < target - tolerance)) & ~(score_L >= target)
    return BelowTarget(jnp.where(jnp.isfinite(score_L), active_L, state.active_L))

  return Trigger(init, update)


def plateau(window: int, improvement: float) -> Trigger:
  """On when a loss comes that is no improvement, `window` steps or more after the last one.

  An improvement is `loss < (1 - improvement) best`, with `best` the loss at the improvement before
  it: small steps down add up. Losses may come at any cadence; only a loss can switch the trigger,
  the passing of time alone is no evidence. With evaluations further apart than the window, the
  first one without improvement switches it on.

  Args:
    window: in training steps, at least 1.
    improvement: share of the loss, in [0, 1).

  Returns:
    A Trigger with `update(state, step, loss) -> Plateau`; scalars, the step int32.
  """
  require_count("window", window, at_least=1)
  require("improvement", improvement, 0.0 <= improvement < 1.0, "in [0, 1)")

  def init() -> Plateau:
    return Plateau(
      best=jnp.full((), jnp.inf, jnp.float32),
      since=jnp.zeros((), jnp.int32),
      active=jnp.zeros((), bool),
    )

  def update(state: Plateau, step: jax.Array, loss: jax.Array) -> Plateau:
    finite = jnp.isfinite(loss)
    improved = finite & (loss < (1.0 - improvement) * state.best)
    stalled = ~improved & (step - state.since >= window)
    return Plateau(
      best=jnp.where(improved, loss, state.best),
      since=jnp.where(improved, step, state.since),
      active=jnp.where(finite, stalled, state.active),
    )

  return Trigger(init, update)


def converged(num_layers: int, target: float, tolerance: float, window: int) -> Trigger:
  """On when the last `window` scores are all at or above the target, and within `tolerance`.

  Off below `target - tolerance`: a score that comes back to the target a little later is still
  converged, and a range that widens above it, too.

  Args:
    num_layers: L, at least 1.
    target: score in (0, 1].
    tolerance: in units of the score, in (0, target): the largest range that counts as stable.
    window: in training steps, at least 1.

  Returns:
    A Trigger with `update(state, score_L) -> Converged`.
  """
  require_count("num_layers", num_layers, at_least=1)
  require_count("window", window, at_least=1)
  require_target(target, tolerance)
  scores = sliding_window((num_layers,), window)

  def init() -> Converged:
    return Converged(scores=scores.init(), active_L=jnp.zeros(num_layers, bool))

  def update(state: Converged, score_L: jax.Array) -> Converged:
    recent = scores.update(state.scores, score_L)
    lowest_L, highest_L = jnp.min(recent.values_W, axis=0), jnp.max(recent.values_W, axis=0)
    stable_L = is_full(recent) & (lowest_L >= target) & (highest_L - lowest_L <= tolerance)
    lost_L = latest(recent) < target - tolerance
    return Converged(scores=recent, active_L=(state.active_L | stable_L) & ~lost_L)

  return Trigger(init, update)


def collapse(
  num_layers: int,
  threshold: float,
  window: int,
  effective_share: float = 0.75,
  recovered_share: float = 0.9,
  max_duration: int = 500,
  refractory: int = 200,
  grace: int = 0,
) -> Trigger:
  """On at a sudden fall, off after recovery: the emergency of a layer.

  On when, compared with the best of the last `window` steps, the score is lower by more than
  `threshold`, or the effective number of experts is below `effective_share` times. The best forgets
  what is older, so slow changes are no collapse: they are `below_target`'s concern.

  Off when the score is back within half the threshold of that best and the effective number back at
  `recovered_share` of its own, or after `max_duration` steps. For `refractory` steps from there no
  new emergency begins in the layer; a fall in that time is left to the controller's law.

  Args:
    num_layers: L, at least 1.
    threshold: in units of the score, in (0, 1).
    window: in training steps, at least 1.
    effective_share: in (0, 1).
    recovered_share: in (effective_share, 1].
    max_duration: in training steps, at least 1.
    refractory: in training steps, at least 0.
    grace: so many updates after the start none begins: experts that begin at random become more
      alike, fast, in healthy training. At least 0.

  Returns:
    A Trigger with `update(state, score_L, effective_L) -> Collapse`.
  """
  require_count("num_layers", num_layers, at_least=1)
  require("threshold", threshold, 0.0 < threshold < 1.0, "in (0, 1)")
  require_count("window", window, at_least=1)
  require("effective_share", effective_share, 0.0 < effective_share < 1.0, "in (0, 1)")
  holds = effective_share < recovered_share <= 1.0
  require("recovered_share", recovered_share, holds, f"in (effective_share={effective_share}, 1]")
  require_count("max_duration", max_duration, at_least=1)
  require_count("refractory", refractory, at_least=0)
  require_count("grace", grace, at_least=0)
  recent = sliding_window((num_layers,), window)

  def init() -> Collapse:
    return Collapse(
      scores=recent.init(),
      effective=recent.init(),
      score_before_L=jnp.zeros(num_layers, jnp.float32),
      effective_before_L=jnp.zeros(num_layers, jnp.float32),
      duration_L=jnp.zeros(num_layers, jnp.int32),
      refractory_L=jnp.zeros(num_layers, jnp.int32),
      active_L=jnp.zeros(num_layers, bool),
    )

  def update(state: Collapse, score_L: jax.Array, effective_L: jax.Array) -> Collapse:
    scores = recent.update(state.scores, score_L)
    effective = recent.update(state.effective, effective_L)
    score_L, effective_L = latest(scores), latest(effective)
    best_score_L = jnp.max(scores.values_W, axis=0)
    best_effective_L = jnp.max(effective.values_W, axis=0)

    fallen_L = best_score_L - score_L > threshold
    fallen_L |= effective_L < effective_share * best_effective_L
    armed_L = ~state.active_L & (state.refractory_L == 0) & (scores.count > grace)
    begins_L = armed_L & fallen_L

    recovered_L = score_L >= state.score_before_L - threshold / 2
    recovered_L &= effective_L >= recovered_share * state.effective_before_L
    duration_L = jnp.where(state.active_L, state.duration_L + 1, 0)
    ends_L = state.active_L & (recovered_L | (duration_L >= max_duration))

    active_L = (state.active_L | begins_L) & ~ends_L
    return Collapse(
      scores=scores,
      effective=effective,
      score_before_L=jnp.where(begins_L, best_score_L, state.score_before_L),
      effective_before_L=jnp.where(begins_L, best_effective_L, state.effective_before_L),
      duration_L=jnp.where(active_L, duration_L, 0),
      refractory_L=jnp.where(ends_L, refractory, jnp.maximum(state.refractory_L - 1, 0)),
      active_L=active_L,
    )

  return Trigger(init, update)
