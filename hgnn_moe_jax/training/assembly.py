"""From a config and a corpus to the pieces that a run consists of."""

import functools
import math
from typing import Any, NamedTuple

import jax
import optax

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.control.base import Controller
from hgnn_moe_jax.control.constant import constant
from hgnn_moe_jax.control.schedules import linear_warmup
from hgnn_moe_jax.data.corpus import Corpus
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.models.language_model import LanguageModel
from hgnn_moe_jax.orthogonality import outputs, weights
from hgnn_moe_jax.training import optimizer as optimizers
from hgnn_moe_jax.training import step
from hgnn_moe_jax.training.state import TrainState


class Assembly(NamedTuple):
  """Attributes:
  total_steps: length of the run.
  abstract_state: shapes and dtypes of the TrainState.
  parameters: number of trained scalars.
  """

  model: LanguageModel
  optimizer: optax.GradientTransformation
  controller: Controller
  learning_rate: optax.Schedule
  total_steps: int
  abstract_state: TrainState
  parameters: int


def assemble(config: Config, corpus: Corpus) -> Assembly:
  """Builds everything without allocating any parameter."""
  o = config.orthogonality
  total = total_steps(config, corpus.splits["train"].examples.num_examples)
  model = language_model.build(
    config.model,
    corpus.tokenizer.vocab_size,
    measure=functools.partial(outputs.update_overlap, form=o.output_form),
    remat=config.training.remat,
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  learning_rate = optimizers.learning_rate_schedule(config.training, total)
  optimizer = optimizers.build(config.training, learning_rate, params)
  controller = constant(
    o.weight_strength, o.output_strength, config.model.num_layers, linear_warmup(o.warmup_steps)
  )
  state = jax.eval_shape(lambda: step.init_state(model, optimizer, controller, config.seed))
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  return Assembly(model, optimizer, controller, learning_rate, total, state, parameters)


def total_steps(config: Config, num_examples: int) -> int:
  """The run's length: training.steps, or training.epochs of ceil(examples / batch size) steps."""
  if config.training.steps:
    return config.training.steps
  return max(
    1, round(config.training.epochs * math.ceil(num_examples / config.training.batch_size))
  )


def chance_levels(config: Config, assembly: Assembly) -> dict[str, Any]:
  """What each specialization score is for independent random experts of this size."""
  params = assembly.abstract_state.params
  target = config.orthogonality.weight_target
  roles = jax.eval_shape(lambda p: assembly.model.expert_matrices(p, target), params)
  return {
    "weight_specialization": weights.weight_specialization_chance(roles),
    "output_specialization": outputs.output_specialization_chance(config.model.embed_dim),
  }
