import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.orthogonality import gram, outputs

SEEDS = st.integers(0, 2**31 - 1)
_overlap = jax.jit(outputs.update_overlap, static_argnums=2)
_penalty = jax.jit(outputs.output_penalty, static_argnums=2)


def _picked(updates_EBTD, weights_BT, picks, penalty_factor, form):
  """A scalar that depends on every entry of every field, and on the penalty."""
  measured = outputs.update_overlap(updates_EBTD, weights_BT, form)
  penalty = outputs.output_penalty(measured.overlap_EE, measured.scale_E, form)
  return penalty_factor * penalty + sum(
    jnp.sum(pick * field) for pick, field in zip(picks, measured, strict=True)
  )


_picked_and_gradient = jax.jit(jax.value_and_grad(_picked), static_argnums=4)


def _ones(experts):
  return [jnp.ones((experts, experts))] * 3 + [jnp.ones(experts)]


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _mask(batch=2, tokens=5):
  """Ragged padding: row b has `tokens - b` valid tokens."""
  return (np.arange(tokens)[None] < tokens - np.arange(batch)[:, None]).astype(np.float32)


def _naive(updates_EBTD, weights_BT, form):
  """Token by token and pair by pair in float64; masked tokens are dropped."""
  u = np.asarray(updates_EBTD, np.float64)[:, np.asarray(weights_BT) == 1]
  u = u - u.mean(1, keepdims=True)
  experts, n = len(u), u.shape[1]
  signed, absolute, squared, covariance = np.zeros((4, experts, experts))
  for i in range(experts):
    for j in range(experts):
      for t in range(n):
        a, b = u[i, t], u[j, t]
        cos = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        signed[i, j] += cos / n
        absolute[i, j] += abs(cos) / n
        squared[i, j] += cos**2 / n
      cross = [np.linalg.norm(u[k].T @ u[l]) for k, l in ((i, j), (i, i), (j, j))]
      covariance[i, j] = cross[0] ** 2 / (cross[1] * cross[2])
  scale = np.sqrt(np.mean(np.sum(u**2, -1), 1))
  return squared if form == "cosine" else covariance, absolute, signed, scale


def test_update_overlap_by_hand():
  # Two tokens, D = 2. Expert 0: (3, 1), (1, 1): mean (2, 1), centred (1, 0), (-1, 0).
  # Expert 1: (2, 2), (0, 0): mean (1, 1), centred (1, 1), (-1, -1): cos 1/sqrt2 with expert 0.
  # Expert 2: (0, -2), (0, 2): mean 0: cos 0 with expert 0, -1/sqrt2 with expert 1 twice.
  updates = jnp.array([[[[3.0, 1], [1, 1]]], [[[2, 2], [0, 0]]], [[[0, -2], [0, 2]]]])
  measured = _overlap(updates, jnp.ones((1, 2)), "cosine")
  h = math.sqrt(0.5)
  np.testing.assert_allclose(
    measured.overlap_EE, [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]], rtol=1e-6
  )
  np.testing.assert_allclose(
    measured.absolute_cosine_EE, [[1, h, 0], [h, 1, h], [0, h, 1]], rtol=1e-6
  )
  np.testing.assert_allclose(measured.cosine_EE, [[1, h, 0], [h, 1, -h], [0, -h, 1]], rtol=1e-6)
  np.testing.assert_allclose(measured.scale_E, [1, math.sqrt(2), 2], rtol=1e-6)
  # C_00 = diag(1, 0), norm 1; C_11 = ones, norm 2; C_01 = [[1, 1], [0, 0]], norm^2 2: 2/(1*2) = 1.
  # All three are rank one in time: the covariance form sees one and the same signal.
  covariance = _overlap(updates, jnp.ones((1, 2)), "covariance")
  np.testing.assert_allclose(covariance.overlap_EE, np.ones((3, 3)), rtol=1e-6)


