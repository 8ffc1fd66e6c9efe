"""Pairwise cosines between experts, and what a matrix of them says.

Every function takes any number of leading axes, accumulates in float32 whatever it is given, and
has finite values and gradients for silent (all-zero) experts: their cosine with anything, also with
themselves, is 0.
"""

import functools
import math

import jax
import jax.numpy as jnp

# A vector whose squared norm is no larger counts as zero. At 1e-24 the derivative of the inverse
# norm, squared_norm^(-3/2) = 1e36, is still a finite float32.
_SILENT = 1e-24
# Eigenvalues of a float32 correlation matrix below this share of its trace are rounding.
_EIGENVALUE_FLOOR = 1e-6
_MOST_ROTATED = 4  # Written out, more experts' rotations take XLA long to compile: 5 take 6 s.

# Tensor cores would round float32 operands to 10 bits; the products here are small or memory-bound.
contract = functools.partial(
  jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def inverse_norm(squared_norm: jax.Array) -> jax.Array:
  """`squared_norm ** -0.5` elementwise, with value and gradient 0 where the norm is 0.

  The argument is replaced before the root as well as after it: a single `where` around an infinite
  derivative gives NaN, because 0 * inf = NaN in the backward pass.
  """
  alive = squared_norm > _SILENT
  return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, squared_norm, 1.0)), 0.0)


def normalize(products_EE: jax.Array) -> jax.Array:
  """Divides inner products by the norms on their diagonal: `p_ij / sqrt(p_ii p_jj)`.

  Args:
    products_EE: positive semidefinite `[..., E, E]`, float32.

  Returns:
    Cosines `[..., E, E]` in [-1, 1] up to rounding; the diagonal is 1, or 0 for a zero expert.
  """
  inverse_E = inverse_norm(jnp.diagonal(products_EE, axis1=-2, axis2=-1))
  return products_EE * inverse_E[..., :, None] * inverse_E[..., None, :]


def cosine_gram(vectors_EK: jax.Array) -> jax.Array:
  """Cosines between experts: `<v_i, v_j> / (|v_i| |v_j|)`.

  Args:
    vectors_EK: `[..., E, K]`, experts second last, their K entries last.

  Returns:
    `[..., E, E]` float32 in [-1, 1]. Random: mean 0, mean square 1/K. Identical: 1. Orthogonal: 0.
  """
  return normalize(contract("...ek,...fk->...ef", vectors_EK, vectors_EK))


def off_diagonal_mean(matrix_EE: jax.Array) -> jax.Array:
  """Mean over the E (E - 1) ordered pairs of different experts.

  Args:
    matrix_EE: `[..., E, E]`.

  Returns:
    `[...]` float32; exactly 0 for one expert, who has nobody to be compared with.
  """
  experts = matrix_EE.shape[-1]
  if matrix_EE.shape[-2] != experts:
    raise ValueError(f"matrix_EE must be square in its last two axes, got {matrix_EE.shape}")
  diagonal_EE = jnp.broadcast_to(jnp.eye(experts, dtype=bool), matrix_EE.shape)
  others_EE = jnp.where(diagonal_EE, 0.0, matrix_EE.astype(jnp.float32))
  return jnp.sum(others_EE, axis=(-2, -1)) / max(experts * (experts - 1), 1)


def absolute_cosine_chance(entries: int) -> float:
  """Expected |cos| of two independent isotropic vectors with so many entries.

  `Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2))`, which is sqrt(2 / (pi n)) (1 + 1/(4n) + ...): the first
  coordinate of a uniform point on the sphere has density proportional to (1 - c^2)^((n-3)/2).
  Exact for all n >= 1: n = 1 gives 1 (cos is -1 or 1), n = 2 gives 2/pi, n = 3 gives 1/2.
  """
  if entries < 1:
    raise ValueError(f"entries must be at least 1, got {entries}")
  return math.exp(math.lgamma(entries / 2) - math.lgamma((entries + 1) / 2)) / math.sqrt(math.pi)


