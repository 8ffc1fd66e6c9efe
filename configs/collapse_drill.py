"""The run that the collapse drill damages: D128 L2 E4, graph coupler, the output penalty.

python -m hgnn_moe_jax.analysis.collapse_drill --config=configs/collapse_drill.py

Shows: what brings experts apart again after all of them were made copies of one. The drill sets
the controller; the gains are those of adaptive_feedback, which is the only one to read them.
Result: see docs/collapse-drill.md.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="collapse_drill")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 128, 2, 4
  c.model.num_experts, c.model.coupler = 4, "graph"
  c.model.dropout = 0.0  # half a pass over the text: nothing to overfit
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.data.tokenizer, c.data.vocab_size = "bpe", 8192
  c.training.steps, c.training.batch_size = 800, 16
  c.training.learning_rate, c.training.warmup_steps = 4e-3, 60
  c.orthogonality.warmup_steps = 60
  c.adaptive.signal = c.adaptive.objective = "output"
  c.adaptive.target_specialization = 0.9
  c.adaptive.proportional_gain, c.adaptive.integral_gain = 0.3, 0.0015
  c.evaluation.every = 300
  return c
