"""What a run is, at one moment: arrays only, one pytree, saved whole."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
  """Attributes:
  step: optimizer steps taken, int32 scalar.
  params: the model's parameters, float32.
  opt_state: optax's, with the parameter average if there is one.
  control: the controller's state.
  key: typed PRNG key of the run; step t's dropout uses fold_in(key, t). Never changes.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  control: Any
  key: jax.Array


class StepRecord(NamedTuple):
  """What one step measured. Scalars are float32; [L] arrays have one entry per layer.

  The strengths are those that acted in this step; the gradient norm is that before clipping.
  """

  loss: jax.Array
  lm_loss: jax.Array
  weight_penalty: jax.Array  # [L]
  output_penalty: jax.Array  # [L]
  weight_strength: jax.Array  # [L]
  output_strength: jax.Array  # [L]
  weight_pairs: jax.Array | None  # [L, E, E] factor of each pair, or None: all alike
  output_pairs: jax.Array | None  # [L, E, E]
  weight_specialization: jax.Array  # [L]
  output_specialization: jax.Array  # [L]
  effective_experts: jax.Array  # [L]
  emergency: jax.Array  # [L] bool
  plateau: jax.Array  # bool
  converged: jax.Array  # [L] bool
  gate_load: jax.Array  # [L, E]
  gate_entropy: jax.Array  # [L]
  ffn_load: jax.Array  # [L, E]
  balance: jax.Array  # [L]
  grad_norm: jax.Array
  learning_rate: jax.Array
  tokens: jax.Array  # scored targets
