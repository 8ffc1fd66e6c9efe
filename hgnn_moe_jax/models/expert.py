"""The experts of one layer: E whole pre-LN transformer blocks, all fed the same x.

Their parameters are stacked on a leading axis E and drawn independently. Because every expert
reads the same x, the statistics of the first normalisation are computed once, each expert's gain
and bias are folded into its projection, and queries, keys and values of all experts come out of a
single matrix product.

All experts attend to all tokens. With a `routing.Route` only those that a token has chosen feed it
forward: about half of a layer's multiplications are there.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hgnn_moe_jax import device
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.layout import constrain, each_device, shards
from hgnn_moe_jax.models import attention, attention_kernels, token_groups
from hgnn_moe_jax.models.attention import KeyValueCache
from hgnn_moe_jax.models.layers import (
  add_to_all,
  dropout,
  fan_in_normal,
  gelu,
  named,
  normalize,
  project_all,
  project_each,
  spread,
)
from hgnn_moe_jax.models.routing import Route
from hgnn_moe_jax.token_sums import on_tokens


class ExpertBlocks(nn.Module):
  """x_BTD -> updates_EBTD, what each expert's block would add to x: its output minus x.

  Block e: a = Attention_e(LN_e(x)); f = FFN_e(LN'_e(x + a)); update = a + f, with dropout on a
  and f, biases everywhere and tanh-approximated GELU (Hendrycks and Gimpel 2016). With a route, f
  is multiplied with its factor, and 0 without being computed for experts that are not chosen.

  Attributes:
    config: the model's.
    dtype: compute dtype; parameters are float32.
  """

  config: ModelConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    position_BT: jax.Array,
    keys: tuple[jax.Array, jax.Array] | None,
    cache: KeyValueCache | None = None,
    route: Route | None = None,
  ) -> tuple[jax.Array, KeyValueCache | None]:
    """The updates, and the cache with these tokens.

    Args:
      x_BTD: float32.
      position_BT: int32, each token's place in its row; [1, T] if the same for all rows.
      keys: for the two dropouts, or None for none.
      cache: of the tokens before these, with G = E N heads; None if there are none before and
        nothing is to be remembered.
      route: each token's experts; None for all of them.
    """
    attention_key, ffn_key = keys if keys is not None else (None, None)
    attended_EBTD, cache = self._attention(x_BTD, position_BT, cache)
    attended_EBTD = dropout(attended_EBTD, self.config.dropout, attention_key)
    stream_EBTD = spread(x_BTD, self.config.num_experts) + attended_EBTD.astype(jnp.float32)
    hidden_EBTD = normalize(stream_EBTD).astype(self.dtype)
    fed_EBTD = dropout(self._ffn(hidden_EBTD, route), self.config.dropout, ffn_key)
    return constrain(attended_EBTD + fed_EBTD, "expert", "data", None, None), cache

  def _attention(
    self, x_BTD: jax.Array, position_BT: jax.Array, cache: KeyValueCache | None
  ) -> tuple[jax.Array, KeyValueCache | None]:
    c = self.config
    E, D, N = c.num_experts, c.embed_dim, c.num_heads
    H = D // N
    norm_scale_ED = self.param(
      "attention_norm_scale", named(nn.initializers.ones, "expert", "embed"), (E, D)
    )
    norm_bias_ED = self.param(
      "attention_norm_bias", named(nn.initializers.zeros, "expert", "embed"), (E, D)
    )
    kernel = self.param(
      "qkv_kernel", named(fan_in_normal(D), "expert", "embed", None, "heads", None), (E, D, 3, N, H)
    )
    bias = self.param(
      "qkv_bias", named(nn.initializers.zeros, "expert", None, "heads", None), (E, 3, N, H)
    )
    bias_ESNH = bias + jnp.einsum("ED,EDSNH->ESNH", norm_bias_ED, kernel)
    kernel = (kernel * norm_scale_ED[:, :, None, None, None]).astype(self.dtype)
    kernel_DESNH = jnp.einsum("EDSNH->DESNH", kernel)
    B, T = x_BTD.shape[:2]
    qkv_BTESNH = project_all(normalize(x_BTD).astype(self.dtype), kernel_DESNH)
    # cuDNN's attention takes whole rows only, and tokens are split before this and behind it.
    qkv_BTESNH = constrain(qkv_BTESNH, "data", None, "expert", None, "model", None)
    mixed_EBTNH, cache = self._mix(qkv_BTESNH, bias_ESNH, position_BT, cache)
    out_EXD = self.param(
      "out_kernel",
      named(fan_in_normal(N * H, self._residual_gain), "expert", "heads", "embed"),
      (E, N * H, D),
    )
    out_bias_ED = self.param("out_bias", named(nn.initializers.zeros, "expert", "embed"), (E, D))
    attended_EBTD = project_each(mixed_EBTNH.reshape(E, B, T, N * H), out_EXD)
    return attended_EBTD + on_tokens(out_bias_ED, (B, T), 1, self.dtype), cache

  def _mix(
    self,
    qkv_BTESNH: jax.Array,
    bias_ESNH: jax.Array,
    position_BT: jax.Array,
    cache: KeyValueCache | None,
  ) -> tuple[jax.Array, KeyValueCache | None]:
    """Every head's mixture of values, [E, B, T, N, H], and the cache."""
    rotary, E = self.config.positions == "rotary", self.config.num_experts
    if cache is None and not rotary and _takes_kernels(qkv_BTESNH):
      return attention_kernels.causal_attention(qkv_BTESNH, bias_ESNH), None
    qkv_BTESNH = add_to_all(qkv_BTESNH, bias_ESNH)
    q, k, v = (_merge_heads(part.squeeze(3)) for part in jnp.split(qkv_BTESNH, 3, axis=3))
    if rotary:
      q, k = attention.rotate(q, position_BT), attention.rotate(k, position_BT)
    if cache is None:
      mixed_BTGH = attention.causal_attention(q, k, v)
    else:
      mixed_BTGH, cache = attention.cached_attention(q, k, v, cache, position_BT)
    return jnp.moveaxis(_split_heads(mixed_BTGH, E), 2, 0), cache

  def _ffn(self, hidden_EBTD: jax.Array, route: Route | None) -> jax.Array:
    """hidden_EBTD: normalised, without gain and bias, which are folded into the first kernel."""
    c = self.config
    E, D, F = c.num_experts, c.embed_dim, c.ffn_multiplier * c.embed_dim
    norm_scale_ED = self.param(
      "ffn_norm_scale", named(nn.initializers.ones, "expert", "embed"), (E, D)
    )
    norm_bias_ED = self.param(
      "ffn_norm_bias", named(nn.initializers.zeros, "expert", "embed"), (E, D)
    )
    kernel_EDF = self.param(
      "ffn_in_kernel", named(fan_in_normal(D), "expert", "embed", "hidden"), (E, D, F)
    )
    bias_EF = self.param("ffn_in_bias", named(nn.initializers.zeros, "expert", "hidden"), (E, F))
    out_EFD = self.param(
      "ffn_out_kernel",
      named(fan_in_normal(F, self._residual_gain), "expert", "hidden", "embed"),
      (E, F, D),
    )
    out_bias_ED = self.param(
      "ffn_out_bias", named(nn.initializers.zeros, "expert", "embed"), (E, D)
    )
    bias_EF = bias_EF + jnp.einsum("ED,EDF->EF", norm_bias_ED, kernel_EDF)
    kernel_EDF = kernel_EDF * norm_scale_ED[:, :, None]
    network = FeedForward(kernel_EDF, bias_EF, out_EFD, out_bias_ED)
    if route is None:
      return _feed_all(network, hidden_EBTD)
    return _feed_chosen(network, hidden_EBTD, route, c.selected_experts)

  @property
  def _residual_gain(self) -> float:
    """Two updates a layer are added to the stream; this keeps its variance from growing with L."""
    return (2 * self.config.num_layers) ** -0.5


def _takes_kernels(qkv_BTESNH: jax.Array) -> bool:
  return attention_kernels.fits(qkv_BTESNH) and device.has_hopper_kernels()


def _merge_heads(x_BTENH: jax.Array) -> jax.Array:
  """The heads of all experts, [B, T, G, H], G = E N: a device's lie side by side.

  In their plain order those of a device that has some of the experts and some of each one's heads
  would lie apart, and merging the two axes would move them all.
  """
  B, T, E, N, H = x_BTENH.shape
  e, n = shards("expert"), shards("model")
  x = x_BTENH.reshape(B, T, e, E // e, n, N // n, H).swapaxes(3, 4)
  return x.reshape(B, T, E * N, H)


def _split_heads(x_BTGH: jax.Array, num_experts: int) -> jax.Array:
  """[B, T, E, N, H]: undoes `_merge_heads`."""
  B, T, G, H = x_BTGH.shape
  e, n, E = shards("expert"), shards("model"), num_experts
  x = x_BTGH.reshape(B, T, e, n, E // e, G // E // n, H).swapaxes(3, 4)
  return x.reshape(B, T, E, G // E, H)


class FeedForward(NamedTuple):
  """The experts' two layers; the first one's input is normalised."""

  in_EDF: jax.Array
  in_bias_EF: jax.Array
  out_EFD: jax.Array
  out_bias_ED: jax.Array


def _feed_all(network: FeedForward, hidden_EBTD: jax.Array) -> jax.Array:
  """Every token through every expert: [E, B, T, D]."""
  tokens, dtype = hidden_EBTD.shape[1:3], hidden_EBTD.dtype
  inner_EBTF = project_each(hidden_EBTD, network.in_EDF)
  inner_EBTF = gelu(inner_EBTF + on_tokens(network.in_bias_EF, tokens, 1, dtype))
  outer_EBTD = project_each(inner_EBTF, network.out_EFD)
  return outer_EBTD + on_tokens(network.out_bias_ED, tokens, 1, dtype)


def _feed_chosen(
  network: FeedForward, hidden_EBTD: jax.Array, route: Route, selected: int
) -> jax.Array:
  """Every token through its chosen experts, times their factors: [E, B, T, D], mostly zeros.

  On a mesh each device sorts its rows' tokens by its own experts, and feeds those through its part
  of the hidden width. It has room for all tokens to choose its experts, so that none is dropped.
  """
  dtype, parts = hidden_EBTD.dtype, shards("model")
  # Rows that cannot be divided, of which evaluation may have some, are fed by every device.
  rows = "data" if hidden_EBTD.shape[1] % shards("data") == 0 else None

  def own(network: FeedForward, hidden_EBTD: jax.Array, chosen_EBT: jax.Array) -> jax.Array:
    E, _, _, D = hidden_EBTD.shape
    groups = token_groups.group(chosen_EBT.reshape(E, -1), min(selected, E))
    in_GDF, bias_GF, out_GFD, out_bias_GD = map(groups.of_block, network)
    places_GSD = groups.gather(hidden_EBTD.reshape(E, -1, D))
    places = places_GSD.shape[1:2]
    inner_GSF = jnp.einsum("GSD,GDF->GSF", places_GSD, in_GDF)
    inner_GSF = gelu(inner_GSF + on_tokens(bias_GF, places, 1, dtype))
    outer_GSD = jnp.einsum("GSF,GFD->GSD", inner_GSF, out_GFD)
    if parts > 1:
      outer_GSD = jax.lax.psum(outer_GSD, "model")
    fed_END = groups.scatter(outer_GSD + on_tokens(out_bias_GD, places, 1, dtype), E)
    return fed_END.reshape(hidden_EBTD.shape)

  chosen_EBT = jnp.moveaxis(route.chosen_BTE, -1, 0)
  vectors, choices = PartitionSpec("expert", rows, None, None), PartitionSpec("expert", rows, None)
  matrices = FeedForward._make(
    PartitionSpec("expert", *axes) for axes in ((None, "model"), ("model",), ("model", None), ())
  )
  # Rounded before a device gathers what others have of them.
  network = network._replace(
    in_EDF=network.in_EDF.astype(dtype), out_EFD=network.out_EFD.astype(dtype)
  )
  fed_EBTD = each_device(own, (matrices, vectors, choices), vectors)(
    network, hidden_EBTD, chosen_EBT
  )
  factor_EBT = jnp.moveaxis(route.factor_BTE, -1, 0).astype(dtype)
  return fed_EBTD * factor_EBT[..., None]
