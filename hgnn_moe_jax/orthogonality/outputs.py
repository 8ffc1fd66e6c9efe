"""Overlap between what the experts do to the same tokens.

An expert's update is its block's output minus the block's input: the residual stream, which all
experts share, would make any two outputs look alike. Each expert's mean update over the valid
tokens is removed (centring over tokens, per expert). Removing a token's mean over experts instead
would force the cosines of random experts to -1 / (E - 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax import token_products
from hgnn_moe_jax.orthogonality import gram

FORMS = ("cosine", "covariance")
Form = str | Callable[[jax.Array, jax.Array], jax.Array]
# An expert whose updates are smaller than this share of the mean scale is pushed to grow.
_SCALE_MARGIN = 0.5
# Enough for three digits of a mean |cos|.
_MOST_TOKENS = 4096


class UpdateOverlap(NamedTuple):
  """Comparisons of E experts on one batch; inside a scan over layers each has a leading L.

  Attributes:
    overlap_EE: the chosen form, float32 in [0, 1]; identical 1, orthogonal 0. "cosine": mean over
      valid tokens of cos^2, random 1 / D. "covariance": `|C_ij|^2 / (|C_ii| |C_jj|)`, Frobenius
      norms, C_ij the cross-covariance; random about D / (n + D) for n valid tokens.
    absolute_cosine_EE: mean over valid tokens of |cos|, in [0, 1]; random about sqrt(2 / (pi D)).
    cosine_EE: mean over valid tokens of cos, in [-1, 1], positive semidefinite; random 0.
    scale_E: root mean square over valid tokens of the norm of the centred update.
  """

  overlap_EE: jax.Array
  absolute_cosine_EE: jax.Array
  cosine_EE: jax.Array
  scale_E: jax.Array


def update_overlap(
  updates_EBTD: jax.Array, weights_BT: jax.Array, form: Form = "cosine"
) -> UpdateOverlap:
  """Compares the experts' token-centred updates, all but the scale independent of scale.

  "cosine" is the penalty of arXiv 2602.14159 on updates, E^2 D multiplications per token.
  "covariance" is the RV coefficient, that is linear CKA (Kornblith et al. 2019, arXiv 1905.00414,
  section 3): also blind to a rotation of one expert's update space, E^2 D^2 per token. Nothing of
  shape E x E x tokens x D is made. A token whose update is zero has cosine 0.

  Args:
    updates_EBTD: block output minus block input, `[E, B, T, D]`.
    weights_BT: 1 for valid tokens, 0 for padding, `[B, T]`; other values are not meant.
    form: what `overlap_EE` holds: "cosine", "covariance", or a function of the centred updates
      `[E, B, T, D]` and of shares `[B, T]`, which sum to 1 and are 0 for padding.

  Returns:
    `UpdateOverlap`, float32. All zero if no token is valid.

  Raises:
    ValueError: an unknown form, or shapes that do not fit.
  """
  _check(form)
  if updates_EBTD.ndim != 4 or updates_EBTD.shape[1:3] != weights_BT.shape:
    raise ValueError(
      "updates_EBTD and weights_BT must be [E, B, T, D] and [B, T], got "
      f"{updates_EBTD.shape} and {weights_BT.shape}"
    )
  weights_BT = weights_BT.astype(jnp.float32)
  shares_BT = weights_BT / jnp.maximum(jnp.sum(weights_BT), 1.0)
  # Masked tokens stay in: every sum over tokens below is weighted, with 0 for them.
  products_EEBT = token_products.gram(updates_EBTD, shares_BT)
  squared_norm_EBT = jnp.einsum("eebt->ebt", products_EEBT)
  inverse_EBT = gram.inverse_norm(squared_norm_EBT)
  cosine_EEBT = products_EEBT * inverse_EBT[:, None] * inverse_EBT[None]
  squared_scale_E = gram.contract("ebt,bt->e", squared_norm_EBT, shares_BT)

  def token_mean(values_EEBT: jax.Array) -> jax.Array:
    if token_products.by_matrices(updates_EBTD):
      # As a product XLA would write these numbers down, one for each pair and token.
      return jnp.sum(values_EEBT * shares_BT[None, None], axis=(2, 3))
    return gram.contract("efbt,bt->ef", values_EEBT, shares_BT)

  if form == "cosine":
    overlap_EE = token_mean(jnp.square(cosine_EEBT))
  else:
    mean_ED = token_products.share_mean(updates_EBTD, shares_BT)
    centred_EBTD = updates_EBTD.astype(jnp.float32) - mean_ED[:, None, None, :]
    if callable(form):
      overlap_EE = form(centred_EBTD, shares_BT)
    else:
      overlap_EE = _covariance_overlap(centred_EBTD, shares_BT, squared_scale_E)
  return UpdateOverlap(
    overlap_EE=overlap_EE,
    absolute_cosine_EE=token_mean(jnp.abs(cosine_EEBT)),
    cosine_EE=token_mean(cosine_EEBT),
    # sqrt with a finite derivative at 0
    scale_E=squared_scale_E * gram.inverse_norm(squared_scale_E),
  )


def other_tokens_cosine(
  updates_EBTD: jax.Array, weights_BT: jax.Array, key: jax.Array
) -> jax.Array:
  """`absolute_cosine_EE` as it would be if no two experts had seen the same token: a second null.

  Each expert's centred updates are dealt out anew, so that those compared belong to different
  tokens, drawn at random. What is left are directions that the experts share whatever the token:
  trained updates keep to a few of the D, and overlap by that alone. Experts that see the same
  tokens and have nothing else in common have this as their `absolute_cosine_EE`; where their
  directions are independent, too, it is `gram.absolute_cosine_chance(D)`.

  Args:
    updates_EBTD, weights_BT: as in `update_overlap`, with more tokens than experts.
    key: of the draw, of 4,096 tokens at most.

  Returns:
    `[E, E]` float32 in [0, 1]; the diagonal is 1, or 0 for a silent expert. All zero if no token is
    valid.
  """
  E, B, T, D = updates_EBTD.shape
  weights_N = weights_BT.reshape(B * T).astype(jnp.float32)
  mean_ED = token_products.share_mean(
    updates_EBTD, (weights_N / jnp.maximum(weights_N.sum(), 1.0)).reshape(B, T)
  )
  # Expert e has the token that is e places on in one random order: no two meet the same.
  order_N = jax.random.permutation(key, B * T)
  place_EM = jnp.arange(E)[:, None] + jnp.arange(min(B * T, _MOST_TOKENS))[None]
  token_EM = order_N[place_EM % (B * T)]
  dealt_EMD = jnp.take_along_axis(
    updates_EBTD.reshape(E, B * T, D), token_EM[:, :, None], axis=1
  ).astype(jnp.float32)
  centred_EMD = dealt_EMD - mean_ED[:, None]
  norm_EM = gram.contract("emd,emd->em", centred_EMD, centred_EMD)
  valid_EM = weights_N[token_EM]  # A pair with padding in it has cosine 0, and is not counted.
  unit_EMD = centred_EMD * (gram.inverse_norm(norm_EM) * valid_EM)[:, :, None]
  cosine_EEM = gram.contract("emd,fmd->efm", unit_EMD, unit_EMD)
  pairs_EE = gram.contract("em,fm->ef", valid_EM, valid_EM)
  return jnp.sum(jnp.abs(cosine_EEM), axis=-1) / jnp.maximum(pairs_EE, 1.0)


def output_penalty(overlap_LEE: jax.Array, scale_LE: jax.Array, form: Form) -> jax.Array:
  """The scalar per layer that training adds to its loss.

  "cosine": mean over pairs of the overlap. "covariance": the same plus the variance guard
  `mean_e relu(1 - scale_e / (gamma m))^2`, gamma = 0.5, m the mean scale of the layer's experts
  with its gradient stopped: VICReg's hinge (Bardes et al. 2022, arXiv 2105.04906, equation 1) in
  units of the experts' own scale. A covariance is dominated by an expert's largest updates; with
  the guard an expert cannot settle it by falling silent.

  Args:
    overlap_LEE: `[..., E, E]`, of the same form.
    scale_LE: `[..., E]`; only the covariance form reads it.
    form: as in `update_overlap`; a function's penalty is the mean over pairs of its overlap.

  Returns:
    `[...]` float32, scale-invariant, in [0, 1] (cosine) or [0, 2] (covariance). Random: 1 / D or
    about D / (n + D). Identical: 1. Orthogonal and of similar scale: 0. One expert: 0.

  Raises:
    ValueError: an unknown form.
  """
  _check(form)
  mean_overlap_L = gram.off_diagonal_mean(overlap_LEE)
  if form != "covariance":
    return mean_overlap_L
  mean_scale_L = jax.lax.stop_gradient(jnp.mean(scale_LE, axis=-1, keepdims=True))
  active = mean_scale_L > 0.0
  relative_LE = scale_LE / (_SCALE_MARGIN * jnp.where(active, mean_scale_L, 1.0))
  guard_LE = jnp.where(active, jnp.square(jax.nn.relu(1.0 - relative_LE)), 0.0)
  return mean_overlap_L + jnp.mean(guard_LE, axis=-1)


def output_specialization(absolute_cosine_LEE: jax.Array) -> jax.Array:
  """`1 - mean over pairs of |cos|` of the experts' updates to the same tokens.

  Args:
    absolute_cosine_LEE: `[..., E, E]`.

  Returns:
    `[...]` float32 in [0, 1]. Random: `output_specialization_chance`. Identical: 0. Orthogonal: 1.
    One expert: 1.
  """
  return 1.0 - gram.off_diagonal_mean(absolute_cosine_LEE)


def output_specialization_chance(embed_dim: int) -> float:
  """Expected `output_specialization` of independent isotropic updates in D dimensions."""
  return 1.0 - gram.absolute_cosine_chance(embed_dim)


def output_overlap_chance(embed_dim: int, num_tokens: int, form: str) -> float:
  """Expected off-diagonal `overlap_EE` of independent isotropic updates.

  "cosine": 1 / D exactly. "covariance": D / (n + D) for n = `num_tokens` valid tokens, since with n
  - 1 degrees of freedom E|C_ij|^2 = D^2 (n - 1) and E|C_ii|^2 = D (n - 1) (n + D) for unit normals.
  """
  _check(form)
  return 1 / embed_dim if form == "cosine" else embed_dim / (num_tokens + embed_dim)


def _covariance_overlap(
  centred_EBTD: jax.Array, shares_BT: jax.Array, squared_scale_E: jax.Array
) -> jax.Array:
  # Fourth powers of the updates follow; at unit scale they stay inside float32's range. The overlap
  # does not depend on the scale, so no gradient needs to pass through it.
  inverse_E = gram.inverse_norm(jax.lax.stop_gradient(squared_scale_E))
  unit_EBTD = centred_EBTD * inverse_E[:, None, None, None]
  weighted_EBTD = unit_EBTD * shares_BT[None, :, :, None]
  covariance_EEDD = gram.contract("ebtd,fbtg->efdg", weighted_EBTD, unit_EBTD)
  return gram.normalize(jnp.sum(jnp.square(covariance_EEDD), axis=(-2, -1)))


def _check(form: Form) -> None:
  if not callable(form) and form not in FORMS:
    raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
