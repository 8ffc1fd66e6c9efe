"""Whole runs in a folder: what they write, and that no interruption leaves a trace."""

import copy
import fcntl
import functools
import json
import math
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import ConfigError, NonFiniteError, Preempted, UserError
from hgnn_moe_jax.training import evaluation, loop, run_folder
from hgnn_moe_jax.training.checkpoint import Checkpointer

TRAIN_FIELDS = {
  *("kind", "step", "loss", "lm_loss", "weight_penalty", "output_penalty", "weight_strength"),
  *("output_strength", "specialization", "specialization_mean", "emergency", "grad_norm"),
  *("learning_rate", "tokens_per_second"),
}
EVAL_FIELDS = {
  *("kind", "step", "split", "loss", "token_perplexity", "word_perplexity", "bits_per_byte"),
  *("tokens", "words", "bytes"),
}
SUMMARY_FIELDS = {
  *("config_name", "parameters", "steps", "tokens_seen", "train_seconds", "compile_seconds"),
  *("tokens_per_second", "best", "last", "device", "unigram_perplexity"),
}


def read_json(path: pathlib.Path):
  def refuse(constant):
    raise AssertionError(f"bare {constant}")

  return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_writes_what_other_tools_rely_on(finished, tiny_config):
  lines = (finished / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  by_kind = {k: [r for r in records if r["kind"] == k] for k in ("train", "eval", "event")}
  assert len(records) == sum(map(len, by_kind.values()))
  assert [r["step"] for r in by_kind["train"]] == list(range(1, 13))
  for record in by_kind["train"]:
    assert record.keys() >= TRAIN_FIELDS
    for name in ("weight_penalty", "output_penalty", "weight_strength", "output_strength"):
      assert len(record[name]) == 2
    assert len(record["specialization"]) == len(record["emergency"]) == 2
    assert record["specialization"] == record["weight_specialization"]
    assert record["specialization_mean"] == pytest.approx(np.mean(record["specialization"]))
    assert all(type(on) is bool for on in record["emergency"])
    penalty = sum(
      s * p
      for kind in ("weight", "output")
      for s, p in zip(record[f"{kind}_strength"], record[f"{kind}_penalty"], strict=True)
    )
    assert record["loss"] == pytest.approx(record["lm_loss"] + penalty, rel=1e-5)
  # Linear warm-up of the strengths over 4 steps to 0.1.
  strengths = [r["weight_strength"][0] for r in by_kind["train"]]
  np.testing.assert_allclose(strengths[:6], [0, 0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)
  assert by_kind["train"][0]["learning_rate"] == pytest.approx(5e-3)
  assert by_kind["train"][1]["learning_rate"] == pytest.approx(1e-2)

  assert [(r["step"], r["split"]) for r in by_kind["eval"]] == [
    (6, "validation"),
    (12, "validation"),
  ]
  for record in by_kind["eval"]:
    assert record.keys() == EVAL_FIELDS
  events = [(r["step"], r["name"]) for r in by_kind["event"]]
  assert events == [
    *[(4, "checkpoint"), (6, "best"), (6, "checkpoint"), (8, "checkpoint")],
    *[(12, "best"), (12, "checkpoint")],
  ]

  content = read_json(finished / "config.json")
  assert Config.from_dict(content["config"]) == tiny_config()
  assert content["data"]["fingerprint"] and content["versions"]["jax"] == jax.__version__
  assert content["device"]["platform"] == "cpu"
  assert 0.9 < content["chance"]["weight_specialization"] < 1

  summary = read_json(finished / "summary.json")
  assert summary.keys() == SUMMARY_FIELDS
  assert summary["parameters"] == content["parameters"] > 0
  assert summary["steps"] == 12
  assert summary["tokens_seen"] == sum(int(r["tokens"]) for r in by_kind["train"])
  evals = [{k: v for k, v in r.items() if k != "kind"} for r in by_kind["eval"]]
  assert summary["last"] == evals[-1]
  assert summary["best"] == min(evals, key=lambda r: r["loss"])
  steps = sorted(f.name for f in (finished / "checkpoints").iterdir())
  assert steps == ["12", "8"]


def _nothing(*_):
  pass


@pytest.fixture
def stop_at(monkeypatch, request):
  """stop_at(step, how): SIGTERM arrives while that step's dispatch is under way."""

  def arrange(step: int, number: int = signal.SIGTERM) -> None:
    once = iter([True])
    take = loop.Run._take
    # One that arrives just before Python's main thread begins to wait is noticed when that wakes.
    wake = signal.SIGUSR1
    request.addfinalizer(functools.partial(signal.signal, wake, signal.signal(wake, _nothing)))

    def call(self, feed, n):
      first = int(self.state.step)
      if first < step <= first + n and next(once, False):
        os.kill(os.getpid(), number)
        for _ in range(600):
          if self.stop.wait(0.1):
            break
          os.kill(os.getpid(), wake)
        assert self.stop.is_set()
      return take(self, feed, n)

    monkeypatch.setattr(loop.Run, "_take", call)

  return arrange


# One in each dispatch but the last: before the first checkpoint, at a border, between two.
@pytest.mark.parametrize(("step", "saved"), [(1, 3), (4, 4), (5, 6), (8, 8), (9, 9)])
def test_stopped_and_continued_is_uninterrupted(
  step, saved, tiny_config, tmp_path, stop_at, assert_same_run, read_metrics
):
  stop_at(step)
  with pytest.raises(Preempted, match=rf"stopped on request at step {saved} of 12") as stopped:
    loop.train(tiny_config(), tmp_path, quiet=True)
  assert stopped.value.exit_status == 75
  assert not (tmp_path / "summary.json").exists()
  last = read_metrics(tmp_path)[-2:]
  assert [r["name"] for r in last] == ["checkpoint", "preempted"]
  assert [r["step"] for r in last] == [saved, saved]
  summary = loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)
  assert summary["steps"] == 12


@pytest.mark.parametrize("step", [6, 8, 12])
def test_stopped_in_an_evaluation(step, tiny_config, tmp_path, monkeypatch, assert_same_run):
  """What is due is done; after the last step there is nothing left to stop."""
  evaluate = loop.Run._evaluate_and_save

  def call(self):
    if self.step == step:
      self.stop.set()
    evaluate(self)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "_evaluate_and_save", call)
    if step < 12:
      with pytest.raises(Preempted, match=rf"stopped on request at step {step} of 12"):
        loop.train(tiny_config(), tmp_path, quiet=True)
    else:
      loop.train(tiny_config(), tmp_path, quiet=True)
  assert (tmp_path / "summary.json").exists() == (step == 12)
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)


