"""Scores against naive sums over whole logits, and evaluation of a finished folder."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.data.corpus import Split
from hgnn_moe_jax.data.examples import stream_examples
from hgnn_moe_jax.errors import ConfigError, UserError
from hgnn_moe_jax.training import evaluate, evaluation, loop


def test_score_golden():
  """12 nats over 4 tokens, 3 words and line ends, 8 bytes."""
  got = evaluation.score(12.0, 4, 3, 8)
  assert got.loss == 3.0
  assert got.token_perplexity == pytest.approx(math.e**3)
  assert got.word_perplexity == pytest.approx(math.e**4)
  assert got.bits_per_byte == pytest.approx(1.5 / math.log(2))
  assert (got.tokens, got.words, got.bytes) == (4, 3, 8)
  assert evaluation.score(1e5, 4, 3, 8).word_perplexity == math.inf
  assert all(map(math.isnan, evaluation.score(math.nan, 4, 3, 8)[:4]))


def test_an_untrained_uniform_model_scores_the_vocabulary():
  assert evaluation.score(5 * math.log(257), 5, 1, 5).token_perplexity == pytest.approx(257)


@pytest.fixture
def scored(tiny_config):
  """(model, parameters, corpus): parameters far from the initial ones, so that positions matter."""
  config = tiny_config()
  corpus = loop.load_corpus(config)
  a = loop.assemble(config, corpus)
  params = a.init_state(3).params
  return a.model, jax.tree.map(lambda p: 3 * p, params), corpus


def naive_nats(model, params, tokens: np.ndarray, stride: int) -> tuple[float, int]:
  """Window by window from whole logits; and how many tokens were scored."""
  logits = jax.jit(model.logits)
  total, count, start = 0.0, 0, 0
  while True:
    window = tokens[start : start + 17].astype(np.int32)
    padded = np.zeros((1, 16), np.int32)
    padded[0, : window.size - 1] = window[:-1]
    log_p = jax.nn.log_softmax(logits(params, padded)[0])
    skip = 0 if start == 0 else 16 - stride
    for t in range(skip, window.size - 1):
      total -= float(log_p[t, window[t + 1]])
      count += 1
    if start + 16 >= tokens.size - 1:
      return total, count
    start += stride


@pytest.fixture
def short_split(scored):
  """A split of 100 tokens: seven windows of 16, the last one of 4."""
  _, _, corpus = scored
  tokens = np.asarray(corpus.splits["validation"].examples.tokens[:101])
  return lambda stride: Split(stream_examples(tokens, 16, stride), 100, 20, 99)


@pytest.mark.parametrize("stride", [16, 5])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_whole_split_is_scored_once(stride, placement, scored, short_split):
  model, params, _ = scored
  split = short_split(stride)
  wanted, count = naive_nats(model, params, split.examples.tokens, stride)
  assert count == 100
  got = evaluation.Evaluator(model, split, 8, 16, 256, placement)(params)
  assert got.loss == pytest.approx(wanted / 100, rel=1e-5)
  assert got.word_perplexity == pytest.approx(math.exp(wanted / 20), rel=1e-3)
  assert got.bits_per_byte == pytest.approx(wanted / math.log(2) / 99, rel=1e-5)


def test_longer_context_changes_the_score(scored, short_split):
  """Otherwise the sliding window above would prove nothing."""
  model, params, _ = scored
  losses = [
    evaluation.Evaluator(model, short_split(stride), 8, 16, 256, "host")(params).loss
    for stride in (16, 5)
  ]
  assert abs(losses[0] - losses[1]) > 1e-3


def test_the_batch_size_changes_nothing_but_rounding(scored, short_split):
  """2: four batches, the last one half empty; 8: one batch with an empty row."""
  model, params, _ = scored
  losses = [
    evaluation.Evaluator(model, short_split(16), size, 16, 256, "device")(params).loss
    for size in (2, 8)
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_more_batches_than_fit_in_a_dispatch(scored):
  """Batches of two windows: the validation split fills one dispatch of 16 and part of another."""
  model, params, corpus = scored
  split = corpus.splits["validation"]
  assert 32 < split.examples.num_examples < 64
  got = evaluation.Evaluator(model, split, 2, 16, 256, "device")(params)
  wanted, count = naive_nats(model, params, np.asarray(split.examples.tokens), 16)
  assert count == split.tokens
  assert got.loss == pytest.approx(wanted / count, rel=1e-5)


def test_evaluating_a_finished_folder(tiny_config, tmp_path, monkeypatch):
  """Best, last, test split, sliding context; each appends a record and touches nothing else."""
  scores = iter([4.0, 5.0])  # the first is the better one
  evaluator_call = evaluation.Evaluator.__call__

  def scripted(self, params):
    return evaluation.score(100 * next(scores), 100, 20, 99)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation.Evaluator, "__call__", scripted)
    loop.train(tiny_config(), tmp_path, quiet=True)
  seen = []

  def spy(self, params):
    seen.append((self._split, params))
    return evaluator_call(self, params)

  monkeypatch.setattr(evaluation.Evaluator, "__call__", spy)
  before = (tmp_path / "metrics.jsonl").read_text()
  best = evaluate.evaluate_run(tmp_path, "validation")
  last = evaluate.evaluate_run(tmp_path, "validation", "last")
  test = evaluate.evaluate_run(tmp_path, "test", "last", stride=5)
  assert (best["step"], last["step"], test["step"]) == (6, 12, 12)
  assert best["loss"] != last["loss"]
  config = tiny_config()
  corpus = loop.load_corpus(config)
  assert seen[0][0].tokens == corpus.splits["validation"].tokens
  assert seen[2][0].tokens == corpus.splits["test"].tokens == test["tokens"]
  assert (seen[2][0].examples.skip_X[1:] == 11).all()
  # It is the average that is scored, as in training.
  from hgnn_moe_jax.training.checkpoint import Checkpointer
  from hgnn_moe_jax.training.optimizer import averaged_params

  checkpointer = Checkpointer(tmp_path)
  a = loop.assemble(config, corpus)
  state, _ = checkpointer.restore(a.abstract_state, 12)
  checkpointer.close()
  average = averaged_params(state.opt_state, None)
  assert jnp.array_equal(seen[1][1]["head"], average["head"])
  assert not jnp.array_equal(average["head"], state.params["head"])
  after = (tmp_path / "metrics.jsonl").read_text()
  assert after.startswith(before)
  added = [json.loads(line) for line in after[len(before) :].splitlines()]
  assert [r["kind"] for r in added] == ["eval"] * 3
  assert [(r["split"], r["checkpoint"], r["stride"]) for r in added] == [
    *[("validation", "best", 0), ("validation", "last", 0), ("test", "last", 5)]
  ]
  # Continuing the finished run keeps these records.
  loop.train(tiny_config(), tmp_path, quiet=True)
  assert (tmp_path / "metrics.jsonl").read_text() == after

  with pytest.raises(ConfigError, match=r"evaluation\.stride=17: use at most model\.max_length=16"):
    evaluate.evaluate_run(tmp_path, "test", stride=17)
  content = json.loads((tmp_path / "config.json").read_text())
  content["data"]["fingerprint"] = "0" * 64
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match="is not the one this run was trained on"):
    evaluate.evaluate_run(tmp_path, "test")


def test_evaluating_before_there_is_anything(tiny_config, tmp_path, monkeypatch):
  def crash(self):
    raise RuntimeError("stopped before the first step")

  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "_lowered", crash)
    with pytest.raises(RuntimeError):
      loop.train(tiny_config(), tmp_path, quiet=True)
  with pytest.raises(UserError, match="no checkpoint there yet; train the run first"):
    evaluate.evaluate_run(tmp_path, "validation")
  with monkeypatch.context() as patch:
    patch.setattr(loop.Run, "_evaluate", crash)
    with pytest.raises(RuntimeError):
      loop.train(tiny_config(), tmp_path, quiet=True)
  with pytest.raises(UserError, match="no scored checkpoint there yet; evaluate with --checkpoint"):
    evaluate.evaluate_run(tmp_path, "validation")
  assert evaluate.evaluate_run(tmp_path, "validation", "last")["step"] == 4
