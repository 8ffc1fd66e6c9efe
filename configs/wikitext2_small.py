"""WikiText-2 at CPU size: D128 L2 E4, graph coupler, a BPE of 8,192 trained on the split.

python -m hgnn_moe_jax.main --config=configs/wikitext2_small.py

Shows: the reference run that the other small configs change in one thing each.
Result: validation token perplexity 139.86, word perplexity 601.0, bits per byte 1.791 after 600
steps (1.23 M tokens), one seed, 22 November 2026, 2 CPU cores; the text files of WikiText-2 instead
of the hub: --config.data.source=text --config.data.path=FOLDER. Three other seeds: 139.34 ± 0.73
(docs/measuring-specialization.md).
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="wikitext2_small")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 128, 2, 4
  c.model.dropout = 0.0  # half a pass over the text: nothing to overfit
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.data.tokenizer, c.data.vocab_size = "bpe", 8192
  c.training.steps, c.training.batch_size = 600, 16
  c.training.learning_rate, c.training.warmup_steps = 4e-3, 60
  c.model.num_experts, c.model.coupler = 4, "graph"
  return c
