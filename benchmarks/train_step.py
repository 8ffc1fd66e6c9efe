"""How fast training runs, and how near to what the device can multiply.

python -m benchmarks.train_step --shape=small --coupler=graph --out=FILE
python -m benchmarks.train_step --shape=small,original --coupler=graph,hypergraph
python -m benchmarks.train_step --shape=sweep --sweep=model.num_experts=1,2,4,8,16,32,64
python -m benchmarks.train_step --shape=small --sweep=model.selected_experts=0,1,2 --in_turn
python -m benchmarks.train_step --shape=original --in_turn \\
  --compiler_option=xla_gpu_enable_dynamic_slice_fusion=true

A measurement is the training loop's own compiled dispatch, on random tokens: data on the device,
penalties, controller and optimizer included, dispatched for half a second at least without waiting.
Its rate is compared with that of one large matrix product, timed in turn with it in the same
process: float32 on CPU, bfloat16 on an accelerator.

utilization = matmul_flops_per_second / peak_flops_per_second, where matmul_flops_per_second counts
three times the forward pass's matrix products (of the model alone) per step, as is usual: the
backward pass multiplies twice as much. Recomputation and penalties are work, but count as none.
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import output
from benchmarks.flops import matmul_flops
from hgnn_moe_jax import cli
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.examples import Batch, place, stream_examples
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.sweep import parse_grid
from hgnn_moe_jax.training.assembly import assemble_sized
from hgnn_moe_jax.training.step import Feed, as_count

EVERYWHERE = {
  "training.steps": 1000,
  "model.dropout": 0.0,
  "adaptive.controller": "adaptive",
  "adaptive.signal": "output",
  "adaptive.objective": "both",
}


def shape_fields(D: int, L: int, E: int, B: int, T: int, heads: int) -> dict[str, Any]:
  return {
    "model.embed_dim": D,
    "model.num_layers": L,
    "model.num_experts": E,
    "model.num_heads": heads,
    "model.max_length": T,
    "training.batch_size": B,
  }


# Name -> (fields, vocabulary).
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
  "tiny": (shape_fields(16, 2, 3, 4, 16, 2), 64),
  # For sweeps: shallow and narrow, so that many experts or long rows still fit.
  "sweep": (shape_fields(64, 2, 4, 2, 128, 2), 1024),
  "small": (shape_fields(128, 2, 4, 32, 128, 4), 8192),
  "original": ({**shape_fields(256, 4, 4, 32, 128, 4), "model.dropout": 0.1}, 50257),
  "d384": (shape_fields(384, 4, 4, 64, 128, 6), 50257),
  "large": (shape_fields(1024, 12, 8, 8, 1024, 8), 50257),
}
COUPLERS = {
  "graph": {"model.coupler": "graph"},
  "hypergraph": {"model.coupler": "hypergraph", "model.hyperedges": "triplets"},
  "mean": {"model.coupler": "mean"},
}
# Side of the product that is the peak, and how many follow one another in a timing: on an
# accelerator one takes 2 ms, of which starting it and waiting for it would be a part.
_PEAK_CPU, _PEAK_ACCELERATOR = (2048, 1), (8192, 10)
# A timing of 50 ms would be of a GPU that is still slow from the products before it: `original`
# took 6.3 ms a step in such, 5.7 in turns without products.
_LEAST_SECONDS = 0.5


def forward_flops(config: Config, vocab_size: int) -> int:
  """Operations of the matrix products of a forward pass over one batch, loss included.

  Traced in float32, where attention is written out and not a kernel that cannot be looked into.
  Where a token has selected K of E experts, K / E of the feed-forward products count: empty places
  are multiplied, too, but that is no work.
  """
  m = config.model
  traced = {"model.compute_dtype": "float32", "model.selected_experts": 0}
  model_config = with_fields(config, traced).model
  model = language_model.build(model_config, vocab_size, measure=lambda updates, weights: ())
  params = jax.eval_shape(model.init, jax.random.key(0))
  shape = (config.training.batch_size, config.model.max_length)
  ids, ones = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)

  def forward(params, inputs_BT, targets_BT, weights_BT):
    x_BTD, _ = model.features(params, inputs_BT, weights_BT, None)
    return model.loss(params, x_BTD, targets_BT, weights_BT)

  flops = matmul_flops(forward, params, ids, ids, ones)
  if m.selected_experts:
    spared = 1 - m.selected_experts / m.num_experts
    tokens_fed = m.num_layers * m.num_experts * math.prod(shape)
    flops -= round(spared * tokens_fed * 4 * m.ffn_multiplier * m.embed_dim**2)
    flops += 2 * m.embed_dim * tokens_fed  # the routers
  return flops


def peak_product() -> tuple[Callable[[], Any], int]:
  """A call that multiplies two large square matrices, ten times on an accelerator, and its
  operations."""
  cpu = jax.default_backend() == "cpu"
  size, times = _PEAK_CPU if cpu else _PEAK_ACCELERATOR
  keys = jax.random.split(jax.random.key(0))
  dtype = jnp.float32 if cpu else jnp.bfloat16
  a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
  product = jax.jit(jnp.matmul)
  return lambda: [product(a, b) for _ in range(times)], times * 2 * size**3


def timed(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def compile_seconds(
  lowered: Callable[[], Any], cached: bool, options: dict[str, str | bool] | None = None
) -> tuple[Any, list[float]]:
  """The compiled program, and seconds without the persistent cache, and with it if asked for.

  `options` are XLA's, besides those that the program has of its own, over which they win.
  """
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update(names[0], folder)
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()  # It would keep to the folder of its first use.
    seconds = []
    for _ in range(1 + cached):
      jax.clear_caches()
      program = lowered()
      started = time.perf_counter()
      compiled = program.compile(compiler_options=options)
      seconds.append(time.perf_counter() - started)
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  return compiled, seconds


def dispatch_of(config: Config, vocab_size: int) -> tuple[Any, Any, Feed]:
  """The loop's own dispatch, not compiled yet, its state, and a feed of random tokens."""
  T, B, K = (
    config.model.max_length,
    config.training.batch_size,
    config.training.steps_per_dispatch,
  )
  a = assemble_sized(config, vocab_size, config.training.steps)
  tokens = np.random.default_rng(0).integers(0, vocab_size, 4 * B * T + 1).astype(np.int32)
  examples, _ = place(stream_examples(tokens, T), "device")
  rows_KB = np.arange(K * B, dtype=np.int32).reshape(K, B) % examples.num_examples
  return a.dispatch, a.init_state(config.seed), Feed(examples, rows_KB, None)


