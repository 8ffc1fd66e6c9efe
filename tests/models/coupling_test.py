"""Every coupler: tokens apart, experts interchangeable, values and gradients as in naive loops."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.extend import core as extend_core
from jax.sharding import AbstractMesh

from benchmarks.flops import matmul_flops
from hgnn_moe_jax import sharding
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models import coupling

B, T, D = 2, 6, 16
F32 = jnp.dtype(jnp.float32)


def _explicit(num_experts):
  """Unequal sizes; with four experts and more some belong to no hyperedge."""
  return json.dumps([[0, 1]] if num_experts == 2 else [[0, 1], [0, 1, 2]])


_FAMILIES = ("pairs", "triplets", "all", "explicit")
VARIANTS = [(name,) for name in ("graph", "matrix", "attention", "mean")] + [
  ("hypergraph", *choice)
  for choice in itertools.product(_FAMILIES, ("symmetric", "row"), (False, True))
]


def _sizes_for(variant):
  """Two experts have no triplets. What does not look at the tokens needs fewer sizes, as does the
  row form, which differs by a scale; with four experts the explicit list leaves one out."""
  if variant[0] == "mean" or "row" in variant:
    return (4,)
  if variant[0] == "hypergraph" and not variant[3]:
    return (3, 8)
  if variant[0] == "graph":
    return (2, 3, 4, 6, 8, 9)  # Of nine, products of matrices make the messages.
  return (3, 4, 6, 8) if "triplets" in variant else (2, 3, 4, 6, 8)


CASES = [
  pytest.param(variant, E, id=f"{'-'.join(map(str, variant))}-{E}")
  for variant in VARIANTS
  for E in _sizes_for(variant)
]


def _config(variant, num_experts, coupler_layers=1):
  config = ModelConfig(
    embed_dim=D,
    num_layers=2,
    num_heads=2,
    num_experts=num_experts,
    coupler=variant[0],
    coupler_layers=coupler_layers,
  )
  if variant[0] == "hypergraph":
    _, family, config.hypergraph_normalization, config.hyperedge_attention = variant
    config.hyperedges = _explicit(num_experts) if family == "explicit" else family
  return config


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _shapes(config):
  y_EBTD = jax.ShapeDtypeStruct((config.num_experts, B, T, D), jnp.float32)
  shapes = jax.eval_shape(coupling.Coupler(config, F32).init, jax.random.key(0), y_EBTD)
  return meta.unbox(shapes.get("params", {}))


def _forward_and_pull(config):
  """(params, y, cotangent) -> output, gradient by params, gradient by y; not compiled."""
  coupler = coupling.Coupler(config, F32)

  def run(params, y_EBTD, cotangent_EBTD):
    out_EBTD, pull = jax.vjp(lambda p, y: coupler.apply({"params": p}, y), params, y_EBTD)
    return out_EBTD, *pull(cotangent_EBTD)

  return run


@pytest.fixture(scope="module")
def traced():
  """config -> traced forward and pullback: one trace per config serves all tests."""

  @functools.cache
  def make(config):
    y_EBTD = jax.ShapeDtypeStruct((config.num_experts, B, T, D), jnp.float32)
    return jax.jit(_forward_and_pull(config)).trace(_shapes(config), y_EBTD, y_EBTD)

  return make


@pytest.fixture(scope="module")
def compiled(traced, random_params):
  """config -> (compiled forward and pullback, random parameters)."""

  @functools.cache
  def make(config):
    return traced(config).lower().compile(), random_params(_shapes(config))

  return make


@pytest.mark.parametrize(("variant", "E"), CASES)
def test_tokens_do_not_see_each_other(variant, E, compiled):
  run, params = compiled(_config(variant, E))
  y_EBTD, other_EBTD = _normal(0, E, B, T, D), _normal(1, E, B, T, D)
  b, t = 0, 3
  touched_EBTD = y_EBTD.copy()
  touched_EBTD[:, b, t] = other_EBTD[:, b, t]
  cotangent_EBTD = np.zeros_like(y_EBTD)
  cotangent_EBTD[:, b, t] = other_EBTD[:, b, t]
  out_EBTD, _, gradient_EBTD = run(params, y_EBTD, cotangent_EBTD)
  out_touched_EBTD, _, _ = run(params, touched_EBTD, cotangent_EBTD)
  here_BT = np.zeros((B, T), bool)
  here_BT[b, t] = True
  # What another token does is exactly nothing, not little.
  np.testing.assert_array_equal(np.any(out_EBTD != out_touched_EBTD, axis=(0, 3)), here_BT)
  np.testing.assert_array_equal(np.any(np.asarray(gradient_EBTD) != 0, axis=(0, 3)), here_BT)


@pytest.mark.parametrize(("variant", "E"), CASES)
def test_relabelled_experts_give_relabelled_outputs(variant, E, compiled, relabel):
  config = _config(variant, E)
  order = np.roll(np.random.default_rng(E).permutation(E), 1)
  order = order if (order != np.arange(E)).any() else order[::-1]
  edges = config.hyperedge_list() if config.coupler == "hypergraph" else ()
  renamed = config
  if variant[1:2] == ("explicit",):
    new_name = np.argsort(order)
    new_edges = json.dumps([[int(new_name[e]) for e in edge] for edge in edges])
    renamed = dataclasses.replace(config, hyperedges=new_edges)
  run, params = compiled(config)
  y_EBTD, cotangent_EBTD = _normal(0, E, B, T, D), _normal(1, E, B, T, D)
  out_EBTD, gradients, gradient_EBTD = run(params, y_EBTD, cotangent_EBTD)
  # A list of its own keeps the order of its hyperedges; a family's weights move with the names.
  family = () if renamed is not config else edges
  again = compiled(renamed)[0](relabel(params, order, family), y_EBTD[order], cotangent_EBTD[order])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
  close(again[0], out_EBTD[order])
  close(again[2], gradient_EBTD[order])
  jax.tree.map(close, again[1], relabel(gradients, order, family))


def _naive(config, params, y_EBTD):
  """The coupler token by token and pair by pair, the first two tokens only; float64."""
  E = config.num_experts
  y = np.array(y_EBTD, np.float64)
  softplus = lambda a: np.log1p(np.exp(a))  # noqa: E731
  for g in range(config.coupler_layers):
    own, norm = params[f"operator_{g}"], params[f"norm_{g}"]
    new = y.copy()
    for b, t in itertools.product(range(B), range(2)):
      h = [(y[e, b, t] - y[e, b, t].mean()) / np.sqrt(y[e, b, t].var() + 1e-5) for e in range(E)]
      h = [norm["scale"] * v + norm["bias"] for v in h]
      for i in range(E):
        share = np.zeros(E)
        for j in range(E):
          if config.coupler == "graph" and i != j:
            # The gate reads receiver and sender side by side, as the original's did.
            pair = np.concatenate([h[i], h[j]])
            score = pair @ own["gate_kernel"].T.reshape(-1) + own["gate_bias"]
            degree = sum(softplus(own["adjacency"][i, k]) for k in range(E) if k != i)
            share[j] = softplus(own["adjacency"][i, j]) / degree / (1 + np.exp(-score))
          elif config.coupler == "matrix" and i != j:
            share[j] = own["mixing"][i, j]
          elif config.coupler == "attention":
            query, key = h[i] @ own["query_kernel"], h[j] @ own["key_kernel"]
            total = [np.exp(query @ (h[k] @ own["key_kernel"]) / D**0.5) for k in range(E)]
            share[j] = np.exp(query @ key / D**0.5) / sum(total)
          elif config.coupler == "hypergraph":
            share[j] = _naive_hypergraph_share(config, own, h, i, j, softplus)
        message = sum(share[j] * h[j] for j in range(E)) @ params[f"in_kernel_{g}"]
        gelu = message / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (message + 0.044715 * message**3)))
        new[i, b, t] = y[i, b, t] + gelu @ params[f"out_kernel_{g}"]
    y = new
  return y


def _naive_hypergraph_share(config, own, h, i, j, softplus):
  edges, weight = config.hyperedge_list(), softplus(own["hyperedge_weight"])
  degree = [sum(w for w, edge in zip(weight, edges, strict=True) if e in edge) for e in (i, j)]
  share = 0.0
  for w, edge in zip(weight, edges, strict=True):
    if i in edge and j in edge:
      part = 1 / len(edge)
      if config.hyperedge_attention:
        part = 1 / sum(np.exp((h[k] - h[j]) @ own["score_kernel"]) for k in edge)
      symmetric = config.hypergraph_normalization == "symmetric"
      share += w * part / ((degree[0] * degree[1]) ** 0.5 if symmetric else degree[0])
  return share


@pytest.mark.parametrize(
  ("variant", "E"),
  [
    (("graph",), 4),
    (("graph",), 9),
    (("matrix",), 4),
    (("attention",), 4),
    (("hypergraph", "all", "symmetric", False), 4),
    (("hypergraph", "explicit", "row", True), 4),
  ],
  ids=str,
)
def test_coupler_matches_naive_loops(variant, E, compiled, assert_slopes):
  # Two coupler layers; with four experts the explicit list leaves one out.
  config = _config(variant, E, coupler_layers=2)
  run, params = compiled(config)
  y_EBTD, cotangent_EBTD = _normal(0, E, B, T, D), _normal(1, E, B, T, D)
  y_EBTD[:, :, 2:] = cotangent_EBTD[:, :, 2:] = 0  # fewer tokens for the slow twin
  out_EBTD, *gradients = run(params, y_EBTD, cotangent_EBTD)
  wanted_EBTD = _naive(config, params, y_EBTD)
  np.testing.assert_allclose(out_EBTD[:, :, :2], wanted_EBTD[:, :, :2], rtol=1e-4, atol=1e-5)
  assert_slopes(
    lambda arguments: np.sum(cotangent_EBTD * _naive(config, *arguments)),
    (params, y_EBTD),
    tuple(gradients),
    tolerance=1e-3,
  )


def test_numbers_of_pairs_of_many_experts_are_not_transposed(optimised):
  """Made in the order in which products of matrices want them, and their gradients likewise."""
  E, B, T, D = 16, 2, 24, 8
  config = dataclasses.replace(_config(("graph",), E), embed_dim=D)
  y_EBTD = jax.ShapeDtypeStruct((E, B, T, D), jnp.float32)
  shapes = jax.eval_shape(coupling.Coupler(config, F32).init, jax.random.key(0), y_EBTD)
  run = jax.jit(_forward_and_pull(config)).lower(meta.unbox(shapes["params"]), y_EBTD, y_EBTD)
  program = run.compile().as_text()
  transposed = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy)\(", program)
  entries = [np.prod([int(size) for size in axes.split(",")]) for axes in transposed]
  assert entries and E * E * B * T not in entries


@pytest.mark.parametrize(
  ("backend", "E", "mesh", "part"),
  [
    ("gpu", 9, (1, 1, 1), "9,2,6,16"),
    ("gpu", 9, (2, 3, 1), "9,1,2,16"),  # rows over data, tokens over experts' devices
    ("gpu", 9, (2, 4, 1), None),  # four do not divide a row
    ("gpu", 4, (1, 1, 1), None),
    ("cpu", 9, (1, 1, 1), None),
  ],
)
def test_messages_of_many_experts_lie_in_rows(backend, E, mesh, part, monkeypatch):
  """Each device's own, on a mesh: the partitioner gathers what is laid out on demand."""
  config = _config(("graph",), E)
  shapes = _shapes(config)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  y_EBTD = jax.ShapeDtypeStruct((E, B, T, D), jnp.float32)
  on = AbstractMesh(mesh, sharding.AXES, axis_types=sharding.AXIS_TYPES)
  with jax.sharding.use_abstract_mesh(on) if math.prod(mesh) > 1 else contextlib.nullcontext():
    traced = str(jax.make_jaxpr(lambda p, y: _forward_and_pull(config)(p, y, y))(shapes, y_EBTD))
  found = re.findall(
    r":f32\[([\d,]+)\]\S* = layout_constraint\[\s*layout=Layout(\S*\(.*?\))", traced
  )
  # Forward, and the gradient on its way back.
  assert found == ([(part, "(major_to_minor=(0, 1, 2, 3)")] * 2 if part else [])
  assert ("shard_map" in traced) == ("layout_constraint" in traced and math.prod(mesh) > 1)


