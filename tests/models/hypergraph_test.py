import functools

import jax
import numpy as np
import pytest

from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.models import hypergraph

PAIRS_OF_3 = ((0, 1), (0, 2), (1, 2))
# Sizes 2, 3, 2 and unequal degrees; expert 4 belongs to none.
UNEQUAL = ((0, 1), (1, 2, 3), (3, 0))
NORMALIZATIONS = ("symmetric", "row")


def _feng(edges, weight_M, normalization, num_experts):
  """Equation 11 of Feng et al. 2019 with every matrix written out, float64."""
  H = np.zeros((num_experts, len(edges)))
  for m, edge in enumerate(edges):
    for e in edge:
      H[e, m] = 1
  W = np.diag(np.asarray(weight_M, np.float64))
  degree = [sum(W[m, m] for m in range(len(edges)) if H[e, m]) for e in range(num_experts)]
  power = 0.5 if normalization == "symmetric" else 1.0
  Dv = np.diag([d**-power if d else 0.0 for d in degree])
  De = np.diag([1 / len(edge) for edge in edges])
  right = Dv if normalization == "symmetric" else np.eye(num_experts)
  return Dv @ H @ W @ De @ H.T @ right


def _attended(edges, weight_M, score_EBT, normalization):
  """Token by token, hyperedge by hyperedge, member by member, float64."""
  num_experts, B, T = score_EBT.shape
  degree = [sum(w for w, edge in zip(weight_M, edges, strict=True) if e in edge) for e in range(9)]
  operator = np.zeros((num_experts, num_experts, B, T))
  for b in range(B):
    for t in range(T):
      for w, edge in zip(weight_M, edges, strict=True):
        total = sum(np.exp(score_EBT[e, b, t]) for e in edge)
        for i in edge:
          for j in edge:
            share = np.exp(score_EBT[j, b, t]) / total
            if normalization == "symmetric":
              operator[i, j, b, t] += w * share / np.sqrt(degree[i] * degree[j])
            else:
              operator[i, j, b, t] += w * share / degree[i]
  return operator


@pytest.fixture(scope="module")
def propagate():
  """The plain operator [E, E] and its gradient by the weights."""

  @functools.cache
  def compiled(edges, normalization, num_experts):
    H = hypergraph.incidence(edges, num_experts)

    def both(weight_M, cotangent_EE):
      operator, pull = jax.vjp(lambda w: hypergraph.propagation(H, w, normalization), weight_M)
      return operator, pull(cotangent_EE)[0]

    return jax.jit(both)

  def run(edges, weight_M, normalization, num_experts, cotangent_EE):
    return compiled(edges, normalization, num_experts)(np.float32(weight_M), cotangent_EE)

  return run


@pytest.fixture(scope="module")
def attend():
  """The attended operator [E, E, B, T] and its gradients by weights and scores."""

  @functools.cache
  def compiled(edges, normalization):
    def both(arguments, cotangent):
      def operator(arguments):
        return hypergraph.attended_propagation(edges, *arguments, normalization)

      out, pull = jax.vjp(operator, arguments)
      return out, pull(cotangent)[0]

    return jax.jit(both)

  def run(edges, weight_M, score_EBT, normalization, cotangent):
    arguments = np.float32(weight_M), np.float32(score_EBT)
    return compiled(edges, normalization)(arguments, np.float32(cotangent))

  return run


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_incidence_by_hand():
  np.testing.assert_array_equal(
    hypergraph.incidence(UNEQUAL, 5),
    [[1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]],
  )
  assert hypergraph.incidence(UNEQUAL, 5).dtype == np.float32


def test_membership_slots_by_hand():
  member_MK, present_MK = hypergraph.membership_slots(UNEQUAL)
  np.testing.assert_array_equal(present_MK, [[1, 1, 0], [1, 1, 1], [1, 1, 0]])
  np.testing.assert_array_equal(member_MK[present_MK], [0, 1, 1, 2, 3, 3, 0])


def test_three_experts_all_pairs_by_hand(propagate):
  # w = (1, 3, 8) on {0,1}, {0,2}, {1,2}: degrees d0 = 1 + 3 = 4, d1 = 1 + 8 = 9, d2 = 3 + 8 = 11.
  # Every hyperedge has two members, so P_ij = (sum of w over hyperedges with i and j) / 2 / scale.
  # row: P_00 = 4/2/4 = 1/2, P_01 = 1/2/4 = 1/8, P_02 = 3/2/4 = 3/8, and so on by receiver.
  operator, _ = propagate(PAIRS_OF_3, [1, 3, 8], "row", 3, np.ones((3, 3), np.float32))
  wanted = [[1 / 2, 1 / 8, 3 / 8], [1 / 18, 1 / 2, 4 / 9], [3 / 22, 8 / 22, 1 / 2]]
  np.testing.assert_allclose(operator, wanted, rtol=1e-6)
  # symmetric: P_01 = 1/2 / sqrt(4 * 9) = 1/12; P_02 = 3/2 / sqrt(44); P_12 = 4 / sqrt(99).
  operator, _ = propagate(PAIRS_OF_3, [1, 3, 8], "symmetric", 3, np.ones((3, 3), np.float32))
  a, b, c = 1 / 12, 1.5 / 44**0.5, 4 / 99**0.5
  np.testing.assert_allclose(operator, [[0.5, a, b], [a, 0.5, c], [b, c, 0.5]], rtol=1e-6)