# Nine experts' products are those of matrices.
@pytest.mark.parametrize("experts", [3, 9])
@pytest.mark.parametrize("form", outputs.FORMS)
def test_agrees_with_the_naive_twin(form, experts):
  updates = _normal(0, experts, 2, 5, 4) + 2.0  # a mean to be removed
  for measured, expected in zip(
    _overlap(jnp.asarray(updates), jnp.asarray(_mask()), form),
    _naive(updates, _mask(), form),
    strict=True,
  ):
    np.testing.assert_allclose(measured, expected, atol=2e-6)


@pytest.mark.parametrize("experts", [3, 9])
@pytest.mark.parametrize("form", outputs.FORMS)
@pytest.mark.parametrize("field", range(4))
def test_gradients_agree_with_finite_differences_of_the_naive_twin(form, field, experts):
  updates = _normal(1, experts, 2, 5, 4)
  direction = _normal(2, experts, 2, 5, 4).astype(np.float64)
  pick = _normal(3, *((experts,) if field == 3 else (experts, experts)))
  picks = [jnp.zeros_like(one) for one in _ones(experts)]
  picks[field] = jnp.asarray(pick)
  _, gradient = _picked_and_gradient(jnp.asarray(updates), jnp.asarray(_mask()), picks, 0.0, form)
  ends = [
    np.sum(pick * _naive(updates + h * direction, _mask(), form)[field]) for h in (1e-6, -1e-6)
  ]
  expected = (ends[0] - ends[1]) / 2e-6
  assert abs(expected) > 0.01
  np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=2e-3)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_masked_tokens_change_nothing(form):
  updates, mask = _normal(4, 3, 2, 5, 4), jnp.asarray(_mask(2, 5))
  other = np.where(np.asarray(mask)[None, :, :, None] == 1, updates, 100.0 * _normal(5, 3, 2, 5, 4))
  for a, b in zip(
    _overlap(jnp.asarray(updates), mask, form),
    _overlap(jnp.asarray(other), mask, form),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  _, gradient = _picked_and_gradient(jnp.asarray(updates), mask, _ones(3), 1.0, form)
  np.testing.assert_array_equal(np.asarray(gradient)[:, np.asarray(mask) == 0], 0.0)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_identical_experts_overlap_fully(form):
  updates = jnp.asarray(np.repeat(_normal(6, 1, 2, 5, 4), 3, axis=0))
  measured = _overlap(updates, jnp.asarray(_mask()), form)
  np.testing.assert_allclose(measured.overlap_EE, np.ones((3, 3)), rtol=1e-5)
  np.testing.assert_allclose(measured.absolute_cosine_EE, np.ones((3, 3)), rtol=1e-5)
  np.testing.assert_allclose(
    outputs.output_specialization(measured.absolute_cosine_EE), 0.0, atol=1e-6
  )
  np.testing.assert_allclose(gram.effective_experts(measured.cosine_EE), 1.0, rtol=1e-4)
  penalty = _penalty(measured.overlap_EE, measured.scale_E, form)
  np.testing.assert_allclose(penalty, 1.0, rtol=1e-5)


def test_orthogonal_experts_do_not_overlap():
  # Each expert writes to a dimension of its own, +1 and -1 on tokens so that the signals are
  # uncorrelated in time as well.
  signs = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], np.float32)
  updates = jnp.asarray(np.einsum("et,ed->etd", signs, np.eye(3, dtype=np.float32))[:, None])
  for form in outputs.FORMS:
    measured = _overlap(updates, jnp.ones((1, 4)), form)
    np.testing.assert_allclose(measured.overlap_EE, np.eye(3), atol=1e-6)
    penalty = _penalty(measured.overlap_EE, measured.scale_E, form)
    np.testing.assert_allclose(penalty, 0.0, atol=1e-6)
    assert outputs.output_specialization(measured.absolute_cosine_EE) == 1.0
    np.testing.assert_allclose(gram.effective_experts(measured.cosine_EE), 3.0, rtol=1e-5)


