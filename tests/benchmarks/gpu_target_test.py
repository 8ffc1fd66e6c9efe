"""GPUs to compile for that are not there: what code is told; and a step, if JAX can compile it."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from benchmarks import gpu_target, memory
from hgnn_moe_jax import device
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.layout import on_mesh
from hgnn_moe_jax.training.assembly import assemble_sized


@pytest.mark.parametrize(
  ("name", "capability", "kernels"), [("A100", 8.0, (True, False)), ("H200", 9.0, (True, True))]
)
def test_what_code_is_told(name, capability, kernels, monkeypatch, tiny_config):
  asked, assembled = {}, []

  def topology(name, **given):
    asked.update(given)
    return SimpleNamespace(devices=("gpu 0", "gpu 1"))

  monkeypatch.setattr(topologies, "get_topology_desc", topology)
  before = jax.devices(), jax.default_backend(), device.nvidia_capability()
  assemble = lambda: assembled.append(assemble_sized(tiny_config(), 64, 10))  # noqa: E731

  def break_off():
    with gpu_target.pretend(name, 16):
      assert jax.devices() == ["gpu 0", "gpu 1"] and jax.default_backend() == "gpu"
      assert device.nvidia_capability() == capability
      assert (device.has_ampere_kernels(), device.has_hopper_kernels()) == kernels
      assert not on_mesh()
      assemble()
      raise KeyError

  with pytest.raises(KeyError):
    break_off()
  assert (jax.devices(), jax.default_backend(), device.nvidia_capability()) == before
  assemble()
  assert assembled[0] is not assembled[1], "what was assembled for a GPU is forgotten"
  assert asked["topology"] == "1x2x8"
  cores = gpu_target.TARGETS[name].multiprocessors
  assert f"core_count: {cores} " in asked["target_config"]


def test_nodes_are_whole():
  with pytest.raises(ValueError, match="9 GPUs are no whole number of nodes of 8"):
    gpu_target.pretend("H100", 9).__enter__()


def test_without_the_plugin(monkeypatch):
  def refused(*_, **__):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", refused)
  message = r"--target=H100: .*pip install 'jax\[cuda12\]'"
  with pytest.raises(UserError, match=message), gpu_target.pretend("H100", 8):
    pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(words of a command) -> its measurements."""
  pytest.importorskip("jax_plugins.xla_cuda12", reason="JAX's CUDA plugin is not installed")

  def run(*words):
    out = tmp_path_factory.mktemp("target") / "out.json"
    subprocess.run([sys.executable, "-m", *words, f"--out={out}"], check=True, env=os.environ)
    return json.loads(out.read_text())["measurements"]

  return run


def test_a_program_for_gpus(measured):
  cell, on_cpu = (
    *measured("benchmarks.scaling", "--shape=tiny", "--devices=8", "--target=H200"),
    *measured("benchmarks.scaling", "--shape=tiny", "--devices=8", "--target=cpu"),
  )
  assert cell["target"] == "H200"
  assert {"reduce-scatter", "all-gather"} <= cell["sent_bytes"].keys()
  # What is for GPUs alone is no reason to send more.
  assert sum(cell["sent_bytes"].values()) <= sum(on_cpu["sent_bytes"].values())


def test_what_a_config_needs(measured):
  config = ["--config=configs/quickstart.py", "--config.model.num_layers=1", "--vocab_size=300"]
  plain, rounds = measured(
    "benchmarks.memory", *config, "--target=H100", "--sweep=training.accumulation=1,4"
  )
  for m in (plain, rounds):
    assert 12 * m["parameters"] < m["state_bytes"] < 12 * m["parameters"] + 100_000
  assert rounds["temporary_bytes"] < plain["temporary_bytes"]


def test_penalties_do_not_keep_their_gradients(measured):
  """Those of the weights are as large as all experts."""
  config = ["--config=configs/quickstart.py", "--config.model.num_layers=6", "--vocab_size=300"]
  config += ["--config.model.embed_dim=256", "--config.training.batch_size=2"]
  strengths = [f"--config.orthogonality.{name}_strength=0.1" for name in ("weight", "output")]
  both, plain = measured("benchmarks.memory", *config, *strengths, "--target=H100", "--without")
  assert (both["sweep"], plain["sweep"]) == ("", "without")
  assert plain["state_bytes"] < both["state_bytes"], "no controller"
  experts = 4 * 6 * 4 * 12 * 256**2
  assert both["temporary_bytes"] - plain["temporary_bytes"] < 0.1 * experts


@pytest.mark.parametrize(
  ("field", "is_loop"),
  [("num_layers=2", False), ("selected_experts=2", False), ("unrolled_layers=1", True)],
)
def test_what_a_step_launches(measured, tmp_path, monkeypatch, field, is_loop):
  """By the plan that XLA writes down, in which steps are a loop.

  JAX 0.11 has products that write into a stack in place.
  """
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}")
  config = ["--config=configs/quickstart.py", "--vocab_size=300", "--target=H100"]
  measured("benchmarks.memory", *config, f"--config.model.{field}")
  (plan,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
  outside, step, *_ = re.split(r"^  body:$", plan.read_text(), maxsplit=1, flags=re.MULTILINE)
  assert re.findall(r"^\d+: (kWhile)", outside, re.MULTILINE) == ["kWhile"]
  step, *_ = re.split(r"^\d", step, maxsplit=1, flags=re.MULTILINE)
  launched = re.findall(r"^ {4}\d+: (\w+)", step, re.MULTILINE)
  product_in_place = re.search(r"DynamicSliceFusion .*\n *\d+: k(Cublas|Gemm)", plan.read_text())
  assert product_in_place is None
  assert ("kWhile" in launched) == is_loop
  assert is_loop or launched == ["kCommandBuffer"]


def test_the_loop_over_steps_carries_parameters_as_they_lie(measured, tmp_path, monkeypatch):
  """It had three arrays turned around in front of it, and back behind it."""
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
  config = ["--config=configs/quickstart.py", "--vocab_size=300", "--target=H100"]
  measured("benchmarks.memory", *config, "--config.model.unrolled_layers=1")
  (program,) = tmp_path.glob("*dispatch*after_optimizations.txt")
  around_the_loop = program.read_text().split("\nENTRY ")[1]
  assert " while(" in around_the_loop and "transpose" not in around_the_loop


def test_messages_of_many_experts_lie_in_rows(measured, tmp_path, monkeypatch):
  """XLA's layouts once put experts last, and wrote GELU down in float32, in three parts."""
  monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text")
  config = ["--config=configs/quickstart.py", "--vocab_size=300", "--target=H100"]
  B, T, D, E = 4, 128, 256, 32
  config += [f"--config.model.embed_dim={D}", f"--config.model.num_experts={E}"]
  measured("benchmarks.memory", *config, f"--config.training.batch_size={B}")
  (program,) = tmp_path.glob("*dispatch*after_optimizations.txt")
  text = program.read_text()
  assert f"[{E},{B},{T},{D}]" in text and f"[{B},{T},{D},{E}]" not in text


def test_the_table_of_memory():
  one = {"target": "A100", "parameters": 39_457_928, "state_bytes": 0.5e9, "temporary_bytes": 3.5e9}
  *_, row = memory.table([{"config": "mine", "sweep": "accumulation=4", **one}]).splitlines()
  assert row == "| mine | accumulation=4 | 39.5 M | 0.50 | 3.50 | A100 | 5% |"
