"""GPUs to compile for that are not there: what code is told; and a step, if JAX can compile it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from benchmarks import gpu_target
from hgnn_moe_jax import device
from hgnn_moe_jax.errors import UserError


@pytest.mark.parametrize(
  ("name", "capability", "kernels"), [("A100", 8.0, (True, False)), ("H200", 9.0, (True, True))]
)
def test_what_code_is_told(name, capability, kernels, monkeypatch):
  asked = {}

  def topology(name, **given):
    asked.update(given)
    return SimpleNamespace(devices=("gpu 0", "gpu 1"))

  monkeypatch.setattr(topologies, "get_topology_desc", topology)
  before = jax.devices(), jax.default_backend(), device.nvidia_capability()
  with gpu_target.pretend(name, 16):
    assert jax.devices() == ["gpu 0", "gpu 1"] and jax.default_backend() == "gpu"
    assert device.nvidia_capability() == capability
    assert (device.has_ampere_kernels(), device.has_hopper_kernels()) == kernels
  assert (jax.devices(), jax.default_backend(), device.nvidia_capability()) == before
  assert asked["topology"] == "1x2x8"
  cores = gpu_target.TARGETS[name].multiprocessors
  assert f"core_count: {cores} " in asked["target_config"]


def test_without_the_plugin(monkeypatch):
  def refused(*_, **__):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", refused)
  message = r"--target=H100: .*pip install 'jax\[cuda12\]'"
  with pytest.raises(UserError, match=message), gpu_target.pretend("H100", 8):
    pass


def test_a_program_for_gpus(tmp_path):
  pytest.importorskip("jax_plugins.xla_cuda12", reason="JAX's CUDA plugin is not installed")
  command = [sys.executable, "-m", "benchmarks.scaling", "--shape=tiny", "--devices=8"]
  out = tmp_path / "scaling.json"
  subprocess.run([*command, "--target=H200", f"--out={out}"], check=True, env=os.environ)
  (cell,) = json.loads(out.read_text())["measurements"]
  assert cell["target"] == "H200"
  assert {"reduce-scatter", "all-gather"} <= cell["sent_bytes"].keys()