@pytest.mark.parametrize("form", outputs.FORMS)
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, exponent=st.floats(-8, 8))
def test_is_blind_to_scale_and_offset_and_follows_permutations(form, seed, exponent):
  updates, mask = _normal(seed, 3, 2, 5, 4), jnp.asarray(_mask())
  plain = _overlap(jnp.asarray(updates), mask, form)
  scales = np.exp(exponent * np.array([-1, 0, 1], np.float32))[:, None, None, None]
  offset = _normal(seed + 1, 3, 1, 1, 4)  # one vector per expert, the same for every token
  scaled = _overlap(jnp.asarray((updates + offset) * scales), mask, form)
  for name in ("overlap_EE", "absolute_cosine_EE", "cosine_EE"):
    np.testing.assert_allclose(getattr(scaled, name), getattr(plain, name), atol=1e-4)
    assert np.all(np.abs(getattr(plain, name)) <= 1 + 1e-5)
  np.testing.assert_allclose(scaled.scale_E, plain.scale_E * scales.ravel(), rtol=1e-4)
  order = np.random.default_rng(seed).permutation(3)
  permuted = _overlap(jnp.asarray(updates[order]), mask, form)
  for a, b in zip(permuted[:3], plain[:3], strict=True):
    np.testing.assert_allclose(a, np.asarray(b)[np.ix_(order, order)], atol=1e-5)
  np.testing.assert_allclose(permuted.scale_E, np.asarray(plain.scale_E)[order], rtol=1e-5)


def test_only_the_covariance_is_blind_to_a_rotation_of_one_expert():
  updates = _normal(7, 2, 2, 5, 4)
  updates[1] = updates[0] @ np.linalg.qr(_normal(8, 4, 4))[0]
  overlap = {
    f: _overlap(jnp.asarray(updates), jnp.asarray(_mask()), f).overlap_EE for f in outputs.FORMS
  }
  assert overlap["cosine"][0, 1] < 0.9
  base = np.repeat(updates[:1], 2, axis=0)
  third = _normal(9, 1, 2, 5, 4)
  with_third = [np.concatenate([x, third]) for x in (base, updates)]
  a, b = (
    _overlap(jnp.asarray(x), jnp.asarray(_mask()), "covariance").overlap_EE for x in with_third
  )
  np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_without_valid_tokens_everything_is_zero_and_finite(form):
  updates, mask = jnp.asarray(_normal(10, 3, 2, 5, 4)), jnp.zeros((2, 5))
  value, gradient = _picked_and_gradient(updates, mask, _ones(3), 1.0, form)
  assert value == 0.0
  for field in _overlap(updates, mask, form):
    np.testing.assert_array_equal(field, np.zeros_like(field))
  np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("form", outputs.FORMS)
@pytest.mark.parametrize("silent", [(1,), (0, 1, 2)])
def test_silent_experts_have_finite_values_and_gradients(form, silent):
  updates = jnp.asarray(_normal(11, 3, 2, 5, 4)).at[silent, ...].set(0.0)
  value, gradient = _picked_and_gradient(updates, jnp.asarray(_mask()), _ones(3), 1.0, form)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))
  measured = _overlap(updates, jnp.asarray(_mask()), form)
  for e in silent:
    np.testing.assert_array_equal(measured.overlap_EE[e], [0, 0, 0])
    assert measured.scale_E[e] == 0.0


def test_one_expert_has_nobody_to_overlap_with():
  for form in outputs.FORMS:
    measured = _overlap(jnp.asarray(_normal(12, 1, 2, 5, 4)), jnp.asarray(_mask()), form)
    assert _penalty(measured.overlap_EE, measured.scale_E, form) == 0.0
    assert outputs.output_specialization(measured.absolute_cosine_EE) == 1.0
    np.testing.assert_allclose(gram.effective_experts(measured.cosine_EE), 1.0, rtol=1e-6)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_bfloat16_updates_are_accumulated_in_float32(form):
  low = jnp.asarray(_normal(13, 3, 2, 5, 4), jnp.bfloat16)
  mask = jnp.asarray(_mask())
  for a, b in zip(
    _overlap(low, mask, form), _overlap(low.astype(jnp.float32), mask, form), strict=True
  ):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_a_scan_over_layers_gives_the_same_values(form):
  updates, mask = jnp.asarray(_normal(14, 2, 3, 2, 5, 4)), jnp.asarray(_mask())
  _, scanned = jax.lax.scan(lambda c, u: (c, outputs.update_overlap(u, mask, form)), None, updates)
  for layer in range(2):
    plain = _overlap(updates[layer], mask, form)
    for a, b in zip(scanned, plain, strict=True):
      np.testing.assert_allclose(a[layer], b, atol=1e-6)
  penalty = outputs.output_penalty(scanned.overlap_EE, scanned.scale_E, form)
  assert penalty.shape == outputs.output_specialization(scanned.absolute_cosine_EE).shape == (2,)


