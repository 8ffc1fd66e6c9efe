"""Couplers: how the experts of a layer exchange messages about each token.

A coupler maps the experts' updates y_EBTD to y_EBTD, token by token: it contracts the expert and
the model axis only, so no token can see another one. Each of its layers is
  y + GELU(message) W_out,   message_i = sum_j P_ij h_j W_in,   h = LayerNorm(y),
and the couplers differ in the operator P over experts. W_in, W_out and the normalisation are
shared by the experts; what belongs to single experts (adjacency, mixing matrix, hyperedge weights)
is permuted with them, so relabelling the experts changes nothing.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hgnn_moe_jax import extensions, token_products
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.layout import in_order, token_axes
from hgnn_moe_jax.models import hypergraph
from hgnn_moe_jax.models.layers import LayerNorm, fan_in_normal, gelu, named, project, scores

# softplus(_ONE) = 1: learned positive weights start at 1.
_ONE = 0.5413248546129181


def _mix(operator: jax.Array, h_EBTD: jax.Array) -> jax.Array:
  """sum_j P_ij h_j with P either [E, E] or, token by token, [E, E, B, T]."""
  operator = operator.astype(h_EBTD.dtype)
  if operator.ndim == 2:
    return jnp.einsum("ij,jBTD->iBTD", operator, h_EBTD)
  return token_products.mix(operator, h_EBTD)


def _in_rows(x_EBTD: jax.Array) -> jax.Array:
  """x, and what is made of it entry by entry, laid out on GPUs in the order of its axes.

  XLA's layouts for products of many experts' vectors reach far: GELU came out with experts last, in
  float32 and in three parts.
  """
  over = token_axes(*x_EBTD.shape[1:3])
  if over is None or not token_products.by_matrices(x_EBTD):
    return x_EBTD
  return in_order(x_EBTD, PartitionSpec(None, *over, None))


class GraphOperator(nn.Module):
  """P_ij(t) = A_ij sigmoid(r_i(t) + s_j(t)) / sum_j A_ij for i != j, and 0 for i = j.

  A is a learned positive adjacency, receiver by sender. The content gate of a pair is separable:
  one score per expert as receiver and one as sender, so no array over pairs has a model axis. The
  degree is that of A alone: a closed gate silences a sender instead of amplifying the others.
  """

  @nn.compact
  def __call__(self, h_EBTD: jax.Array) -> jax.Array:
    E, D = h_EBTD.shape[0], h_EBTD.shape[-1]
    adjacency_EE = jax.nn.softplus(
      self.param("adjacency", named(nn.initializers.constant(_ONE), None, None), (E, E))
    ) * (1 - jnp.eye(E))
    gate_DX = self.param("gate_kernel", named(fan_in_normal(D), "embed", None), (D, 2))
    gate_bias = self.param("gate_bias", nn.initializers.zeros, ())
    receiver_EBT, sender_EBT = scores(h_EBTD, gate_DX)
    share_EE = adjacency_EE / adjacency_EE.sum(1, keepdims=True)
    if not token_products.by_matrices(h_EBTD):
      gate_EEBT = jax.nn.sigmoid(receiver_EBT[:, None] + sender_EBT[None] + gate_bias)
      return share_EE[:, :, None, None] * gate_EEBT
    # With tokens first, as the products of matrices read it: XLA would transpose E^2 numbers for
    # every token.
    receiver_BTE, sender_BTE = (jnp.moveaxis(s, 0, -1) for s in (receiver_EBT, sender_EBT))
    gate_BTEE = jax.nn.sigmoid(receiver_BTE[..., None] + sender_BTE[..., None, :] + gate_bias)
    return jnp.moveaxis(share_EE[None, None] * gate_BTEE, (2, 3), (0, 1))


class HypergraphOperator(nn.Module):
  """P of a hypergraph convolution (Feng et al. 2019); see `hypergraph.propagation`.

  Hyperedge weights are learned and positive. With `attention`, the members of a hyperedge share
  it by content, token by token, instead of equally.
  """

  hyperedges: tuple[tuple[int, ...], ...]
  normalization: str
  attention: bool

  @nn.compact
  def __call__(self, h_EBTD: jax.Array) -> jax.Array:
    weight_M = jax.nn.softplus(
      self.param(
        "hyperedge_weight", named(nn.initializers.constant(_ONE), None), (len(self.hyperedges),)
      )
    )
    if not self.attention:
      incidence_EM = hypergraph.incidence(self.hyperedges, h_EBTD.shape[0])
      return hypergraph.propagation(incidence_EM, weight_M, self.normalization)
    D = h_EBTD.shape[-1]
    score_D = self.param("score_kernel", named(fan_in_normal(D), "embed"), (D,))
    (score_EBT,) = scores(h_EBTD, score_D[:, None])
    return hypergraph.attended_propagation(self.hyperedges, weight_M, score_EBT, self.normalization)


class MatrixOperator(nn.Module):
  """P is a learned E x E matrix with a zero diagonal, the same for all tokens.

  The control for content-dependent couplers. It starts at 1 / (E - 1): the mean of the others.
  """

  @nn.compact
  def __call__(self, h_EBTD: jax.Array) -> jax.Array:
    E = h_EBTD.shape[0]
    mixing_EE = self.param(
      "mixing", named(nn.initializers.constant(1 / (E - 1)), None, None), (E, E)
    )
    return mixing_EE * (1 - jnp.eye(E))


class AttentionOperator(nn.Module):
  """P(t) = softmax over senders of q_i(t) k_j(t) / sqrt(D): attention over experts, one head."""

  @nn.compact
  def __call__(self, h_EBTD: jax.Array) -> jax.Array:
    D = h_EBTD.shape[-1]
    query_EBTD = project(
      h_EBTD, self.param("query_kernel", named(fan_in_normal(D), "embed", None), (D, D))
    )
    key_EBTD = project(
      h_EBTD, self.param("key_kernel", named(fan_in_normal(D), "embed", None), (D, D))
    )
    score_EEBT = token_products.products(query_EBTD, key_EBTD)
    return jax.nn.softmax(score_EEBT * D**-0.5, axis=1)


def make_operator(config: ModelConfig, name: str) -> nn.Module:
  """The operator over experts that `config.coupler` names: h_EBTD -> P, `[E, E]` or `[E, E, B, T]`.

  Raises KeyError for "mean", ConfigError for an import path that cannot be imported.
  """
  if extensions.is_path(config.coupler):
    return extensions.load("model.coupler", config.coupler)(config, name=name)
  return {
    "graph": lambda: GraphOperator(name=name),
    "hypergraph": lambda: HypergraphOperator(
      config.hyperedge_list(),
      config.hypergraph_normalization,
      config.hyperedge_attention,
      name=name,
    ),
    "matrix": lambda: MatrixOperator(name=name),
    "attention": lambda: AttentionOperator(name=name),
  }[config.coupler]()


def _check_operator(coupler: str, shape: tuple[int, ...], shape_EBTD: tuple[int, ...]) -> None:
  """Raises ConfigError for an operator of one's own that is neither [E, E] nor [E, E, B, T]."""
  E, B, T, _ = shape_EBTD
  if shape not in ((E, E), (E, E, B, T)):
    raise ConfigError(
      "model.coupler",
      coupler,
      f"its operator has the shape {list(shape)}; make it [E, E] or, by token, [E, E, B, T], here "
      f"{[E, E]} or {[E, E, B, T]}",
    )


