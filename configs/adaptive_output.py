"""Graph-coupled experts with the adaptive law on what the experts do: the output penalty.

python -m hgnn_moe_jax.main --config=configs/adaptive_output.py

Shows: the law that reads the output specialization and drives the output penalty. The target of
0.9 lies a little below chance for D128, which is 0.93: experts that are unrelated would reach it.
Result: validation token perplexity 176.2 ± 1.2, word 810.8 at 400 steps, 3 seeds; 174.6 ± 2.6
and 801.3 without a penalty. docs/adaptive-orthogonality.md has the comparison.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="adaptive_output")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 128, 2, 4
  c.model.dropout = 0.0  # half a pass over the text: nothing to overfit
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.data.tokenizer, c.data.vocab_size = "bpe", 8192
  c.training.steps, c.training.batch_size = 600, 16
  c.training.learning_rate, c.training.warmup_steps = 4e-3, 60
  c.model.num_experts, c.model.coupler = 4, "graph"
  c.orthogonality.warmup_steps = 60
  c.adaptive.controller, c.adaptive.decay_schedule = "adaptive", "cosine"
  c.adaptive.signal = c.adaptive.objective = "output"
  c.adaptive.target_specialization = 0.9
  return c