def effective_experts(cosine_EE: jax.Array) -> jax.Array:
  """How many different experts there are: exp of the entropy of the spectrum.

  `exp(-sum_k p_k log p_k)` with p the eigenvalues of `cosine_EE` divided by its trace. (Roy and
  Vetterli 2007, "The effective rank", applied to the experts' correlation matrix.)

  Args:
    cosine_EE: `[..., E, E]` signed cosines, positive semidefinite: one Gram matrix of unit vectors
      or a mean of such. A mean over tokens asks whether experts are the same *function*: two whose
      cosine is +1 on half of the tokens and -1 on the other half count as two.

  Returns:
    `[...]` in [1, E]. Random or orthogonal: E. Identical (or opposite): 1. Silent experts are not
    counted; 1 where all are silent.
  """
  if cosine_EE.shape[-1] <= _MOST_ROTATED and jax.default_backend() != "cpu":
    return _effective_by_rotations(cosine_EE)
  return _effective_by_library(cosine_EE)


def _effective_by_library(cosine_EE: jax.Array) -> jax.Array:
  trace = jnp.trace(cosine_EE, axis1=-2, axis2=-1)
  return jnp.exp(jnp.sum(_surprise(jnp.linalg.eigvalsh(cosine_EE), trace[..., None]), axis=-1))


@jax.custom_jvp
def _effective_by_rotations(cosine_EE: jax.Array) -> jax.Array:
  """`effective_experts` as one kernel: a library's call would cut a step's CUDA graph in two."""
  eigenvalues = _rotated(cosine_EE)
  trace = functools.reduce(jnp.add, eigenvalues)
  return jnp.exp(sum(_surprise(eigenvalue, trace) for eigenvalue in eigenvalues))


@_effective_by_rotations.defjvp
def _effective_by_rotations_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  _, tangent = jax.jvp(_effective_by_library, primals, tangents)
  return _effective_by_rotations(*primals), tangent


def _rotated(matrix_EE: jax.Array) -> list[jax.Array]:
  """Eigenvalues of symmetric `[..., E, E]`, E of `[...]`, in no order: Jacobi's method, by rows.

  Golub and Van Loan, Matrix Computations, section 8.5. Elementwise only, so that it becomes one
  kernel. Convergence is quadratic: E sweeps leave no more than rounding for E up to 4.
  """
  experts = matrix_EE.shape[-1]
  a = {(i, j): matrix_EE[..., i, j] for i in range(experts) for j in range(i, experts)}
  pairs = [pair for pair in a if pair[0] != pair[1]]
  for p, q in pairs * experts:
    # The smaller of the two angles whose rotation makes a_pq zero.
    gap, twice = a[q, q] - a[p, p], 2.0 * a[p, q]
    length = jnp.abs(gap) + jnp.sqrt(gap * gap + twice * twice)
    tangent = jnp.where(gap < 0.0, -twice, twice) / jnp.where(length > 0.0, length, 1.0)
    cosine = jax.lax.rsqrt(1.0 + tangent * tangent)
    sine = tangent * cosine
    shift = tangent * a[p, q]
    a[p, p], a[q, q], a[p, q] = a[p, p] - shift, a[q, q] + shift, jnp.zeros_like(shift)
    for k in (k for k in range(experts) if k not in (p, q)):
      kp, kq = (min(k, p), max(k, p)), (min(k, q), max(k, q))
      a[kp], a[kq] = cosine * a[kp] - sine * a[kq], sine * a[kp] + cosine * a[kq]
  return [a[k, k] for k in range(experts)]


def _surprise(eigenvalue: jax.Array, trace: jax.Array) -> jax.Array:
  """-p log p of its share p of the trace."""
  share = eigenvalue / jnp.where(trace > 0.0, trace, 1.0)
  counted = share > _EIGENVALUE_FLOOR
  # p log p has an infinite derivative at 0, hence the inner `where`.
  return jnp.where(counted, -share * jnp.log(jnp.where(counted, share, 1.0)), 0.0)
