"""From laws to controllers: `supervise(law, watch, actuator)`.

  Observation -> Watch (smooth, trigger) -> Sight -> Law -> Actuator (clip) -> Strengths

A Law says how strong the constraint of each layer should be, a Watch what it can know, an Actuator
within which bounds and on which penalty it acts. Laws multiply (`product`), so schedule, feedback
and rescue are written once each and put together as wanted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control import triggers
from hgnn_moe_jax.control.base import (
  ControlFlags,
  Controller,
  Observation,
  Schedule,
  Strengths,
  require,
  require_count,
  require_strength,
)
from hgnn_moe_jax.control.filters import Mean, exponential_mean
from hgnn_moe_jax.control.schedules import constant_schedule

SIGNALS = ("weight", "output")
OBJECTIVES = ("weight", "output", "both")


class Sight(NamedTuple):
  """What a law can know before step `count`.

  Attributes:
    count: int32 scalar, updates seen; the index of the step about to run.
    score_L: the controlled specialization, smoothed, in [0, 1]; 0 before the first observation.
    low_L: bool, trigger below_target.
    converged_L: bool.
    emergency_L: bool, trigger collapse.
    plateau: bool scalar, of the validation loss.
    stalled: bool scalar, plateau of the smoothed training loss.
  """

  count: jax.Array
  score_L: jax.Array
  low_L: jax.Array
  converged_L: jax.Array
  emergency_L: jax.Array
  plateau: jax.Array
  stalled: jax.Array


class WatchState(NamedTuple):
  """Smoothed measurements and the triggers' states."""

  score: Mean
  effective: Mean
  lm_loss: Mean
  low: triggers.BelowTarget
  converged: triggers.Converged
  collapse: triggers.Collapse
  plateau: triggers.Plateau
  stalled: triggers.Plateau


class Watch(NamedTuple):
  """A controller's eyes. Made by `make_watch`.

  Attributes:
    num_layers, target, tolerance: what it was made with; the laws aim at the same target.
    init: () -> WatchState.
    update: WatchState, step, Observation -> WatchState.
    observe_evaluation: WatchState, step, validation loss -> WatchState.
    sight: WatchState, count -> Sight.
  """

  num_layers: int
  target: float
  tolerance: float
  init: Callable[[], WatchState]
  update: Callable[[WatchState, jax.Array, Observation], WatchState]
  observe_evaluation: Callable[[WatchState, jax.Array, jax.Array], WatchState]
  sight: Callable[[WatchState, jax.Array], Sight]


class Saturation(NamedTuple):
  """Whether the strengths just applied were at a bound, where a law cannot push them further."""

  at_minimum_L: jax.Array
  at_maximum_L: jax.Array


class Law(NamedTuple):
  """A strength per layer, or a factor of one.

  Attributes:
    init: () -> state; arrays, or () if there is nothing to remember.
    update: state, Sight, Saturation -> state, once per training step.
    value: state, Sight -> float32 [L] or scalar, at least 0; `supervise` clips it.
  """

  init: Callable[[], Any]
  update: Callable[[Any, Sight, Saturation], Any]
  value: Callable[[Any, Sight], jax.Array]


class Actuator(NamedTuple):
  """Where a law acts and within which bounds. Made by `make_actuator`."""

  objective: str
  minimum: float
  maximum: float
  other_strength: float
  other_schedule: Schedule


class SupervisedState(NamedTuple):
  """The number of updates seen (int32 scalar), and the states of the watch and of the law."""

  count: jax.Array
  watch: WatchState
  law: Any


