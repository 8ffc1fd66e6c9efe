"""Memory for noisy measurements: a running mean and a window. Both hold still through NaN and inf.

A filter is a pair of pure functions, and its state is a NamedTuple of arrays. Time counts updates,
which the controllers make once per training step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import require_count


class Filter(NamedTuple):
  """`init() -> state` and `update(state, measured) -> state`, for one shape `[...]`."""

  init: Callable[[], Any]
  update: Callable[[Any, jax.Array], Any]


class Mean(NamedTuple):
  """State of `exponential_mean`.

  Attributes:
    value: `[...]` float32, the mean; 0 before the first finite measurement.
    seen: `[...]` int32, finite measurements so far, counted up to the filter's `steps`.
  """

  value: jax.Array
  seen: jax.Array


class Window(NamedTuple):
  """State of `sliding_window`.

  Attributes:
    values_W: `[W, ...]` float32, the last W values, in a ring.
    count: int32 scalar, updates so far; the next one writes row `count % W`.
  """

  values_W: jax.Array
  count: jax.Array


def exponential_mean(shape: tuple[int, ...], steps: int) -> Filter:
  """The plain mean of the first `steps` measurements, from there on an exponential one.

  `value += (measured - value) / min(n, steps)` at the n-th finite measurement, elementwise: no bias
  to correct, and white noise of deviation s ends at s / sqrt(2 steps - 1). A measurement that is
  not finite changes nothing.

  Args:
    shape: of the measurements.
    steps: time constant in updates, at least 1; 1 follows the measurement at once.

  Returns:
    A Filter whose state is a Mean.
  """
  require_count("steps", steps, at_least=1)

  def init() -> Mean:
    return Mean(value=jnp.zeros(shape, jnp.float32), seen=jnp.zeros(shape, jnp.int32))

  def update(state: Mean, measured: jax.Array) -> Mean:
    finite = jnp.isfinite(measured)
    seen = jnp.minimum(state.seen + finite.astype(jnp.int32), steps)
    change = (measured - state.value) / jnp.maximum(seen, 1).astype(jnp.float32)
    return Mean(value=state.value + jnp.where(finite, change, 0.0), seen=seen)

  return Filter(init, update)


def sliding_window(shape: tuple[int, ...], steps: int) -> Filter:
  """The last `steps` measurements; until there are so many, the first one stands in for the rest.

  A measurement that is not finite repeats the one before it (0 if it is the first).

  Args:
    shape: of the measurements.
    steps: W, at least 1.

  Returns:
    A Filter whose state is a Window.
  """
  require_count("steps", steps, at_least=1)

  def init() -> Window:
    return Window(jnp.zeros((steps, *shape), jnp.float32), jnp.zeros((), jnp.int32))

  def update(state: Window, measured: jax.Array) -> Window:
    value = jnp.where(jnp.isfinite(measured), measured, latest(state))
    everywhere_W = jnp.broadcast_to(value, (steps, *shape))
    values_W = jnp.where(state.count == 0, everywhere_W, state.values_W)
    return Window(values_W.at[state.count % steps].set(value), state.count + 1)

  return Filter(init, update)


def latest(window: Window) -> jax.Array:
  """The newest value, `[...]`; 0 before the first."""
  return window.values_W[(window.count - 1) % window.values_W.shape[0]]


def is_full(window: Window) -> jax.Array:
  """Bool scalar: whether the window has seen as many measurements as it holds."""
  return window.count >= window.values_W.shape[0]
