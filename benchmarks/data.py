"""How fast batches come: gathered ahead on the host from a mapped file, or on the device.

python -m benchmarks.data --tokens=50000000 --batch=32 --length=128 --out=FILE

Input starves a step where it delivers fewer tokens per second than the step consumes.
"""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import output
from hgnn_moe_jax import cli
from hgnn_moe_jax.data.examples import gather, place, stream_examples
from hgnn_moe_jax.data.pipeline import Order, host_batches

_SECONDS = 2.0  # for each measurement


def measure(folder: pathlib.Path, tokens: int, batch: int, length: int) -> list[dict[str, Any]]:
  """Tokens per second of both ways, over the same shuffled examples."""
  path = folder / "tokens.npy"
  np.save(path, np.random.default_rng(0).integers(0, 50257, tokens + 1).astype(np.uint16))
  # As a corpus is opened, see `data.corpus`.
  examples = stream_examples(np.asarray(np.load(path, mmap_mode="r")), length)
  order = Order(examples.num_examples, 0, batch)
  batches = host_batches(examples, order, length, 0, 0)
  next(batches)
  host = _rate(lambda step: next(batches), batch * length)
  batches.close()
  placed, _ = place(examples, "device")
  on_device = jax.jit(lambda e, i: gather(e, i, length, 0))
  jax.block_until_ready(on_device(placed, order.indices(0)))
  device = _rate(
    lambda step: jax.block_until_ready(on_device(placed, order.indices(step))), batch * length
  )
  given = {"tokens": tokens, "batch": batch, "length": length}
  return [
    {**given, "placement": "host", "tokens_per_second": host},
    {**given, "placement": "device", "tokens_per_second": device},
  ]


def _rate(take: Any, size: int) -> float:
  started, steps = time.perf_counter(), 0
  while time.perf_counter() - started < _SECONDS:
    take(steps)
    steps += 1
  return steps * size / (time.perf_counter() - started)


def table(results: list[dict[str, Any]]) -> str:
  lines = ["| tokens | batch | placement | million tokens/s |", "|---|---|---|---|"]
  for r in results:
    lines.append(
      f"| {r['tokens']:,} | {r['batch']} x {r['length']} | {r['placement']} "
      f"| {r['tokens_per_second'] / 1e6:.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command."""
  tokens = flags.DEFINE_integer("tokens", 50_000_000, "In the file.", 1)
  batch = flags.DEFINE_integer("batch", 32, "Examples per batch.", 1)
  length = flags.DEFINE_integer("length", 128, "Tokens per example.", 1)
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    with tempfile.TemporaryDirectory() as folder:
      results = measure(pathlib.Path(folder), tokens.value, batch.value, length.value)
    print(table(results))
    if out.value:
      output.write(out.value, {"measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
