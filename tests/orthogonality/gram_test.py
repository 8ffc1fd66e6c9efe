import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.orthogonality import gram

SEEDS = st.integers(0, 2**31 - 1)
_cosine_gram = jax.jit(gram.cosine_gram)
_sum_and_gradient = jax.jit(
  jax.value_and_grad(lambda v: jnp.sum(gram.cosine_gram(v)) + jnp.sum(gram.cosine_gram(v) ** 2))
)


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["cpu", "gpu"])
def effective_experts(request, monkeypatch):
  """A device's form of it, on whatever device this is."""
  monkeypatch.setattr(jax, "default_backend", lambda: request.param)
  # A function of its own: of the same one JAX would find what it has traced for the other device.
  return jax.jit(lambda cosine_EE: gram.effective_experts(cosine_EE))


def _naive_cosines(vectors_EK):
  v = np.asarray(vectors_EK, np.float64)
  experts = range(len(v))
  return np.array(
    [[v[i] @ v[j] / np.sqrt((v[i] @ v[i]) * (v[j] @ v[j])) for j in experts] for i in experts]
  )


def test_cosine_gram_by_hand():
  # |a| = 5, |b| = 2, |c| = 13; a.b = 3*0 + 4*2 = 8 -> 8/10; a.c = 3*5 + 4*12 = 63 -> 63/65;
  # b.c = 2*12 = 24 -> 24/26
  vectors = jnp.array([[3.0, 4.0], [0.0, 2.0], [5.0, 12.0]])
  expected = [[1, 0.8, 63 / 65], [0.8, 1, 12 / 13], [63 / 65, 12 / 13, 1]]
  np.testing.assert_allclose(_cosine_gram(vectors), expected, rtol=1e-6)


def test_cosine_gram_of_identical_opposite_and_orthogonal_vectors():
  a, b = np.eye(5, dtype=np.float32)[:2]
  cosines = _cosine_gram(jnp.stack([a, 7 * a, -a, b]))
  np.testing.assert_allclose(
    cosines, [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]], atol=1e-7
  )


def test_cosine_gram_takes_leading_axes_one_by_one():
  vectors = _normal(0, 2, 3, 4, 6)
  cosines = _cosine_gram(jnp.asarray(vectors))
  assert cosines.shape == (2, 3, 4, 4)
  for i, j in np.ndindex(2, 3):
    np.testing.assert_allclose(cosines[i, j], _naive_cosines(vectors[i, j]), atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(-10, 10))
def test_cosine_gram_is_blind_to_scale_and_follows_permutations(seed, exponent):
  vectors = _normal(seed, 4, 6)
  scales = np.exp(exponent * np.linspace(-1, 1, 4, dtype=np.float32))[:, None]
  cosines = np.asarray(_cosine_gram(jnp.asarray(vectors)))
  np.testing.assert_allclose(_cosine_gram(jnp.asarray(vectors * scales)), cosines, atol=2e-6)
  assert np.all(np.abs(cosines) <= 1 + 1e-6)
  order = np.random.default_rng(seed).permutation(4)
  permuted = _cosine_gram(jnp.asarray(vectors[order]))
  np.testing.assert_allclose(permuted, cosines[np.ix_(order, order)], atol=1e-6)


