"""The run folder's text files: metrics.jsonl, config.json, summary.json.

Every line of metrics.jsonl is one JSON object that strict parsers accept: a number that is not
finite is written as the string "nan", "inf" or "-inf", never bare.
"""

import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from hgnn_moe_jax import __version__
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training.state import StepRecord

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)


def plain(value: Any) -> Any:
  """Arrays and numbers as JSON can hold them; non-finite numbers become strings."""
  if isinstance(value, dict):
    return {key: plain(v) for key, v in value.items()}
  if isinstance(value, np.ndarray | jax.Array):
    value = np.asarray(value).tolist()
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
  return value


@contextmanager
def run_folder_errors(workdir: pathlib.Path) -> Iterator[None]:
  """Turns a full or unwritable disk into one line that says what to do."""
  try:
    yield
  except (OSError, ValueError) as error:
    number = error.errno if isinstance(error, OSError) else _os_error_code(error)
    if number not in _UNWRITABLE:
      raise
    raise UserError(
      f"--workdir={workdir}: cannot write ({os.strerror(number)}). Free space or choose a folder "
      "you may write to, then run the same command again: it continues from the last checkpoint."
    ) from error


def _os_error_code(error: ValueError) -> int | None:
  """TensorStore, which writes the checkpoints' arrays, raises ValueError for a full disk, too."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None


class MetricWriter:
  """Appends records to metrics.jsonl, a line at a time.

  Args:
    workdir: the run folder.
    keep_bytes: cut the file to this length first. A checkpoint stores the length it was made at,
      so a continued run drops exactly the lines that it will write again; what `--mode=evaluate`
      has added since stays.
  """

  def __init__(self, workdir: pathlib.Path, keep_bytes: int | None = None):
    self._workdir = workdir
    self._path = workdir / "metrics.jsonl"
    with run_folder_errors(workdir):
      if keep_bytes is not None and self._path.exists():
        with open(self._path, "r+b") as file:
          file.seek(keep_bytes)
          added = [line for line in file if _is_added(line)]
          file.seek(min(keep_bytes, self._path.stat().st_size))
          file.writelines(added)
          file.truncate()
      cut_short = _is_cut_short(self._path)
      self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
      if cut_short:  # By a full disk: what is added must not become a part of it.
        self._file.write("\n")

  def write(self, kind: str, step: int, **fields: Any) -> None:
    line = json.dumps(plain({"kind": kind, "step": step, **fields}), allow_nan=False)
    with run_folder_errors(self._workdir):
      self._file.write(line + "\n")

  def flush(self) -> int:
    """Everything to the disk; returns the file's length in bytes."""
    with run_folder_errors(self._workdir):
      self._file.flush()
      os.fsync(self._file.fileno())
      return os.fstat(self._file.fileno()).st_size

  def close(self) -> None:
    with run_folder_errors(self._workdir):
      self._file.close()


def _is_cut_short(path: pathlib.Path) -> bool:
  """Whether the last line has no end."""
  if not path.exists() or not path.stat().st_size:
    return False
  with open(path, "rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read() != b"\n"


def _is_added(line: bytes) -> bool:
  """Whether a line is an evaluation's that was asked for beside training."""
  try:
    record = json.loads(line)
    return record["kind"] == "eval" and "checkpoint" in record and line.endswith(b"\n")
  except (ValueError, KeyError, TypeError):  # cut short
    return False


class NoMetrics:
  """A MetricWriter of a process that is not the first: it writes nothing."""

  def write(self, kind: str, step: int, **fields: Any) -> None:
    pass

  def flush(self) -> int:
    return 0

  def close(self) -> None:
    pass


def train_fields(record: StepRecord, signal: str, tokens_per_second: float) -> dict[str, Any]:
  """A step's record as the fields of a "train" line; `record` holds one step's numpy values."""
  fields: dict[str, Any] = {k: v for k, v in record._asdict().items() if v is not None}
  controlled = fields["weight_specialization" if signal == "weight" else "output_specialization"]
  return {
    **fields,
    "specialization": controlled,
    "specialization_mean": float(np.mean(controlled)),
    "tokens_per_second": round(tokens_per_second, 1),
  }


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes atomically: a reader finds the old file or the new one, never half of one."""
  with run_folder_errors(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
      json.dump(plain(content), file, indent=2, allow_nan=False)
      file.write("\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
  """Package versions and the device, for config.json."""
  device = jax.devices()[0]
  return {
    "versions": {
      "python": platform.python_version(),
      # Its own is known even where it runs out of a checkout and was never installed.
      "hgnn_moe_jax": __version__,
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    "device": {
      "platform": device.platform,
      "kind": device.device_kind,
      "count": jax.device_count(),
      "processes": jax.process_count(),
    },
  }
