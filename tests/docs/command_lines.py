"""Parses command lines by the flags of the modules they start, and runs nothing else.

A process of its own, because flags are global: standard input has a JSON list of argument lists,
standard output a list with "" for a command that would start and an error for one that would not.
"""

import importlib
import importlib.util
import json
import sys

from absl import flags

from hgnn_moe_jax import cli, sweep
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training.optimizer import learning_rate_schedule


def problem(module: str, arguments: list[str]) -> str:
  """Why `python -m module arguments` would not start, or ""."""
  for flag in list(flags.FLAGS):
    delattr(flags.FLAGS, flag)
  sys.modules.pop("config_config", None)  # The last config file's, into which this one would load.
  if importlib.util.find_spec(module) is None:
    return f"no module {module}"
  runnable = (
    f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module
  )
  sys.modules.pop(runnable, None)
  try:
    loaded = importlib.import_module(runnable)
    if hasattr(loaded, "main"):  # Its flags are defined by now, or by main, which stops at start.
      sys.argv = [module, *arguments]
      loaded.main()
    words = flags.FLAGS([module, *arguments])[1:]
    if words and module not in _WITH_WORDS:
      return f"{words[0]}: no flag"
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
      config = flags.FLAGS["config"].value
      if not isinstance(config, Config):
        return "no such config file"
      config.validate()
      if config.training.steps:
        learning_rate_schedule(config.training, config.training.steps)
      if "grid" in flags.FLAGS:
        sweep.parse_grid(flags.FLAGS["grid"].value, config)
  except Exception as error:  # Any of them would stop the command.
    return f"{type(error).__name__}: {error}"
  return ""


_WITH_WORDS = (
  "benchmarks.growth",
  "hgnn_moe_jax.analysis",
  "hgnn_moe_jax.analysis.compare",
  "hgnn_moe_jax.analysis.watch",
  "hgnn_moe_jax.export",
)


if __name__ == "__main__":
  cli.start = lambda run: None
  print(json.dumps([problem(module, arguments) for module, *arguments in json.load(sys.stdin)]))
