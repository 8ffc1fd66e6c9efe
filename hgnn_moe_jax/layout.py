"""What a function that is traced for a mesh says about its arrays; without one nothing here acts.

The mesh and its axes data, expert and model are `sharding`'s.
"""

import math

import jax
from jax.sharding import PartitionSpec

FREE = "free"  # of an axis: split as the partitioner sees fit


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
  """x, each of its axes split over these axes of the mesh, if there is one; None is not split.

  An axis that cannot be divided evenly is not split either.
  """
  if not on_mesh():
    return x
  spec = []
  for size, names in zip(x.shape, axes, strict=True):
    over = (names,) if isinstance(names, str) else names
    if over == (FREE,):
      spec.append(PartitionSpec.UNCONSTRAINED)
    else:
      spec.append(over if over and size % shards(*over) == 0 else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def by_token(x_EBTD: jax.Array) -> jax.Array:
  """x with its tokens split over the whole mesh, all experts of a token together.

  Rows are split over data and each row's tokens over expert and model, as far as that divides them:
  where mesh.expert does not, x stays as it is.
  """
  length = x_EBTD.shape[2]
  # One after the other: at once, the partitioner brings whole arrays together.
  for axes in (("expert",), ("expert", "model")):
    if length % shards(*axes) == 0:
      x_EBTD = constrain(x_EBTD, None, "data", axes, None)
  return x_EBTD


def on_mesh() -> bool:
  """Whether the function that is being traced will run on several devices."""
  return not jax.sharding.get_abstract_mesh().empty


def shards(*axes: str) -> int:
  """Number of parts that these mesh axes make together; 1 without a mesh."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes) if on_mesh() else 1
