"""The head's logits on NVIDIA GPUs, in Pallas: made a tile at a time, used, and forgotten.

Twice: for the softmax's sums, and for the error that goes backward. In a narrow model multiplying
once more takes less time than writing the logits down in float32 and reading them twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from hgnn_moe_jax.layout import each_device, shards

_MOST_DEPTH = 256  # In wider models the second multiplication would take longer than the memory.
# A program's tile of the logits, and how many columns of both factors it holds at a time.
_ROWS, _TOKENS, _DEPTH = 128, 128, 64
LOWEST = float(jnp.finfo(jnp.float32).min)  # Differences of two of these are 0, and not NaN.


def fits(x_ND: jax.Array, kernel_VD: jax.Array) -> bool:
  """Whether the kernels take these, [N, D] and [V, D], and are faster than XLA."""
  (N, D), V = x_ND.shape, kernel_VD.shape[0]
  if (
    D > _MOST_DEPTH or shards("model") > 1
  ):  # There, each device may have a part of the vocabulary.
    return False
  whole = N % _ROWS == 0 and V % _TOKENS == 0 and D % _DEPTH == 0
  return whole and x_ND.dtype == kernel_VD.dtype == jnp.bfloat16


def log_totals(
  x_ND: jax.Array,
  kernel_VD: jax.Array,
  vocab_size: int,
  interpret: bool = False,
) -> jax.Array:
  """log sum_v exp(x_n . kernel_v) over the first `vocab_size` v: [N] float32.

  Args:
    x_ND, kernel_VD: of sizes that `fit`.
    vocab_size: rows of the kernel behind these belong to no token.
    interpret: run on any device, slowly.
  """
  N, V = x_ND.shape[0], kernel_VD.shape[0]
  part = jax.ShapeDtypeStruct((V // _TOKENS, N), jnp.float32)
  kernel = functools.partial(_totals_kernel, vocab_size=vocab_size)
  top_PN, total_PN = _call(kernel, x_ND, kernel_VD, (part, part), interpret)(x_ND, kernel_VD)
  top_N = top_PN.max(0)
  return top_N + jnp.log(jnp.sum(total_PN * jnp.exp(top_PN - top_N[None]), 0))


def errors(
  x_ND: jax.Array,
  kernel_VD: jax.Array,
  vocab_size: int,
  log_total_N: jax.Array,
  target_N: jax.Array,
  weight_N: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """weight_n (softmax_nv - [v = target_n]): [N, V] in the kernel's dtype. See `log_totals`."""
  out = jax.ShapeDtypeStruct((x_ND.shape[0], kernel_VD.shape[0]), kernel_VD.dtype)
  kernel = functools.partial(_errors_kernel, vocab_size=vocab_size)
  call = _call(kernel, x_ND, kernel_VD, out, interpret)
  return call(x_ND, kernel_VD, log_total_N, target_N, weight_N)


def _call(
  kernel: Callable[..., None],
  x_ND: jax.Array,
  kernel_VD: jax.Array,
  out_shape: Any,
  interpret: bool,
) -> Callable[..., Any]:
  programs = x_ND.shape[0] // _ROWS * (kernel_VD.shape[0] // _TOKENS)
  call = pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid=(programs,),
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
    interpret=interpret,
  )
  # On a mesh these are one device's rows: `LanguageModel.loss` maps over the devices' parts.
  whole = PartitionSpec()
  return lambda *given: each_device(call, (whole,) * len(given), whole)(*given)


def _logits(x_ref: Any, kernel_ref: Any, vocab_size: int) -> tuple[jax.Array, jax.Array, Any, Any]:
  """The logits of this program's tile, their tokens, its rows, and its number among the columns."""
  N, D = x_ref.shape
  # Programs that follow one another share their columns, of which there are more bytes.
  row = pl.ds(pl.program_id(0) % (N // _ROWS) * _ROWS, _ROWS)
  part = pl.program_id(0) // (N // _ROWS)
  column = pl.ds(part * _TOKENS, _TOKENS)

  def add(number, total):
    depth = pl.ds(number * _DEPTH, _DEPTH)
    x, kernel = x_ref[row, depth], kernel_ref[column, depth]
    return total + jnp.dot(x, kernel.T, preferred_element_type=jnp.float32)

  start = jnp.zeros((_ROWS, _TOKENS), jnp.float32)
  logit_nv = jax.lax.fori_loop(0, D // _DEPTH, add, start)
  token_1v = jax.lax.broadcasted_iota(jnp.int32, (1, _TOKENS), 1) + part * _TOKENS
  return jnp.where(token_1v < vocab_size, logit_nv, LOWEST), token_1v, row, part


def _totals_kernel(x_ref, kernel_ref, top_ref, total_ref, *, vocab_size: int) -> None:
  logit_nv, _, row, part = _logits(x_ref, kernel_ref, vocab_size)
  top_n = logit_nv.max(1)
  top_ref[part, row] = top_n
  total_ref[part, row] = jnp.exp(logit_nv - top_n[:, None]).sum(1)


def _errors_kernel(
  x_ref, kernel_ref, log_total_ref, target_ref, weight_ref, out_ref, *, vocab_size: int
) -> None:
  logit_nv, token_1v, row, part = _logits(x_ref, kernel_ref, vocab_size)
  share_nv = jnp.exp(logit_nv - log_total_ref[row][:, None])
  share_nv = jnp.where(token_1v == target_ref[row][:, None], share_nv - 1, share_nv)
  error_nv = share_nv * weight_ref[row][:, None]
  out_ref[row, pl.ds(part * _TOKENS, _TOKENS)] = error_nv.astype(out_ref.dtype)
