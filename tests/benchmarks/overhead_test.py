"""The overhead benchmark compares what it says it compares."""

import math

import jax
import numpy as np
import pytest

from benchmarks import overhead
from hgnn_moe_jax.errors import UserError

VOCAB = 64


@pytest.fixture(autouse=True)
def _optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


def primitives(step, init, batch) -> str:
  return str(jax.make_jaxpr(step)(jax.eval_shape(init), batch))


def test_only_the_step_without_knows_nothing_of_overlap(tiny_config):
  """Absolute cosines, and the eigenvalues that effective experts need."""
  config = tiny_config(**{"model.dropout": 0.0})
  batch = overhead.random_batch(config, VOCAB)
  without = primitives(*overhead.step_without(config, VOCAB), batch)
  measured = primitives(*overhead.step_with(config, VOCAB), batch)
  assert "eigh" in measured and "eigh" not in without
  assert (measured.count("= abs "), without.count("= abs ")) == (3, 1), "one is not of overlaps"


@pytest.mark.parametrize("make", [overhead.step_without, overhead.step_with])
def test_each_step_computes_again_what_the_config_says(tiny_config, make):
  """Parts of it are computed again in any case, such as GELU."""
  config = tiny_config(**{"model.dropout": 0.0})
  again = tiny_config(**{"model.dropout": 0.0, "training.remat": True})
  batch = overhead.random_batch(config, VOCAB)
  some, more = (primitives(*make(c, VOCAB), batch).count("policy=None") for c in (config, again))
  assert more > some


@pytest.mark.parametrize("field", ["training.accumulation", "model.selected_experts"])
def test_what_the_step_without_does_not_know(tiny_config, field):
  """It takes the batch whole: rounds would look like what penalties save."""
  with pytest.raises(UserError, match=rf"config\.{field}=2: the step without penalties is known"):
    overhead.step_without(tiny_config(**{field: 2}), VOCAB)


def test_both_steps_train_the_same_model_alike(tiny_config):
  """The same parameters give the same loss and gradient norm."""
  changes = {"orthogonality.weight_strength": 0.0, "orthogonality.output_strength": 0.0}
  config = tiny_config(**changes, **{"model.dropout": 0.0, "model.num_layers": 1})
  batch = overhead.random_batch(config, VOCAB)
  step, init = overhead.step_with(config, VOCAB)
  plain, init_plain = overhead.step_without(config, VOCAB)
  state, (_, opt_state, key) = init(), init_plain()
  _, (loss, norm) = jax.jit(plain)((state.params, opt_state, key), batch)
  _, record = jax.jit(step)(state, batch)
  np.testing.assert_allclose(loss, record.lm_loss, rtol=1e-5)
  np.testing.assert_allclose(norm, record.grad_norm, rtol=1e-4)


def test_the_chosen_variants_are_timed_against_without(tiny_config):
  config = tiny_config(**{"model.num_layers": 1})
  result = overhead.measure(config, VOCAB, 3, 2, ["measured", "adaptive both, pairs"])
  assert list(result) == ["without", "measured", "adaptive both, pairs"]
  assert result["without"]["ratio"] == 1.0
  for r in result.values():
    assert r["seconds"] > 0.0 and 0.0 < r["ratio_low"] <= r["ratio"] <= r["ratio_high"] < math.inf
  assert "| without |" in overhead.table(result)
