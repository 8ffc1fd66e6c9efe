"""Small pieces that experts, couplers and the language model share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hgnn_moe_jax.layout import on_mesh
from hgnn_moe_jax.token_sums import on_tokens, repeated_anew

_NORM_EPSILON = 1e-5


def normalize(x: jax.Array) -> jax.Array:
  """Layer normalisation over the last axis without gain and bias (Ba et al. 2016); float32.

  The backward pass keeps the result, which the product that comes next keeps anyway.
  """
  return _normalize(_tokens_flat(x)).reshape(x.shape)


def _tokens_flat(x: jax.Array) -> jax.Array:
  """[..., B, T, D] -> [..., B T, D], the axes that `project` and its like multiply, on CPU.

  What is multiplied there and kept in all its axes XLA would write down twice.
  """
  if jax.default_backend() != "cpu" or on_mesh() or x.ndim < 3:
    return x
  return jax.lax.collapse(x, x.ndim - 3, x.ndim - 1)


@jax.custom_vjp
def _normalize(x: jax.Array) -> jax.Array:
  return _normalize_forward(x)[0]


def _normalize_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  centred = x.astype(jnp.float32)
  centred = centred - centred.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _NORM_EPSILON)
  normal = centred * inverse
  # The zero tells the gradient's dtype: what is kept has to be arrays.
  return normal, (normal, inverse, jnp.zeros((), x.dtype))


def _normalize_backward(kept: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array]:
  normal, inverse, like = kept
  inverse = repeated_anew(inverse)
  along = (grad * normal).mean(-1, keepdims=True)
  grad_x = inverse * (grad - grad.mean(-1, keepdims=True) - normal * along)
  return (grad_x.astype(like.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
  """Layer normalisation with gain and bias over the last axis; float32 in and out."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    scale_D = self.param("scale", named(nn.initializers.ones, "embed"), (dim,))
    bias_D = self.param("bias", named(nn.initializers.zeros, "embed"), (dim,))
    # See `repeated_anew`; a checkpoint does that to all it is given.
    affine = jax.checkpoint(_affine) if jax.default_backend() == "cpu" else _affine
    return affine(_normalize(_tokens_flat(x)), scale_D, bias_D).reshape(x.shape)


