"""The language model: embeddings, L coupled layers in one scan, output head.

The rest of the project sees `LanguageModel`, a NamedTuple of pure functions of a parameter tree;
Flax stays in this room.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hgnn_moe_jax import device, token_products
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.layout import by_token, constrain, everywhere, on_mesh, shards
from hgnn_moe_jax.models import attention_kernels, head
from hgnn_moe_jax.models.attention import KeyValueCache
from hgnn_moe_jax.models.coupling import Coupler
from hgnn_moe_jax.models.expert import ExpertBlocks
from hgnn_moe_jax.models.layers import LayerNorm, Named, dropout, fan_in_normal, named
from hgnn_moe_jax.models.matrices import matrices
from hgnn_moe_jax.models.routing import Pool, Router

Params = dict[str, Any]
# (updates_EBTD, weights_BT) -> a pytree of arrays, the same for every layer.
Measure = Callable[[jax.Array, jax.Array], Any]


class Aux(NamedTuple):
  """What a forward pass reports beside its features. Every field is always there, axis L first."""

  measured: Any  # the measure's result on the experts' updates
  gate_load_LE: jax.Array  # [L, E] float32: an expert's mean share in the pooled update
  gate_entropy_L: jax.Array  # [L] float32: mean entropy of a token's gate, nats
  ffn_load_LE: jax.Array  # [L, E] float32: an expert's share of the tokens fed forward
  balance_L: jax.Array  # [L] float32: `Route.balance`; 1 where every expert feeds every token


# One per layer, [B, E N, S, H] each: stacked, XLA would copy every layer's out and back in for each
# token, which took two thirds of the time of 32 rows.
Caches = tuple[KeyValueCache, ...]


class Reading(NamedTuple):
  """What reading on from a cache reports instead of Aux."""

  caches: Caches  # with the tokens just read
  share_LBTE: jax.Array  # float32: an expert's part in the pooled update z, `<g_e y_e, z> / <z, z>`


class LanguageModel(NamedTuple):
  """Pure functions of the parameters.

  init(key) -> params
  axes() -> a tree like the parameters of tuples: the name of each axis, or None; see `sharding`.
  features(params, inputs_BT, weights_BT, dropout_key) -> (x_BTD, Aux): what the head reads.
    dropout_key=None switches dropout off. weights_BT (0 or 1) only masks what Aux measures.
  logits(params, inputs_BT) -> [B, T, V] float32, without dropout.
  init_caches(rows, slots) -> Caches of so many rows that have read nothing yet.
  read(params, caches, inputs_BT, start_B) -> ([B, T, V] float32 logits, Reading): as `logits` of
    T tokens that follow the first start_B[b] of row b, without dropout. start_B + T is at most the
    number of slots, which is at most max_length.
  loss(params, x_BTD, targets_BT, weights_BT) -> weighted sum of token losses in nats, float32,
    computed without ever holding the logits whole.
  expert_matrices(params, target, stored) -> {role: w_LEDK}, see `matrices.matrices`.
  """

  init: Callable[[jax.Array], Params]
  axes: Callable[[], dict[str, Any]]
  features: Callable[[Params, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Aux]]
  logits: Callable[[Params, jax.Array], jax.Array]
  init_caches: Callable[[int, int], Caches]
  read: Callable[[Params, Caches, jax.Array, jax.Array], tuple[jax.Array, Reading]]
  loss: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]
  expert_matrices: Callable[..., dict[str, jax.Array]]


class CoupledLayer(nn.Module):
  """x_BTD -> x + pool(couple(experts(x)))."""

  config: ModelConfig
  dtype: jnp.dtype
  measure: Measure

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    position_BT: jax.Array,
    weights_BT: jax.Array,
    key: jax.Array | None,
    cache: KeyValueCache | None = None,
  ) -> tuple[jax.Array, Any]:
    """x_BTD and Aux; with a cache, x_BTD and (the cache with these tokens, the experts' shares)."""
    keys = None if key is None else tuple(jax.random.split(key))
    route, E = None, self.config.num_experts
    whole_BTD = everywhere(x_BTD)  # For router and pool, too: else it is gathered twice.
    if self.config.selected_experts:
      route = Router(self.config, name="router")(whole_BTD, weights_BT)
    experts = ExpertBlocks(self.config, self.dtype, name="experts")
    updates_EBTD, cache = experts(whole_BTD, position_BT, keys, cache, route)
    updates_EBTD = by_token(updates_EBTD)  # What follows is each token's own affair.
    coupler = Coupler(self.config, self.dtype, name="coupler")
    gate_BTE, pool = Pool(self.config, name="pool")(whole_BTD)
    if cache is not None:
      coupled_EBTD = coupler(updates_EBTD)
      z_BTD = pool(coupled_EBTD)
      return x_BTD + z_BTD, (cache, _share(coupled_EBTD, gate_BTE, z_BTD))
    z_BTD = coupler(updates_EBTD, pool)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(gate_BTE, gate_BTE), axis=-1)
    total = jnp.maximum(weights_BT.sum(), 1.0)
    with jax.named_scope("orthogonality"):
      measured = self.measure(updates_EBTD, weights_BT)
    aux = Aux(
      measured=measured,
      gate_load_LE=jnp.einsum("BTE,BT->E", gate_BTE, weights_BT) / total,
      gate_entropy_L=jnp.sum(entropy_BT * weights_BT) / total,
      ffn_load_LE=jnp.full(E, 1 / E, jnp.float32) if route is None else route.load_E,
      balance_L=jnp.ones((), jnp.float32) if route is None else route.balance,
    )
    return x_BTD + z_BTD, aux


