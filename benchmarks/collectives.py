"""What a compiled program communicates, read off its HLO text.

The CPU backend multiplies float32 only: what it turns into float32 it also sends as float32, and it
knows no reduce-scatter. With the text of the program as it was right behind the partitioner,
collectives are counted as a GPU would see them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
  rf"= (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\((?P<operands>.*?)\)"
  r"(?P<rest>.*)$"
)
_LOOP = re.compile(r" while\(.*body=%?(?P<body>[\w.\-]+)(?P<rest>.*)$")
_CALL = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
  """One array of one instruction, as often as a call of the program runs it.

  Attributes:
    kind: e.g. "all-reduce".
    devices: in each group that communicates.
    span: from the lowest to the highest number of a group's devices; `devices` if they are
      neighbours.
    bytes: of the result on one device.
    times: in one call.
  """

  kind: str
  devices: int
  span: int
  bytes: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes that each device sends in one call, by ring algorithms (Patarasuk and Yuan 2009)."""
    n = self.devices
    factor = {
      "all-reduce": 2 * (n - 1) / n,
      "all-gather": (n - 1) / n,
      "reduce-scatter": n - 1,  # the result is 1/n of what is reduced
      "all-to-all": (n - 1) / n,
      "collective-permute": 1,
    }[self.kind]
    return factor * self.bytes * self.times


class _Asked(NamedTuple):
  """How the partitioner wrote an array that is sent: its type, and for a sum whether each device
  only takes its own part of it, of which XLA has a pass for GPUs that makes a reduce-scatter."""

  dtype: str
  scattered: bool


def collectives(
  hlo: str, num_devices: int, partitioned: str = "", turns: int | None = None
) -> list[Collective]:
  """All collectives of a program.

  Args:
    hlo: `compiled.as_text()`.
    num_devices: of the program; the size of a group that names none.
    partitioned: the program's text behind the partitioner. An array that it sends by the same
      kind of collective, with the same number of entries, says how it is counted; where several of
      these differ, or none is left, it is counted as the compiled program sends it.
    turns: of a loop that runs as often as the program's arguments say.

  Raises:
    ValueError: a loop that communicates runs an unknown number of times and `turns` is None, or
      groups of devices are written in an unknown way.
  """
  computations = _computations(hlo)
  entry = next(name for name in computations if name.startswith("ENTRY "))
  return list(_of(computations, entry, num_devices, _asked(partitioned), 1, turns))


def _asked(partitioned: str) -> dict[tuple[str, int], _Asked]:
  """(kind, entries) -> how all arrays of this size are written, where they agree."""
  ways: dict[tuple[str, int], set[_Asked]] = {}
  for lines in _computations(partitioned).values():
    for line in lines:
      if found := _INSTRUCTION.search(line):
        name = line.split("=")[0].replace("ROOT", "").strip()
        users = [user for user in lines if re.search(rf"[( ]{re.escape(name)}[,)]", user)]
        scattered = len(users) == 1 and " dynamic-slice(" in users[0]
        for dtype, entries in _arrays(found["kind"], _result(found)):
          ways.setdefault((found["kind"], entries), set()).add(_Asked(dtype, scattered))
  return {key: way.pop() for key, way in ways.items() if len(way) == 1}


def _computations(hlo: str) -> dict[str, list[str]]:
  """Name -> lines. The entry's name begins with "ENTRY "."""
  found: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in hlo.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head:
      lines = found.setdefault((head[1] or "") + head[2], [])
    else:
      lines.append(line)
  return found


