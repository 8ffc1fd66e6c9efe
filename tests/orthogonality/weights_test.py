import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.orthogonality import gram, subspace, weights

SEEDS = st.integers(0, 2**31 - 1)
RANK = 3
OVERLAPS = {
  "gram": jax.jit(weights.gram_overlap),
  "spectral": jax.jit(lambda w: weights.spectral_overlap(w, RANK)),
}
_spectral_overlap = jax.jit(weights.spectral_overlap, static_argnums=1)
_weight_overlap = jax.jit(weights.weight_overlap, static_argnums=(1, 2))
_picked_and_gradient = jax.jit(
  jax.value_and_grad(
    lambda w, pick, form, rank: jnp.sum(pick * weights.weight_overlap({"w": w}, form, rank))
  ),
  static_argnums=(2, 3),
)
_PAIRS = (1 - np.eye(3, dtype=np.float32))[None] / 6  # the mean over pairs of three experts


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _orthogonal(seed, size):
  return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def _naive_gram(w_EDK):
  flat = np.asarray(w_EDK, np.float64).reshape(len(w_EDK), -1)
  unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  return (unit @ unit.T) ** 2


def _overlap_of_bases(bases):
  overlaps = [[np.sum((u.T @ v) ** 2) / u.shape[1] for v in bases] for u in bases]
  return np.array(overlaps)


def _svd_overlap(w_EDK, rank):
  return _overlap_of_bases([np.linalg.svd(w)[0][:, :rank] for w in np.asarray(w_EDK, np.float64)])


def _naive_iteration_overlap(w_EDK, rank):
  """The same number of steps with numpy's QR: spans, and so overlaps, must agree."""
  start = np.random.default_rng(0).standard_normal((w_EDK.shape[1], rank)).astype(np.float32)
  bases = []
  for w in np.asarray(w_EDK, np.float64):
    basis = start.astype(np.float64)
    for _ in range(subspace.NUM_STEPS):
      basis = np.linalg.qr(w @ (w.T @ basis))[0]
    bases.append(basis)
  return _overlap_of_bases(bases)


def _with_spectrum(seed, singular_values, columns):
  """Matrices of 4 experts with these singular values; neighbours' left vectors are related."""
  rows, experts = len(singular_values), []
  left = _orthogonal(seed, rows)
  for e in range(4):
    left = np.linalg.qr(left + 0.1 * _orthogonal(seed + 2 * e + 1, rows) * math.sqrt(rows))[0]
    right = _orthogonal(seed + 2 * e + 2, columns)[:, :rows]
    experts.append((left * singular_values) @ right.T)
  return np.stack(experts)


def test_gram_overlap_by_hand():
  # flattened (3,4,0,0), (0,4,3,0), (0,0,0,1): cos = 16/25, 0, 0
  w = jnp.array([[[3.0, 4], [0, 0]], [[0, 4], [3, 0]], [[0, 0], [0, 1]]])
  np.testing.assert_allclose(
    weights.gram_overlap(w), [[1, 0.4096, 0], [0.4096, 1, 0], [0, 0, 1]], rtol=1e-6
  )


def test_spectral_overlap_by_hand():
  # Columns span {e0, e1}, {e0, e2}, {e2, e3}: shared directions of two: 1, 0, 1 -> 1/2, 0, 1/2
  e = np.eye(5, dtype=np.float32)
  w = np.stack([np.stack([3 * e[a], -2 * e[b]], 1) for a, b in [(0, 1), (0, 2), (2, 3)]])
  overlap = _spectral_overlap(jnp.asarray(w), 2)
  np.testing.assert_allclose(overlap, [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]], atol=1e-5)


def test_spectral_overlap_of_a_known_angle():
  # Rank 1, directions 60 degrees apart: cos^2 = 1/4, although the K sides are orthogonal and the
  # flattened matrices, too.
  u, v = np.array([1, 0, 0]), np.array([0.5, math.sqrt(0.75), 0])
  w = jnp.asarray(np.stack([np.outer(u, [1, 0]), np.outer(v, [0, 1])]), jnp.float32)
  np.testing.assert_allclose(_spectral_overlap(w, 1)[0, 1], 0.25, atol=1e-5)
  np.testing.assert_allclose(weights.gram_overlap(w)[0, 1], 0.0, atol=1e-7)


