"""Graph-coupled experts with the output penalty as a constraint: the nuPI controller.

python -m hgnn_moe_jax.main --config=configs/adaptive_feedback.py

Shows: feedback that asks for an output specialization of 0.9 and otherwise leaves the experts
alone: where the constraint is inactive the strength falls to 0, slowly. Its gains are a seventh of
the defaults, which suit a maximum strength above 1; here it is 0.3.
Result: validation token perplexity 176.5 ± 2.2, word 812.3 at 400 steps, 3 seeds; 174.6 ± 2.6
and 801.3 without a penalty. docs/adaptive-orthogonality.md has the comparison.
"""

from hgnn_moe_jax.config import Config


def get_config() -> Config:
  c = Config(name="adaptive_feedback")
  c.model.embed_dim, c.model.num_layers, c.model.num_heads = 128, 2, 4
  c.model.dropout = 0.0  # half a pass over the text: nothing to overfit
  c.data.source, c.data.path, c.data.name = "hf", "Salesforce/wikitext", "wikitext-2-v1"
  c.data.rows = "lines"
  c.data.tokenizer, c.data.vocab_size = "bpe", 8192
  c.training.steps, c.training.batch_size = 600, 16
  c.training.learning_rate, c.training.warmup_steps = 4e-3, 60
  c.model.num_experts, c.model.coupler = 4, "graph"
  c.orthogonality.warmup_steps = 60
  c.adaptive.controller, c.adaptive.decay_schedule = "feedback", "none"
  c.adaptive.signal = c.adaptive.objective = "output"
  c.adaptive.target_specialization, c.adaptive.minimum_strength = 0.9, 0.0
  c.adaptive.proportional_gain, c.adaptive.integral_gain = 0.3, 0.0015
  return c
