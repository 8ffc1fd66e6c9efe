"""What a controller did, as events: told from the flags of one step and of the step before."""

from typing import Any, NamedTuple

import numpy as np

from hgnn_moe_jax.training.state import StepRecord


class Flags(NamedTuple):
  """A step's flags as plain values, to be kept in a checkpoint's note.

  Attributes:
    emergency, converged: a bool per layer.
    plateau: of the validation loss.
  """

  emergency: list[bool]
  plateau: bool
  converged: list[bool]


def no_flags(num_layers: int) -> Flags:
  return Flags([False] * num_layers, False, [False] * num_layers)


def flags_of(record: StepRecord) -> Flags:
  """The flags of one step's record of numpy values."""
  return Flags(
    np.asarray(record.emergency).tolist(),
    bool(record.plateau),
    np.asarray(record.converged).tolist(),
  )


def changes(before: Flags, after: Flags) -> list[dict[str, Any]]:
  """The events between two consecutive steps: name, and layer where it has one.

  emergency_on and emergency_off tell both ends; plateau and converged only where they begin.
  """
  events: list[dict[str, Any]] = []
  for layer, (was, now) in enumerate(zip(before.emergency, after.emergency, strict=True)):
    if was != now:
      events.append({"name": "emergency_on" if now else "emergency_off", "layer": layer})
  if after.plateau and not before.plateau:
    events.append({"name": "plateau"})
  for layer, (was, now) in enumerate(zip(before.converged, after.converged, strict=True)):
    if now and not was:
      events.append({"name": "converged", "layer": layer})
  return events
