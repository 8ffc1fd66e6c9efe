"""The experts' blocks against a plain pre-LN transformer, and their first draw."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from benchmarks.flops import matmul_flops
from hgnn_moe_jax import sharding
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models import expert, language_model
from hgnn_moe_jax.models.routing import Route

B, T, V = 2, 4, 11


def _config(num_experts, **changes):
  return ModelConfig(
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    num_experts=num_experts,
    ffn_multiplier=2,
    max_length=6,
    compute_dtype="float32",
    **changes,
  )


def _build(config, vocab_size=V):
  return language_model.build(config, vocab_size, lambda updates_EBTD, weights_BT: None)


def _layer_norm(x, scale, bias):
  centred = x - x.mean(-1, keepdims=True)
  return scale * centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) + bias


def _gelu(x):
  return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _turn(x_TH):
  """Rotary positions as multiplication of complex numbers, entry i with entry i + H/2."""
  half = x_TH.shape[1] // 2
  frequency = 10_000.0 ** (-np.arange(half) / half)
  turn = np.exp(1j * np.arange(len(x_TH))[:, None] * frequency)
  turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * turn
  return np.concatenate([turned.real, turned.imag], -1)


def _block(p, x_TD, rotary):
  """One pre-LN block on one row of tokens, as in any textbook: its output."""
  h = _layer_norm(x_TD, p["attention_norm_scale"], p["attention_norm_bias"])
  heads = []
  for n in range(p["qkv_kernel"].shape[2]):
    q, k, v = (h @ p["qkv_kernel"][:, s, n] + p["qkv_bias"][s, n] for s in range(3))
    if rotary:
      q, k = _turn(q), _turn(k)
    score = q @ k.T / q.shape[1] ** 0.5
    weight = np.exp(score) * np.tril(np.ones_like(score))
    heads.append(weight @ v / weight.sum(-1, keepdims=True))
  x_TD = x_TD + np.concatenate(heads, -1) @ p["out_kernel"] + p["out_bias"]
  h = _layer_norm(x_TD, p["ffn_norm_scale"], p["ffn_norm_bias"])
  inner = _gelu(h @ p["ffn_in_kernel"] + p["ffn_in_bias"])
  return x_TD + inner @ p["ffn_out_kernel"] + p["ffn_out_bias"]


def _naive_logits(config, params, inputs_BT):
  """Dense transformer, float64; with several experts the mean of their blocks' outputs."""
  x = params["embedding"][inputs_BT]
  if config.positions == "learned":
    x = x + params["positions"][: inputs_BT.shape[1]]
  experts = params["layers"]["experts"]
  for l in range(config.num_layers):
    blocks = [{k: v[l, e] for k, v in experts.items()} for e in range(config.num_experts)]
    rows = [[_block(p, row, config.positions == "rotary") for p in blocks] for row in x]
    x = np.array([np.mean(row, 0) for row in rows])
  x = _layer_norm(x, params["final_norm"]["scale"], params["final_norm"]["bias"])
  return x @ params["embedding" if config.tie_embeddings else "head"].T


@pytest.mark.parametrize(
  "config",
  [
    _config(1, coupler="graph"),
    _config(3, coupler="mean", positions="rotary", tie_embeddings=True),
  ],
  ids=["one-expert", "mean-of-three"],
)
def test_model_is_a_plain_transformer(config, random_params, assert_slopes):
  # Random gains and biases everywhere: those folded into the projections count.
  model = _build(config)
  params = random_params(jax.eval_shape(model.init, jax.random.key(0)))
  rng = np.random.default_rng(0)
  inputs_BT = rng.integers(V, size=(B, T)).astype(np.int32)
  cotangent = rng.standard_normal((B, T, V)).astype(np.float32)

  def both(params, cotangent):
    logits, pull = jax.vjp(lambda p: model.logits(p, inputs_BT), params)
    return logits, pull(cotangent)[0]

  logits, gradients = jax.jit(both)(params, cotangent)
  wanted = _naive_logits(config, params, inputs_BT)
  np.testing.assert_allclose(logits, wanted, rtol=2e-4, atol=2e-4)
  assert_slopes(
    lambda p: np.sum(cotangent * _naive_logits(config, p, inputs_BT)), params, gradients, 1e-3
  )


