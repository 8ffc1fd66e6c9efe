"""Causal attention of short rows on NVIDIA GPUs, in Pallas: a row's scores fit on one processor.

A program takes one head of one row, whose T x T scores exist nowhere else, so that nothing but
queries, keys and values is kept for the backward pass. They are read where the projection left
them, and their gradients are written in that order; kernels for long rows want three arrays, which
are copied out of it and back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from hgnn_moe_jax.layout import each_device, shards

SAVED = "attention"  # Its result's name for a policy of rematerialisation.

_LENGTHS = (16, 32, 64, 128)  # tokens of a row: powers of two, of which the scores fit
_HEAD_DIMS = (16, 32, 64)

# How a mesh splits queries, keys and values, their biases, a row's part in the biases' gradients,
# and mixtures.
_QKV = PartitionSpec("data", None, "expert", None, "model", None)
_BIAS = PartitionSpec("expert", None, "model", None)
_BIAS_BY_ROW = PartitionSpec("data", *_BIAS)
_MIXED = PartitionSpec("expert", "data", None, "model", None)


def fits(qkv_BTESNH: jax.Array) -> bool:
  """Whether the kernels take rows and heads of these sizes.

  On a mesh each device has whole rows and heads; `config_rules` sees to experts and heads.
  """
  B, T, _, _, _, H = qkv_BTESNH.shape
  sizes = T in _LENGTHS and H in _HEAD_DIMS and B % shards("data") == 0
  return sizes and qkv_BTESNH.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def causal_attention(
  qkv_BTESNH: jax.Array, bias_ESNH: jax.Array, interpret: bool = False
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over earlier and equal positions, for each of E experts' N heads.

  Args:
    qkv_BTESNH: bfloat16 of sizes that `fits`, S = 3: queries, keys and values without their biases.
    bias_ESNH: float32, added here; so is its gradient.
    interpret: run on any device, slowly.

  Returns:
    [E, B, T, N, H], bfloat16; scores and sums are float32.
  """

  def own(qkv_BTESNH, bias_ESNH):
    B, T, E, _, N, H = qkv_BTESNH.shape
    out_shape = jax.ShapeDtypeStruct((E, B, T, N, H), qkv_BTESNH.dtype)
    call = _call(_forward_kernel, qkv_BTESNH.shape, out_shape, 4, interpret)
    return call(qkv_BTESNH, bias_ESNH)

  return each_device(own, (_QKV, _BIAS), _MIXED)(qkv_BTESNH, bias_ESNH)


def _forward(qkv_BTESNH: jax.Array, bias_ESNH: jax.Array, interpret: bool) -> tuple[Any, Any]:
  mixed_EBTNH = checkpoint_name(causal_attention(qkv_BTESNH, bias_ESNH, interpret), SAVED)
  return mixed_EBTNH, (qkv_BTESNH, bias_ESNH)


def _backward(
  interpret: bool, given: tuple[jax.Array, jax.Array], cotangent_EBTNH: jax.Array
) -> tuple[jax.Array, jax.Array]:
  def own(qkv_BTESNH, bias_ESNH, cotangent_EBTNH):
    shape, dtype = qkv_BTESNH.shape, qkv_BTESNH.dtype
    grad, by_row = (shape, dtype), ((shape[0], *shape[2:]), jnp.float32)
    out_shape = tuple(jax.ShapeDtypeStruct(*out) for out in (grad, by_row))
    call = _call(_backward_kernel, shape, out_shape, 8, interpret)
    return call(qkv_BTESNH, bias_ESNH, cotangent_EBTNH)

  by_device = each_device(own, (_QKV, _BIAS, _MIXED), (_QKV, _BIAS_BY_ROW))
  grad_BTESNH, grad_BESNH = by_device(*given, cotangent_EBTNH)
  return grad_BTESNH, grad_BESNH.sum(0)


causal_attention.defvjp(_forward, _backward)


def _call(
  kernel: Callable[..., None], shape: tuple[int, ...], out_shape: Any, warps: int, interpret: bool
) -> Callable[..., Any]:
  B, _, E, _, N, _ = shape
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid=(B * E * N,),
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
  )


def _place(qkv_ref: Any) -> tuple[Any, Any, Any]:
  """Row, expert and head of this program."""
  _, _, E, _, N, _ = qkv_ref.shape
  number = pl.program_id(0)
  return number // (E * N), number // N % E, number % N


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _weights(q_TH: jax.Array, k_TH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """exp(score - the query's largest score), and its sums over keys; float32."""
  T, H = q_TH.shape
  score_TT = _dot(q_TH, k_TH.T) * H**-0.5
  query_TT = jax.lax.broadcasted_iota(jnp.int32, (T, T), 0)
  key_TT = jax.lax.broadcasted_iota(jnp.int32, (T, T), 1)
  score_TT = jnp.where(key_TT <= query_TT, score_TT, -jnp.inf)
  weight_TT = jnp.exp(score_TT - score_TT.max(1)[:, None])
  return weight_TT, weight_TT.sum(1)


def _queries_keys_values(
  qkv_ref: Any, bias_ref: Any, place: tuple[Any, Any, Any]
) -> tuple[jax.Array, ...]:
  b, e, n = place

  def one(s: int) -> jax.Array:
    biased_TH = qkv_ref[b, :, e, s, n, :].astype(jnp.float32) + bias_ref[e, s, n, :][None, :]
    return biased_TH.astype(qkv_ref.dtype)

  return one(0), one(1), one(2)


def _forward_kernel(qkv_ref: Any, bias_ref: Any, out_ref: Any) -> None:
  b, e, n = _place(qkv_ref)
  q_TH, k_TH, v_TH = _queries_keys_values(qkv_ref, bias_ref, (b, e, n))
  weight_TT, total_T = _weights(q_TH, k_TH)
  mixed_TH = _dot(weight_TT.astype(v_TH.dtype), v_TH) / total_T[:, None]
  out_ref[e, b, :, n, :] = mixed_TH.astype(out_ref.dtype)


def _backward_kernel(
  qkv_ref: Any, bias_ref: Any, cotangent_ref: Any, grad_ref: Any, grad_bias_ref: Any
) -> None:
  b, e, n = _place(qkv_ref)
  q_TH, k_TH, v_TH = _queries_keys_values(qkv_ref, bias_ref, (b, e, n))
  out_TH = cotangent_ref[e, b, :, n, :]
  weight_TT, total_T = _weights(q_TH, k_TH)
  weight_TT = weight_TT / total_T[:, None]
  grad_TT = _dot(out_TH, v_TH.T)
  grad_TT = weight_TT * (grad_TT - (weight_TT * grad_TT).sum(1)[:, None])
  grad_TT = (grad_TT * q_TH.shape[1] ** -0.5).astype(q_TH.dtype)
  grads = (
    _dot(grad_TT, k_TH),
    _dot(grad_TT.T, q_TH),
    _dot(weight_TT.astype(out_TH.dtype).T, out_TH),
  )
  for s, grad_TH in enumerate(grads):
    grad_ref[b, :, e, s, n, :] = grad_TH.astype(grad_ref.dtype)
    grad_bias_ref[b, e, s, n, :] = grad_TH.sum(0)
