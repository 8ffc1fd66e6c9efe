"""GPUs that are not there, to compile for: XLA needs a GPU's numbers, and no driver.

`pip install 'jax[cuda12]'` is all it takes. What is compiled is the program that such a GPU would
run, but for the choice among kernels that XLA makes by trying them out.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from hgnn_moe_jax import device
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import assembly

# No kernels can be tried, and Triton's products need to be.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_CUDNN = 91000  # the version whose attention is asked for


class Target(NamedTuple):
  """By data sheet. Shared memory in bytes of a multiprocessor, of which a block can have 1 KiB
  less."""

  capability: tuple[int, int]
  multiprocessors: int
  clock_ghz: float
  memory_bytes: float
  bytes_per_second: float
  cache_bytes: int
  shared_bytes: int


TARGETS = {
  "A100": Target((8, 0), 108, 1.41, 80e9, 2.0e12, 40 << 20, 164 << 10),
  "H100": Target((9, 0), 132, 1.98, 80e9, 3.35e12, 50 << 20, 228 << 10),
  "H200": Target((9, 0), 132, 1.98, 141e9, 4.8e12, 50 << 20, 228 << 10),
}


def _description(name: str) -> str:
  """XLA's GpuTargetConfigProto, as text. A driver's version decides what CUDA graphs can hold."""
  t = TARGETS[name]
  major, minor = t.capability
  features = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {t.shared_bytes}
      shared_memory_per_block_optin: {t.shared_bytes - 1024}
      core_count: {t.multiprocessors} fpus_per_core: 128 clock_rate_ghz: {t.clock_ghz}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {t.bytes_per_second:.0f} device_memory_size: {t.memory_bytes:.0f}
      l2_cache_size: {t.cache_bytes}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      driver_version: "12.8.0" runtime_version: "12.8.0"
      cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
    }}
    platform_name: "CUDA"
    runtime_version {{ major: 12 minor: 8 }}
    dnn_version_info {{ major: {_CUDNN // 10000} minor: {_CUDNN // 100 % 100} }}
    device_description_str: "NVIDIA {name}"
  """


@contextlib.contextmanager
def pretend(name: str, count: int, per_node: int = 8) -> Iterator[None]:
  """While it lasts, `jax.devices()` are so many GPUs, and code that asks what it runs on is told.

  Only compiling ahead of time works on them. All threads are told the same. What has been traced
  is forgotten before and after: it was traced for another device.

  Args:
    name: of TARGETS.
    count: of GPUs, in nodes of `per_node`: a multiple of it, or less than one.

  Raises:
    UserError: JAX's CUDA plugin is not installed.
    ValueError: there is no such number of whole nodes.
  """
  nodes = -(-count // per_node)
  if count % nodes:
    raise ValueError(f"{count} GPUs are no whole number of nodes of {per_node}")
  # It would look for a driver, and for libraries that only run programs.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    topology = topologies.get_topology_desc(
      name,
      platform="cuda",
      topology=f"1x{nodes}x{count // nodes}",
      target_config=_description(name),
    )
  except NotImplementedError as error:
    raise UserError(
      f"--target={name}: JAX cannot compile for it; pip install 'jax[cuda12]', no GPU is needed"
    ) from error
  major, minor = TARGETS[name].capability
  cudnn = "jax._src.cudnn.fused_attention_stablehlo"
  answers: dict[str, Any] = {
    "jax.default_backend": "gpu",
    "jax.devices": list(topology.devices),
    f"{cudnn}.check_cudnn_version": _CUDNN,
    f"{cudnn}.check_compute_capability": True,
  }
  # From JAX 0.11 on Pallas asks the mesh which GPU it writes a kernel for.
  gpu = AbstractMesh((), (), abstract_device=AbstractDevice(f"NVIDIA {name}", None, "gpu"))
  with contextlib.ExitStack() as stack:
    _forget()
    stack.callback(_forget)
    stack.enter_context(jax.sharding.use_abstract_mesh(gpu))
    for question, answer in answers.items():
      stack.enter_context(mock.patch(question, lambda *_, answer=answer: answer))
    stack.enter_context(mock.patch.object(device, "nvidia_capability", lambda: major + minor / 10))
    yield


def _forget() -> None:
  jax.clear_caches()
  assembly._assembled.cache_clear()
