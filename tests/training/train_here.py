"""Trains runs one after the other in this process: lines of JSON on stdin.

A line has "config" (null: no training), "workdir", "score" (whether to score the last checkpoint).
"""

import json
import pathlib
import sys
from typing import Any

import jax
from jax import monitoring

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training import checkpoint, evaluate, loop


class EvaluatorOnAll(evaluate.Evaluator):
  """Stops if it is not given all devices, and whole rows for each."""

  def __init__(self, *args: Any):
    _, _, batch_size, *_, mesh = args
    assert mesh.devices.size == jax.device_count()
    assert batch_size % mesh.shape["data"] == 0
    super().__init__(*args)


class CheckpointerThatCompilesNothing(checkpoint.Checkpointer):
  """Stops if a save compiles a program: training waits for it."""

  def save(self, *args: Any, **kwargs: Any) -> None:
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    monitoring.register_event_duration_secs_listener(listen)
    super().save(*args, **kwargs)
    monitoring.unregister_event_duration_listener(listen)
    programs = [event for event in compiled if event.endswith("backend_compile_duration")]
    assert not programs, f"a save compiled {len(programs)} programs"


if __name__ == "__main__":
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  evaluate.Evaluator = EvaluatorOnAll
  loop.Checkpointer = CheckpointerThatCompilesNothing
  for line in sys.stdin:
    run = json.loads(line)
    workdir = pathlib.Path(run["workdir"])
    if run["config"]:
      loop.train(Config.from_dict(run["config"]), workdir, quiet=True)
    if run["score"]:
      evaluate.evaluate_run(workdir, "validation", "last")
    print(workdir, flush=True)
