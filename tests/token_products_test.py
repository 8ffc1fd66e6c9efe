"""Against naive sums over experts, values and gradients: written out, by einsum, by kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from hgnn_moe_jax import device, sharding, token_kernels, token_products

B, T, D = 2, 3, 5


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _naive_mix(operator_EEBT, h_EBTD):
  mixed_EBTD = np.zeros_like(h_EBTD)
  for i, j, b, t in np.ndindex(operator_EEBT.shape):
    mixed_EBTD[i, b, t] += operator_EEBT[i, j, b, t] * h_EBTD[j, b, t]
  return mixed_EBTD


def _naive_products(a_EBTD, b_EBTD):
  E = len(a_EBTD)
  products_EEBT = np.zeros((E, E, B, T), np.float32)
  for i, j, b, t in np.ndindex(products_EEBT.shape):
    products_EEBT[i, j, b, t] = np.dot(a_EBTD[i, b, t], b_EBTD[j, b, t])
  return products_EEBT


def _with_gradients(function, cotangent, *arguments):
  """The value and the arguments' gradients. A program of its own: it is traced here and now."""

  def evaluate(cotangent, *arguments):
    value, pull = jax.vjp(function, *arguments)
    return value, pull(cotangent)

  return jax.jit(evaluate)(jnp.asarray(cotangent), *map(jnp.asarray, arguments))


def _assert_close(one, other):
  """To rounding of the largest entry: sums of large terms may be small."""
  atol = 1e-5 * max(1.0, np.abs(other).max(initial=0.0))
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


# Up to eight experts are written out, more are not.
@pytest.mark.parametrize("E", [1, 3, 8, 9])
def test_values_and_gradients(E):
  operator, a, b = _normal(0, E, E, B, T), _normal(1, E, B, T, D), _normal(2, E, B, T, D)
  pairs, vectors = _normal(3, E, E, B, T), _normal(4, E, B, T, D)
  swapped = np.swapaxes(pairs, 0, 1)

  mixed, (grad_operator, grad_h) = _with_gradients(token_products.mix, vectors, operator, a)
  _assert_close(mixed, _naive_mix(operator, a))
  _assert_close(grad_operator, _naive_products(vectors, a))
  _assert_close(grad_h, _naive_mix(np.swapaxes(operator, 0, 1), vectors))

  products, (grad_a, grad_b) = _with_gradients(token_products.products, pairs, a, b)
  _assert_close(products, _naive_products(a, b))
  _assert_close(grad_a, _naive_mix(pairs, b))
  _assert_close(grad_b, _naive_mix(swapped, a))

  share = np.abs(_normal(5, B, T))
  mean = np.einsum("EBTD,BT->ED", a, share)
  centred = a - mean[:, None, None]
  gram, (grad_a, grad_share) = _with_gradients(token_products.gram, pairs, a, share)
  _assert_close(gram, _naive_products(centred, centred))
  np.testing.assert_array_equal(gram, np.swapaxes(gram, 0, 1))
  # The products' gradient, and by way of the mean each share of minus its sum over tokens.
  direct = _naive_mix(pairs + swapped, centred)
  total = direct.sum((1, 2))
  _assert_close(grad_a, direct - share[None, :, :, None] * total[:, None, None])
  _assert_close(grad_share, -np.einsum("EBTD,ED->BT", a, total))


@pytest.mark.parametrize("E", [1, 3, 9])
def test_matrices(E):
  w = _normal(0, 2, E, 3, 4)
  pairs = _normal(1, 2, E, E)
  gram, (grad,) = _with_gradients(token_products.matrix_gram, pairs, w)
  for layer in range(2):
    flat = w[layer].reshape(E, -1).astype(np.float64)
    _assert_close(gram[layer], flat @ flat.T)
  for layer in range(2):
    flat = w[layer].reshape(E, -1)
    _assert_close(grad[layer].reshape(E, -1), (pairs[layer] + pairs[layer].T) @ flat)


@pytest.fixture
def kernels(monkeypatch):
  """As on a GPU, but interpreted."""
  monkeypatch.setattr(token_products, "_on_gpu", token_kernels.fits)
  for name in ("mix", "products", "gram"):
    kernel = functools.partial(getattr(token_kernels, name), interpret=True)
    monkeypatch.setattr(token_kernels, name, kernel)


@pytest.mark.parametrize("E", [1, 3, 8])
def test_kernels_give_the_same(E, request):
  shape = (E, 2, 6, 64)
  operator, pairs = _normal(0, E, E, 2, 6), _normal(1, E, E, 2, 6)
  a, b, vectors = _normal(2, *shape), _normal(3, *shape), _normal(4, *shape)
  share = np.abs(_normal(5, 2, 6)) / 12
  matrix_pairs = _normal(6, 2, E, E)
  cases = (
    (token_products.mix, (operator, a), vectors),
    (token_products.products, (a, b), pairs),
    (token_products.gram, (a, share), pairs),
    (token_products.matrix_gram, (np.swapaxes(a, 0, 1),), matrix_pairs),
  )
  expected = [_with_gradients(function, up, *arguments) for function, arguments, up in cases]
  request.getfixturevalue("kernels")
  for (function, arguments, up), wanted in zip(cases, expected, strict=True):
    assert "pallas_call" in str(jax.make_jaxpr(function)(*arguments))
    jax.tree.map(_assert_close, _with_gradients(function, up, *arguments), wanted)


