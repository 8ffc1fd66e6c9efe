"""From a strength per layer to one per pair of experts: most where experts are most alike."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control.base import (
  ControlFlags,
  Controller,
  Observation,
  Strengths,
  require,
  require_count,
)
from hgnn_moe_jax.control.filters import Mean, exponential_mean


class PairwiseState(NamedTuple):
  """The state of the controller that sets the layers' strengths, and two smoothed overlaps.

  Attributes:
    layers: the wrapped controller's state.
    weight_overlap, output_overlap: Mean of [L, E, E].
  """

  layers: Any
  weight_overlap: Mean
  output_overlap: Mean

  @property
  def count(self) -> jax.Array:
    return self.layers.count


def pair_shares(overlap_LEE: jax.Array, emphasis: float) -> jax.Array:
  """Share of each pair in its layer's strength: `overlap^emphasis` over its mean over pairs.

  A power, because overlaps of weights and of outputs differ by orders of magnitude: only their
  ratios within a layer count.

  Args:
    overlap_LEE: symmetric, `[L, E, E]`, at least 0; the diagonal is not read.
    emphasis: at least 0; 0 gives 1 for every pair, 1 shares in proportion to the overlap.

  Returns:
    `[L, E, E]` float32, symmetric, at least 0, diagonal 0, mean 1 over the pairs of a layer: the
    penalty's scale stays what it was. 1 for every pair of a layer without any overlap. A single
    pair can have at most E (E - 1) / 2.
  """
  experts = overlap_LEE.shape[-1]
  pairs = max(experts * (experts - 1), 1)
  diagonal_LEE = jnp.broadcast_to(jnp.eye(experts, dtype=bool), overlap_LEE.shape)
  others_LEE = jnp.where(diagonal_LEE, 0.0, overlap_LEE)
  largest_L = jnp.max(others_LEE, axis=(-2, -1), keepdims=True)
  # Relative to the largest, so that no power of a small number underflows to 0 / 0. Subnormal
  # numbers count as none: most backends take them for 0.
  overlaps_L = largest_L >= jnp.finfo(jnp.float32).tiny
  relative_LEE = jnp.where(overlaps_L, others_LEE / jnp.where(overlaps_L, largest_L, 1.0), 1.0)
  powers_LEE = jnp.where(diagonal_LEE, 0.0, jnp.power(relative_LEE, emphasis))
  total_L = jnp.sum(powers_LEE, axis=(-2, -1), keepdims=True)
  return powers_LEE * (pairs / jnp.maximum(total_L, 1.0))


def pairwise(
  controller: Controller,
  num_layers: int,
  num_experts: int,
  emphasis: float,
  smoothing: int = 10,
) -> Controller:
  """`strength_lij(t) = strength_l(t) share_lij(t)`, the shares by `pair_shares`.

  The wrapped controller decides how strong a layer's constraint is; this one, on which pairs it
  acts. The mean over pairs is the layer's strength, so its bounds hold for the mean and not for a
  single pair.

  Args:
    controller: any; observes what this one observes.
    num_layers: L, at least 1.
    num_experts: E, at least 1.
    emphasis: above 0, finite; see `pair_shares`.
    smoothing: time constant of the mean over the last overlaps, in steps, at least 1.

  Returns:
    A Controller whose state is a PairwiseState. Its observations must hold both overlaps.

  Raises:
    ValueError: a parameter is outside its range.
  """
  require_count("num_layers", num_layers, at_least=1)
  require_count("num_experts", num_experts, at_least=1)
  require("emphasis", emphasis, 0.0 < emphasis < math.inf, "finite and above 0")
  mean = exponential_mean((num_layers, num_experts, num_experts), smoothing)

  def init() -> PairwiseState:
    return PairwiseState(controller.init(), mean.init(), mean.init())

  def strengths(state: PairwiseState) -> Strengths:
    share = lambda m: jax.lax.stop_gradient(pair_shares(m.value, emphasis))  # noqa: E731
    return controller.strengths(state.layers)._replace(
      weight_pairs_LEE=share(state.weight_overlap), output_pairs_LEE=share(state.output_overlap)
    )

  def update(state: PairwiseState, observation: Observation) -> PairwiseState:
    weight_LEE, output_LEE = observation.weight_overlap_LEE, observation.output_overlap_LEE
    if weight_LEE is None or output_LEE is None:
      raise ValueError("pairwise needs weight_overlap_LEE and output_overlap_LEE observed")
    return PairwiseState(
      controller.update(state.layers, observation),
      mean.update(state.weight_overlap, weight_LEE),
      mean.update(state.output_overlap, output_LEE),
    )

  def flags(state: PairwiseState) -> ControlFlags:
    return controller.flags(state.layers)

  def observe_evaluation(state: PairwiseState, loss: jax.Array | float) -> PairwiseState:
    return state._replace(layers=controller.observe_evaluation(state.layers, loss))

  return Controller(init, strengths, update, flags, observe_evaluation)
