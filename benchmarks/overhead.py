"""What orthogonality and control cost: training steps with and without, turn by turn.

python -m benchmarks.overhead --config=configs/wikitext2_small.py --vocab_size=8192

Compiles the same model, optimizer and batch once per variant and runs the variants in turn, so that
whatever else the machine does hits all of them. "without" neither measures nor penalises the
experts' overlap and has no controller; all others measure both overlaps in every step, as every run
does. Tokens are random: no text is needed.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import flags

from benchmarks import output
from hgnn_moe_jax import cli, device
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.examples import Batch
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.training import optimizer as optimizers
from hgnn_moe_jax.training.assembly import assemble_sized

_ADAPTIVE = {
  "orthogonality.weight_strength": 0.0,
  "orthogonality.output_strength": 0.0,
  "adaptive.controller": "adaptive",
}
VARIANTS: dict[str, dict[str, Any]] = {
  "measured": {"orthogonality.weight_strength": 0.0, "orthogonality.output_strength": 0.0},
  "adaptive weight": {**_ADAPTIVE, "adaptive.objective": "weight"},
  "adaptive output": {**_ADAPTIVE, "adaptive.objective": "output", "adaptive.signal": "output"},
  "adaptive both": {**_ADAPTIVE, "adaptive.objective": "both"},
  "adaptive both, pairs": {
    **_ADAPTIVE,
    "adaptive.objective": "both",
    "adaptive.pair_emphasis": 1.0,
  },
}


class PlainState(NamedTuple):
  """Of a step without penalties or a controller."""

  params: Any
  opt_state: Any
  key: jax.Array


Step = Callable[[Any, Batch], tuple[Any, Any]]
Init = Callable[[], Any]


def step_without(config: Config, vocab_size: int) -> tuple[Step, Init]:
  """A step that knows cross-entropy only, and what makes its PlainState.

  Raises:
    UserError: the config's step does something else besides that this one does not.
  """
  for field, value, none in (
    ("training.accumulation", config.training.accumulation, 1),
    ("model.selected_experts", config.model.selected_experts, 0),
  ):
    if value != none:
      raise UserError(
        f"config.{field}={value}: the step without penalties is known for {none} only; set it"
      )
  remat = config.training.remat
  model = language_model.build(config.model, vocab_size, lambda updates, weights: (), remat)
  shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
  learning_rate = optimizers.learning_rate_schedule(config.training, 1000)
  optimizer = optimizers.build(config.training, learning_rate, shapes)

  @jax.jit
  def init():
    params = model.init(jax.random.key(0))
    return PlainState(params, optimizer.init(params), jax.random.key(1))

  def loss(params, batch, key):
    x_BTD, _ = model.features(params, batch.inputs_BT, batch.weights_BT, key)
    nll = model.loss(params, x_BTD, batch.targets_BT, batch.weights_BT)
    return nll / batch.weights_BT.sum()

  def step(state, batch):
    params, opt_state, key = state
    dropout_key = key if config.model.dropout else None
    value, grads = jax.value_and_grad(loss)(params, batch, dropout_key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    new_state = PlainState(optax.apply_updates(params, updates), opt_state, key)
    return new_state, (value, optax.tree.norm(grads))

  return step, init


def step_with(config: Config, vocab_size: int) -> tuple[Step, Init]:
  """The training step of a run of this config, and what makes its state."""
  a = assemble_sized(config, vocab_size, 1000)
  return a.train_step, lambda: a.init_state(config.seed)


def random_batch(config: Config, vocab_size: int) -> Batch:
  shape = (config.training.batch_size, config.model.max_length)
  tokens = np.random.default_rng(0).integers(0, vocab_size, (2, *shape)).astype(np.int32)
  return jax.device_put(Batch(tokens[0], tokens[1], np.ones(shape, np.float32)))


def measure(
  config: Config, vocab_size: int, rounds: int, steps: int, variants: Sequence[str]
) -> dict[str, dict[str, float]]:
  """Per variant: median seconds per step, and the ratio to "without".

  The ratio is the median over rounds of the ratio within a round; so are its quartiles.

  Args:
    config: of the run.
    vocab_size: V.
    rounds: timings of every variant.
    steps: taken in one timing without waiting, so that launching them is hidden where steps are
      short.
    variants: of VARIANTS.
  """
  batch = random_batch(config, vocab_size)
  makers = {"without": step_without(config, vocab_size)}
  for name in variants:
    changed = with_fields(config, VARIANTS[name]).validate()
    makers[name] = step_with(changed, vocab_size)
  compiled, states = {}, {}
  for name, (step, init) in makers.items():
    state = init()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=device.compiler_options())
    compiled[name] = jitted.lower(state, batch).compile()
    states[name], _ = jax.block_until_ready(compiled[name](state, batch))  # Not timed.
  seconds: dict[str, list[float]] = {name: [] for name in compiled}
  names = list(compiled)
  for turn in range(rounds):
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
      started = time.perf_counter()
      for _ in range(steps):
        states[name], record = compiled[name](states[name], batch)
      jax.block_until_ready((states[name], record))
      seconds[name].append((time.perf_counter() - started) / steps)
  result = {}
  for name, values in seconds.items():
    ratios = np.divide(values, seconds["without"])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    memory = compiled[name].memory_analysis()
    result[name] = {
      "seconds": float(np.median(values)),
      "ratio": float(middle),
      "ratio_low": float(low),
      "ratio_high": float(high),
      "temporary_bytes": float(memory.temp_size_in_bytes),
    }
  return result


def table(result: dict[str, dict[str, float]]) -> str:
  lines = [
    "| step | ms, median | ratio to without, median [quartiles] | temporary memory, MB |",
    "|---|---|---|---|",
  ]
  for name, r in result.items():
    lines.append(
      f"| {name} | {1000 * r['seconds']:.1f} | {r['ratio']:.3f} [{r['ratio_low']:.3f}, "
      f"{r['ratio_high']:.3f}] | {r['temporary_bytes'] / 1e6:.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command."""
  given_config = cli.define_config()
  vocab_size = flags.DEFINE_integer("vocab_size", 8192, "Token ids.", 2)
  rounds = flags.DEFINE_integer("rounds", 15, "Timings per variant.", 3)
  steps = flags.DEFINE_integer("steps", 1, "Steps in a timing; several where one is short.", 1)
  variants = flags.DEFINE_multi_enum(
    "variant", list(VARIANTS), list(VARIANTS), "What to compare with a step without."
  )
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    config = cli.validated(given_config.value)
    result = measure(config, vocab_size.value, rounds.value, steps.value, variants.value)
    print(table(result))
    if out.value:
      timing = {"rounds": rounds.value, "steps_per_timing": steps.value}
      output.write(out.value, {"config": config.to_dict(), **timing, "steps": result})

  cli.start(run)


if __name__ == "__main__":
  main()
