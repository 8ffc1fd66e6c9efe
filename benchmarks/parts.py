"""Where the time of a training step goes, part by part, by JAX's profiler.

python -m benchmarks.parts --shape=small --coupler=graph --out=FILE

Every instruction of the compiled program knows the operation that it comes from; the time of each
is added to the part that the operation's name tells. A fused instruction counts whole for the part
of its root. Instructions that run side by side add up to more than the step.
"""

import collections
import glob
import re
import tempfile
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import output
from benchmarks.train_step import COUPLERS, EVERYWHERE, SHAPES, dispatch_of
from hgnn_moe_jax import cli
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.training.step import as_count

# The first pattern that is found in an operation's name says which part it belongs to.
PARTS = {
  "input": r"/input/",
  "attention": r"_attention",
  "FFN": r"_ffn",
  "experts' norms and sums": r"/experts",
  "coupler": r"/coupler",
  "orthogonality": r"orthogonality",
  "pooling": r"/pool",
  "head and loss": r"head",
  "optimizer": r"optimizer",
  "controller": r"control",
  "embedding and residual stream": r"Network",
}
_OTHER = "rest"


def part_of(operation: str) -> str:
  return next((p for p, pattern in PARTS.items() if re.search(pattern, operation)), _OTHER)


def operations(hlo: str) -> dict[str, str]:
  """Instruction -> operation, of every instruction in the text that is no loop or call."""
  found = {}
  for line in hlo.splitlines():
    name = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)
    operation = re.search(r'op_name="([^"]*)"', line)
    if name and name[2] not in ("while", "call", "conditional"):
      found[name[1]] = operation[1] if operation else ""
  return found


def measure(config: Config, vocab_size: int) -> dict[str, float]:
  """Milliseconds per step of each part, the largest first."""
  steps = config.training.steps_per_dispatch
  dispatch, state, feed = dispatch_of(config, vocab_size)
  # In a CUDA graph the profiler sees kernels without the names of their instructions.
  graphs = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}
  compiled = dispatch.lower(state, feed, as_count(1)).compile(compiler_options=graphs)
  state, _ = compiled(state, feed, as_count(steps))
  jax.block_until_ready(state)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(compiled(state, feed, as_count(steps)))
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    profile = jax.profiler.ProfileData.from_file(path)
  return by_part(profile, operations(str(compiled.as_text())), steps)


def by_part(profile: Any, names: dict[str, str], steps: int) -> dict[str, float]:
  """Milliseconds per step of each part, the largest first.

  Args:
    profile: a jax.profiler.ProfileData of so many steps.
    names: of `operations`.
    steps: that were taken.
  """
  total = collections.Counter[str]()
  # Beside a GPU's own plane the host's tells what was launched, under the same names.
  planes = [p for p in profile.planes if p.name.startswith("/device:")] or profile.planes
  for plane in planes:
    for line in plane.lines:
      for event in line.events:
        instruction = dict(event.stats).get("hlo_op", event.name)
        if instruction in names:
          total[part_of(names[instruction])] += event.duration_ns / 1e6 / steps
  return dict(total.most_common())


def table(result: dict[str, float]) -> str:
  whole = float(np.sum(list(result.values())))
  lines = ["| part | ms per step | share |", "|---|---|---|"]
  lines += [f"| {part} | {ms:.1f} | {ms / whole:.1%} |" for part, ms in result.items()]
  return "\n".join(lines)


def main() -> None:
  """The command."""
  shape = flags.DEFINE_enum("shape", "small", list(SHAPES), "Of the model.")
  coupler = flags.DEFINE_enum("coupler", "graph", list(COUPLERS), "The coupler.")
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    fields, vocab_size = SHAPES[shape.value]
    changes: dict[str, Any] = {**EVERYWHERE, **fields, **COUPLERS[coupler.value]}
    result = measure(with_fields(Config(name=shape.value), changes).validate(), vocab_size)
    print(table(result))
    if out.value:
      named = {"shape": shape.value, "coupler": coupler.value, "parts_milliseconds": result}
      output.write(out.value, {"measurements": [named]})

  cli.start(run)


if __name__ == "__main__":
  main()
