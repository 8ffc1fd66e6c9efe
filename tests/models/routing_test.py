import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models.routing import Pool, Router

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


def _pooled(module, params, y_EBTD, x_BTD):
  gate_BTE, pool = module.apply({"params": params}, x_BTD)
  return pool(y_EBTD), gate_BTE


def test_gate_matches_naive_loops(random_params, assert_slopes):
  y_EBTD, x_BTD, pool = _normal(0, E, B, T, D), _normal(1, B, T, D), _pool("gate")
  shapes = meta.unbox(jax.eval_shape(pool.init, jax.random.key(0), x_BTD)["params"])
  arguments = (random_params(shapes), y_EBTD, x_BTD)
  cotangents = _normal(2, B, T, D), _normal(3, B, T, E)

  def both(arguments, cotangents):
    out, pull = jax.vjp(lambda a: _pooled(pool, *a), arguments)
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
  params = _pool(pooling).init(jax.random.key(0), x_BTD).get("params", {})
  pooled, gates = _pooled(_pool(pooling), params, y_EBTD, x_BTD)
  np.testing.assert_allclose(gates, np.full((B, T, E), 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(pooled, y_EBTD.mean(0), rtol=1e-5, atol=1e-6)
  assert bool(params) == (pooling == "gate")


def test_one_expert_needs_no_gate():
  y_EBTD, x_BTD = _normal(0, 1, B, T, D), _normal(1, B, T, D)
  pool = _pool("gate", 1)
  assert not pool.init(jax.random.key(0), x_BTD)
  pooled, gates = _pooled(pool, {}, y_EBTD, x_BTD)
  np.testing.assert_array_equal(pooled, y_EBTD[0])
  np.testing.assert_array_equal(gates, np.ones((B, T, 1)))


def _naive_route(kernel_DE, x_BTD, weights_BT, selected):
  """Token by token, float64: who is chosen, factors, loads and balance."""
  chosen, factor, probability = (np.zeros((B, T, E)) for _ in range(3))
  for b in range(B):
    for t in range(T):
      x = x_BTD[b, t]
      score = (x - x.mean()) / np.sqrt(x.var() + 1e-5) @ kernel_DE
      probability[b, t] = np.exp(score) / np.exp(score).sum()
      for e in np.argsort(-score)[:selected]:
        chosen[b, t, e], factor[b, t, e] = 1, E * probability[b, t, e]
  valid = weights_BT[..., None] / weights_BT.sum()
  load = (chosen * valid).sum((0, 1)) / selected
  return chosen, factor, load, E * np.dot(load, (probability * valid).sum((0, 1)))


@pytest.mark.parametrize("selected", [1, 2, 3])
def test_route_matches_naive_loops(selected, assert_slopes):
  router = Router(ModelConfig(embed_dim=D, num_experts=E, selected_experts=selected))
  kernel, x_BTD = _normal(0, D, E), _normal(1, B, T, D)
  weights_BT = (np.arange(T)[None] < [[T], [T - 2]]).astype(np.float32)
  arguments, cotangent = (kernel, x_BTD), _normal(2, B, T, E)

  def route(kernel, x_BTD):
    return router.apply({"params": {"router_kernel": kernel}}, x_BTD, weights_BT)

  found = jax.jit(route)(*arguments)
  wanted = _naive_route(*arguments, weights_BT, selected)
  assert found.chosen_BTE.dtype == bool and (found.chosen_BTE.sum(-1) == selected).all()
  for got, exact in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)

  def total(kernel, x_BTD):
    found = route(kernel, x_BTD)
    return jnp.sum(cotangent * found.factor_BTE) + found.balance

  def twin(arguments):
    _, factor, _, balance = _naive_route(*arguments, weights_BT, selected)
    return np.sum(cotangent * factor) + balance

  assert_slopes(twin, arguments, jax.jit(jax.grad(total, (0, 1)))(*map(jnp.asarray, arguments)))


def test_balance_by_hand():
  """Two experts, two tokens: e is one for the first and the other for the second, or both."""
  router = Router(ModelConfig(embed_dim=2, num_experts=2, selected_experts=1))
  x_BTD = jnp.array([[[1.0, -1.0], [-1.0, 1.0]]])  # Normalised already, but for epsilon.
  run = lambda kernel, weights_BT: router.apply(  # noqa: E731
    {"params": {"router_kernel": jnp.asarray(kernel)}}, x_BTD, jnp.asarray(weights_BT)
  )
  even = run([[20.0, 0.0], [0.0, 20.0]], [[1.0, 1.0]])
  np.testing.assert_allclose(even.balance, 1.0, rtol=1e-5)
  np.testing.assert_allclose(even.load_E, [0.5, 0.5])
  # The second token is padding: all that counts has chosen expert 0, with probability 1.
  uneven = run([[20.0, 0.0], [0.0, 20.0]], [[1.0, 0.0]])
  np.testing.assert_allclose(uneven.balance, 2.0, rtol=1e-5)
  np.testing.assert_allclose(uneven.factor_BTE, [[[2.0, 0.0], [0.0, 2.0]]], atol=1e-6)
  nothing = run([[20.0, 0.0], [0.0, 20.0]], [[0.0, 0.0]])
  assert not nothing.load_E.any() and nothing.balance == 0.0


def test_an_untrained_router_tells_experts_apart():
  router = Router(ModelConfig(embed_dim=64, num_experts=4, selected_experts=1))
  x_BTD = _normal(0, 8, 64, 64)
  route, _ = jax.jit(router.init_with_output)(
    jax.random.key(0), x_BTD, np.ones((8, 64), np.float32)
  )
  assert route.load_E.min() > 0.15
  chosen = np.asarray(route.factor_BTE)[np.asarray(route.chosen_BTE)]
  assert 1.0 < chosen.mean() < 2.5