def test_stopped_before_the_first_step(
  tiny_config, tmp_path, monkeypatch, assert_same_run, read_metrics
):
  prepare = loop.Run._prepare
  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "_prepare", lambda self: (prepare(self), self.stop.set()))
    with pytest.raises(Preempted, match="stopped on request at step 0 of 12"):
      loop.train(tiny_config(), tmp_path, quiet=True)
  assert not list((tmp_path / "checkpoints").iterdir())
  assert [r["name"] for r in read_metrics(tmp_path)] == ["preempted"]
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)


def test_memory_for_checkpoints_is_reserved_before_training(tiny_config, tmp_path, monkeypatch):
  steps = []
  monkeypatch.setattr(
    loop.Checkpointer, "reserve", lambda self, state: steps.append(int(state.step))
  )
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert steps == [0]


def test_interrupted_twice_by_ctrl_c(tiny_config, tmp_path, stop_at, assert_same_run, monkeypatch):
  told, tracker = [], loop.Tracker
  monkeypatch.setattr(
    loop, "Tracker", lambda *args, **given: told.append(given["step"]) or tracker(*args, **given)
  )
  for step in (2, 7):
    stop_at(step, signal.SIGINT)
    with pytest.raises(Preempted):
      loop.train(tiny_config(), tmp_path, quiet=True)
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)
  assert told[0] == 0 < told[1] < told[2], "where it goes on"


