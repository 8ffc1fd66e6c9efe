"""The terminal view: what it draws, and when it stops."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from rich.console import Console

from hgnn_moe_jax.analysis import watch
from hgnn_moe_jax.analysis.runs import read_run

STEP = {
  **{"lm_loss": 4.0, "grad_norm": 0.5, "tokens": 1000, "tokens_per_second": 500.0},
  **{"output_specialization": [0.5, 0.25], "weight_specialization": [0.99, 0.98]},
  **{"effective_experts": [2.5, 1.5], "weight_strength": [0.1, 0.2], "output_strength": [0, 0]},
  **{"emergency": [False, True], "converged": [True, False]},
}


LAST = {"token_perplexity": 9.0, "word_perplexity": 99.0}


@pytest.mark.parametrize(
  ("values", "width", "line"),
  [
    ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
    ([7, 0], 8, "█▁"),
    ([3, 3, 3], 8, "▄▄▄"),
    ([0, np.nan, 1], 8, "▁ █"),
    ([np.nan, np.inf], 8, "  "),
    ([0, 2, 7, 9], 2, "▁█"),  # means of 1 and 8
  ],
)
def test_sparkline_by_hand(values, width, line):
  assert watch.sparkline(np.array(values), width) == line


def shown(run, width=100) -> str:
  console = Console(file=io.StringIO(), width=width)
  console.print(watch.view(run, width))
  return console.file.getvalue()


def test_view(write_run):
  """25 of 100 steps: 75 steps of 1,000 tokens at 500 a second are left, 150 seconds."""
  events = [{"step": 7, "name": "emergency_on", "layer": 1}, {"step": 8, "name": "checkpoint"}]
  text = shown(read_run(write_run("run", [STEP] * 25, events)))
  assert "25%  step 25/100  500 tokens/s  00:02:30 left" in text
  assert "tiny, seed 42" in text and "step      7  emergency_on, layer 1" in text
  assert "checkpoint" not in text
  rows = [line for line in text.splitlines() if "of 3" in line]
  assert "0.500" in rows[0] and "converged" in rows[0] and "emergency" not in rows[0]
  assert (
    "0.250" in rows[1] and "0.9800" in rows[1] and "1.50 of 3" in rows[1] and "emergency" in rows[1]
  )
  assert "(0.800)" in text and "(0.990)" in text
  assert max(map(len, text.splitlines())) <= 100


def test_days_are_hours(write_run):
  """75 steps of 1,000 tokens at 0.5 a second: 150,000 seconds."""
  slow = {**STEP, "tokens_per_second": 0.5}
  assert "41:40:00 left" in shown(read_run(write_run("run", [slow] * 25)))


def test_an_evaluation_and_the_end_are_told(write_run):
  folder = write_run("run", [STEP] * 100, (), LAST, evaluations=[(50, 2.5)], seconds=77.4)
  text = shown(read_run(folder))
  assert "100%" in text and "finished in 77 s" in text
  assert "validation at step 50: token perplexity 12.18, word perplexity 148.4" in text


def test_what_another_version_has_not_logged(write_run):
  """Numbers that are there stay, others are a question mark."""
  kept = ("output_specialization", "grad_norm", "emergency")
  folder = write_run("run", [{field: STEP[field] for field in kept}] * 10)
  content = json.loads((folder / "config.json").read_text())
  del content["chance"]
  (folder / "config.json").write_text(json.dumps(content))
  text = shown(read_run(folder))
  rows = [line for line in text.splitlines() if "of 3" in line]
  assert "0.250" in rows[1] and "emergency" in rows[1] and rows[1].count("?") == 4
  assert "step 10/100" in text and "grad" in text and "tokens/s" not in text and "left" not in text


def test_a_run_that_stopped_because_it_was_not_finite(write_run):
  """It shows what was measured, and no time that is left."""
  records = [STEP, {**STEP, "lm_loss": "nan", "output_specialization": ["nan", 0.25]}]
  text = shown(read_run(write_run("run", records, [{"step": 2, "name": "non_finite"}])))
  assert "stopped: not finite" in text and "left at this speed" not in text and "nan" in text


def test_it_watches_until_the_run_is_finished(write_run, monkeypatch):
  folder = write_run("run", [STEP] * 10)
  whole = write_run("whole", [STEP] * 100, (), LAST)
  naps = []

  def sleep(seconds):
    naps.append(seconds)
    if len(naps) == 3:
      for name in ("metrics.jsonl", "summary.json"):
        shutil.copy(whole / name, folder / name)

  monkeypatch.setattr(watch.time, "sleep", sleep)
  console = Console(file=io.StringIO(), width=100, force_terminal=True)
  watch.watch(folder, console)
  assert len(naps) == 3 and "step 100/100" in console.file.getvalue()


def test_no_terminal_no_waiting(write_run, monkeypatch):
  def sleep(seconds):
    raise AssertionError("waited")

  monkeypatch.setattr(watch.time, "sleep", sleep)
  console = Console(file=io.StringIO(), width=100)
  watch.watch(write_run("run", [STEP] * 10), console)
  assert "step 10/100" in console.file.getvalue()


@pytest.mark.parametrize(
  ("damage", "line"),
  [
    (lambda f: shutil.rmtree(f), "no such folder; give that of a run, such as runs/quickstart"),
    (lambda f: [p.unlink() for p in f.iterdir()], "no config.json there; give the folder of a run"),
    (lambda f: (f / "metrics.jsonl").write_text("{\n{}\n"), "line 1 is damaged; restore the file"),
  ],
)
def test_bad_input_is_one_line(write_run, monkeypatch, capsys, damage, line):
  folder = write_run("run", [STEP] * 10)
  damage(folder)
  monkeypatch.setattr(sys, "argv", ["watch", str(folder)])
  with pytest.raises(SystemExit) as stopped:
    watch.main()
  told = capsys.readouterr()
  assert stopped.value.code == 2 and told.out == ""
  assert told.err.startswith(f"error: {folder}") and line in told.err
  assert len(told.err.splitlines()) == 1
