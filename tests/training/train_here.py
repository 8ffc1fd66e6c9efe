"""Trains runs one after the other in this process: lines of JSON {"config", "workdir"} on stdin.

With "evaluate" the run's last checkpoint is then scored again.
"""

import json
import pathlib
import sys

import jax

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training import evaluate, loop

if __name__ == "__main__":
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  for line in sys.stdin:
    run = json.loads(line)
    workdir = pathlib.Path(run["workdir"])
    loop.train(Config.from_dict(run["config"]), workdir, quiet=True)
    if run["evaluate"]:
      evaluate.evaluate_run(workdir, "validation", "last")
    print(run["workdir"], flush=True)
