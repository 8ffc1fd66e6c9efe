"""Open loop: base strengths times a schedule. What is observed changes nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import (
  ControlFlags,
  Controller,
  Observation,
  Schedule,
  Strengths,
  ignore_evaluation,
  no_flags,
  require_count,
  require_strength,
)


class ConstantState(NamedTuple):
  """The number of updates seen, int32 scalar: the index of the step about to run."""

  count: jax.Array


def constant(
  weight_strength: float, output_strength: float, num_layers: int, schedule: Schedule
) -> Controller:
  """Every layer has the base strength times `schedule(count)`.

  Args:
    weight_strength: base strength of the weight penalty, at least 0.
    output_strength: base strength of the output penalty, at least 0.
    num_layers: L, at least 1.
    schedule: step -> factor, e.g. `schedules.linear_warmup`.

  Returns:
    A Controller whose state is a ConstantState.

  Raises:
    ValueError: a strength is negative or not finite, or num_layers is not a positive integer.
  """
  require_strength("weight_strength", weight_strength)
  require_strength("output_strength", output_strength)
  require_count("num_layers", num_layers, at_least=1)

  def init() -> ConstantState:
    return ConstantState(count=jnp.zeros((), jnp.int32))

  def strengths(state: ConstantState) -> Strengths:
    factor = jax.lax.stop_gradient(schedule(state.count))
    return Strengths(
      weight_L=jnp.full(num_layers, weight_strength * factor, jnp.float32),
      output_L=jnp.full(num_layers, output_strength * factor, jnp.float32),
    )

  def update(state: ConstantState, observation: Observation) -> ConstantState:
    del observation
    return ConstantState(count=state.count + 1)

  def flags(state: ConstantState) -> ControlFlags:
    del state
    return no_flags(num_layers)

  return Controller(init, strengths, update, flags, ignore_evaluation)
