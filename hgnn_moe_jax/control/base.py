"""The contract between a controller and the training step.

A controller is a NamedTuple of pure functions, like `optax.GradientTransformation`. Its state is a
NamedTuple of arrays that lives in the TrainState, is saved with it and passes through `jit`,
`lax.scan` and `vmap`.

Time: training step t (0, 1, ...) calls `strengths(state)` first and `update(state, observation)`
with what that step measured last. So the strengths of step t depend on the observations of steps
0 ... t-1 and on nothing else, and `state.count`, the number of updates seen, equals t while step t
runs. Windows and cadences count training steps. Between two steps the loop may tell the controller
a validation loss with `observe_evaluation`, at whatever cadence it evaluates.

What a controller reads from its factory (base strengths above all) is never written into the state:
factors apply to the base anew in each step and cannot compound.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# NamedTuple of arrays with at least `count`, int32 scalar; each controller has its own.
ControllerState = Any
# step, int32 scalar -> factor, float32 scalar
Schedule = Callable[[jax.Array], jax.Array]


class Strengths(NamedTuple):
  """Multipliers of the penalties; float32, gradient stopped.

  Attributes:
    weight_L, output_L: one per objective and layer.
    weight_pairs_LEE, output_pairs_LEE: factor of each pair's overlap within its layer, mean 1 over
      the pairs; None where all pairs are treated alike.
  """

  weight_L: jax.Array
  output_L: jax.Array
  weight_pairs_LEE: jax.Array | None = None
  output_pairs_LEE: jax.Array | None = None


class Observation(NamedTuple):
  """What one training step measured, as the controller sees it.

  Attributes:
    step: index of the step that measured it, int32 scalar.
    weight_specialization_L: 1 - mean |cos| of the experts' weights, float32 in [0, 1].
    output_specialization_L: 1 - mean |cos| of the experts' updates, float32 in [0, 1].
    effective_experts_L: float32 in [1, E].
    lm_loss: cross-entropy in nats per token, float32 scalar.
    weight_overlap_LEE, output_overlap_LEE: what the penalties are made of, float32, at least 0;
      None where nobody looks at single pairs.
  """

  step: jax.Array
  weight_specialization_L: jax.Array
  output_specialization_L: jax.Array
  effective_experts_L: jax.Array
  lm_loss: jax.Array
  weight_overlap_LEE: jax.Array | None = None
  output_overlap_LEE: jax.Array | None = None


class ControlFlags(NamedTuple):
  """What a controller sees happening, for the records; an event is a change of one of these.

  Attributes:
    emergency_L: bool, whether the layer's experts have collapsed and not yet recovered.
    plateau: bool scalar, whether the validation loss has stopped improving.
    converged_L: bool, whether the layer's score has reached its target and stays there.
  """

  emergency_L: jax.Array
  plateau: jax.Array
  converged_L: jax.Array


class Controller(NamedTuple):
  """Pure functions of a state.

  Attributes:
    init: () -> state, at step 0. Every call makes new arrays, so the state can be donated.
    strengths: state -> Strengths of the step about to run.
    update: state, Observation -> state of the next step.
    flags: state -> ControlFlags that go with `strengths(state)`.
    observe_evaluation: state, validation loss in nats per token -> state. Called between two steps,
      after each evaluation; may be jitted. Does not count as an update.
  """

  init: Callable[[], ControllerState]
  strengths: Callable[[ControllerState], Strengths]
  update: Callable[[ControllerState, Observation], ControllerState]
  flags: Callable[[ControllerState], ControlFlags]
  observe_evaluation: Callable[[ControllerState, jax.Array | float], ControllerState]


def no_flags(num_layers: int) -> ControlFlags:
  """The flags of a controller that watches nothing."""
  return ControlFlags(
    emergency_L=jnp.zeros(num_layers, bool),
    plateau=jnp.zeros((), bool),
    converged_L=jnp.zeros(num_layers, bool),
  )


def ignore_evaluation(state: ControllerState, loss: jax.Array | float) -> ControllerState:
  """`observe_evaluation` of a controller that has no use for validation losses."""
  del loss
  return state


def require(name: str, value: object, holds: bool, what: str) -> None:
  """Raises ValueError unless `holds`, to be phrased so that it does not for NaN."""
  if not holds:
    raise ValueError(f"{name} must be {what}, got {value!r}")


def require_strength(name: str, value: float) -> None:
  """Raises ValueError unless `value` is a finite number of at least 0."""
  require(name, value, math.isfinite(value) and value >= 0.0, "finite and at least 0")


def require_count(name: str, value: int, at_least: int) -> None:
  """Raises ValueError unless `value` is an integer of at least so much."""
  holds = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
  require(name, value, holds, f"an integer of at least {at_least}")
