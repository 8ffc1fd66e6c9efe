"""Hypergraph of experts: which experts exchange messages. Static structure in numpy.

E experts are the nodes, M hyperedges join two or more of them. The propagation operator of a
hypergraph convolution acts on the expert axis alone, so it is an E x E matrix per layer however
many tokens there are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def incidence(hyperedges: Sequence[Sequence[int]], num_experts: int) -> np.ndarray:
  """Incidence matrix H_EM [E, M] float32: 1 where expert e belongs to hyperedge m, else 0."""
  incidence_EM = np.zeros((num_experts, len(hyperedges)), np.float32)
  for m, edge in enumerate(hyperedges):
    incidence_EM[list(edge), m] = 1.0
  return incidence_EM


def _inverse_power(degree: jax.Array, power: float) -> jax.Array:
  """degree**-power, and 0 where the degree is 0: an expert in no hyperedge receives nothing."""
  return jnp.where(degree > 0, jnp.where(degree > 0, degree, 1.0) ** -power, 0.0)


def propagation(incidence_EM: np.ndarray, weight_M: jax.Array, normalization: str) -> jax.Array:
  """The E x E operator of a hypergraph convolution; float32.

  With D_v = diag(H w) and D_e = diag(H^T 1), Feng et al. 2019 (arXiv 1809.09401, eq. 11) use
    symmetric:  D_v^-1/2 H W D_e^-1 H^T D_v^-1/2
    row:        D_v^-1   H W D_e^-1 H^T            (rows sum to 1)
  The weights w enter W and the degrees D_v alike.

  Args:
    incidence_EM: [E, M], 0 or 1.
    weight_M: [M], positive.
    normalization: "symmetric" or "row".
  """
  left_EM, right_ME = half_operators(incidence_EM, weight_M, normalization)
  size_M = incidence_EM.sum(0)
  return left_EM @ (right_ME / size_M[:, None])


def half_operators(
  incidence_EM: np.ndarray, weight_M: jax.Array, normalization: str
) -> tuple[jax.Array, jax.Array]:
  """The operator's two halves without D_e^-1: (D_v^-a H W) [E, M] and (H^T D_v^-b) [M, E]."""
  members_EM = jnp.asarray(incidence_EM)
  degree_E = members_EM @ weight_M
  if normalization == "symmetric":
    scale_E = _inverse_power(degree_E, 0.5)
    return scale_E[:, None] * members_EM * weight_M[None], members_EM.T * scale_E[None]
  scale_E = _inverse_power(degree_E, 1.0)
  return scale_E[:, None] * members_EM * weight_M[None], members_EM.T


def membership_slots(hyperedges: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Hyperedges as a table: member_MK [M, K] expert ids and present_MK [M, K] bool, K the largest.

  Attention inside hyperedges works on these slots, because a dense [M, E] table would hold
  E / K times more.
  """
  width = max(len(edge) for edge in hyperedges)
  member_MK = np.zeros((len(hyperedges), width), np.int32)
  present_MK = np.zeros((len(hyperedges), width), bool)
  for m, edge in enumerate(hyperedges):
    member_MK[m, : len(edge)] = edge
    present_MK[m, : len(edge)] = True
  return member_MK, present_MK


def attended_propagation(
  hyperedges: Sequence[Sequence[int]],
  weight_M: jax.Array,
  score_EBT: jax.Array,
  normalization: str,
) -> jax.Array:
  """The operator with a softmax over each hyperedge's members in place of D_e^-1, token by token.

  A member's share in its hyperedge is softmax of its score among the members; equal scores give
  `propagation`. No array with the model axis is made: the result is [E, E, B, T] float32.

  Args:
    hyperedges: M tuples of experts.
    weight_M: [M], positive.
    score_EBT: [E, B, T] float32, how much each expert has to say at each token.
    normalization: "symmetric" or "row".
  """
  num_experts = score_EBT.shape[0]
  incidence_EM = incidence(hyperedges, num_experts)
  left_EM, right_ME = half_operators(incidence_EM, weight_M, normalization)
  member_MK, present_MK = membership_slots(hyperedges)
  present_MK11 = present_MK[:, :, None, None]
  score_MKBT = jnp.where(present_MK11, score_EBT[member_MK], -jnp.inf)
  share_MKBT = jax.nn.softmax(score_MKBT, axis=1)
  edge_M1 = np.arange(len(hyperedges))[:, None]
  left_MK = jnp.where(present_MK, left_EM.T[edge_M1, member_MK], 0.0)
  right_MK = jnp.where(present_MK, right_ME[edge_M1, member_MK], 0.0)
  share_MKBT = share_MKBT * right_MK[:, :, None, None]
  # One contribution per hyperedge, receiver and sender, summed into its (receiver, sender) cell.
  contribution = left_MK[:, :, None, None, None] * share_MKBT[:, None]
  cell_MKK = member_MK[:, :, None] * num_experts + member_MK[:, None, :]
  flat = jax.ops.segment_sum(
    contribution.reshape(-1, *score_EBT.shape[1:]), cell_MKK.reshape(-1), num_experts**2
  )
  return flat.reshape(num_experts, num_experts, *score_EBT.shape[1:])
