"""Scoring a whole split: token perplexity, word perplexity, bits per byte."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hgnn_moe_jax import sharding
from hgnn_moe_jax.data.corpus import Split
from hgnn_moe_jax.models.language_model import LanguageModel, Params
from hgnn_moe_jax.training.feeds import Placed, evaluation_feeds
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
  return math.inf if x >= 700 else math.exp(x)


class Evaluator:
  """Scores one split with any parameters; compiles once.

  Attributes:
    compiled: of `lowered`; None to compile at the first call.

  Args:
    model: its `features` and `loss`.
    split: examples (numpy) and sizes of the text they cover.
    batch_size: examples per batch.
    max_length: T.
    fill: the id that pads.
    placement: data.placement.
    mesh: that the parameters lie on; None for one device.
  """

  def __init__(
    self,
    model: LanguageModel,
    split: Split,
    batch_size: int,
    max_length: int,
    fill: int,
    placement: str,
    mesh: Mesh | None = None,
  ):
    self._split, self._batch_size = split, batch_size
    self._placed = Placed(split.examples, placement, batch_size, max_length, fill, mesh)
    where = None if mesh is None else sharding.replicated(mesh)
    self._evaluate = make_evaluation(model, _BATCHES_PER_DISPATCH, max_length, fill, where)
    self.compiled: jax.stages.Compiled | None = None

  def lowered(self, params: Params) -> jax.stages.Lowered:
    """The computation for parameters of these shapes; compiled, it can be given to `compiled`."""
    feed, n = next(self._feeds())
    return self._evaluate.lower(params, feed, as_count(n))

  def _feeds(self) -> Iterator[tuple[Feed, int]]:
    return evaluation_feeds(self._placed, self._batch_size, _BATCHES_PER_DISPATCH)

  def __call__(self, params: Params) -> Score:
    """Scores every token of the split once; totals in float64."""
    evaluate = self.compiled or self._evaluate
    pending = [evaluate(params, feed, as_count(n)) for feed, n in self._feeds()]
    total = math.fsum(float(x) for losses in pending for x in np.asarray(losses, np.float64))
    return score(total, self._split.tokens, self._split.words, self._split.bytes)
