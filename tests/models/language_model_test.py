"""The whole model: causality, interchangeable experts, loss, scan, dropout, Aux, size."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import token_products
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models import language_model, layers
from hgnn_moe_jax.orthogonality.outputs import update_overlap

B, T, L, D = 2, 6, 2, 8
V = B * T + 2  # every token of a batch can have an id of its own
F32 = jnp.dtype(jnp.float32)


def _config(num_experts, coupler="graph", **changes):
  fields = {
    "embed_dim": D,
    "num_layers": L,
    "num_heads": 2,
    "ffn_multiplier": 2,
    "coupler_layers": 1,
    "pooling": "gate",
    "max_length": T,
    "compute_dtype": "float32",
  }
  return ModelConfig(num_experts=num_experts, coupler=coupler, **fields | changes)


def _updates(updates_EBTD, weights_BT):
  """A measure that hides nothing."""
  return updates_EBTD


def _inputs():
  return np.arange(B * T, dtype=np.int32).reshape(B, T)


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def built(random_params):
  """config -> (model, random parameters)."""

  @functools.cache
  def make(config, measure=_updates, remat=False):
    model = language_model.build(config, V, measure, remat)
    return model, random_params(jax.eval_shape(model.init, jax.random.key(0)))

  return make


@pytest.fixture(scope="module")
def compiled(built):
  """config -> compiled logits, parameters."""

  @functools.cache
  def make(config):
    model, params = built(config)
    return jax.jit(model.logits), params

  return make


@pytest.fixture(scope="module")
def pulled(built):
  """config -> compiled (params, cotangent of the logits) -> gradient, parameters."""

  @functools.cache
  def make(config):
    model, params = built(config)

    def run(params, cotangent_BTV):
      return jax.vjp(lambda p: model.logits(p, _inputs()), params)[1](cotangent_BTV)[0]

    return jax.jit(run), params

  return make


@pytest.fixture
def loop(monkeypatch):
  """Layers stay a loop, as on accelerators; unrolled they take longer to compile."""
  monkeypatch.setattr(language_model, "_unroll", lambda config, remat: 1)


_TRIPLETS = {"hyperedges": "triplets", "hyperedge_attention": True}
_COUPLERS = {
  "graph": ("graph", {}),
  "pairs": ("hypergraph", {}),
  "triplets": ("hypergraph", _TRIPLETS),
  "matrix": ("matrix", {}),
  "attention": ("attention", {}),
  "mean": ("mean", {}),
  "sparse": ("graph", {"selected_experts": 2}),
}


def _case(name, num_experts):
  coupler, changes = _COUPLERS[name]
  return pytest.param(_config(num_experts, coupler, **changes), id=f"{name}-{num_experts}")


# Values at every size, gradients at one size each: compiling a gradient takes three times longer.
# The couplers' own gradients are tested at every size in coupling_test.
CASES = [_case("graph", 1)] + [
  _case(name, E)
  for name in _COUPLERS
  for E in ((4,) if name == "mean" else (2, 3, 4, 6, 8))
  if not (name == "triplets" and E == 2) and not (name == "sparse" and E not in (3, 8))
]
GRADIENT_CASES = [
  _case(name, E)
  for name, E in [
    ("graph", 3),
    ("triplets", 6),
    ("matrix", 2),
    ("attention", 8),
    ("sparse", 4),
  ]
]


def _order(num_experts):
  """Expert order[i] becomes i; neither a rotation nor its own inverse where that is possible."""
  order = np.roll(np.arange(num_experts), 1)
  return np.r_[order[1], order[0], order[2:]] if num_experts > 3 else order


@pytest.mark.parametrize("config", CASES)
def test_no_token_changes_an_earlier_one_or_another_row(config, compiled, loop):
  run, params = compiled(config)
  inputs_BT, b, t = _inputs(), 0, 3
  changed_BT = inputs_BT.copy()
  changed_BT[b, t] = V - 1
  logits_BTV, again_BTV = run(params, inputs_BT), run(params, changed_BT)
  reached_BT = np.zeros((B, T), bool)
  reached_BT[b, t:] = True
  np.testing.assert_array_equal(np.any(logits_BTV != again_BTV, -1), reached_BT)


@pytest.mark.parametrize("config", CASES)
def test_names_of_experts_do_not_matter(config, compiled, relabel, loop):
  run, params = compiled(config)
  edges = config.hyperedge_list() if config.coupler == "hypergraph" else ()
  again_BTV = run(relabel(params, _order(config.num_experts), edges), _inputs())
  np.testing.assert_allclose(again_BTV, run(params, _inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", GRADIENT_CASES)
def test_gradients_reach_back_only_and_follow_the_experts_names(config, pulled, relabel, loop):
  run, params = pulled(config)
  b, t = 0, 3
  cotangent_BTV = np.zeros((B, T, V), np.float32)
  cotangent_BTV[b, t] = _normal(0, V)
  gradients = run(params, cotangent_BTV)
  # Every token has an id of its own, so the table's gradient is that of the embedded inputs.
  seen_BT = np.zeros((B, T), bool)
  seen_BT[b, : t + 1] = True
  given_BT = np.any(np.asarray(gradients["embedding"])[_inputs()] != 0, -1)
  np.testing.assert_array_equal(given_BT, seen_BT)
  np.testing.assert_array_equal(np.any(gradients["positions"] != 0, -1), seen_BT[b])
  order = _order(config.num_experts)
  edges = config.hyperedge_list() if config.coupler == "hypergraph" else ()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 + 1e-4 * np.abs(b).max()),
    run(relabel(params, order, edges), cotangent_BTV),
    relabel(gradients, order, edges),
  )


def _naive_cross_entropy(logits_BTV, targets_BT, weights_BT):
  chosen_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)
  return -jnp.sum(chosen_BT[..., 0] * weights_BT)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(tied, built, loop):
  model, params = built(_config(1, tie_embeddings=tied))
  assert ("head" in params) != tied
  inputs_BT, targets_BT = _inputs(), np.roll(_inputs(), -1, 1)
  weights_BT = (np.arange(T)[None] < [[T], [T - 2]]).astype(np.float32)

  def chunked(params, weights_BT):
    x_BTD, _ = model.features(params, inputs_BT, weights_BT, None)
    return model.loss(params, x_BTD, targets_BT, weights_BT)

  def whole(params, weights_BT):
    return _naive_cross_entropy(model.logits(params, inputs_BT), targets_BT, weights_BT)

  both = [jax.value_and_grad(f, argnums=(0, 1)) for f in (chunked, whole)]
  got, wanted = jax.jit(lambda *a: [f(*a) for f in both])(params, weights_BT)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4), got, wanted)
  assert all(np.any(g) for g in jax.tree.leaves(got[1][0]["layers"]["experts"]))


def test_loss_in_chunks_that_do_not_divide_the_batch(built, monkeypatch):
  model, params = built(_config(2, "mean"))
  x_BTD, targets_BT, weights_BT = _normal(0, B, T, D), _inputs(), np.ones((B, T), np.float32)
  wanted = _naive_cross_entropy(jnp.asarray(x_BTD @ params["head"].T), targets_BT, weights_BT)
  for rows in (5, 12):
    monkeypatch.setattr(language_model.head, "chunk_rows", lambda *_, rows=rows: rows)
    loss = model.loss(params, jnp.asarray(x_BTD), targets_BT, weights_BT)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_scan_is_the_layers_one_by_one(built):
  config = _config(3)
  model, params = built(config)
  weights_BT = np.ones((B, T), np.float32)
  layer = jax.jit(language_model.CoupledLayer(config, F32, _updates).apply)
  x_BTD = params["embedding"][_inputs()] + params["positions"][:T]
  reports = []
  for l in range(L):
    own = jax.tree.map(lambda p, l=l: p[l], params["layers"])
    x_BTD, aux = layer({"params": own}, x_BTD, np.arange(T)[None], weights_BT, None)
    reports.append(aux)
  wanted = layers.LayerNorm().apply({"params": params["final_norm"]}, x_BTD)
  wanted_aux = jax.tree.map(lambda *a: np.stack(a), *reports)
  # Unrolled, as on CPU.
  got, aux = jax.jit(model.features)(params, _inputs(), weights_BT, None)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(got, wanted)
  jax.tree.map(close, aux, wanted_aux)


@pytest.fixture(scope="module")
def dropped(built):
  """(remat) -> compiled (params, key) -> (loss, Aux), gradients, under dropout of a half."""

  @functools.cache
  def make(remat):
    model, params = built(_config(2, "mean", dropout=0.5), _updates, remat)

    def total(params, key):
      x_BTD, aux = model.features(params, _inputs(), jnp.ones((B, T)), key)
      return jnp.sum(x_BTD * _normal(0, B, T, D)), (x_BTD, aux)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    with pytest.MonkeyPatch.context() as patch:  # as in `loop`
      patch.setattr(language_model, "_unroll", lambda config, remat: 1)
      return run.lower(params, jax.random.key(0)).compile(), params

  return make


def test_rematerialisation_changes_nothing(dropped):
  # Under dropout: the recomputed activations must meet the same masks.
  (run, params), (run_remat, _) = dropped(False), dropped(True)
  key = jax.random.key(3)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    run_remat(params, key),
    run(params, key),
  )
  remat_model = language_model.build(_config(2, "mean"), V, _updates, remat=True)
  jaxpr = jax.make_jaxpr(jax.grad(lambda p: remat_model.logits(p, _inputs()).sum()))(params)
  assert "remat" in str(jaxpr) or "checkpoint" in str(jaxpr)


def test_rematerialisation_saves_memory():
  """By what XLA plans: of unrolled layers it finds both computations, and keeps the first."""
  config = _config(2, "mean", num_layers=4, max_length=64)
  shapes = (jax.ShapeDtypeStruct((16, 64), jnp.int32), jax.ShapeDtypeStruct((16, 64), jnp.float32))

  def temporary(remat):
    model = language_model.build(config, V, update_overlap, remat)

    def total(params, inputs_BT, weights_BT):
      return model.features(params, inputs_BT, weights_BT, None)[0].sum()

    params = jax.eval_shape(model.init, jax.random.key(0))
    compiled = jax.jit(jax.grad(total)).lower(params, *shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(True) < 0.6 * temporary(False)


def _kept(model, params):
  """Shapes of what the layers' loop keeps for its backward pass."""

  def total(params):
    x_BTD, aux = model.features(params, _inputs(), jnp.ones((B, T)), jax.random.key(0))
    return jnp.sum(x_BTD) + jnp.sum(aux.measured.overlap_EE)

  jaxpr = jax.make_jaxpr(jax.grad(total))(params).jaxpr
  forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == L)
  turn = forward.params["jaxpr"].out_avals
  # What is handed from turn to turn has one shape inside and outside; the rest is stacked.
  results = zip(forward.outvars, turn, strict=True)
  return [one.shape for out, one in results if out.aval.shape == (L, *one.shape)]