def test_a_stop_that_arrives_late_loses_no_record(
  tiny_config, tmp_path, monkeypatch, assert_same_run
):
  """The event is set between the two places that could look at it."""

  class Late(threading.Event):
    asked = 0

    def is_set(self):
      self.asked += 1
      return self.asked > 1

  run_train = loop.Run.train

  def train(self):
    self.stop = Late()
    return run_train(self)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "train", train)
    with pytest.raises(Preempted):
      loop.train(tiny_config(), tmp_path, quiet=True)
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)


def test_signal_handlers_are_put_back(tiny_config, finished):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  loop.train(tiny_config(), finished, quiet=True)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_crash_after_the_checkpoint_repeats_the_lost_steps(
  tiny_config, tmp_path, monkeypatch, assert_same_run
):
  """As after kill -9: records beyond the checkpoint are cut off and written again."""

  def crash(self):
    self.metrics.write("train", 99, junk=True)
    self.metrics.flush()
    raise RuntimeError("power cut")

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "_evaluate", crash)
    with pytest.raises(RuntimeError, match="power cut"):
      loop.train(tiny_config(), tmp_path, quiet=True)
  assert '"junk"' in (tmp_path / "metrics.jsonl").read_text()
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert_same_run(tmp_path)


@pytest.mark.parametrize("lost", ["12", "8"])
def test_damaged_checkpoints_cost_time_but_no_bit(
  lost, tiny_config, tmp_path, finished, assert_same_run
):
  """With the newest damaged it continues from the one before; with all, it says so."""
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  for step in ("12", lost):
    shutil.rmtree(workdir / "checkpoints" / step / "state", ignore_errors=True)
  if lost == "8":
    with pytest.raises(UserError, match=r"none of the checkpoints \[8, 12\] can be read"):
      loop.train(tiny_config(), workdir, quiet=True)
    return
  loop.train(tiny_config(), workdir, quiet=True)
  assert_same_run(workdir)


def test_host_placement_and_dispatch_size_change_nothing(
  tiny_config, tmp_path, read_metrics, finished, final_state, assert_same
):
  changes = {"data.placement": "host", "training.steps_per_dispatch": 1}
  loop.train(tiny_config(**changes), tmp_path, quiet=True)
  rows, expected = read_metrics(tmp_path), read_metrics(finished)
  for row, other in zip(rows, expected, strict=True):
    # A report only: XLA may fuse the schedule's cosine differently where a buffer has one row,
    # which has moved its last bit. The optimizer has its own, and the states are equal.
    rate, other_rate = row.pop("learning_rate", 0), other.pop("learning_rate", 0)
    assert rate == pytest.approx(other_rate, rel=1e-6)
  assert rows == expected
  assert_same(final_state(tmp_path), final_state(finished))


def test_records_and_feeds_are_made_while_steps_run(tiny_config, tmp_path, monkeypatch):
  """On a GPU a dispatch does not return before its steps are done."""
  written, fed = threading.Event(), threading.Event()
  write, prepare, feed = loop.MetricWriter.write, loop.Run._prepare, loop.Feeder.__call__
  monkeypatch.setattr(
    loop.MetricWriter, "write", lambda self, *a, **k: (write(self, *a, **k), written.set())
  )

  def call(self, step, n):
    if step == 3:
      fed.set()
    return feed(self, step, n)

  def prepare_slow(self):
    prepare(self)
    dispatch, calls = self.dispatch, []

    def slow(*arguments):
      calls.append(arguments)
      if len(calls) == 1:
        assert fed.wait(60), "the second feed waits for the first dispatch"
      else:  # Step 6 is an evaluation, before which everything is written.
        assert written.wait(60), "the first records wait for the second dispatch"
      return dispatch(*arguments)

    self.dispatch = slow

  monkeypatch.setattr(loop.Feeder, "__call__", call)
  monkeypatch.setattr(loop.Run, "_prepare", prepare_slow)
  loop.train(tiny_config(), tmp_path, quiet=True)


