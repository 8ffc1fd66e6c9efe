"""What the first device of this process is; what runs on it is decided elsewhere."""

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
  capability = nvidia_capability()
  return capability is not None and capability >= 8
