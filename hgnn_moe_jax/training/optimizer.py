"""Optimizer, learning-rate schedule, weight-decay mask and parameter average, all from optax."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from hgnn_moe_jax.config import TrainingConfig
from hgnn_moe_jax.errors import ConfigError, UserError
from hgnn_moe_jax.layout import each_device, on_mesh, share_out, shared_out

# What decays, by parameter path. Each parameter must match exactly one rule, so that a new one
# cannot slip through undecided.
_DECAY_RULES = (
  (r"embedding|positions|head", True),
  (r".*kernel(_\d+)?", True),
  (r".*(scale|bias)", False),
  (r".*/(adjacency|mixing|hyperedge_weight)", False),
)

# Which matrices Muon orthogonalizes, with their input and output axes; other axes (layers, experts,
# the three of qkv) are a batch of matrices. Embeddings, head and small parameters go to Adam, with
# Nesterov's momentum (Dozat 2016) as optax has it.
_MUON_RULES = (
  (r"layers/experts/qkv_kernel", (2,), (4, 5)),
  (r"layers/experts/(out|ffn_in|ffn_out)_kernel", (2,), (3,)),
  (r"layers/coupler/(in|out)_kernel_\d+", (1,), (2,)),
  (r"layers/coupler/operator_\d+/(query|key)_kernel", (1,), (2,)),
)

# Gives Muon's updates the root mean square of Adam's, so that both share one learning rate
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


class AverageState(NamedTuple):
  """`ema_params`: moving average of the parameters; `count`: updates seen, int32."""

  ema_params: Any
  count: jax.Array


def learning_rate_schedule(config: TrainingConfig, total_steps: int) -> optax.Schedule:
  """step -> learning rate over a run of `total_steps`; see TrainingConfig for the shapes.

  Raises:
    ConfigError: the warm-up is longer than the run, or the final rate is above the peak.
  """
  peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
  if warmup >= total_steps and warmup:
    raise ConfigError(
      "training.warmup_steps", warmup, f"use less than the run's {total_steps} steps"
    )
  if config.schedule != "constant" and final > peak:
    raise ConfigError(
      "training.final_learning_rate", final, f"use at most training.learning_rate={peak}"
    )
  rest = total_steps - warmup
  if config.schedule == "cosine":
    main = optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0)
  elif config.schedule == "wsd":
    decay = max(1, round(config.decay_fraction * total_steps))
    decay = min(decay, rest)
    stable = optax.constant_schedule(peak)
    fall = optax.linear_schedule(peak, final, decay)
    main = optax.join_schedules([stable, fall], [rest - decay])
  else:
    main = optax.constant_schedule(peak)
  if not warmup:
    return main
  # The first step already moves: the rate is peak / warmup there, and peak at step `warmup`.
  rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
  return optax.join_schedules([rise, main], [warmup])


def parameter_average(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters as they are after the update.

  The decay is min(decay, (1 + t) / (10 + t)), so that the first values do not linger.
  """

  def init(params):
    return AverageState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    t = state.count.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    if params is None:
      raise ValueError("parameter_average needs the parameters; pass them to update")
    new_params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: d * e + (1.0 - d) * p, state.ema_params, new_params)
    return updates, AverageState(ema, state.count + 1)

  return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any, params: Any) -> Any:
  """The moving average if the optimizer keeps one, else the parameters themselves."""
  nodes = jax.tree.leaves(opt_state, is_leaf=lambda n: isinstance(n, AverageState))
  averages = [n.ema_params for n in nodes if isinstance(n, AverageState)]
  return averages[0] if averages else params


