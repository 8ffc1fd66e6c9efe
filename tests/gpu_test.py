"""What only a GPU can show, skipped elsewhere.

JAX_PLATFORMS=cuda JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest tests/gpu_test.py

Numbers are compared with float32 at full precision on the same device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hgnn_moe_jax import device, sharding, token_kernels, token_sums
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.examples import place, stream_examples
from hgnn_moe_jax.models import attention, attention_kernels, head, language_model
from hgnn_moe_jax.orthogonality import gram, outputs
from hgnn_moe_jax.training.assembly import assemble_sized
from hgnn_moe_jax.training.step import Feed, as_count

pytestmark = pytest.mark.skipif(
  not device.has_ampere_kernels(), reason="no NVIDIA GPU of compute capability 8 or more"
)

V, T, B = 1001, 64, 8


def _normal(seed, shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _distance(found, expected):
  """Of two trees, relative to the second one's norm."""
  flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t)]) for t in (found, expected)]
  found, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in flat)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(autouse=True)
def _standard_promotion():
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "shape",
  # The last two with an odd number of rows, and with one: tiles of a single row.
  [
    *((1, 4, 512, 256), (3, 8, 100, 1024), (2, 6, 30, 96), (1, 1, 4, 32)),
    *((2, 3, 7, 96), (1, 4, 1, 256)),
  ],
)
def test_kernels(shape, dtype):
  G, E, N, D = shape
  a, b, operator = (
    _normal(0, shape, dtype),
    _normal(1, shape, dtype),
    _normal(2, (G, E, E, N), dtype),
  )
  centre = _normal(3, (G, E, D))
  exact = lambda x: np.asarray(x.astype(jnp.float32), np.float64)  # noqa: E731
  centred = exact(a) - exact(centre)[:, :, None]
  for found, expected in (
    (token_kernels.products(a, b), np.einsum("gind,gjnd->gijn", exact(a), exact(b))),
    (token_kernels.gram(a, centre), np.einsum("gind,gjnd->gijn", centred, centred)),
    (
      token_kernels.mix(operator, a, centre),
      np.einsum("gijn,gjnd->gind", exact(operator), centred),
    ),
  ):
    error = np.linalg.norm(exact(found) - expected) / np.linalg.norm(expected)
    assert error < (3e-3 if found.dtype == jnp.bfloat16 else 1e-6)


def test_attention():
  shape, weights = (2, 128, 8, 64), _normal(3, (2, 128, 8, 64))
  q, k, v = (_normal(seed, shape, jnp.bfloat16) for seed in range(3))

  def total(q, k, v):
    return jnp.sum(attention.causal_attention(q, k, v).astype(jnp.float32) * weights)

  fused = jax.grad(total, (0, 1, 2))(q, k, v)
  with jax.default_matmul_precision("highest"):
    exact = jax.grad(total, (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
  assert _distance(fused, exact) < 1e-2


@pytest.mark.parametrize(("length", "head_dim"), [(128, 64), (64, 32), (16, 16)])
def test_attention_of_short_rows(length, head_dim):
  rows, experts, heads = 3, 4, 2
  qkv = _normal(0, (rows, length, experts, 3, heads, head_dim), jnp.bfloat16)
  bias = _normal(1, (experts, 3, heads, head_dim))
  weights = _normal(2, (experts, rows, length, heads, head_dim))
  assert attention_kernels.fits(qkv)

  def exact(qkv, bias):
    q, k, v = jnp.moveaxis(qkv + bias[None, None], 3, 0)
    q, k, v = (x.reshape(rows, length, -1, head_dim) for x in (q, k, v))
    mixed = attention.causal_attention(q, k, v)
    return jnp.moveaxis(mixed.reshape(rows, length, experts, heads, head_dim), 2, 0)

  def gradients(attend, qkv):
    total = lambda *given: jnp.sum(attend(*given).astype(jnp.float32) * weights)  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1)))(qkv, bias)

  found = attention_kernels.causal_attention, qkv
  with jax.default_matmul_precision("highest"):
    expected = exact, qkv.astype(jnp.float32)
    mixed, wanted = jax.jit(exact)(expected[1], bias), gradients(*expected)
  assert _distance(found[0](qkv, bias), mixed) < 5e-3
  for one, other in zip(gradients(*found), wanted, strict=True):
    assert _distance(one, other) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_over_tokens(dtype):
  grad = _normal(0, (4, 32, 128, 256), dtype)
  vector = jnp.zeros((4, 256))
  _, pull = jax.vjp(lambda v: token_sums.on_tokens(v, (32, 128), 1, dtype), vector)
  expected = np.asarray(grad.astype(jnp.float32), np.float64).sum((1, 2))
  assert _distance(jax.jit(pull)(grad)[0], jnp.asarray(expected, jnp.float32)) < 1e-6


