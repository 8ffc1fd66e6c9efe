"""What every benchmark's JSON begins with: when, by which code and command, and on what.

A figure that nobody can make again is worth little, and one looks for its command months later.
"""

import datetime
import os
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from hgnn_moe_jax.training.records import environment, write_json

_ROOT = pathlib.Path(__file__).parent.parent


def write(path: str, content: dict[str, Any]) -> None:
  """Writes the result of the command that runs.

  Args:
    path: of --out.
    content: "measurements", or what else there is.

  Raises:
    UserError: the file cannot be written.
  """
  origin = {
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "code": _code(),
    "command": _command(),
  }
  write_json(pathlib.Path(path), {**origin, **environment(), **content})


def _code() -> str | None:
  """The commit, with a + behind it if code differs from it; None without git or its history."""
  try:
    changed = _git("status", "--porcelain", "--", "hgnn_moe_jax", "benchmarks/*.py", "configs")
    return _git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed)
  except (OSError, subprocess.CalledProcessError):
    return None


def _git(*words: str) -> str:
  command = ["git", "-C", str(_ROOT), *words]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _command() -> str:
  """As it would be typed in the project's root, with the flags of XLA that the user has set."""
  words = ["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]
  given = os.environ.get("XLA_FLAGS", "")
  return (f"XLA_FLAGS={shlex.quote(given)} " if given else "") + shlex.join(words)
