"""From examples to feeds of the compiled loops: batches by number, or the batches themselves."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hgnn_moe_jax import sharding
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data.examples import Batch, Examples, gather, place
from hgnn_moe_jax.data.pipeline import Order, evaluation_indices, host_batches
from hgnn_moe_jax.training.step import Feed


class Placed:
  """Examples on every device, or on the host, and feeds made of them.

  Args:
    examples: numpy arrays.
    placement: data.placement.
    batch_size: of a whole batch, over all processes.
    max_length: T.
    fill: the id that pads.
    mesh: None on one device.
  """

  def __init__(
    self,
    examples: Examples,
    placement: str,
    batch_size: int,
    max_length: int,
    fill: int,
    mesh: Mesh | None,
  ):
    self._mesh, self._batch_size = mesh, batch_size
    self._length, self._fill = max_length, fill
    self.examples, self.on_device = place(examples, placement, mesh)
    self.share = (0, 1) if self.on_device else sharding.share(mesh)

  def by_number(self, rows_KB: np.ndarray) -> Feed:
    """Batches of these examples, gathered on the device."""
    if self._mesh is None:
      return Feed(self.examples, rows_KB, None)
    where = sharding.batch_rows(self._mesh, leading=1)
    return Feed(self.examples, sharding.put(rows_KB, where), None)

  def by_content(self, batches: list[Batch]) -> Feed:
    """These batches, of each of which this process has its share."""
    stacked: Any = jax.tree.map(lambda *a: np.stack(a), *batches)
    if self._mesh is not None:
      where = sharding.batch_rows(self._mesh, leading=1)
      stacked = jax.tree.map(
        lambda part: sharding.put_rows(part, where, axis=1, size=self._batch_size), stacked
      )
    return Feed(None, None, stacked)

  def gathered(self, rows_KB: np.ndarray) -> Feed:
    """Batches of these examples, wherever they lie; rows_KB is this process's share."""
    if self.on_device:
      return self.by_number(rows_KB)
    return self.by_content([gather(self.examples, r, self._length, self._fill) for r in rows_KB])


class Feeder:
  """Feeds of up to K steps from any step on; on the host a thread prepares batches ahead."""

  def __init__(
    self, examples: Examples, config: Config, fill: int, start: int, mesh: Mesh | None = None
  ):
    t, length = config.training, config.model.max_length
    self._max_steps = t.steps_per_dispatch
    self._placed = Placed(examples, config.data.placement, t.batch_size, length, fill, mesh)
    order = Order(examples.num_examples, config.seed, t.batch_size, *self._placed.share)
    self._order, self._batches = order, None
    if not self._placed.on_device:
      self._batches: Iterator[Batch] | None = host_batches(examples, order, length, fill, start)

  def example(self) -> Feed:
    """A feed of the right shapes that takes nothing from the stream; for compilation."""
    rows = np.full((self._max_steps, self._order.indices(0).size), -1, np.int32)
    return self._placed.gathered(rows)

  def __call__(self, step: int, n: int) -> Feed:
    missing = self._max_steps - n
    if self._batches is None:
      rows = [self._order.indices(step + k) for k in range(n)]
      return self._placed.by_number(np.stack(rows + rows[:1] * missing))
    batches = [next(self._batches) for _ in range(n)]
    return self._placed.by_content(batches + batches[:1] * missing)


def evaluation_feeds(
  placed: Placed, batch_size: int, max_batches: int
) -> Iterator[tuple[Feed, int]]:
  """Feeds of `max_batches` batches and how many of them count: every example once."""
  rows = list(evaluation_indices(placed.examples.num_examples, batch_size, *placed.share))
  for first in range(0, len(rows), max_batches):
    chunk = rows[first : first + max_batches]
    missing = max_batches - len(chunk)
    yield placed.gathered(np.stack(chunk + [np.full_like(chunk[0], -1)] * missing)), len(chunk)