@pytest.mark.parametrize(("vocab_size", "dim"), [(V, 64), (1024, 256), (V, 320)])
def test_cross_entropy(vocab_size, dim):
  """The last one without `head_kernels`."""
  # In bfloat16 already, so that the products are exact and only their sums are rounded.
  x, kernel = (
    _normal(i, s, jnp.bfloat16).astype(jnp.float32)
    for i, s in ((0, (600, dim)), (1, (dim, vocab_size)))
  )
  target = np.random.default_rng(2).integers(0, vocab_size, 600).astype(np.int32)
  weight = np.random.default_rng(3).random(600).astype(np.float32)

  def loss(x, kernel):
    return head.linear_cross_entropy(x, kernel, target, weight, 256, jnp.bfloat16)

  value, gradients = jax.value_and_grad(loss, (0, 1))(x, kernel)
  x64, kernel64 = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  logits = x64 @ kernel64
  log_total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
  rows = np.arange(600)
  np.testing.assert_allclose(value, np.sum(weight * (log_total - logits[rows, target])), rtol=1e-6)
  error = np.exp(logits - log_total[:, None])
  error[rows, target] -= 1
  error *= weight[:, None]
  expected = (jnp.asarray(error @ kernel64.T), jnp.asarray(x64.T @ error))
  assert _distance(gradients, expected) < 5e-3


def _config(**changes):
  c = Config(name="gpu")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads, c.model.max_length = 128, 2, 4, T
  c.adaptive.controller, c.adaptive.objective = "adaptive", "both"
  c.training.steps, c.training.batch_size, c.training.steps_per_dispatch = 100, B, 4
  return with_fields(c, changes).validate()


def _model(config, remat=False):
  return language_model.build(config.model, V, outputs.update_overlap, remat)


def _loss(config, params, remat=False):
  model = _model(config, remat)
  ids = np.random.default_rng(0).integers(0, V, (2, B, T)).astype(np.int32)
  ones = jnp.ones((B, T))

  def loss(params):
    x, aux = model.features(params, ids[0], ones, jax.random.key(1))
    return model.loss(params, x, ids[1], ones) / (B * T) + aux.measured.overlap_EE.mean()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
  "changes",
  [
    *({"coupler": coupler} for coupler in ("graph", "hypergraph", "attention")),
    {"num_experts": 12},  # more than `token_kernels` take
    {"positions": "rotary"},
  ],
  ids=lambda changes: next(iter(changes.values())),
)
def test_bfloat16_computes_what_float32_does(changes):
  changes = {f"model.{field}": value for field, value in changes.items()}
  config = _config(**changes, **{"model.dropout": 0.0})
  params = jax.jit(_model(config).init)(jax.random.key(0))
  loss, gradient = _loss(config, params)
  with jax.default_matmul_precision("highest"):
    exact = _loss(with_fields(config, {"model.compute_dtype": "float32"}), params)
  np.testing.assert_allclose(loss, exact[0], rtol=2e-3)
  assert _distance(gradient, exact[1]) < 3e-2


