"""Blocks of tokens by expert: each chosen pair has one place, with its own expert's block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.models import token_groups

_group = jax.jit(
  token_groups.group, static_argnums=1
)  # Compiled whole, not operation by operation.


def _chosen(E, N, K, seed, skew=0.0):
  """Each token's K highest of E random scores, to which `skew` adds a liking for expert 0."""
  scores_NE = np.random.default_rng(seed).standard_normal((N, E)) + skew * (np.arange(E) == 0)
  rank_NE = np.argsort(np.argsort(-scores_NE, 1), 1)
  return (rank_NE < K).T


@settings(max_examples=25, deadline=None)
@given(
  st.integers(1, 6).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E))),
  st.integers(1, 80),
  st.integers(0, 9),
  st.sampled_from([0.0, 1.0, 100.0]),
)
def test_every_chosen_pair_has_one_place(sizes, N, seed, skew):
  E, K = sizes
  chosen_EN = _chosen(E, N, K, seed, skew)
  groups = jax.tree.map(np.asarray, _group(jnp.asarray(chosen_EN), K))
  size = token_groups.block_size(E, N, K)
  G = len(groups.expert_G)
  assert (N * K + E * (size - 1)) // size == G and groups.pair_Y.shape == (G * size,)
  places = groups.place_X[chosen_EN.reshape(-1)]
  assert len(set(places)) == N * K and places.max() < G * size
  assert (groups.place_X[~chosen_EN.reshape(-1)] == G * size).all()
  # Both directions say the same, and what nobody has is empty.
  np.testing.assert_array_equal(groups.pair_Y[places], np.flatnonzero(chosen_EN))
  assert (np.delete(groups.pair_Y, places) == E * N).all()
  np.testing.assert_array_equal(groups.expert_G[places // size], np.nonzero(chosen_EN)[0])
  assert (np.diff(groups.expert_G) >= 0).all() and groups.expert_G.max() < E


def test_sorting_is_no_loop():
  """On a GPU a loop in every layer would cut the step's CUDA graph."""
  chosen_EN = jnp.ones((4, 64), bool)
  traced = str(jax.make_jaxpr(lambda chosen: token_groups.group(chosen, 2))(chosen_EN))
  assert "searchsorted" in traced
  assert not {"scan[", "while["} & set(traced.split())


def test_there_and_back():
  E, N, K, D = 3, 40, 2, 5
  chosen_EN = _chosen(E, N, K, 0)
  x_END = np.random.default_rng(1).standard_normal((E, N, D)).astype(np.float32)
  groups = token_groups.group(jnp.asarray(chosen_EN), K)
  gathered_GSD = np.asarray(groups.gather(jnp.asarray(x_END)))
  assert np.any(gathered_GSD == 0) and np.isclose(gathered_GSD.sum(), x_END[chosen_EN].sum())
  back = groups.scatter(jnp.asarray(gathered_GSD), E)
  np.testing.assert_array_equal(back, x_END * chosen_EN[..., None])


def test_gradients_are_moved_back():
  E, N, K, D = 3, 20, 2, 4
  chosen_EN = _chosen(E, N, K, 0)
  rng = np.random.default_rng(1)
  groups = token_groups.group(jnp.asarray(chosen_EN), K)
  x_END = jnp.asarray(rng.standard_normal((E, N, D)), jnp.float32)
  gathered, pull = jax.vjp(groups.gather, x_END)
  grad_GSD = rng.standard_normal(gathered.shape).astype(np.float32)
  (grad_x,) = pull(jnp.asarray(grad_GSD))
  np.testing.assert_array_equal(grad_x, groups.scatter(jnp.asarray(grad_GSD), E))
  _, pull = jax.vjp(lambda x: groups.scatter(x, E), jnp.asarray(grad_GSD))
  (grad_places,) = pull(x_END)
  np.testing.assert_array_equal(grad_places, groups.gather(x_END))


@pytest.mark.parametrize(
  ("experts", "tokens", "selected", "size"),
  [
    (4, 4096, 1, 256),
    (16, 4096, 2, 128),
    (4, 1, 1, 1),
    (4, 3, 1, 3),
    (8, 32, 2, 8),
    (4, 10**6, 1, 256),
  ],
)
def test_block_sizes(experts, tokens, selected, size):
  assert token_groups.block_size(experts, tokens, selected) == size