def _share(y_EBTD: jax.Array, gate_BTE: jax.Array, z_BTD: jax.Array) -> jax.Array:
  """`<g_e y_e, z> / <z, z>`, [B, T, E]: z is the sum of the g_e y_e, so the shares sum to 1."""
  along_BTE = jnp.einsum("EBTD,BTD->BTE", y_EBTD.astype(jnp.float32), z_BTD)
  return gate_BTE * along_BTE / jnp.maximum(jnp.square(z_BTD).sum(-1, keepdims=True), 1e-24)


def _keeps_products_only(config: ModelConfig) -> bool:
  """On accelerators, and on CPU in a loop: there everything else is moved more than it is worth."""
  return jax.default_backend() != "cpu" or config.num_layers > config.unrolled_layers


def _is_product(primitive: Any, *_: Any, **params: Any) -> bool:
  """A policy of `jax.checkpoint`: keep the results of products and of attention's kernels.

  In a loop over layers every array that the backward pass wants is copied into a stack and out of
  it again. What lies between two products is cheaper to compute once more.
  """
  name = primitive.name
  if name == "name":
    return params["name"] in (token_products.SAVED, attention_kernels.SAVED)
  return name == "dot_general" or name.startswith("dot_product_attention_fwd")


def _unroll(config: ModelConfig, remat: bool) -> int:
  """Layers per turn of the loop: all of up to `unrolled_layers`, four by default, else one.

  A loop copies activations into stacks and out of them again; a model of two to four layers
  unrolled took 2/3 of the time on CPU and 3/4 on a GPU. Compile time stays bounded however deep the
  model is. Many CPU devices are for trying things out: there compiling is what takes long. Only a
  loop computes again what it is told to: of unrolled layers XLA finds both computations, and keeps
  the result of the first.
  """
  trying_out = jax.default_backend() == "cpu" and on_mesh()
  if remat or trying_out or config.num_layers > config.unrolled_layers:
    return 1
  return config.num_layers