def make_actuator(
  objective: str = "weight",
  minimum: float = 0.001,
  maximum: float = 0.3,
  other_strength: float = 0.0,
  other_schedule: Schedule | None = None,
) -> Actuator:
  """Which penalties the law drives, and how far.

  Args:
    objective: one of OBJECTIVES; with "both", the two penalties get the same strength.
    minimum: strength, at least 0; exactly this is applied where the law wants less.
    maximum: strength, at least `minimum` and above 0.
    other_strength: base strength of the penalty that is not driven; 0 with "both".
    other_schedule: step -> factor of it, e.g. `schedules.linear_warmup`; None: 1 at every step.

  Raises:
    ValueError: a parameter is outside its range.
  """
  require("objective", objective, objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
  require_strength("minimum", minimum)
  require_strength("maximum", maximum)
  holds = maximum > 0.0 and maximum >= minimum
  require("maximum", maximum, holds, f"above 0 and at least minimum={minimum}")
  require_strength("other_strength", other_strength)
  if objective == "both":
    require("other_strength", other_strength, other_strength == 0.0, "0 with objective='both'")
  other_schedule = other_schedule or constant_schedule()
  return Actuator(objective, minimum, maximum, other_strength, other_schedule)


def make_watch(
  num_layers: int,
  signal: str = "weight",
  layer_specific: bool = True,
  smoothing: int = 10,
  target: float = 0.95,
  tolerance: float = 0.02,
  performance_window: int = 100,
  improvement: float = 0.01,
  convergence_window: int = 100,
  collapse_threshold: float = 0.1,
  emergency_window: int = 50,
  effective_share: float = 0.75,
  recovered_share: float = 0.9,
  max_emergency: int = 500,
  refractory: int = 200,
  grace: int = 0,
) -> Watch:
  """Smooths what is measured and feeds the triggers of `triggers`; windows in training steps.

  Args:
    num_layers: L, at least 1.
    signal: one of SIGNALS: the specialization that is the controlled score.
    layer_specific: whether each layer is judged by itself; else all by the mean over layers.
    smoothing: time constant of the mean over the last steps, in [1, emergency_window].
    target: the score wanted, in (0, 1].
    tolerance: in units of the score, in (0, target).
    performance_window: steps without improvement of a loss that make a plateau, at least 1.
    improvement: share of the loss that counts as one, in [0, 1).
    convergence_window: steps at the target that make convergence, at least 1.
    collapse_threshold, emergency_window, effective_share, recovered_share, refractory, grace: of
      `triggers.collapse`; max_emergency is its max_duration.

  Raises:
    ValueError: a parameter is outside its range.
  """
  require("signal", signal, signal in SIGNALS, f"one of {', '.join(SIGNALS)}")
  require_count("smoothing", smoothing, at_least=1)
  holds = smoothing <= emergency_window
  require("smoothing", smoothing, holds, f"at most emergency_window={emergency_window}")
  low = triggers.below_target(num_layers, target, tolerance)
  converged = triggers.converged(num_layers, target, tolerance, convergence_window)
  collapse = triggers.collapse(
    num_layers,
    collapse_threshold,
    emergency_window,
    effective_share,
    recovered_share,
    max_emergency,
    refractory,
    grace,
  )
  plateau = triggers.plateau(performance_window, improvement)
  per_layer = exponential_mean((num_layers,), smoothing)
  scalar = exponential_mean((), smoothing)

  def judged(mean: Mean) -> jax.Array:
    if layer_specific:
      return mean.value
    return jnp.broadcast_to(jnp.mean(mean.value), (num_layers,))

  def init() -> WatchState:
    return WatchState(
      score=per_layer.init(),
      effective=per_layer.init(),
      lm_loss=scalar.init(),
      low=low.init(),
      converged=converged.init(),
      collapse=collapse.init(),
      plateau=plateau.init(),
      stalled=plateau.init(),
    )

  def update(state: WatchState, step: jax.Array, observation: Observation) -> WatchState:
    measured_L = (
      observation.weight_specialization_L
      if signal == "weight"
      else observation.output_specialization_L
    )
    score = per_layer.update(state.score, measured_L)
    effective = per_layer.update(state.effective, observation.effective_experts_L)
    lm_loss = scalar.update(state.lm_loss, observation.lm_loss)
    return WatchState(
      score=score,
      effective=effective,
      lm_loss=lm_loss,
      low=low.update(state.low, judged(score)),
      converged=converged.update(state.converged, judged(score)),
      collapse=collapse.update(state.collapse, judged(score), judged(effective)),
      plateau=state.plateau,
      stalled=plateau.update(state.stalled, step, lm_loss.value),
    )

  def observe_evaluation(state: WatchState, step: jax.Array, loss: jax.Array) -> WatchState:
    return state._replace(plateau=plateau.update(state.plateau, step, loss))

  def sight(state: WatchState, count: jax.Array) -> Sight:
    return Sight(
      count=count,
      score_L=judged(state.score),
      low_L=state.low.active_L,
      converged_L=state.converged.active_L,
      emergency_L=state.collapse.active_L,
      plateau=state.plateau.active,
      stalled=state.stalled.active,
    )

  return Watch(num_layers, target, tolerance, init, update, observe_evaluation, sight)


def product(*laws: Law) -> Law:
  """The laws' values multiplied; each keeps its own state, in a tuple."""

  def init() -> tuple[Any, ...]:
    return tuple(law.init() for law in laws)

  def update(states: tuple[Any, ...], sight: Sight, saturation: Saturation) -> tuple[Any, ...]:
    return tuple(
      law.update(state, sight, saturation) for law, state in zip(laws, states, strict=True)
    )

  def value(states: tuple[Any, ...], sight: Sight) -> jax.Array:
    total = jnp.ones_like(sight.score_L)
    for law, state in zip(laws, states, strict=True):
      total = total * law.value(state, sight)
    return total

  return Law(init, update, value)


def supervise(law: Law, watch: Watch, actuator: Actuator) -> Controller:
  """`strength_l = clip(law_l, minimum, maximum)` on the actuator's penalties.

  Returns:
    A Controller whose state is a SupervisedState. All its flags are those of the watch, whether or
    not the law heeds them.
  """

  def driven(state: SupervisedState) -> jax.Array:
    value_L = law.value(state.law, watch.sight(state.watch, state.count))
    return jax.lax.stop_gradient(jnp.clip(value_L, actuator.minimum, actuator.maximum))

  def init() -> SupervisedState:
    return SupervisedState(jnp.zeros((), jnp.int32), watch.init(), law.init())

  def strengths(state: SupervisedState) -> Strengths:
    driven_L = driven(state)
    factor = jax.lax.stop_gradient(actuator.other_schedule(state.count))
    other_L = jnp.full_like(driven_L, actuator.other_strength * factor)
    return Strengths(
      weight_L=other_L if actuator.objective == "output" else driven_L,
      output_L=other_L if actuator.objective == "weight" else driven_L,
    )

  def update(state: SupervisedState, observation: Observation) -> SupervisedState:
    applied_L = driven(state)
    saturation = Saturation(applied_L <= actuator.minimum, applied_L >= actuator.maximum)
    watched = watch.update(state.watch, state.count, observation)
    count = state.count + 1
    return SupervisedState(
      count, watched, law.update(state.law, watch.sight(watched, count), saturation)
    )

  def flags(state: SupervisedState) -> ControlFlags:
    return ControlFlags(
      emergency_L=state.watch.collapse.active_L,
      plateau=state.watch.plateau.active,
      converged_L=state.watch.converged.active_L,
    )

  def observe_evaluation(state: SupervisedState, loss: jax.Array | float) -> SupervisedState:
    loss = jnp.asarray(loss, jnp.float32)
    return state._replace(watch=watch.observe_evaluation(state.watch, state.count, loss))

  return Controller(init, strengths, update, flags, observe_evaluation)
