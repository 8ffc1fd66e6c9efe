"""The kernels, interpreted, against attention written out; who uses them; and that Triton takes
them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hgnn_moe_jax import device, sharding
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models import attention, attention_kernels, expert, language_model

B, T, E, N, H = 2, 16, 3, 2, 16


def _normal(seed, shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _distance(found, expected):
  found, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, expected))
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def _plain(qkv_BTESNH, bias_ESNH):
  """In float64, one query at a time."""
  x = np.asarray(qkv_BTESNH, np.float64) + np.asarray(bias_ESNH, np.float64)
  mixed = np.zeros((x.shape[2], x.shape[0], x.shape[1], *x.shape[4:]))
  for e, b, t, n in np.ndindex(mixed.shape[:-1]):
    q, k, v = x[b, t, e, 0, n], x[b, : t + 1, e, 1, n], x[b, : t + 1, e, 2, n]
    weight = np.exp(k @ q / np.sqrt(len(q)))
    mixed[e, b, t, n] = weight @ v / weight.sum()
  return mixed


def _written_out(qkv_BTESNH, bias_ESNH):
  B, T, E, _, N, H = qkv_BTESNH.shape
  q, k, v = jnp.moveaxis(qkv_BTESNH + bias_ESNH[None, None], 3, 0)
  q, k, v = (a.reshape(B, T, E * N, H) for a in (q, k, v))
  return jnp.moveaxis(attention.causal_attention(q, k, v).reshape(B, T, E, N, H), 2, 0)


@pytest.mark.parametrize(("T", "H"), [(16, 32), (32, 16), (128, 64)])
def test_mixtures_and_gradients(T, H):
  qkv, bias = _normal(0, (B, T, E, 3, N, H), jnp.bfloat16), _normal(1, (E, 3, N, H))
  weights = _normal(2, (E, B, T, N, H))
  assert attention_kernels.fits(qkv)

  def gradients(attend, qkv):
    total = lambda *given: jnp.sum(attend(*given).astype(jnp.float32) * weights)  # noqa: E731
    return jax.jit(jax.grad(total, (0, 1)))(qkv, bias)

  attend = functools.partial(attention_kernels.causal_attention, interpret=True)
  mixed = attend(qkv, bias)
  assert mixed.dtype == jnp.bfloat16
  assert _distance(mixed, jnp.asarray(_plain(qkv.astype(jnp.float32), bias), jnp.float32)) < 4e-3
  expected = gradients(_written_out, qkv.astype(jnp.float32))
  for found, wanted, dtype in zip(
    gradients(attend, qkv), expected, (jnp.bfloat16, jnp.float32), strict=True
  ):
    assert found.dtype == dtype and _distance(found, wanted) < 8e-3


def test_a_token_sees_none_behind_it():
  qkv, bias = _normal(0, (B, T, E, 3, N, H), jnp.bfloat16), jnp.zeros((E, 3, N, H))
  attend = functools.partial(attention_kernels.causal_attention, interpret=True)
  before, after = attend(qkv, bias), attend(qkv.at[:, 9:].set(7), bias)
  np.testing.assert_array_equal(before[:, :, :9], after[:, :, :9])
  assert np.all(np.any(before[:, :, 9:] != after[:, :, 9:], axis=(0, 1, 3, 4)))


@pytest.mark.parametrize(
  ("T", "H", "dtype"),
  [
    (15, 16, jnp.bfloat16),
    (256, 16, jnp.bfloat16),
    (16, 8, jnp.bfloat16),
    (16, 48, jnp.bfloat16),
    (16, 128, jnp.bfloat16),
    (16, 16, jnp.float32),
  ],
)
def test_others_are_refused(T, H, dtype):
  assert not attention_kernels.fits(jax.ShapeDtypeStruct((B, T, E, 3, N, H), dtype))


@pytest.mark.parametrize(("T", "H"), [(128, 64), (128, 16), (16, 64), (16, 16)])
def test_they_lower_for_a_gpu(T, H, lowered_for_gpu):
  qkv = jax.ShapeDtypeStruct((B, T, E, 3, N, H), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct((E, 3, N, H), jnp.float32)

  def total(qkv, bias):
    return attention_kernels.causal_attention(qkv, bias).astype(jnp.float32).sum()

  text = lowered_for_gpu(jax.value_and_grad(total, (0, 1)), qkv, bias)
  assert "_forward_kernel" in text and "_backward_kernel" in text


def _config(compute_dtype, **changes):
  return ModelConfig(
    embed_dim=N * H,
    num_layers=5,
    num_heads=N,
    num_experts=E,
    max_length=T,
    compute_dtype=compute_dtype,
    coupler="mean",
    **changes,
  )


def _build(config):
  """The model with these blocks, and its parameters."""
  model = language_model.build(config, 11, lambda updates_EBTD, weights_BT: None)
  return model, jax.jit(model.init)(jax.random.key(0))


def _gradient(model):
  ids_BT = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)

  def loss(params):
    x_BTD, _ = model.features(params, ids_BT, jnp.ones((B, T)), None)
    return model.loss(params, x_BTD, ids_BT, jnp.ones((B, T)))

  return jax.grad(loss)


def test_experts_compute_the_same_with_them(monkeypatch):
  model, params = _build(_config("float32"))
  expected = jax.jit(_gradient(model))(params)
  called = []

  def interpreted(qkv_BTESNH, bias_ESNH):
    """XLA's CPU backend has no small products of bfloat16: the rest is in float32."""
    called.append(qkv_BTESNH.shape)
    qkv_BTESNH = qkv_BTESNH.astype(jnp.bfloat16)
    mixed = attention_kernels.causal_attention(qkv_BTESNH, bias_ESNH, True)
    return mixed.astype(jnp.float32)

  monkeypatch.setattr(expert, "_takes_kernels", lambda qkv_BTESNH: True)
  monkeypatch.setattr(
    expert, "attention_kernels", type("Kernels", (), {"causal_attention": interpreted})
  )
  found = jax.jit(_gradient(model))(params)
  assert set(called) == {(B, T, E, 3, N, H)}
  for name, wanted in expected["layers"]["experts"].items():
    assert _distance(found["layers"]["experts"][name], wanted) < 3e-2, name


@pytest.mark.parametrize(
  ("positions", "mesh", "calls"),
  [
    ("learned", None, 2),
    ("rotary", None, 0),
    ("learned", (2, 3, 2), 2),
    ("learned", (4, 1, 1), 0),  # It has two rows.
  ],
)
def test_who_uses_them(positions, mesh, calls, monkeypatch):
  """A layer once forward and once backward: nothing is attended to again to go backward."""
  monkeypatch.setattr(device, "has_hopper_kernels", lambda: True)
  monkeypatch.setattr(attention, "causal_attention", lambda q, k, v: v)
  model, params = _build(_config("bfloat16", positions=positions))
  axes, kinds = (sharding.AXES, sharding.AXIS_TYPES) if mesh else ((), ())
  on = AbstractMesh(mesh or (), axes, axis_types=kinds)
  with jax.sharding.use_abstract_mesh(on):
    gradient = jax.make_jaxpr(_gradient(model))(params)
  assert str(gradient).count("pallas_call[") == calls
  caches = jax.eval_shape(lambda: model.init_caches(B, T))
  start_B, ids_BT = (jnp.zeros(shape, jnp.int32) for shape in ((B,), (B, T)))
  assert "pallas_call" not in str(jax.make_jaxpr(model.read)(params, caches, ids_BT, start_B))