def build(config: TrainingConfig, schedule: optax.Schedule, params: Any) -> Any:
  """Clipping, AdamW or Muon, decoupled weight decay, schedule, parameter average.

  Args:
    config: validated.
    schedule: from `learning_rate_schedule`.
    params: arrays or shapes; fixes which parameters decay and which Muon takes.

  Returns:
    optax.GradientTransformation.
  """
  parts = []
  if config.clip_norm:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  if config.optimizer == "adamw":
    parts += [optax.scale_by_adam(config.beta1, config.beta2), optax.scale(-1.0)]
  else:
    parts.append(_muon(config, params))
  # The direction is downhill by now, and decay points the same way.
  parts.append(optax.add_decayed_weights(-config.weight_decay, mask=decay_mask(params)))
  parts.append(optax.scale_by_schedule(schedule))
  if config.ema_decay:
    parts.append(parameter_average(config.ema_decay))
  return optax.chain(*parts)


def decay_mask(params: Any) -> Any:
  """A tree of bools like `params`. Raises UserError if a parameter fits no rule or several."""

  def decide(path, _):
    name = _name(path)
    fits = [decays for pattern, decays in _DECAY_RULES if re.fullmatch(pattern, name)]
    if len(fits) != 1:
      raise UserError(
        f"parameter {name} fits {len(fits)} weight-decay rules, it needs one: let its name end in "
        "kernel if it is to decay, in scale or bias if not"
      )
    return fits[0]

  return jax.tree.map_with_path(decide, params)


def _muon(config: TrainingConfig, params: Any) -> Any:
  """`optax.contrib.muon` at rate 1, whose matrices a mesh shares out."""
  label = lambda path, _: "muon" if _muon_axes(path) else "adam"  # noqa: E731
  matrices = optax.chain(
    _by_matrix(
      optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda updates: jax.tree.map_with_path(
          lambda path, _: _muon_axes(path), updates
        )
      )
    ),
    optax.stateless(lambda updates, _: jax.tree.map_with_path(_like_adams, updates)),
    optax.identity(),  # In the place of optax's decay: checkpoints name a state by its place.
    optax.scale(-1.0),
  )
  adam = optax.adamw(1.0, config.beta1, config.beta2, weight_decay=0.0, nesterov=True)
  return optax.partition({"muon": matrices, "adam": adam}, jax.tree.map_with_path(label, params))


def _muon_axes(path: Any) -> Any:
  """Input and output axes of a parameter's matrices, or None if Muon does not take it."""
  for pattern, reduction, output in _MUON_RULES:
    if re.fullmatch(pattern, _name(path)):
      return optax.contrib.MuonDimensionNumbers(reduction, output)
  return None


def _like_adams(path: Any, update: jax.Array) -> jax.Array:
  """An orthogonal update with the root mean square of `_MUON_RMS`."""
  sides = [math.prod(update.shape[a] for a in axes) for axes in _muon_axes(path)]
  return _MUON_RMS * math.sqrt(max(sides)) * update


def _by_matrix(scale_by_muon: optax.GradientTransformation) -> optax.GradientTransformation:
  """On a mesh each device has some of the matrices, whole.

  The partitioner would split each of them as the parameters are split, and sum over devices in
  every product of the iteration.
  """

  def update(updates, state, params=None):
    del params
    if not on_mesh():
      return scale_by_muon.update(updates, state)

    def moved(tree: Any, back: bool = False) -> Any:
      return jax.tree.map_with_path(lambda path, x: share_out(x, _batch_axes(path), back), tree)

    split = jax.tree.map_with_path(
      lambda path, x: shared_out(x.shape, _batch_axes(path))[-1], updates
    )
    states_split = optax.contrib.MuonState._make((PartitionSpec(), split, PartitionSpec()))
    own = each_device(scale_by_muon.update, (split, states_split), (split, states_split))
    updates, state = own(moved(updates), state._replace(mu=moved(state.mu)))
    return moved(updates, back=True), state._replace(mu=moved(state.mu, back=True))

  return optax.GradientTransformation(scale_by_muon.init, update)


def _batch_axes(path: Any) -> tuple[int, ...]:
  """Of experts, if the matrices are theirs, and of layers."""
  of_matrix = [axis for axes in _muon_axes(path) for axis in axes]
  return tuple(axis for axis in (1, 0) if axis not in of_matrix)


def _name(path: Any) -> str:
  return "/".join(key.key for key in path)
