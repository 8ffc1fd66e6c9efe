"""Products between the experts' vectors, token by token; each one's gradient is made of the others.

Few experts' products are written out, pair by pair. As products of matrices they would be very
small ones, E x D x E for every token, for which XLA's CPU backend moves the experts behind the
tokens and back again: that took two to three times as long. On one GPU few experts' products come
from `token_kernels`. Many experts are multiplied by einsum. On several devices all are: the
partitioner splits what is written out in ways that move tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hgnn_moe_jax import device, token_kernels
from hgnn_moe_jax.layout import on_mesh
from hgnn_moe_jax.token_sums import token_sum

SAVED = "token products"  # Their name for a policy of rematerialisation: small, and dear to make.

# Tensor cores would round float32 operands to 10 bits; these products are bound by memory.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_MOST_WRITTEN_OUT = 8


def _few(num_experts: int) -> bool:
  return num_experts <= _MOST_WRITTEN_OUT and not on_mesh()


def _on_gpu(shape_GEND: tuple[int, ...]) -> bool:
  return not on_mesh() and token_kernels.fits(shape_GEND) and device.has_ampere_kernels()


def _rows(a: jax.Array) -> jax.Array:
  """[..., B, T, D] -> [1, ..., N, D], the kernels' order."""
  return a.reshape(1, *a.shape[:-3], -1, a.shape[-1])


@jax.custom_vjp
def mix(operator_EEBT: jax.Array, h_EBTD: jax.Array) -> jax.Array:
  """sum_j P_ij h_j, receiver by sender, summed in float32: [E, B, T, D] of the arguments' dtype."""
  if _on_gpu(_rows(h_EBTD).shape):
    operator_GEEN = operator_EEBT.reshape(1, *operator_EEBT.shape[:2], -1)
    return token_kernels.mix(operator_GEEN, _rows(h_EBTD)).reshape(h_EBTD.shape)
  if not _few(h_EBTD.shape[0]):
    return _einsum("ijBT,jBTD->iBTD", operator_EEBT, h_EBTD)
  weight_EEBT, sender_EBTD = operator_EEBT.astype(jnp.float32), h_EBTD.astype(jnp.float32)
  mixed_EBTD = weight_EEBT[:, 0, :, :, None] * sender_EBTD[None, 0]
  for j in range(1, h_EBTD.shape[0]):
    mixed_EBTD += weight_EEBT[:, j, :, :, None] * sender_EBTD[None, j]
  return mixed_EBTD.astype(h_EBTD.dtype)


@jax.custom_vjp
def products(a_EBTD: jax.Array, b_EBTD: jax.Array) -> jax.Array:
  """<a_i, b_j>: [E, E, B, T] float32."""
  if _on_gpu(_rows(a_EBTD).shape):
    return _by_token(token_kernels.products(_rows(a_EBTD), _rows(b_EBTD)), a_EBTD)
  if not _few(a_EBTD.shape[0]):
    return _einsum("iBTD,jBTD->ijBT", a_EBTD, b_EBTD, preferred_element_type=jnp.float32)
  experts = range(a_EBTD.shape[0])
  return jnp.stack([jnp.stack([_dot(a_EBTD[i], b_EBTD[j]) for j in experts]) for i in experts])


@jax.custom_vjp
def gram(a_EBTD: jax.Array, share_BT: jax.Array) -> jax.Array:
  """<a_i - m_i, a_j - m_j>, m_i = `share_mean` of a_i: [E, E, B, T] float32, symmetric.

  Half the work of `products`. The mean is made here for the sake of the gradient, which then is
  one expression in a: with the mean's own gradient beside it, XLA makes both as soon as it can and
  keeps them, E x B x T x D each, until the rest of the network has gone backward.
  """
  mean_ED = share_mean(a_EBTD, share_BT)
  if _on_gpu(_rows(a_EBTD).shape):
    return _by_token(token_kernels.gram(_rows(a_EBTD), mean_ED[None]), a_EBTD)
  centred_EBTD = _centred(a_EBTD, mean_ED)
  if not _few(a_EBTD.shape[0]):
    return products(centred_EBTD, centred_EBTD)
  experts = range(a_EBTD.shape[0])
  half = {(i, j): _dot(centred_EBTD[i], centred_EBTD[j]) for i in experts for j in range(i + 1)}
  return jnp.stack([jnp.stack([half[max(i, j), min(i, j)] for j in experts]) for i in experts])


def share_mean(a_EBTD: jax.Array, share_BT: jax.Array) -> jax.Array:
  """sum_t share(t) a_i(t): [E, D] float32; each expert's mean if the shares sum to 1."""
  if jax.default_backend() == "cpu":
    return _einsum("EBTD,BT->ED", a_EBTD.astype(jnp.float32), share_BT)
  # XLA would write a once more, in float32 and another order, to multiply it.
  return token_sum(a_EBTD.astype(jnp.float32) * share_BT[None, :, :, None], 1)


def _centred(a_EBTD: jax.Array, centre_ED: jax.Array) -> jax.Array:
  return a_EBTD.astype(jnp.float32) - centre_ED[:, None, None]