def test_one_expert_is_the_same_program_under_every_coupler_and_pooling():
  inputs_BT = np.zeros((B, T), np.int32)
  programs = set()
  for coupler in ("graph", "hypergraph", "mean", "matrix", "attention"):
    for pooling in ("mean", "gate"):
      model = _build(_config(1, coupler=coupler, hyperedges="all", pooling=pooling))
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      programs.add(str(jax.make_jaxpr(model.logits)(shapes, inputs_BT)))
  assert len(programs) == 1


def _naive_feed(network, hidden_EBTD, factor_EBT):
  """Every expert on every token, then the factors, most of them 0; float64."""
  inner = np.einsum("EBTD,EDF->EBTF", hidden_EBTD, network.in_EDF)
  inner = _gelu(inner + network.in_bias_EF[:, None, None])
  outer = np.einsum("EBTF,EFD->EBTD", inner, network.out_EFD)
  return (outer + network.out_bias_ED[:, None, None]) * factor_EBT[..., None]


# Odd sizes, an expert that nobody chooses, and blocks that are not full.
@pytest.mark.parametrize(
  ("E", "rows", "tokens", "selected"), [(3, 2, 7, 1), (5, 3, 11, 2), (4, 2, 40, 4)]
)
def test_feeding_the_chosen_is_feeding_all_and_masking(E, rows, tokens, selected, assert_slopes):
  D, F = 6, 10
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  network = expert.FeedForward(normal(E, D, F), normal(E, F), normal(E, F, D), normal(E, D))
  hidden, cotangent = normal(E, rows, tokens, D), normal(E, rows, tokens, D)
  scores = normal(rows, tokens, E) - (100.0 if selected < E else 0.0) * (np.arange(E) == 1)
  chosen = np.argsort(np.argsort(-scores, -1), -1) < selected
  factor = np.where(chosen, np.exp(scores), 0).astype(np.float32)

  def feed(arguments):
    network, hidden, factor = arguments
    route = Route(jnp.asarray(chosen), factor, jnp.zeros(E), jnp.zeros(()))
    return expert._feed_chosen(network, hidden, route, selected)

  def twin(arguments):
    network, hidden, factor = arguments
    return np.sum(cotangent * _naive_feed(network, hidden, np.moveaxis(factor * chosen, -1, 0)))

  arguments = (network, hidden, factor)

  @jax.jit
  def fed_and_gradients(arguments):
    fed, pull = jax.vjp(feed, arguments)
    return fed, pull(jnp.asarray(cotangent))

  fed, (gradients,) = fed_and_gradients(jax.tree.map(jnp.asarray, arguments))
  np.testing.assert_allclose(
    fed, _naive_feed(network, hidden, np.moveaxis(factor, -1, 0)), rtol=1e-4, atol=1e-4
  )
  assert (np.asarray(gradients[0].in_EDF)[1] == 0).all() == (selected < E)
  assert_slopes(twin, arguments, gradients)


def test_a_device_has_room_for_its_own_experts_tokens_only():
  """Of the four experts of each token two at most are among a device's two, not four."""
  E, D, F, tokens, selected = 8, 4, 8, 400, 4
  network = expert.FeedForward(
    *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((E, D, F), (E, F), (E, F, D), (E, D)))
  )
  hidden = jax.ShapeDtypeStruct((E, 1, tokens, D), jnp.float32)
  chosen = jax.ShapeDtypeStruct((1, tokens, E), bool)

  def feed(network, hidden, chosen):
    route = Route(chosen, chosen.astype(jnp.float32), jnp.zeros(E), jnp.zeros(()))
    return expert._feed_chosen(network, hidden, route, selected)

  places = {}
  for parts in (1, 4):
    axes = AbstractMesh((1, parts, 1), sharding.AXES, axis_types=sharding.AXIS_TYPES)
    with jax.sharding.use_abstract_mesh(axes) if parts > 1 else contextlib.nullcontext():
      jaxpr = str(jax.make_jaxpr(feed)(network, hidden, chosen))
    blocks, size = re.search(rf":f32\[(\d+),(\d+),{F}\] = dot_general", jaxpr).groups()
    places[parts] = int(blocks) * int(size)
  # 1,600 pairs and up to 31 empty places for each of eight experts; 800, and 63 for each of two.
  assert places == {1: 57 * 32, 4: 14 * 64}


