"""Products between the experts' vectors, token by token; each one's gradient is made of the others.

Few experts' products are written out, pair by pair. As products of matrices they would be very
small ones, E x D x E for every token, for which XLA's CPU backend moves the experts behind the
tokens and back again: that took two to three times as long. On GPUs few experts' products come
from `token_kernels`, on each device of its own tokens. Many experts are multiplied by einsum, and
on several devices all for which there are no kernels: the partitioner splits what is written out in
ways that move tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from hgnn_moe_jax import device, token_kernels
from hgnn_moe_jax.layout import each_device, on_mesh, token_axes
from hgnn_moe_jax.token_sums import repeated_anew, token_sum

SAVED = "token products"  # Their name for a policy of rematerialisation: small, and dear to make.

# Tensor cores would round float32 operands to 10 bits; these products are bound by memory.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_MOST_WRITTEN_OUT = 8


def _few(num_experts: int) -> bool:
  return num_experts <= _MOST_WRITTEN_OUT and not on_mesh()


def by_matrices(a_EBTD: jax.Array) -> bool:
  """Whether such vectors are multiplied as matrices, token by token: XLA wants tokens first."""
  return not _tokens_on_gpu(a_EBTD) and not _few(a_EBTD.shape[0])


def _tokens_on_gpu(a_EBTD: jax.Array) -> bool:
  """Whether kernels make such vectors' products."""
  E, B, T, D = a_EBTD.shape
  return token_axes(B, T) is not None and _on_gpu((1, E, B * T, D))


def _whole_on_gpu(w_GEDK: jax.Array) -> bool:
  """The same of weight matrices, of which each device of a mesh has parts."""
  return not on_mesh() and _on_gpu(w_GEDK.shape)


def _on_gpu(shape_GEND: tuple[int, ...]) -> bool:
  return token_kernels.fits(shape_GEND) and device.has_ampere_kernels()


def _by_kernel(kernel: Callable[..., jax.Array], axes: str, *operands: jax.Array) -> jax.Array:
  """A kernel of `token_kernels`, on each device of its own tokens.

  Args:
    kernel: of one group, with tokens on one axis.
    axes: of the operands and the result, as for einsum; one of them is EBTD, B and T the tokens'.
    operands: of these axes, for which `_tokens_on_gpu`.
  """
  *given, result = axes.replace("->", ",").split(",")
  vectors = given.index("EBTD")
  split_over = token_axes(*operands[vectors].shape[1:3])
  assert split_over is not None
  over = dict(zip("BT", split_over, strict=True))
  *in_specs, out_spec = [PartitionSpec(*map(over.get, names)) for names in (*given, result)]

  def own(*parts: jax.Array) -> jax.Array:
    flat = [
      jax.lax.collapse(x, names.index("B"), names.index("T") + 1) if "BT" in names else x
      for x, names in zip(parts, given, strict=True)
    ]
    (found,) = kernel(*(x[None] for x in flat))
    first = result.index("B")
    tokens = parts[vectors].shape[1:3]
    return found.reshape(*found.shape[:first], *tokens, *found.shape[first + 1 :])

  return each_device(own, tuple(in_specs), out_spec)(*operands)


@jax.custom_vjp
def mix(operator_EEBT: jax.Array, h_EBTD: jax.Array) -> jax.Array:
  """sum_j P_ij h_j, receiver by sender, summed in float32: [E, B, T, D] of the arguments' dtype."""
  if _tokens_on_gpu(h_EBTD):
    return _by_kernel(token_kernels.mix, "EEBT,EBTD->EBTD", operator_EEBT, h_EBTD)
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
  if _tokens_on_gpu(a_EBTD):
    return _by_kernel(token_kernels.products, "EBTD,EBTD->EEBT", a_EBTD, b_EBTD)
  if not _few(a_EBTD.shape[0]):
    return _einsum("iBTD,jBTD->ijBT", a_EBTD, b_EBTD, preferred_element_type=jnp.float32)
  a_END, b_END = _flat(a_EBTD), _flat(b_EBTD)
  experts = range(a_EBTD.shape[0])
  return _matrix([_dot(a_END[i], b_END[j]) for i in experts for j in experts], a_EBTD.shape)


