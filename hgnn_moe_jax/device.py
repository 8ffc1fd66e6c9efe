"""What the first device of this process is, and what XLA is told because of it."""

import os
from typing import Any

import jax


def nvidia_capability() -> float | None:
  """Compute capability of an NVIDIA GPU, such as 8.0 (A100) or 7.5 (T4); None of anything else."""
  if jax.default_backend() != "gpu":
    return None
  try:
    return float(jax.devices()[0].compute_capability)
  except (AttributeError, ValueError):  # AMD's have letters in them.
    return None


def has_ampere_kernels() -> bool:
  """Whether bfloat16 products, cuDNN's fused attention and Pallas kernels run: from 8.0 on."""
  return (nvidia_capability() or 0) >= 8


def has_hopper_kernels() -> bool:
  """Whether Pallas kernels around matrix products are fast enough (H100, H200): from 9.0 on.

  Nobody has timed them on GPUs before.
  """
  return (nvidia_capability() or 0) >= 9


def compiler_options() -> dict[str, str | bool]:
  """XLA's options for the large programs: training, evaluation and generation.

  On an NVIDIA GPU, each with its reason in docs/performance.md: one pass of XLA makes Triton
  kernels of layer normalisations, and the fusing pass weighs these up at length: 40 to 65 % of the
  compilation, for kernels that are no faster. Of the kernels in a CUDA graph all that do not wait
  for one another may run at once: a layer has many that fill a part of the device only. And
  products that read or write a slice of an array in place are left out: as JAX 0.11 has them, they
  cannot be part of a CUDA graph, and one whose result something else reads, too, is made twice.
  XLA_FLAGS has the last word.
  """
  if nvidia_capability() is None:
    return {}
  options: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_enable_dynamic_slice_fusion": False,
  }
  return _unless_set(options)


def initialization_options() -> dict[str, int]:
  """XLA's options for the program of the first state, which runs once.

  On CPUs the more thorough of LLVM's passes are most of its compilation, since random bits are
  loops, and change neither its bits nor its time. XLA_FLAGS has the last word.
  """
  if jax.default_backend() != "cpu" or jax.config.read("jax_disable_most_optimizations"):
    return {}
  return _unless_set({"xla_backend_optimization_level": 1})


def _unless_set(options: dict[str, Any]) -> dict[str, Any]:
  flags = os.environ.get("XLA_FLAGS", "")
  return {name: value for name, value in options.items() if name not in flags}