class Coupler(nn.Module):
  """`config.coupler_layers` rounds of messages: y_EBTD -> y_EBTD, or what `pool` makes of it.

  With `coupler="mean"`, or a single expert, there are no messages and no parameters.
  """

  config: ModelConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, y_EBTD: jax.Array, pool: Callable[[jax.Array], jax.Array] | None = None
  ) -> jax.Array:
    """The experts' vectors, [E, B, T, D] of y's dtype, or `pool` of them, [B, T, D].

    Args:
      y_EBTD: the experts' updates.
      pool: a weighted sum over experts, [E, B, T, D] -> [B, T, D] float32. It commutes with the
        last W_out, which comes after it: one product a token, not one for each of its experts.
    """
    c = self.config
    rounds = 0 if c.coupler == "mean" or c.num_experts == 1 else c.coupler_layers
    D = c.embed_dim
    gain = (2 * c.num_layers * c.coupler_layers) ** -0.5
    for g in range(rounds):
      h_EBTD = LayerNorm(name=f"norm_{g}")(y_EBTD).astype(self.dtype)
      operator = make_operator(c, f"operator_{g}")(h_EBTD)
      _check_operator(c.coupler, operator.shape, h_EBTD.shape)
      # Not split over mesh.model: there, each device couples other tokens.
      in_DD = self.param(f"in_kernel_{g}", named(fan_in_normal(D), "embed", None), (D, D))
      out_DD = self.param(f"out_kernel_{g}", named(fan_in_normal(D, gain), None, "embed"), (D, D))
      spoken_EBTD = gelu(_in_rows(project(_mix(operator, h_EBTD), in_DD)))
      if pool is not None and g == rounds - 1:
        heard_BTD = project(pool(spoken_EBTD).astype(self.dtype), out_DD)
        return pool(y_EBTD) + heard_BTD.astype(jnp.float32)
      y_EBTD = y_EBTD + project(spoken_EBTD, out_DD)
    return y_EBTD if pool is None else pool(y_EBTD)


class Ties(NamedTuple):
  """What one round of messages has learned about who hears whom.

  Attributes:
    members: groups of two or more experts.
    weight_LM: `[L, M]`, one weight per layer and group. graph: the mean of both directions'
      shares, before the content gate. matrix: of both entries. hypergraph: the hyperedge's weight.
  """

  members: tuple[tuple[int, ...], ...]
  weight_LM: jax.Array


def learned_ties(config: ModelConfig, layers: dict[str, Any]) -> list[Ties]:
  """One Ties per round of messages; none for couplers whose weights depend on content alone.

  Args:
    config: of the model.
    layers: the stacked parameters of all layers, with "coupler" among them where there is one.
  """
  learned = []
  for g in range(config.coupler_layers):
    operator = layers.get("coupler", {}).get(f"operator_{g}", {})
    if "hyperedge_weight" in operator:
      weight_LM = jax.nn.softplus(operator["hyperedge_weight"])
      learned.append(Ties(config.hyperedge_list(), weight_LM))
    elif "adjacency" in operator or "mixing" in operator:
      E = config.num_experts
      others_EE = 1 - jnp.eye(E)
      if "adjacency" in operator:
        share_LEE = jax.nn.softplus(operator["adjacency"]) * others_EE[None]
        share_LEE = share_LEE / share_LEE.sum(2, keepdims=True)
      else:
        share_LEE = operator["mixing"]
      pairs = tuple(combinations(range(E), 2))
      i, j = (jnp.asarray(side) for side in zip(*pairs, strict=True))
      learned.append(Ties(pairs, (share_LEE[:, i, j] + share_LEE[:, j, i]) / 2))
  return learned
