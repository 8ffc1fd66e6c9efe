"""What a function that is traced for a mesh says about its arrays; without one nothing here acts.

The mesh and its axes data, expert and model are `sharding`'s.
"""

import math

import jax
from jax.sharding import PartitionSpec


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
  """x, each of its axes split over these axes of the mesh, if there is one; the rest are not split.

  An axis that cannot be divided evenly is not split either.
  """
  if not on_mesh():
    return x
  split = [(a,) if isinstance(a, str) else a for a in axes]
  spec = [a if a and x.shape[i] % shards(*a) == 0 else None for i, a in enumerate(split)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def on_mesh() -> bool:
  """Whether the function that is being traced will run on several devices."""
  return not jax.sharding.get_abstract_mesh().empty


def shards(*axes: str) -> int:
  """Number of parts that these mesh axes make together; 1 without a mesh."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes) if on_mesh() else 1