@pytest.mark.parametrize("coupler", ["graph", "attention"])
def test_keeping_products_only_changes_nothing(coupler, loop, monkeypatch):
  """What accelerators do: gradients are the same, and fewer arrays are kept."""
  config = _config(3, coupler, dropout=0.5)
  model = language_model.build(config, V, update_overlap)
  params = model.init(jax.random.key(0))

  def total(params):
    x_BTD, aux = model.features(params, _inputs(), jnp.ones((B, T)), jax.random.key(1))
    return jnp.sum(x_BTD * _normal(0, B, T, D)) + jnp.sum(aux.measured.overlap_EE)

  everything, value = _kept(model, params), jax.jit(jax.value_and_grad(total))(params)
  monkeypatch.setattr(language_model, "_keeps_products_only", lambda config: True)
  products = _kept(model, params)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    jax.jit(jax.value_and_grad(lambda p: total(p)))(params),
    value,
  )
  assert math.fsum(map(math.prod, products)) < 0.6 * math.fsum(map(math.prod, everything))
  # The scores of the penalty are dear to make: they are kept, whatever they are made of.
  assert (3, 3, B, T) in products
  jax.tree.map(np.testing.assert_array_equal, model.init(jax.random.key(0)), params)


def test_products_and_fused_attention_are_kept():
  def kept(name, /, **params):
    return language_model._is_product(SimpleNamespace(name=name), **params)

  assert kept("dot_general") and not kept("exp")
  # The names of cuDNN's attention in jax 0.10 and 0.11.
  assert kept("dot_product_attention_fwd") and kept("dot_product_attention_fwd_wrapper")
  assert kept("name", name=token_products.SAVED) and not kept("name", name="something else")


