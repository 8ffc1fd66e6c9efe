"""What the tests of the models share: renamed experts and twins' gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest


def _relabel(params: Any, order: Sequence[int], edges: Sequence[Sequence[int]]) -> Any:
  """The same network, or its gradient, with expert order[i] renamed i.

  Args:
    params: of a coupler, or of a whole model with its leading L.
    order: a permutation of the experts.
    edges: a family of hyperedges that holds every relabelled hyperedge too: their weights move.
      Empty where the hyperedges themselves are renamed, which leaves the weights in place.
  """
  order = np.asarray(order)
  names = [frozenset(edge) for edge in edges]
  source = [names.index(frozenset(order[list(edge)].tolist())) for edge in edges]

  def move(path, leaf):
    keys = [key.key for key in path]
    if keys[-1] in ("adjacency", "mixing"):
      return leaf[..., order[:, None], order[None, :]]
    if keys[-1] == "hyperedge_weight":
      return leaf[..., source] if source else leaf
    if ("pool" in keys and keys[-1] == "gate_kernel") or keys[-1] == "router_kernel":
      return leaf[..., order]
    return leaf[:, order] if "experts" in keys else leaf

  return jax.tree_util.tree_map_with_path(move, jax.tree.map(np.asarray, params))


def _assert_slopes(
  twin: Callable[[Any], float], arguments: Any, gradients: Any, tolerance: float = 2e-4
) -> None:
  """Central differences of a float64 twin, along a random direction per leaf, are the gradients."""
  rng = np.random.default_rng(1)
  arguments = jax.tree.map(lambda a: np.asarray(a, np.float64), arguments)
  leaves, tree = jax.tree.flatten(arguments)
  given, gradient_tree = jax.tree.flatten(gradients)
  assert tree == gradient_tree
  for i, (leaf, gradient) in enumerate(zip(leaves, given, strict=True)):
    step = 1e-5 * rng.standard_normal(leaf.shape)
    ends = [twin(tree.unflatten([*leaves[:i], leaf + s, *leaves[i + 1 :]])) for s in (step, -step)]
    wanted = (ends[0] - ends[1]) / 2e-5
    got = np.sum(np.asarray(gradient, np.float64) * step) / 1e-5
    size = np.linalg.norm(gradient)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * size + 1e-7)


@pytest.fixture(scope="session")
def relabel():
  return _relabel


@pytest.fixture(scope="session")
def assert_slopes():
  return _assert_slopes


@pytest.fixture
def optimised():
  """XLA compiles as it does for users."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)