class Network(nn.Module):
  """inputs_BT -> (x_BTD, Aux): everything but the head's product, whose kernel it owns.

  With caches, inputs_BT follow the first start_B tokens of their rows: -> (x_BTD, Reading).
  """

  config: ModelConfig
  vocab_size: int
  dtype: jnp.dtype
  measure: Measure
  remat: bool

  @nn.compact
  def __call__(
    self,
    inputs_BT: jax.Array,
    weights_BT: jax.Array,
    key: jax.Array | None,
    caches: Caches | None = None,
    start_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Aux | Reading]:
    c = self.config
    position_BT = jnp.arange(inputs_BT.shape[1])[None]
    if start_B is not None:
      position_BT = start_B[:, None] + position_BT
    # Rows of norm 1 and a head that reads normalised features: of 0.02, 0.1 and 0.3, 0.1 trained
    # fastest at D = 128.
    initializer = fan_in_normal(c.embed_dim)
    table_VD = self.param(
      "embedding", named(initializer, "vocab", "lookup"), (self.vocab_size, c.embed_dim)
    )
    x_BTD = constrain(table_VD[inputs_BT], "data", None, None)
    if c.positions == "learned":
      shape = (c.max_length, c.embed_dim)
      # Few numbers, which each device wants whole.
      position_TD = self.param("positions", named(initializer, None, None), shape)
      first = position_TD[None, : inputs_BT.shape[1]]
      x_BTD = x_BTD + (first if start_B is None else position_TD[position_BT])
    if not c.tie_embeddings:
      # Lies like the embedding: rows of an odd length, such as 50,257, keep a GPU from updating
      # several entries at once. What a seed draws is as if it lay the other way.
      shape = (c.embed_dim, self.vocab_size)
      transposed = lambda *args: initializer(*args).T  # noqa: E731
      self.param("head", named(transposed, "vocab", "embed"), shape)
    layer_keys = None
    if key is not None:
      embedding_key, layers_key = jax.random.split(key)
      x_BTD = dropout(x_BTD, c.dropout, embedding_key)
      layer_keys = jax.random.split(layers_key, c.num_layers)
    if caches is not None:
      x_BTD, report = self._read_layers(x_BTD, position_BT, weights_BT, caches)
      return LayerNorm(name="final_norm")(x_BTD), report
    layer = CoupledLayer
    if self.remat or _keeps_products_only(c):
      policy = None if self.remat else _is_product
      layer = nn.remat(CoupledLayer, prevent_cse=False, policy=policy)
    # Flax's annotation of in_axes knows integers only.
    by_layer: Any = nn.broadcast if layer_keys is None else 0
    in_axes: Any = (nn.broadcast, nn.broadcast, by_layer)
    scanned = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=in_axes,
      length=c.num_layers,
      unroll=1 if self.is_initializing() else _unroll(c, self.remat),
      # The check traces the layer a second time, for broadcast variables, of which there are none.
      # It also decides how keys are split: without it, a seed would draw other parameters.
      check_constancy_invariants=self.is_initializing(),
      metadata_params={nn.PARTITION_NAME: None},
    )
    layers = scanned(c, self.dtype, self.measure, name="layers")
    x_BTD, report = layers(x_BTD, position_BT, weights_BT, layer_keys)
    return constrain(LayerNorm(name="final_norm")(x_BTD), "data", None, None), report

  def _read_layers(
    self, x_BTD: jax.Array, position_BT: jax.Array, weights_BT: jax.Array, caches: Caches
  ) -> tuple[jax.Array, Reading]:
    """One layer after the other, each with its own cache and without dropout."""
    layer = CoupledLayer(self.config, self.dtype, self.measure, parent=None)
    stacked, reports = self.get_variable("params", "layers"), []
    for number, cache in enumerate(caches):
      params = jax.tree.map(lambda a, n=number: a[n], stacked)
      x_BTD, report = layer.apply({"params": params}, x_BTD, position_BT, weights_BT, None, cache)
      reports.append(report)
    read_caches, shares = zip(*reports, strict=True)
    return x_BTD, Reading(read_caches, jnp.stack(shares))


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """The dtype of activations and matrix products, unless set: bfloat16 on accelerators.

  NVIDIA's GPUs before Ampere (a T4, a V100) have no bfloat16 units: float32 there, as on CPU.
  """
  if config.compute_dtype != "auto":
    return jnp.dtype(config.compute_dtype)
  old_gpu = device.nvidia_capability() is not None and not device.has_ampere_kernels()
  exact = old_gpu or jax.default_backend() == "cpu"
  return jnp.dtype(jnp.float32 if exact else jnp.bfloat16)


def is_expert_parameter(path: tuple[Any, ...]) -> bool:
  """Whether the leaf at this path of a tree shaped like the parameters has leading axes [L, E].

  Args:
    path: as `jax.tree_util.tree_map_with_path` gives it; only its end is looked at, so that the
      optimizer's moments are recognised, too.
  """
  names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
  return names[-3:-1] == ["layers", "experts"]


