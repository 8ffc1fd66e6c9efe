"""What `main` prints at the end of a run."""

import pathlib
from typing import Any


def evaluation(result: dict[str, Any]) -> str:
  """An evaluation record as lines."""
  return (
    f"{result['split']}, step {result['step']}, {result['tokens']:,} tokens\n"
    f"  token perplexity {result['token_perplexity']:.6g}\n"
    f"  word perplexity  {result['word_perplexity']:.6g}\n"
    f"  bits per byte    {result['bits_per_byte']:.4f}"
  )


def summary(result: dict[str, Any], workdir: pathlib.Path) -> str:
  """A finished run: what it reached, against the unigram model, and where to look next."""
  best = result["best"]
  unigram = result["unigram_perplexity"]
  return (
    f"{result['config_name']}: {result['parameters']:,} parameters, {result['steps']:,} steps, "
    f"{result['tokens_seen']:,} tokens in {result['train_seconds']:.0f} s "
    f"({result['tokens_per_second']:,.0f} tokens/s) after {result['compile_seconds']:.0f} s of "
    "compilation\n"
    f"best {evaluation(best)}\n"
    f"  a unigram model of the training split has token perplexity {unigram:.6g}: "
    f"{unigram / best['token_perplexity']:.1f} times this\n"
    f"Look next: {workdir / 'metrics.jsonl'} (one object per step) and {workdir / 'summary.json'}\n"
    f"Test score: python -m hgnn_moe_jax.main --mode=evaluate --workdir={workdir} --split=test"
  )
