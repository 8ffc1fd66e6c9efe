"""Where arrays lie on many devices: one mesh with the axes data, expert and model.

Parameters name their axes where they are declared (`models.layers.named`), activations where they
are made (`layout.constrain`); this module says which mesh axis each name is split over. All else,
collectives included, is XLA's partitioner (GSPMD, Xu et al. 2021, arXiv 2105.04663). Results are
those of one device but for rounding.

Without a mesh, on one device, nothing here does anything.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hgnn_moe_jax.config import Config, MeshConfig
from hgnn_moe_jax.errors import ConfigError

AXES = ("data", "expert", "model")
AXIS_TYPES = (AxisType.Auto,) * len(AXES)  # What lies where is the partitioner's to decide.

# Name of an array's axis -> mesh axes.
_SPLIT_OVER = {
  "expert": ("expert",),
  "heads": ("model",),
  "hidden": ("model",),
  "vocab": ("model",),
}
# What no expert owns would else lie whole on each of their devices; but rows of a table, looked up
# in parts over data and expert, would have to be put together by all devices for all tokens.
_SPLIT_BY_FSDP = {"embed": ("data", "expert"), "lookup": ("data",)}


def make_mesh(config: Config) -> Mesh | None:
  """The mesh over all devices of all processes; None if there is only one device.

  Its order is data, expert, model: neighbouring devices share the model axis, which communicates
  most.

  Raises:
    ConfigError: the axes' sizes do not multiply to the number of devices, or a batch cannot be
      divided over the data axis.
  """
  m, count = config.mesh, jax.device_count()
  rest = m.expert * m.model
  data = m.data or max(1, count // rest)
  if data * rest != count:
    field = "data" if m.data else "expert" if m.expert > 1 else "model"
    raise ConfigError(
      f"mesh.{field}",
      getattr(m, field),
      f"mesh.data={m.data or 'all the others'} x mesh.expert={m.expert} x mesh.model={m.model} has "
      f"to be the number of devices, which is {count}",
    )
  t = config.training
  if t.batch_size % (data * t.accumulation):
    raise ConfigError(
      "training.batch_size",
      t.batch_size,
      f"use a multiple of {data * t.accumulation}: the {data} parts of mesh.data, in each of "
      f"training.accumulation={t.accumulation} rounds",
    )
  if config.evaluation.batch_size % data:
    raise ConfigError(
      "evaluation.batch_size",
      config.evaluation.batch_size,
      f"use a multiple of the {data} parts of mesh.data",
    )
  return None if count == 1 else _mesh(data, m)


def evaluation_mesh(config: Config) -> Mesh | None:
  """For a trained model: the run's expert and model axes, and data over the devices that are left.

  None if there is only one device, or if these two axes do not divide the number of devices.
  """
  m, count = config.mesh, jax.device_count()
  rest = m.expert * m.model
  return None if count == 1 or count % rest else _mesh(count // rest, m)


def _mesh(data: int, config: MeshConfig) -> Mesh:
  devices = np.asarray(jax.devices()).reshape(data, config.expert, config.model)
  return Mesh(devices, AXES, axis_types=AXIS_TYPES)


def using(mesh: Mesh | None) -> AbstractContextManager[Any]:
  """A context in which functions are traced and run on this mesh; without one, on one device."""
  return nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_rows(mesh: Mesh, leading: int) -> NamedSharding:
  """Of arrays whose axis after `leading` others is the batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading, "data"))


def parameter_shardings(mesh: Mesh, fsdp: bool, names: Any, shapes: Any) -> Any:
  """A tree of shardings like the parameters.

  Args:
    mesh: of `make_mesh`.
    fsdp: split "embed" and "lookup" axes over data and, the first of what all experts share, over
      expert (fully sharded data parallel; Zhao et al. 2023, arXiv 2304.11277).
    names: tree of tuples, one name or None per axis, as `LanguageModel.axes` gives it.
    shapes: tree of arrays or shapes.
  """
  split_over = {**_SPLIT_OVER, **(_SPLIT_BY_FSDP if fsdp else {})}

  def one(shape, axes):
    spec, used = [], set()
    for size, name in zip(shape.shape, axes, strict=True):
      # An axis of the mesh may split one axis of an array only.
      over = [a for a in split_over.get(name, ()) if a not in used]
      # A vocabulary of 50,257 cannot be divided: such an axis stays whole.
      while size % math.prod(mesh.shape[a] for a in over):
        over.pop()
      used.update(over)
      spec.append(tuple(over) if len(over) > 1 else next(iter(over), None))
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(one, shapes, names)


def state_shardings(mesh: Mesh, state: Any, params: Any, shardings: Any) -> Any:
  """A tree of shardings like the state: what mirrors a parameter lies where the parameter lies.

  Args:
    mesh: of `make_mesh`.
    state: tree of shapes with the parameters somewhere in it, and with trees like them (moments,
      averages); what is like no parameter is kept whole on every device.
    params, shardings: the parameters' shapes and `parameter_shardings`.
  """
  known = {
    _names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def one(path, leaf):
    names = _names(path)
    for first in range(len(names)):
      shape, sharding = known.get(names[first:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """The ShapeDtypeStructs with these shardings."""
  return jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
  )


def share(mesh: Mesh | None) -> tuple[int, int]:
  """(p, n): of a batch in n equal parts, in order, this process needs part p.

  Processes whose devices differ in the expert or model axis only need the same part.

  Raises:
    ConfigError: the processes' devices do not share the data axis evenly.
  """
  if mesh is None:
    return 0, 1
  here, count = jax.process_index(), len(mesh.devices)
  own = [k for k, row in enumerate(mesh.devices) if any(d.process_index == here for d in row.flat)]
  if count % len(own) or own[0] % len(own):
    raise ConfigError(
      "mesh.data", count, f"use a multiple or a divisor of the {jax.process_count()} processes"
    )
  return own[0] // len(own), count // len(own)


def put(array: np.ndarray, where: NamedSharding) -> jax.Array:
  """The array, of which every process has the whole, laid out over all devices."""
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def put_rows(part: np.ndarray, where: NamedSharding, axis: int, size: int) -> jax.Array:
  """The array whose axis `axis`, of `size` rows in all, is in parts among the processes."""
  shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
  return jax.make_array_from_process_local_data(where, part, shape)
