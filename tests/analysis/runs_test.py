"""Reading run folders, whole and broken."""

import math

import numpy as np
import pytest

from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError

TRAIN = [{"loss": 3.0, "score": [0.1, 0.2]}, {"loss": "nan", "score": [0.3, "inf"]}]


def test_a_run_becomes_arrays(write_run):
  events = [{"step": 1, "name": "emergency_on", "layer": 1}, {"step": 2, "name": "checkpoint"}]
  run = read_run(write_run("run", TRAIN, events, {"loss": 2.0}, seed=7))
  assert run.config.seed == 7 and run.summary["steps"] == 2
  assert run.chance == {"weight_specialization": 0.99, "output_specialization": 0.8}
  np.testing.assert_array_equal(run.train["step"], [1, 2])
  assert run.train["loss"][0] == 3.0 and math.isnan(run.train["loss"][1])
  np.testing.assert_array_equal(run.train["score"], [[0.1, 0.2], [0.3, np.inf]])
  assert [e["step"] for e in run.events_of("emergency_on")] == [1]
  assert run.events_of("plateau") == []


def test_only_evaluations_of_training_count(write_run):
  """Those that --mode=evaluate appends have a stride."""
  folder = write_run("run", TRAIN)
  with open(folder / "metrics.jsonl", "a") as file:
    file.write('{"kind": "eval", "step": 2, "split": "validation", "loss": 1.5}\n')
    file.write('{"kind": "eval", "step": 2, "split": "validation", "loss": 1.0, "stride": 8}\n')
    file.write('{"kind": "eval", "step": 2, "split": "test", "loss": 0.5, "stride": 0}\n')
  run = read_run(folder)
  assert [e["loss"] for e in run.evaluations] == [1.5] and run.summary is None


def test_a_last_line_cut_short_is_left_out(write_run):
  folder = write_run("run", TRAIN)
  content = (folder / "metrics.jsonl").read_text()
  (folder / "metrics.jsonl").write_text(content[:-10])
  assert len(read_run(folder).train["step"]) == 1


@pytest.mark.parametrize(
  ("break_it", "message"),
  [
    (lambda f: (f / "config.json").unlink(), "no config.json there"),
    (lambda f: (f / "metrics.jsonl").unlink(), "no metrics.jsonl there"),
    (lambda f: (f / "metrics.jsonl").write_text(""), "no training step is logged"),
    (lambda f: (f / "metrics.jsonl").write_text("{\n{}\n"), "line 1 is damaged"),
  ],
)
def test_what_cannot_be_read_is_said(write_run, break_it, message):
  folder = write_run("run", TRAIN)
  break_it(folder)
  with pytest.raises(UserError, match=message) as error:
    read_run(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)
