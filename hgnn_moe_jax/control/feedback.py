"""Feedback on the overlap: integral and filtered proportional action, projected to the bounds."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import Controller, Schedule, require, require_strength
from hgnn_moe_jax.control.supervision import Actuator, Law, Saturation, Sight, Watch, supervise


class FeedbackState(NamedTuple):
  """State of the law.

  Attributes:
    integral_L: the integral action, a strength; float32.
    filtered_error_L: xi, the filtered error, in units of the score; float32.
  """

  integral_L: jax.Array
  filtered_error_L: jax.Array


def feedback(
  watch: Watch,
  actuator: Actuator,
  schedule: Schedule,
  initial_strength: float = 0.0,
  integral_gain: float = 0.01,
  proportional_gain: float = 2.0,
  filtering: float = 0.9,
  emergency_boost: bool = True,
  boost_multiplier: float = 2.0,
) -> Controller:
  """nuPI (Sohrabi et al. 2024, arXiv 2406.04558): the strength as a Lagrange multiplier.

  Per layer, with the error e_t = target schedule(t) - score = overlap - set-point:

    xi_t = nu xi_{t-1} + (1 - nu) e_t
    I_{t+1} = I_t + K_I e_t, unless the strength is at a bound and e_t points beyond it
    strength_{t+1} = clip(I_{t+1} + K_P xi_t, minimum, maximum)

  Between the bounds this is the paper's increment, K_I e_t + K_P (xi_t - xi_{t-1}), summed up. At a
  bound the sum matters: clipping the increments would turn noise around an inactive constraint into
  positive strengths, while here the strength is exactly `minimum` as long as the sum is below it.
  Freezing I there (conditional integration) is the anti-windup.

  The schedule acts on the set-point, not on the strength: a constraint decays by asking for less.
  In an emergency K_P is multiplied where xi asks for more, which is bounded, leaves no trace in I
  and is taken back when the emergency ends. (An emergency may be one of the effective experts, with
  the score above its target: a larger gain would then let go of them.) Plateau and convergence are
  flagged only.

  Gains: with tau the time constant of the score's answer to a strength, in steps, and G its size,
  K_I = K_P / tau cancels the plant's lag, and the loop settles with the time constant
  1 / (K_I G); that should be several times the delay plus `smoothing` plus 1 / (1 - nu). The
  defaults suit tau = 200 and G = 0.5. Quicker plants need less: halve both if the strength swings.

  Args:
    watch: what is seen, with the target; `supervision.make_watch`.
    actuator: which penalties, and the bounds; `supervision.make_actuator`. Its minimum should be 0.
    schedule: step -> factor of the target.
    initial_strength: I at step 0, at least 0.
    integral_gain: K_I, strength per unit of score and step, above 0.
    proportional_gain: K_P, strength per unit of score, at least 0.
    filtering: nu, in [0, 1).
    emergency_boost: whether an emergency raises K_P.
    boost_multiplier: by which, at least 1.

  Returns:
    A Controller whose state is a SupervisedState with a FeedbackState.

  Raises:
    ValueError: a parameter is outside its range.
  """
  require_strength("initial_strength", initial_strength)
  require("integral_gain", integral_gain, 0.0 < integral_gain < math.inf, "finite and above 0")
  require_strength("proportional_gain", proportional_gain)
  require("filtering", filtering, 0.0 <= filtering < 1.0, "in [0, 1)")
  holds = 1.0 <= boost_multiplier < math.inf
  require("boost_multiplier", boost_multiplier, holds, "finite and at least 1")
  boosted_gain = proportional_gain * (boost_multiplier if emergency_boost else 1.0)

  def init() -> FeedbackState:
    return FeedbackState(
      integral_L=jnp.full(watch.num_layers, initial_strength, jnp.float32),
      filtered_error_L=jnp.zeros(watch.num_layers, jnp.float32),
    )

  def update(state: FeedbackState, sight: Sight, saturation: Saturation) -> FeedbackState:
    error_L = watch.target * schedule(sight.count) - sight.score_L
    outward_L = saturation.at_maximum_L & (error_L > 0.0)
    outward_L |= saturation.at_minimum_L & (error_L < 0.0)
    return FeedbackState(
      integral_L=state.integral_L + jnp.where(outward_L, 0.0, integral_gain * error_L),
      filtered_error_L=filtering * state.filtered_error_L + (1.0 - filtering) * error_L,
    )

  def value(state: FeedbackState, sight: Sight) -> jax.Array:
    boosted_L = sight.emergency_L & (state.filtered_error_L > 0.0)
    gain_L = jnp.where(boosted_L, boosted_gain, proportional_gain)
    return state.integral_L + gain_L * state.filtered_error_L

  return supervise(Law(init, update, value), watch, actuator)
