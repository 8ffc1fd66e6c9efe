"""What is decided by the device, with devices that say what they are."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import device, generation
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.data.examples import Batch
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.models.language_model import Reading
from hgnn_moe_jax.training import step
from hgnn_moe_jax.training.state import TrainState

H100, A100, T4, MI300 = ({"compute_capability": c} for c in ("9.0", "8.0", "7.5", "gfx942"))


@pytest.mark.parametrize(
  ("backend", "properties", "capability", "kernels", "dtype"),
  [
    ("cpu", {}, None, (False, False), jnp.float32),
    ("tpu", {}, None, (False, False), jnp.bfloat16),
    ("gpu", H100, 9.0, (True, True), jnp.bfloat16),
    ("gpu", A100, 8.0, (True, False), jnp.bfloat16),
    ("gpu", {"compute_capability": "8.9"}, 8.9, (True, False), jnp.bfloat16),
    ("gpu", T4, 7.5, (False, False), jnp.float32),
    ("gpu", MI300, None, (False, False), jnp.bfloat16),
  ],
)
def test_what_a_device_can_do(backend, properties, capability, kernels, dtype, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**properties)])
  assert device.nvidia_capability() == capability
  assert (device.has_ampere_kernels(), device.has_hopper_kernels()) == kernels
  assert language_model.compute_dtype(ModelConfig()) == dtype


PASSES = {"xla_disable_hlo_passes": "triton-softmax-rewriter"}
AT_ONCE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
NO_SLICES = {"xla_gpu_enable_dynamic_slice_fusion": False}


@pytest.mark.parametrize(
  ("backend", "properties", "flags", "expected"),
  [
    ("cpu", {}, "", {}),
    ("gpu", MI300, "", {}),
    ("gpu", T4, "--xla_other=1", {**PASSES, **AT_ONCE, **NO_SLICES}),
    ("gpu", A100, "--xla_disable_hlo_passes=cse", {**AT_ONCE, **NO_SLICES}),
    ("gpu", A100, "--xla_gpu_command_buffer_scheduling_mode=LHS", {**PASSES, **NO_SLICES}),
    ("gpu", A100, "--xla_gpu_enable_dynamic_slice_fusion=true", {**PASSES, **AT_ONCE}),
  ],
)
def test_options_of_the_compiler(backend, properties, flags, expected, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**properties)])
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert device.compiler_options() == expected


@pytest.mark.parametrize(
  ("backend", "plain", "flags", "expected"),
  [
    ("cpu", False, "--xla_other=1", {"xla_backend_optimization_level": 1}),
    ("cpu", False, "--xla_backend_optimization_level=3", {}),
    ("cpu", True, "", {}),
    ("gpu", False, "", {}),
  ],
)
def test_options_of_the_first_state(backend, plain, flags, expected, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setenv("XLA_FLAGS", flags)
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", plain)
  try:
    assert device.initialization_options() == expected
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_first_state_is_compiled_with_them(monkeypatch):
  monkeypatch.setattr(device, "initialization_options", lambda: {"xla_no_such_option": "1"})
  pieces = [SimpleNamespace(init=lambda *_: jnp.zeros(2)) for _ in range(3)]
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    step.make_init(*pieces)(np.uint32(0))


def test_large_programs_are_compiled_with_them(monkeypatch):
  monkeypatch.setattr(device, "compiler_options", lambda: {"xla_no_such_option": "1"})
  train = step.make_dispatch(lambda state, batch: (state, batch.weights_BT.sum()), 2, 4, 0)
  train_state = TrainState(*[jnp.zeros(())] * 5)

  class Model:
    features = staticmethod(lambda params, inputs, weights, key: (params, None))
    loss = staticmethod(lambda params, x, targets, weights: x * weights.sum())

    def read(self, params, caches, inputs_BT, start_B):
      share_LBTE = jnp.ones((1, *inputs_BT.shape, 2))
      return jnp.zeros((*inputs_BT.shape, 5)), Reading(caches, share_LBTE)

  score = step.make_evaluation(Model(), 2, 4, 0)
  write = generation._programs(Model())
  batch = Batch(*(jnp.zeros((2, 3, 4), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
  ids, one, zero = batch.inputs_BT[0], step.as_count(1), jnp.zeros(())
  chooser = generation._chooser(generation.Sampling())
  keys = jax.random.split(jax.random.key(0), 3)
  logits, seen = jnp.zeros((3, 5)), jnp.zeros((3, 5), bool)
  state = generation._State(zero, logits, ids[:, 0], ids[:, 0], seen, keys, one)
  for program, arguments in (
    (train, (train_state, step.Feed(None, None, batch), one)),
    (score, (zero, step.Feed(None, None, batch), one)),
    (write.read, (zero, zero, ids, ids[:, 0] + 4)),
    (write.pick, (zero, state, chooser)),
    (write.advance, (zero, state, chooser)),
  ):
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
      program.lower(*arguments).compile()
