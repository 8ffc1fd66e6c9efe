"""Random permutations of [0, n) of which any part can be had without the rest.

Four rounds of the block cipher Simon (Beaulieu et al. 2013, eprint.iacr.org/2013/404) permute the
numbers of so many bits; what is n or more is encrypted again until it is less (a cycle-walking
cipher: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The round keys are those
that C++'s `std::seed_seq` makes of one seed.

These are the permutations of grain's `shuffle`, found for many numbers at once: one by one they
took longer than everything else about a batch. Where n - 1 is a power of four from 4^8 on, grain's
are none (0 and n - 1 go to the same place), and these differ.
"""

import functools

import numpy as np

_PAGE = 2**16  # Numbers found at once: some milliseconds.
_LEAST_HALF = 8  # Bits of half a block: Simon's rotations want as many.
_ROUNDS = 4


def draws(first: int, count: int, size: int, seed: int) -> np.ndarray:
  """int32 [count]: draws `first`, `first + 1`, ... of a new permutation of [0, size) per epoch.

  Args:
    first: from 0, over all epochs.
    count: at least 1.
    size: in [1, 2**31).
    seed: in [0, 2**32) of epoch 0; that of epoch e is seed + e, modulo 2**32.
  """
  parts = []
  while count:
    epoch, place = divmod(first, size)
    page, offset = divmod(place, _PAGE)
    part = _page(size, (seed + epoch) % 2**32, page)[offset : offset + count]
    parts.append(part)
    first, count = first + part.size, count - part.size
  return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _page(size: int, seed: int, page: int) -> np.ndarray:
  """Where the permutation puts the `page`-th so many numbers."""
  half = max(_LEAST_HALF, -(-(size - 1).bit_length() // 2))
  keys = _round_keys(seed)
  if size <= _PAGE:
    # A walk may be long, up to the whole block's. All of its numbers' walks become twice as long
    # in each turn, and stop where they have arrived.
    block = np.arange(2 ** (2 * half), dtype=np.uint32)
    next_stop = _encrypt(block, keys, half)
    last_stop = np.where(block < size, block, next_stop)
    for _ in range(2 * half):
      last_stop = last_stop[last_stop]
    return last_stop[next_stop[:size]].astype(np.int32)
  number = np.arange(page * _PAGE, min(size, (page + 1) * _PAGE), dtype=np.uint32)
  number = _encrypt(number, keys, half)
  while (beyond := np.flatnonzero(number >= size)).size:
    number[beyond] = _encrypt(number[beyond], keys, half)
  return number.astype(np.int32)


def _encrypt(number: np.ndarray, keys: list[int], half: int) -> np.ndarray:
  """Simon's rounds on uint32 numbers of 2 `half` bits."""
  mask = np.uint32(2**half - 1)

  def rotated(word: np.ndarray, by: int) -> np.ndarray:
    return word << by | word >> (half - by)

  left, right = number >> half, number & mask
  for key in keys:
    mixed = (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2)
    left, right = right, left ^ ((mixed ^ np.uint32(key)) & mask)
  return left << half | right


def _round_keys(seed: int) -> list[int]:
  """`std::seed_seq{seed}.generate` of four words (ISO C++ 2011, 26.5.7.1)."""
  words = [0x8B8B8B8B] * _ROUNDS
  middle, end = 1, 2  # p and q of the standard, for four words

  def hashed(number: int, factor: int) -> int:
    number %= 2**32
    return factor * (number ^ number >> 27) % 2**32

  def at(k: int) -> int:
    return k % _ROUNDS

  for k, given in enumerate((1, seed, 0, 0)):  # how many seeds, and which
    first = hashed(words[k] ^ words[at(k + middle)] ^ words[at(k - 1)], 1664525)
    second = first + k + given
    words[at(k + middle)] = (words[at(k + middle)] + first) % 2**32
    words[at(k + end)] = (words[at(k + end)] + second) % 2**32
    words[k] = second % 2**32
  for k in range(_ROUNDS, 2 * _ROUNDS):
    first = hashed(words[at(k)] + words[at(k + middle)] + words[at(k - 1)], 1566083941)
    second = (first - at(k)) % 2**32
    words[at(k + middle)] ^= first
    words[at(k + end)] ^= second
    words[at(k)] = second
  return words