def _weighted(y_EBTD):
  """A pool: a weighted sum over experts, float32."""
  weight_E = jnp.arange(1, 1 + y_EBTD.shape[0], dtype=jnp.float32)
  return jnp.einsum("EBTD,E->BTD", y_EBTD.astype(jnp.float32), weight_E)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("variant", [("graph",), ("hypergraph", "pairs", "row", False), ("mean",)])
def test_pooled_is_the_pool_of_the_coupled(variant, rounds, random_params):
  config = _config(variant, 4, coupler_layers=rounds)
  params, y_EBTD = random_params(_shapes(config)), _normal(0, 4, B, T, D)
  cotangent_BTD = _normal(1, B, T, D)

  def pooled(params, y_EBTD, dtype=F32):
    return coupling.Coupler(config, dtype).apply(
      {"params": params}, y_EBTD.astype(dtype), _weighted
    )

  def pooled_after(params, y_EBTD):
    return _weighted(coupling.Coupler(config, F32).apply({"params": params}, y_EBTD))

  def run(function):
    out_BTD, pull = jax.vjp(function, params, y_EBTD)
    return out_BTD, pull(cotangent_BTD)

  ran = (jax.jit(functools.partial(run, function))() for function in (pooled, pooled_after))
  for one, other in zip(*map(jax.tree.leaves, ran), strict=True):
    # At least 1: the gate's bias has a sum of many terms of that size, which nearly cancel.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))
  rounded_BTD = jax.jit(pooled, static_argnums=2)(params, y_EBTD, jnp.dtype(jnp.bfloat16))
  assert rounded_BTD.dtype == jnp.float32
  wanted_BTD = jax.jit(pooled_after)(params, y_EBTD)
  np.testing.assert_allclose(rounded_BTD, wanted_BTD, rtol=0, atol=0.03 * np.abs(wanted_BTD).max())