def test_a_mesh_of_one_gpu_computes_what_the_gpu_does():
  """It goes the way of many: each device calls the kernels on its own parts."""
  config = _config(**{"model.dropout": 0.0})
  params = jax.jit(_model(config).init)(jax.random.key(0))
  loss, gradient = _loss(config, params)
  devices = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
  with jax.set_mesh(Mesh(devices, sharding.AXES, axis_types=sharding.AXIS_TYPES)):
    traced = str(jax.make_jaxpr(lambda params: _loss(config, params))(params))
    found = _loss(config, params)
  assert 0 < traced.count("pallas_call[") <= traced.count("shard_map[")
  np.testing.assert_allclose(found[0], loss, rtol=2e-3)
  assert _distance(found[1], gradient) < 3e-2


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5])
def test_effective_experts(experts):
  """Of experts that are hardly different, and of others; up to four by rotations."""
  vectors = np.random.default_rng(experts).standard_normal((1000, experts, 16))
  vectors = vectors[:, :1] + np.geomspace(1e-4, 10, 1000)[:, None, None] * vectors
  cosines = jax.jit(gram.cosine_gram)(jnp.asarray(vectors, jnp.float32))
  shares = np.linalg.eigvalsh(np.asarray(cosines, np.float64)) / experts
  shares = np.where(shares > 1e-6, shares, 1.0)
  expected = np.exp(-np.sum(shares * np.log(shares), axis=-1))
  compiled = jax.jit(gram.effective_experts).lower(cosines).compile()
  np.testing.assert_allclose(compiled(cosines), expected, atol=1e-4)
  assert ("cusolver" in compiled.as_text()) == (experts > 4)


@pytest.mark.parametrize("layers", [2, 5])
def test_what_is_computed_again_changes_nothing(layers, monkeypatch):
  """Five layers stay a loop that keeps products only."""
  config = _config(**{"model.num_layers": layers, "model.compute_dtype": "float32"})
  params = jax.jit(_model(config).init)(jax.random.key(0))
  with jax.default_matmul_precision("highest"):
    chosen, everything = _loss(config, params), _loss(config, params, remat=True)
    monkeypatch.setattr(language_model, "_is_product", lambda *_, **__: True)
    nothing = _loss(config, params)
  for other in (everything, nothing):
    np.testing.assert_allclose(chosen[0], other[0], rtol=1e-6)
    assert _distance(chosen[1], other[1]) < 1e-5


def test_steps_need_no_host_and_repeat():
  config = _config()
  assembly = assemble_sized(config, V, 100)
  tokens = np.random.default_rng(0).integers(0, V, 16 * T + 1).astype(np.int32)
  examples, _ = place(stream_examples(tokens, T), "device")

  def losses():
    state = assembly.init_state(config.seed)
    found = []
    for start in range(0, 16, 4):
      rows = jnp.asarray((np.arange(4 * B) + start).reshape(4, B) % 16, jnp.int32)
      n = jnp.asarray(as_count(4))
      with jax.transfer_guard("disallow"):
        state, records = assembly.dispatch(state, Feed(examples, rows, None), n)
      found += np.asarray(records.lm_loss).tolist()
    return found

  first = losses()
  assert first[-1] < first[0]
  assert assembly.dispatch._cache_size() == 1
  np.testing.assert_allclose(losses(), first, rtol=1e-3)  # Sums come in another order every time.


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("xla_gpu_enable_command_buffer", "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE"),
    ("xla_gpu_enable_dus_accumulator_zero_init_elimination", True),
    ("xla_gpu_enable_dynamic_slice_fusion", True),
  ],
)
def test_what_may_be_switched_on_changes_nothing(option, value):
  """Options that launch/gpu_figures.sh times; memory holds what earlier programs left in it."""
  config = _config(**{"model.num_layers": 5, "model.dropout": 0.0})
  assembly = assemble_sized(config, V, 100)
  tokens = np.random.default_rng(0).integers(0, V, 16 * T + 1).astype(np.int32)
  examples, _ = place(stream_examples(tokens, T), "device")
  feed = Feed(examples, jnp.arange(4 * B, dtype=jnp.int32).reshape(4, B) % 16, None)

  def losses(options):
    state = assembly.init_state(config.seed)
    lowered = assembly.dispatch.lower(state, feed, as_count(4))
    _, records = lowered.compile(compiler_options=options)(state, feed, as_count(4))
    return np.asarray(records.lm_loss)[:4]

  usual = device.compiler_options()
  expected = losses(usual)
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(losses({**usual, option: value}), expected, rtol=1e-3)