def test_dispatches_follow_one_another_while_records_are_written(
  tiny_config, tmp_path, monkeypatch, read_metrics
):
  third = threading.Event()
  take, write = loop.Run._take, loop.MetricWriter.write
  starts = []

  def call(self, feed, n):
    starts.append(int(self.state.step))
    if len(starts) == 3:
      third.set()
    return take(self, feed, n)

  def write_slowly(self, *arguments, **fields):
    assert third.wait(60), "the third dispatch waits for the first one's records"
    write(self, *arguments, **fields)

  monkeypatch.setattr(loop.Run, "_take", call)
  monkeypatch.setattr(loop.MetricWriter, "write", write_slowly)
  everything = {"evaluation.every": 12, "training.checkpoint_every": 12}
  loop.train(tiny_config(**everything), tmp_path, quiet=True)
  assert starts == [0, 3, 6, 9]
  rows = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
  assert rows == list(range(1, 13))


def test_the_feed_behind_an_evaluation_is_made_before_it(tiny_config, tmp_path, monkeypatch):
  order = []
  feed, due = loop.Feeder.__call__, loop.Run._evaluate_and_save

  def call(self, step, n):
    order.append(f"feed {step}")
    return feed(self, step, n)

  def evaluate(self):
    order.append(f"due {self.step}")
    due(self)

  monkeypatch.setattr(loop.Feeder, "__call__", call)
  monkeypatch.setattr(loop.Run, "_evaluate_and_save", evaluate)
  loop.train(tiny_config(), tmp_path, quiet=True)
  for step in (4, 6, 8):
    assert order.index(f"feed {step}") < order.index(f"due {step}")
  assert sorted(o for o in order if o < "e") == sorted(f"due {s}" for s in (4, 6, 8, 12))
  assert len(order) == len(set(order)) == 10  # Feeds of 0, 3, 4, 6, 8, 9.


def test_speeds_are_those_of_the_dispatches_and_not_of_whoever_writes_them_down(
  tiny_config, tmp_path, monkeypatch
):
  """Dispatches of 0.1 s each, of which two end while the first one's records are written."""
  take, write = loop.Run._take, loop.MetricWriter.write
  third, stalled = threading.Event(), iter([True])
  calls = []

  def call(self, feed, n):
    time.sleep(0.1)
    records = jax.block_until_ready(take(self, feed, n))
    calls.append(n)
    if len(calls) == 3:
      third.set()
    return records

  def write_slowly(self, *arguments, **fields):
    if next(stalled, False):
      assert third.wait(60)
    write(self, *arguments, **fields)

  monkeypatch.setattr(loop.Run, "_take", call)
  monkeypatch.setattr(loop.MetricWriter, "write", write_slowly)
  everything = {"evaluation.every": 12, "training.checkpoint_every": 12}
  loop.train(tiny_config(**everything), tmp_path, quiet=True)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  speeds = [r["tokens_per_second"] for r in rows if r["kind"] == "train"]
  assert max(speeds) < 3 * 8 * 16 / 0.1  # 3 steps of 8 x 16 tokens at most, in 0.1 s at least


def test_evaluation_is_compiled_before_training_begins(tiny_config, tmp_path, monkeypatch):
  prepare = loop.Run._prepare

  def prepare_and_cut(self):
    prepare(self)
    # Only the compiled program is left.
    monkeypatch.setattr(self.evaluator, "_evaluate", None)

  monkeypatch.setattr(loop.Run, "_prepare", prepare_and_cut)
  summary = loop.train(tiny_config(**{"training.steps": 6}), tmp_path, quiet=True)
  assert summary["last"]["step"] == 6


