"""Shares of pairs by hand and in general; the wrapper around a controller."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.control import base, schedules
from hgnn_moe_jax.control.constant import constant
from hgnn_moe_jax.control.pairs import pair_shares, pairwise

LAYERS, EXPERTS = 2, 3
OFF = ~np.eye(EXPERTS, dtype=bool)


def symmetric(*pairs: float) -> np.ndarray:
  """[1, 3, 3] with these values for the pairs 01, 02, 12, and 9 on the diagonal."""
  a, b, c = pairs
  return np.asarray([[[9.0, a, b], [a, 9.0, c], [b, c, 9.0]]], np.float32)


@pytest.mark.parametrize(
  ("emphasis", "expected"),
  [
    (0.0, (1.0, 1.0, 1.0)),
    (1.0, (1.5, 1.0, 0.5)),  # 0.6 : 0.4 : 0.2, their mean 0.4
    (2.0, (0.36 / 0.56 * 3, 0.16 / 0.56 * 3, 0.04 / 0.56 * 3)),
  ],
)
def test_shares_by_hand(emphasis, expected):
  shares = pair_shares(symmetric(0.6, 0.4, 0.2), emphasis)
  np.testing.assert_allclose(shares, symmetric(*expected) * OFF, rtol=1e-5)


def test_only_ratios_count_however_small():
  tiny = symmetric(6e-12, 4e-12, 2e-12)
  np.testing.assert_allclose(
    pair_shares(tiny, 3.0), pair_shares(symmetric(0.6, 0.4, 0.2), 3.0), rtol=1e-5
  )


def test_one_pair_alone_gets_all_there_is():
  shares = pair_shares(symmetric(0.5, 0.0, 0.0), 1.0)
  np.testing.assert_allclose(shares, symmetric(3.0, 0.0, 0.0) * OFF)


def test_without_any_overlap_all_pairs_are_alike():
  np.testing.assert_array_equal(pair_shares(symmetric(0.0, 0.0, 0.0), 2.0)[0], 1.0 * OFF)


def test_one_expert_has_no_pair():
  np.testing.assert_array_equal(pair_shares(jnp.ones((1, 1, 1)), 1.0), np.zeros((1, 1, 1)))


_shares = jax.jit(pair_shares)


@settings(deadline=None, max_examples=60)
@given(
  pairs=st.tuples(*[st.floats(0, 1, width=32)] * 3),
  emphasis=st.floats(0, 10, width=32),
)
@example(pairs=(0.0, 0.0, 1.1754943508222875e-38), emphasis=1.0)  # the smallest normal number
@example(pairs=(0.0, 1e-45, 1.1754942106924411e-38), emphasis=1.0)  # subnormal ones
def test_shares_have_mean_one_and_the_order_of_the_overlaps(pairs, emphasis):
  shares = np.asarray(_shares(symmetric(*pairs), emphasis))[0]
  assert shares[OFF].mean() == pytest.approx(1.0, rel=1e-4) and np.all(shares >= 0.0)
  assert shares.max() <= 3.001 and not np.diagonal(shares).any()
  np.testing.assert_array_equal(shares, shares.T)
  of_pair = np.array([shares[0, 1], shares[0, 2], shares[1, 2]])
  assert np.all(np.diff(of_pair[np.argsort(pairs, kind="stable")]) >= -1e-5)


def observation(weight, output):
  score_L = jnp.full(LAYERS, 0.5)
  return base.Observation(
    step=jnp.int32(0),
    weight_specialization_L=score_L,
    output_specialization_L=score_L,
    effective_experts_L=score_L,
    lm_loss=jnp.ones(()),
    weight_overlap_LEE=jnp.concatenate([weight, weight[:, ::-1, ::-1]]),
    output_overlap_LEE=jnp.concatenate([output, output]),
  )


@pytest.fixture
def controllers():
  """A controller of layers, and the same pair by pair."""
  layers = constant(0.2, 0.1, LAYERS, schedules.linear_warmup(4))
  return layers, pairwise(layers, LAYERS, EXPERTS, emphasis=1.0, smoothing=2)


def test_layers_keep_their_strengths_and_pairs_share_them(controllers):
  """The means of the first two overlaps are taken, penalty by penalty."""
  layers, pairs = controllers
  inner, state = layers.init(), pairs.init()
  step = jax.jit(chex.assert_max_traces(pairs.update, n=1))
  for n, (weight, output) in enumerate([((0.2, 0.4, 0), (1, 0, 0)), ((0.6, 0, 0), (0, 1, 0))]):
    seen = observation(symmetric(*weight), symmetric(*output))
    inner, state = layers.update(inner, seen), step(state, seen)
    assert state.count == n + 1
  strengths, plain = pairs.strengths(state), layers.strengths(inner)
  np.testing.assert_array_equal(strengths.weight_L, plain.weight_L)
  np.testing.assert_array_equal(strengths.output_L, plain.output_L)
  weight, mirrored = strengths.weight_pairs_LEE
  expected = symmetric(2.0, 1.0, 0.0)[0] * OFF  # of the means 0.4, 0.2, 0
  np.testing.assert_allclose(weight, expected, rtol=1e-5)
  np.testing.assert_allclose(mirrored, expected[::-1, ::-1], rtol=1e-5)
  output = symmetric(1.5, 1.5, 0.0)[0] * OFF
  np.testing.assert_allclose(strengths.output_pairs_LEE, [output, output], rtol=1e-5)


def test_pairs_are_alike_at_the_start(controllers):
  strengths = controllers[1].strengths(controllers[1].init())
  np.testing.assert_array_equal(strengths.weight_pairs_LEE, [1.0 * OFF] * LAYERS)


def test_what_is_not_finite_is_no_overlap(controllers):
  _, pairs = controllers
  state = pairs.update(
    pairs.init(), observation(symmetric(0.2, 0.4, 0.6), symmetric(0.1, 0.1, 0.1))
  )
  bad = symmetric(jnp.nan, jnp.inf, jnp.nan)
  after = pairs.update(state, observation(bad, bad))
  chex.assert_trees_all_equal(
    pairs.strengths(after).weight_pairs_LEE, pairs.strengths(state).weight_pairs_LEE
  )


def test_no_gradient_flows_through_a_share(controllers):
  _, pairs = controllers

  def total(x):
    overlap = jnp.asarray(symmetric(0.2, 0.4, 0.6))
    seen = observation(overlap * x, overlap**x)
    return jnp.sum(pairs.strengths(pairs.update(pairs.init(), seen)).output_pairs_LEE[:, 0, 1])

  assert jax.grad(total)(1.5) == 0.0


def test_flags_and_evaluations_are_the_layers(controllers):
  layers, pairs = controllers
  told = layers._replace(
    observe_evaluation=lambda state, loss: state._replace(count=state.count + 100),
    flags=lambda state: base.no_flags(LAYERS)._replace(plateau=state.count > 50),
  )
  pairs = pairwise(told, LAYERS, EXPERTS, 1.0)
  state = pairs.observe_evaluation(pairs.init(), 1.0)
  assert state.count == 100 and pairs.flags(state).plateau
  assert not pairs.flags(pairs.init()).plateau


@pytest.mark.parametrize("emphasis", [0.0, -1.0, float("inf"), float("nan")])
def test_emphasis_is_checked(controllers, emphasis):
  with pytest.raises(ValueError, match="emphasis must be finite and above 0"):
    pairwise(controllers[0], LAYERS, EXPERTS, emphasis)


def test_observations_without_overlaps_are_refused(controllers):
  seen = observation(symmetric(0, 0, 0), symmetric(0, 0, 0))._replace(output_overlap_LEE=None)
  with pytest.raises(ValueError, match="needs weight_overlap_LEE and output_overlap_LEE"):
    controllers[1].update(controllers[1].init(), seen)
