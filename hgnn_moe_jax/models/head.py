"""The output head's cross-entropy, chunk by chunk: the logits of a batch never exist whole."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax import device
from hgnn_moe_jax.models import head_kernels

# Entries of one chunk's logits. On CPU a chunk should stay near the cache; on an accelerator it
# should fill the device. Few rows would rewrite the kernel's gradient too often.
_CHUNK_ENTRIES = {"cpu": 2**21}
_CHUNK_ENTRIES_ACCELERATOR = 2**28
_LEAST_ROWS = 256
_ROW_MULTIPLE = 128  # as `head_kernels.fits` wants them
# Tensor cores want rows of logits to begin at multiples of 16 bytes: with GPT-2's 50,257 tokens the
# products took 2.4 times as long.
_ALIGNMENT = {"cpu": 1}
_ALIGNMENT_ACCELERATOR = 128


def chunk_rows(num_rows: int, vocab_size: int) -> int:
  """Rows per chunk: all of them if they fit, else equal parts, up to multiples of 128.

  A part has at most a power of two of rows, of at least 256: the last part is filled up, so parts
  of that size, whatever the number of rows, would compute up to twice of what is wanted.
  """
  entries = _CHUNK_ENTRIES.get(jax.default_backend(), _CHUNK_ENTRIES_ACCELERATOR)
  most = max(_LEAST_ROWS, 2 ** (entries // vocab_size).bit_length() // 2)
  if num_rows <= most:
    return num_rows
  each = -(-num_rows // -(-num_rows // most))
  return -(-each // _ROW_MULTIPLE) * _ROW_MULTIPLE


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_cross_entropy(
  x_ND: jax.Array,
  kernel_DV: jax.Array,
  target_N: jax.Array,
  weight_N: jax.Array,
  rows: int,
  dtype: jnp.dtype,
) -> jax.Array:
  """sum_n weight_n * -log softmax(x_n kernel)[target_n], in nats; float32 scalar.

  Gradients are exact and come out of the same pass over the chunks that computes the loss (they
  are known but for one scalar factor), so nothing of size N x V is kept or computed twice.

  Args:
    x_ND: [N, D] float32; on a mesh one device's rows, see `LanguageModel.loss`.
    kernel_DV: [D, V] float32.
    target_N: [N] int32 in [0, V).
    weight_N: [N] float32.
    rows: rows per chunk, see `chunk_rows`.
    dtype: of the matrix products' operands; they accumulate in float32.
  """
  chunks = _chunks(x_ND, target_N, weight_N, rows)
  vocab_size, kernel_DV = kernel_DV.shape[1], _aligned(kernel_DV.astype(dtype))

  def body(total, chunk):
    nll_n, _ = _nll_and_error(chunk, kernel_DV, vocab_size)
    return total + jnp.sum(chunk.weight_n * nll_n), None

  return jax.lax.scan(body, jnp.zeros(()), chunks)[0]


class _Chunk(NamedTuple):
  x_nD: jax.Array
  target_n: jax.Array
  weight_n: jax.Array


def _chunks(x_ND: jax.Array, target_N: jax.Array, weight_N: jax.Array, rows: int) -> _Chunk:
  """The rows in stacks of `rows`, the last one filled up with rows of weight 0."""
  padding = -x_ND.shape[0] % rows
  return _Chunk(
    jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, rows, x_ND.shape[1]),
    jnp.pad(target_N, (0, padding)).reshape(-1, rows),
    jnp.pad(weight_N, (0, padding)).reshape(-1, rows),
  )


def _aligned(kernel_DV: jax.Array) -> jax.Array:
  """The kernel with columns for tokens that do not exist."""
  multiple = _ALIGNMENT.get(jax.default_backend(), _ALIGNMENT_ACCELERATOR)
  return jnp.pad(kernel_DV, ((0, 0), (0, -kernel_DV.shape[1] % multiple)))


def _nll_and_error(
  chunk: _Chunk, kernel_DV: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
  """nll_n, and its gradient by the logits, weight_n (softmax - onehot), in the kernel's dtype."""
  x_nD = chunk.x_nD.astype(kernel_DV.dtype)
  kernel_VD = kernel_DV.T
  if device.has_hopper_kernels() and head_kernels.fits(x_nD, kernel_VD):
    log_total_n = head_kernels.log_totals(x_nD, kernel_VD, vocab_size)
    chosen_nD = kernel_VD[chunk.target_n].astype(jnp.float32)
    chosen_n = jnp.sum(x_nD.astype(jnp.float32) * chosen_nD, 1)
    error_nV = head_kernels.errors(
      x_nD, kernel_VD, vocab_size, log_total_n, chunk.target_n, chunk.weight_n
    )
    return log_total_n - chosen_n, error_nV
  logit_nV = jnp.matmul(x_nD, kernel_DV, preferred_element_type=jnp.float32)
  if kernel_DV.shape[1] > vocab_size:
    exists_V = jnp.arange(kernel_DV.shape[1]) < vocab_size
    logit_nV = jnp.where(exists_V[None, :], logit_nV, head_kernels.LOWEST)
  chosen_n = jnp.take_along_axis(logit_nV, chunk.target_n[:, None], axis=-1)[:, 0]
  if jax.default_backend() == "cpu":
    top_n = logit_nV.max(-1)
    exp_nV = jnp.exp(logit_nV - top_n[:, None])
    total_n = exp_nV.sum(-1)
  else:
    top_n, total_n = _top_and_total(logit_nV)
    exp_nV = jnp.exp(logit_nV - top_n[:, None])
  hit_nV = jnp.arange(kernel_DV.shape[1])[None, :] == chunk.target_n[:, None]
  error_nV = exp_nV * (chunk.weight_n / total_n)[:, None]
  error_nV = jnp.where(hit_nV, error_nV - chunk.weight_n[:, None], error_nV)
  return jnp.log(total_n) + top_n - chosen_n, error_nV.astype(kernel_DV.dtype)


