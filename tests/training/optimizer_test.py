"""Learning-rate schedules in closed form; optimizers against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hgnn_moe_jax.config import TrainingConfig
from hgnn_moe_jax.errors import ConfigError, UserError
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.training import optimizer as ours


def make_training(**values) -> TrainingConfig:
  config = TrainingConfig(steps=1)
  for name, value in values.items():
    setattr(config, name, value)
  return config


def rates(total: int, **values) -> np.ndarray:
  schedule = ours.learning_rate_schedule(make_training(**values), total)
  return np.asarray([float(schedule(jnp.int32(t))) for t in range(total + 1)])


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_cosine_falls_from_the_peak_to_the_final_rate(warmup):
  got = rates(10, learning_rate=0.5, final_learning_rate=0.1, warmup_steps=warmup)
  shares = [(t - warmup) / (10 - warmup) for t in range(warmup, 11)]
  wanted = [0.1 + 0.4 * (1 + math.cos(math.pi * share)) / 2 for share in shares]
  np.testing.assert_allclose(got[warmup:], wanted, rtol=1e-6)
  assert got[10] == pytest.approx(0.1, rel=1e-6)  # reached when the run is over


def test_wsd_rises_stays_and_falls_in_a_line():
  got = rates(
    10,
    schedule="wsd",
    learning_rate=0.4,
    final_learning_rate=0.1,
    warmup_steps=2,
    decay_fraction=0.3,
  )
  wanted = [0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1]
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_wsd_of_extreme_fractions_still_ends_at_the_final_rate(fraction):
  got = rates(
    6,
    schedule="wsd",
    learning_rate=1.0,
    final_learning_rate=0.25,
    warmup_steps=2,
    decay_fraction=fraction,
  )
  assert got[2] == pytest.approx(1.0) and got[6] == pytest.approx(0.25)
  assert (np.diff(got[2:]) <= 1e-7).all()


def test_constant_ignores_the_final_rate():
  got = rates(5, schedule="constant", learning_rate=0.5, final_learning_rate=0.9)
  np.testing.assert_allclose(got, 0.5)


def test_warmup_moves_in_the_first_step():
  got = rates(9, schedule="constant", learning_rate=0.8, warmup_steps=4)
  np.testing.assert_allclose(got[:6], [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)


def test_schedule_errors():
  with pytest.raises(ConfigError, match=r"warmup_steps=10: use less than the run's 10 steps"):
    rates(10, warmup_steps=10)
  with pytest.raises(ConfigError, match=r"final_learning_rate=0\.2: use at most"):
    rates(10, learning_rate=0.1, final_learning_rate=0.2)


MODELS = {
  "graph": {},
  "dense": {"num_experts": 1},
  "mean": {"coupler": "mean"},
  "matrix": {"coupler": "matrix"},
  "attention": {"coupler": "attention"},
  "hypergraph": {"coupler": "hypergraph", "hyperedge_attention": True},
  "hypergraph_plain": {"coupler": "hypergraph", "hyperedges": "all"},
  "gate": {"pooling": "gate"},
  "tied": {"tie_embeddings": True},
  "rotary": {"positions": "rotary"},
}


def model_shapes(config):
  model = language_model.build(config.model, 257, measure=lambda updates, weights: ())
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_decided_upon(name, tiny_config):
  config = tiny_config(**{f"model.{k}": v for k, v in MODELS[name].items()})
  mask = ours.decay_mask(model_shapes(config))
  for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0]:
    last = path[-1].key
    # Matrices decay; gains, biases and the few numbers that couple experts do not.
    matrix = "kernel" in last or last in ("embedding", "positions", "head")
    assert decays == matrix, path


def test_a_parameter_without_a_rule_is_an_error():
  with pytest.raises(UserError, match=r"layers/experts/tempo fits 0 weight-decay rules"):
    ours.decay_mask({"layers": {"experts": {"tempo": jnp.ones(3)}}})


def quadratic_gradients(steps: int, shapes: dict, size: float) -> list[dict]:
  rng = np.random.default_rng(0)
  return [
    {k: np.asarray(size * rng.standard_normal(s), np.float32) for k, s in shapes.items()}
    for _ in range(steps)
  ]


def test_adamw_is_clipped_adam_with_decoupled_decay():
  config = make_training(learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9, clip_norm=2.0)
  schedule = optax.linear_schedule(0.1, 0.02, 4)
  shapes = {"head": (4, 3), "final_bias": (5,)}
  params = quadratic_gradients(1, shapes, 1.0)[0]
  optimizer = ours.build(config, schedule, params)
  # The second gradient stays below the norm that is clipped.
  gradients = [
    jax.tree.map(lambda a, s=s: a * np.float32(s), g)
    for g, s in zip(quadratic_gradients(3, shapes, 1.0), (5.0, 0.1, 3.0), strict=True)
  ]
  state, got = optimizer.init(params), params
  for g in gradients:
    updates, state = optimizer.update(g, state, got)
    got = optax.apply_updates(got, updates)

  wanted = {k: v.astype(np.float64) for k, v in params.items()}
  first = {k: np.zeros(s) for k, s in shapes.items()}
  second = {k: np.zeros(s) for k, s in shapes.items()}
  for t, g in enumerate(gradients):
    norm = math.sqrt(sum(float(np.sum(v.astype(np.float64) ** 2)) for v in g.values()))
    assert (norm > 2.0) == (t != 1)
    for k in shapes:
      clipped = g[k] * min(1.0, 2.0 / norm)
      first[k] = 0.8 * first[k] + 0.2 * clipped
      second[k] = 0.9 * second[k] + 0.1 * clipped**2
      direction = (first[k] / (1 - 0.8 ** (t + 1))) / (
        np.sqrt(second[k] / (1 - 0.9 ** (t + 1))) + 1e-8
      )
      decay = 0.3 * wanted[k] if k == "head" else 0.0
      wanted[k] = wanted[k] - (0.1 - 0.02 * t) * (direction + decay)
  for k in shapes:
    np.testing.assert_allclose(got[k], wanted[k], rtol=2e-5, atol=1e-6)


def muon_update(tiny_config):
  """Parameters' shapes, a gradient, and Muon's first update at rate 1 without decay."""
  shapes = model_shapes(tiny_config())
  rng = np.random.default_rng(0)
  gradient = jax.tree.map(
    lambda s: np.asarray(rng.standard_normal(s.shape) * 1e-2, np.float32), shapes
  )
  config = make_training(optimizer="muon", weight_decay=0.0, clip_norm=0.0)
  optimizer = ours.build(config, optax.constant_schedule(1.0), shapes)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradient, zeros)
  return gradient, updates


def matrices_of(name: str, w: np.ndarray) -> np.ndarray:
  """[matrices, in, out]: layers, experts and the three of qkv apart."""
  if name == "qkv_kernel":
    return np.moveaxis(w, 3, 2).reshape(-1, w.shape[2], w.shape[4] * w.shape[5])
  return w.reshape(-1, *w.shape[-2:])


def test_muon_orthogonalizes_each_experts_matrices_and_leaves_the_rest_to_adam(tiny_config):
  gradient, updates = muon_update(tiny_config)
  taken = 0
  for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
    name, g = path[-1].key, gradient
    for key in path:
      g = g[key.key]
    coupler_matrix = name in ("in_kernel_0", "out_kernel_0")
    if name in ("qkv_kernel", "out_kernel", "ffn_in_kernel", "ffn_out_kernel") or coupler_matrix:
      taken += 1
      for step, slope in zip(
        matrices_of(name, np.asarray(update)), matrices_of(name, g), strict=True
      ):
        # All singular values are alike, as far as five rounds of the iteration bring them, and
        # the root mean square is the 0.2 of Adam's updates. The gradient's spread by 10 to 100.
        values = np.linalg.svd(step / (0.2 * math.sqrt(max(step.shape))), compute_uv=False)
        assert values.min() > 0.3 and values.max() < 1.3, (path, values)
        # It goes downhill, in the gradient's own singular directions.
        u, _, vt = np.linalg.svd(slope, full_matrices=False)
        aligned = -np.diag(u.T @ step @ vt.T) / (0.2 * math.sqrt(max(step.shape)))
        assert aligned.min() > 0.3, path
    else:
      # Adam's first step is the gradient's sign; with Nesterov's momentum it is longer by
      # beta1 / (1 + beta1).
      wanted = -(1 + 0.9 / 1.9) * g / (np.abs(g) + 1e-8)
      np.testing.assert_allclose(update, wanted, rtol=1e-3, err_msg=str(path))
  assert taken == 6


def _is_empty(node):
  return isinstance(node, optax.EmptyState)


def test_muon_is_optax_s(tiny_config):
  """Ours, put together of the same parts, can be shared out by a mesh."""
  shapes = model_shapes(tiny_config(**{"model.coupler": "attention"}))
  axes = jax.tree_util.tree_map_with_path(lambda path, _: ours._muon_axes(path), shapes)
  theirs = optax.contrib.muon(
    1.0,
    adam_b1=0.8,
    adam_b2=0.9,
    muon_weight_dimension_numbers=axes,
    consistent_rms=0.2,
  )
  config = make_training(optimizer="muon", beta1=0.8, beta2=0.9, weight_decay=0.0, clip_norm=0.0)
  built = ours.build(config, optax.constant_schedule(1.0), shapes)
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  states = [transform.init(params) for transform in (theirs, built)]
  # A checkpoint of one is one of the other.
  places = [
    [path for path, _ in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_empty)]
    for state in (states[0], states[1][0])
  ]
  assert places[0] == places[1]
  rng = np.random.default_rng(0)
  for _ in range(3):
    gradient = jax.tree.map(
      lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes
    )
    wanted, states[0] = jax.jit(theirs.update)(gradient, states[0], params)
    found, states[1] = jax.jit(built.update)(gradient, states[1], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


def test_parameter_average_golden():
  average = ours.parameter_average(0.5)
  params = {"w": jnp.asarray([1.0])}
  state = average.init(params)
  for update in (1.0, 2.0, -3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
    updates, state = average.update({"w": jnp.asarray([update])}, state, params)
    params = optax.apply_updates(params, updates)
  # d = min(1/2, (1+t)/(10+t)) is 1/10, 2/11, 3/12, ..., 9/18 = 1/2, 1/2.
  wanted, value = 1.0, 1.0
  for t, update in enumerate((1.0, 2.0, -3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
    value += update
    decay = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5][t]
    wanted = decay * wanted + (1 - decay) * value
  assert float(state.ema_params["w"][0]) == pytest.approx(wanted, rel=1e-6)
  assert int(state.count) == 10


def test_averaged_params_finds_the_average_or_returns_the_parameters():
  params = {"head": jnp.ones((2, 2))}
  for decay in (0.0, 0.9):
    optimizer = ours.build(make_training(ema_decay=decay), optax.constant_schedule(0.5), params)
    state = optimizer.init(params)
    updates, state = optimizer.update({"head": jnp.ones((2, 2))}, state, params)
    moved = optax.apply_updates(params, updates)
    found = ours.averaged_params(state, moved)["head"]
    # Decay 1/10 at first: the average has followed nine tenths of the way.
    wanted = moved["head"] if decay == 0.0 else 0.1 * params["head"] + 0.9 * moved["head"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
