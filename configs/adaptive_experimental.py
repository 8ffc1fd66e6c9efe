"""The seed's experimental settings: exponential decay, quicker adaptation, a stronger boost.

python -m hgnn_moe_jax.main --config=configs/adaptive_experimental.py

Shows: the adaptive law far from its defaults: base 0.08, strength falling by 0.6 from layer to
layer, a correction every 250 steps, an emergency boost of 2.5. D384 L4 E4, one GPU.
Result: not measured; needs a GPU for a sensible time.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="adaptive_experimental")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 384, 4, 6
  c.model.num_experts, c.model.coupler = 4, "graph"
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.adaptive.controller, c.adaptive.decay_schedule = "adaptive", "exponential"
  c.adaptive.initial_strength, c.adaptive.adaptation_frequency = 0.08, 250
  c.adaptive.deeper_layer_scaling, c.adaptive.boost_multiplier = 0.6, 2.5
  c.training.epochs, c.training.batch_size = 8, 32
  c.training.learning_rate, c.training.warmup_steps = 5e-4, 200
  return c