@pytest.mark.parametrize("form", OVERLAPS)
def test_identical_experts_overlap_fully_and_orthogonal_ones_not_at_all(form):
  same = _normal(0, 12, 7)
  np.testing.assert_allclose(
    OVERLAPS[form](jnp.asarray(np.stack([same] * 3))), np.ones((3, 3)), atol=1e-5
  )
  basis = _orthogonal(1, 12)
  apart = np.stack([basis[:, 3 * e : 3 * e + 3] @ _normal(e, 3, 7) for e in range(4)])
  np.testing.assert_allclose(OVERLAPS[form](jnp.asarray(apart, jnp.float32)), np.eye(4), atol=1e-4)


def test_gram_overlap_agrees_with_the_naive_twin_in_value_and_gradient():
  w, direction = _normal(2, 3, 12, 8), _normal(3, 3, 12, 8).astype(np.float64)
  np.testing.assert_allclose(OVERLAPS["gram"](jnp.asarray(w)), _naive_gram(w), atol=1e-6)
  pick = _normal(4, 3, 3)
  _, gradient = _picked_and_gradient(jnp.asarray(w)[None], pick[None], "gram", RANK)
  ends = [np.sum(pick * _naive_gram(w + h * direction)) for h in (1e-5, -1e-5)]
  np.testing.assert_allclose(np.sum(gradient[0] * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


def test_spectral_overlap_agrees_with_the_naive_twin_in_value_and_gradient():
  w, direction = _normal(2, 3, 12, 8), _normal(3, 3, 12, 8).astype(np.float64)
  expected = _naive_iteration_overlap(w, RANK)
  np.testing.assert_allclose(OVERLAPS["spectral"](jnp.asarray(w)), expected, atol=2e-5)
  pick = np.triu(_normal(4, 3, 3), 1)
  _, gradient = _picked_and_gradient(jnp.asarray(w)[None], pick[None], "spectral", RANK)
  ends = [np.sum(pick * _naive_iteration_overlap(w + h * direction, RANK)) for h in (1e-5, -1e-5)]
  expected = (ends[0] - ends[1]) / 2e-5
  assert abs(expected) > 0.01  # else the comparison says nothing
  np.testing.assert_allclose(np.sum(gradient[0] * direction), expected, rtol=2e-3)


@pytest.mark.parametrize("top", [3.0, 30.0, 100.0])
def test_spectral_overlap_agrees_with_svd_where_there_is_a_gap(top):
  rank = 6
  spectrum = np.concatenate([np.geomspace(top, 1.5, rank), np.linspace(1, 0.1, 42)])
  w = _with_spectrum(0, spectrum, 96)
  expected = _svd_overlap(w, rank)
  assert expected[0, 1] > 2 * rank / 48  # something to find above chance
  overlap = _spectral_overlap(jnp.asarray(w, jnp.float32), rank)
  np.testing.assert_allclose(overlap, expected, atol=1e-3)


@pytest.mark.parametrize("columns", [64, 256])
def test_spectral_overlap_of_random_experts_is_rank_over_embed_dim(columns):
  # No gap: single directions are not converged, the mean must be at chance all the same.
  w = jnp.asarray(_normal(5, 16, 4, 64, columns))
  measured = np.asarray(gram.off_diagonal_mean(_spectral_overlap(w, 8)))
  chance = weights.weight_overlap_chance({"w": w}, "spectral", 8)
  assert chance == 0.125
  assert abs(measured.mean() / chance - 1) < 0.06


@pytest.mark.parametrize("form", OVERLAPS)
@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, exponent=st.floats(-8, 8))
def test_overlap_is_blind_to_scale_and_follows_permutations(form, seed, exponent):
  w = _normal(seed, 4, 12, 8)
  overlap = np.asarray(OVERLAPS[form](jnp.asarray(w)))
  assert np.all((overlap >= 0) & (overlap <= 1 + 1e-5))
  np.testing.assert_allclose(overlap, overlap.T, atol=1e-6)
  scales = np.exp(exponent * np.linspace(-1, 1, 4, dtype=np.float32))[:, None, None]
  np.testing.assert_allclose(OVERLAPS[form](jnp.asarray(w * scales)), overlap, atol=1e-4)
  order = np.random.default_rng(seed).permutation(4)
  permuted = OVERLAPS[form](jnp.asarray(w[order]))
  np.testing.assert_allclose(permuted, overlap[np.ix_(order, order)], atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_only_the_spectral_form_is_blind_to_the_basis_of_the_hidden_side(seed):
  w = _normal(seed, 2, 12, 8)
  w[1] = w[0]
  for change in (_orthogonal(seed, 8), np.eye(8)[::-1], -np.eye(8)):
    turned = jnp.asarray(np.stack([w[0], w[1] @ change.astype(np.float32)]))
    np.testing.assert_allclose(OVERLAPS["spectral"](turned)[0, 1], 1.0, atol=1e-4)
  # The same function after a permutation of hidden units; the Gram form sees another expert.
  permuted = jnp.asarray(np.stack([w[0], w[1][:, ::-1]]))
  assert OVERLAPS["gram"](permuted)[0, 1] < 0.5


@pytest.mark.parametrize("form", OVERLAPS)
def test_layers_are_computed_apart(form):
  w = _normal(6, 3, 4, 12, 8)
  together = OVERLAPS[form](jnp.asarray(w))
  assert together.shape == (3, 4, 4)
  for layer in range(3):
    np.testing.assert_allclose(together[layer], OVERLAPS[form](jnp.asarray(w[layer])), atol=1e-5)
  mapped = jax.vmap(OVERLAPS[form])(jnp.asarray(w))
  np.testing.assert_allclose(mapped, together, atol=1e-5)


@pytest.mark.parametrize("form", weights.FORMS)
@pytest.mark.parametrize("silent", [(0,), (0, 1), (0, 1, 2)])
def test_zero_experts_overlap_with_nobody_and_have_finite_gradients(form, silent):
  w = jnp.asarray(_normal(7, 1, 3, 12, 8)).at[:, silent, ...].set(0.0)
  overlap, gradient = _picked_and_gradient(w, jnp.ones((1, 3, 3)), form, RANK)
  assert np.isfinite(overlap) and np.all(np.isfinite(gradient))
  values = OVERLAPS[form](w)[0]
  for e in silent:
    np.testing.assert_array_equal(values[e], np.zeros(3))


def test_rank_deficient_experts_count_with_the_directions_they_have():
  # Two of R = 3 directions each; missing ones must not be filled with the start matrix's.
  left = _normal(8, 3, 12, 2)
  w = jnp.asarray(left @ _normal(9, 3, 2, 8))
  expected = _overlap_of_bases([np.linalg.qr(u.astype(np.float64))[0] for u in left])
  np.testing.assert_allclose(OVERLAPS["spectral"](w), expected, atol=1e-4)
  _, gradient = _picked_and_gradient(w[None], _PAIRS, "spectral", RANK)
  assert np.all(np.isfinite(gradient))
  # Many more columns than directions: the shifted Gram matrix must stay positive definite.
  steep = jnp.asarray(_normal(10, 4, 256, 1) @ _normal(11, 4, 1, 16))
  assert np.all(np.isfinite(_spectral_overlap(steep, 64)))


@pytest.mark.parametrize("form", weights.FORMS)
def test_one_expert_has_no_overlap(form):
  alone = {"w": jnp.asarray(_normal(10, 2, 1, 12, 8))}
  overlap = _weight_overlap(alone, form, RANK)
  np.testing.assert_array_equal(gram.off_diagonal_mean(overlap), [0.0, 0.0])
  np.testing.assert_array_equal(weights.weight_specialization(alone), [1.0, 1.0])


def test_jit_changes_nothing():
  w = jnp.asarray(_normal(11, 3, 12, 8))
  np.testing.assert_allclose(weights.gram_overlap(w), OVERLAPS["gram"](w), atol=1e-6)
  np.testing.assert_allclose(weights.spectral_overlap(w, RANK), OVERLAPS["spectral"](w), atol=1e-5)


def test_bfloat16_weights_give_float32_overlaps():
  w = _normal(12, 2, 3, 12, 8)
  low = {"w": jnp.asarray(w, jnp.bfloat16)}
  high = {"w": low["w"].astype(jnp.float32)}
  for form in weights.FORMS:
    overlap = _weight_overlap(low, form, RANK)
    assert overlap.dtype == jnp.float32
    np.testing.assert_allclose(overlap, _weight_overlap(high, form, RANK), atol=1e-5)
  assert weights.weight_specialization(low).dtype == jnp.float32


@pytest.mark.parametrize("form", weights.FORMS)
def test_roles_are_summed_and_never_mixed(form):
  # "out" of expert 0 equals "in" of expert 1: a single Gram over all matrices would see it.
  shared, other = _normal(13, 12, 8), _normal(14, 12, 8)
  roles = {
    "in": jnp.asarray(np.stack([other, shared]))[None],
    "out": jnp.asarray(np.stack([shared, _normal(15, 12, 8)]))[None],
  }
  apart = sum(OVERLAPS[form](w) for w in roles.values())
  np.testing.assert_allclose(_weight_overlap(roles, form, RANK), apart, atol=1e-5)
  np.testing.assert_allclose(jnp.diagonal(apart[0]), [2.0, 2.0], rtol=1e-5)


def test_absolute_cosine_is_the_mean_over_roles():
  # role a: cos(e0, -e0) = -1; role b: orthogonal. mean |cos| = (1 + 0) / 2
  a = jnp.array([[[1.0], [0.0]], [[-1.0], [0.0]]])
  b = jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])
  roles = {"a": a[None], "b": b[None]}
  np.testing.assert_allclose(weights.absolute_cosine(roles), [[[1, 0.5], [0.5, 1]]], rtol=1e-6)
  np.testing.assert_allclose(weights.weight_specialization(roles), [0.5], rtol=1e-6)


