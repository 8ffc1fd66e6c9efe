"""Pooling over experts: one update per token out of E."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models.layers import LayerNorm, expert_mean, named


class Pool(nn.Module):
  """y_EBTD -> (z_BTD, gate_BTE): the experts' weighted mean, gates non-negative with sum 1.

  "mean" gives every expert 1/E. "gate" is a softmax over experts of a linear map of LN(x), the
  layer's input; it starts at zero, that is as the mean.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, y_EBTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    E, (B, T, D) = y_EBTD.shape[0], x_BTD.shape
    if self.config.pooling == "mean" or E == 1:
      return expert_mean(y_EBTD), jnp.full((B, T, E), 1 / E)
    kernel_DE = self.param("gate_kernel", named(nn.initializers.zeros, "embed", None), (D, E))
    gate_BTE = jax.nn.softmax(LayerNorm(name="norm")(x_BTD) @ kernel_DE, axis=-1)
    pooled_BTD = jnp.einsum(
      "EBTD,BTE->BTD", y_EBTD, gate_BTE.astype(y_EBTD.dtype), preferred_element_type=jnp.float32
    )
    return pooled_BTD, gate_BTE
