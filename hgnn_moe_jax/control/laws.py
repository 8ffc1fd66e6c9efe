"""Factors of a multiplicative law, one influence each. Put together with `supervision.product`.

Each is a Law whose value does not depend on the others, and none is ever written back into the base
strength.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import Schedule, require, require_count
from hgnn_moe_jax.control.supervision import Law, Saturation, Sight, Watch

_POSITIVE, _ABOVE_ONE = "finite and above 0", "finite and above 1"


class LogFactor(NamedTuple):
  """Natural logarithm of a factor, float32, [L] or scalar; 0 at the start."""

  log: jax.Array


def stateless(value: Callable[[Sight], jax.Array]) -> Law:
  """A law that remembers nothing: its value is a function of the sight."""
  return Law(lambda: (), lambda state, sight, saturation: (), lambda state, sight: value(sight))


def planned(
  schedule: Schedule, num_layers: int, initial_strength: float, deeper_layer_scaling: float
) -> Law:
  """`initial_strength * schedule(t) * deeper_layer_scaling^l` in layer l = 0 ... L - 1.

  Args:
    schedule: step -> factor.
    num_layers: L, at least 1.
    initial_strength: finite, above 0: no other factor could raise 0.
    deeper_layer_scaling: in (0, 1]; 1 treats all layers alike.
  """
  require_count("num_layers", num_layers, at_least=1)
  require("initial_strength", initial_strength, 0.0 < initial_strength < math.inf, _POSITIVE)
  holds = 0.0 < deeper_layer_scaling <= 1.0
  require("deeper_layer_scaling", deeper_layer_scaling, holds, "in (0, 1]")
  base = [initial_strength * deeper_layer_scaling**layer for layer in range(num_layers)]
  return stateless(lambda sight: jnp.asarray(base, jnp.float32) * schedule(sight.count))


def boost(multiplier: float) -> Law:
  """`multiplier` in layers in emergency, 1 in the others. The multiplier is at least 1, finite."""
  require("boost_multiplier", multiplier, 1.0 <= multiplier < math.inf, "finite and at least 1")
  return stateless(lambda sight: jnp.where(sight.emergency_L, multiplier, 1.0))


def relaxation(when: Callable[[Sight], jax.Array], floor: float, steps: int) -> Law:
  """Falls from 1 to `floor` while `when` holds, and returns to 1 while it does not.

  `log f -= log(1 / floor) / steps` in each step in which it holds, `+=` in the others, within
  [floor, 1]. A layer in emergency is not relaxed, or the boost and the relaxation would cancel.

  Args:
    when: Sight -> bool scalar, e.g. `lambda sight: sight.plateau`.
    floor: smallest factor, in (0, 1]; 1 never relaxes.
    steps: from 1 to the floor, at least 1.
  """
  require("relaxation_floor", floor, 0.0 < floor <= 1.0, "in (0, 1]")
  require_count("relaxation_steps", steps, at_least=1)
  lowest = math.log(floor)

  def init() -> LogFactor:
    return LogFactor(jnp.zeros((), jnp.float32))

  def update(state: LogFactor, sight: Sight, saturation: Saturation) -> LogFactor:
    del saturation
    change = jnp.where(when(sight), lowest / steps, -lowest / steps)
    return LogFactor(jnp.clip(state.log + change, lowest, 0.0))

  def value(state: LogFactor, sight: Sight) -> jax.Array:
    return jnp.where(sight.emergency_L, 1.0, jnp.exp(state.log))

  return Law(init, update, value)


def similarity(watch: Watch, sensitivity: float, limit: float) -> Law:
  """`(overlap / (1 - target))^sensitivity` with overlap = 1 - score, within [1 / limit, limit].

  1 at the target and before the first observation; a proportional action, so it rests where the
  plant and it agree, not at the target.

  Args:
    watch: whose score and target are compared; its target must be below 1.
    sensitivity: exponent, above 0.
    limit: above 1, finite.
  """
  require("target", watch.target, watch.target < 1.0, "below 1")
  require("sensitivity", sensitivity, 0.0 < sensitivity < math.inf, _POSITIVE)
  require("limit", limit, 1.0 < limit < math.inf, _ABOVE_ONE)
  highest = math.log(limit)

  def init() -> LogFactor:
    return LogFactor(jnp.zeros(watch.num_layers, jnp.float32))

  def update(state: LogFactor, sight: Sight, saturation: Saturation) -> LogFactor:
    del state, saturation
    # Without a bound on the overlap its logarithm is -inf for orthogonal experts.
    overlap_L = jnp.clip(1.0 - sight.score_L, 1e-6, 1.0)
    log_L = sensitivity * jnp.log(overlap_L / (1.0 - watch.target))
    return LogFactor(jnp.clip(log_L, -highest, highest))

  def value(state: LogFactor, sight: Sight) -> jax.Array:
    del sight
    return jnp.exp(state.log)

  return Law(init, update, value)


def tracking(
  watch: Watch,
  frequency: int,
  gain: float,
  max_change: float,
  limit: float,
  convergence_decay: float,
) -> Law:
  """A factor that moves in log space until the score is at its target: integral action, bounded.

  Every `frequency` steps `log f += clip(gain * frequency * push, +-log(max_change))`, with

    push = target - score                  while the score is low (trigger below_target)
    push = target + tolerance - score      above target + tolerance
    push = 0                               in between

  So a correction goes to the target but begins only outside the tolerance: a dead zone, in which
  an integrator behind a delay comes to rest instead of cycling. While the layer has converged and
  is at or above its target, `convergence_decay * frequency` is subtracted from log f besides.

  It stands still where the strength is at the bound towards which it would move (anti-windup), and
  in a validation plateau, which asks for less, it rises only in layers in emergency.

  In log space the gain needs no knowledge of the strength's units: the slope of an overlap in
  [0, 1] over log strength is a fraction of 1. Critical damping on a first-order plant with time
  constant tau and that slope S: gain = 1 / (4 tau S).

  Args:
    watch: whose score, target and tolerance count.
    frequency: training steps between two changes, at least 1.
    gain: change of log f per unit of score and training step, above 0.
    max_change: factor of the largest single change, above 1, finite.
    limit: f stays in [1 / limit, limit]; above 1, finite.
    convergence_decay: fall of log f per training step, at least 0.
  """
  require_count("adaptation_frequency", frequency, at_least=1)
  require("gain", gain, 0.0 < gain < math.inf, _POSITIVE)
  require("max_change", max_change, 1.0 < max_change < math.inf, _ABOVE_ONE)
  require("limit", limit, 1.0 < limit < math.inf, _ABOVE_ONE)
  require("convergence_decay", convergence_decay, 0.0 <= convergence_decay < 1.0, "in [0, 1)")
  largest, highest = math.log(max_change), math.log(limit)

  def init() -> LogFactor:
    return LogFactor(jnp.zeros(watch.num_layers, jnp.float32))

  def update(state: LogFactor, sight: Sight, saturation: Saturation) -> LogFactor:
    error_L = watch.target - sight.score_L
    push_L = jnp.where(sight.low_L, error_L, jnp.minimum(error_L + watch.tolerance, 0.0))
    decays_L = sight.converged_L & (error_L <= 0.0)
    rate_L = gain * push_L - jnp.where(decays_L, convergence_decay, 0.0)
    change_L = jnp.clip(frequency * rate_L, -largest, largest)

    relaxed_L = sight.plateau & ~sight.emergency_L
    blocked_L = jnp.where(
      change_L > 0.0, saturation.at_maximum_L | relaxed_L, saturation.at_minimum_L
    )
    moves_L = (sight.count % frequency == 0) & ~blocked_L
    log_L = jnp.clip(state.log + change_L, -highest, highest)
    return LogFactor(jnp.where(moves_L, log_L, state.log))

  def value(state: LogFactor, sight: Sight) -> jax.Array:
    del sight
    return jnp.exp(state.log)

  return Law(init, update, value)
