"""The contract between a controller and the training step.

A controller is a NamedTuple of pure functions, like `optax.GradientTransformation`. Its state is a
NamedTuple of arrays that lives in the TrainState, is saved with it and passes through `jit`,
`lax.scan` and `vmap`.

Time: training step t (0, 1, ...) calls `strengths(state)` first and `update(state, observation)`
with what that step measured last. So the strengths of step t depend on the observations of steps
0 ... t-1 and on nothing else, and `state.count`, the number of updates seen, equals t while step t
runs. Windows and cadences count training steps.

What a controller reads from its factory (base strengths above all) is never written into the state:
factors apply to the base anew in each step and cannot compound.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# NamedTuple of arrays with at least `count`, int32 scalar; each controller has its own.
ControllerState = Any
# step, int32 scalar -> factor, float32 scalar
Schedule = Callable[[jax.Array], jax.Array]


class Strengths(NamedTuple):
  """Multipliers of the penalties, one per objective and layer; float32, gradient stopped."""

  weight_L: jax.Array
  output_L: jax.Array


class Observation(NamedTuple):
  """What one training step measured, as the controller sees it.

  Attributes:
    step: index of the step that measured it, int32 scalar.
    weight_specialization_L: 1 - mean |cos| of the experts' weights, float32 in [0, 1].
    output_specialization_L: 1 - mean |cos| of the experts' updates, float32 in [0, 1].
    effective_experts_L: float32 in [1, E].
    lm_loss: cross-entropy in nats per token, float32 scalar.
  """

  step: jax.Array
  weight_specialization_L: jax.Array
  output_specialization_L: jax.Array
  effective_experts_L: jax.Array
  lm_loss: jax.Array


class ControlFlags(NamedTuple):
  """What a controller is doing, for the records.

  Attributes:
    emergency_L: bool, whether the layer is being rescued from collapse.
  """

  emergency_L: jax.Array


class Controller(NamedTuple):
  """Pure functions of a state.

  Attributes:
    init: () -> state, at step 0. Every call makes new arrays, so the state can be donated.
    strengths: state -> Strengths of the step about to run.
    update: state, Observation -> state of the next step.
    flags: state -> ControlFlags that go with `strengths(state)`.
  """

  init: Callable[[], ControllerState]
  strengths: Callable[[ControllerState], Strengths]
  update: Callable[[ControllerState, Observation], ControllerState]
  flags: Callable[[ControllerState], ControlFlags]


def require_strength(name: str, value: float) -> None:
  """Raises ValueError unless `value` is a finite number of at least 0."""
  if not (math.isfinite(value) and value >= 0.0):
    raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def require_count(name: str, value: int, at_least: int) -> None:
  """Raises ValueError unless `value` is an integer of at least so much."""
  if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
    raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
