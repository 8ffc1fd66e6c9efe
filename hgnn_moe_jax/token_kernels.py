"""Kernels of `token_products` for NVIDIA GPUs, in Pallas: every expert's vector is read once.

A program holds the vectors of all experts for a few rows and makes all E^2 products of them. XLA
reads each vector E times instead, once for every partner.

Rows are tokens, or rows of weight matrices. G groups of experts are worked on independently.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_MOST_EXPERTS = 8  # Their vectors have to fit into the registers.
_ROWS = 4  # A row to a warp.
_COLUMNS = 1024  # over all experts
_LEAST_COLUMNS = 32


def _tile(shape: tuple[int, ...]) -> tuple[int, int]:
  """Rows and columns of a program; powers of two, which Triton asks for."""
  _, E, N, D = shape
  rows, columns = math.gcd(N, _ROWS), math.gcd(D, 256)
  while columns * E > _COLUMNS and columns > _LEAST_COLUMNS:
    columns //= 2
  return rows, columns


def fits(shape: tuple[int, ...]) -> bool:
  """Whether the kernels take vectors of this shape, [G, E, N, D]."""
  return shape[1] <= _MOST_EXPERTS and _tile(shape)[1] >= _LEAST_COLUMNS


def mix(
  operator_GEEN: jax.Array,
  h_GEND: jax.Array,
  centre_GED: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """sum_j P_ij (h_j - centre_j) of every row: [G, E, N, D] in h's dtype, summed in float32.

  Args:
    operator_GEEN: [G, E, E, N], receiver by sender.
    h_GEND: of a shape that `fits`.
    centre_GED: float32; None for 0.
    interpret: run on any device, slowly.
  """
  call = _call(_mix_kernel, h_GEND.shape, h_GEND.dtype, interpret, h_GEND.shape)
  return call(operator_GEEN, h_GEND, *_given(centre_GED))


def products(a_GEND: jax.Array, b_GEND: jax.Array, interpret: bool = False) -> jax.Array:
  """<a_i, b_j> of every row: [G, E, E, N] float32. Arguments as in `mix`."""
  return _call(_products_kernel, _pairs(a_GEND), jnp.float32, interpret, a_GEND.shape)(
    a_GEND, b_GEND
  )


def gram(
  a_GEND: jax.Array, centre_GED: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
  """<a_i - centre_i, a_j - centre_j> of every row: [G, E, E, N] float32. Arguments as in `mix`."""
  call = _call(_gram_kernel, _pairs(a_GEND), jnp.float32, interpret, a_GEND.shape)
  return call(a_GEND, *_given(centre_GED))


def _given(array: jax.Array | None) -> tuple[jax.Array, ...]:
  return () if array is None else (array,)


def _pairs(a_GEND: jax.Array) -> tuple[int, ...]:
  G, E, N, _ = a_GEND.shape
  return (G, E, E, N)


def _call(
  kernel: Callable[..., None],
  out_shape: tuple[int, ...],
  dtype: Any,
  interpret: bool,
  shape: tuple[int, ...],
) -> Callable[..., jax.Array]:
  G, _, N, D = shape
  rows, columns = _tile(shape)
  blocks = G * (N // rows) * (D // columns if kernel is _mix_kernel else 1)
  return pl.pallas_call(
    functools.partial(kernel, rows=rows, columns=columns),
    out_shape=jax.ShapeDtypeStruct(out_shape, dtype),
    grid=(blocks,),
    compiler_params=triton.CompilerParams(num_warps=rows, num_stages=2),
    interpret=interpret,
  )


def _load(ref: Any, centre_ref: Any, group: Any, rows: Any, columns: Any) -> list[jax.Array]:
  """The tile of every expert, float32."""
  tiles = [ref[group, e, rows, columns].astype(jnp.float32) for e in range(ref.shape[1])]
  if centre_ref is None:
    return tiles
  return [tile - centre_ref[group, e, columns][None, :] for e, tile in enumerate(tiles)]


def _centre_and_out(refs: tuple[Any, ...]) -> tuple[Any, Any]:
  """The last references of a kernel, the first of which may be missing."""
  return refs if len(refs) == 2 else (None, refs[0])


def _mix_kernel(operator_ref, h_ref, *refs, rows: int, columns: int) -> None:
  centre_ref, out_ref = _centre_and_out(refs)
  _, E, N, D = h_ref.shape
  block, column = pl.program_id(0) // (D // columns), pl.program_id(0) % (D // columns)
  group, row = block // (N // rows), pl.ds(block % (N // rows) * rows, rows)
  column = pl.ds(column * columns, columns)
  tiles = _load(h_ref, centre_ref, group, row, column)
  for i in range(E):
    mixed = jnp.zeros((rows, columns), jnp.float32)
    for j in range(E):
      mixed += operator_ref[group, i, j, row].astype(jnp.float32)[:, None] * tiles[j]
    out_ref[group, i, row, column] = mixed.astype(out_ref.dtype)


def _products_kernel(a_ref, b_ref, out_ref, *, rows: int, columns: int) -> None:
  E = a_ref.shape[1]

  def load(*place: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    return _load(a_ref, None, *place), _load(b_ref, None, *place)

  pairs = [(i, j) for i in range(E) for j in range(E)]
  _products_of_pairs(load, a_ref.shape, out_ref, pairs, rows, columns)


def _gram_kernel(a_ref, *refs, rows: int, columns: int) -> None:
  centre_ref, out_ref = _centre_and_out(refs)

  def load(*place: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    tiles = _load(a_ref, centre_ref, *place)
    return tiles, tiles

  pairs = [(i, j) for i in range(a_ref.shape[1]) for j in range(i + 1)]
  _products_of_pairs(load, a_ref.shape, out_ref, pairs, rows, columns)


def _products_of_pairs(
  load: Callable[[Any, Any, Any], tuple[list[jax.Array], list[jax.Array]]],
  shape: tuple[int, ...],
  out_ref: Any,
  pairs: list[tuple[int, int]],
  rows: int,
  columns: int,
) -> None:
  """Goes through the columns; a pair that is missing is the mirror of one that is there."""
  _, _, N, D = shape
  group = pl.program_id(0) // (N // rows)
  row = pl.ds(pl.program_id(0) % (N // rows) * rows, rows)

  def add(number, totals):
    a, b = load(group, row, pl.ds(number * columns, columns))
    return tuple(t + jnp.sum(a[i] * b[j], axis=1) for t, (i, j) in zip(totals, pairs, strict=True))

  zeros = tuple(jnp.zeros(rows, jnp.float32) for _ in pairs)
  totals = jax.lax.fori_loop(0, D // columns, add, zeros)
  for total, (i, j) in zip(totals, pairs, strict=True):
    out_ref[group, i, j, row] = total
    if (j, i) not in pairs:
      out_ref[group, j, i, row] = total