def _each_parameter(read: Callable[[Named | None, Any], Any], tree: Any) -> Any:
  """read(box, value) of every parameter; box is None if it was declared without names."""
  is_box = lambda node: isinstance(node, Named)  # noqa: E731
  return jax.tree.map(
    lambda node: read(node, node.value) if is_box(node) else read(None, node), tree, is_leaf=is_box
  )


def head_kernel(params: Params) -> jax.Array:
  """[D, V] float32: from the head's own rows [V, D], or from the embedding if it has none."""
  return params["head" if "head" in params else "embedding"].T


def build(
  config: ModelConfig, vocab_size: int, measure: Measure, remat: bool = False
) -> LanguageModel:
  """The model's functions.

  Args:
    config: a validated ModelConfig.
    vocab_size: V, number of token ids.
    measure: applied to every layer's updates_EBTD and the token weights; its results, stacked over
      layers, are `Aux.measured`. The caller decides what is measured, so that this room need not
      know the penalties.
    remat: recompute each layer's activations in the backward pass.
  """
  dtype = compute_dtype(config)
  network = Network(config, vocab_size, dtype, measure, remat)

  @jax.jit  # For its trace, which whoever asks for shapes, names or numbers shares.
  def boxed(key: jax.Array) -> Any:
    inputs_BT = jnp.zeros((1, 2), jnp.int32)
    return dict(network.init(key, inputs_BT, jnp.ones((1, 2)), None)["params"])

  def init(key: jax.Array) -> Params:
    return _each_parameter(lambda box, value: value, boxed(key))

  def axes() -> dict[str, Any]:
    shapes = jax.eval_shape(boxed, jax.eval_shape(jax.random.key, 0))
    return _each_parameter(
      lambda box, value: box.names if box is not None else (None,) * value.ndim, shapes
    )

  def features(params, inputs_BT, weights_BT, dropout_key) -> tuple[jax.Array, Aux]:
    output: Any = network.apply({"params": params}, inputs_BT, weights_BT, dropout_key)
    return output

  def head_logits(params, x_BTD):
    kernel_DV = head_kernel(params).astype(dtype)
    return jnp.matmul(x_BTD.astype(dtype), kernel_DV, preferred_element_type=jnp.float32)

  def logits(params, inputs_BT):
    x_BTD, _ = features(params, inputs_BT, jnp.ones(inputs_BT.shape), None)
    return head_logits(params, x_BTD)

  def init_caches(rows: int, slots: int) -> Caches:
    c = config
    shape = (rows, c.num_experts * c.num_heads, slots, c.embed_dim // c.num_heads)
    zeros = functools.partial(jnp.zeros, shape, dtype)
    return tuple(KeyValueCache(zeros(), zeros()) for _ in range(c.num_layers))

  def read(params, caches, inputs_BT, start_B):
    weights_BT = jnp.ones(inputs_BT.shape)
    output: Any = network.apply({"params": params}, inputs_BT, weights_BT, None, caches, start_B)
    x_BTD, reading = output
    return head_logits(params, x_BTD), reading

  def loss(params, x_BTD, targets_BT, weights_BT) -> jax.Array:
    # Devices that hold the same rows, for other experts, would do the same here: they share them.
    axes = ("data", "expert") if targets_BT.size % shards("data", "expert") == 0 else ("data",)
    parts = shards(*axes)
    x_sND, target_sN, weight_sN = (
      constrain(a.reshape(parts, -1, *a.shape[2:]), axes, *[None] * (a.ndim - 1))
      for a in (x_BTD, targets_BT, weights_BT)
    )
    rows = head.chunk_rows(x_sND.shape[1], vocab_size)

    @jax.named_scope("head")
    def part(x_ND, target_N, weight_N) -> Any:
      kernel_DV = head_kernel(params)
      return head.linear_cross_entropy(x_ND, kernel_DV, target_N, weight_N, rows, dtype)

    if parts == 1:
      return part(x_sND[0], target_sN[0], weight_sN[0])
    # Each device goes through the chunks of its own rows and sums the kernel's gradient once.
    return jax.vmap(part, spmd_axis_name=axes)(x_sND, target_sN, weight_sN).sum()

  def expert_matrices(params, target, stored=False):
    return matrices(params["layers"]["experts"], target, stored)

  return LanguageModel(init, axes, features, logits, init_caches, read, loss, expert_matrices)
