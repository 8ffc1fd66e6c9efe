"""The training loop: dispatch, record, evaluate, save, stop when asked.

One process launches dispatches ahead, so that its device waits for the host at an evaluation, a
checkpoint and the end only.
"""

import collections
import math
import pathlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from hgnn_moe_jax import config_rules, sharding
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data.corpus import Corpus, load_corpus, unigram_perplexity
from hgnn_moe_jax.errors import NonFiniteError, Preempted
from hgnn_moe_jax.training import processes, run_folder
from hgnn_moe_jax.training.assembly import Assembly, assemble, chance_levels
from hgnn_moe_jax.training.checkpoint import Checkpointer
from hgnn_moe_jax.training.evaluation import Evaluator
from hgnn_moe_jax.training.events import Flags, changes, flags_of, no_flags
from hgnn_moe_jax.training.feeds import Feeder
from hgnn_moe_jax.training.launcher import Launcher, Made
from hgnn_moe_jax.training.optimizer import averaged_params
from hgnn_moe_jax.training.progress import Display, Tracker, announce, make_display
from hgnn_moe_jax.training.records import (
  MetricWriter,
  NoMetrics,
  environment,
  train_fields,
  write_json,
)
from hgnn_moe_jax.training.state import StepRecord
from hgnn_moe_jax.training.step import Feed, as_count


class Taken(NamedTuple):
  """Records of steps first_step + 1 ... first_step + n, and when these had ended.

  With several processes they may be under way, and `ended` is None.
  """

  first_step: int
  n: int
  records: StepRecord
  ended: float | None


class Clock:
  """Training time, without compilation, evaluation and the part of saving that waits; seconds."""

  def __init__(self, train_seconds: float):
    self.train_seconds = train_seconds
    self._since = time.perf_counter()

  def restart(self) -> None:
    self._since = time.perf_counter()

  def lap(self, end: float | None) -> float:
    """Seconds from the last lap's end to this one's: a `perf_counter()`, or None for now."""
    end = time.perf_counter() if end is None else end
    lap, self._since = end - self._since, end
    self.train_seconds += lap
    return lap


def train(config: Config, workdir: pathlib.Path, quiet: bool = False) -> dict[str, Any]:
  """Trains, or continues, the run in `workdir` to its end; returns what summary.json holds.

  Raises:
    ConfigError, UserError: something in the config, the data or the folder cannot work.
    NonFiniteError: a loss or the gradient became infinite or NaN.
    Preempted: SIGTERM or Ctrl-C; the state is saved.
  """
  config.validate()
  mesh = sharding.make_mesh(config)
  first = processes.is_first()
  quiet = quiet or not first
  with run_folder.locked(workdir) if first else nullcontext():
    announce(f"{config.name}: reading {config.data.source} {config.data.path}".rstrip(), quiet)
    for line in config_rules.idle(config):
      announce(line, quiet)
    corpus = load_corpus(config)
    assembly = assemble(config, corpus, mesh)
    if first:
      details = _details(config, corpus, assembly)
      run_folder.claim(workdir, config, details, corpus.tokenizer.definition)
    processes.wait_for_all("the run folder is claimed")
    announce(
      f"{assembly.parameters:,} parameters, {assembly.total_steps:,} steps of "
      f"{config.training.batch_size} x {config.model.max_length} tokens; compiling",
      quiet,
    )
    with processes.stop_requests() as stop, sharding.using(mesh):
      run = Run(config, workdir, corpus, assembly, stop, quiet)
      try:
        return run.train()
      finally:
        run.close()


