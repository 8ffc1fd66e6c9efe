"""Folders that are costly to make and cheap to check: made once, found again by their name.

A folder appears complete or not at all: it is written beside its place, flushed to the disk and
renamed. Its manifest holds the sha256 of every file and of itself, and all are verified on each
use; what is damaged is announced and made anew.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable
from typing import Any

from absl import logging

from hgnn_moe_jax.errors import ConfigError

_MANIFEST = "manifest.json"


class _DamagedError(Exception):
  """A file of a cached folder is missing or not what was written."""


def cache_root(cache_dir: str) -> pathlib.Path:
  """`data.cache_dir`, or hgnn_moe_jax below $XDG_CACHE_HOME or ~/.cache."""
  if cache_dir:
    return pathlib.Path(cache_dir).expanduser()
  base = os.environ.get("XDG_CACHE_HOME")
  return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "hgnn_moe_jax"


def cached_folder(
  root: pathlib.Path, name: str, write: Callable[[pathlib.Path], dict[str, Any]]
) -> tuple[pathlib.Path, dict[str, Any]]:
  """The folder `root/name`, made by `write` if it is not there or damaged.

  Args:
    root: the cache; made if missing.
    name: says what is in the folder; equal names mean equal content.
    write: fills an empty folder with plain files and returns details for the manifest (JSON).

  Returns:
    (folder, details).

  Raises:
    ConfigError: the cache cannot be read or written: no permission, read-only, full.
  """
  folder = root / name
  try:
    if folder.exists():
      try:
        return folder, _verify(folder)
      except _DamagedError as damage:
        logging.warning("Cache %s is damaged (%s); it is made anew.", folder, damage)
    root.mkdir(parents=True, exist_ok=True)
    return folder, _make(folder, write)
  except OSError as error:
    raise ConfigError(
      "data.cache_dir",
      str(root),
      f"cannot be used ({error.strerror or error}); give a writable folder with free space",
    ) from error


def _make(folder: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]) -> dict[str, Any]:
  # Other processes may make the same folder at the same time; each writes under a name of its own.
  staging = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
  staging.mkdir()
  try:
    details = write(staging)
    _seal(staging, details)
    return _publish(staging, folder, details)
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def _publish(
  staging: pathlib.Path, folder: pathlib.Path, details: dict[str, Any]
) -> dict[str, Any]:
  """Renames `staging` to `folder`; a sound folder that another process put there is kept."""
  while True:
    try:
      staging.rename(folder)
    except OSError:
      if not folder.exists():
        raise
    else:
      _flush(folder.parent)
      return details
    try:
      return _verify(folder)
    except _DamagedError:
      aside = staging.with_name(staging.name + ".damaged")
      with contextlib.suppress(FileNotFoundError):  # Another process has just done the same.
        folder.rename(aside)
        shutil.rmtree(aside)


def _seal(folder: pathlib.Path, details: dict[str, Any]) -> None:
  """Writes the manifest and flushes everything to the disk."""
  files = sorted(folder.iterdir())
  content = {"details": details, "files": {file.name: _sha256(file) for file in files}}
  manifest = {"content": content, "sha256": _content_sha256(content)}
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
  for path in [*files, folder / _MANIFEST, folder]:
    _flush(path)


def _verify(folder: pathlib.Path) -> dict[str, Any]:
  try:
    manifest = json.loads((folder / _MANIFEST).read_bytes())
    content = manifest["content"]
    if manifest["sha256"] != _content_sha256(content):
      raise _DamagedError(f"{_MANIFEST} has changed")
    for name, digest in content["files"].items():
      if _sha256(folder / name) != digest:
        raise _DamagedError(f"{name} has changed")
  except FileNotFoundError as error:
    raise _DamagedError(f"{pathlib.Path(error.filename).name} is missing") from None
  except NotADirectoryError:
    raise _DamagedError("not a folder") from None
  except (ValueError, KeyError, TypeError):
    raise _DamagedError(f"{_MANIFEST} is not readable") from None
  return content["details"]


def _content_sha256(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
