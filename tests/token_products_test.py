"""Against naive sums over experts, values and gradients, written out and by einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import token_products

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


def _assert_close(one, other):
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# Up to eight experts are written out, more are not.
@pytest.mark.parametrize("E", [1, 3, 8, 9])
def test_values_and_gradients(E):
  operator, a, b = _normal(0, E, E, B, T), _normal(1, E, B, T, D), _normal(2, E, B, T, D)
  pairs, vectors = _normal(3, E, E, B, T), _normal(4, E, B, T, D)
  swapped = np.swapaxes(pairs, 0, 1)

  mixed, pull = jax.vjp(token_products.mix, operator, a)
  _assert_close(mixed, _naive_mix(operator, a))
  grad_operator, grad_h = pull(jnp.asarray(vectors))
  _assert_close(grad_operator, _naive_products(vectors, a))
  _assert_close(grad_h, _naive_mix(np.swapaxes(operator, 0, 1), vectors))

  products, pull = jax.vjp(token_products.products, a, b)
  _assert_close(products, _naive_products(a, b))
  grad_a, grad_b = pull(jnp.asarray(pairs))
  _assert_close(grad_a, _naive_mix(pairs, b))
  _assert_close(grad_b, _naive_mix(swapped, a))

  gram, pull = jax.vjp(token_products.gram, a)
  _assert_close(gram, _naive_products(a, a))
  np.testing.assert_array_equal(gram, np.swapaxes(gram, 0, 1))
  (grad_a,) = pull(jnp.asarray(pairs))
  _assert_close(grad_a, _naive_mix(pairs + swapped, a))


@pytest.mark.parametrize("E", [3, 9])
def test_low_precision(E):
  operator, a = jnp.ones((E, E, B, T), jnp.bfloat16), jnp.ones((E, B, T, 300), jnp.bfloat16)
  mixed, pull = jax.vjp(token_products.mix, operator, a)
  assert [x.dtype for x in (mixed, *pull(mixed))] == [jnp.bfloat16] * 3
  for function, arguments in ((token_products.products, (a, a)), (token_products.gram, (a,))):
    sums, pull = jax.vjp(function, *arguments)
    assert sums.dtype == jnp.float32
    np.testing.assert_array_equal(sums, 300.0)  # A sum of ones in bfloat16 ends at 256.
    assert {x.dtype for x in pull(sums)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("E", [3, 9])
def test_no_product_of_matrices_rounds_its_operands(E):
  gradient = jax.grad(lambda a: jnp.square(token_products.gram(a)).sum())
  text = str(jax.make_jaxpr(gradient)(jnp.ones((E, B, T, D))))
  assert text.count("dot_general[") == text.count("HIGHEST") / 2 == (2 if E == 9 else 0)


@pytest.mark.parametrize("E", [8, 9])
def test_nothing_has_pairs_and_a_model_axis(E):
  gradient = jax.grad(lambda a: jnp.square(token_products.gram(a)).sum())
  text = str(jax.make_jaxpr(gradient)(jnp.ones((E, B, T, D))))
  assert f"[{E},{E},{B},{T}]" in text
  assert f"[{E},{E},{B},{T},{D}]" not in text
