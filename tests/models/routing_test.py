import jax
import numpy as np
import pytest
from flax.core import meta

from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models.routing import Pool

E, B, T, D = 3, 2, 4, 5


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _naive(params, y_EBTD, x_BTD):
  """Token by token, float64: pooled update and gates."""
  pooled, gates = np.zeros((B, T, D)), np.zeros((B, T, E))
  for b in range(B):
    for t in range(T):
      x = x_BTD[b, t]
      x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
      score = (params["norm"]["scale"] * x + params["norm"]["bias"]) @ params["gate_kernel"]
      gates[b, t] = np.exp(score) / np.exp(score).sum()
      pooled[b, t] = sum(gates[b, t, e] * y_EBTD[e, b, t] for e in range(E))
  return pooled, gates


def _pool(pooling, num_experts=E):
  return Pool(ModelConfig(embed_dim=D, num_experts=num_experts, pooling=pooling))


def test_gate_matches_naive_loops(random_params, assert_slopes):
  y_EBTD, x_BTD, pool = _normal(0, E, B, T, D), _normal(1, B, T, D), _pool("gate")
  shapes = meta.unbox(jax.eval_shape(pool.init, jax.random.key(0), y_EBTD, x_BTD)["params"])
  arguments = (random_params(shapes), y_EBTD, x_BTD)
  cotangents = _normal(2, B, T, D), _normal(3, B, T, E)

  def both(arguments, cotangents):
    out, pull = jax.vjp(lambda a: pool.apply({"params": a[0]}, *a[1:]), arguments)
    return out, pull(cotangents)[0]

  (pooled, gates), gradients = jax.jit(both)(arguments, cotangents)
  wanted_pooled, wanted_gates = _naive(*arguments)
  np.testing.assert_allclose(pooled, wanted_pooled, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gates, wanted_gates, rtol=1e-5)
  np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)
  assert gates.min() > 0 and gates.std() > 0.05

  def twin(arguments):
    return sum(np.sum(c * o) for c, o in zip(cotangents, _naive(*arguments), strict=True))

  assert_slopes(twin, arguments, gradients)


@pytest.mark.parametrize("pooling", ["mean", "gate"])
def test_pooling_starts_as_the_mean(pooling):
  y_EBTD, x_BTD = _normal(0, E, B, T, D), _normal(1, B, T, D)
  run = jax.jit(_pool(pooling).init_with_output)
  (pooled, gates), variables = run(jax.random.key(0), y_EBTD, x_BTD)
  np.testing.assert_allclose(gates, np.full((B, T, E), 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(pooled, y_EBTD.mean(0), rtol=1e-5, atol=1e-6)
  assert bool(variables.get("params")) == (pooling == "gate")


def test_one_expert_needs_no_gate():
  y_EBTD, x_BTD = _normal(0, 1, B, T, D), _normal(1, B, T, D)
  (pooled, gates), variables = _pool("gate", 1).init_with_output(jax.random.key(0), y_EBTD, x_BTD)
  assert not variables
  np.testing.assert_array_equal(pooled, y_EBTD[0])
  np.testing.assert_array_equal(gates, np.ones((B, T, 1)))