@pytest.mark.parametrize(
  ("backend", "products_only"),
  [("cpu", [False, False, True]), ("gpu", [True] * 3), ("tpu", [True] * 3)],
)
def test_compilation_does_not_grow_with_depth(backend, products_only, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  configs = [ModelConfig(num_layers=layers) for layers in (1, 4, 12)]
  assert [language_model._unroll(config, False) for config in configs] == [1, 4, 1]
  assert [language_model._unroll(config, True) for config in configs] == [1, 1, 1]
  assert [language_model._keeps_products_only(config) for config in configs] == products_only
  deep = ModelConfig(num_layers=12, unrolled_layers=12)
  assert language_model._unroll(deep, False) == 12
  assert language_model._keeps_products_only(deep) == (backend != "cpu")


def test_unrolled_layers_change_nothing():
  """But what is compiled: two loops over layers, there and back, or none."""
  config = _config(2, "graph", num_layers=2, dropout=0.5)

  def run(unrolled_layers):
    changed = dataclasses.replace(config, unrolled_layers=unrolled_layers)
    model = language_model.build(changed, V, update_overlap)
    params = model.init(jax.random.key(0))

    def total(params):
      x_BTD, aux = model.features(params, _inputs(), jnp.ones((B, T)), jax.random.key(1))
      return jnp.sum(x_BTD * _normal(0, B, T, D)) + jnp.sum(aux.measured.overlap_EE)

    lowered = jax.jit(jax.value_and_grad(total)).lower(params)
    return lowered.compile()(params), lowered.as_text().count("stablehlo.while")

  (found, loops), (changed, other_loops) = run(4), run(1)
  assert other_loops == loops + 2
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, changed, found)


