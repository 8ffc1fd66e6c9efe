"""Scoring a whole split: token perplexity, word perplexity, bits per byte."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from hgnn_moe_jax.data.corpus import Split
from hgnn_moe_jax.data.examples import gather, place
from hgnn_moe_jax.data.pipeline import evaluation_indices
from hgnn_moe_jax.models.language_model import LanguageModel, Params
from hgnn_moe_jax.training.step import Feed, as_count, make_evaluation

_BATCHES_PER_DISPATCH = 16


class Score(NamedTuple):
  """Attributes:
  loss: nats per scored token.
  token_perplexity: exp(loss). Depends on the tokenizer: compare within one only.
  word_perplexity: exp(total nats / (words + line ends)), the literature's measure.
  bits_per_byte: total bits per UTF-8 byte of the scored text.
  tokens, words, bytes: what was scored.
  """

  loss: float
  token_perplexity: float
  word_perplexity: float
  bits_per_byte: float
  tokens: int
  words: int
  bytes: int


def score(total_nats: float, tokens: int, words: int, num_bytes: int) -> Score:
  """The three numbers from the total loss. Perplexities beyond float64 are infinite."""
  return Score(
    loss=total_nats / tokens,
    token_perplexity=_exp(total_nats / tokens),
    word_perplexity=_exp(total_nats / words),
    bits_per_byte=total_nats / math.log(2) / num_bytes,
    tokens=tokens,
    words=words,
    bytes=num_bytes,
  )


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf


class Evaluator:
  """Scores one split with any parameters; compiles once.

  Args:
    model: its `features` and `loss`.
    split: examples (numpy) and sizes of the text they cover.
    batch_size: examples per batch.
    max_length: T.
    fill: the id that pads.
    placement: data.placement.
  """

  def __init__(
    self,
    model: LanguageModel,
    split: Split,
    batch_size: int,
    max_length: int,
    fill: int,
    placement: str,
  ):
    self._split, self._batch_size = split, batch_size
    self._max_length, self._fill = max_length, fill
    self._num_examples = split.examples.num_examples
    self._examples, self._on_device = place(split.examples, placement)
    self._evaluate = make_evaluation(model, _BATCHES_PER_DISPATCH, max_length, fill)

  def __call__(self, params: Params) -> Score:
    """Scores every token of the split once; totals in float64."""
    pending = [self._evaluate(params, feed, as_count(n)) for feed, n in self._feeds()]
    total = math.fsum(float(x) for losses in pending for x in np.asarray(losses, np.float64))
    return score(total, self._split.tokens, self._split.words, self._split.bytes)

  def _feeds(self) -> Iterator[tuple[Feed, int]]:
    rows = list(evaluation_indices(self._num_examples, self._batch_size))
    for first in range(0, len(rows), _BATCHES_PER_DISPATCH):
      chunk = rows[first : first + _BATCHES_PER_DISPATCH]
      yield self._feed(chunk), len(chunk)

  def _feed(self, chunk: list[np.ndarray]) -> Feed:
    missing = _BATCHES_PER_DISPATCH - len(chunk)
    indices_KB = np.stack(chunk + [np.full_like(chunk[0], -1)] * missing)
    if self._on_device:
      return Feed(self._examples, indices_KB, None)
    batches: list[Any] = [
      gather(self._examples, i, self._max_length, self._fill) for i in indices_KB
    ]
    return Feed(None, None, jax.tree.map(lambda *a: np.stack(a), *batches))
