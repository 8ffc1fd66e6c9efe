"""Overlap between the experts' weight matrices, role by role.

A role is a place in the block ("ffn_input", "query", ...). `roles` maps its name to `w_LEDK`: every
layer's and expert's matrix, with the model axis D second last and the other side K last; K may
differ between roles. One Gram matrix is made per role: matrices of different roles are never
compared with each other.

Chance levels matter more here than anywhere: flattened matrices of independent random experts are
orthogonal already (mean squared cosine 1 / (D K)), whatever the experts compute.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax import token_products
from hgnn_moe_jax.orthogonality import gram, subspace

FORMS = ("gram", "spectral")
Form = str | Callable[[jax.Array], jax.Array]


def gram_overlap(w_LEDK: jax.Array) -> jax.Array:
  """Squared cosine between flattened matrices, `<W_i, W_j>^2 / (|W_i|^2 |W_j|^2)`.

  Changes under a permutation of hidden units that leaves the expert's function alone; see
  `spectral_overlap` for a form that does not.

  Args:
    w_LEDK: `[..., E, D, K]`.

  Returns:
    `[..., E, E]` float32 in [0, 1]. Random: 1 / (D K) on average. Identical: 1. Orthogonal: 0.
  """
  return jnp.square(_cosines(w_LEDK))


def spectral_overlap(w_LEDK: jax.Array, rank: int) -> jax.Array:
  """Overlap of the leading left singular subspaces, `|U_i^T U_j|_F^2 / R`.

  U_e is an orthonormal basis of the span of the R leading left singular vectors of W_e: the
  directions of the residual stream that the expert mostly reads or writes. The value is the mean
  squared cosine of the principal angles. Blind to the sign, to permutations and rotations of the K
  side (`W -> W Q`) and to scale. An expert with r < R directions counts with those: the general
  form is `|U_i^T U_j|^2 / (|U_i^T U_i| |U_j^T U_j|)`, Frobenius norms. The subspace view of experts
  follows SD-MoE (arXiv 2602.12556) and O-LoRA (2310.14152); the iteration is in `subspace`.

  Args:
    w_LEDK: `[..., E, D, K]`.
    rank: R, in [1, D).

  Returns:
    `[..., E, E]` float32 in [0, 1]. Random: R / D on average, slightly more where the spectrum is
    flat (K much larger than D) and the iteration still remembers its start. Identical: 1.
    Orthogonal column spaces: 0.

  Raises:
    ValueError: rank is not in [1, D).
  """
  return _subspace_overlap(_scatter(w_LEDK), rank)


def weight_overlap(roles: Mapping[str, jax.Array], form: Form, rank: int) -> jax.Array:
  """Overlap summed over roles: one Gram matrix per role.

  Args:
    roles: role -> `w_LEDK`, `[L, E, D, K]`, K free.
    form: "gram", "spectral", or a function `w_LEDK -> [L, E, E]` of each role.
    rank: R of the spectral form, in [1, D).

  Returns:
    `[L, E, E]` float32 in [0, number of roles]. Random: `weight_overlap_chance`. Identical: the
    number of roles. Orthogonal: 0.

  Raises:
    ValueError: no roles, an unknown form, or a rank outside [1, D).
  """
  _check(roles, form)
  if form != "spectral":
    overlap = form if callable(form) else gram_overlap
    return jnp.sum(jnp.stack([overlap(w_LEDK) for w_LEDK in roles.values()]), axis=0)
  # The scatter matrices of all roles have the same shape whatever K: one iteration serves them all.
  scatter_PLEDD = jnp.stack([_scatter(w_LEDK) for w_LEDK in roles.values()])
  return jnp.sum(_subspace_overlap(scatter_PLEDD, rank), axis=0)


class WeightOverlap(NamedTuple):
  """Attributes:
  overlap_LEE: as `weight_overlap`.
  specialization_L: as `weight_specialization`.
  """

  overlap_LEE: jax.Array
  specialization_L: jax.Array


def compare(
  roles: Mapping[str, jax.Array], stored: Mapping[str, jax.Array], form: Form, rank: int
) -> WeightOverlap:
  """`weight_overlap` and `weight_specialization` of the same matrices, flattened once.

  Args:
    roles, form, rank: as in `weight_overlap`.
    stored: the same matrices, each with its two sides as they lie in memory. How an expert's matrix
      is flattened makes no difference as long as it is the same for all; to transpose them first
      would move all parameters.
  """
  _check(roles, form)
  cosines_PLEE = _cosines_by_role(stored)
  specialization_L = _specialization(cosines_PLEE)
  if form == "gram":
    return WeightOverlap(jnp.sum(jnp.square(cosines_PLEE), axis=0), specialization_L)
  return WeightOverlap(weight_overlap(roles, form, rank), specialization_L)


def weight_overlap_chance(roles: Mapping[str, jax.Array], form: str, rank: int) -> float:
  """Expected off-diagonal `weight_overlap` of independent random experts.

  Sum over roles of 1 / (D K) (gram) or min(R, K) / D (spectral). Reads shapes only.
  """
  _check(roles, form)
  shapes = [w.shape[-2:] for w in roles.values()]
  if form == "gram":
    return sum(1 / (rows * columns) for rows, columns in shapes)
  return sum(min(rank, columns) / rows for rows, columns in shapes)


def absolute_cosine(roles: Mapping[str, jax.Array]) -> jax.Array:
  """|cos| of flattened matrices, mean over roles.

  Args:
    roles: role -> `w_LEDK`, `[L, E, D, K]`, K free.

  Returns:
    `[L, E, E]` float32 in [0, 1]. Random: mean over roles of sqrt(2 / (pi D K)). Identical: 1.
    Orthogonal: 0.

  Raises:
    ValueError: no roles.
  """
  _check(roles, "gram")
  return jnp.mean(jnp.abs(_cosines_by_role(roles)), axis=0)


def weight_specialization(roles: Mapping[str, jax.Array]) -> jax.Array:
  """The seed's score, `1 - mean over pairs and roles of |cos|` of flattened matrices.

  To be reported with `weight_specialization_chance`, never alone.

  Args:
    roles: role -> `w_LEDK`, `[L, E, D, K]`, K free.

  Returns:
    `[L]` float32 in [0, 1]. Random: the chance level, 0.998 for D = K = 384. Identical: 0.
    Orthogonal: 1. One expert: 1.
  """
  _check(roles, "gram")
  return _specialization(_cosines_by_role(roles))


def weight_specialization_chance(roles: Mapping[str, jax.Array]) -> float:
  """Expected `weight_specialization` of independent random experts. Reads shapes only.

  1 - mean over roles of E|cos| for n = D K entries: sqrt(2 / (pi n)) up to a share 1 / (4 n) of it.
  """
  _check(roles, "gram")
  chances = [gram.absolute_cosine_chance(math.prod(w.shape[-2:])) for w in roles.values()]
  return 1.0 - sum(chances) / len(chances)


def _cosines(w_LEDK: jax.Array) -> jax.Array:
  return gram.normalize(token_products.matrix_gram(w_LEDK))


def _cosines_by_role(roles: Mapping[str, jax.Array]) -> jax.Array:
  products_PLEE = [token_products.matrix_gram(w_LEDK) for w_LEDK in roles.values()]
  return gram.normalize(jnp.stack(products_PLEE))


def _specialization(cosines_PLEE: jax.Array) -> jax.Array:
  return 1.0 - gram.off_diagonal_mean(jnp.mean(jnp.abs(cosines_PLEE), axis=0))


def _scatter(w_LEDK: jax.Array) -> jax.Array:
  """`W W^T` scaled to trace D; 0 for a zero matrix. `[..., E, D, D]` float32."""
  scatter_LEDD = gram.contract("...dk,...ek->...de", w_LEDK, w_LEDK)
  trace_LE = jnp.trace(scatter_LEDD, axis1=-2, axis2=-1)[..., None, None]
  # Nothing downstream depends on the scale, so no gradient needs to pass through it.
  inverse_LE = gram.inverse_norm(jax.lax.stop_gradient(trace_LE))
  return scatter_LEDD * (w_LEDK.shape[-2] * jnp.square(inverse_LE))


def _subspace_overlap(scatter_LEDD: jax.Array, rank: int) -> jax.Array:
  embed_dim = scatter_LEDD.shape[-1]
  if not 1 <= rank < embed_dim:
    raise ValueError(f"rank must be in [1, D) with D={embed_dim}, got {rank}")
  basis_LEDR = subspace.leading_subspace(scatter_LEDD, rank)
  cosines_LEERR = gram.contract("...edr,...fds->...efrs", basis_LEDR, basis_LEDR)
  return gram.normalize(jnp.sum(jnp.square(cosines_LEERR), axis=(-2, -1)))


def _check(roles: Mapping[str, jax.Array], form: Form) -> None:
  if not roles:
    raise ValueError("roles is empty: there is no matrix to compare")
  if not callable(form) and form not in FORMS:
    raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
