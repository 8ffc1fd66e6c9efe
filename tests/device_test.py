"""What is decided by the device, with devices that say what they are."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from hgnn_moe_jax import device
from hgnn_moe_jax.config import Config, ModelConfig, with_fields
from hgnn_moe_jax.data.examples import Batch
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.training import step
from hgnn_moe_jax.training.assembly import assemble_sized

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
ONE_GRAPH = {"xla_gpu_enable_dynamic_slice_fusion": False}


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize(
  ("backend", "properties", "flags", "expected"),
  [
    ("cpu", {}, "", {}),
    ("gpu", MI300, "", {}),
    ("gpu", T4, "--xla_other=1", {**PASSES, **AT_ONCE, **ONE_GRAPH}),
    ("gpu", A100, "--xla_disable_hlo_passes=cse", {**AT_ONCE, **ONE_GRAPH}),
    ("gpu", A100, "--xla_gpu_command_buffer_scheduling_mode=LHS", {**PASSES, **ONE_GRAPH}),
    ("gpu", A100, "--xla_gpu_enable_dynamic_slice_fusion=true", {**PASSES, **AT_ONCE}),
  ],
)
def test_options_of_the_compiler(backend, properties, flags, expected, unrolled, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**properties)])
  monkeypatch.setenv("XLA_FLAGS", flags)
  if not unrolled:
    expected = {name: value for name, value in expected.items() if name not in ONE_GRAPH}
  assert device.compiler_options(unrolled) == expected


@pytest.mark.parametrize(
  ("layers", "most", "remat", "unrolled"),
  [(1, 4, False, True), (4, 4, False, True), (2, 1, False, False), (2, 4, True, False)],
)
def test_training_and_evaluation_are_compiled_with_them(layers, most, remat, unrolled, monkeypatch):
  monkeypatch.setattr(device, "compiler_options", lambda unrolled: {f"xla_no_{unrolled}": "1"})
  sizes = {"embed_dim": 8, "num_heads": 1, "num_experts": 2, "max_length": 4}
  model = {**sizes, "num_layers": layers, "unrolled_layers": most}
  fields = {f"model.{name}": value for name, value in model.items()}
  fields |= {"training.remat": remat, "training.batch_size": 3, "training.steps": 7}
  config = with_fields(Config(), fields).validate()
  assembly = assemble_sized(config, 37, 7)
  assert assembly.model.unrolled == unrolled
  rows = (config.training.steps_per_dispatch, 3, 4)
  batch = Batch(*(jnp.zeros(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)))
  feed, one = step.Feed(None, None, batch), step.as_count(1)
  score = step.make_evaluation(assembly.model, rows[0], 4, 0)
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes.
    training = assembly.dispatch.lower(assembly.abstract_state, feed, one)
  for lowered in (training, score.lower(assembly.abstract_state.params, feed, one)):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"No such compile option.*{unrolled}"):
      lowered.compile()