def test_pooled_multiplies_once_for_each_token():
  """Two products a round; of the last one only the pooled vectors are multiplied."""
  config = _config(("graph",), 4, coupler_layers=2)
  y_EBTD = jnp.zeros((4, B, T, D))

  def flops(pool):
    coupler = coupling.Coupler(config, F32)
    return matmul_flops(lambda p: coupler.apply({"params": p}, y_EBTD, pool), _shapes(config))

  spared = 2 * (4 - 1) * B * T * D * D
  pooled_by_sum = flops(lambda y: y.sum(0))
  assert flops(None) - pooled_by_sum == spared


def test_mean_has_no_parameters_and_changes_nothing(compiled):
  for config in (_config(("mean",), 4), _config(("graph",), 1)):
    run, params = compiled(config)
    y_EBTD = _normal(0, config.num_experts, B, T, D)
    assert not params
    np.testing.assert_array_equal(run(params, y_EBTD, y_EBTD)[0], y_EBTD)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("family", "E"), [("pairs", 2), ("triplets", 3)])
def test_uniform_hyperedge_weights_keep_the_experts_apart(family, E, attention, compiled):
  # One hyperedge with everybody: all experts receive the same message, so the differences between
  # them are exactly those they came with. Without the residual nothing but their mean was left.
  run, params = compiled(_config(("hypergraph", family, "symmetric", attention), E))
  params["operator_0"]["hyperedge_weight"][:] = 0.7
  y_EBTD = _normal(0, E, B, T, D)
  out_EBTD = np.asarray(run(params, y_EBTD, y_EBTD)[0])
  np.testing.assert_allclose(out_EBTD[0] - out_EBTD[1], y_EBTD[0] - y_EBTD[1], atol=1e-5)
  assert np.abs(out_EBTD - y_EBTD).max() > 0.1