def test_specialization_and_gram_overlap_of_random_experts_are_at_chance():
  roles = {
    "a": jnp.asarray(_normal(16, 400, 4, 6, 5)),
    "b": jnp.asarray(_normal(17, 400, 4, 6, 20)),
  }
  score = np.asarray(weights.weight_specialization(roles))
  chance = weights.weight_specialization_chance(roles)
  assert abs(score.mean() - chance) < 4 * score.std() / math.sqrt(len(score))
  expected = 1 - (math.sqrt(2 / (math.pi * 30)) + math.sqrt(2 / (math.pi * 120))) / 2
  assert chance == pytest.approx(expected, abs=1e-3)
  overlap = np.asarray(gram.off_diagonal_mean(weights.weight_overlap(roles, "gram", 1)))
  chance = weights.weight_overlap_chance(roles, "gram", 1)
  assert chance == pytest.approx(1 / 30 + 1 / 120)
  assert abs(overlap.mean() - chance) < 4 * overlap.std() / math.sqrt(len(overlap))


def test_chance_of_the_original_size():
  # 99.8 % "specialization" is what random initialisation gives for 384 x 384.
  shapes = {"w": jax.ShapeDtypeStruct((4, 4, 384, 384), jnp.float32)}
  assert weights.weight_specialization_chance(shapes) == pytest.approx(0.99792, abs=1e-5)
  assert weights.weight_overlap_chance(shapes, "spectral", 8) == pytest.approx(8 / 384)