def test_a_finished_run_is_left_alone(tiny_config, finished, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  with open(workdir / "metrics.jsonl", "a") as file:  # as an evaluation of the test split does
    file.write('{"kind": "eval", "step": 12, "split": "test"}\n')
  files = {f: f.read_bytes() for f in workdir.rglob("*") if f.is_file()}
  monkeypatch.setattr(loop.Run, "_train_steps", None)  # any attempt to train would fail
  summary = loop.train(tiny_config(), workdir, quiet=True)
  assert {f: f.read_bytes() for f in workdir.rglob("*") if f.is_file()} == files
  written = read_json(workdir / "summary.json")
  # Nothing was compiled this time; all else is as it was.
  assert {**summary, "compile_seconds": written["compile_seconds"]} == written


def test_epochs_give_the_number_of_steps(tiny_config):
  config = tiny_config(**{"training.steps": 0, "training.epochs": 1.5})
  examples = loop.load_corpus(config).splits["train"].examples.num_examples
  from hgnn_moe_jax.training.assembly import total_steps

  assert total_steps(config, examples) == round(1.5 * math.ceil(examples / 8)) > 100
  assert total_steps(config, 16) == 3 and total_steps(config, 17) == 4  # 4.5 rounds to even
  assert total_steps(tiny_config(), examples) == 12
  tiny_epochs = tiny_config(**{"training.steps": 0, "training.epochs": 1e-9})
  assert total_steps(tiny_epochs, examples) == 1


def test_another_runs_folder_is_refused_with_the_differences(tiny_config, finished):
  other = tiny_config(**{"training.learning_rate": 0.5, "seed": 1, "model.coupler": "mean"})
  with pytest.raises(UserError, match="belongs to another run") as error:
    loop.train(other, finished, quiet=True)
  message = str(error.value)
  assert "seed: 42 -> 1; model.coupler: 'graph' -> 'mean'" in message
  assert "training.learning_rate: 0.01 -> 0.5" in message and "batch_size" not in message


def test_free_fields_may_change_on_the_way(
  tiny_config, tmp_path, stop_at, finished, read_metrics, final_state, assert_same
):
  stop_at(5)
  with pytest.raises(Preempted):
    loop.train(tiny_config(), tmp_path, quiet=True)
  changed = tiny_config(
    **{
      "training.log_every": 4,
      "training.steps_per_dispatch": 1,
      "training.keep_checkpoints": 1,
      "training.tensorboard": True,
      "evaluation.batch_size": 5,
    }
  )
  loop.train(changed, tmp_path, quiet=True)
  assert_same(final_state(tmp_path), final_state(finished))
  trained = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
  assert [r["step"] for r in trained] == [1, 2, 3, 4, 5, 6, 8, 12]
  wanted = {r["step"]: r for r in read_metrics(finished) if r["kind"] == "train"}
  assert all(record == wanted[record["step"]] for record in trained)
  assert list((tmp_path / "tensorboard").iterdir())


def test_recomputation_may_begin_on_the_way(tiny_config, tmp_path, stop_at, finished, read_metrics):
  """What somebody does who has run out of memory: results change by rounding."""
  stop_at(5)
  with pytest.raises(Preempted):
    loop.train(tiny_config(), tmp_path, quiet=True)
  changed = tiny_config(**{"training.remat": True, "model.unrolled_layers": 1})
  loop.train(changed, tmp_path, quiet=True)
  losses = [
    [r["lm_loss"] for r in read_metrics(folder) if r["kind"] == "train"]
    for folder in (tmp_path, finished)
  ]
  assert len(losses[0]) == 12
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_other_text_is_refused(tiny_config, text_file, tmp_path):
  path = tmp_path / "text.txt"
  shutil.copy(text_file, path)
  config = tiny_config(**{"data.path": str(path)})
  workdir = tmp_path / "run"
  corpus = loop.load_corpus(config)
  with run_folder.locked(workdir):
    run_folder.claim(workdir, config, {"data": {"fingerprint": corpus.fingerprint}})
  path.write_text(text_file.read_text().replace("graph", "grape", 1))
  with pytest.raises(UserError, match=rf"content of the data: {corpus.fingerprint} -> "):
    loop.train(config, workdir, quiet=True)


def test_a_folder_in_use_is_refused(tiny_config, tmp_path):
  with open(tmp_path / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is training there"):
      loop.train(tiny_config(), tmp_path, quiet=True)


def test_checkpoints_without_a_config_are_refused(tiny_config, tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
    loop.train(tiny_config(), tmp_path, quiet=True)


def test_a_validation_loss_that_is_no_number_stops_the_run(
  tiny_config, tmp_path, monkeypatch, read_metrics
):
  """Of two evaluations the second, at the end: what it scored is not saved."""
  scores = iter([12.0, math.nan])
  monkeypatch.setattr(
    loop.Evaluator, "__call__", lambda self, params: evaluation.score(next(scores), 4, 3, 8)
  )
  message = r"step 12: validation loss=nan; the checkpoint of step 8 is kept\. Lower"
  with pytest.raises(NonFiniteError, match=message):
    loop.train(tiny_config(), tmp_path, quiet=True)
  records = read_metrics(tmp_path)
  assert [r["loss"] for r in records if r["kind"] == "eval"] == [3.0, "nan"]
  assert records[-1] == {"kind": "event", "step": 12, "name": "non_finite"}
  assert not (tmp_path / "summary.json").exists()
  checkpoints = Checkpointer(tmp_path)
  assert (checkpoints.best_step(), checkpoints.latest_step()) == (6, 8)
  checkpoints.close()


def test_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(
  tiny_config, tmp_path, monkeypatch, read_metrics, final_state
):
  """The parameters are poisoned once step 4 is saved, so the loss of step 5 is NaN."""
  save = loop.Run._save

  def save_and_poison(self):
    save(self)
    poisoned = jax.tree.map(lambda a: a * np.float32(np.nan), self.state.params)
    self.state = self.state._replace(params=poisoned)

  monkeypatch.setattr(loop.Run, "_save", save_and_poison)
  with pytest.raises(NonFiniteError, match=r"step 5: loss=nan .* checkpoint of step 4 is kept"):
    loop.train(tiny_config(), tmp_path, quiet=True)
  records = read_metrics(tmp_path)
  assert records[-1] == {"kind": "event", "step": 5, "name": "non_finite"}
  assert records[-2]["step"] == 5 and records[-2]["loss"] == "nan"
  state = final_state(tmp_path)
  assert int(state.step) == 4
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_non_finite_loss_stops_the_run_while_the_next_steps_are_under_way(
  tiny_config, tmp_path, monkeypatch, read_metrics
):
  take = loop.Run._take

  def take_and_poison(self, feed, n):
    first, records = int(self.state.step), take(self, feed, n)
    if first == 0:
      poisoned = jax.tree.map(lambda a: a * np.float32(np.nan), self.state.params)
      self.state = self.state._replace(params=poisoned)
    return records

  monkeypatch.setattr(loop.Run, "_take", take_and_poison)
  everything = {"evaluation.every": 12, "training.checkpoint_every": 12}
  with pytest.raises(NonFiniteError, match=r"step 4: loss=nan .* nothing was saved"):
    loop.train(tiny_config(**everything), tmp_path, quiet=True)
  records = read_metrics(tmp_path)
  assert records[-1] == {"kind": "event", "step": 4, "name": "non_finite"}
  assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]


def test_mistakes_are_told_before_the_folder_is_touched(tiny_config, tmp_path):
  for changes in ({"training.warmup_steps": 12}, {"seed": -1}, {"training.batch_size": 10_000}):
    with pytest.raises(ConfigError):
      loop.train(tiny_config(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_config_is_not_changed_by_a_run(tiny_config, finished):
  config = tiny_config()
  before = copy.deepcopy(config)
  loop.train(config, finished, quiet=True)
  assert config == before
