"""How cost grows with experts, row length and layers: exponents, and a figure of the times.

python -m benchmarks.growth benchmarks/results/sweeps_cpu.json
python -m benchmarks.growth SWEEPS.json --within=num_experts=8:64 --figure=growth.png

Reads what `benchmarks.train_step --sweep=FIELD=VALUES` has written, one field changed in each
measurement. The exponent of a quantity is the slope of its logarithm over that of the field, by
least squares: 1 where twice as many cost twice as much. *Operations* are those of the model's
products.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks.compare import read
from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError

# Heading -> a measurement's entry.
QUANTITIES = {
  "time": "seconds_per_step",
  "operations": "matmul_flops",
  "memory": "peak_memory_bytes",
  "compilation": "compile_seconds",
}
_LABELS = {"num_experts": "experts", "max_length": "tokens in a row", "num_layers": "layers"}


class Curve(NamedTuple):
  """The measurements of one shape and coupler along one field, by its values, ascending."""

  shape: str
  coupler: str
  field: str
  points: dict[int, dict[str, Any]]


class Range(NamedTuple):
  """A part of a field's values, both ends included."""

  field: str
  low: int
  high: int


def curves(measurements: Sequence[dict[str, Any]]) -> list[Curve]:
  """In the order in which they were measured.

  Raises:
    UserError: no measurement; one in which no field, several, or no whole number was changed; two
      of one name; or a field with one value.
  """
  found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
  for m in measurements:
    field, _, value = m.get("sweep", "").partition("=")
    if not value.isdecimal():
      raise UserError(
        f"sweep={m.get('sweep', '')!r}: give files of --sweep=FIELD=VALUES, one field"
      )
    points = found.setdefault((m["shape"], m["coupler"], field), {})
    if int(value) in points:
      raise UserError(f"{m['shape']} {m['coupler']} {m['sweep']}: there twice; give it once")
    points[int(value)] = m
  if not found:
    raise UserError("measurements=[]: nothing to fit; give files of --sweep=FIELD=VALUES")
  result = [Curve(*name, dict(sorted(points.items()))) for name, points in found.items()]
  for curve in result:
    if len(curve.points) < 2:
      raise UserError(f"{curve.field}: one value only; an exponent wants two or more")
  return result


def exponents(points: dict[int, dict[str, Any]]) -> dict[str, float | None]:
  """Of each of QUANTITIES; None of what was not measured.

  Args:
    points: value of the field -> measurement; two or more.
  """
  result: dict[str, float | None] = {}
  for heading, entry in QUANTITIES.items():
    values = [m[entry] for m in points.values()]
    known = all(value is not None for value in values)
    result[heading] = (
      float(np.polyfit(np.log(list(points)), np.log(values), 1)[0]) if known else None
    )
  return result


def table(found: Sequence[Curve], ranges: Sequence[Range] = ()) -> str:
  """A row for each curve, and for each part of it in `ranges`."""
  lines = [f"| coupler | field | range | {' | '.join(QUANTITIES)} |", "|---" * 7 + "|"]
  for curve in found:
    parts = [curve.points]
    for _, low, high in [r for r in ranges if r.field == curve.field]:
      parts.append({n: m for n, m in curve.points.items() if low <= n <= high})
    for number, points in enumerate(parts):
      if len(points) > 1 and points not in parts[:number]:
        slopes = exponents(points).values()
        told = " | ".join("-" if slope is None else f"{slope:z.2f}" for slope in slopes)
        span = f"{min(points):,} to {max(points):,}"
        lines.append(f"| {curve.coupler} | {curve.field} | {span} | {told} |")
  return "\n".join(lines)


def draw(files: dict[str, list[Curve]], path: pathlib.Path) -> None:
  """Milliseconds a step over each field, a row of panels for each file; PNG and SVG.

  Args:
    files: path of what was read -> its curves.
    path: of the PNG.

  Raises:
    UserError: matplotlib is not installed, or the folder cannot be written to.
  """
  from hgnn_moe_jax.analysis import style  # Only a figure needs matplotlib.

  fields = list(dict.fromkeys(curve.field for found in files.values() for curve in found))
  couplers = list(dict.fromkeys(curve.coupler for found in files.values() for curve in found))
  style.make_folder(path.parent)
  size = (4.5 * len(fields), 3.6 * len(files) + 0.6)
  with style.panels(len(files), len(fields), path, *size) as (figure, axes_RC):
    for row, (source, found) in zip(axes_RC, files.items(), strict=True):
      for axes, field in zip(row, fields, strict=True):
        mine = [curve for curve in found if curve.field == field]
        for curve in mine:
          look = {"color": style.colour(couplers.index(curve.coupler))}
          x = np.array(list(curve.points), float)
          ms = np.array([1000 * m["seconds_per_step"] for m in curve.points.values()])
          work = np.array([m["matmul_flops"] for m in curve.points.values()], float)
          axes.plot(x, ms, **look, marker="o", label=curve.coupler)
          axes.plot(x, ms[0] * work / work[0], **look, linestyle=":", alpha=0.8)
          if curve is mine[0]:
            axes.plot(x, ms[0] * x / x[0], color="0.6", linestyle="--", linewidth=1.0, zorder=0)
        if not mine:
          style.say(axes, "not measured")
          continue
        ticks = sorted({n for curve in mine for n in curve.points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel(_LABELS.get(field, field))
        style.log_axis(axes)
      row[0].set_ylabel(f"{found[0].shape}, {_device(source)}\nms a step")
    axes_RC[-1, -1].plot([], [], color="0.35", linestyle=":", label="as operations grow")
    axes_RC[-1, -1].plot([], [], color="0.6", linestyle="--", label="in proportion")
    style.legend(figure, axes_RC)


def _device(path: str) -> str:
  """What was measured, as the file names it: "NVIDIA H200", "CPU"."""
  kind = json.loads(pathlib.Path(path).read_text())["device"]["kind"]
  return kind.upper() if kind.islower() else kind


def parse_range(text: str) -> Range:
  """ "num_experts=8:64" as a Range. Raises UserError if it is none."""
  field, _, ends = text.partition("=")
  low, _, high = ends.partition(":")
  if not (field and low.isdecimal() and high.isdecimal() and int(low) < int(high)):
    raise UserError(f"--within={text}: give FIELD=LOW:HIGH, as in num_experts=8:64")
  return Range(field.removeprefix("model."), int(low), int(high))


def main() -> None:
  """The command."""
  within = flags.DEFINE_multi_string(
    "within", [], "FIELD=LOW:HIGH: exponents of this part besides. Repeatable."
  )
  figure = flags.DEFINE_string("figure", None, "PNG file for a figure; an SVG is put beside it.")

  def run(argv: list[str]) -> None:
    if len(argv) < 2:
      raise UserError("nothing: give one or more files that --out has written")
    ranges = [parse_range(text) for text in within.value]
    files = {}
    for path in argv[1:]:
      found = curves(read(path))
      print(table(found, ranges))
      files[path] = found
    if figure.value:
      draw(files, pathlib.Path(figure.value))

  cli.start(run)


if __name__ == "__main__":
  main()
