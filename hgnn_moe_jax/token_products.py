"""Products between the experts' vectors, token by token; each one's gradient is made of the others.

Few experts' products are written out, pair by pair. As products of matrices they would be very
small ones, E x D x E for every token, for which XLA's CPU backend moves the experts behind the
tokens and back again: that took two to three times as long. Many experts, or experts on several
devices, are multiplied by einsum.
"""

import functools

import jax
import jax.numpy as jnp

# Tensor cores would round float32 operands to 10 bits; these products are bound by memory.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_MOST_WRITTEN_OUT = 8


def _few(a_EBTD: jax.Array) -> bool:
  return a_EBTD.shape[0] <= _MOST_WRITTEN_OUT and jax.sharding.get_abstract_mesh().empty


@jax.custom_vjp
def mix(operator_EEBT: jax.Array, h_EBTD: jax.Array) -> jax.Array:
  """sum_j P_ij h_j, receiver by sender: [E, B, T, D] of both arguments' dtype."""
  if not _few(h_EBTD):
    return _einsum("ijBT,jBTD->iBTD", operator_EEBT, h_EBTD)
  mixed_EBTD = operator_EEBT[:, 0, :, :, None] * h_EBTD[None, 0]
  for j in range(1, h_EBTD.shape[0]):
    mixed_EBTD += operator_EEBT[:, j, :, :, None] * h_EBTD[None, j]
  return mixed_EBTD


@jax.custom_vjp
def products(a_EBTD: jax.Array, b_EBTD: jax.Array) -> jax.Array:
  """<a_i, b_j>: [E, E, B, T] float32."""
  if not _few(a_EBTD):
    return _einsum("iBTD,jBTD->ijBT", a_EBTD, b_EBTD, preferred_element_type=jnp.float32)
  experts = range(a_EBTD.shape[0])
  return jnp.stack([jnp.stack([_dot(a_EBTD[i], b_EBTD[j]) for j in experts]) for i in experts])


@jax.custom_vjp
def gram(a_EBTD: jax.Array) -> jax.Array:
  """<a_i, a_j>: [E, E, B, T] float32, symmetric: half of `products`."""
  if not _few(a_EBTD):
    return products(a_EBTD, a_EBTD)
  experts = range(a_EBTD.shape[0])
  half = {(i, j): _dot(a_EBTD[i], a_EBTD[j]) for i in experts for j in range(i + 1)}
  return jnp.stack([jnp.stack([half[max(i, j), min(i, j)] for j in experts]) for i in experts])


def _dot(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
  return jnp.sum(x_BTD.astype(jnp.float32) * y_BTD.astype(jnp.float32), axis=-1)


def _mix_backward(residuals, cotangent_EBTD):
  operator_EEBT, h_EBTD = residuals
  by_pair_EEBT = products(cotangent_EBTD, h_EBTD).astype(operator_EEBT.dtype)
  return by_pair_EEBT, mix(jnp.swapaxes(operator_EEBT, 0, 1), cotangent_EBTD)


def _products_backward(residuals, cotangent_EEBT):
  a_EBTD, b_EBTD = residuals
  cotangent_EEBT = cotangent_EEBT.astype(a_EBTD.dtype)
  return mix(cotangent_EEBT, b_EBTD), mix(jnp.swapaxes(cotangent_EEBT, 0, 1), a_EBTD)


def _gram_backward(a_EBTD, cotangent_EEBT):
  both_ways_EEBT = cotangent_EEBT + jnp.swapaxes(cotangent_EEBT, 0, 1)
  return (mix(both_ways_EEBT.astype(a_EBTD.dtype), a_EBTD),)


mix.defvjp(lambda p, h: (mix(p, h), (p, h)), _mix_backward)
products.defvjp(lambda a, b: (products(a, b), (a, b)), _products_backward)
gram.defvjp(lambda a: (gram(a), a), _gram_backward)
