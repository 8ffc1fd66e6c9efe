"""Small pieces that experts, couplers and the language model share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

_NORM_EPSILON = 1e-5


def normalize(x: jax.Array) -> jax.Array:
  """Layer normalisation over the last axis without gain and bias (Ba et al. 2016); float32."""
  x = x.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + _NORM_EPSILON)


class LayerNorm(nn.Module):
  """Layer normalisation with gain and bias over the last axis; float32 in and out."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    scale_D = self.param("scale", nn.initializers.ones, (dim,))
    bias_D = self.param("bias", nn.initializers.zeros, (dim,))
    shape = (1,) * (x.ndim - 1) + (dim,)
    return normalize(x) * scale_D.reshape(shape) + bias_D.reshape(shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the rest to keep the mean (Srivastava 2014).

  The rate is rounded to a multiple of 1/256, so that one 32-bit random word serves four entries:
  drawing random words is what dropout costs. `key=None` or a rate of 0 leaves x as it is.
  """
  keep = 256 - round(256 * rate)
  if key is None or keep == 256:
    return x
  words = jax.random.bits(key, (-(-x.size // 4),), jnp.uint32)
  byte = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
  scale = jnp.asarray(256.0 / keep, x.dtype)
  return jnp.where(byte < keep, x * scale, jnp.zeros((), x.dtype))


def fan_in_normal(fan_in: int, gain: float = 1.0) -> nn.initializers.Initializer:
  """Independent normal entries of standard deviation gain / sqrt(fan_in).

  The fan is given, not read off the shape: in stacked arrays [E, D, F] Flax would count the
  experts in, and draw all of them too small.
  """
  return nn.initializers.normal(stddev=gain * fan_in**-0.5)
