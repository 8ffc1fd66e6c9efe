"""Trains runs one after the other in this process: lines of JSON {"config", "workdir"} on stdin."""

import json
import pathlib
import sys

import jax

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training import loop

if __name__ == "__main__":
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  for line in sys.stdin:
    run = json.loads(line)
    loop.train(Config.from_dict(run["config"]), pathlib.Path(run["workdir"]), quiet=True)
    print(run["workdir"], flush=True)