def test_unequal_sizes_and_weights_by_hand(propagate):
  # {0,1} w=2, {1,2,3} w=6, {3,0} w=4: d0 = 2 + 4 = 6, d1 = 2 + 6 = 8, d2 = 6, d3 = 6 + 4 = 10.
  # row, receiver 1: from 0: 2/2/8 = 1/8; itself: (2/2 + 6/3)/8 = 3/8; from 2 and 3: 6/3/8 = 1/4.
  operator, _ = propagate(UNEQUAL, [2, 6, 4], "row", 4, np.ones((4, 4), np.float32))
  np.testing.assert_allclose(operator[1], [1 / 8, 3 / 8, 1 / 4, 1 / 4], rtol=1e-6)
  # Receiver 3: from 0: 4/2/10 = 1/5; from 1 and 2: 6/3/10 = 1/5; itself: (2 + 2)/10 = 2/5.
  np.testing.assert_allclose(operator[3], [1 / 5, 1 / 5, 1 / 5, 2 / 5], rtol=1e-6)
  # symmetric, 1 from 0: 1 / sqrt(6 * 8); 3 from 1: 2 / sqrt(80); 0 and 2 share no hyperedge.
  operator, _ = propagate(UNEQUAL, [2, 6, 4], "symmetric", 4, np.ones((4, 4), np.float32))
  wanted = [1 / 48**0.5, 2 / 80**0.5, 0]
  np.testing.assert_allclose([operator[1, 0], operator[3, 1], operator[0, 2]], wanted, rtol=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("edges", [PAIRS_OF_3, UNEQUAL], ids=["pairs", "unequal"])
def test_propagation_matches_the_matrix_formula(edges, normalization, propagate, assert_slopes):
  weight_M, cotangent_EE = np.array([0.3, 1.7, 5.0]), _normal(0, 5, 5)
  operator, gradient_M = propagate(edges, weight_M, normalization, 5, cotangent_EE)
  # Experts 3 and 4 belong to no pair here; _feng gives them rows and columns of zeros.
  np.testing.assert_allclose(operator, _feng(edges, weight_M, normalization, 5), rtol=1e-5)
  assert_slopes(
    lambda w: np.sum(cotangent_EE * _feng(edges, w[0], normalization, 5)), [weight_M], [gradient_M]
  )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_expert_in_no_hyperedge_gets_nothing_and_gradients_stay_finite(propagate, normalization):
  operator, gradient_M = propagate(UNEQUAL, [2, 6, 4], normalization, 5, _normal(1, 5, 5))
  assert not operator[4].any() and not operator[:, 4].any()
  assert operator[:4].any(1).all()
  assert np.isfinite(gradient_M).all() and np.any(gradient_M)


def test_rows_of_the_row_form_sum_to_one(propagate, attend):
  plain, _ = propagate(UNEQUAL, [0.2, 6, 4], "row", 4, np.ones((4, 4), np.float32))
  np.testing.assert_allclose(plain.sum(1), 1, rtol=1e-6)
  score_EBT = 3 * _normal(2, 4, 2, 3)
  attended, _ = attend(UNEQUAL, [0.2, 6, 4], score_EBT, "row", np.ones((4, 4, 2, 3)))
  np.testing.assert_allclose(attended.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_attended_propagation_matches_loops(normalization, attend, assert_slopes):
  weight_M, score_EBT = np.array([0.3, 1.7, 5.0]), 2 * _normal(3, 5, 2, 3)
  cotangent = _normal(4, 5, 5, 2, 3)
  operator, gradients = attend(UNEQUAL, weight_M, score_EBT, normalization, cotangent)
  wanted = _attended(UNEQUAL, weight_M, score_EBT, normalization)
  np.testing.assert_allclose(operator, wanted, rtol=1e-5)
  assert_slopes(
    lambda a: np.sum(cotangent * _attended(UNEQUAL, *a, normalization)),
    (weight_M, score_EBT),
    gradients,
  )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_scores_attend_as_plain_propagation(normalization, propagate, attend):
  weight_M = [0.3, 1.7, 5.0]
  plain, _ = propagate(UNEQUAL, weight_M, normalization, 5, _normal(0, 5, 5))
  # The same score for all experts, another at every token.
  score_EBT = np.tile(_normal(5, 1, 2, 3), (5, 1, 1))
  attended, _ = attend(UNEQUAL, weight_M, score_EBT, normalization, _normal(4, 5, 5, 2, 3))
  wanted = np.broadcast_to(np.asarray(plain)[:, :, None, None], attended.shape)
  np.testing.assert_allclose(attended, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_order_of_hyperedges_and_names_of_experts_do_not_matter(normalization, propagate, attend):
  weight_M, cotangent, shuffle = np.array([0.3, 1.7, 5.0]), _normal(6, 5, 5), [2, 0, 1]
  plain, gradient_M = propagate(UNEQUAL, weight_M, normalization, 5, cotangent)
  # Other order of the hyperedges and of their members.
  shuffled = tuple(UNEQUAL[m][::-1] for m in shuffle)
  again, gradient_again_M = propagate(shuffled, weight_M[shuffle], normalization, 5, cotangent)
  np.testing.assert_allclose(again, plain, rtol=1e-6)
  np.testing.assert_allclose(gradient_again_M, gradient_M[np.array(shuffle)], rtol=1e-4)
  # Expert order[i] renamed i.
  order = np.array([3, 1, 4, 0, 2])
  renamed = tuple(tuple(int(np.argsort(order)[e]) for e in edge) for edge in UNEQUAL)
  again, gradient_again_M = propagate(
    renamed, weight_M, normalization, 5, cotangent[order][:, order]
  )
  np.testing.assert_allclose(again, plain[order][:, order], rtol=1e-6)
  np.testing.assert_allclose(gradient_again_M, gradient_M, rtol=1e-4)
  score_EBT, cotangent = _normal(7, 5, 1, 2), _normal(8, 5, 5, 1, 2)
  plain, gradients = attend(UNEQUAL, weight_M, score_EBT, normalization, cotangent)
  again, gradients_again = attend(
    renamed, weight_M, score_EBT[order], normalization, cotangent[order][:, order]
  )
  np.testing.assert_allclose(again, plain[order][:, order], rtol=1e-5)
  np.testing.assert_allclose(gradients_again[0], gradients[0], rtol=1e-4)
  np.testing.assert_allclose(gradients_again[1], gradients[1][order], rtol=1e-4, atol=1e-6)


def _edges(num_experts, hyperedges):
  return ModelConfig(num_experts=num_experts, hyperedges=hyperedges).hyperedge_list()


# E (E - 1) / 2 pairs and E (E - 1) (E - 2) / 6 triplets.
@pytest.mark.parametrize(
  ("num_experts", "pairs", "triplets"),
  [(2, 1, 0), (3, 3, 1), (4, 6, 4), (5, 10, 10), (6, 15, 20), (7, 21, 35), (8, 28, 56)],
)
def test_families_hold_every_pair_and_triplet_once(num_experts, pairs, triplets):
  families = {"pairs": pairs, "all": pairs + triplets} | (
    {"triplets": triplets} if triplets else {}
  )
  for name, count in families.items():
    edges = _edges(num_experts, name)
    assert len(edges) == len({frozenset(edge) for edge in edges}) == count
    assert {len(edge) for edge in edges} <= {"pairs": {2}, "triplets": {3}, "all": {2, 3}}[name]
    assert all(0 <= e < num_experts for edge in edges for e in edge)


def test_one_expert_has_no_hyperedges():
  assert _edges(1, "pairs") == _edges(1, "triplets") == _edges(1, "all") == ()


def test_explicit_list_is_kept_as_given():
  assert _edges(4, "[[3, 0], [1, 2, 3]]") == ((3, 0), (1, 2, 3))


@pytest.mark.parametrize(
  ("hyperedges", "cure"),
  [
    ("quads", "use pairs, triplets, all or a JSON list"),
    ("[[0,1],[1,2", "use pairs, triplets, all or a JSON list"),
    ("[]", "use pairs, triplets, all or a JSON list"),
    ('{"0": 1}', "use pairs, triplets, all or a JSON list"),
    ("[0, 1]", "use pairs, triplets, all or a JSON list"),
    ("[[0, 1.0]]", "use pairs, triplets, all or a JSON list"),
    ("[[0, true]]", "use pairs, triplets, all or a JSON list"),
    ("[[0, 1], [2]]", "give [2] two or more different experts"),
    ("[[0, 1], []]", "give [] two or more different experts"),
    ("[[1, 2, 1]]", "give [1, 2, 1] two or more different experts"),
    ("[[0, 1], [2, 4]]", "expert 4 of [2, 4] does not exist; experts are 0..3"),
    ("[[0, -1]]", "expert -1 of [0, -1] does not exist; experts are 0..3"),
  ],
)
def test_malformed_lists_are_refused_with_field_value_and_cure(hyperedges, cure):
  with pytest.raises(ConfigError) as caught:
    _edges(4, hyperedges)
  assert caught.value.field == "model.hyperedges" and caught.value.value == hyperedges
  assert cure in caught.value.cure and cure in str(caught.value)


def test_two_experts_have_no_triplets():
  with pytest.raises(ConfigError, match="hyperedges='triplets': 2 experts have none"):
    _edges(2, "triplets")
