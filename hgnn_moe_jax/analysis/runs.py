"""A run folder as arrays, also one that is cut short, damaged or of another version."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import UserError

# What no reader can do without. All else may be lacking in a run of another version.
_FIELDS = {
  "train": ("step",),
  "eval": ("step", "split", "loss", "token_perplexity", "word_perplexity", "bits_per_byte"),
  "event": ("step", "name"),
}
_SUMMARY, _LAST = ("steps", "train_seconds", "last"), ("token_perplexity", "word_perplexity")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RunData(NamedTuple):
  """What a run has written so far.

  Attributes:
    folder: where.
    config: the resolved config, as far as this version knows its fields.
    unknown: the config's other fields, by dotted name.
    total_steps: the run's length.
    data: fingerprint and sizes of the text, from config.json.
    chance: expected scores of independent random experts, from config.json.
    train: field -> array, one entry per logged step first; "step" is one of the fields. Only fields
      that every train record has.
    evaluations: the "eval" records of the validation split, in order.
    events: the "event" records, in order.
    summary: content of summary.json; None for a run that is not finished.
  """

  folder: pathlib.Path
  config: Config
  unknown: dict[str, Any]
  total_steps: int
  data: dict[str, Any]
  chance: dict[str, float]
  train: dict[str, np.ndarray]
  evaluations: list[dict[str, Any]]
  events: list[dict[str, Any]]
  summary: dict[str, Any] | None

  def events_of(self, name: str) -> list[dict[str, Any]]:
    return [event for event in self.events if event["name"] == name]

  def lacks(self, *fields: str) -> str:
    """Why what needs these fields of the train records cannot be told; empty if it can."""
    missing = [field for field in fields if field not in self.train]
    if not missing:
      return ""
    return f"no {', '.join(missing)} in some or all train records; the run is of another version"

  def oddities(self) -> list[str]:
    """What this version does not understand of the run, or misses in it, in a sentence each."""
    told = [
      f"{field}={value!r} of config.json is unknown to this version and was passed over"
      for field, value in self.unknown.items()
    ]
    for field in ("weight_specialization", "output_specialization"):
      if field not in self.chance and self.config.model.num_experts > 1:
        told.append(f"config.json holds no chance level of {field}, so it is shown without")
    return told


def read_run(folder: pathlib.Path) -> RunData:
  """Reads config.json, metrics.jsonl and summary.json, the last if it is there.

  A last line that is cut short, as a killed process leaves it, is left out.

  Raises:
    UserError: no run there, nothing logged yet, or a damaged file; with the folder and the cure.
  """
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder; give that of a run, such as runs/quickstart")
  content, config, unknown = _config(folder)
  records = _records(folder)
  train = _arrays(folder, [r for r in records if r["kind"] == "train"])
  return RunData(
    folder=folder,
    config=config,
    unknown=unknown,
    total_steps=content.get("total_steps", int(train["step"][-1])),
    data=content.get("data", {}),
    chance=content.get("chance", {}),
    train=train,
    evaluations=[
      r for r in records if r["kind"] == "eval" and r["split"] == "validation" and "stride" not in r
    ],
    events=[r for r in records if r["kind"] == "event"],
    summary=_summary(folder),
  )


def _config(folder: pathlib.Path) -> tuple[dict[str, Any], Config, dict[str, Any]]:
  """The whole of config.json, the Config in it, and the fields that are none of this version's."""
  text = _text(folder / "config.json", "give the folder of a run that has started")
  known, unknown, reference = {}, {}, Config().to_dict()
  try:
    content = json.loads(text)
    for name, value in content["config"].items():
      if not isinstance(reference.get(name), dict):
        (known if name in reference else unknown)[name] = value
        continue
      known[name] = {k: v for k, v in value.items() if k in reference[name]}
      unknown |= {f"{name}.{k}": v for k, v in value.items() if k not in reference[name]}
    return content, Config.from_dict(known), unknown
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"{folder}: config.json is damaged ({type(error).__name__}: {error}); restore it from a copy"
    ) from error


def _records(folder: pathlib.Path) -> list[dict[str, Any]]:
  lines = _text(folder / "metrics.jsonl", "let the run start").splitlines()
  records, damaged = [], 0
  for number, line in enumerate(lines, 1):
    record = _record(line)
    # An evaluation beside training may stand behind what a killed run has cut short.
    if damaged and (record is None or "checkpoint" not in record):
      raise UserError(
        f"{folder / 'metrics.jsonl'}: line {damaged} is damaged; restore the file, or look at a "
        "copy of the folder without that line"
      )
    if record is None:
      damaged = number
    else:
      records.append(record)
  return records


def _record(line: str) -> dict[str, Any] | None:
  """A line's object; None if it is damaged."""
  try:
    record = _numbers(json.loads(line))
    return record if _has(record, _FIELDS.get(record["kind"], ())) else None
  except (ValueError, KeyError, TypeError):
    return None


def _has(record: dict[str, Any], fields: Iterable[str]) -> bool:
  return all(record.get(field) is not None for field in fields)


def _arrays(folder: pathlib.Path, train: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  if not train:
    raise UserError(f"{folder}: no training step is logged there yet; let the run go on")
  arrays = {}
  for name in train[0]:
    values = [record.get(name) for record in train]
    if name == "kind" or any(value is None for value in values):
      continue
    try:
      arrays[name] = np.array(values)
    except ValueError:  # Not all of one shape.
      arrays[name] = np.array(None)
    if arrays[name].dtype.kind not in "biuf":
      raise UserError(
        f"{folder / 'metrics.jsonl'}: {name} of the train records is damaged: no numbers of one "
        "shape; restore the file"
      )
  return arrays


def _summary(folder: pathlib.Path) -> dict[str, Any] | None:
  path = folder / "summary.json"
  if not path.exists():
    return None
  try:
    summary = _numbers(json.loads(_text(path, "")))
    if _has(summary, _SUMMARY) and _has(summary["last"], _LAST):
      return summary
  except (ValueError, AttributeError):
    pass
  raise UserError(
    f"{path}: is damaged or another version's; delete it and give the run's command again, which "
    "writes it anew"
  )


def _text(path: pathlib.Path, cure: str) -> str:
  """A file's text; bytes that are none damage the line they are in and no other."""
  try:
    return path.read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    raise UserError(f"{path.parent}: no {path.name} there; {cure}") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); allow or restore it") from None


def _numbers(value: Any) -> Any:
  """The inverse of records.plain: "nan", "inf" and "-inf" are numbers."""
  if isinstance(value, dict):
    return {key: _numbers(v) for key, v in value.items()}
  if isinstance(value, list):
    return [_numbers(v) for v in value]
  return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