def _affine(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
  tokens = x.shape[:-1]
  return x * on_tokens(scale_D, tokens) + on_tokens(bias_D, tokens)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the rest to keep the mean (Srivastava 2014).

  The rate is rounded to a multiple of 1/256, so that one 32-bit random word serves four entries:
  drawing random words is what dropout costs. `key=None` or a rate of 0 leaves x as it is.
  """
  keep = 256 - round(256 * rate)
  if key is None or keep == 256:
    return x
  *leading, last = x.shape
  words = jax.random.bits(key, (*leading, -(-last // 4)), jnp.uint32)
  byte = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :last]
  scale = jnp.asarray(256.0 / keep, x.dtype)
  return jnp.where(byte < keep, x * scale, jnp.zeros((), x.dtype))


class Named(nn.Partitioned):
  """A new parameter with the names of its axes; who lays it out over devices reads them."""

  def unbox(self, apply_constraint: bool = True) -> Any:
    # Flax would take the names for those of the mesh's axes.
    del apply_constraint
    return self.value


def named(initializer: nn.initializers.Initializer, *axes: str | None) -> Any:
  """The initializer of a parameter whose axes have these names, see `sharding`.

  Every axis has one; None is never split over devices.
  """
  return lambda *args: Named(initializer(*args), names=axes)


def fan_in_normal(fan_in: int, gain: float = 1.0) -> nn.initializers.Initializer:
  """Independent normal entries of standard deviation gain / sqrt(fan_in).

  The fan is given, not read off the shape: in stacked arrays [E, D, F] Flax would count the
  experts in, and draw all of them too small.
  """
  return nn.initializers.normal(stddev=gain * fan_in**-0.5)


def project(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
  """x [..., D] times kernel [D, F] in x's dtype -> [..., F].

  Tokens are flattened to one axis: with several, XLA's CPU backend copies and transposes the
  operands of the kernel's gradient, which took twice the time of the product itself. On a mesh
  they are not: axes that are each split over devices cannot be merged without moving their data.
  """
  if on_mesh():
    return jnp.einsum("...D,DF->...F", x, kernel_DF.astype(x.dtype))
  flat_ND = x.reshape(-1, x.shape[-1])
  return (flat_ND @ kernel_DF.astype(x.dtype)).reshape(*x.shape[:-1], kernel_DF.shape[-1])


def project_all(x_BTD: jax.Array, kernel: jax.Array) -> jax.Array:
  """x_BTD times a kernel [D, ...] of several output axes -> [B, T, ...]. See `project`."""
  if on_mesh():
    return jnp.tensordot(x_BTD, kernel.astype(x_BTD.dtype), 1)
  flat_BTX = project(x_BTD, kernel.reshape(kernel.shape[0], -1))
  return flat_BTX.reshape(*x_BTD.shape[:2], *kernel.shape[1:])


def add_to_all(x: jax.Array, vector: jax.Array) -> jax.Array:
  """x [B, T, ...] of `project_all` and the same vector [...] at every token, in x's dtype.

  On CPU in the product's own two axes: the gradient is then one array for kernel and vector. With
  all axes XLA wrote it down once for each.
  """
  B, T = x.shape[:2]
  if jax.default_backend() != "cpu" or on_mesh():
    return x + on_tokens(vector, (B, T), 0, x.dtype)
  flat = x.reshape(B * T, -1) + on_tokens(vector.reshape(-1), (B * T,), 0, x.dtype)
  return flat.reshape(x.shape)


def project_each(x_EBTD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
  """Each expert's own product: x_EBTD, kernel_EDF -> [E, B, T, F] in x's dtype. See `project`."""
  if on_mesh():
    return jnp.einsum("EBTD,EDF->EBTF", x_EBTD, kernel_EDF.astype(x_EBTD.dtype))
  E, B, T, D = x_EBTD.shape
  flat_END = x_EBTD.reshape(E, B * T, D)
  product = jnp.einsum("END,EDF->ENF", flat_END, kernel_EDF.astype(x_EBTD.dtype))
  return product.reshape(E, B, T, kernel_EDF.shape[-1])


def gelu(x: jax.Array) -> jax.Array:
  """GELU by tanh (Hendrycks and Gimpel 2016), of which the backward pass keeps x only."""
  if jax.default_backend() == "cpu":
    return jax.checkpoint(jax.nn.gelu)(x)
  return _gelu_of_accelerator(x)


_GELU = (8 / jnp.pi) ** 0.5, 0.044715


@jax.custom_vjp
def _gelu_of_accelerator(x: jax.Array) -> jax.Array:
  """Written as x / (1 + exp(-2 u)), which takes fewer instructions than a tanh."""
  x32, (c, a) = x.astype(jnp.float32), _GELU
  return (x32 / (1 + jnp.exp(-c * (x32 + a * x32**3)))).astype(x.dtype)


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
  """With the same function written as x sigmoid(2 u).

  So nothing dear is common to both passes: XLA would keep it for the backward pass, and reading it
  takes longer than computing it.
  """
  x32, (c, a) = x.astype(jnp.float32), _GELU
  gate = jax.nn.sigmoid(c * (x32 + a * x32**3))
  slope = gate + x32 * gate * (1 - gate) * c * (1 + 3 * a * x32**2)
  grad_x = (grad.astype(jnp.float32) * slope).astype(x.dtype)
  # For the sum over tokens that comes next XLA would write it down in float32.
  return (jax.lax.optimization_barrier(grad_x),)


_gelu_of_accelerator.defvjp(lambda x: (_gelu_of_accelerator(x), x), _gelu_backward)


def scores(h_EBTD: jax.Array, kernel_DX: jax.Array) -> jax.Array:
  """A few numbers per token, h kernel: [X, E, B, T] float32.

  On a GPU not as a product of matrices: with two columns or one that takes longer than reading h
  where it is made. And column by column: of all at once XLA makes a sum over a transposed copy of
  h, in float32.
  """
  if jax.default_backend() == "cpu":
    score_EBTX = jnp.einsum(
      "EBTD,DX->EBTX",
      h_EBTD,
      kernel_DX.astype(h_EBTD.dtype),
      preferred_element_type=jnp.float32,
    )
    return jnp.moveaxis(score_EBTX, -1, 0)
  h_EBTD = h_EBTD.astype(jnp.float32)
  kernels = [on_tokens(kernel_DX[:, x], h_EBTD.shape[:-1]) for x in range(kernel_DX.shape[1])]
  return jnp.stack([jnp.sum(h_EBTD * kernel_EBTD, axis=-1) for kernel_EBTD in kernels])


def spread(x_BTD: jax.Array, num_experts: int) -> jax.Array:
  """The same x for every expert, [E, B, T, D]; its gradient is a sum over experts.

  On CPU written as a product with ones, as is `expert_mean`: XLA reduces a leading axis there 20
  times slower than it multiplies (20 ms and 1 ms for 4 x 262,144 entries). On a GPU a product would
  round x to ten bits, and cannot be fused with what comes next; on a mesh the axes that the product
  merges may each be split.
  """
  if jax.default_backend() != "cpu" or on_mesh():
    return jnp.broadcast_to(x_BTD[None], (num_experts, *x_BTD.shape))
  ones_E1 = jnp.ones((num_experts, 1), x_BTD.dtype)
  return (ones_E1 @ x_BTD.reshape(1, -1)).reshape(num_experts, *x_BTD.shape)


def expert_mean(y_EBTD: jax.Array) -> jax.Array:
  """Mean over experts, [B, T, D], float32. See `spread`."""
  if jax.default_backend() != "cpu" or on_mesh():
    return y_EBTD.astype(jnp.float32).mean(0)
  # In float32: 1 / 3 in bfloat16 is off by 0.2 %.
  share_1E = jnp.full((1, y_EBTD.shape[0]), 1 / y_EBTD.shape[0], jnp.float32)
  flat_EX = y_EBTD.reshape(y_EBTD.shape[0], -1).astype(jnp.float32)
  return (share_1E @ flat_EX).reshape(y_EBTD.shape[1:])
