"""Permutations found many at once are grain's, one by one."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.data import permutation

SEEDS = st.integers(0, 2**32 - 1)


def grains(first: int, count: int, size: int, seed: int) -> list[int]:
  shuffled = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
  return [shuffled[first + i] for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(
  # Blocks of 16 bits, walked through by a table, and of 18 to 32, encrypted again and again.
  size=st.one_of(st.integers(20, 2**16), st.integers(2**16 + 2, 2**31 - 1)),
  first=st.integers(0, 2**40),
  seed=SEEDS,
)
def test_draws_are_grain_s(size, first, seed):
  drawn = permutation.draws(first, 20, size, seed)
  assert drawn.dtype == np.int32
  assert drawn.tolist() == grains(first, 20, size, seed)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 255, 256, 257, 2**16 - 1, 2**16, 2**18, 2**20])
@pytest.mark.parametrize("seed", [0, 2**32 - 2])  # The latter's third epoch has the seed 0.
def test_draws_are_grain_s_where_sizes_border_on_blocks(size, seed):
  for first in (0, size - 1, 3 * size):
    assert permutation.draws(first, 4, size, seed).tolist() == grains(first, 4, size, seed)


# 4^8 + 1 and 4^9 + 1: grain leaves out the last number and puts another in twice.
@pytest.mark.parametrize("size", [1, 7, 1000, 2**16 - 1, 2**16, 2**16 + 1, 150_000, 2**18 + 1])
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_every_number_is_drawn_once_in_an_epoch(size, seed):
  drawn = permutation.draws(size, size, size, seed)
  np.testing.assert_array_equal(np.sort(drawn), np.arange(size))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, before=st.integers(1, 50), size=st.sampled_from([70_000, 30, 2**16]))
def test_draws_go_on_across_pages_and_epochs(seed, before, size):
  border = min(size, 2**16)
  whole = permutation.draws(border - before, 100, size, seed)
  for start in (0, 1, before, 60):
    part = permutation.draws(border - before + start, 40, size, seed)
    np.testing.assert_array_equal(part, whole[start : start + 40])
  assert whole.tolist() == grains(border - before, 100, size, seed)


@pytest.mark.parametrize("size", [2**16 + 1, 2**18 + 1])
def test_the_last_number_moves_too(size):
  places = {int(permutation.draws(size - 1, 1, size, seed)[0]) for seed in range(4)}
  assert len(places) > 1


def test_what_is_drawn_belongs_to_who_drew_it():
  permutation.draws(0, 8, 1000, 3)[:] = -1
  assert permutation.draws(0, 8, 1000, 3).min() >= 0


def test_golden():
  # Keys by `std::seed_seq` of g++ 12, draws by grain 0.2.18.
  assert permutation._round_keys(52) == [1895487551, 3349865443, 1554175829, 2081067963]
  assert permutation.draws(0, 5, 1_000_000, 0).tolist() == [645888, 526917, 784672, 665685, 965313]
