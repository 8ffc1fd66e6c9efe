"""The seed's advanced experiment: hypergraph, 6 experts, D512 L6, target 0.97. One large GPU.

python -m hgnn_moe_jax.main --config=configs/adaptive_advanced.py

Shows: the adaptive law with every reaction on, layer by layer, on the seed's largest model.
Result: not measured; needs a GPU.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="adaptive_advanced")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 512, 6, 8
  c.model.num_experts, c.model.coupler = 6, "hypergraph"
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.adaptive.controller, c.adaptive.target_specialization = "adaptive", 0.97
  c.adaptive.layer_specific = c.adaptive.performance_aware = c.adaptive.emergency_boost = True
  c.training.epochs, c.training.batch_size = 8, 32
  c.training.learning_rate, c.training.warmup_steps = 5e-4, 200
  return c
