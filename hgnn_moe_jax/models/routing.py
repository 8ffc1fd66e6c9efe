"""Which experts a token goes to, and one update per token out of theirs."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.layout import constrain, everywhere
from hgnn_moe_jax.models.layers import LayerNorm, expert_mean, fan_in_normal, named, normalize


class Route(NamedTuple):
  """The experts whose feed-forward networks read each token.

  Attributes:
    chosen_BTE: bool, K of E for every token.
    factor_BTE: float32, what the chosen ones' results are multiplied with, and 0 for all others.
    load_E: float32, each expert's share of the valid tokens' choices.
    balance: float32 scalar, `E sum_e load_e p_e` with p_e the mean probability of e (Fedus et al.
      2021, arXiv 2101.03961, equation 4): 1 if even, up to E / K if all choose the same.
  """

  chosen_BTE: jax.Array
  factor_BTE: jax.Array
  load_E: jax.Array
  balance: jax.Array


class Router(nn.Module):
  """x_BTD -> Route: the K experts of the highest probability p = softmax(normalize(x) W).

  A chosen expert's result counts E p times, so that the mean over experts is the sum of p_e f_e of
  Fedus et al. (2021), and an untrained router's factors are about 1. Float32 throughout: rounding
  must not decide who is chosen.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, weights_BT: jax.Array) -> Route:
    c = self.config
    E, D = c.num_experts, c.embed_dim
    kernel_DE = self.param("router_kernel", named(fan_in_normal(D), "embed", None), (D, E))
    logits_BTE = jnp.matmul(normalize(x_BTD), kernel_DE, precision=jax.lax.Precision.HIGHEST)
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    _, best_BTK = jax.lax.top_k(logits_BTE, c.selected_experts)
    chosen_BTE = (best_BTK[..., None] == jnp.arange(E)[None, None, None]).any(2)
    share_BT = weights_BT / jnp.maximum(weights_BT.sum(), 1.0)
    load_E = jnp.einsum("BTE,BT->E", chosen_BTE.astype(jnp.float32), share_BT) / c.selected_experts
    mean_E = jnp.einsum("BTE,BT->E", probability_BTE, share_BT)
    factor_BTE = everywhere(jnp.where(chosen_BTE, E * probability_BTE, 0.0))
    # Whole rows wherever there are experts: from a split over tokens to one over experts the
    # partitioner knows no way but to bring everything everywhere.
    chosen_BTE = constrain(chosen_BTE, "data", None, None)
    return Route(chosen_BTE, factor_BTE, load_E, E * jnp.dot(load_E, mean_E))


class Pool(nn.Module):
  """x_BTD -> (gate_BTE, pool): pool(y_EBTD) = z_BTD float32 is the experts' weighted mean.

  Gates are non-negative with sum 1. "mean" gives every expert 1/E. "gate" is a softmax over experts
  of a linear map of LN(x), the layer's input; it starts at zero, that is as the mean.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    E, (B, T, D) = self.config.num_experts, x_BTD.shape
    if self.config.pooling == "mean" or E == 1:
      return jnp.full((B, T, E), 1 / E), expert_mean
    kernel_DE = self.param("gate_kernel", named(nn.initializers.zeros, "embed", None), (D, E))
    gate_BTE = jax.nn.softmax(LayerNorm(name="norm")(x_BTD) @ kernel_DE, axis=-1)

    def pool(y_EBTD: jax.Array) -> jax.Array:
      gate = gate_BTE.astype(y_EBTD.dtype)
      return jnp.einsum("EBTD,BTE->BTD", y_EBTD, gate, preferred_element_type=jnp.float32)

    return gate_BTE, pool
