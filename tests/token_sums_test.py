"""A vector for every token, and sums over tokens, on CPU and as on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import token_sums


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: request.param)
  return request.param


# Of a norm, of an expert's bias, of a norm of experts' updates, of queries, keys and values.
@pytest.mark.parametrize(
  ("shape", "tokens", "own"),
  [
    ((5,), (2, 3), 0),
    ((4, 5), (2, 3), 1),
    ((5,), (4, 2, 3), 0),
    ((2, 3, 5), (4, 6), 0),
    ((5,), (7,), 0),
  ],
)
def test_every_token_gets_the_vector_and_gives_its_gradient(shape, tokens, own, backend):
  rng = np.random.default_rng(0)
  vector = rng.standard_normal(shape).astype(np.float32)
  found, pull = jax.vjp(lambda v: token_sums.on_tokens(v, tokens, own), jnp.asarray(vector))
  assert found.shape == (*shape[:own], *tokens, *shape[own:])
  for place in np.ndindex(tokens):
    np.testing.assert_array_equal(found[(slice(None),) * own + place], vector)
  grad = rng.standard_normal(found.shape).astype(np.float32)
  wanted = np.zeros(shape)
  for place in np.ndindex(tokens):
    wanted += grad[(slice(None),) * own + place]
  np.testing.assert_allclose(pull(jnp.asarray(grad))[0], wanted, rtol=1e-5, atol=1e-5)


def test_rounded_tokens_are_summed_in_float32(backend):
  """4,095 is no number of bfloat16."""
  vector = jnp.full((1, 2), 1 / 3)
  found, pull = jax.vjp(lambda v: token_sums.on_tokens(v, (63, 65), 1, jnp.bfloat16), vector)
  assert found.dtype == jnp.bfloat16
  (grad,) = pull(jnp.ones_like(found))
  assert grad.dtype == jnp.float32
  np.testing.assert_array_equal(grad, np.full((1, 2), 4095, np.float32))


def test_a_gpu_sums_in_two_steps_that_stay_two(backend):
  jaxpr = jax.make_jaxpr(lambda x: token_sums.token_sum(x, 1))(jnp.ones((4, 2, 3, 5)))
  names = [equation.primitive.name for equation in jaxpr.eqns]
  two = ["reduce_sum", "optimization_barrier", "reduce_sum"]
  assert names == (two if backend == "gpu" else ["reduce_sum"])