def _of(
  computations: dict[str, list[str]],
  name: str,
  num_devices: int,
  asked: dict[tuple[str, int], _Asked],
  times: int | None,
  turns: int | None,
) -> Iterator[Collective]:
  for line in computations.get(name, []):
    if found := _INSTRUCTION.search(line):
      if times is None:
        raise ValueError(f"a loop of unknown length communicates: {line.strip()[:80]}")
      group = _group(found["rest"], num_devices)
      if len(group) > 1:
        span = max(group) - min(group) + 1
        for dtype, entries in _arrays(found["kind"], _result(found)):
          way = asked.get((found["kind"], entries), _Asked(dtype, scattered=False))
          kind, size = found["kind"], _BYTES[way.dtype] * entries
          if kind == "all-reduce" and way.scattered:
            kind, size = "reduce-scatter", size // len(group)
          yield Collective(kind, len(group), span, size, times)
    elif found := _LOOP.search(line):
      trips = _TRIPS.search(found["rest"])
      own = int(trips[1]) if trips else turns
      inner = None if times is None or own is None else times * own
      yield from _of(computations, found["body"], num_devices, asked, inner, turns)
    else:
      called = _CALL.findall(line)
      for branches in _BRANCHES.findall(line):
        called += [b.strip().lstrip("%") for b in branches.split(",")]
      for callee in called:
        yield from _of(computations, callee, num_devices, asked, times, turns)


def _result(found: re.Match[str]) -> str:
  """The shape of what a collective gives. Where one only starts, its operands' comes before it."""
  shape = found["shape"]
  if not found["start"] or found["kind"] == "all-reduce":
    return shape
  depth, parts = 0, [""]
  for character in shape[1:-1]:  # of (operands, results) and, sometimes, more
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return parts[1]


def _arrays(kind: str, shape: str) -> list[tuple[str, int]]:
  """(type, entries) of each array; one for an all-to-all, which may be written as its pieces."""
  arrays = [
    (dtype, math.prod(int(n) for n in dims.split(",") if n))
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    if dtype in _BYTES
  ]
  if kind == "all-to-all" and len({dtype for dtype, _ in arrays}) == 1:
    return [(arrays[0][0], sum(entries for _, entries in arrays))]
  return arrays


_RANGE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # device numbers: reshaped, transposed
_GROUPS_OF_A_RANGE = re.compile(rf"replica_groups=\[(\d+),(\d+)\]<={_RANGE}")
_GROUPS_OF_A_MESH = re.compile(
  rf"replica_groups=mesh\[([^]]*)\](?:, device_ids=\({_RANGE}\))? \{{([^}}]*)\}}"
)
_AXIS_OF_A_MESH = re.compile(r"('\w+')(?::\((\d+)\)(\d+))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")


def _numbers(listed: str) -> list[int]:
  return [int(n) for n in listed.split(",")]


def _devices(dims: str, order: str | None) -> np.ndarray:
  shape = _numbers(dims)
  devices = np.arange(math.prod(shape)).reshape(shape)
  return devices.transpose(_numbers(order)) if order else devices


def _group(rest: str, num_devices: int) -> list[int]:
  """The devices of the first group, in any of the ways in which XLA writes them down; of pairs,
  those that lie furthest apart.

  Listed; as a reshaped and transposed range, cut into groups; or as a mesh of such a range and the
  names of those of its axes, or of factors of them, along which a group lies.
  """
  if found := _PAIRS.search(rest):
    pairs = [_numbers(pair) for pair in re.findall(r"\d+,\d+", found[1])]
    return max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
  if found := _LISTED_GROUPS.search(rest):
    return _numbers(found[1])
  if found := _GROUPS_OF_A_RANGE.search(rest):
    return _devices(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist()
  if found := _GROUPS_OF_A_MESH.search(rest):
    axes, dims, order, along = found.groups()
    sizes = {name: int(n) for name, n in re.findall(r"('\w+')=(\d+)", axes)}
    named = [_AXIS_OF_A_MESH.fullmatch(axis) for axis in along.split(",")]
    # An axis, or a factor of its size: of 'a'=8, 'a':(2)4 is the last one of 2 x 4.
    parts = {m[1]: (int(m[2] or 1), int(m[3] or sizes.get(m[1], 0))) for m in named if m}
    if parts.keys() <= sizes.keys() and len(parts) == len(named):
      factors = []
      for name, n in sizes.items():
        before, part = parts.get(name, (1, 1))
        factors += [before, part, n // (before * part)]
      devices = _devices(dims or str(math.prod(sizes.values())), order).reshape(factors)
      return devices[(0, slice(None), 0) * len(sizes)].ravel().tolist()
  if "replica_groups={}" in rest or "replica_groups" not in rest:
    return list(range(num_devices))
  raise ValueError(f"groups of devices that are not understood: {rest.strip()[:120]}")
