"""Tokens sorted by expert: the products of a sparse layer without a token more than needed.

No token is dropped: which experts a token goes to depends on this token alone, and not, as with a
capacity per expert (Fedus et al. 2021, arXiv 2101.03961), on those before it in the batch. Groups
differ in size, arrays do not: each expert's tokens fill blocks of S, the last of them with empty
places, so that any choice fits into the same number of blocks (as in MegaBlocks, Gale et al. 2022,
arXiv 2211.15841).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEAST, _MOST = 8, 256  # tokens in a block; a block brings its expert's matrices along


class TokenGroups(NamedTuple):
  """G blocks of S places for the chosen pairs of E experts and N tokens.

  Attributes:
    place_X: int32 [E N], each pair's place; G S if it has not been chosen.
    pair_Y: int32 [G S], the pair in each place, expert times N plus token; E N in empty ones.
    expert_G: int32 [G], whose tokens a block holds; any expert's if it is empty.
  """

  place_X: jax.Array
  pair_Y: jax.Array
  expert_G: jax.Array

  def gather(self, x_END: jax.Array) -> jax.Array:
    """The chosen pairs' vectors in their places, zeros in empty ones: [G, S, D]."""
    moved_YD = _move(x_END.reshape(-1, x_END.shape[-1]), self.pair_Y, self.place_X)
    return moved_YD.reshape(*self.expert_G.shape, -1, x_END.shape[-1])

  def scatter(self, x_GSD: jax.Array, num_experts: int) -> jax.Array:
    """Back to [E, N, D]; zeros for pairs that have not been chosen."""
    moved_XD = _move(x_GSD.reshape(-1, x_GSD.shape[-1]), self.place_X, self.pair_Y)
    return moved_XD.reshape(num_experts, -1, x_GSD.shape[-1])

  def of_block(self, weights: jax.Array) -> jax.Array:
    """Each block's part of something with a leading axis E: [G, ...]. Gradients are added up in
    float32."""
    return _of_block(weights, self.expert_G)


def group(chosen_EN: jax.Array, selected: int) -> TokenGroups:
  """Sorts the chosen pairs by expert, in the tokens' order.

  Args:
    chosen_EN: bool [E, N]; every token has chosen at most `selected` experts.
    selected: K, which decides how many blocks there are.
  """
  E, N = chosen_EN.shape
  size = block_size(E, N, selected)
  blocks = (N * selected + E * (size - 1)) // size
  count_E = chosen_EN.sum(1, dtype=jnp.int32)
  end_E = jnp.cumsum(-(-count_E // size))  # One past the last of each expert's blocks.
  first_E = end_E - -(-count_E // size)
  rank_EN = jnp.cumsum(chosen_EN, axis=1, dtype=jnp.int32) - 1
  place_EN = jnp.where(chosen_EN, first_E[:, None] * size + rank_EN, blocks * size)
  place_X = place_EN.reshape(-1)
  nobody_Y = jnp.full(blocks * size, E * N, jnp.int32)
  pair_Y = nobody_Y.at[place_X].set(jnp.arange(E * N, dtype=jnp.int32), mode="drop")
  block_G = jnp.arange(blocks, dtype=jnp.int32)
  # By default it is a loop, which cuts a GPU's CUDA graph in every layer.
  expert_G = jnp.searchsorted(end_E, block_G, side="right", method="compare_all")
  return TokenGroups(place_X, pair_Y, jnp.minimum(expert_G, E - 1))


def block_size(num_experts: int, num_tokens: int, selected: int) -> int:
  """S: a power of two, about a quarter of an expert's tokens if they are shared out evenly.

  Then about an eighth of the places is empty. Larger blocks load an expert's matrices less often.
  """
  quarter = max(1, num_tokens * selected // (4 * num_experts))
  size = min(_MOST, max(_LEAST, 1 << quarter.bit_length() - 1))
  return min(size, num_tokens * selected)


@jax.custom_vjp
def _of_block(weights: jax.Array, expert_G: jax.Array) -> jax.Array:
  return weights.at[expert_G].get(mode="promise_in_bounds", indices_are_sorted=True)


def _of_block_forward(weights, expert_G):
  # The zeros tell the gradient's shape and dtype: what is kept has to be arrays.
  return _of_block(weights, expert_G), (jnp.zeros((weights.shape[0], 0), weights.dtype), expert_G)


def _of_block_backward(kept, grad):
  like, expert_G = kept
  total = jnp.zeros((like.shape[0], *grad.shape[1:]), jnp.float32)
  total = total.at[expert_G].add(
    grad.astype(jnp.float32), mode="promise_in_bounds", indices_are_sorted=True
  )
  return total.astype(like.dtype), None


_of_block.defvjp(_of_block_forward, _of_block_backward)


@jax.custom_vjp
def _move(x_XD: jax.Array, source_Y: jax.Array, target_X: jax.Array) -> jax.Array:
  """Rows source_Y of x, zeros where there is no such row; row i of x goes to target_X[i].

  The two say the same, so that the gradient is made by reading, too: adding rows up at given places
  is slow.
  """
  del target_X
  return x_XD.at[source_Y].get(mode="fill", fill_value=0)


def _move_forward(x_XD, source_Y, target_X):
  return _move(x_XD, source_Y, target_X), (source_Y, target_X)


def _move_backward(places, grad_YD):
  source_Y, target_X = places
  return _move(grad_YD, target_X, source_Y), None, None


_move.defvjp(_move_forward, _move_backward)
