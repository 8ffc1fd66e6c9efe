"""What a traced function says of its arrays: how a mesh splits them, how GPUs lay them out.

The mesh and its axes data, expert and model are `sharding`'s.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

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
  for axes in _token_axes(x_EBTD.shape[2]):
    x_EBTD = constrain(x_EBTD, None, "data", axes, None)
  return x_EBTD


def everywhere(x_BTD: jax.Array) -> jax.Array:
  """x with all tokens of a row on each device that has the row; its gradient is split by token.

  So the sum over experts that makes it is taken of each token on the device that goes on with it.
  """
  return _everywhere(x_BTD) if on_mesh() else x_BTD


@jax.custom_vjp
def _everywhere(x_BTD: jax.Array) -> jax.Array:
  return constrain(x_BTD, "data", None, None)


def _everywhere_backward(_: None, grad_BTD: jax.Array) -> tuple[jax.Array]:
  for axes in _token_axes(grad_BTD.shape[1]) or [None]:
    grad_BTD = constrain(grad_BTD, "data", axes, None)
  return (grad_BTD,)


_everywhere.defvjp(lambda x_BTD: (_everywhere(x_BTD), None), _everywhere_backward)


def token_axes(num_rows: int, length: int) -> tuple[str, tuple[str, ...]] | None:
  """What `by_token` splits rows and their tokens over; None if these cannot be split evenly."""
  found = _token_axes(length)
  return ("data", found[-1]) if found and num_rows % shards("data") == 0 else None


def _token_axes(length: int) -> list[tuple[str, ...]]:
  """What a row's tokens are split over, step by step: at once, the partitioner gathers arrays."""
  return [axes for axes in (("expert",), ("expert", "model")) if length % shards(*axes) == 0]


def shared_out(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[PartitionSpec]:
  """How an array's parts along some of its axes are shared out: one mesh axis more in every step.

  Args:
    shape: of the array.
    axes: what may be split, preferred first. Devices along a mesh axis that divides none of them
      have the same parts.

  Returns:
    Splits, from none to all that is possible.
  """
  steps: list[Any] = [[()] * len(shape)]
  for name in ("expert", "data", "model"):
    for axis in axes:
      over = (*steps[-1][axis], name)
      if shape[axis] % shards(*over) == 0:
        steps.append([*steps[-1][:axis], over, *steps[-1][axis + 1 :]])
        break
  return [PartitionSpec(*(names or None for names in step)) for step in steps]


def share_out(x: jax.Array, axes: tuple[int, ...], back: bool = False) -> jax.Array:
  """x split as `shared_out` says, or on its way back to how it lay.

  One mesh axis moves at a time: several at once make the partitioner bring whole arrays together.
  """
  _, *steps = shared_out(x.shape, axes)
  for step in reversed(steps) if back else steps:
    x = constrain(x, *(names or FREE for names in step))
  return x


def each_device(
  function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
  """The function of each device's own parts of arrays: what the partitioner cannot split well.

  Args:
    function: of arrays; on a mesh it is given the parts, and its results are parts.
    in_specs, out_specs: how arguments and results are split, evenly. Under a vmap with
      `spmd_axis_name` the mapped axis is split by itself: these must not name its mesh axes then.
  """
  if not on_mesh():
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def in_order(arrays: Any, specs: Any) -> Any:
  """The arrays, each laid out on GPUs in the order of its axes; elsewhere as XLA sees fit.

  Args:
    arrays: a pytree.
    specs: of `each_device`: how they are split, evenly.
  """
  return as_they_lie(arrays, specs) if jax.default_backend() == "gpu" else arrays


def as_they_lie(arrays: Any, specs: Any, free: tuple[str, ...] = ()) -> Any:
  """The arrays, which what a loop does with them cannot have split or laid out in another way.

  What a loop carries is the compiler's. The partitioner gives a value the end of a chain of
  constraints in its place (Shardy's pass apply-sharding-constraints): the optimizer, parameters as
  a penalty moved them. And XLA for GPUs turns large arrays around in front of the loop and back
  behind it. Each device says of its own parts, since the partitioner would bring together what is
  laid out on demand.

  Args:
    arrays: a pytree.
    specs: of `each_device`: how they are split, evenly.
    free: keys of what XLA may lay out as it likes.
  """

  def keep(path: Any, x: jax.Array) -> jax.Array:
    if jax.default_backend() != "gpu" or any(getattr(key, "key", None) in free for key in path):
      return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

  kept = each_device(lambda parts: jax.tree.map_with_path(keep, parts), (specs,), specs)
  return kept(arrays)


def on_mesh() -> bool:
  """Whether the function that is being traced will run on several devices, and sees whole arrays.

  Inside a `shard_map` over all of the mesh it sees one device's parts, as if there were no other.
  """
  return any(kind != AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types)


def shards(*axes: str) -> int:
  """Number of parts that these mesh axes make together; 1 without a mesh."""
  return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes) if on_mesh() else 1