@pytest.mark.parametrize(
  ("rows", "length", "mesh", "tokens"),
  [
    (4, 6, (2, 2, 1), ("data", ("expert", "model"))),
    (4, 8, (1, 2, 2), ("data", ("expert", "model"))),
    (4, 6, (1, 2, 2), ("data", ("expert",))),
    (4, 5, (1, 1, 2), ("data", ("expert",))),
    (4, 5, (2, 2, 1), None),
    (3, 6, (2, 2, 1), None),
  ],
)
def test_who_uses_kernels_on_a_mesh(rows, length, mesh, tokens, monkeypatch):
  """Of tokens, as `layout.by_token` splits them; a device has parts of all matrices."""
  monkeypatch.setattr(device, "has_ampere_kernels", lambda: True)
  a = jax.ShapeDtypeStruct((3, rows, length, 64), jnp.float32)
  on = AbstractMesh(mesh, sharding.AXES, axis_types=sharding.AXIS_TYPES)
  with jax.sharding.use_abstract_mesh(on):
    traced = jax.make_jaxpr(token_products.products.__wrapped__)(a, a)
    matrices = str(jax.make_jaxpr(token_products.matrix_gram)(a))
  assert str(traced).count("pallas_call[") == (tokens is not None)
  if tokens:
    (call,) = traced.eqns
    assert call.params["in_specs"] == (PartitionSpec(None, *tokens, None),) * 2
    assert call.params["out_specs"] == (PartitionSpec(None, None, *tokens),)
  assert "pallas_call" not in matrices


@pytest.mark.parametrize("product", [token_products.products, token_products.gram])
def test_products_are_put_together_at_once(product):
  """Rows of tokens in one row: XLA for CPUs makes some slices twice if they get axes first."""
  a = jax.ShapeDtypeStruct((3, 2, 4, 8), jnp.float32)
  second = a if product is token_products.products else jax.ShapeDtypeStruct((2, 4), jnp.float32)
  eqns = jax.make_jaxpr(product.__wrapped__)(a, second).eqns
  (put_together,) = (e for e in eqns if e.primitive.name == "concatenate")
  assert [v.aval.shape for v in put_together.invars] == [(8,)] * 9


@pytest.mark.parametrize("E", [3, 9])
def test_low_precision(E):
  operator, a = jnp.ones((E, E, B, T), jnp.bfloat16), jnp.ones((E, B, T, 300), jnp.bfloat16)

  @functools.partial(jax.jit, static_argnums=0)
  def run(function, *arguments):
    out, pull = jax.vjp(function, *arguments)
    return out, pull(out)

  mixed, pulled = run(token_products.mix, operator, a)
  assert [x.dtype for x in (mixed, *pulled)] == [jnp.bfloat16] * 3
  nothing = jnp.zeros((B, T))
  for function, arguments in (
    (token_products.products, (a, a)),
    (token_products.gram, (a, nothing)),
  ):
    sums, pulled = run(function, *arguments)
    assert sums.dtype == jnp.float32
    np.testing.assert_array_equal(sums, 300.0)  # A sum of ones in bfloat16 ends at 256.
    assert [x.dtype for x in pulled] == [x.dtype for x in arguments]


@pytest.mark.parametrize("E", [8, 9])
def test_messages_in_bfloat16_are_rounded_once(E):
  rng = np.random.default_rng(0)
  operator_EEBT, h_EBTD = (
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((E, E, B, T), (E, B, T, 64))
  )
  exactly_EBTD = _naive_mix(np.float32(operator_EEBT), np.float32(h_EBTD))
  mixed_EBTD = np.float32(jax.jit(token_products.mix)(operator_EEBT, h_EBTD))
  # Half a unit in the last of 8 places, and what float32 leaves where terms cancel.
  np.testing.assert_allclose(mixed_EBTD, exactly_EBTD, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("E", [3, 9])
def test_no_product_of_matrices_rounds_its_operands(E):
  gradient = jax.grad(lambda a: jnp.square(token_products.gram(a, jnp.ones((B, T)))).sum())
  text = str(jax.make_jaxpr(gradient)(jnp.ones((E, B, T, D))))
  assert text.count("dot_general[") == text.count("HIGHEST") / 2 > 0


@pytest.mark.parametrize("E", [8, 9])
def test_nothing_has_pairs_and_a_model_axis(E):
  gradient = jax.grad(lambda a: jnp.square(token_products.gram(a, jnp.ones((B, T)))).sum())
  text = str(jax.make_jaxpr(gradient)(jnp.ones((E, B, T, D))))
  assert f"[{E},{E},{B},{T}]" in text
  assert f"[{E},{E},{B},{T},{D}]" not in text
