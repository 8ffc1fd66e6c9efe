"""Trains runs one after the other in this process: lines of JSON on stdin.

A line has "config" (null: no training), "workdir", "score" (whether to score the last checkpoint).
"""

import json
import pathlib
import sys
from typing import Any

import jax

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training import evaluate, loop


class EvaluatorOnAll(evaluate.Evaluator):
  """Stops if it is not given all devices, and whole rows for each."""

  def __init__(self, *args: Any):
    _, _, batch_size, *_, mesh = args
    assert mesh.devices.size == jax.device_count()
    assert batch_size % mesh.shape["data"] == 0
    super().__init__(*args)


if __name__ == "__main__":
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  evaluate.Evaluator = EvaluatorOnAll
  for line in sys.stdin:
    run = json.loads(line)
    workdir = pathlib.Path(run["workdir"])
    if run["config"]:
      loop.train(Config.from_dict(run["config"]), workdir, quiet=True)
    if run["score"]:
      evaluate.evaluate_run(workdir, "validation", "last")
    print(workdir, flush=True)
