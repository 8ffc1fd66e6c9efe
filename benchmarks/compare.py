"""Two result files of one benchmark side by side: after / before, measurement by measurement.

python -m benchmarks.compare BEFORE.json AFTER.json

Times of two runs differ by what else the machines did; utilization divides that out.
"""

import json
import pathlib
from typing import Any

from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError

# Quantities of which more is better, of which less is, and what tells measurements apart.
_MORE = ("tokens_per_second", "utilization", "matmul_flops_per_second")
_LESS = ("seconds_per_step", "peak_memory_bytes", "compile_seconds", "first_token_seconds")
_NAMES = (
  *("shape", "coupler", "sweep", "batch", "length", "prompt_tokens", "tokens", "placement"),
  *("devices", "mesh"),
)


def read(path: str) -> list[dict[str, Any]]:
  """Raises UserError if there are no measurements."""
  try:
    return json.loads(pathlib.Path(path).read_text())["measurements"]
  except (OSError, ValueError, KeyError, TypeError):
    raise UserError(f"{path}: no measurements there; give a file that --out has written") from None


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """For each measurement in both: its name, and {quantity: after / before}, if there is any.

  Raises UserError if a file has two measurements of one name.
  """
  earlier, later = _by_name(before), _by_name(after)
  rows = []
  for name in later:
    old, new = earlier.get(name, {}), later[name]
    shared = [q for q in (*_MORE, *_LESS) if old.get(q) and new.get(q)]
    if shared:
      rows.append({"name": name, "ratios": {q: new[q] / old[q] for q in shared}})
  return rows


def _by_name(measurements: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  named = {}
  for m in measurements:
    name = " ".join(str(m[n]) for n in _NAMES if m.get(n) not in (None, ""))
    if name in named:
      raise UserError(f"{name}: there twice; give files that --out has written in one go")
    named[name] = m
  return named


def table(rows: list[dict[str, Any]]) -> str:
  quantities = [q for q in (*_MORE, *_LESS) if any(q in row["ratios"] for row in rows)]
  lines = [
    f"| after / before | {' | '.join(quantities)} |",
    "|---" * (1 + len(quantities)) + "|",
  ]
  for row in rows:
    cells = [f"{row['ratios'][q]:.3f}" if q in row["ratios"] else "" for q in quantities]
    lines.append(f"| {row['name']} | {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  """The command."""

  def run(argv: list[str]) -> None:
    if len(argv) != 3:
      raise UserError(f"{' '.join(argv[1:]) or 'nothing'}: give two files, BEFORE and AFTER")
    rows = compare(read(argv[1]), read(argv[2]))
    if not rows:
      raise UserError(
        f"{argv[1]} {argv[2]}: no measurement is in both; give files of one benchmark"
      )
    print(table(rows))

  cli.start(run)


if __name__ == "__main__":
  main()
