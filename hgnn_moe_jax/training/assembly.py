"""From a config and a corpus to the pieces that a run consists of."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from hgnn_moe_jax import extensions, sharding
from hgnn_moe_jax.config import Config, DataConfig, EvaluationConfig, with_fields
from hgnn_moe_jax.control import schedules, strategies
from hgnn_moe_jax.control.adaptive import adaptive
from hgnn_moe_jax.control.base import Controller
from hgnn_moe_jax.control.constant import constant
from hgnn_moe_jax.control.feedback import feedback
from hgnn_moe_jax.control.pairs import pairwise
from hgnn_moe_jax.control.supervision import make_actuator, make_watch
from hgnn_moe_jax.data.corpus import Corpus
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.models.language_model import LanguageModel
from hgnn_moe_jax.orthogonality import outputs, weights
from hgnn_moe_jax.training import optimizer as optimizers
from hgnn_moe_jax.training import step
from hgnn_moe_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class Assembly:
  """The pieces, and the functions made of them, which are traced and compiled when first used.

  Attributes:
    config: what they are made from; fields that the run alone reads are blank.
    total_steps: length of the run.
    fill: the token id that pads.
    abstract_state: shapes and dtypes of the TrainState, and on a mesh shardings.
    parameters: number of trained scalars.
  """

  config: Config
  model: LanguageModel
  optimizer: optax.GradientTransformation
  controller: Controller
  learning_rate: optax.Schedule
  total_steps: int
  fill: int
  abstract_state: TrainState
  parameters: int
  mesh: Mesh | None

  @functools.cached_property
  def init_state(self) -> Callable[[int], TrainState]:
    """init_state(seed), see `step.make_init`."""
    init = step.make_init(self.model, self.optimizer, self.controller, self.shardings)
    return lambda seed: init(np.uint32(seed))

  @functools.cached_property
  def train_step(self) -> step.TrainStep:
    """See `step.make_train_step`."""
    return step.make_train_step(
      self.model, self.optimizer, self.controller, self.learning_rate, self.config
    )

  @functools.cached_property
  def dispatch(self) -> Any:
    """Jitted, see `step.make_dispatch`."""
    where = None if self.mesh is None else (self.shardings, sharding.replicated(self.mesh))
    size, length = self.config.training.steps_per_dispatch, self.config.model.max_length
    return step.make_dispatch(self.train_step, size, length, self.fill, where)

  @property
  def shardings(self) -> Any:
    """Of the TrainState; None without a mesh."""
    if self.mesh is None:
      return None
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)


def assemble(config: Config, corpus: Corpus, mesh: Mesh | None = None) -> Assembly:
  """Builds everything without allocating any parameter.

  Runs that differ in their seed, text or folder only share one Assembly, and with it all that this
  process has traced and compiled.
  """
  total = total_steps(config, corpus.splits["train"].examples.num_examples)
  tokenizer = corpus.tokenizer
  return assemble_sized(config, tokenizer.vocab_size, total, mesh, tokenizer.end_of_text)


# What no traced function depends on.
_OF_THE_RUN = {
  "name": "",
  "seed": 0,
  "data": DataConfig(),
  "evaluation": EvaluationConfig(),
  "training.log_every": 1,
  "training.checkpoint_every": 1,
  "training.keep_checkpoints": 1,
  "training.tensorboard": False,
  "training.wandb_project": "",
}


def assemble_sized(
  config: Config, vocab_size: int, total: int, mesh: Mesh | None = None, fill: int = 0
) -> Assembly:
  """As `assemble`, for a run whose text is not at hand.

  Args:
    config: of the run.
    vocab_size: V.
    total: its length in steps.
    mesh: the devices of the run; None for one.
    fill: the token id that pads.
  """
  config = with_fields(config, _OF_THE_RUN)  # A copy, which nobody will change.
  named = extensions.fields(config)
  brought = tuple(
    _Itself(extensions.load(field, name))
    for field, name in named.items()
    if extensions.is_path(name)
  )
  return _assembled(config, vocab_size, total, mesh, fill, brought)


class _Itself:
  """An object that equals itself only: that of a module which was loaded again is another."""

  def __init__(self, part: Any):
    self._part = part

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Itself) and self._part is other._part

  def __hash__(self) -> int:
    return id(self._part)


@functools.lru_cache(maxsize=8)
def _assembled(
  config: Config,
  vocab_size: int,
  total: int,
  mesh: Mesh | None,
  fill: int,
  brought: tuple[_Itself, ...],
) -> Assembly:
  del brought  # They are looked up where they are needed.
  model = build_model(config, vocab_size)
  params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
  learning_rate = optimizers.learning_rate_schedule(config.training, total)
  optimizer = optimizers.build(config.training, learning_rate, params)
  controller = make_controller(config, total)
  state = jax.eval_shape(step.make_init(model, optimizer, controller), np.uint32(0))
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  if mesh is not None:
    where = sharding.parameter_shardings(mesh, config.mesh.fsdp, model.axes(), params)
    state = sharding.with_shardings(state, sharding.state_shardings(mesh, state, params, where))
  return Assembly(
    config=config,
    model=model,
    optimizer=optimizer,
    controller=controller,
    learning_rate=learning_rate,
    total_steps=total,
    fill=fill,
    abstract_state=state,
    parameters=parameters,
    mesh=mesh,
  )


def build_model(config: Config, vocab_size: int) -> LanguageModel:
  """The config's model, whose layers measure the overlap of their experts' updates."""
  form = extensions.resolve("orthogonality.output_form", config.orthogonality.output_form)
  return language_model.build(
    config.model,
    vocab_size,
    measure=functools.partial(outputs.update_overlap, form=form),
    remat=config.training.remat,
  )


def make_controller(config: Config, total_steps: int) -> Controller:
  """The controller that `config.adaptive` describes, over a run of `total_steps`."""
  controller = _layer_controller(config, total_steps)
  emphasis, m = config.adaptive.pair_emphasis, config.model
  if not emphasis:
    return controller
  return pairwise(controller, m.num_layers, m.num_experts, emphasis)


def _layer_controller(config: Config, total_steps: int) -> Controller:
  """Sets a strength per layer.

  Every controller's strengths rise over orthogonality.warmup_steps; feedback's set-point does. A
  penalty that the controller does not drive has its strength of `orthogonality` from then on.
  """
  a, o = config.adaptive, config.orthogonality
  warmup = schedules.linear_warmup(o.warmup_steps)
  if a.controller == "constant":
    return constant(o.weight_strength, o.output_strength, config.model.num_layers, warmup)
  watch = make_watch(
    config.model.num_layers,
    signal=a.signal,
    layer_specific=a.layer_specific,
    target=a.target_specialization,
    tolerance=a.specialization_tolerance,
    performance_window=a.performance_window,
    collapse_threshold=a.collapse_threshold,
    emergency_window=a.emergency_window,
    grace=a.emergency_grace,
  )
  other = {"weight": o.output_strength, "output": o.weight_strength, "both": 0.0}[a.objective]
  actuator = make_actuator(a.objective, a.minimum_strength, a.maximum_strength, other, warmup)
  schedule = schedules.product(
    warmup, schedules.decay(a.decay_schedule, total_steps, a.decay_floor)
  )
  boost = {"emergency_boost": a.emergency_boost, "boost_multiplier": a.boost_multiplier}
  if a.controller == "feedback":
    return feedback(
      watch,
      actuator,
      schedule,
      integral_gain=a.integral_gain,
      proportional_gain=a.proportional_gain,
      filtering=a.error_filtering,
      **boost,
    )
  plan = (watch, actuator, schedule, a.initial_strength, a.deeper_layer_scaling)
  if extensions.is_path(a.controller):
    return extensions.load("adaptive.controller", a.controller)(*plan)
  if a.controller == "schedule":
    return strategies.scheduled(*plan)
  if a.controller == "convergence":
    return strategies.convergence(*plan, **boost)
  if a.controller == "performance":
    return strategies.performance(*plan, **boost)
  return adaptive(
    *plan,
    performance_aware=a.performance_aware,
    adaptation_frequency=a.adaptation_frequency,
    **boost,
  )


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