def test_dropout_follows_its_key_alone(dropped):
  run, params = dropped(False)
  first, second = jax.random.split(jax.random.key(0))
  (_, (x_BTD, _)), gradients = run(params, first)
  (_, (again_BTD, _)), gradients_again = run(params, first)
  np.testing.assert_array_equal(again_BTD, x_BTD)
  jax.tree.map(np.testing.assert_array_equal, gradients_again, gradients)
  (_, (other_BTD, _)), _ = run(params, second)
  assert np.all(np.any(other_BTD != x_BTD, -1))


def test_layers_experts_and_tokens_have_dropout_masks_of_their_own(dropped):
  run, params = dropped(False)
  (_, (_, aux)), _ = run(params, jax.random.key(0))
  # An entry of an update is zero where both its parts are dropped: 1/2 x 1/2.
  zero_LEBTD = np.asarray(aux.measured) == 0
  entries = zero_LEBTD.size  # 2 x 2 x 2 x 6 x 8 = 384, standard deviation 0.022
  assert abs(zero_LEBTD.mean() - 0.25) < 4 * (0.25 * 0.75 / entries) ** 0.5
  for axis in range(4):
    halves = np.moveaxis(zero_LEBTD, axis, 0)
    assert np.any(halves[0] != halves[1])


def test_without_key_there_is_no_dropout(built, loop):
  model, params = built(_config(2, "mean", dropout=0.5))
  plain, _ = built(_config(2, "mean", dropout=0.0))
  arguments = (params, _inputs(), np.ones((B, T), np.float32))
  off = jax.jit(lambda *a: model.features(*a, None)[0])(*arguments)
  wanted = jax.jit(lambda *a: plain.features(*a, jax.random.key(0))[0])(*arguments)
  np.testing.assert_allclose(off, wanted, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_and_parameters_stay_float32(built, loop):
  _, params = built(_config(2))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  params = jax.tree.map(lambda p: p * 0.5, params)

  def run(dtype):
    model, _ = built(_config(2, compute_dtype=dtype))

    def total(params):
      x_BTD, aux = model.features(params, _inputs(), jnp.ones((B, T)), None)
      return jnp.sum(x_BTD * _normal(0, B, T, D)), (x_BTD, aux)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

  (_, (rough_BTD, rough_aux)), rough = run("bfloat16")
  (_, (exact_BTD, exact_aux)), exact = run("float32")
  assert rough_aux.measured.dtype == jnp.bfloat16 and rough_BTD.dtype == jnp.float32
  # bfloat16 has 8 bits: what a few products give agrees to a few percent of its size.
  assert 0 < np.abs(rough_BTD - exact_BTD).max() < 0.05 * np.abs(exact_BTD).max()
  np.testing.assert_allclose(rough_aux.gate_load_LE, exact_aux.gate_load_LE, atol=0.01)
  for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
    assert a.dtype == jnp.float32
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b) + 0.02