@pytest.mark.parametrize("embed_dim", [4, 32])
def test_random_experts_are_at_chance(embed_dim):
  batch, tokens = 8, 40
  updates = jnp.asarray(_normal(15, 8, batch, tokens, embed_dim))
  mask = jnp.asarray(_mask(batch, tokens))
  n = int(mask.sum())
  for form in outputs.FORMS:
    measured = _overlap(updates, mask, form)
    chance = outputs.output_overlap_chance(embed_dim, n, form)
    np.testing.assert_allclose(gram.off_diagonal_mean(measured.overlap_EE), chance, rtol=0.06)
    np.testing.assert_allclose(
      outputs.output_specialization(measured.absolute_cosine_EE),
      outputs.output_specialization_chance(embed_dim),
      atol=0.01,
    )


def test_jit_changes_nothing():
  updates, mask = jnp.asarray(_normal(14, 3, 2, 5, 4)), jnp.asarray(_mask())
  plain = outputs.update_overlap(updates, mask, "covariance")
  for a, b in zip(plain, _overlap(updates, mask, "covariance"), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_chance_in_closed_form():
  # D = 3: E|cos| = 1/2. D = 128: 1 - sqrt(2 / (128 pi)) = 0.9295, less 1 / (4 D) of the root
  assert outputs.output_specialization_chance(3) == pytest.approx(0.5)
  assert outputs.output_specialization_chance(128) == pytest.approx(0.9293, abs=1e-4)
  assert outputs.output_overlap_chance(128, 10, "cosine") == 1 / 128
  assert outputs.output_overlap_chance(128, 384, "covariance") == 0.25


def test_output_penalty_by_hand():
  # Layer 0: overlaps .2 .4 .6 (twice each) -> .4; scales 1, 1, 4, mean 2, half of it 1 -> guard 0.
  # Layer 1: overlap 0; scales 0, 1, 5, mean 2 -> relative 0, 1, 5 -> guard (1 + 0 + 0) / 3.
  # Layer 2: overlap 0; scales .5, 1.5, 4, mean 2 -> relative .5 -> .25 / 3.
  overlap = np.zeros((3, 3, 3), np.float32)
  overlap[0] = [[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]]
  scale = jnp.array([[1.0, 1, 4], [0, 1, 5], [0.5, 1.5, 4]])
  np.testing.assert_allclose(
    outputs.output_penalty(jnp.asarray(overlap), scale, "cosine"), [0.4, 0, 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    outputs.output_penalty(jnp.asarray(overlap), scale, "covariance"),
    [0.4, 1 / 3, 0.25 / 3],
    rtol=1e-6,
  )


def test_the_guard_makes_a_quiet_expert_louder_and_no_other_quieter():
  # relative = .5 / (.5 * 2) = .5: d/ds mean (1 - s)^2 = 2 (1 - .5) (-1) / 3 = -1/3; others 0
  gradient = jax.grad(lambda s: outputs.output_penalty(jnp.zeros((3, 3)), s, "covariance"))
  np.testing.assert_allclose(gradient(jnp.array([0.5, 1.5, 4.0])), [-1 / 3, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("form", outputs.FORMS)
def test_a_gradient_step_lowers_the_penalty(form):
  updates = jnp.asarray(_normal(16, 1, 2, 5, 4) + 0.5 * _normal(17, 3, 2, 5, 4))
  nothing = [jnp.zeros_like(one) for one in _ones(3)]

  def penalty(u):
    return _picked_and_gradient(u, jnp.ones((2, 5)), nothing, 1.0, form)

  before, gradient = penalty(updates)
  step = 0.1 * before / jnp.sum(jnp.square(gradient))  # to first order, a tenth less
  assert penalty(updates - step * gradient)[0] < 0.95 * before


def test_errors_name_parameter_and_value():
  updates, mask = jnp.zeros((2, 1, 3, 4)), jnp.ones((1, 3))
  with pytest.raises(ValueError, match="form must be one of cosine, covariance, got 'gram'"):
    outputs.update_overlap(updates, mask, "gram")
  with pytest.raises(ValueError, match="form must be"):
    outputs.output_penalty(jnp.zeros((2, 2)), jnp.zeros(2), "gram")
  with pytest.raises(ValueError, match=r"\(2, 1, 3, 4\) and \(3, 1\)"):
    outputs.update_overlap(updates, mask.T)


def test_accelerators_measure_the_same(monkeypatch):
  rng = np.random.default_rng(0)
  updates_EBTD = rng.standard_normal((3, 2, 5, 8)).astype(np.float32) + 2
  weights_BT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.float32)
  expected = outputs.update_overlap(jnp.asarray(updates_EBTD), jnp.asarray(weights_BT))
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  found = outputs.update_overlap(jnp.asarray(updates_EBTD), jnp.asarray(weights_BT))
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _dealt(updates_EBTD, weights_BT, seed=0):
  return np.asarray(
    jax.jit(outputs.other_tokens_cosine)(
      jnp.asarray(updates_EBTD), jnp.asarray(weights_BT), jax.random.key(seed)
    )
  )


def test_what_no_two_have_seen_is_no_overlap_and_shared_directions_are():
  """Copies of one expert: as unrelated ones in 16 directions, identical ones in a single one."""
  tokens = _normal(0, 1, 30, 20, 16)
  copies = np.repeat(tokens, 3, axis=0)
  off = ~np.eye(3, dtype=bool)
  same = _overlap(jnp.asarray(copies), jnp.ones((30, 20)), "cosine").absolute_cosine_EE
  np.testing.assert_allclose(same, np.ones((3, 3)), rtol=1e-5)
  dealt = _dealt(copies, np.ones((30, 20), np.float32))
  np.testing.assert_allclose(np.diagonal(dealt), np.ones(3), rtol=1e-5)
  np.testing.assert_allclose(dealt[off], gram.absolute_cosine_chance(16), atol=0.02)
  line = copies[..., :1] * _normal(1, 16) + 5.0  # a mean to be removed
  np.testing.assert_allclose(
    _dealt(line, np.ones((30, 20), np.float32)), np.ones((3, 3)), rtol=1e-4
  )


def test_other_tokens_are_those_of_the_naive_twin():
  """Expert e has the token e places on in the order of the draw; padding counts nowhere."""
  updates, weights = _normal(0, 3, 2, 5, 4) + 2.0, _mask()
  order = np.asarray(jax.random.permutation(jax.random.key(7), 10))
  valid = weights.reshape(10) == 1
  u = updates.reshape(3, 10, 4).astype(np.float64)
  u = u - u[:, valid].mean(1, keepdims=True)
  expected = np.zeros((3, 3))
  for i in range(3):
    for j in range(3):
      pairs = [(order[(m + i) % 10], order[(m + j) % 10]) for m in range(10)]
      pairs = [(s, t) for s, t in pairs if valid[s] and valid[t]]
      assert i == j or all(s != t for s, t in pairs)
      cosines = [
        u[i, s] @ u[j, t] / np.linalg.norm(u[i, s]) / np.linalg.norm(u[j, t]) for s, t in pairs
      ]
      expected[i, j] = np.mean(np.abs(cosines))
  np.testing.assert_allclose(_dealt(updates, weights, 7), expected, rtol=1e-5)
  assert not _dealt(updates, np.zeros_like(weights)).any()
