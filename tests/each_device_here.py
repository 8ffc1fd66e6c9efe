"""What each device does by itself, on meshes of eight virtual devices: against one device.

GPU kernels are interpreted. Selected experts' feed-forward networks need none.

Prints {operation: {mesh: [kernels, shard_maps, distance]}}: how many of them the program has, and
the largest distance of an array, relative to its norm.
"""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hgnn_moe_jax import device, sharding, token_kernels, token_products
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.layout import by_token
from hgnn_moe_jax.models import attention_kernels, expert, head, head_kernels, language_model
from hgnn_moe_jax.models.routing import Route

MESHES = [(2, 4, 1), (2, 2, 2)]
B, T, E, D = 4, 8, 2, 32


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _vectors(seed):
  return _normal(seed, E, B, T, D)


def _with_gradients(function, *arguments):
  """The value and the arguments' gradients, for a cotangent drawn once."""

  def evaluate(*arguments):
    value, pull = jax.vjp(function, *arguments)
    cotangent = np.random.default_rng(9).standard_normal(value.shape)
    return value, pull(jnp.asarray(cotangent, value.dtype))

  return evaluate, arguments


def mix():
  """And `products`, which its gradient needs."""
  split = lambda operator, h: token_products.mix(operator, by_token(h))  # noqa: E731
  return _with_gradients(split, _normal(0, E, E, B, T), _vectors(1))


def gram():
  split = lambda a, share: token_products.gram(by_token(a), share)  # noqa: E731
  return _with_gradients(split, _vectors(0), jnp.abs(_normal(1, B, T)) / (B * T))


def attention():
  E, N, H = 4, 2, 16
  qkv = _normal(0, B, 16, E, 3, N, H).astype(jnp.bfloat16)
  attend = functools.partial(attention_kernels.causal_attention, interpret=True)
  return _with_gradients(attend, qkv, _normal(1, E, 3, N, H))


def chosen(rows=B):
  """Two of eight experts for each token: those of a device's own may be all of its tokens' two."""
  E, F, selected = 8, 16, 2
  scores_BTE = _normal(5, rows, T, E)
  chosen_BTE = jnp.argsort(jnp.argsort(-scores_BTE, -1), -1) < selected
  network = _normal(0, E, D, F), _normal(1, E, F), _normal(2, E, F, D), _normal(3, E, D)

  def feed(network, hidden_EBTD, factor_BTE):
    route = Route(chosen_BTE, jnp.where(chosen_BTE, factor_BTE, 0), jnp.zeros(E), jnp.zeros(()))
    return expert._feed_chosen(expert.FeedForward(*network), hidden_EBTD, route, selected)

  return _with_gradients(feed, network, _normal(4, E, rows, T, D), jnp.exp(scores_BTE))


def chosen_of_odd_rows():
  return chosen(3)


def cross_entropy():
  """Of 128 tokens for each of the devices."""
  B, T, D, V = 64, 16, 64, 200
  c = ModelConfig(embed_dim=D, max_length=T, compute_dtype="bfloat16")
  model = language_model.build(c, V, lambda updates_EBTD, weights_BT: None)
  target = np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32)

  def loss(head, x_BTD, weight_BT):
    return model.loss({"head": head}, x_BTD, target, weight_BT)

  return _with_gradients(loss, _normal(0, V, D), _normal(1, B, T, D), jnp.abs(_normal(2, B, T)))


def _distance(found, expected):
  found, expected = (
    [np.asarray(x, np.float64) for x in jax.tree.leaves(trees)] for trees in (found, expected)
  )
  norm = np.linalg.norm
  return max(norm(a - b) / norm(b) for a, b in zip(found, expected, strict=True))


def _measure(operation):
  function, arguments = operation()
  expected = jax.jit(function)(*arguments)
  found = {}
  for shape in MESHES:
    devices = np.asarray(jax.devices()).reshape(shape)
    mesh = Mesh(devices, sharding.AXES, axis_types=sharding.AXIS_TYPES)
    with jax.set_mesh(mesh):
      traced = jax.jit(function).trace(*arguments)
      calls = [str(traced.jaxpr).count(name) for name in ("pallas_call[", "shard_map[")]
      got = traced.lower().compile()(*arguments)
    found[" x ".join(map(str, shape))] = *calls, _distance(got, expected)
  return found


if __name__ == "__main__":
  assert jax.device_count() == 8
  with mock.patch.object(device, "nvidia_capability", lambda: 9.0):
    for module, names in (
      (token_kernels, ("mix", "products", "gram")),
      (head_kernels, ("log_totals", "errors")),
    ):
      for name in names:
        setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    head._ALIGNMENT = {}
    operations = (mix, gram, attention, chosen, chosen_of_odd_rows, cross_entropy)
    print(json.dumps({operation.__name__: _measure(operation) for operation in operations}))
