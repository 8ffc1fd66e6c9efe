"""Graph-coupled experts on WikiText-2 with adaptive weight orthogonality. D384 L4 E4, one GPU.

python -m hgnn_moe_jax.main --config=configs/adaptive.py

Shows: the main experiment, the adaptive law with cosine decay on the weight penalty.
Result: not measured; needs a GPU for a sensible time.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="adaptive")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 384, 4, 6
  c.model.num_experts, c.model.coupler = 4, "graph"
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.adaptive.controller, c.adaptive.decay_schedule = "adaptive", "cosine"
  c.training.epochs, c.training.batch_size = 8, 32
  c.training.learning_rate, c.training.warmup_steps = 5e-4, 200
  return c
