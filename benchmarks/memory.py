"""Whether a config fits on a GPU, without that GPU: XLA's plan of the training loop's buffers.

python -m benchmarks.memory --config=configs/adaptive.py --vocab_size=50257 --target=A100
python -m benchmarks.memory --config=configs/original.py --sweep=training.accumulation=1,4
python -m benchmarks.memory --config=configs/original.py --without

Compiles the dispatch, a loop over steps, ahead of time for one GPU of this kind (see `gpu_target`),
whatever `mesh` the config has, and runs nothing. `XLA_FLAGS` counts, as in a run. With `--without`
the same model's follows whose steps neither measure nor penalise the experts' overlap (see
`overhead`).
"""

from typing import Any

import jax
from absl import flags

from benchmarks import gpu_target, output, overhead
from benchmarks.train_step import abstract_feed
from hgnn_moe_jax import cli, device
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.sweep import parse_grid
from hgnn_moe_jax.training.assembly import assemble_sized
from hgnn_moe_jax.training.step import as_count, make_dispatch


def measure(config: Config, vocab_size: int, target: str, without: bool = False) -> dict[str, Any]:
  """Bytes of the state (parameters, moments, controller) and of what a step needs besides.

  Args:
    config: of the run.
    vocab_size: V.
    target: of `gpu_target.TARGETS`.
    without: the experts' overlap is neither measured nor penalised.
  """
  with gpu_target.pretend(target, 1):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    a = assemble_sized(config, vocab_size, 1000)
    dispatch, state = a.dispatch, a.abstract_state
    if without:
      step, init = overhead.step_without(config, vocab_size)
      dispatch, state = make_dispatch(step, 1, config.model.max_length, 0), jax.eval_shape(init)
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state)
    traced = dispatch.trace(placed, abstract_feed(config, where), as_count(1))
    lowered = traced.lower(lowering_platforms=("cuda",))
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
  without = flags.DEFINE_bool("without", False, "Also the step without overlaps and penalties.")
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    jax.config.update("jax_platforms", "cpu")
    base, results = cli.validated(given_config.value), []
    # What is compiled for a device that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    for cell in parse_grid(sweep.value, base, "--sweep"):
      config = with_fields(base, cell.values).validate()
      for plain in (False, True) if without.value else (False,):
        words = [cell.name] * bool(cell.values) + ["without"] * plain
        named = {"config": base.name, "sweep": ",".join(words)}
        results.append({**named, **measure(config, vocab_size.value, target.value, plain)})
        print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if out.value:
      output.write(out.value, {"measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
