"""Softmax cross-entropy and its gradient in one kernel for NVIDIA GPUs, in Pallas.

A program does a row: once through its logits for their maximum and sum, and once more, while the
row is still in the cache, for the gradient. XLA goes through all rows twice, from memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_COLUMNS = 4096  # at a time; a power of two, which Triton asks for
_WARPS = 8
_LOWEST = float(jnp.finfo(jnp.float32).min)  # Differences of two of these are 0, and not NaN.


def softmax_errors(
  logit_nV: jax.Array,
  target_n: jax.Array,
  weight_n: jax.Array,
  vocab_size: int,
  dtype: Any,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """nll_n, float32, and weight_n (softmax - onehot), [n, V] of `dtype`: its gradient.

  Args:
    logit_nV: float32; columns from `vocab_size` on belong to no token.
    target_n: int32 in [0, vocab_size).
    weight_n: float32.
    vocab_size: number of tokens.
    dtype: of the gradient.
    interpret: run on any device, slowly.
  """
  rows, columns = logit_nV.shape
  return pl.pallas_call(
    functools.partial(_kernel, vocab_size=vocab_size, columns=columns),
    out_shape=(
      jax.ShapeDtypeStruct((rows,), jnp.float32),
      jax.ShapeDtypeStruct((rows, columns), dtype),
    ),
    grid=(rows,),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
    interpret=interpret,
  )(logit_nV, target_n, weight_n)


def _kernel(
  logit_ref, target_ref, weight_ref, nll_ref, error_ref, *, vocab_size: int, columns: int
) -> None:
  row = pl.program_id(0)
  target, weight = target_ref[row], weight_ref[row]
  lanes = jnp.arange(_COLUMNS)

  def load(part: Any) -> tuple[Any, jax.Array]:
    place, column = pl.ds(part * _COLUMNS, _COLUMNS), part * _COLUMNS + lanes
    # A mask that ends at the odd number of tokens would have every entry loaded on its own.
    logits = triton.load(logit_ref.at[row, place], mask=column < columns, other=_LOWEST)
    return (place, column), jnp.where(column < vocab_size, logits, _LOWEST)

  def add(part, top_and_total):
    # Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    top, total = top_and_total
    _, logits = load(part)
    new_top = jnp.maximum(top, logits.max())
    return new_top, total * jnp.exp(top - new_top) + jnp.exp(logits - new_top).sum()

  parts = pl.cdiv(columns, _COLUMNS)
  top, total = jax.lax.fori_loop(0, parts, add, (jnp.float32(_LOWEST), jnp.float32(0)))
  scale = weight / total

  def write(part, chosen):
    (place, column), logits = load(part)
    hit = column == target
    errors = jnp.exp(logits - top) * scale - jnp.where(hit, weight, 0.0)
    errors = jnp.where(column < vocab_size, errors, 0.0).astype(error_ref.dtype)
    triton.store(error_ref.at[row, place], errors, mask=column < columns)
    return chosen + jnp.sum(jnp.where(hit, logits, 0.0))

  chosen = jax.lax.fori_loop(0, parts, write, jnp.float32(0))
  nll_ref[row] = jnp.log(total) + top - chosen