@pytest.mark.parametrize("family", ["pairs", "triplets", "all"])
def test_many_uniform_hyperedges_keep_the_experts_apart(family, compiled):
  run, params = compiled(_config(("hypergraph", family, "symmetric", False), 6))
  params["operator_0"]["hyperedge_weight"][:] = 0.7
  y_EBTD = _normal(0, 6, B, T, D)
  out_EBTD = np.asarray(run(params, y_EBTD, y_EBTD)[0])
  assert out_EBTD.std(0).mean() > 0.5 * y_EBTD.std(0).mean()


def _sizes(jaxpr):
  """Elements of every intermediate, those of nested functions and loops included."""
  for equation in jaxpr.eqns:
    for out in equation.outvars:
      yield out.aval.size
    for inner in extend_core.jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_sizes_look_into_nested_functions():
  hidden = jax.jit(lambda x: jnp.sum(x[:, None] * x[None], axis=1))
  looped = lambda x: jax.lax.scan(lambda c, _: (hidden(c), None), x, length=2)[0]  # noqa: E731
  assert max(_sizes(jax.make_jaxpr(looped)(jnp.ones(7)).jaxpr)) == 49


@pytest.mark.parametrize(("variant", "E"), CASES)
def test_no_array_over_pairs_of_experts_has_a_model_axis(variant, E, traced):
  jaxpr = traced(_config(variant, E)).jaxpr.jaxpr
  assert max(_sizes(jaxpr), default=0) < E * E * B * T * D


