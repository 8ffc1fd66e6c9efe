"""Several processes train one run: who writes, and when all of them stop.

Only the first process writes text files and prints; checkpoints are written by all (Orbax). All
compute the same numbers, so whatever follows from numbers they decide alike. A signal reaches one
process only; `Agreement` makes all of them stop after the same step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.sharding import AXES, replicated

# A process that has not been heard of for so long is lost, and the others end.
_SILENCE_SECONDS = 30


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
  """Makes this process one of several, before anything else asks JAX for devices.

  Args:
    coordinator: HOST:PORT of the first process; None to find all three in the environment of SLURM,
      Open MPI, Kubernetes or a Cloud TPU.
    count: how many processes.
    index: this one's number, from 0.

  Raises:
    UserError: they are not found, or do not find each other.
  """
  try:
    jax.distributed.initialize(
      coordinator, count, index, heartbeat_timeout_seconds=_SILENCE_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"--distributed: {reason}; give --coordinator=HOST:PORT, --num_processes and --process_id"
    ) from error


def is_first() -> bool:
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def sum_over_processes(values: np.ndarray) -> np.ndarray:
  """The sum of every process's uint32 array, modulo 2^32."""
  if jax.process_count() == 1:
    return values
  return np.asarray(multihost_utils.process_allgather(values)).sum(0, dtype=np.uint32)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
  """An event that SIGTERM or Ctrl-C sets; a second one of a kind acts as if there were no event."""
  event, previous = threading.Event(), {}

  def ask(number, frame):
    del frame
    event.set()
    signal.signal(number, previous[number])

  if threading.current_thread() is not threading.main_thread():  # e.g. in a notebook's executor
    yield event
    return
  for number in (signal.SIGTERM, signal.SIGINT):
    # None: a handler that is not Python's, which cannot be put back.
    previous[number] = signal.signal(number, ask) or signal.SIG_DFL
  try:
    yield event
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


class Agreement:
  """Whether any process was asked to stop, known to all of them one call later.

  The answer travels behind the work that is under way already, and nobody waits for it.
  """

  def __init__(self, mesh: Mesh | None):
    self._mesh = mesh if jax.process_count() > 1 else None
    self._answer: Any = False
    if self._mesh is not None:
      self._where = NamedSharding(self._mesh, PartitionSpec(AXES))
      self._any = jax.jit(jnp.any, out_shardings=replicated(self._mesh))

  def __call__(self, asked: bool) -> bool:
    """With one process, whether it was asked; else whether any was at the call before."""
    if self._mesh is None:
      return asked
    before = bool(self._answer)
    flags = np.full(jax.local_device_count(), asked)
    shape = (jax.device_count(),)
    self._answer = self._any(jax.make_array_from_process_local_data(self._where, flags, shape))
    return before
