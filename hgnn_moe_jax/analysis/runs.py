"""A run folder as arrays."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import run_folder


class RunData(NamedTuple):
  """What a run has written so far.

  Attributes:
    folder: where.
    config: the resolved config.
    total_steps: the run's length.
    data: fingerprint and sizes of the text, from config.json.
    chance: expected scores of independent random experts, from config.json.
    train: field -> array, one entry per logged step first; "step" is one of the fields.
    evaluations: the "eval" records of the validation split, in order.
    events: the "event" records, in order.
    summary: content of summary.json; None for a run that is not finished.
  """

  folder: pathlib.Path
  config: Config
  total_steps: int
  data: dict[str, Any]
  chance: dict[str, float]
  train: dict[str, np.ndarray]
  evaluations: list[dict[str, Any]]
  events: list[dict[str, Any]]
  summary: dict[str, Any] | None

  def events_of(self, name: str) -> list[dict[str, Any]]:
    return [event for event in self.events if event["name"] == name]


def read_run(folder: pathlib.Path) -> RunData:
  """Reads config.json, metrics.jsonl and summary.json, the last if it is there.

  A last line that is cut short, as a killed process leaves it, is left out.

  Raises:
    UserError: no run there, nothing logged yet, or a damaged line before the last.
  """
  config, content = run_folder.read_config(folder)
  records = _records(folder)
  train = [r for r in records if r["kind"] == "train"]
  if not train:
    raise UserError(f"{folder}: no training step is logged there yet; let the run go on")
  finished = (folder / "summary.json").exists()
  return RunData(
    folder=folder,
    config=config,
    total_steps=content.get("total_steps", int(train[-1]["step"])),
    data=content.get("data", {}),
    chance=content.get("chance", {}),
    train={
      name: np.array([_number(r[name]) for r in train])
      for name in train[0]
      if name not in ("kind", "name")
    },
    evaluations=[
      r for r in records if r["kind"] == "eval" and r["split"] == "validation" and "stride" not in r
    ],
    events=[r for r in records if r["kind"] == "event"],
    summary=json.loads((folder / "summary.json").read_text()) if finished else None,
  )


def _records(folder: pathlib.Path) -> list[dict[str, Any]]:
  try:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  except FileNotFoundError:
    raise UserError(f"{folder}: no metrics.jsonl there; let the run start") from None
  records = []
  for number, line in enumerate(lines, 1):
    try:
      records.append(json.loads(line))
    except ValueError:
      if number == len(lines):
        break
      raise UserError(
        f"{folder / 'metrics.jsonl'}: line {number} is damaged; restore the file or continue the "
        "run, which writes what follows its last checkpoint anew"
      ) from None
  return records


def _number(value: Any) -> Any:
  """The inverse of records.plain: "nan", "inf" and "-inf" are numbers."""
  if isinstance(value, list):
    return [_number(v) for v in value]
  return float(value) if isinstance(value, str) else value