@pytest.mark.parametrize(
  ("setting", "dtype"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_compute_dtype_on_cpu(setting, dtype, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert language_model.compute_dtype(ModelConfig(compute_dtype=setting)) == jnp.dtype(dtype)


def test_compute_dtype_on_accelerators(monkeypatch):
  for backend in ("gpu", "tpu"):
    monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
    assert language_model.compute_dtype(ModelConfig()) == jnp.bfloat16
    assert language_model.compute_dtype(ModelConfig(compute_dtype="float32")) == jnp.float32


def test_aux_reports_per_layer_and_from_valid_tokens_only(built, loop):
  model, params = built(_config(3, selected_experts=1), update_overlap)
  run = jax.jit(lambda *a: model.features(*a, None))
  weights_BT = (np.arange(T)[None] < [[T - 2], [T - 3]]).astype(np.float32)
  x_BTD, aux = run(params, _inputs(), weights_BT)
  assert aux.gate_load_LE.shape == (L, 3) and aux.gate_entropy_L.shape == (L,)
  assert aux.measured.overlap_EE.shape == (L, 3, 3) and aux.measured.scale_E.shape == (L, 3)
  # Other tokens where the weight is 0: what comes before does not see them, so nothing changes.
  changed_BT = np.where(weights_BT == 1, _inputs(), V - 1)
  other_BTD, again = run(params, changed_BT, weights_BT)
  assert np.any(other_BTD != x_BTD)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, again, aux)
  _, unmasked = run(params, _inputs(), np.ones((B, T), np.float32))
  for got, other in zip(jax.tree.leaves(aux), jax.tree.leaves(unmasked), strict=True):
    assert np.all(np.any(np.abs(got - other).reshape(L, -1) > 1e-5, -1))
  # The first layer's gate by hand: softmax of LN(x) times the kernel, x the embedded inputs.
  pool = jax.tree.map(lambda p: p[0], params["layers"]["pool"])
  x = params["embedding"][_inputs()] + params["positions"][:T]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  gate = np.exp((x * pool["norm"]["scale"] + pool["norm"]["bias"]) @ pool["gate_kernel"])
  gate = (gate / gate.sum(-1, keepdims=True))[weights_BT == 1]
  close(aux.gate_load_LE[0], gate.mean(0))
  close(aux.gate_entropy_L[0], -(gate * np.log(gate)).sum(-1).mean())
  close(aux.gate_load_LE.sum(1), np.ones(L))
  # No valid token at all: zeros, not NaN.
  _, nothing = run(params, _inputs(), np.zeros((B, T), np.float32))
  assert not np.any(nothing.gate_load_LE) and np.isfinite(jax.tree.leaves(nothing)[0]).all()


def test_mean_pooling_reports_equal_loads(built, loop):
  model, params = built(_config(4, "mean", pooling="mean"))
  weights_BT = (np.arange(T)[None] < [[T - 2], [T - 3]]).astype(np.float32)
  _, aux = jax.jit(lambda *a: model.features(*a, None))(params, _inputs(), weights_BT)
  np.testing.assert_allclose(aux.gate_load_LE, np.full((L, 4), 1 / 4), rtol=1e-6)
  np.testing.assert_allclose(aux.gate_entropy_L, np.full(L, math.log(4)), rtol=1e-6)
  assert aux.measured.shape == (L, 4, B, T, D)


def test_where_every_expert_feeds_every_token_loads_are_even(built, loop):
  model, params = built(_config(4, "mean"))
  _, aux = jax.jit(model.features)(params, _inputs(), np.ones((B, T), np.float32), None)
  np.testing.assert_array_equal(aux.ffn_load_LE, np.full((L, 4), 1 / 4))
  np.testing.assert_array_equal(aux.balance_L, np.ones(L))


def test_number_of_parameters():
  # D = 256, L = 4, E = 4, V = 50,257, T = 128, F = 4 D, two coupler rounds, untied head:
  table = 50_257 * 256  # 12,865,792; once to read, once to write
  positions = 128 * 256  # 32,768
  norms = 4 * 256  # gain and bias, twice
  attention = 256 * 768 + 768 + 256 * 256 + 256  # 263,168
  ffn = 256 * 1024 + 1024 + 1024 * 256 + 256  # 525,568
  expert = norms + attention + ffn  # 789,760 = 12 D^2 + 13 D
  # Norm, adjacency, gate kernel and bias, two kernels.
  coupler_round = 512 + 16 + 512 + 1 + 2 * 256 * 256  # 132,113
  wanted = 2 * table + positions + 4 * (4 * expert + 2 * coupler_round) + 2 * 256
  assert wanted == 39_457_928
  model = language_model.build(ModelConfig(), 50_257, _updates)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == wanted


@pytest.mark.parametrize(
  ("coupler", "positions", "selected"),
  [
    ("graph", "learned", 0),
    ("graph", "rotary", 0),
    ("hypergraph", "learned", 0),
    ("attention", "rotary", 0),
    ("graph", "rotary", 1),
  ],
)
def test_reading_on_is_reading_at_once(built, coupler, positions, selected):
  """In pieces, with rows at different places and junk behind the shorter one."""
  model, params = built(_config(3, coupler, positions=positions, selected_experts=selected))
  whole_BTV = jax.jit(model.logits)(params, _inputs())
  read = jax.jit(model.read)
  caches = model.init_caches(B, T)
  first_BTV, reading = read(params, caches, _inputs()[:, :3], np.zeros(B, np.int32))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(first_BTV, whole_BTV[:, :3])
  # Row 0 goes back to place 1: what it has read behind that counts for nothing any more.
  start_B = np.array([1, 3], np.int32)
  next_BT = np.stack([_inputs()[0, 1:3], _inputs()[1, 3:5]])
  next_BTV, reading = read(params, reading.caches, next_BT, start_B)
  close(next_BTV[0], whole_BTV[0, 1:3])
  close(next_BTV[1], whole_BTV[1, 3:5])
  close(reading.share_LBTE.sum(-1), np.ones((L, B, 2)))


def test_shares_are_the_gates_where_experts_agree(built):
  """Each expert's part in the pooled update, with E times the same expert and an uneven gate."""
  config = _config(3, "mean")
  model, params = built(config)
  experts = jax.tree.map(lambda a: np.repeat(a[:, :1], 3, axis=1), params["layers"]["experts"])
  params = {**params, "layers": {**params["layers"], "experts": experts}}
  caches = model.init_caches(B, T)
  _, reading = jax.jit(model.read)(params, caches, _inputs(), np.zeros(B, np.int32))
  _, aux = jax.jit(model.features)(params, _inputs(), np.ones((B, T), np.float32), None)
  assert np.ptp(aux.gate_load_LE) > 0.1
  np.testing.assert_allclose(reading.share_LBTE.mean((1, 2)), aux.gate_load_LE, rtol=1e-4)


def test_a_seed_draws_what_it_always_drew():
  """Else every figure that was measured before would be another run's."""
  params = jax.jit(language_model.build(_config(3), V, _updates).init)(jax.random.key(0))
  drawn = [params["embedding"][0, 0], *params["layers"]["experts"]["qkv_kernel"][:, 1, 0, 0, 0, 0]]
  np.testing.assert_allclose(drawn, [0.02692044, -0.1496902, 0.4610273], rtol=1e-5)
  # From when it lay the other way.
  np.testing.assert_allclose(params["head"][:2, 1], [-0.07621294, -0.11414873], rtol=1e-5)