def _top_and_total(logit_nV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest logit, and the sum of exponentials relative to it, in one pass over the logits.

  Milakov and Gimelshein 2018, arXiv 1805.02867, theorem 1: partial sums are rescaled whenever two
  parts with different maxima meet.
  """

  def join(one: Any, other: Any) -> Any:
    top = jnp.maximum(one[0], other[0])
    return top, one[1] * jnp.exp(one[0] - top) + other[1] * jnp.exp(other[0] - top)

  start = (jnp.float32(head_kernels.LOWEST), jnp.float32(0))
  return jax.lax.reduce((logit_nV, jnp.ones_like(logit_nV)), start, join, (1,))


def _forward(x_ND, kernel_DV, target_N, weight_N, rows, dtype):
  vocab_size, kernel = kernel_DV.shape[1], _aligned(kernel_DV.astype(dtype))

  def body(carry, xs):
    total, grad_DV = carry
    chunk, x_Dn = xs
    nll_n, error_nV = _nll_and_error(chunk, kernel, vocab_size)
    grad_nD = jnp.matmul(error_nV, kernel.T, preferred_element_type=jnp.float32)
    grad_DV = grad_DV + jnp.matmul(x_Dn, error_nV, preferred_element_type=jnp.float32)
    return (total + jnp.sum(chunk.weight_n * nll_n), grad_DV), (grad_nD, nll_n)

  start = (jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32))
  chunks = _chunks(x_ND, target_N, weight_N, rows)
  # Transposed before the loop: XLA's CPU backend multiplies by a transposed operand half as fast.
  x_Dn = jnp.swapaxes(chunks.x_nD, 1, 2).astype(dtype)
  (total, grad_DV), (grad_x, nll) = jax.lax.scan(body, start, (chunks, x_Dn))
  num_rows = x_ND.shape[0]
  grad_ND = grad_x.reshape(-1, x_ND.shape[1])[:num_rows]
  return total, (grad_ND, grad_DV[:, :vocab_size], nll.reshape(-1)[:num_rows])


def _backward(rows, dtype, residuals, cotangent):
  del rows, dtype
  grad_ND, grad_DV, nll_N = residuals
  return cotangent * grad_ND, cotangent * grad_DV, None, cotangent * nll_N


linear_cross_entropy.defvjp(_forward, _backward)