@pytest.mark.parametrize("form", weights.FORMS)
def test_a_gradient_step_lowers_the_overlap(form):
  w = jnp.asarray(_normal(18, 1, 1, 12, 8) + 0.5 * _normal(19, 1, 3, 12, 8))
  before, gradient = _picked_and_gradient(w, _PAIRS, form, RANK)
  step = 0.01 * before / jnp.sum(jnp.square(gradient))  # to first order, a hundredth less
  after, _ = _picked_and_gradient(w - step * gradient, _PAIRS, form, RANK)
  assert 0.98 * before < after < 0.995 * before


def test_errors_name_parameter_and_value():
  w = jnp.zeros((1, 2, 4, 3))
  with pytest.raises(ValueError, match="form must be one of gram, spectral, got 'cosine'"):
    weights.weight_overlap({"w": w}, "cosine", 1)
  with pytest.raises(ValueError, match="roles is empty"):
    weights.weight_specialization({})
  for rank in (0, 4):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, D\) with D=4, got {rank}"):
      weights.spectral_overlap(w, rank)


@pytest.mark.parametrize("form", ["gram", "spectral", lambda w_LEDK: w_LEDK[..., 0, :3]])
def test_compared_at_once_as_apart(form):
  roles = {"reads": _normal(0, 2, 3, 6, 4), "writes": _normal(1, 2, 3, 6, 5)}
  stored = {**roles, "writes": np.swapaxes(roles["writes"], -1, -2)}
  found = weights.compare(roles, stored, form, RANK)
  overlap_LEE = _weight_overlap(roles, form, RANK)
  np.testing.assert_allclose(found.overlap_LEE, overlap_LEE, rtol=1e-5, atol=1e-6)
  specialization_L = weights.weight_specialization(roles)
  np.testing.assert_allclose(found.specialization_L, specialization_L, rtol=1e-5)
