"""Factors over training time: `schedule(step) -> factor`, as in optax.

`step` is an int32 scalar, traced or not, or a Python int; the factor is a float32 scalar in [0, 1].
Schedules hold outside the run, too: before step 0 they have the value at 0, after the last step the
value at the end.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hgnn_moe_jax.control.base import Schedule, require_count

DECAYS = ("cosine", "exponential", "linear", "step", "none")


def constant_schedule() -> Schedule:
  """Factor 1 at every step."""
  return lambda step: jnp.ones_like(step, dtype=jnp.float32)


def product(*factors: Schedule) -> Schedule:
  """All of the schedules at once: `product_i factors_i(step)`, e.g. a warm-up and a decay."""
  return lambda step: math.prod((f(step) for f in factors), start=jnp.ones((), jnp.float32))


def linear_warmup(steps: int) -> Schedule:
  """`min(1, step / steps)`: 0 at step 0, 1 from step `steps` on. With 0 steps, 1 everywhere.

  Raises:
    ValueError: steps is not an integer of at least 0.
  """
  require_count("steps", steps, at_least=0)
  if steps == 0:
    return constant_schedule()
  return lambda step: _progress(step, steps)


def decay(kind: str, total_steps: int, floor: float, num_drops: int = 4) -> Schedule:
  """Falls from 1 at step 0 to `floor` at step `total_steps`, and stays there.

  With p = step / total_steps in [0, 1]:
    cosine: w + floor (1 - w) with w = (1 + cos(pi p)) / 2
    exponential: floor^p, equal ratios in equal times
    linear: (1 - p) + floor p
    step: floor^(k / num_drops), k = int(p num_drops): equal ratios, `num_drops` times, the last of
      them at `total_steps`
    none: 1

  Args:
    kind: one of DECAYS.
    total_steps: length of the run in training steps, at least 1.
    floor: last factor, in [0, 1]; above 0 for exponential and step. Not read by "none".
    num_drops: of the kind "step", at least 1. Not read by the others.

  Returns:
    The schedule. Its first value is 1 and its last is `floor`, to the bit.

  Raises:
    ValueError: a parameter is outside its range, or the kind is unknown.
  """
  if kind not in DECAYS:
    raise ValueError(f"kind must be one of {', '.join(DECAYS)}, got {kind!r}")
  require_count("total_steps", total_steps, at_least=1)
  require_count("num_drops", num_drops, at_least=1)
  if not 0.0 <= floor <= 1.0:
    raise ValueError(f"floor must be in [0, 1], got {floor!r}")
  if kind in ("exponential", "step") and floor == 0.0:
    raise ValueError(f"floor must be above 0 for kind={kind!r}, got {floor!r}")
  match kind:
    case "cosine":
      return lambda step: _between(
        floor, (1.0 + jnp.cos(math.pi * _progress(step, total_steps))) / 2.0
      )
    case "exponential":
      # exp(log(floor)) is not floor to the bit: the end is set apart.
      return lambda step: jnp.where(
        step >= total_steps, floor, jnp.exp(math.log(floor) * _progress(step, total_steps))
      )
    case "linear":
      return lambda step: _between(floor, 1.0 - _progress(step, total_steps))
    case "step":
      return _drops(total_steps, floor, num_drops)
    case _:
      return constant_schedule()


def _progress(step: jax.Array, steps: int) -> jax.Array:
  """The share of `steps` that lies behind, in [0, 1], float32."""
  # Compiled code multiplies by the reciprocal, and 61 * (1 / 61) = 1 - 2^-24: the end is set apart.
  share = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
  return jnp.where(jnp.asarray(step, jnp.int32) >= steps, 1.0, share)


def _between(floor: float, share: jax.Array) -> jax.Array:
  """1 at share 1, floor at share 0; `floor + (1 - floor) share` would miss both by a rounding."""
  return share + floor * (1.0 - share)


def _drops(total_steps: int, floor: float, num_drops: int) -> Schedule:
  # Steps at which the factor falls, in integers: int(p num_drops) in float32 is late by one where
  # p num_drops rounds down.
  boundaries = np.array([-(-k * total_steps // num_drops) for k in range(1, num_drops + 1)])
  factors = np.array([floor ** (k / num_drops) for k in range(num_drops + 1)], np.float32)

  def schedule(step: jax.Array) -> jax.Array:
    drops = jnp.sum(jnp.asarray(step, jnp.int32) >= boundaries.astype(np.int32))
    return jnp.asarray(factors)[drops]

  return schedule
