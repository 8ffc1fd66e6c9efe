"""Exponents of sweeps: by hand, of parts, of what cannot be one; the figure and the command."""

import json

import pytest

from benchmarks import growth
from hgnn_moe_jax.errors import UserError


def measurement(sweep, seconds, coupler="graph", **more):
  """Operations grow as the value, memory as its root; nothing was compiled alone."""
  value = int(sweep.partition("=")[2])
  return {
    **{"shape": "sweep", "coupler": coupler, "sweep": sweep, "seconds_per_step": seconds},
    **{"matmul_flops": 10 * value, "peak_memory_bytes": 7.0 * value**0.5, "compile_seconds": None},
    **more,
  }


# Time as the square up to four experts, then as the number.
EXPERTS = [measurement(f"num_experts={n}", s) for n, s in ((8, 32.0), (2, 4.0), (4, 16.0))]
LAYERS = [measurement(f"num_layers={n}", 3.0, compile_seconds=2.0 * n) for n in (1, 16)]


def test_exponents_by_hand():
  experts, layers = growth.curves(EXPERTS + LAYERS)
  assert list(experts.points) == [2, 4, 8]
  slopes = growth.exponents(experts.points)
  # Of log2: (1, 2), (2, 4), (3, 5): the middle point does not turn a line through three.
  assert slopes == {
    "time": pytest.approx(1.5),
    "operations": pytest.approx(1.0),
    "memory": pytest.approx(0.5),
    "compilation": None,
  }
  assert growth.exponents(layers.points)["time"] == pytest.approx(0.0)
  assert growth.exponents(layers.points)["compilation"] == pytest.approx(1.0)


def test_a_table_with_parts():
  other = [measurement(f"num_experts={n}", 1.0 * n, coupler="hypergraph") for n in (2, 4)]
  found = growth.curves(EXPERTS + other + LAYERS)
  ranges = ["model.num_experts=3:9", "num_experts=1:9", "num_layers=2:16"]
  ranges = list(map(growth.parse_range, ranges))
  heading, _, *rows = growth.table(found, ranges).splitlines()
  assert heading == "| coupler | field | range | time | operations | memory | compilation |"
  assert rows == [
    "| graph | num_experts | 2 to 8 | 1.50 | 1.00 | 0.50 | - |",
    "| graph | num_experts | 4 to 8 | 1.00 | 1.00 | 0.50 | - |",
    # Of the hypergraph's two values only one lies within the first part, and all in the second.
    "| hypergraph | num_experts | 2 to 4 | 1.00 | 1.00 | 0.50 | - |",
    "| graph | num_layers | 1 to 16 | 0.00 | 1.00 | 0.50 | 1.00 |",
  ]


@pytest.mark.parametrize(
  ("measurements", "message"),
  [
    ([], r"measurements=\[\]: nothing to fit"),
    ([{**EXPERTS[0], "sweep": ""}], "sweep='': give files of --sweep=FIELD=VALUES"),
    ([{**EXPERTS[0], "sweep": "a=1,b=2"}], "sweep='a=1,b=2': give files"),
    ([{**EXPERTS[0], "sweep": "remat=True"}], "sweep='remat=True': give files"),
    ([*EXPERTS, EXPERTS[1]], "sweep graph num_experts=2: there twice"),
    ([*EXPERTS, LAYERS[0]], "num_layers: one value only"),
  ],
)
def test_what_has_no_exponent(measurements, message):
  with pytest.raises(UserError, match=message):
    growth.curves(measurements)


@pytest.mark.parametrize(
  "text", ["num_experts", "num_experts=8", "num_experts=8:4", "=2:4", "a=b:c"]
)
def test_a_part_that_is_none(text):
  with pytest.raises(UserError, match="give FIELD=LOW:HIGH"):
    growth.parse_range(text)


def test_the_command_draws(command, tmp_path):
  files = [tmp_path / "gpu.json", tmp_path / "cpu.json"]
  for file, measured, kind in zip(
    files, (EXPERTS + LAYERS, EXPERTS), ("NVIDIA H200", "cpu"), strict=True
  ):
    file.write_text(json.dumps({"device": {"kind": kind}, "measurements": measured}))
  figure = tmp_path / "new" / "growth.png"
  status, printed, said = command(
    growth.main, *map(str, files), f"--figure={figure}", "--within=num_experts=4:8"
  )
  assert status == 0, said
  assert printed.count("| graph | num_experts | 4 to 8 | 1.00 |") == 2
  drawn = figure.with_suffix(".svg").read_text()
  assert figure.read_bytes().startswith(b"\x89PNG")
  for words in ("sweep, NVIDIA H200", "sweep, CPU", "experts", "layers", "not measured"):
    assert f">{words}<" in drawn, words
  status, _, said = command(growth.main)
  assert status == 2 and said == "error: nothing: give one or more files that --out has written\n"
