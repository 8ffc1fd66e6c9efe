"""Checkpoints: the whole TrainState and a note, written by Orbax in the background, atomically.

Orbax notices files that are missing, cut or not in its format, but a changed byte among the numbers
passes unnoticed. So a checkpoint also holds a checksum of every array, verified when it is read.
"""

import json
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training.records import run_folder_errors
from hgnn_moe_jax.training.state import TrainState


class Checkpointer:
  """WORKDIR/checkpoints: the newest few, and the one with the lowest validation loss.

  Args:
    workdir: the run folder.
    keep: how many of the newest stay; None to read only, beside a run that may be training there.
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
      _drop_damaged_losses(self._folder)
      self._manager = ocp.CheckpointManager(self._folder.resolve(), options=options)

  def save(
    self, step: int, state: TrainState, note: dict[str, Any], loss: float | None = None
  ) -> None:
    """Saves in the background; returns as soon as the arrays are copied.

    Args:
      step: its number; a step that is saved already is left as it is.
      state: arrays.
      note: JSON content saved with it.
      loss: validation loss at this very step, if it was measured; ranks the best.
    """
    if step in self._manager.all_steps():
      return
    sealed = {"content": note, "checksums": checksums(state, note)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(sealed))
    with run_folder_errors(self._workdir):
      self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

  def wait(self) -> None:
    """Until every save is on the disk. A background error is raised here."""
    with run_folder_errors(self._workdir):
      self._manager.wait_until_finished()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step with the lowest validation loss among the checkpoints there are, or None."""
    losses = {}
    for step in self._manager.all_steps():
      metrics = self._manager.metrics(step)
      if metrics:
        losses[step] = metrics["loss"]
    return min(losses, key=losses.__getitem__) if losses else None

  def restore(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """State and note of one checkpoint.

    Args:
      like: a state, or its shapes, of the same structure.
      step: which one.

    Raises:
      UserError: the checkpoint is damaged or belongs to another model.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), note=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=args)
      state, note = restored["state"], restored["note"]["content"]
      expected = restored["note"]["checksums"]
    except Exception as error:  # Whatever Orbax stumbles over in a damaged file.
      lines = str(error).strip().splitlines() or [type(error).__name__]
      raise self._unreadable(step, lines[0][:200]) from error
    if wrong := [name for name, crc in checksums(state, note).items() if expected.get(name) != crc]:
      raise self._unreadable(step, f"wrong checksum of {wrong[0]}")
    return state, note

  def _unreadable(self, step: int, reason: str) -> UserError:
    return UserError(f"checkpoint {self._folder / str(step)} cannot be read ({reason})")

  def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    Damaged ones are reported, skipped and removed, so that training can save those steps anew.

    Raises:
      UserError: there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
      try:
        state, note = self.restore(like, step)
      except UserError as error:
        logging.warning("%s; trying the one before", error)
        damaged.append(step)
        continue
      for bad in damaged:
        self._manager.delete(bad)
      return state, note
    if damaged:
      raise UserError(
        f"--workdir={self._workdir}: none of the checkpoints {sorted(damaged)} can be read; "
        "restore the folder from a copy or start again in another one"
      )
    return None

  def close(self) -> None:
    with run_folder_errors(self._workdir):
      self._manager.close()


def _loss(metrics: dict[str, float]) -> float:
  return metrics["loss"]


def _drop_damaged_losses(folder: pathlib.Path) -> None:
  """Orbax reads every checkpoint's loss when it opens the folder, and stops at a damaged one."""
  for file in folder.glob("*/metrics/metrics"):
    try:
      readable = isinstance(json.loads(file.read_bytes())["loss"], float)
    except (ValueError, KeyError, TypeError):
      readable = False
    if not readable:
      logging.warning("%s cannot be read; that checkpoint no longer counts for the best", file)
      file.unlink()


def checksums(state: TrainState, note: dict[str, Any]) -> dict[str, int]:
  """CRC-32 of every array's bytes, by its path in the state, and of the note as JSON.

  1.9 GB/s on one core; the arrays are shared out over threads.
  """
  with_paths, _ = jax.tree_util.tree_flatten_with_path(state)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
  arrays = [
    jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    for _, leaf in with_paths
  ]
  with ThreadPoolExecutor() as pool:
    sums = dict(zip(names, pool.map(_checksum, jax.device_get(arrays)), strict=True))
  return {**sums, "note": zlib.crc32(json.dumps(note, sort_keys=True).encode())}


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
