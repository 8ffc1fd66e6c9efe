"""Four experts averaged without any messages. WikiText-2, D128 L2 E4.

python -m hgnn_moe_jax.main --config=configs/mean.py

Shows: what the experts bring without a coupler.
Result: validation token perplexity 137.15, word perplexity 586.0, bits per byte
1.784 after 600 steps (174 s of training), one seed, 26 November 2026, 2 CPU cores; data as in
wikitext2_small. Three other seeds: 138.18 ± 3.31 (docs/measuring-specialization.md).
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="mean")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 128, 2, 4
  c.model.dropout = 0.0  # half a pass over the text: nothing to overfit
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.data.tokenizer, c.data.vocab_size = "bpe", 8192
  c.training.steps, c.training.batch_size = 600, 16
  c.training.learning_rate, c.training.warmup_steps = 4e-3, 60
  c.model.num_experts, c.model.coupler = 4, "mean"
  return c
