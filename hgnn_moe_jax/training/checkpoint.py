"""Checkpoints: the whole TrainState and a note, written by Orbax in the background, atomically."""

import pathlib
from typing import Any

import jax
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
    keep: how many of the newest stay.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 1):
    self._folder = workdir / "checkpoints"
    self._workdir = workdir
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [
          policies.LatestN(keep),
          # Sorted descending, so that the last one is the best.
          policies.BestN(
            get_metric_fn=lambda metrics: metrics["loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      ),
    )
    with run_folder_errors(workdir):
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
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(note))
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
    except (ValueError, KeyError, OSError) as error:
      reason = (
        str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
      )
      raise UserError(f"checkpoint {self._folder / str(step)} cannot be read ({reason})") from error
    return restored["state"], restored["note"]

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