def test_gradients_of_the_chosen_are_summed_in_float32():
  """A sum of ones in bfloat16 ends at 256; here there are 1,500, in several blocks."""
  E, D, F, tokens = 2, 4, 4, 1500
  network = expert.FeedForward(
    *(jnp.zeros(shape) for shape in ((E, D, F), (E, F), (E, F, D), (E, D)))
  )
  first_BTE = jnp.broadcast_to(jnp.arange(E) == 0, (1, tokens, E))
  route = Route(first_BTE, first_BTE.astype(jnp.float32), jnp.zeros(E), jnp.zeros(()))

  def fed(network):
    hidden = jnp.ones((E, 1, tokens, D), jnp.bfloat16)
    return expert._feed_chosen(network, hidden, route, 1).astype(jnp.float32).sum()

  # XLA's CPU backend adds up in float32 in any case: what it is asked for counts.
  sums = re.findall(r":(\w+)\[[^\]]*\] = scatter-add", str(jax.make_jaxpr(jax.grad(fed))(network)))
  assert sums and set(sums) == {"f32"}
  # GELU(1) is 0.8412, 0.84 in bfloat16.
  gradient = jax.jit(jax.grad(fed))(network._replace(in_bias_EF=jnp.ones((E, F))))
  np.testing.assert_array_equal(gradient.out_bias_ED, [[tokens] * D, [0] * D])
  np.testing.assert_allclose(gradient.out_EFD[0], np.full((F, D), 0.8412 * tokens), rtol=0.005)


def test_a_sparse_step_multiplies_less():
  config = _config(4, selected_experts=1, coupler="mean")
  dense, sparse = _build(_config(4, coupler="mean")), _build(config)
  inputs = jax.ShapeDtypeStruct((8, 6), jnp.int32)
  flops = [
    matmul_flops(m.logits, jax.eval_shape(m.init, jax.random.key(0)), inputs)
    for m in (dense, sparse)
  ]
  D, F, tokens, layers = 8, 16, 48, 2
  fed = 2 * 2 * D * F * layers  # per token and expert
  assert flops[0] - flops[1] > (4 - 1 - 0.75) * tokens * fed


def test_experts_are_drawn_independently_and_to_scale():
  config = ModelConfig(embed_dim=32, num_layers=2, num_heads=2, num_experts=3, coupler_layers=1)
  params = jax.jit(_build(config).init)(jax.random.key(0))
  # Fan-in of each product; products that write to the stream are scaled by 1 / sqrt(2 L) = 1/2.
  # D = N H = 32, F = 128; 1,024 entries at least, so a standard deviation is known to 2.2 %.
  stds = {
    "qkv_kernel": 32**-0.5,
    "out_kernel": 32**-0.5 / 2,
    "ffn_in_kernel": 32**-0.5,
    "ffn_out_kernel": 128**-0.5 / 2,
  }
  experts = params["layers"]["experts"]
  assert set(stds) == {name for name in experts if name.endswith("kernel")}
  for name, leaf in experts.items():
    assert leaf.dtype == jnp.float32 and leaf.shape[:2] == (2, 3)
    flat = np.asarray(leaf).reshape(2 * 3, -1)
    if name not in stds:
      np.testing.assert_array_equal(flat, 1.0 if name.endswith("scale") else 0.0)
      continue
    np.testing.assert_allclose(flat.std(1), stds[name], rtol=0.1)
    # Layers and experts share nothing: correlations of 1,024 entries are about 1/32.
    correlation = np.corrcoef(flat)[~np.eye(6, dtype=bool)]
    assert np.abs(correlation).max() < 5 / flat.shape[1] ** 0.5
  coupler = params["layers"]["coupler"]
  np.testing.assert_allclose(coupler["in_kernel_0"].std((1, 2)), 32**-0.5, rtol=0.1)
  # Two layers of one round write to the stream: 1 / sqrt(2 L rounds) = 1/2.
  np.testing.assert_allclose(coupler["out_kernel_0"].std((1, 2)), 32**-0.5 / 2, rtol=0.1)