def abstract_feed(config: Config, where: jax.sharding.Sharding) -> Feed:
  """The shapes of a feed of one batch, for a dispatch that is compiled and not run."""
  rows = (1, config.training.batch_size, config.model.max_length)
  ids = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=where)
  weights = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=where)
  return Feed(None, None, Batch(ids, ids, weights))


@dataclasses.dataclass
class Program:
  """A compiled dispatch that is measured: its state moves on, its timings add up."""

  config: Config
  vocab_size: int
  compiled: Any
  state: Any
  feed: Feed
  compilation: list[float]
  dispatches: int = 1  # in a timing
  seconds: list[float] = dataclasses.field(default_factory=list)
  peaks: list[float] = dataclasses.field(default_factory=list)


def prepare(
  config: Config, vocab_size: int, cached: bool, options: dict[str, str | bool] | None = None
) -> Program:
  """Compiles, and takes a dispatch that is not timed and one that says how many make a timing."""
  dispatch, state, feed = dispatch_of(config, vocab_size)
  lowered = lambda: dispatch.lower(state, feed, as_count(1))  # noqa: E731
  compiled, compilation = compile_seconds(lowered, cached, options)
  program = Program(config, vocab_size, compiled, state, feed, compilation)
  advance(program)
  program.dispatches = math.ceil(_LEAST_SECONDS / advance(program))
  return program


def advance(program: Program) -> float:
  """Takes the dispatches of a timing: seconds."""
  steps = as_count(program.config.training.steps_per_dispatch)
  started = time.perf_counter()
  for _ in range(program.dispatches):
    program.state, records = program.compiled(program.state, program.feed, steps)
  jax.block_until_ready((program.state, records))
  return time.perf_counter() - started


def measure(
  configs: Sequence[Config],
  vocab_size: int,
  rounds: int,
  cached: bool = True,
  options: Sequence[dict[str, str | bool]] | None = None,
) -> list[dict[str, Any]]:
  """A measurement of each config; times are medians over rounds, ratios medians of a round's.

  All are timed in every round, so that what else the machine does hits all of them, and compared
  with the first.

  Args:
    configs: all are in memory at once.
    vocab_size: V.
    rounds: timings of each.
    cached: compile again, with the persistent cache.
    options: XLA's of each, besides those that a run has; None for no others.
  """
  others = options or [{}] * len(configs)
  programs = [
    prepare(config, vocab_size, cached, other)
    for config, other in zip(configs, others, strict=True)
  ]
  product, product_flops = peak_product()
  jax.block_until_ready(product())
  for turn in range(rounds):
    start = turn % len(programs)
    for program in programs[start:] + programs[:start]:
      program.peaks.append(product_flops / min(timed(product) for _ in range(3)))
      steps = program.dispatches * program.config.training.steps_per_dispatch
      program.seconds.append(advance(program) / steps)
  return [_summary(program, programs[0] if len(programs) > 1 else None) for program in programs]


def _summary(program: Program, first: Program | None) -> dict[str, Any]:
  training = program.config.training
  step_flops = 3 * forward_flops(program.config, program.vocab_size)
  middle = float(np.median(program.seconds))
  result = {
    "seconds_per_step": middle,
    "tokens_per_second": training.batch_size * program.config.model.max_length / middle,
    "matmul_flops": step_flops,
    "matmul_flops_per_second": step_flops / middle,
    "peak_flops_per_second": float(np.median(program.peaks)),
    "utilization": float(np.median(step_flops / np.multiply(program.seconds, program.peaks))),
    "peak_memory_bytes": _memory(program.compiled),
    "compile_seconds": program.compilation[0],
    "compile_seconds_cached": program.compilation[1] if len(program.compilation) > 1 else None,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.state.params)),
  }
  if first is not None:
    ratios = np.quantile(np.divide(program.seconds, first.seconds), [0.25, 0.5, 0.75])
    names = ("time_to_first_low", "time_to_first", "time_to_first_high")
    result |= dict(zip(names, map(float, ratios), strict=True))
  return result