def _operator_values(config, params, h_EBTD):
  operator = coupling.make_operator(config, "operator_0")
  return np.asarray(jax.jit(operator.apply)({"params": params["operator_0"]}, h_EBTD))


@pytest.mark.parametrize("attention", [False, True])
def test_hyperedge_weights_are_positive_for_any_parameter(attention, compiled):
  config = _config(("hypergraph", "explicit", "row", attention), 3)
  _, params = compiled(config)
  for values in ([-30.0, -29.0], [30.0, -30.0], [-5.0, 5.0], [0.0, 0.0]):
    params["operator_0"]["hyperedge_weight"] = np.array(values, np.float32)
    operator = _operator_values(config, params, _normal(0, 3, B, T, D))
    assert np.isfinite(operator).all() and (operator >= 0).all()
    # Receiver 0 hears 1 through both hyperedges and 2 through the second: never cut off.
    assert (operator[0, 1] > 0).all() and (operator[0, 2] > 0).all()
    np.testing.assert_allclose(operator.sum(1), 1, rtol=1e-5)


def test_adjacency_is_positive_for_any_parameter_and_the_gate_only_silences(compiled):
  config = _config(("graph",), 3)
  _, params = compiled(config)
  own = params["operator_0"]
  for scale in (0.0, 1.0, 15.0):
    own["adjacency"] = scale * np.array([[9, -2, 1], [2, 9, -2], [-1, 0, 9]], np.float32)
    own["gate_bias"] = np.asarray(40.0, np.float32)  # all gates open: the rows' shares alone
    operator = _operator_values(config, params, _normal(0, 3, B, T, D))
    assert (operator[~np.eye(3, dtype=bool)] > 0).all() and not operator[
      np.eye(3, dtype=bool)
    ].any()
    np.testing.assert_allclose(operator.sum(1), 1, rtol=1e-5)
    # The degree is the adjacency's: closed gates make a message small, not others loud.
    own["gate_bias"] = np.asarray(-40.0, np.float32)
    assert (_operator_values(config, params, _normal(0, 3, B, T, D)) < 1e-10).all()


@pytest.mark.parametrize("coupler", ["graph", "matrix", "hypergraph"])
def test_every_expert_is_heard_alike_at_the_start(coupler):
  # softplus(initial) = 1 for adjacency and hyperedge weights. Matrix: 1/3 from each of the others.
  # Graph: the same times the content gate, which is 1/2 where there is no content. Pairs: an
  # expert is in 3 of degree 3, and hears itself 3 x 1/2/3 = 1/2, each other one 1/2/3 = 1/6.
  config = _config((coupler, "pairs", "symmetric", False)[: 4 if coupler == "hypergraph" else 1], 4)
  h_EBTD = np.zeros((4, 1, 1, D), np.float32)
  operator = coupling.make_operator(config, "operator")
  values = np.asarray(jax.jit(operator.init_with_output)(jax.random.key(0), h_EBTD)[0])
  diagonal, others = {"graph": (0, 1 / 6), "matrix": (0, 1 / 3), "hypergraph": (1 / 2, 1 / 6)}[
    coupler
  ]
  wanted = np.where(np.eye(4, dtype=bool), diagonal, others)
  np.testing.assert_allclose(values.reshape(4, 4), wanted, rtol=1e-6)
