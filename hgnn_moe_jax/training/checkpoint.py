"""Checkpoints: the whole TrainState and a note, written by Orbax in the background, atomically.

Orbax notices files that are missing, cut or not in its format, but a changed byte among the numbers
passes unnoticed. So a checkpoint also holds a checksum of every array, verified when it is read.
"""

import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.experimental.v1.options import ArrayOptions

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import processes
from hgnn_moe_jax.training.records import run_folder_errors
from hgnn_moe_jax.training.state import TrainState

# Orbax warns of every checkpoint without a score, of which most runs have some.
logging.get_absl_logger().addFilter(lambda record: "tracked_metric" not in str(record.msg))

_ATTEMPTS = 5  # To open a folder in which another process saves and deletes.
# Devices that hold the same array write a part of it each, if parts are not smaller than this.
_PART_BYTES = 2**20


class Checkpointer:
  """WORKDIR/checkpoints: the newest few, and the one with the lowest validation loss.

  Args:
    workdir: the run folder.
    keep: how many of the newest stay; None to read only, beside a run that may be training there
      (but a file of a loss that cannot be read goes: Orbax would open nothing).
  """

  def __init__(self, workdir: pathlib.Path, keep: int | None = None):
    self._folder = workdir / "checkpoints"
    self._workdir = workdir
    options = ocp.CheckpointManagerOptions(
      # The policy decides what stays, but without `best_fn` Orbax would not write the metrics down.
      best_fn=_loss,
      best_mode="min",
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(keep),
          # Sorted descending, so that the last one is the best.
          policies.BestN(
            get_metric_fn=_loss,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
      # What a killed process left half written goes; a reader cannot tell it from a save under way.
      cleanup_tmp_directories=keep is not None,
    )
    with run_folder_errors(workdir):
      if processes.is_first():
        _drop_damaged_losses(self._folder)
      processes.wait_for_all("the checkpoints can be listed")
      self._manager = _opened(
        lambda: ocp.CheckpointManager(
          self._folder.resolve(), options=options, item_handlers=_handlers()
        )
      )
    # With several devices Orbax copies each one's part, and several processes do it in step.
    self._thread = ThreadPoolExecutor(1, "checkpoint") if jax.device_count() == 1 else None
    self._saving: Future[None] | None = None

  def save(
    self, step: int, state: TrainState, note: dict[str, Any], loss: float | None = None
  ) -> None:
    """Saves in the background; returns as soon as the arrays are copied.

    On several devices after their checksums are made, too. An error of an earlier save that was
    not told yet is raised here.

    Args:
      step: its number; a step that is saved already is left as it is.
      state: arrays.
      note: JSON content saved with it.
      loss: validation loss at this very step, if it was measured; ranks the best.
    """
    if step in self._settled().all_steps():
      return

    def write(state: TrainState) -> None:  # arrays of JAX or of numpy
      sealed = {"content": note, "checksums": checksums(state, note)}
      args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), note=ocp.args.JsonSave(sealed))
      try:
        self._manager.wait_until_finished()  # Raises what went wrong with the save before,
      finally:  # which is no reason not to write this one.
        self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    if self._thread is not None:
      copied = _copied(state)
      self._saving = self._thread.submit(lambda: write(_as_numpy(copied)))
    else:
      with run_folder_errors(self._workdir):
        write(state)

  def reserve(self, state: TrainState) -> None:
    """Takes the memory that `save` copies into, while there is time: 474 MB took half a second."""
    if self._thread is not None and jax.default_backend() != "cpu":
      jax.block_until_ready(_copied(state))

  def _settled(self) -> ocp.CheckpointManager:
    """The manager, once our thread has left it. An error of that thread is raised here."""
    saving, self._saving = self._saving, None
    if saving is not None:
      with run_folder_errors(self._workdir):
        saving.result()
    return self._manager

  def _in_turn(self, call: Callable[[], None]) -> None:
    """Calls it in the thread that saves: Orbax tells each thread of an error of its own."""
    with run_folder_errors(self._workdir):
      if self._thread is None:
        call()
      else:
        self._thread.submit(call).result()

  def wait(self) -> None:
    """Until every save is on the disk. A background error is raised here."""
    self._in_turn(self._settled().wait_until_finished)

  def latest_step(self) -> int | None:
    return self._settled().latest_step()

  def best_step(self) -> int | None:
    """The step with the lowest validation loss among the checkpoints there are, or None."""
    losses, manager = {}, self._settled()
    for step in manager.all_steps():
      metrics = manager.metrics(step)
      if metrics:
        losses[step] = metrics["loss"]
    return min(losses, key=losses.__getitem__) if losses else None

  def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """State and note of one checkpoint.

    Args:
      like: a state, or its shapes, of the same structure; arrays are laid out as its shardings
        say, on one device where it has none, however many devices have saved them.
      step: which one.

    Raises:
      UserError: the checkpoint is damaged or belongs to another model.
    """
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding or one_device
      ),
      like,
    )
    where = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.Composite(
      state=ocp.args.PyTreeRestore(abstract, restore_args=where), note=ocp.args.JsonRestore()
    )
    manager = self._settled()
    try:
      restored = manager.restore(step, args=args)
      state, note = restored["state"], restored["note"]["content"]
      expected = restored["note"]["checksums"]
    except Exception as error:  # Whatever Orbax stumbles over in a damaged file.
      lines = str(error).strip().splitlines() or [type(error).__name__]
      self._agree(step, lines[0][:200], error)
      raise  # Not reached: with a reason it has raised.
    self._agree(step, "")
    wrong = [name for name, crc in checksums(state, note).items() if expected.get(name) != crc]
    self._agree(step, f"wrong checksum of {wrong[0]}" if wrong else "")
    return state, note

  def _agree(self, step: int, reason: str, cause: Exception | None = None) -> None:
    """Raises UserError if any process has a reason: all of them go on with the same checkpoint."""
    others = int(processes.sum_over_processes(np.asarray([bool(reason)], np.uint32))[0])
    if reason or others:
      reason = reason or f"by {others} of the other processes"
      raise UserError(f"checkpoint {self._folder / str(step)} cannot be read ({reason})") from cause

  def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    Ones that cannot be read are reported, skipped and moved to WORKDIR/unreadable, so that training
    can save those steps anew. They are not deleted: the disk, and not the file, may be at fault.

    Raises:
      UserError: there are checkpoints and none can be read.
    """
    steps = sorted(self._settled().all_steps(), reverse=True)
    unreadable = []
    for step in steps:
      try:
        state, note = self.restore(like, step)
      except UserError as error:
        logging.warning("%s; trying the one before", error)
        unreadable.append(step)
        continue
      if unreadable:
        self._set_aside(unreadable)
      return state, note
    if unreadable:
      raise UserError(
        f"--workdir={self._workdir}: none of the checkpoints {sorted(unreadable)} can be read; "
        "restore the folder from a copy or start again in another one"
      )
    return None

  def _set_aside(self, steps: list[int]) -> None:
    with run_folder_errors(self._workdir):
      if processes.is_first():
        aside = self._workdir / "unreadable"
        aside.mkdir(exist_ok=True)
        for step in steps:
          # One of an earlier time gives way: one of each step is enough to look into.
          shutil.rmtree(aside / str(step), ignore_errors=True)
          (self._folder / str(step)).rename(aside / str(step))
      processes.wait_for_all("what cannot be read is out of the way")
      self._manager.reload()

  def close(self) -> None:
    try:
      self._settled()
    finally:
      self._in_turn(self._manager.close)
      if self._thread is not None:
        self._thread.shutdown()
        self._thread = None


def _opened(open_manager: Callable[[], ocp.CheckpointManager]) -> ocp.CheckpointManager:
  """Again, where a run that trains there has removed a checkpoint between listing and reading."""
  for _ in range(_ATTEMPTS - 1):
    try:
      return open_manager()
    except (FileNotFoundError, NotADirectoryError):
      pass
  return open_manager()


def _copied(state: TrainState) -> TrainState:
  """The state (but for its key) in the host's memory: the next step reuses the device's buffers.

  Pinned, where there is a device: copied into pageable memory, 474 MB took 0.2 seconds, during
  which a GPU waited; here it is 0.01, and nobody waits.
  """

  def copy(leaf: jax.Array) -> Any:
    if _is_key(leaf):
      return jax.random.clone(leaf)
    if jax.default_backend() == "cpu":
      return np.array(leaf)  # np.asarray would look into the device's own buffer.
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))

  return jax.tree.map(copy, state)


def _as_numpy(state: TrainState) -> TrainState:
  return jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), state)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _loss(metrics: dict[str, float]) -> float:
  return metrics["loss"]


def _handlers() -> dict[str, ocp.CheckpointHandler]:
  """Orbax's own for states and notes, but that small arrays are not cut into parts.

  Cutting is a compiled program for every shape: seconds of a first save, in which training waits.
  """
  kinds = ocp.type_handlers
  arrays = kinds.ArrayHandler(
    # Tells keys from numbers.
    array_metadata_store=ArrayOptions.Saving().array_metadata_store,
    min_slice_bytes_for_replica_parallel=_PART_BYTES,
  )
  registry = kinds.create_type_handler_registry(
    (np.ndarray, kinds.NumpyHandler()), (jax.Array, arrays)
  )
  state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  return {"state": state, "note": ocp.JsonCheckpointHandler()}


def _drop_damaged_losses(folder: pathlib.Path) -> None:
  """Orbax reads every checkpoint's loss when it opens the folder, and stops at a damaged one."""
  for file in folder.glob("*/metrics/metrics"):
    try:
      readable = isinstance(json.loads(file.read_bytes())["loss"], float)
    except (FileNotFoundError, NotADirectoryError):  # A run that trains there has removed it.
      continue
    except (ValueError, KeyError, TypeError):
      readable = False
    if not readable:
      logging.warning("%s cannot be read; that checkpoint no longer counts for the best", file)
      file.unlink()


