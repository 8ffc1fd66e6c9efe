"""Examples as windows of one flat token stream, and batches gathered from them.

`gather` is the only way from examples to a batch. It runs on numpy arrays and on (traced) JAX
arrays alike, so where the tokens lie cannot change what is trained on.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hgnn_moe_jax import sharding
from hgnn_moe_jax.errors import ConfigError

# numpy or JAX: `gather` takes either.
Array = Any

_ON_DEVICE_BYTES = 256 * 2**20


class Examples(NamedTuple):
  """Example k reads tokens[start:start+length] and predicts tokens[start+1:start+length+1].

  Attributes:
    tokens: [stream], uint16 or int32.
    start_X: int32 [examples].
    length_X: int32 [examples], in tokens.
    skip_X: int32 [examples]; so many first predictions are context only and carry no weight.
  """

  tokens: Array
  start_X: Array
  length_X: Array
  skip_X: Array

  @property
  def num_examples(self) -> int:
    return self.start_X.shape[0]


class Batch(NamedTuple):
  """What a training or evaluation step consumes.

  Attributes:
    inputs_BT: int32.
    targets_BT: int32, the token after each input.
    weights_BT: float32, 1 where a target counts and 0 where not. Padding is told by weight alone,
      never by an id: every id, 0 included, is a real token.
  """

  inputs_BT: Array
  targets_BT: Array
  weights_BT: Array


def gather(examples: Examples, indices_B: Array, max_length: int, fill: int) -> Batch:
  """The batch of the examples at `indices_B`, padded to T = `max_length`.

  Args:
    examples: numpy or JAX arrays; lengths are at most `max_length`.
    indices_B: int32; -1 gives an empty row.
    max_length: T, in tokens.
    fill: the id at padded positions.
  """
  xp = examples.tokens.__array_namespace__()
  row_B = xp.maximum(indices_B, 0)
  length_B = xp.where(indices_B >= 0, examples.length_X[row_B], 0)
  offset_1S = xp.arange(max_length + 1, dtype=np.int32)[None, :]  # S = T + 1
  position_BS = examples.start_X[row_B][:, None] + offset_1S
  last = examples.tokens.shape[0] - 1  # Padded positions may lie beyond the stream.
  window_BS = examples.tokens[xp.minimum(position_BS, last)].astype(np.int32)
  inside_BT = offset_1S[:, :-1] < length_B[:, None]
  scored_BT = inside_BT & (offset_1S[:, :-1] >= examples.skip_X[row_B][:, None])
  return Batch(
    inputs_BT=xp.where(inside_BT, window_BS[:, :-1], fill),
    targets_BT=xp.where(inside_BT, window_BS[:, 1:], fill),
    weights_BT=scored_BT.astype(np.float32),
  )


def stream_examples(tokens: np.ndarray, max_length: int, stride: int = 0) -> Examples:
  """Windows over a stream: every token but the first is predicted exactly once.

  Args:
    tokens: [n + 1]; the first is context only.
    max_length: T.
    stride: 0 or T: windows side by side, the last one shorter. Else the first window scores all
      its tokens and each later one moves on by `stride` and scores only its last `stride` tokens,
      so that these have at least T - stride tokens of context.
  """
  num_targets, stride = tokens.shape[0] - 1, stride or max_length
  num_examples = 1 + max(0, -(-(num_targets - max_length) // stride)) if num_targets else 0
  start_X = np.arange(num_examples, dtype=np.int32) * np.int32(stride)
  skip_X = np.full(num_examples, max_length - stride, np.int32)
  skip_X[:1] = 0
  length_X = np.minimum(max_length, num_targets - start_X).astype(np.int32)
  return Examples(tokens, start_X, length_X, skip_X)


def line_examples(tokens: np.ndarray, size_X: np.ndarray) -> Examples:
  """One example for each line of `size_X` tokens; a line's first token is not predicted.

  Args:
    tokens: the lines' tokens, end to end.
    size_X: [examples] tokens of each line; they sum to the length of `tokens`.
  """
  start_X = np.cumsum(size_X, dtype=np.int64) - size_X
  length_X = np.maximum(size_X - 1, 0)
  return Examples(
    tokens, start_X.astype(np.int32), length_X.astype(np.int32), np.zeros(size_X.shape[0], np.int32)
  )


def scored_targets(examples: Examples) -> np.ndarray:
  """[scored] ids of all targets with weight 1, example by example (numpy only)."""
  scored_X = examples.length_X - examples.skip_X
  first_X = examples.start_X + examples.skip_X + 1
  before_X = np.cumsum(scored_X, dtype=np.int64) - scored_X
  positions = np.arange(scored_X.sum()) + np.repeat(first_X - before_X, scored_X)
  return examples.tokens[positions]


def place(examples: Examples, placement: str, mesh: Mesh | None = None) -> tuple[Examples, bool]:
  """Examples on the device or left on the host, and whether they are on the device.

  Args:
    examples: numpy arrays.
    placement: device, host, or auto: on the device if the tokens would take at most 256 MiB as
      int32.
    mesh: every device of it has all of them; None for one device.
  """
  if placement not in ("auto", "device", "host"):
    raise ConfigError("data.placement", placement, "use one of auto, device, host")
  fits = examples.tokens.size * np.dtype(np.int32).itemsize <= _ON_DEVICE_BYTES
  if placement == "host" or (placement == "auto" and not fits):
    return examples, False
  if mesh is None:
    return jax.device_put(examples), True
  where = sharding.replicated(mesh)
  return jax.tree.map(lambda array: sharding.put(array, where), examples), True
