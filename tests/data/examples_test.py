"""Windows over a stream and the batches gathered from them, on the host and on the device."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.data import examples as ex
from hgnn_moe_jax.errors import ConfigError

FILL = 99


def gather_all(examples: ex.Examples, max_length: int) -> ex.Batch:
  indices = np.arange(examples.num_examples, dtype=np.int32)
  return ex.gather(examples, indices, max_length, FILL)


def naive_gather(examples, indices, max_length, fill):
  """One example after another, as the docstring of Examples says."""
  inputs, targets, weights = [], [], []
  for index in indices:
    start, length, skip = (
      (0, 0, 0)
      if index < 0
      else (int(a[index]) for a in (examples.start_X, examples.length_X, examples.skip_X))
    )
    stream, padding = examples.tokens.tolist(), max_length - length
    inputs.append(stream[start : start + length] + [fill] * padding)
    targets.append(stream[start + 1 : start + length + 1] + [fill] * padding)
    weights.append([0.0] * skip + [1.0] * (length - skip) + [0.0] * padding)
  return ex.Batch(inputs, targets, weights)


def test_packed_golden():
  # Six targets after the context token 7; T = 4.
  batch = gather_all(ex.stream_examples(np.asarray([7, 1, 2, 0, 4, 5, 6], np.uint16), 4), 4)
  assert batch.inputs_BT.tolist() == [[7, 1, 2, 0], [4, 5, FILL, FILL]]
  assert batch.targets_BT.tolist() == [[1, 2, 0, 4], [5, 6, FILL, FILL]]
  # The target with id 0 is a token like any other.
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
  assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32]


def test_sliding_golden():
  batch = gather_all(ex.stream_examples(np.arange(8, dtype=np.uint16), 4, stride=2), 4)
  assert batch.inputs_BT.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, FILL]]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]


def test_lines_golden():
  sizes = np.asarray([3, 1, 0, 2], np.int32)
  examples = ex.line_examples(np.asarray([1, 2, 3, 4, 0, 6], np.uint16), sizes)
  batch = gather_all(examples, 4)
  assert batch.inputs_BT[0].tolist() == [1, 2, FILL, FILL]
  assert batch.targets_BT[0].tolist() == [2, 3, FILL, FILL]
  assert batch.inputs_BT[3].tolist() == [0, FILL, FILL, FILL]
  assert batch.targets_BT[3].tolist() == [6, FILL, FILL, FILL]
  assert batch.weights_BT.sum(axis=1).tolist() == [2, 0, 0, 1]


WINDOWS = st.integers(1, 9).flatmap(
  lambda length: st.tuples(st.integers(0, 60), st.just(length), st.integers(0, length))
)


@settings(max_examples=300, deadline=None)
@given(WINDOWS)
def test_every_target_is_scored_once_with_its_context(case):
  num_targets, max_length, stride = case
  # A token is its own position, so targets tell where they come from.
  examples = ex.stream_examples(np.arange(num_targets + 1, dtype=np.int32), max_length, stride)
  batch = gather_all(examples, max_length)
  scored = collections.Counter(batch.targets_BT[batch.weights_BT > 0].tolist())
  assert scored == dict.fromkeys(range(1, num_targets + 1), 1)
  assert batch.weights_BT.sum() == num_targets
  assert ex.scored_targets(examples).tolist() == list(range(1, num_targets + 1))
  for inputs, targets, weights in zip(*map(np.ndarray.tolist, batch), strict=True):
    assert any(weights)  # No window is for nothing.
    for target, weight in zip(targets, weights, strict=True):
      if weight:
        context = target - inputs[0]
        assert context >= min(target, max_length - (stride or max_length) + 1)


@settings(max_examples=100, deadline=None)
@given(
  case=WINDOWS.filter(lambda c: c[0] > 0),
  picks=st.lists(st.integers(-1, 200), min_size=1, max_size=8),
  dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_gather_equals_the_naive_twin(case, picks, dtype):
  num_targets, max_length, stride = case
  tokens = np.random.default_rng(0).integers(0, 50, num_targets + 1).astype(dtype)
  examples = ex.stream_examples(tokens, max_length, stride)
  indices = np.asarray([p if p < 0 else p % examples.num_examples for p in picks], np.int32)
  batch = ex.gather(examples, indices, max_length, FILL)
  expected = naive_gather(examples, indices, max_length, FILL)
  for array, wanted in zip(batch, expected, strict=True):
    assert array.tolist() == wanted


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("stride", [0, 3])
def test_host_and_device_give_the_same_batch(dtype, stride):
  tokens = np.random.default_rng(1).integers(0, 50_000, 100).astype(dtype)
  host, on_device = ex.place(ex.stream_examples(tokens, 8, stride), "host")
  assert not on_device and isinstance(host.tokens, np.ndarray)
  device, on_device = ex.place(host, "device")
  assert on_device and isinstance(device.tokens, jax.Array)
  indices = np.asarray([0, 5, -1, host.num_examples - 1], np.int32)
  expected = ex.gather(host, indices, 8, FILL)
  jitted = jax.jit(ex.gather, static_argnums=(2, 3))
  for batch in (
    ex.gather(device, indices, 8, FILL),
    jitted(device, jnp.asarray(indices), 8, FILL),
  ):
    for array, wanted in zip(batch, expected, strict=True):
      assert isinstance(array, jax.Array) and array.dtype == wanted.dtype
      np.testing.assert_array_equal(array, wanted)


def test_automatic_placement_by_size():
  small = ex.stream_examples(np.zeros(10, np.uint16), 4)
  # 2**26 tokens are exactly 256 MiB as int32; broadcasting gives the size without the memory.
  largest = small._replace(tokens=np.broadcast_to(np.uint16(0), 2**26))
  too_large = small._replace(tokens=np.broadcast_to(np.uint16(0), 2**26 + 1))
  assert ex.place(small, "auto")[1]
  assert ex.place(largest, "auto")[1]
  assert not ex.place(too_large, "auto")[1]
  with pytest.raises(ConfigError, match=r"data\.placement='gpu': use one of auto, device, host"):
    ex.place(small, "gpu")
