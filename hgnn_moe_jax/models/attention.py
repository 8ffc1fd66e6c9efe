"""Causal self-attention of many heads: the heads of all experts at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax import device

_QUERY_BLOCKS = 4
_LEAST_BLOCKED = 64  # tokens; in shorter rows there is little to leave out


def causal_attention(q_BTGH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over earlier and equal positions, for G independent heads.

  On an NVIDIA GPU of the Ampere generation or later cuDNN's fused kernel does it, in bfloat16, for
  heads of up to 128 in steps of 8 and rows of an even length. Elsewhere the scores are made whole,
  in float32, and the division by the softmax's denominator comes after the product with v: dividing
  [T, H] entries instead of [T, T] is what makes it fast on CPU. Queries go in blocks, each of which
  meets only the keys up to its own end: 5/8 of the products and of all that follows them.

  Args:
    q_BTGH, k_BTGH, v_BTGH: [B, T, G, H], same dtype.

  Returns:
    [B, T, G, H] in the inputs' dtype.
  """
  length, head_dim = q_BTGH.shape[1], q_BTGH.shape[3]
  fits = head_dim <= 128 and head_dim % 8 == 0 and length % 2 == 0
  if fits and q_BTGH.dtype == jnp.bfloat16 and device.has_ampere_kernels():
    return jax.nn.dot_product_attention(
      q_BTGH, k_BTGH, v_BTGH, is_causal=True, implementation="cudnn"
    )
  block = -(-length // _QUERY_BLOCKS) if length >= _LEAST_BLOCKED else length
  borders = list(range(block, length, block))
  # Slices would do, but XLA adds up their gradients as whole arrays, most of them zeros.
  queries, keys, values = (
    jnp.split(jnp.swapaxes(a, 1, 2), borders, axis=2) for a in (q_BTGH, k_BTGH, v_BTGH)
  )
  mixed = []
  for i, (first, q) in enumerate(zip([0, *borders], queries, strict=True)):
    k, v = (jnp.concatenate(parts[: i + 1], axis=2) for parts in (keys, values))
    future_TS = jnp.arange(k.shape[2])[None, :] > first + jnp.arange(q.shape[2])[:, None]
    mixed.append(_attention(q, k, v, future_TS[None, None]))
  return jnp.swapaxes(jnp.concatenate(mixed, axis=2), 1, 2)


class KeyValueCache(NamedTuple):
  """Keys and values of tokens read before, in S slots; slot s holds a row's s-th token.

  Attributes:
    key_BGSH, value_BGSH: compute dtype; what lies behind the last token read is never looked at.
      Slots lie side by side as attention reads them: it would have to copy any other order whole,
      for every token.
  """

  key_BGSH: jax.Array
  value_BGSH: jax.Array


def cached_attention(
  q_BTGH: jax.Array,
  k_BTGH: jax.Array,
  v_BTGH: jax.Array,
  cache: KeyValueCache,
  position_BT: jax.Array,
) -> tuple[jax.Array, KeyValueCache]:
  """`causal_attention` of T new tokens that follow those in the cache.

  Args:
    q_BTGH, k_BTGH, v_BTGH: of the new tokens.
    cache: of their rows; its slots at `position_BT` are written.
    position_BT: int32, each new token's place in its row, all below S.

  Returns:
    ([B, T, G, H] in the inputs' dtype, the cache with the new tokens).
  """
  row_B1 = jnp.arange(position_BT.shape[0])[:, None]
  cache = KeyValueCache(
    cache.key_BGSH.at[row_B1, :, position_BT].set(k_BTGH),
    cache.value_BGSH.at[row_B1, :, position_BT].set(v_BTGH),
  )
  slot_S = jnp.arange(cache.key_BGSH.shape[2])
  hidden_BTS = slot_S[None, None, :] > position_BT[:, :, None]
  mixed_BGTH = _attention(jnp.swapaxes(q_BTGH, 1, 2), *cache, hidden_BTS[:, None])
  return jnp.swapaxes(mixed_BGTH, 1, 2), cache


def _attention(
  q_BGTH: jax.Array, k_BGSH: jax.Array, v_BGSH: jax.Array, hidden_B1TS: jax.Array
) -> jax.Array:
  """Scores made whole in float32; a query sees the keys that are not hidden from it."""
  scale = jnp.asarray(q_BGTH.shape[3] ** -0.5, q_BGTH.dtype)
  score_BGTS = jnp.einsum(
    "BGTH,BGSH->BGTS", q_BGTH * scale, k_BGSH, preferred_element_type=jnp.float32
  )
  score_BGTS = jnp.where(hidden_B1TS, -jnp.inf, score_BGTS)
  top_BGT1 = jax.lax.stop_gradient(score_BGTS.max(-1, keepdims=True))
  weight_BGTS = jnp.exp(score_BGTS - top_BGT1)
  total_BGT1 = weight_BGTS.sum(-1, keepdims=True)
  mixed_BGTH = jnp.einsum(
    "BGTS,BGSH->BGTH",
    weight_BGTS.astype(v_BGSH.dtype),
    v_BGSH,
    preferred_element_type=jnp.float32,
  )
  return (mixed_BGTH / total_BGT1).astype(q_BGTH.dtype)


def rotate(x_BTGH: jax.Array, position_BT: jax.Array) -> jax.Array:
  """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs (i, i + H/2), base 10,000.

  Args:
    x_BTGH: [B, T, G, H], H even.
    position_BT: integers, [B, T] or [1, T].
  """
  half = x_BTGH.shape[-1] // 2
  frequency_H = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BTH = position_BT.astype(jnp.float32)[:, :, None] * frequency_H[None, None, :]
  cos, sin = jnp.cos(angle_BTH)[:, :, None, :], jnp.sin(angle_BTH)[:, :, None, :]
  x32 = x_BTGH.astype(jnp.float32)
  first, second = x32[..., :half], x32[..., half:]
  turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
  return turned.astype(x_BTGH.dtype)
