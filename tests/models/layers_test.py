import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.models import layers


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_normalize_by_hand():
  # Mean 3, deviations (-2, 0, 2), variance 8/3.
  normed = layers.normalize(jnp.array([1.0, 3.0, 5.0], jnp.bfloat16))
  assert normed.dtype == jnp.float32
  np.testing.assert_allclose(normed, np.array([-2, 0, 2]) / (8 / 3 + 1e-5) ** 0.5, rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: layers.normalize(x)[0])(jnp.ones(3))).all()


def test_normalize_slopes(assert_slopes):
  def naive(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

  x, factor = _normal(0, 2, 3, 5) + 1.0, _normal(1, 2, 3, 5)
  gradient = jax.grad(lambda x: jnp.sum(factor * layers.normalize(x)))(jnp.asarray(x))
  assert_slopes(lambda x: np.sum(factor * naive(x)), x, gradient)
  assert (
    jax.grad(lambda x: layers.normalize(x).sum())(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16
  )


def test_normalize_keeps_its_result():
  x = jnp.asarray(_normal(0, 4, 5))
  normal, pull = jax.vjp(layers.normalize, x)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
  assert len(kept) == 1
  np.testing.assert_array_equal(kept[0], normal)


def test_layer_norm_keeps_two_arrays(optimised):
  """By XLA's plan: what is normalised and what is multiplied next; gains and deviations it would
  keep repeated, where arrays have some megabytes."""
  shape, D = (4, 16, 128), 128
  norm = layers.LayerNorm()

  def temporary(depth):
    def total(x, kernels, gains):
      for kernel_DD, gain_D in zip(kernels, gains, strict=True):
        hidden = norm.apply({"params": {"scale": gain_D, "bias": gain_D}}, x)
        x = x + layers.project(hidden, kernel_DD)
      return jnp.sum(jnp.square(x))

    shapes = [jax.ShapeDtypeStruct((*axes, D), jnp.float32) for axes in (shape, (D,), ())]
    arguments = shapes[0], [shapes[1]] * depth, [shapes[2]] * depth
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  array = 4 * np.prod(shape) * D
  assert (temporary(6) - temporary(3)) / 3 == pytest.approx(2 * array, rel=0.1)


def _written(function, shapes, size):
  """How many arrays of so many entries the function's compiled gradient writes down."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  wanted = tuple(range(len(shapes)))
  program = jax.jit(jax.grad(function, wanted)).lower(*arguments).compile().as_text()
  _, entry = program.split("\nENTRY ")
  written = 0
  for axes, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w\-]+)\(", entry):
    made = operation not in ("parameter", "bitcast")
    written += made and math.prod(map(int, axes.split(","))) == size
  return written


def test_projection_and_bias_share_one_gradient(optimised):
  """Two arrays, product and gradient, and not one more for the bias."""
  B, T, D, N, H = 4, 64, 32, 4, 16

  def total(x, kernel, bias):
    qkv = layers.add_to_all(layers.project_all(x, kernel), bias)
    q, k, v = (jnp.swapaxes(part.squeeze(2), 1, 2) for part in jnp.split(qkv, 3, axis=2))
    weight = jnp.exp(jnp.einsum("BNTH,BNSH->BNTS", q, k))
    return jnp.sum(jnp.square(jnp.einsum("BNTS,BNSH->BNTH", weight, v)))

  assert _written(total, [(B, T, D), (D, 3, N, H), (3, N, H)], B * T * 3 * N * H) == 2


def test_what_is_normalised_is_written_once(optimised):
  """A sine, it centred, it normalised, for product and gradient, and two steps of the gradient."""
  E, B, T, D = 2, 4, 64, 32

  def total(x, kernel):
    return jnp.sum(jnp.square(layers.project_each(layers.normalize(jnp.sin(x)), kernel)))

  assert _written(total, [(E, B, T, D), (E, D, 48)], E * B * T * D) == 5


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_keeps_its_argument_only(backend, dtype, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x = jnp.asarray([*np.linspace(-6, 6, 41), -1e4, 1e4], dtype)
  value, pull = jax.vjp(layers.gelu, x)
  (kept,) = jax.tree.leaves(pull)
  np.testing.assert_array_equal(kept, x)
  z = np.asarray(x, np.float64)
  c, a = (2 / np.pi) ** 0.5, 0.044715
  bent = np.tanh(c * (z + a * z**3))
  wanted = z / 2 * (1 + bent)
  wanted_slope = (1 + bent) / 2 + z / 2 * (1 - bent**2) * c * (1 + 3 * a * z**2)
  (slope,) = pull(jnp.ones_like(x))
  assert value.dtype == slope.dtype == dtype
  rounding = {"atol": 1e-5, "rtol": 1e-6} if dtype == jnp.float32 else {"atol": 0.02, "rtol": 0.01}
  for found, exact in ((value, wanted), (slope, wanted_slope)):
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, **rounding)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_scores_are_a_product(backend, monkeypatch, assert_slopes):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  h_EBTD, kernel_DX, factor_XEBT = _normal(0, 3, 2, 4, 5), _normal(1, 5, 2), _normal(2, 2, 3, 2, 4)
  found = layers.scores(jnp.asarray(h_EBTD), jnp.asarray(kernel_DX))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.moveaxis(h_EBTD @ kernel_DX, -1, 0), rtol=1e-5, atol=1e-6)
  plain = lambda h, kernel: np.sum(factor_XEBT * np.moveaxis(h @ kernel, -1, 0))  # noqa: E731
  gradients = jax.grad(lambda h, k: jnp.sum(factor_XEBT * layers.scores(h, k)), (0, 1))(
    jnp.asarray(h_EBTD), jnp.asarray(kernel_DX)
  )
  assert_slopes(lambda a: plain(*a), (h_EBTD, kernel_DX), gradients)


def test_layer_norm_has_gain_and_bias():
  params = {"scale": np.array([1, 2, 3], np.float32), "bias": np.array([5, 6, 7], np.float32)}
  x_BTD = _normal(0, 2, 1, 3)
  normed = (x_BTD - x_BTD.mean(-1, keepdims=True)) / np.sqrt(x_BTD.var(-1) + 1e-5)[..., None]
  out = layers.LayerNorm().apply({"params": params}, x_BTD)
  np.testing.assert_allclose(out, normed * params["scale"] + params["bias"], rtol=1e-5)


# Rates are multiples of 1/256: 0.1 -> 26/256, so 230/256 = 0.8984 are kept.
@pytest.mark.parametrize(("rate", "kept"), [(0.1, 230 / 256), (0.5, 0.5)])
def test_dropout_keeps_its_fraction_and_the_mean(rate, kept):
  x = np.ones((30, 11, 101), np.float32)  # 33,330 entries, not a multiple of four
  out = np.asarray(layers.dropout(x, rate, jax.random.key(0)))
  mask = out != 0
  deviation = (kept * (1 - kept) / mask.size) ** 0.5
  assert abs(mask.mean() - kept) < 4 * deviation
  np.testing.assert_allclose(out[mask], 1 / kept, rtol=1e-6)
  # The four bytes of one random word are independent: neighbours are both kept with kept^2.
  flat = mask.reshape(-1)
  for gap in (1, 2, 3, 4):
    assert abs(np.mean(flat[gap:] & flat[:-gap]) - kept**2) < 5 * deviation


def test_dropout_is_off_without_key_or_rate_and_follows_its_key():
  x = _normal(0, 40, 7)
  first, second = jax.random.split(jax.random.key(0))
  assert layers.dropout(x, 0.5, None) is x
  assert layers.dropout(x, 0.0, first) is x
  assert layers.dropout(x, 0.001, first) is x  # less than 1/512
  np.testing.assert_array_equal(layers.dropout(x, 0.5, first), layers.dropout(x, 0.5, first))
  assert np.any(layers.dropout(x, 0.5, first) != layers.dropout(x, 0.5, second))


def test_dropout_keeps_bfloat16_and_passes_gradients_of_kept_entries():
  x = jnp.asarray(_normal(0, 40, 7), jnp.bfloat16)
  out, pull = jax.vjp(lambda x: layers.dropout(x, 0.5, jax.random.key(0)), x)
  assert out.dtype == jnp.bfloat16
  gradient = np.asarray(pull(jnp.ones_like(out))[0], np.float32)
  np.testing.assert_array_equal(gradient, np.where(np.asarray(out) != 0, 2.0, 0.0))


def test_products_match_einsums():
  x_EBTD, kernel_EDF = _normal(0, 3, 2, 4, 5), _normal(1, 3, 5, 6)
  wanted = np.einsum("EBTD,EDF->EBTF", x_EBTD, kernel_EDF)
  np.testing.assert_allclose(layers.project_each(x_EBTD, kernel_EDF), wanted, rtol=1e-4, atol=1e-5)
  wanted = np.einsum("EBTD,DF->EBTF", x_EBTD, kernel_EDF[0])
  np.testing.assert_allclose(layers.project(x_EBTD, kernel_EDF[0]), wanted, rtol=1e-4, atol=1e-5)


def test_scores_on_a_gpu_hold_no_more_than_their_vectors(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  both = jax.grad(lambda h, kernel: jnp.square(layers.scores(h, kernel)).sum(), argnums=(0, 1))
  traced = jax.make_jaxpr(both)(jnp.ones((3, 2, 4, 5)), jnp.ones((5, 2)))
  assert "[3,2,4,5]" in str(traced) and "[2,3,2,4,5]" not in str(traced)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_spread_and_mean_over_experts(backend, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x_BTD, y_EBTD = _normal(0, 2, 4, 5), _normal(1, 3, 2, 4, 5)
  spread, pull = jax.vjp(lambda x: layers.spread(x, 3), x_BTD)
  np.testing.assert_array_equal(spread, np.stack([x_BTD] * 3))
  np.testing.assert_allclose(pull(y_EBTD)[0], y_EBTD.sum(0), rtol=1e-5, atol=1e-6)
  mean = layers.expert_mean(jnp.asarray(y_EBTD))
  np.testing.assert_allclose(mean, y_EBTD.mean(0), rtol=1e-5, atol=1e-6)
  # Accumulated in float32 whatever the experts compute in.
  assert layers.expert_mean(jnp.asarray(y_EBTD, jnp.bfloat16)).dtype == jnp.float32
  ones_EBTD = jnp.ones((3, 2, 4, 5), jnp.bfloat16)
  np.testing.assert_allclose(layers.expert_mean(ones_EBTD), np.ones((2, 4, 5)), rtol=1e-6)


def test_accelerators_move_experts_without_products(monkeypatch):
  """A GPU would round a float32 product's operands to ten bits."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  step = jax.make_jaxpr(jax.grad(lambda x: layers.expert_mean(jnp.sin(layers.spread(x, 3))).sum()))
  assert "dot_general" not in str(step(jnp.ones((2, 4, 5))))