@jax.custom_vjp
def gram(a_EBTD: jax.Array, share_BT: jax.Array) -> jax.Array:
  """<a_i - m_i, a_j - m_j>, m_i = `share_mean` of a_i: [E, E, B, T] float32, symmetric.

  Half the work of `products`. The mean is made here for the sake of the gradient, which then is
  one expression in a: with the mean's own gradient beside it, XLA makes both as soon as it can and
  keeps them, E x B x T x D each, until the rest of the network has gone backward.
  """
  mean_ED = share_mean(a_EBTD, share_BT)
  if _tokens_on_gpu(a_EBTD):
    return _by_kernel(token_kernels.gram, "EBTD,ED->EEBT", a_EBTD, mean_ED)
  centred_EBTD = _centred(a_EBTD, mean_ED)
  if not _few(a_EBTD.shape[0]):
    return products(centred_EBTD, centred_EBTD)
  centred_END = _flat(centred_EBTD)
  experts = range(a_EBTD.shape[0])
  half = {(i, j): _dot(centred_END[i], centred_END[j]) for i in experts for j in range(i + 1)}
  return _matrix([half[max(i, j), min(i, j)] for i in experts for j in experts], a_EBTD.shape)


def share_mean(a_EBTD: jax.Array, share_BT: jax.Array) -> jax.Array:
  """sum_t share(t) a_i(t): [E, D] float32; each expert's mean if the shares sum to 1."""
  if jax.default_backend() == "cpu":
    return _einsum("EBTD,BT->ED", a_EBTD.astype(jnp.float32), share_BT)
  # XLA would write a once more, in float32 and another order, to multiply it.
  return token_sum(a_EBTD.astype(jnp.float32) * share_BT[None, :, :, None], 1)


def _centred(a_EBTD: jax.Array, centre_ED: jax.Array) -> jax.Array:
  return a_EBTD.astype(jnp.float32) - centre_ED[:, None, None]


@jax.custom_vjp
def matrix_gram(w_LEDK: jax.Array) -> jax.Array:
  """<W_i, W_j> of flattened matrices: [..., E, E] float32, for w of [..., E, D, K]."""
  w_GEDK = w_LEDK.reshape(-1, *w_LEDK.shape[-3:])
  if _whole_on_gpu(w_GEDK):
    gram_GEE = token_kernels.gram(w_GEDK).sum(-1)
    return gram_GEE.reshape(*w_LEDK.shape[:-2], w_LEDK.shape[-3])
  return _einsum("...edk,...fdk->...ef", w_LEDK, w_LEDK, preferred_element_type=jnp.float32)


def _flat(a_EBTD: jax.Array) -> jax.Array:
  E, _, _, D = a_EBTD.shape
  return a_EBTD.reshape(E, -1, D)


def _dot(x_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
  return jnp.sum(x_ND.astype(jnp.float32) * y_ND.astype(jnp.float32), axis=-1)


def _matrix(pairs_N: list[jax.Array], shape_EBTD: tuple[int, ...]) -> jax.Array:
  """[E, E, B, T] of E^2 pairs' products.

  In one row first: stacked axis by axis, XLA for CPUs would give some of the experts' vectors a
  leading axis, and write these down a second time.
  """
  E, B, T, _ = shape_EBTD
  return jnp.concatenate(pairs_N).reshape(E, E, B, T)


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
  if _tokens_on_gpu(a_EBTD):
    operands = both_ways_EEBT, a_EBTD, mean_ED
    grad_EBTD = _by_kernel(token_kernels.mix, "EEBT,EBTD,ED->EBTD", *operands)
    total_ED = token_sum(grad_EBTD, 1)
  else:
    grad_EBTD = mix(both_ways_EEBT, _centred(a_EBTD, mean_ED))
    if on_mesh():
      total_ED = token_sum(grad_EBTD, 1)
    else:  # The same sum, but not from grad_EBTD, which XLA would then write down and keep.
      total_ED = _einsum("ijBT,jBTD->iD", both_ways_EEBT, a_EBTD.astype(jnp.float32))
      total_ED -= _einsum("ij,jD->iD", both_ways_EEBT.sum((2, 3)), mean_ED)
  # a's part in its mean. All layers have one share: with the total, each repeats its own.
  share_BT, total_ED = repeated_anew((share_BT, total_ED))
  grad_EBTD = grad_EBTD - share_BT[None, :, :, None] * total_ED[:, None, None]
  grad_share_BT = -_einsum("EBTD,ED->BT", a_EBTD.astype(jnp.float32), total_ED)
  return grad_EBTD.astype(a_EBTD.dtype), grad_share_BT


def _matrix_gram_backward(w_LEDK, cotangent_LEE):
  both_ways_LEE = (cotangent_LEE + jnp.swapaxes(cotangent_LEE, -1, -2)).astype(w_LEDK.dtype)
  w_GEDK = w_LEDK.reshape(-1, *w_LEDK.shape[-3:])
  if _whole_on_gpu(w_GEDK):
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