def _by_token(products_GEEN: jax.Array, a_EBTD: jax.Array) -> jax.Array:
  return products_GEEN.reshape(*products_GEEN.shape[1:3], *a_EBTD.shape[1:3])


@jax.custom_vjp
def matrix_gram(w_LEDK: jax.Array) -> jax.Array:
  """<W_i, W_j> of flattened matrices: [..., E, E] float32, for w of [..., E, D, K]."""
  w_GEDK = w_LEDK.reshape(-1, *w_LEDK.shape[-3:])
  if _on_gpu(w_GEDK.shape):
    gram_GEE = token_kernels.gram(w_GEDK).sum(-1)
    return gram_GEE.reshape(*w_LEDK.shape[:-2], w_LEDK.shape[-3])
  return _einsum("...edk,...fdk->...ef", w_LEDK, w_LEDK, preferred_element_type=jnp.float32)


def _dot(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
  return jnp.sum(x_BTD.astype(jnp.float32) * y_BTD.astype(jnp.float32), axis=-1)


def _kept(products: jax.Array) -> jax.Array:
  return checkpoint_name(products, SAVED)


def _mix_backward(residuals, cotangent_EBTD):
  operator_EEBT, h_EBTD = residuals
  by_pair_EEBT = products(cotangent_EBTD, h_EBTD).astype(operator_EEBT.dtype)
  return by_pair_EEBT, mix(jnp.swapaxes(operator_EEBT, 0, 1), cotangent_EBTD)


def _products_backward(residuals, cotangent_EEBT):
  a_EBTD, b_EBTD = residuals
  cotangent_EEBT = cotangent_EEBT.astype(a_EBTD.dtype)
  return mix(cotangent_EEBT, b_EBTD), mix(jnp.swapaxes(cotangent_EEBT, 0, 1), a_EBTD)


def _gram_backward(residuals, cotangent_EEBT):
  a_EBTD, share_BT = residuals
  mean_ED = share_mean(a_EBTD, share_BT)
  both_ways_EEBT = cotangent_EEBT + jnp.swapaxes(cotangent_EEBT, 0, 1)
  if _on_gpu(_rows(a_EBTD).shape):
    both_ways_GEEN = both_ways_EEBT.reshape(1, *both_ways_EEBT.shape[:2], -1)
    grad_GEND = token_kernels.mix(both_ways_GEEN, _rows(a_EBTD), mean_ED[None])
    grad_EBTD = grad_GEND.reshape(a_EBTD.shape)
    total_ED = token_sum(grad_EBTD, 1)
  else:
    grad_EBTD = mix(both_ways_EEBT, _centred(a_EBTD, mean_ED))
    if on_mesh():
      total_ED = token_sum(grad_EBTD, 1)
    else:  # The same sum, but not from grad_EBTD, which XLA would then write down and keep.
      total_ED = _einsum("ijBT,jBTD->iD", both_ways_EEBT, a_EBTD.astype(jnp.float32))
      total_ED -= _einsum("ij,jD->iD", both_ways_EEBT.sum((2, 3)), mean_ED)
  # a's part in its mean.
  grad_EBTD = grad_EBTD - share_BT[None, :, :, None] * total_ED[:, None, None]
  grad_share_BT = -_einsum("EBTD,ED->BT", a_EBTD.astype(jnp.float32), total_ED)
  return grad_EBTD.astype(a_EBTD.dtype), grad_share_BT


def _matrix_gram_backward(w_LEDK, cotangent_LEE):
  both_ways_LEE = (cotangent_LEE + jnp.swapaxes(cotangent_LEE, -1, -2)).astype(w_LEDK.dtype)
  w_GEDK = w_LEDK.reshape(-1, *w_LEDK.shape[-3:])
  if _on_gpu(w_GEDK.shape):
    both_ways_GEE1 = both_ways_LEE.reshape(-1, *both_ways_LEE.shape[-2:], 1)
    every_row_GEED = jnp.broadcast_to(both_ways_GEE1, (*both_ways_GEE1.shape[:3], w_LEDK.shape[-2]))
    return (token_kernels.mix(every_row_GEED, w_GEDK).reshape(w_LEDK.shape),)
  E = w_LEDK.shape[-3]
  if not _few(E):
    return (_einsum("...ef,...fdk->...edk", both_ways_LEE, w_LEDK),)
  # Written out it becomes part of the optimizer's update, and no array of its own.
  senders = [both_ways_LEE[..., j, None, None] * w_LEDK[..., j : j + 1, :, :] for j in range(E)]
  return (functools.reduce(jnp.add, senders),)


mix.defvjp(lambda p, h: (mix(p, h), (p, h)), _mix_backward)
products.defvjp(lambda a, b: (_kept(products(a, b)), (a, b)), _products_backward)
gram.defvjp(lambda a, share: (_kept(gram(a, share)), (a, share)), _gram_backward)
matrix_gram.defvjp(lambda w: (matrix_gram(w), w), _matrix_gram_backward)
