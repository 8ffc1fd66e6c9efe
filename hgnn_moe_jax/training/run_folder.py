"""A run folder belongs to one config and to one process at a time."""

import fcntl
import json
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hgnn_moe_jax.config import Config, difference
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training.records import run_folder_errors, write_json

TOKENIZER = "tokenizer.json"
CARD = "card.json"  # Of an exported model, see `trained`: no run folder.


@contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Creates the folder and holds it.

  Raises:
    UserError: another process trains there, or it holds an exported model.
  """
  if (workdir / CARD).exists() and not (workdir / "config.json").exists():
    raise UserError(f"--workdir={workdir}: holds an exported model ({CARD}); choose another folder")
  with run_folder_errors(workdir):
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
      raise UserError(f"--workdir={workdir}: is a file; choose a folder") from None
    lock = open(workdir / ".lock", "w")  # noqa: SIM115
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"--workdir={workdir}: another process is training there; wait for it or choose another"
      ) from None
    yield


def read_config(workdir: pathlib.Path) -> tuple[Config, dict[str, Any]]:
  """The run's Config and the whole of config.json. Raises UserError if it cannot be read."""
  path = workdir / "config.json"
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Config.from_dict(content["config"]), content
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f"--workdir={workdir}: no config.json there; give the folder of a run that has started"
    ) from None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f"--workdir={workdir}: config.json is damaged ({error}); "
      "restore it or start in another folder"
    ) from error


def claim(
  workdir: pathlib.Path,
  config: Config,
  details: dict[str, Any],
  tokenizer_definition: str | None = None,
) -> None:
  """Writes config.json, or checks that the folder's run is the same one.

  Args:
    workdir: locked.
    config: of the run to start or continue.
    details: further content of config.json; `details["data"]["fingerprint"]` must agree.
    tokenizer_definition: content of tokenizer.json, which makes the run readable without its text.

  Raises:
    UserError: the folder belongs to a run that differs in meaning, with the fields that differ.
  """
  if not (workdir / "config.json").exists():
    if (workdir / "checkpoints").exists():
      raise UserError(
        f"--workdir={workdir}: has checkpoints but no config.json, so it cannot be continued; "
        "restore config.json or choose another folder"
      )
    if tokenizer_definition is not None:
      with run_folder_errors(workdir):
        (workdir / TOKENIZER).write_text(tokenizer_definition, encoding="utf-8")
    write_json(workdir / "config.json", {"config": config.to_dict(), **details})
    return
  require_same(workdir, config, details["data"]["fingerprint"])


def require_same(workdir: pathlib.Path, config: Config, fingerprint: str | None = None) -> None:
  """Raises UserError if the folder's run is not that of the config, with the fields that differ.

  Args:
    workdir: of a run that has started.
    config: what the run should be.
    fingerprint: of the data, which must agree, too; None: not compared.
  """
  old, content = read_config(workdir)
  changes = difference(old, config)
  was = content.get("data", {}).get("fingerprint")
  if not changes and fingerprint is not None and was != fingerprint:
    changes = [f"content of the data: {was} -> {fingerprint}"]
  if changes:
    raise UserError(
      f"--workdir={workdir} belongs to another run: {'; '.join(changes)}. Use the old values to "
      "continue it, or choose another folder"
    )
