"""Which matrices are compared, and how they lie while they are."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from hgnn_moe_jax import sharding, token_products
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models import language_model, matrices


def _experts(D, F, N, E=3):
  """Stacked parameters [L=2, E, ...] whose entries are all different."""
  shapes = {
    "qkv_kernel": (2, E, D, 3, N, D // N),
    "out_kernel": (2, E, D, D),
    "ffn_in_kernel": (2, E, D, F),
    "ffn_out_kernel": (2, E, F, D),
  }
  return {k: np.arange(np.prod(s), dtype=np.float32).reshape(s) for k, s in shapes.items()}


def test_matrices_have_the_model_axis_second_last():
  D, F, N = 4, 6, 2
  layers = _experts(D, F, N)
  combined = matrices.matrices(layers, "combined")
  assert {role: w.shape for role, w in combined.items()} == {
    "ffn_input": (2, 3, D, F),
    "ffn_output": (2, 3, D, F),
    "attention_input": (2, 3, D, 3 * D),
    "attention_output": (2, 3, D, D),
  }
  # Entry by entry: d reads or writes channel d of the stream, the other index is inside.
  l, e, d, f, s, n, h = 1, 2, 3, 5, 2, 1, 0
  assert combined["ffn_input"][l, e, d, f] == layers["ffn_in_kernel"][l, e, d, f]
  assert combined["ffn_output"][l, e, d, f] == layers["ffn_out_kernel"][l, e, f, d]
  joint = (s * N + n) * (D // N) + h
  assert combined["attention_input"][l, e, d, joint] == layers["qkv_kernel"][l, e, d, s, n, h]
  assert combined["attention_output"][l, e, d, 1] == layers["out_kernel"][l, e, 1, d]


@pytest.mark.parametrize(
  ("target", "roles"),
  [
    ("ffn_input", {"ffn_input"}),
    ("ffn_output", {"ffn_output"}),
    ("attention", {"attention_input", "attention_output"}),
    ("combined", {"ffn_input", "ffn_output", "attention_input", "attention_output"}),
  ],
)
def test_target_chooses_roles(target, roles):
  layers = _experts(4, 6, 2)
  chosen = matrices.matrices(layers, target)
  assert set(chosen) == roles
  for role, w_LEDK in matrices.matrices(layers, "combined").items():
    if role in roles:
      np.testing.assert_array_equal(chosen[role], w_LEDK)


def test_model_hands_out_its_experts_matrices(random_params):
  config = ModelConfig(embed_dim=8, num_layers=1, num_heads=2, num_experts=2)
  model = language_model.build(config, 11, lambda updates, weights: None)
  params = random_params(jax.eval_shape(model.init, jax.random.key(0)))
  given = model.expert_matrices(params, "ffn_input")["ffn_input"]
  np.testing.assert_array_equal(given, params["layers"]["experts"]["ffn_in_kernel"])


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_stored_matrices_have_the_same_products(on_a_mesh):
  one = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
  layers = _experts(4, 6, 2)
  plain = matrices.matrices(layers, "combined")
  with sharding.using(one if on_a_mesh else None):
    stored = jax.jit(lambda w: matrices.matrices(w, "combined", stored=True))(layers)
  assert stored["ffn_output"].shape == (2, 3, 6, 4)
  for role, w_LEDK in plain.items():
    flat = np.sort(np.reshape(w_LEDK, (2, 3, -1)), axis=-1)
    np.testing.assert_array_equal(np.sort(stored[role].reshape(2, 3, -1), axis=-1), flat)
    expected = token_products.matrix_gram(w_LEDK)
    np.testing.assert_allclose(token_products.matrix_gram(stored[role]), expected, rtol=1e-5)


FREE = PartitionSpec.UNCONSTRAINED


@pytest.mark.parametrize(
  ("heads", "steps"),
  [
    (8, [(None, None, FREE, None, ("model", "expert"), None)]),
    (
      2,
      [
        (None, None, FREE, None, "model", "expert"),
        (None, None, FREE, None, None, ("expert", "model")),
      ],
    ),
  ],
)
def test_on_a_mesh_each_device_compares_some_heads_or_a_part_of_each(heads, steps):
  mesh = AbstractMesh((2, 2, 2), sharding.AXES, axis_types=sharding.AXIS_TYPES)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.make_jaxpr(lambda w: matrices.matrices(w, "combined", stored=True))(
      _experts(32, 64, heads, E=4)
    )
  hints = [e for e in traced.eqns if e.primitive.name == "sharding_constraint"]
  specs = [hint.params["sharding"].spec for hint in hints]
  declared = PartitionSpec(None, "expert", FREE, None, "model", None)
  found = [s for s in specs if len(s) == 6]
  assert found == [declared, *(PartitionSpec(*step) for step in steps)]
