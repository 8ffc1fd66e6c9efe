"""What training needs on more devices than are there: XLA's own account, before anything runs.

python -m benchmarks.scaling --shape=large,10b --devices=8,64,256 --target=H200 --out=FILE

Every cell is compiled ahead of time for so many GPUs, or virtual CPU devices. Memory per device is
XLA's plan of the program's buffers; bytes sent per device and step are those of the collectives
that its partitioner put into the program. Times on real devices are predicted from these and from
data sheets: operations / (peak x utilization) and bytes / link, one hidden behind the other (lower
bound) or one after the other (upper bound).
"""

import contextlib
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from benchmarks import gpu_target, output
from benchmarks.collectives import Collective, collectives
from benchmarks.train_step import (
  COUPLERS,
  EVERYWHERE,
  SHAPES,
  abstract_feed,
  forward_flops,
  shape_fields,
)
from hgnn_moe_jax import cli, device, sharding
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training.assembly import assemble_sized
from hgnn_moe_jax.training.step import as_count

_MOST_DEVICES = 256
_DUMP = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}

# Name -> (fields, vocabulary). The batch size is that of one part of the data axis.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
  "tiny": ({**SHAPES["tiny"][0], "model.num_experts": 4, "training.batch_size": 2}, 64),
  "large": SHAPES["large"],
  "10b": (shape_fields(1024, 12, 64, 8, 1024, 16), 50304),
}
MESHES: dict[str, dict[int, list[tuple[int, int, int]]]] = {
  "tiny": {8: [(2, 2, 2)], 64: [(16, 2, 2)], 256: [(64, 2, 2)]},
  "large": {8: [(8, 1, 1), (1, 8, 1)], 64: [(64, 1, 1), (8, 8, 1)], 256: [(256, 1, 1), (32, 8, 1)]},
  "10b": {8: [(1, 8, 1)], 64: [(8, 8, 1), (1, 64, 1), (4, 8, 2)], 256: [(32, 8, 1), (4, 64, 1)]},
}


class Device(NamedTuple):
  """Data-sheet figures. `link`: bytes per second out of one device, to others of its node and to
  other nodes."""

  flops: float
  node: float
  link: float
  network: float


# bfloat16 without sparsity; NVLink one way; one 200 or 400 Gb/s port per GPU.
DEVICES = {
  "A100": Device(312e12, 8, 300e9, 25e9),
  "H100, H200": Device(989e12, 8, 450e9, 50e9),
}
_UTILIZATION = 0.45  # assumed for several; `large` on one H200: 0.34 of the data sheet's rate


def compile_cell(config: Config, vocab_size: int, shape: tuple[int, int, int]) -> dict[str, Any]:
  """Compiles the training loop's dispatch on a mesh of the devices that JAX has, or pretends to.

  The loop over steps matters: in it the partitioner's plan of a step is another.

  Returns:
    seconds of compiling, bytes per device, and one step's collectives.
  """
  count = shape[0] * shape[1] * shape[2]
  grid = np.asarray(jax.devices()[:count]).reshape(shape)
  mesh = Mesh(grid, sharding.AXES, axis_types=sharding.AXIS_TYPES)
  # A program for GPUs sends what it says; for CPU's the partitioner's text says more.
  on_cpu = jax.default_backend() == "cpu"
  on_gpu = {**device.compiler_options(), **gpu_target.COMPILER_OPTIONS}
  platforms = None if on_cpu else ("cuda",)
  with jax.set_mesh(mesh):
    a = assemble_sized(config, vocab_size, config.training.steps, mesh)
    feed = abstract_feed(config, sharding.batch_rows(mesh, leading=1))
    started = time.perf_counter()
    traced = a.dispatch.trace(a.abstract_state, feed, as_count(1))
    lowered = traced.lower(lowering_platforms=platforms)
    with tempfile.TemporaryDirectory() as folder:
      options = {"xla_dump_to": folder, **_DUMP} if on_cpu else on_gpu
      compiled = lowered.compile(compiler_options=options)
      partitioned = ""
      if on_cpu:
        (dumped,) = pathlib.Path(folder).glob("*.after_spmd-partitioning.*.txt")
        partitioned = dumped.read_text()
  memory: Any = compiled.memory_analysis()
  return {
    "compile_seconds": time.perf_counter() - started,
    "parameters": a.parameters,
    "state_bytes": int(memory.argument_size_in_bytes),
    "temporary_bytes": int(memory.temp_size_in_bytes),
    "collectives": collectives(str(compiled.as_text()), count, partitioned, turns=1),
  }


