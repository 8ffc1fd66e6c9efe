"""Command line: train, continue or evaluate a run.

python -m hgnn_moe_jax.main --config=configs/quickstart.py
python -m hgnn_moe_jax.main --mode=evaluate --workdir=runs/quickstart --split=test
"""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data.cache import cache_root
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import report

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="File with get_config(); override with --config.group.field=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config if not given.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "What to evaluate on.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which one to evaluate.")
_STRIDE = flags.DEFINE_integer(
  "stride", None, "Evaluate with a sliding context: each window scores its last STRIDE tokens.", 1
)
_QUIET = flags.DEFINE_boolean("quiet", False, "No progress, only the result.")


def main() -> None:
  """Exit status 0, or that of the UserError, whose message is all that is printed."""
  logging.set_verbosity(logging.WARNING)
  # Orbax logs, with a traceback from each of its threads, what it also raises.
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  app.run(_in_one_line(_run), flags_parser=_in_one_line(_parse))


def _in_one_line(function: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
  @functools.wraps(function)
  def wrapped(argv: list[str]) -> Any:
    try:
      return function(argv)
    except UserError as error:
      print("error:", *str(error).split(), file=sys.stderr)
      sys.exit(error.exit_status)

  return wrapped


def _parse(argv: list[str]) -> list[str]:
  """absl's flags, and get_config() of the config file with the overrides."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:  # These name their flag.
    raise UserError(str(error)) from None
  except (KeyError, AttributeError, SyntaxError, ImportError) as error:
    reason = error.args[0] if isinstance(error, KeyError) else error
    given = " ".join(a for a in argv[1:] if a.startswith("--config"))
    raise UserError(f"{given}: {reason}; the fields are in hgnn_moe_jax/config.py") from None


def _run(argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"{argv[1]}: not understood; every option starts with --")
  # Imported late: a mistake on the command line is told at once.
  from hgnn_moe_jax.training import evaluate, loop

  if _MODE.value == "evaluate":
    if _WORKDIR.value is None:
      raise UserError("--mode=evaluate: give the run folder with --workdir")
    workdir = pathlib.Path(_WORKDIR.value)
    result = evaluate.evaluate_run(workdir, _SPLIT.value, _CHECKPOINT.value, _STRIDE.value)
    print(report.evaluation(result))
    return
  config = _CONFIG.value
  if not isinstance(config, Config):
    given = flags.FLAGS["config"].present and config_flags.get_config_filename(
      flags.FLAGS["config"]
    )
    raise UserError(
      f"--config={given or ''}: no Config there; give a file such as configs/quickstart.py"
    )
  config.validate()
  _keep_compiled_code(config)
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs", config.name))
  summary = loop.train(config, workdir, _QUIET.value)
  print(report.summary(summary, workdir))


def _keep_compiled_code(config: Config) -> None:
  """The second run of a config starts without compiling."""
  folder = cache_root(config.data.cache_dir) / "xla"
  jax.config.update("jax_compilation_cache_dir", str(folder))


if __name__ == "__main__":
  main()