class Run:
  """One process's work on a run: the state and everything that watches it."""

  def __init__(
    self,
    config: Config,
    workdir: pathlib.Path,
    corpus: Corpus,
    assembly: Assembly,
    stop: threading.Event,
    quiet: bool,
  ):
    self.config, self.workdir, self.assembly, self.stop = config, workdir, assembly, stop
    self.corpus, self.fill = corpus, corpus.tokenizer.end_of_text
    self.total = assembly.total_steps
    self.checkpointer = Checkpointer(workdir, config.training.keep_checkpoints)
    restored = self.checkpointer.restore_latest(assembly.abstract_state)
    if restored is None:
      self.step, note = 0, _blank_note(config.model.num_layers)
    else:
      self.state, note = restored
      self.step = int(self.state.step)
    self.tokens_seen, self.clock = note["tokens_seen"], Clock(note["train_seconds"])
    self.best, self.last = note["best"], note["last"]
    self.flags = Flags(**note["flags"])
    self.compile_seconds, self.stopping = 0.0, False
    first = processes.is_first()
    self.tracker = Tracker(config, workdir, active=first, step=self.step)
    self.agree = processes.Agreement(assembly.mesh)
    self.display: Display = make_display(self.total, self.step, quiet)
    # Nothing is written again for a finished run: what evaluations have added to it stays.
    keep_bytes = note["metrics_bytes"] if self.step < self.total else None
    self.metrics = MetricWriter(workdir, keep_bytes) if first else NoMetrics()
    self.evaluator = Evaluator(
      assembly.model,
      corpus.splits["validation"],
      config.evaluation.batch_size or config.training.batch_size,
      config.model.max_length,
      self.fill,
      config.data.placement,
      assembly.mesh,
    )
    if restored is not None:
      self.display.message(f"continuing {workdir} from step {self.step} of {self.total}")

  def train(self) -> dict[str, Any]:
    if self.step < self.total:
      self._prepare()
      self._train_steps()
    self.checkpointer.wait()
    return self._summarize()

  def close(self) -> None:
    with ExitStack() as parts:  # All of them, also when one cannot write its last.
      for part in (self.checkpointer, self.metrics, self.tracker, self.display):
        parts.callback(part.close)

  def _prepare(self) -> None:
    """Compiles training and evaluation beside one another, and draws a new run's parameters.

    All of its time counts as compilation.
    """
    a, started = self.assembly, time.perf_counter()
    examples = self.corpus.splits["train"].examples
    self.feeder = Feeder(examples, self.config, self.fill, self.step, a.mesh)
    # Only XLA's part runs in threads: what a user has set for JAX is often set for one thread.
    with ThreadPoolExecutor(2, "compile") as pool:
      dispatch = pool.submit(self._lowered().compile)
      evaluation = pool.submit(self.evaluator.lowered(a.abstract_state.params).compile)
      if self.step == 0:
        self.state = a.init_state(self.config.seed)
      self.checkpointer.reserve(self.state)
      self.dispatch, self.evaluator.compiled = dispatch.result(), evaluation.result()
    self.compile_seconds += time.perf_counter() - started

  def _train_steps(self) -> None:
    self.clock.restart()
    with Launcher(self.stop) as launcher:
      for taken in self._dispatches(launcher):
        self.step = taken.first_step + taken.n
        self.stopping = self.agree(self.stop.is_set())  # Asked once: it may be set at any moment.
        self._record(taken)
        if self._due(self.step):
          self._evaluate_and_save()
          self.clock.restart()
    if self.step < self.total:
      self._preempt()

  def _dispatches(self, launcher: Launcher) -> Iterator[Taken]:
    """All there are, each when its call has returned, up to a request to stop.

    The next ones are launched by then, so that the device does not wait for what is done with one;
    but not beyond a step at which something is due, until that is done.
    """
    launched: collections.deque[tuple[int, int, Future[Made | None]]] = collections.deque()
    ahead, feed = self.step, None

    def launch_ahead() -> None:
      nonlocal ahead, feed
      while ahead < self.total and len(launched) < launcher.depth and not self.stopping:
        n = self._steps_to_take(ahead)
        if feed is None:  # Made while steps run, also if it has to wait for something that is due.
          feed = self.feeder(ahead, n)
        if ahead > self.step and self._due(ahead):
          return
        launched.append((ahead, n, launcher(self._take, feed, n)))
        ahead, feed = ahead + n, None

    launch_ahead()
    while launched:
      first_step, n, call = launched.popleft()
      made = call.result()
      if made is None:  # It did not begin, since the run is to stop.
        return
      launch_ahead()
      yield Taken(first_step, n, made.result, made.ended)
      launch_ahead()

  def _take(self, feed: Feed, n: int) -> StepRecord:
    self.state, records = self.dispatch(self.state, feed, as_count(n))
    return records

  def _lowered(self) -> jax.stages.Lowered:
    """The dispatch, traced but not compiled."""
    a = self.assembly
    # From the state's shapes, not from its arrays: a continued run's, which lie where Orbax put
    # them, would give another program to compile.
    return a.dispatch.lower(a.abstract_state, self.feeder.example(), as_count(1))

  def _steps_to_take(self, step: int) -> int:
    """Up to the next multiple of every cadence, so that resuming meets the same borders."""
    t = self.config.training
    cadences = (t.steps_per_dispatch, t.checkpoint_every, self.config.evaluation.every)
    return min(self.total - step, *(c - step % c for c in cadences))

  def _due(self, step: int) -> bool:
    cadences = (self.config.training.checkpoint_every, self.config.evaluation.every)
    return step == self.total or any(step % c == 0 for c in cadences)

  def _record(self, taken: Taken) -> None:
    """Waits for the records, writes them, and stops the run if a number is not finite."""
    records = jax.tree.map(np.asarray, taken.records)
    seconds = self.clock.lap(taken.ended)
    tokens = int(records.tokens[: taken.n].sum(dtype=np.float64))
    self.tokens_seen += tokens
    t = self.config.training
    for k in range(taken.n):
      step = taken.first_step + k + 1
      one = jax.tree.map(lambda a, k=k: a[k], records)
      before, self.flags = self.flags, flags_of(one)
      for event in changes(before, self.flags):
        self.metrics.write("event", step, **event)
      finite = math.isfinite(one.loss) and math.isfinite(one.grad_norm)
      if step % t.log_every == 0 or step == self.total or not finite:
        fields = train_fields(one, self.config.adaptive.signal, tokens / seconds)
        self.metrics.write("train", step, **fields)
        self.tracker.log("train", step, fields)
        self.display.train(step, fields)
      if not finite:
        self._non_finite(step, f"loss={float(one.loss)} grad_norm={float(one.grad_norm)}")

  def _non_finite(self, step: int, numbers: str) -> NoReturn:
    self.metrics.write("event", step, name="non_finite")
    self.metrics.flush()
    self.checkpointer.wait()
    saved = self.checkpointer.latest_step()
    kept = f"the checkpoint of step {saved} is kept" if saved is not None else "nothing was saved"
    raise NonFiniteError(
      f"step {step}: {numbers}; {kept}. "
      "Lower config.training.learning_rate, raise config.training.warmup_steps or set "
      "config.training.clip_norm, and start in a new --workdir"
    )

  def _evaluate_and_save(self) -> None:
    """What is due at this step, in the order: evaluation, event, checkpoint."""
    c, step, improved = self.config, self.step, False
    if step % c.evaluation.every == 0 or step == self.total:
      improved = self._evaluate()
    if improved or step % c.training.checkpoint_every == 0 or step == self.total:
      self.metrics.write("event", step, name="checkpoint")
      self._save()

  def _evaluate(self) -> bool:
    """Scores the validation split; True if it is the best so far."""
    params = averaged_params(self.state.opt_state, self.state.params)
    score = self.evaluator(params)
    self.last = {"step": self.step, "split": "validation", **score._asdict()}
    fields = {k: v for k, v in self.last.items() if k != "step"}
    self.metrics.write("eval", self.step, **fields)
    self.tracker.log("eval", self.step, fields)
    self.display.message(
      f"step {self.step} validation: token perplexity {score.token_perplexity:.6g}, "
      f"word perplexity {score.word_perplexity:.6g}, bits per byte {score.bits_per_byte:.4f}"
    )
    if not math.isfinite(score.loss):
      # The last update broke the parameters. They are not saved, and a first NaN would stay the
      # best: nothing is less.
      self._non_finite(self.step, f"validation loss={score.loss}")
    control = self.assembly.controller.observe_evaluation(self.state.control, score.loss)
    self.state = self.state._replace(control=control)
    improved = self.best is None or score.loss < self.best["loss"]
    if improved:
      self.best = self.last
      self.metrics.write("event", self.step, name="best")
    return improved

  def _save(self) -> None:
    measured = self.last is not None and self.last["step"] == self.step
    note = {
      "metrics_bytes": self.metrics.flush(),
      "tokens_seen": self.tokens_seen,
      "train_seconds": self.clock.train_seconds,
      "best": self.best,
      "last": self.last,
      "flags": self.flags._asdict(),
    }
    self.checkpointer.save(
      self.step, self.state, note, loss=self.last["loss"] if measured and self.last else None
    )

  def _preempt(self) -> None:
    # The two events come after the note: a continued run cuts them off again, and its records
    # are those of a run that was never interrupted. Before its first step it has nothing to save.
    if self.step:
      self._save()
      self.checkpointer.wait()
      self.metrics.write("event", self.step, name="checkpoint")
    self.metrics.write("event", self.step, name="preempted")
    self.metrics.flush()
    raise Preempted(
      f"stopped on request at step {self.step} of {self.total}; everything is saved. "
      "Run the same command again to continue"
    )

  def _summarize(self) -> dict[str, Any]:
    seconds = self.clock.train_seconds
    summary = {
      "config_name": self.config.name,
      "parameters": self.assembly.parameters,
      "steps": self.step,
      "tokens_seen": self.tokens_seen,
      "train_seconds": round(seconds, 3),
      "compile_seconds": round(self.compile_seconds, 3),
      "tokens_per_second": round(self.tokens_seen / seconds, 1) if seconds else 0.0,
      "unigram_perplexity": unigram_perplexity(self.corpus),
      "best": self.best,
      "last": self.last,
      "device": environment()["device"],
    }
    unchanged = not self.compile_seconds and (self.workdir / "summary.json").exists()
    if processes.is_first() and not unchanged:
      write_json(self.workdir / "summary.json", summary)
    return summary


def _blank_note(num_layers: int) -> dict[str, Any]:
  """A checkpoint's note as it would be before the first step."""
  return {
    "metrics_bytes": 0,
    "tokens_seen": 0,
    "train_seconds": 0.0,
    "best": None,
    "last": None,
    "flags": no_flags(num_layers)._asdict(),
  }


def _details(config: Config, corpus: Corpus, assembly: Assembly) -> dict[str, Any]:
  """What config.json holds beside the config."""
  return {
    "config_name": config.name,
    "parameters": assembly.parameters,
    "total_steps": assembly.total_steps,
    "data": {
      "fingerprint": corpus.fingerprint,
      "vocab_size": corpus.tokenizer.vocab_size,
      **{
        name: {
          "examples": split.examples.num_examples,
          "tokens": split.tokens,
          "words": split.words,
          "bytes": split.bytes,
        }
        for name, split in corpus.splits.items()
      },
    },
    "chance": chance_levels(config, assembly),
    **environment(),
  }
