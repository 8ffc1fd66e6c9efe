"""A vector for every token, and its gradient: a sum over tokens."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar("Arrays")


def on_tokens(
  vector: jax.Array, tokens: tuple[int, ...], own: int = 0, dtype: jnp.dtype | None = None
) -> jax.Array:
  """The same vector at every token; its gradient is a `token_sum`.

  Args:
    vector: [..., D] float32, what comes before and after the tokens; so is its gradient.
    tokens: sizes of the tokens' axes, one at least.
    own: how many of the vector's axes come before them, such as 1 for a vector per expert.
    dtype: of the result; the vector's if None.

  Returns:
    [vector.shape[:own], tokens, vector.shape[own:]].
  """
  repeated: Any = _on_tokens(vector, tokens, own, dtype)
  return repeated


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _on_tokens(vector, tokens, own, dtype):
  before, after = vector.shape[:own], vector.shape[own:]
  apart = vector.astype(dtype or vector.dtype).reshape(*before, *(1,) * len(tokens), *after)
  return jnp.broadcast_to(apart, (*before, *tokens, *after))


def repeated_anew(arrays: Arrays) -> Arrays:
  """The same, for a backward pass that repeats them along other axes as the forward pass did.

  XLA for CPUs would find both to be one array, write it down, and keep it until then: as large as
  all the vectors that these numbers are repeated for.
  """
  return jax.lax.optimization_barrier(arrays) if jax.default_backend() == "cpu" else arrays


def token_sum(x: jax.Array, own: int, count: int = 2) -> jax.Array:
  """Sum over `count` axes behind the first `own`: float32.

  On a GPU in two steps, the last of these axes first: in one XLA puts every column of a matrix on
  one block and leaves most of the device idle.
  """
  first, *rest = range(own + count - 1, own - 1, -1)
  if jax.default_backend() == "cpu" or not rest:
    return jnp.sum(x, (first, *rest), jnp.float32)
  # XLA would make one sum of two.
  return jax.lax.optimization_barrier(jnp.sum(x, first, jnp.float32)).sum(tuple(rest))


def _forward(vector, tokens, own, dtype):
  return _on_tokens(vector, tokens, own, dtype), None


def _backward(tokens, own, dtype, _, grad):
  del dtype
  return (token_sum(grad, own, len(tokens)),)


_on_tokens.defvjp(_forward, _backward)