def predicted(cell: dict[str, Any], flops: int, count: int, device: Device) -> tuple[float, float]:
  """Seconds per step if communication hides behind the products, and if it comes after them."""
  work = flops / count / device.flops / _UTILIZATION
  talk = 0.0
  for c in cell["collectives"]:
    talk += c.sent / (device.link if c.span <= device.node else device.network)
  return max(work, talk), work + talk


def summarize(found: list[Collective]) -> dict[str, float]:
  """Bytes that a device sends in a step, by kind."""
  return {
    kind: sum(c.sent for c in found if c.kind == kind) for kind in sorted({c.kind for c in found})
  }


def measure(
  shape: str,
  count: int,
  mesh: tuple[int, int, int],
  coupler: str,
  target: str = "cpu",
  selected: int = 0,
  optimizer: str = "adamw",
) -> dict[str, Any]:
  """One cell of the table."""
  fields, vocab_size = FAMILIES[shape]
  per_part = fields["training.batch_size"]
  config = with_fields(
    Config(name=shape),
    {
      **EVERYWHERE,
      **fields,
      **COUPLERS[coupler],
      "model.compute_dtype": "bfloat16",
      "training.batch_size": per_part * mesh[0],
      "training.remat": True,
      "mesh.fsdp": True,
      "model.selected_experts": selected,
      "training.optimizer": optimizer,
    },
  ).validate()
  on_target = contextlib.nullcontext() if target == "cpu" else gpu_target.pretend(target, count)
  with on_target:
    cell = compile_cell(config, vocab_size, mesh)
  # Each of the devices among which experts are split has room for all tokens to choose its experts.
  fed = min(selected * mesh[1], config.model.num_experts)
  part = {"training.batch_size": per_part, "model.selected_experts": fed}
  flops = 3 * forward_flops(with_fields(config, part), vocab_size) * mesh[0]
  times = {name: predicted(cell, flops, count, device) for name, device in DEVICES.items()}
  found = cell.pop("collectives")
  return {
    "shape": shape,
    "coupler": coupler,
    "target": target,
    "selected_experts": selected,
    "optimizer": optimizer,
    "devices": count,
    "mesh": mesh,
    "batch": per_part * mesh[0],
    "tokens": per_part * mesh[0] * config.model.max_length,
    **cell,
    "matmul_flops": flops,
    "sent_bytes": summarize(found),
    "predicted_seconds": {name: list(pair) for name, pair in times.items()},
  }


def table(results: list[dict[str, Any]]) -> str:
  names = list(DEVICES)
  lines = [
    "| shape | parameters | devices | data x expert x model | tokens a step "
    f"| state + temporary, GB | sent, GB | {' | '.join(f'{n}, s' for n in names)} |",
    "|---" * (7 + len(names)) + "|",
  ]
  for r in results:
    mesh = " x ".join(map(str, r["mesh"]))
    sent = sum(r["sent_bytes"].values()) / 1e9
    times = [f"{low:.2f} to {high:.2f}" for low, high in r["predicted_seconds"].values()]
    lines.append(
      f"| {r['shape']} | {r['parameters'] / 1e9:.2f} B | {r['devices']} | {mesh} | {r['tokens']:,} "
      f"| {r['state_bytes'] / 1e9:.1f} + {r['temporary_bytes'] / 1e9:.1f} | {sent:.1f} "
      f"| {' | '.join(times)} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command."""
  shapes = flags.DEFINE_list("shape", ["large", "10b"], f"Of {', '.join(FAMILIES)}.")
  counts = flags.DEFINE_list("devices", ["8", "64", "256"], "Of 8, 64, 256.")
  coupler = flags.DEFINE_enum("coupler", "graph", list(COUPLERS), "The coupler.")
  target = flags.DEFINE_enum(
    "target", "cpu", ["cpu", *gpu_target.TARGETS], "Whose program: no GPU has to be there."
  )
  selected = flags.DEFINE_integer("selected_experts", 0, "Of each token; 0: all.", 0)
  optimizer = flags.DEFINE_enum("optimizer", "adamw", ["adamw", "muon"], "The optimizer.")
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    if unknown := [name for name in shapes.value if name not in FAMILIES]:
      raise UserError(f"--shape={unknown[0]}: use some of {','.join(FAMILIES)}")
    if unknown := [n for n in counts.value if not re.fullmatch("8|64|256", n)]:
      raise UserError(f"--devices={unknown[0]}: use some of 8,64,256")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _MOST_DEVICES)
    # A program out of the cache is not partitioned again, and leaves no account of it.
    jax.config.update("jax_enable_compilation_cache", False)
    results = []
    for shape in shapes.value:
      for count in map(int, counts.value):
        for mesh in MESHES[shape][count]:
          given = coupler.value, target.value, selected.value, optimizer.value
          results.append(measure(shape, count, mesh, *given))
          print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(results))
    if out.value:
      output.write(out.value, {"measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
