"""How fast text comes out: tokens per second with the key-value cache, and without it.

python -m benchmarks.generation --shape=small --coupler=graph --batch=1,8,32 --out=FILE

The model has random weights, and the prompt random bytes; sampling takes a token from the whole
distribution. Without the cache every token costs a forward pass over the window, as `logits` does.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import output
from benchmarks.train_step import COUPLERS, EVERYWHERE, SHAPES
from hgnn_moe_jax import cli
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.tokenizers import ByteTokenizer
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.generation import Sampling, generate
from hgnn_moe_jax.trained import Trained
from hgnn_moe_jax.training.assembly import build_model


def random_model(config: Config) -> Trained:
  """A byte model of this config that has learned nothing."""
  tokenizer = ByteTokenizer()
  model = build_model(config, tokenizer.vocab_size)
  params = jax.jit(model.init)(jax.random.key(0))
  return Trained(config, model, params, tokenizer, 0, {})


def measure(config: Config, batch: int, rounds: int) -> dict[str, Any]:
  """Of half a window of prompt and the other half of new tokens; medians over rounds."""
  trained = random_model(config)
  length = config.model.max_length // 2
  rng = np.random.default_rng(0)
  prompts = [bytes(rng.integers(97, 123, length).tolist()).decode() for _ in range(batch)]
  # Two lengths: their difference has no prompt in it.
  seconds: dict[int, list[float]] = {1: [], length: []}
  started = time.perf_counter()
  for count in seconds:
    generate(trained, prompts, Sampling(max_tokens=count))
  compile_seconds = time.perf_counter() - started
  made = {}
  for _ in range(rounds):
    for count, times in seconds.items():
      started = time.perf_counter()
      made[count] = sum(
        len(g.tokens) for g in generate(trained, prompts, Sampling(max_tokens=count))
      )
      times.append(time.perf_counter() - started)
  token_seconds = np.subtract(seconds[length], seconds[1]) / (made[length] - made[1])
  logits = functools.partial(jax.jit(trained.model.logits), trained.params)
  window = rng.integers(0, 256, (batch, 2 * length)).astype(np.int32)
  jax.block_until_ready(logits(window))
  uncached = []
  for _ in range(rounds):
    started = time.perf_counter()
    jax.block_until_ready(logits(window))
    uncached.append((time.perf_counter() - started) / batch)
  return {
    "batch": batch,
    "prompt_tokens": length,
    "tokens_per_second": float(1 / np.median(token_seconds)),
    "tokens_per_second_uncached": float(1 / np.median(uncached)),
    "first_token_seconds": float(np.median(seconds[1])),
    "first_call_seconds": compile_seconds,
  }


def table(results: list[dict[str, Any]]) -> str:
  lines = [
    "| shape | coupler | batch | tokens/s | without cache | ratio | first token, ms |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in results:
    ratio = r["tokens_per_second"] / r["tokens_per_second_uncached"]
    lines.append(
      f"| {r['shape']} | {r['coupler']} | {r['batch']} | {r['tokens_per_second']:,.0f} "
      f"| {r['tokens_per_second_uncached']:,.0f} | {ratio:.1f} "
      f"| {1000 * r['first_token_seconds']:.0f} |"
    )
  return "\n".join(lines)


def main() -> None:
  """The command."""
  shape = flags.DEFINE_enum("shape", "small", list(SHAPES), "Of the model.")
  couplers = flags.DEFINE_list("coupler", ["graph"], f"Of {', '.join(COUPLERS)}.")
  batches = flags.DEFINE_list("batch", ["1", "8", "32"], "Prompts at once.")
  rounds = flags.DEFINE_integer("rounds", 3, "Timed repetitions.", 1)
  out = flags.DEFINE_string("out", None, "JSON file for the result.")

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    if unknown := [name for name in couplers.value if name not in COUPLERS]:
      raise UserError(f"--coupler={unknown[0]}: use some of {','.join(COUPLERS)}")
    if wrong := [b for b in batches.value if not b.isdecimal() or int(b) < 1]:
      raise UserError(f"--batch={wrong[0]}: use numbers of prompts, as in 1,8,32")
    results = []
    for coupler in couplers.value:
      changes = {**EVERYWHERE, **SHAPES[shape.value][0], **COUPLERS[coupler]}
      config = with_fields(Config(name=shape.value), changes).validate()
      for batch in map(int, batches.value):
        named = {"shape": shape.value, "coupler": coupler}
        results.append({**named, **measure(config, batch, rounds.value)})
    print(table(results))
    if out.value:
      output.write(out.value, {"measurements": results})

  cli.start(run)


if __name__ == "__main__":
  main()
