"""The kernels, interpreted, against sums in float64; and that Triton takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import token_kernels


def _normal(seed, shape, dtype):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _exact(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


SHAPES = [(1, 4, 8, 64), (2, 3, 6, 96), (3, 8, 5, 256), (1, 1, 4, 32)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
  G, E, N, D = shape
  assert token_kernels.fits(shape)
  a, b = _normal(0, shape, dtype), _normal(1, shape, dtype)
  operator, centre = _normal(2, (G, E, E, N), dtype), _normal(3, (G, E, D), jnp.float32)
  centred = _exact(a) - _exact(centre)[:, :, None]

  def check(found, wanted_dtype, equation, *operands):
    assert found.dtype == wanted_dtype
    expected = np.einsum(equation, *operands)
    # A result in bfloat16 is rounded once, to eight bits.
    relative = 2**-8 if found.dtype == jnp.bfloat16 else 1e-6
    assert np.all(np.abs(_exact(found) - expected) <= relative * np.abs(expected) + 3e-5)

  products, gram, mix = (token_kernels.products, token_kernels.gram, token_kernels.mix)
  pairs, mixed = (jnp.float32, "gind,gjnd->gijn"), (dtype, "gijn,gjnd->gind")
  check(products(a, b, interpret=True), *pairs, _exact(a), _exact(b))
  check(gram(a, interpret=True), *pairs, _exact(a), _exact(a))
  check(gram(a, centre, interpret=True), *pairs, centred, centred)
  check(mix(operator, a, interpret=True), *mixed, _exact(operator), _exact(a))
  check(mix(operator, a, centre, interpret=True), *mixed, _exact(operator), centred)


@pytest.mark.parametrize("shape", [(1, 9, 8, 64), (1, 4, 8, 48), (1, 4, 8, 5)])
def test_other_shapes_are_refused(shape):
  assert not token_kernels.fits(shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_they_lower_for_a_gpu(dtype, lowered_for_gpu):
  G, E, N, D = shape = (2, 6, 100, 384)
  a = jax.ShapeDtypeStruct(shape, dtype)
  operator = jax.ShapeDtypeStruct((G, E, E, N), dtype)
  centre = jax.ShapeDtypeStruct((G, E, D), jnp.float32)
  for kernel, arguments in (
    (token_kernels.products, (a, a)),
    (token_kernels.gram, (a, centre)),
    (token_kernels.mix, (operator, a, centre)),
  ):
    assert "triton" in lowered_for_gpu(kernel, *arguments)
