"""From examples to batches: which examples make up batch n, and batches prepared ahead.

Batch n is a pure function of (seed, n). It depends neither on where the tokens lie, nor on the
number of processes, nor on where a run was interrupted.
"""

import sys
from collections.abc import Generator, Iterator

import grain
import numpy as np

from hgnn_moe_jax.data import permutation
from hgnn_moe_jax.data.examples import Batch, Examples, gather
from hgnn_moe_jax.errors import ConfigError

# Gathering holds the interpreter for most of its time: one thread works while the device does, and
# more only contend (measured: 2 threads are a third slower than 1).
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


class Order:
  """The examples of every training batch, for one process of possibly many.

  Draws run through a new permutation of all examples in every epoch. Batches run across the border
  of epochs, so no example is ever left out.

  Args:
    num_examples: of the training split.
    seed: of the permutations, in [0, 2**32).
    batch_size: examples per step over all processes.
    process_index: this process takes rows [p * b, (p + 1) * b) of each batch, where b is
      batch_size / process_count.
    process_count: number of processes.

  Raises:
    ConfigError: batch_size is no multiple of process_count, or the seed is out of range.
  """

  def __init__(
    self,
    num_examples: int,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    self._rows = _process_rows(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
      raise ConfigError("seed", seed, "use a value in [0, 2**32)")
    self._batch_size, self._num_examples = batch_size, num_examples
    # Epochs count on from their first one's seed. Mixed, neighbouring seeds share none; the 1 is
    # what grain's `seed` adds for the `shuffle` that comes next.
    self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])

  def indices(self, step: int) -> np.ndarray:
    """int32 [batch_size / process_count]: this process's examples of batch `step`, from 0."""
    first = step * self._batch_size + self._rows.start
    return permutation.draws(first, len(self._rows), self._num_examples, self._seed)


def host_batches(
  examples: Examples, order: Order, max_length: int, fill: int, start_step: int
) -> Generator[Batch, None, None]:
  """Batches `start_step`, `start_step + 1`, ... without end, gathered ahead by a thread.

  Equal to `gather(examples, order.indices(step), max_length, fill)` step by step. Closing the
  iterator ends the thread.
  """
  steps = _Steps(examples, order, max_length, fill)
  iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(_READ_OPTIONS))
  iterator.set_state({"next_index": start_step})
  try:
    yield from iterator
  finally:
    iterator.close()


def evaluation_indices(
  num_examples: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[np.ndarray]:
  """int32 [batch_size / process_count] again and again: all examples in order, once.

  The last batch is filled up with -1, which `gather` turns into rows without weight. Every process
  gets the same number of batches.
  """
  rows = _process_rows(batch_size, process_index, process_count)
  own = np.arange(rows.start, rows.stop, dtype=np.int32)
  for first in range(0, num_examples, batch_size):
    yield np.where(own < num_examples - first, own + np.int32(first), np.int32(-1))


class _Steps:
  """A grain source whose element n is batch n."""

  def __init__(self, examples: Examples, order: Order, max_length: int, fill: int):
    self._examples, self._order = examples, order
    self._max_length, self._fill = max_length, fill

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Batch:
    indices_B = self._order.indices(index)
    return gather(self._examples, indices_B, self._max_length, self._fill)

  def __repr__(self) -> str:
    return f"Batches({self._examples.num_examples} examples)"


def _process_rows(batch_size: int, process_index: int, process_count: int) -> range:
  if batch_size % process_count:
    raise ConfigError(
      "training.batch_size", batch_size, f"use a multiple of the {process_count} processes"
    )
  share = batch_size // process_count
  return range(process_index * share, (process_index + 1) * share)
