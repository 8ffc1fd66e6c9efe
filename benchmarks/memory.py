"""Whether a config fits on a GPU, without that GPU: XLA's plan of a training step's buffers.

python -m benchmarks.memory --config=configs/adaptive.py --vocab_size=50257 --target=A100
python -m benchmarks.memory --config=configs/original.py --sweep=training.accumulation=1,4

Compiles the step ahead of time for one GPU of this kind (see `gpu_target`), whatever `mesh` the
config has, and runs nothing. `XLA_FLAGS` counts, as in a run.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import gpu_target
from hgnn_moe_jax import cli, device
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.examples import Batch
from hgnn_moe_jax.sweep import parse_grid
from hgnn_moe_jax.training.assembly import assemble_sized
from hgnn_moe_jax.training.records import environment, write_json


def measure(config: Config, vocab_size: int, target: str) -> dict[str, Any]:
  """Bytes of the state (parameters, moments, controller) and of what a step needs besides."""
  rows = (config.training.batch_size, config.model.max_length)
  with gpu_target.pretend(target, 1):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    a = assemble_sized(config, vocab_size, 1000)
    shapes = (
      a.abstract_state,
      Batch(*(jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32))),
    )
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
    lowered = (
      jax.jit(a.train_step, donate_argnums=0).trace(*placed).lower(lowering_platforms=("cuda",))
    )
    options = {**device.compiler_options(), **gpu_target.COMPILER_OPTIONS}
    memory: Any = lowered.compile(compiler_options=options).memory_analysis()
  return {
    "target": target,
    "parameters": a.parameters,
    "state_bytes": int(memory.argument_size_in_bytes),
    "temporary_bytes": int(memory.temp_size_in_bytes),
  }


def table(results: list[dict[str, Any]]) -> str:
  lines = [
    "| config | sweep | parameters | state, GB | temporary, GB | on | of its memory |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in results:
    whole = gpu_target.TARGETS[r["target"]].memory_bytes
    lines.append(
      f"| {r['config']} | {r['sweep']} | {r['parameters'] / 1e6:,.1f} M "
      f"| {r['state_bytes'] / 1e9:.2f} | {r['temporary_bytes'] / 1e9:.2f} | {r['target']} "
      f"| {(r['state_bytes'] + r['temporary_bytes']) / whole:.0%} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command."""
  given_config = cli.define_config()
  vocab_size = flags.DEFINE_integer("vocab_size", 50257, "Token ids.", 2)
  target = flags.DEFINE_enum("target", "A100", list(gpu_target.TARGETS), "The GPU.")
  sweep = flags.DEFINE_multi_string(
    "sweep", [], "FIELD=VALUE,VALUE,...: one plan each. Several: all combinations."
  )
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    jax.config.update("jax_platforms", "cpu")
    base, results = cli.validated(given_config.value), []
    # What is compiled for a device that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    for cell in parse_grid(sweep.value, base):
      config = with_fields(base, cell.values).validate()
      named = {"config": base.name, "sweep": cell.name if cell.values else ""}
      results.append({**named, **measure(config, vocab_size.value, target.value)})
      print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if out.value:
      write_json(pathlib.Path(out.value), {**environment(), "measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