def checksums(state: TrainState, note: dict[str, Any]) -> dict[str, int]:
  """A checksum of every array, by its path in the state, and the CRC-32 of the note as JSON.

  An array's is the sum over its elements of (2 i + 1) x bits modulo 2^32, i the element's index in
  row-major order and bits its bytes as an unsigned number. Every process adds up what lies on its
  own devices: nothing is gathered, and the sum does not depend on how the array is laid out. A
  factor is odd, so that no change of a single element goes unnoticed.
  """
  with_paths, _ = jax.tree_util.tree_flatten_with_path(state)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
  arrays = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for _, leaf in with_paths]
  with ThreadPoolExecutor() as pool:
    own = np.asarray(list(pool.map(_checksum, arrays)), np.uint32)
  sums = processes.sum_over_processes(own)
  note_sum = zlib.crc32(json.dumps(note, sort_keys=True).encode())
  return {**dict(zip(names, sums.tolist(), strict=True)), "note": note_sum}


def _checksum(array: jax.Array | np.ndarray) -> np.uint32:
  """The sum over the elements that lie here; of several equal copies the first one counts."""
  if isinstance(array, np.ndarray):
    parts = [(array, (slice(None),) * array.ndim)]
  else:
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    parts = [(np.asarray(shard.data), shard.index) for shard in own]
  total = np.uint32(0)
  with np.errstate(over="ignore"):
    for part, index in parts:
      total += _weighted_sum(part, index, array.shape)
  return total


def _weighted_sum(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.uint32:
  """Sum of (2 i + 1) x bits over a block of an array of this shape, row by row."""
  last = part.shape[-1] if part.ndim else 1
  bits_RK = part.reshape(-1, last).view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)
  first = [s.start or 0 for s in index]
  sizes, stride, row_R = shape[:-1], shape[-1] if shape else 1, np.zeros(1, np.int64)
  for start, count, size in zip(first[:-1], part.shape[:-1], sizes, strict=True):
    row_R = (row_R[:, None] * size + np.arange(start, start + count)[None, :]).reshape(-1)
  offset = first[-1] if first else 0
  factor_K = (2 * np.arange(offset, offset + last, dtype=np.uint64) + 1).astype(np.uint32)
  # sum_k (2 (row stride + k) + 1) x = sum_k factor_k x + 2 row stride sum_k x
  weighted_R = (bits_RK * factor_K).sum(1, dtype=np.uint32)
  row_factor_R = (2 * stride * row_R).astype(np.uint32)
  return (weighted_R + row_factor_R * bits_RK.sum(1, dtype=np.uint32)).sum(dtype=np.uint32)