def _memory(compiled: Any) -> int:
  """Peak memory of the program in bytes, by XLA's own plan of its buffers."""
  m = compiled.memory_analysis()
  return int(
    m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
  )


def table(results: list[dict[str, Any]]) -> str:
  """A row for each; with a column of ratios if they were taken in turn."""
  turns = any("time_to_first" in r for r in results)
  lines = [
    "| shape | coupler | sweep | ms per step | tokens/s | GFLOP/s | of peak | memory, MB "
    f"| compile, s (cached) |{' time, of the first [quartiles] |' if turns else ''}",
    "|---" * (9 + turns) + "|",
  ]
  for r in results:
    cold, cached = r["compile_seconds"], r["compile_seconds_cached"]
    compiling = "-" if cold is None else f"{cold:.1f}"  # Kept out where others were compiling, too.
    compiling += "" if cached is None else f" ({cached:.1f})"
    line = (
      f"| {r['shape']} | {r['coupler']} | {r['sweep']} | {1000 * r['seconds_per_step']:.1f} "
      f"| {r['tokens_per_second']:,.0f} | {r['matmul_flops_per_second'] / 1e9:,.1f} "
      f"| {r['utilization']:.1%} | {r['peak_memory_bytes'] / 1e6:,.0f} "
      f"| {compiling} |"
    )
    if turns:
      low, middle, high = (r[f"time_to_first{end}"] for end in ("_low", "", "_high"))
      line += f" {middle:.2f} [{low:.2f}, {high:.2f}] |"
    lines.append(line)
  return "\n".join(lines)


def parse_option(text: str) -> dict[str, str | bool]:
  """ "NAME=VALUE" as {NAME: VALUE}. Raises UserError if it is none, or XLA has no such option."""
  name, _, value = text.partition("=")
  if not name or not value:
    raise UserError(f"--compiler_option={text}: give NAME=VALUE, without the dashes of XLA_FLAGS")
  option = {name: {"true": True, "false": False}.get(value, value)}
  try:
    jax.jit(lambda: 0).lower().compile(compiler_options=option)
  except jax.errors.JaxRuntimeError as error:
    told = str(error).splitlines()[0]
    raise UserError(f"--compiler_option={text}: {told}; use one of XLA's options") from None
  return option


def main() -> None:
  """The command."""
  shapes = flags.DEFINE_list("shape", ["small"], f"Of {', '.join(SHAPES)}.")
  couplers = flags.DEFINE_list("coupler", ["graph"], f"Of {', '.join(COUPLERS)}.")
  sweep = flags.DEFINE_multi_string(
    "sweep", [], "FIELD=VALUE,VALUE,...: one measurement each. Several: all combinations."
  )
  rounds = flags.DEFINE_integer("rounds", 5, "Timings of each.", 3)
  compiler_options = flags.DEFINE_multi_string(
    "compiler_option", [], "XLA's NAME=VALUE: each measurement once more, with it. Repeatable."
  )
  cached = flags.DEFINE_boolean("cached", True, "Compile again, with the persistent cache.")
  in_turn = flags.DEFINE_boolean(
    "in_turn", False, "Time the measurements of a sweep in turn, and compare with the first."
  )
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    for flag, known in ((shapes, SHAPES), (couplers, COUPLERS)):
      if unknown := [name for name in flag.value if name not in known]:
        raise UserError(f"--{flag.name}={unknown[0]}: use some of {','.join(known)}")
    if in_turn.value and not sweep.value and not compiler_options.value:
      raise UserError("--in_turn: nothing to compare; give a --sweep, its first value first")
    options = {"": {}} | {text: parse_option(text) for text in compiler_options.value}
    results = []
    for shape in shapes.value:
      fields, vocab_size = SHAPES[shape]
      for coupler in couplers.value:
        base = with_fields(Config(name=shape), {**EVERYWHERE, **fields, **COUPLERS[coupler]})
        cells = parse_grid(sweep.value, base, "--sweep")
        every = list(itertools.product(cells, options))
        for group in [every] if in_turn.value else [[one] for one in every]:
          configs = [with_fields(base, cell.values).validate() for cell, _ in group]
          given = [options[text] for _, text in group]
          measured = measure(configs, vocab_size, rounds.value, cached.value, given)
          for (cell, text), found in zip(group, measured, strict=True):
            changed = ",".join(filter(None, [cell.name if cell.values else "", text]))
            named = {"shape": shape, "coupler": coupler, "sweep": changed}
            results.append({**named, **found})
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if out.value:
      output.write(out.value, {"measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
