"""Causal self-attention of many heads: the heads of all experts at once."""

import jax
import jax.numpy as jnp


def causal_attention(q_BTGH: jax.Array, k_BTGH: jax.Array, v_BTGH: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v over earlier and equal positions, for G independent heads.

  On a GPU in bfloat16 cuDNN's fused kernel does it. Elsewhere the scores are made whole, in
  float32, and the division by the softmax's denominator comes after the product with v: dividing
  [T, H] entries instead of [T, T] is what makes it fast on CPU.

  Args:
    q_BTGH, k_BTGH, v_BTGH: [B, T, G, H], same dtype.

  Returns:
    [B, T, G, H] in the inputs' dtype.
  """
  if jax.default_backend() == "gpu" and q_BTGH.dtype == jnp.bfloat16:
    return jax.nn.dot_product_attention(
      q_BTGH, k_BTGH, v_BTGH, is_causal=True, implementation="cudnn"
    )
  length, head_dim = q_BTGH.shape[1], q_BTGH.shape[3]
  scale = jnp.asarray(head_dim**-0.5, q_BTGH.dtype)
  q_BGTH, k_BGTH, v_BGTH = (jnp.swapaxes(a, 1, 2) for a in (q_BTGH * scale, k_BTGH, v_BTGH))
  score_BGTS = jnp.einsum("BGTH,BGSH->BGTS", q_BGTH, k_BGTH, preferred_element_type=jnp.float32)
  future_TS = jnp.arange(length)[None, :] > jnp.arange(length)[:, None]
  score_BGTS = jnp.where(future_TS[None, None], -jnp.inf, score_BGTS)
  top_BGT1 = jax.lax.stop_gradient(score_BGTS.max(-1, keepdims=True))
  weight_BGTS = jnp.exp(score_BGTS - top_BGT1)
  total_BGT1 = weight_BGTS.sum(-1, keepdims=True)
  mixed_BGTH = jnp.einsum(
    "BGTS,BGSH->BGTH",
    weight_BGTS.astype(v_BGTH.dtype),
    v_BGTH,
    preferred_element_type=jnp.float32,
  )
  return jnp.swapaxes(mixed_BGTH / total_BGT1, 1, 2).astype(q_BTGH.dtype)


def rotate(x_BTGH: jax.Array, position_T: jax.Array) -> jax.Array:
  """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs (i, i + H/2), base 10,000.

  Args:
    x_BTGH: [B, T, G, H], H even.
    position_T: [T] integers.
  """
  half = x_BTGH.shape[-1] // 2
  frequency_H = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_TH = position_T.astype(jnp.float32)[:, None] * frequency_H[None, :]
  cos = jnp.cos(angle_TH)[None, :, None, :]
  sin = jnp.sin(angle_TH)[None, :, None, :]
  x32 = x_BTGH.astype(jnp.float32)
  first, second = x32[..., :half], x32[..., half:]
  turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
  return turned.astype(x_BTGH.dtype)