def test_a_zero_vector_has_cosine_zero_and_finite_gradients():
  vectors = jnp.asarray(_normal(1, 3, 4)).at[1].set(0.0)
  cosines = _cosine_gram(vectors)
  np.testing.assert_array_equal(cosines[1], [0, 0, 0])
  np.testing.assert_allclose(cosines[0, 0], 1, rtol=1e-6)
  for value in (vectors, jnp.zeros((3, 4))):
    _, gradient = _sum_and_gradient(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("scale", [1e-17, 1.1e-12, 1e-11])
def test_gradients_are_finite_on_both_sides_of_the_silence_threshold(scale):
  vectors = jnp.asarray(_normal(1, 3, 4)).at[1].multiply(scale)
  _, gradient = _sum_and_gradient(vectors)
  assert np.all(np.isfinite(gradient))


def test_bfloat16_is_accumulated_in_float32():
  # A bfloat16 sum of 4096 ones stops at 256.
  cosines = _cosine_gram(jnp.ones((2, 4096), jnp.bfloat16))
  assert cosines.dtype == jnp.float32
  np.testing.assert_allclose(cosines, np.ones((2, 2)), rtol=1e-6)


def test_off_diagonal_mean_by_hand():
  # (1 + 2 + 3 + 4 + 5 + 6) / 6 = 3.5; the second: (10 + 60) over two halves of it
  matrices = jnp.array([[[9.0, 1, 2], [3, 9, 4], [5, 6, 9]], [[0.0, 10, 0], [0, 0, 0], [0, 60, 0]]])
  np.testing.assert_allclose(gram.off_diagonal_mean(matrices), [3.5, 70 / 6], rtol=1e-6)


def test_off_diagonal_mean_never_reads_the_diagonal():
  matrix = jnp.array([[jnp.nan, 1.0], [3.0, jnp.inf]])
  assert gram.off_diagonal_mean(matrix) == 2.0


def test_off_diagonal_mean_of_one_expert_is_zero():
  value, gradient = jax.value_and_grad(gram.off_diagonal_mean)(jnp.full((1, 1), 5.0))
  assert value == 0.0
  np.testing.assert_array_equal(gradient, [[0.0]])


def test_off_diagonal_mean_refuses_what_is_not_square():
  with pytest.raises(ValueError, match=r"matrix_EE .* \(2, 3\)"):
    gram.off_diagonal_mean(jnp.zeros((2, 3)))


def test_absolute_cosine_chance_in_closed_form():
  # Gamma(1/2)/Gamma(1) = sqrt(pi) -> 1; Gamma(1)/Gamma(3/2) = 2/sqrt(pi) -> 2/pi;
  # Gamma(3/2)/Gamma(2) = sqrt(pi)/2 -> 1/2
  assert gram.absolute_cosine_chance(1) == pytest.approx(1.0)
  assert gram.absolute_cosine_chance(2) == pytest.approx(2 / math.pi)
  assert gram.absolute_cosine_chance(3) == pytest.approx(0.5)
  n = 384 * 384
  assert gram.absolute_cosine_chance(n) == pytest.approx(math.sqrt(2 / (math.pi * n)), rel=1e-5)
  with pytest.raises(ValueError, match="entries must be at least 1, got 0"):
    gram.absolute_cosine_chance(0)


@pytest.mark.parametrize("entries", [2, 5, 40])
def test_absolute_cosine_chance_by_simulation(entries):
  pairs = jnp.asarray(_normal(entries, 40_000, 2, entries))
  measured = np.abs(_cosine_gram(pairs)[:, 0, 1])
  error = measured.std() / math.sqrt(len(measured))
  assert abs(measured.mean() - gram.absolute_cosine_chance(entries)) < 4 * error


def test_effective_experts_of_known_spectra(effective_experts):
  pair = np.kron(np.eye(2), np.ones((2, 2)))  # two identical pairs: eigenvalues 2, 2, 0, 0
  half = np.array([[1.0, 0.5], [0.5, 1.0]])  # 1.5 and 0.5 -> p = 3/4, 1/4
  half_entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  silent = np.diag([1.0, 1.0, 0.0])  # one of three silent
  for matrix, expected in [
    (np.eye(4), 4),
    (np.ones((4, 4)), 1),
    (np.array([[1.0, -1.0], [-1.0, 1.0]]), 1),
    (pair, 2),
    (half, math.exp(half_entropy)),
    (silent, 2),
    (np.zeros((3, 3)), 1),
    (np.eye(1), 1),
  ]:
    value = effective_experts(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("experts", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["random", "clones", "pairs", "few dimensions", "far apart"])
def test_effective_experts_of_many_spectra(effective_experts, experts, kind):
  random = np.random.default_rng(experts)
  vectors = random.standard_normal((5000, experts, 3 if kind == "few dimensions" else 16))
  if kind == "clones":  # of the first one, from nearly perfect ones to none
    vectors = vectors[:, :1] + 10 ** random.uniform(-6, 1, (5000, 1, 1)) * vectors
  elif kind == "pairs":
    vectors[:, 1] = vectors[:, 0] - 10 ** random.uniform(-5, 0, (5000, 1)) * vectors[:, 1]
  elif kind == "far apart":
    vectors = np.eye(experts, 16) + 10 ** random.uniform(-6, 0, (5000, 1, 1)) * vectors
  cosines = np.asarray(_cosine_gram(jnp.asarray(vectors, jnp.float32)))
  shares = np.linalg.eigvalsh(cosines.astype(np.float64)) / experts
  shares = np.where(shares > 1e-6, shares, 1.0)
  expected = np.exp(-np.sum(shares * np.log(shares), axis=-1))
  value = np.asarray(effective_experts(cosines))
  np.testing.assert_allclose(value, expected, atol=1e-4)
  assert np.all((value >= 1 - 1e-5) & (value <= experts + 1e-5))


def test_a_gpu_has_few_experts_spectra_from_no_library(monkeypatch):
  """Beside a loss, too, whose gradient is taken: a library's call would cut a CUDA graph."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

  def loss(vectors):
    cosines = gram.cosine_gram(vectors)
    return cosines.sum(), gram.effective_experts(cosines)

  compiled = {
    experts: jax.jit(jax.grad(loss, has_aux=True)).lower(_normal(0, experts, 8)).compile().as_text()
    for experts in (4, 5)
  }
  assert "syevd" in compiled[5] and "custom-call" not in compiled[4]


@pytest.mark.parametrize("matrix", [np.eye(3), np.ones((3, 3)), np.zeros((3, 3))])
def test_effective_experts_has_finite_gradients_at_degenerate_spectra(effective_experts, matrix):
  gradient = jax.grad(effective_experts)(jnp.asarray(matrix, jnp.float32))
  assert np.all(np.isfinite(gradient))


def test_effective_experts_gradient_agrees_with_finite_differences(effective_experts):
  matrix = _naive_cosines(_normal(3, 4, 6))
  direction = _normal(4, 4, 4).astype(np.float64)
  direction = direction + direction.T

  def naive(m):
    p = np.linalg.eigvalsh(m) / np.trace(m)
    return np.exp(-np.sum(p * np.log(p)))

  expected = (naive(matrix + 1e-5 * direction) - naive(matrix - 1e-5 * direction)) / 2e-5
  gradient = jax.grad(effective_experts)(jnp.asarray(matrix, jnp.float32))
  np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3)
