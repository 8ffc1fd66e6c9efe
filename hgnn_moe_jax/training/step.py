"""One optimizer step, and the compiled function that takes several in one dispatch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hgnn_moe_jax import device, extensions
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.control.base import Controller, Observation, Strengths
from hgnn_moe_jax.data.examples import Batch, Examples, gather
from hgnn_moe_jax.layout import as_they_lie, constrain
from hgnn_moe_jax.models.language_model import LanguageModel, Params
from hgnn_moe_jax.orthogonality import gram, outputs, weights
from hgnn_moe_jax.training.state import StepRecord, TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepRecord]]


class DataTerm(NamedTuple):
  """What one pass over a batch, or over a part of it, gives."""

  lm_loss: jax.Array
  output_overlap_LEE: jax.Array
  output_penalty_L: jax.Array
  output_specialization_L: jax.Array
  effective_experts_L: jax.Array
  gate_load_LE: jax.Array
  gate_entropy_L: jax.Array
  ffn_load_LE: jax.Array
  balance_L: jax.Array


class WeightTerm(NamedTuple):
  overlap_LEE: jax.Array
  penalty_L: jax.Array
  specialization_L: jax.Array


def make_init(
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  controller: Controller,
  shardings: Any = None,
) -> Callable[[jax.Array | np.uint32], TrainState]:
  """init(seed) -> the state at step 0, in one jitted call so that no two leaves share a buffer.

  The seed is an argument, not a constant: one compiled program serves every seed.

  Args:
    model, optimizer, controller: what it is the state of.
    shardings: a tree like the state; its numbers do not depend on it.
  """

  def init(seed: jax.Array) -> TrainState:
    init_key, key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      control=controller.init(),
      key=key,
    )

  options = device.initialization_options()
  return jax.jit(init, out_shardings=shardings, compiler_options=options)


def make_train_step(
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  controller: Controller,
  learning_rate: optax.Schedule,
  config: Config,
) -> TrainStep:
  """train_step(state, batch) -> (state, StepRecord), pure and jittable.

  loss = cross-entropy per scored token + sum over layers of weight strength x weight penalty
  + sum over layers of output strength x output penalty, and where tokens select experts balance
  strength x sum over layers of balance; each strength acts once. The controller's strengths come
  from the control state before the step, and what the step measures goes into the state
  after it.
  """
  o, rounds = config.orthogonality, config.training.accumulation
  penalise_weights, penalise_outputs = config.penalties()
  balance_strength = config.model.balance_strength if config.model.selected_experts else 0.0
  weight_form = extensions.resolve("orthogonality.weight_form", o.weight_form)
  output_form = extensions.resolve("orthogonality.output_form", o.output_form)

  def data_loss(params, batch, strengths, total, share, key):
    """Of a round that has `share` of the step's `total` tokens: terms add up over the rounds."""
    x_BTD, aux = model.features(params, batch.inputs_BT, batch.weights_BT, key)
    nll = model.loss(params, x_BTD, batch.targets_BT, batch.weights_BT)
    overlap = aux.measured
    term = DataTerm(
      lm_loss=nll / total,
      output_overlap_LEE=overlap.overlap_EE * share,
      output_penalty_L=outputs.output_penalty(
        _by_pair(overlap.overlap_EE, strengths.output_pairs_LEE), overlap.scale_E, output_form
      )
      * share,
      output_specialization_L=outputs.output_specialization(overlap.absolute_cosine_EE) * share,
      effective_experts_L=gram.effective_experts(overlap.cosine_EE) * share,
      gate_load_LE=aux.gate_load_LE * share,
      gate_entropy_L=aux.gate_entropy_L * share,
      ffn_load_LE=aux.ffn_load_LE * share,
      balance_L=aux.balance_L * share,
    )
    loss = term.lm_loss
    if penalise_outputs:
      loss = loss + jnp.sum(_after(loss, strengths.output_L) * term.output_penalty_L)
    if balance_strength:
      loss = loss + balance_strength * jnp.sum(term.balance_L)
    return loss, term

  @jax.named_scope("orthogonality")
  def weight_loss(params, strengths):
    roles, stored = (model.expert_matrices(params, o.weight_target, s) for s in (False, True))
    found = weights.compare(roles, stored, weight_form, o.subspace_rank)
    term = WeightTerm(
      overlap_LEE=found.overlap_LEE,
      penalty_L=gram.off_diagonal_mean(_by_pair(found.overlap_LEE, strengths.weight_pairs_LEE)),
      specialization_L=found.specialization_L,
    )
    return jnp.sum(strengths.weight_L * term.penalty_L), term

  def data_gradient(params, batch, strengths, key):
    """Gradient and DataTerm of the whole batch, in `rounds` parts one after the other."""
    total = jnp.maximum(batch.weights_BT.sum(), 1.0)
    gradient = jax.grad(data_loss, has_aux=True)
    if rounds == 1:
      return gradient(params, batch, strengths, total, 1.0, key)
    # Every rounds-th row: a round then has its part of every device's rows.
    parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, rounds, *a.shape[1:]), 0, 1), batch)

    # Measures are weighed by tokens: a round that has none would dilute them, as if experts had
    # collapsed. Where no round has any, all weigh the same.
    tokens_r = parts.weights_BT.sum((1, 2))
    share_r = jnp.where(tokens_r.sum() > 0, tokens_r / total, 1 / rounds)

    def part_gradient(xs):
      part, share, part_key = xs
      return gradient(params, part, strengths, total, share, part_key)

    def add_part(carry, xs):
      return jax.tree.map(jnp.add, carry, part_gradient(xs)), None

    keys = None if key is None else jax.random.split(key, rounds)
    by_round = (parts, share_r, keys)
    shapes = jax.eval_shape(part_gradient, jax.tree.map(lambda a: a[0], by_round))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add_part, zeros, by_round)[0]

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepRecord]:
    strengths: Strengths = jax.lax.stop_gradient(controller.strengths(state.control))
    key = jax.random.fold_in(state.key, state.step) if config.model.dropout else None
    grads, data = data_gradient(state.params, batch, strengths, key)
    if penalise_weights:
      waiting = strengths._replace(weight_L=_after(grads["embedding"], strengths.weight_L))
      weight_grads, weight = jax.grad(weight_loss, has_aux=True)(state.params, waiting)
      grads = jax.tree.map(jnp.add, grads, weight_grads)
    else:
      _, weight = weight_loss(state.params, strengths)
    with jax.named_scope("optimizer"):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    flags = controller.flags(state.control)
    observation = Observation(
      step=state.step,
      weight_specialization_L=weight.specialization_L,
      output_specialization_L=data.output_specialization_L,
      effective_experts_L=data.effective_experts_L,
      lm_loss=data.lm_loss,
      weight_overlap_LEE=weight.overlap_LEE,
      output_overlap_LEE=data.output_overlap_LEE,
    )
    # A measure that is not finite is no part of the loss where nothing is penalised.
    terms = [data.lm_loss]
    if penalise_weights:
      terms.append(jnp.sum(strengths.weight_L * weight.penalty_L))
    if penalise_outputs:
      terms.append(jnp.sum(strengths.output_L * data.output_penalty_L))
    if balance_strength:
      terms.append(balance_strength * jnp.sum(data.balance_L))
    record = StepRecord(
      loss=sum(terms[1:], terms[0]),
      lm_loss=data.lm_loss,
      weight_penalty=weight.penalty_L,
      output_penalty=data.output_penalty_L,
      weight_strength=strengths.weight_L,
      output_strength=strengths.output_L,
      weight_pairs=strengths.weight_pairs_LEE,
      output_pairs=strengths.output_pairs_LEE,
      weight_specialization=weight.specialization_L,
      output_specialization=data.output_specialization_L,
      effective_experts=data.effective_experts_L,
      emergency=flags.emergency_L,
      plateau=flags.plateau,
      converged=flags.converged_L,
      gate_load=data.gate_load_LE,
      gate_entropy=data.gate_entropy_L,
      ffn_load=data.ffn_load_LE,
      balance=data.balance_L,
      grad_norm=optax.tree.norm(grads),
      learning_rate=jnp.asarray(learning_rate(state.step), jnp.float32),
      tokens=batch.weights_BT.sum(),
    )
    with jax.named_scope("control"):
      control = controller.update(state.control, observation)
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      control=control,
      key=state.key,
    )
    return new_state, record

  return train_step


def _after(first: jax.Array, strength_L: jax.Array) -> jax.Array:
  """The strength, from which nothing can be made before the first is there.

  A penalty's gradient waits for little, and XLA for GPUs makes it at once and keeps it: that of the
  weights, as large as all experts, from the start of a step to its end. The last gradient that the
  rest of the loss gives is the embedding's.
  """
  return jax.lax.optimization_barrier(jax.lax.stop_gradient((first, strength_L)))[1]


def _by_pair(overlap_LEE: jax.Array, pairs_LEE: jax.Array | None) -> jax.Array:
  return overlap_LEE if pairs_LEE is None else overlap_LEE * pairs_LEE


class Feed(NamedTuple):
  """The batches of up to K steps: their examples' indices, or the batches themselves.

  Attributes:
    examples: on the device, or None if `batches` has the data.
    indices_KB: int32 [K, B], or None.
    batches: Batch with a leading axis K, or None.
  """

  examples: Examples | None
  indices_KB: Any
  batches: Batch | None


@jax.named_scope("input")
def pick(feed: Feed, k: jax.Array | int, max_length: int, fill: int) -> Batch:
  """Batch k of the feed, gathered on the device if the tokens lie there."""
  if feed.examples is None:
    batch = jax.tree.map(lambda a: a[k], feed.batches)
  else:
    batch = gather(feed.examples, feed.indices_KB[k], max_length, fill)
  return jax.tree.map(lambda a: constrain(a, "data", None), batch)


def make_dispatch(
  train_step: TrainStep, max_steps: int, max_length: int, fill: int, shardings: Any = None
) -> Callable[[TrainState, Feed, Any], tuple[TrainState, StepRecord]]:
  """dispatch(state, feed, n) -> (state, records): n <= max_steps steps in one call.

  n is traced: whatever number of steps a dispatch takes, the same compiled loop body takes them,
  so results cannot depend on it. Records have a leading axis of max_steps, of which n are filled.
  The state's buffers are reused.

  Args:
    train_step: of `make_train_step`.
    max_steps: K.
    max_length: T.
    fill: the id that pads.
    shardings: of (state, records), on a mesh.
  """
  specs = None if shardings is None else jax.tree.map(lambda s: s.spec, shardings[0].params)

  @jax.jit  # Traced once, for the records' shapes and for the loop.
  def step(state: TrainState, feed: Feed, k: jax.Array) -> tuple[TrainState, StepRecord]:
    return train_step(state, pick(feed, k, max_length, fill))

  def dispatch(state: TrainState, feed: Feed, n: jax.Array) -> tuple[TrainState, StepRecord]:
    _, shapes = jax.eval_shape(step, state, feed, n)
    records = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), shapes)

    def body(k, carry):
      state, records = carry
      # The positions are added to all rows: told how they lie, XLA lays vectors out with rows last.
      params = as_they_lie(state.params, specs, free=("positions",))
      state = state._replace(params=params)
      state, record = step(state, feed, k)
      records = jax.tree.map(lambda all_, one: all_.at[k].set(one), records, record)
      return state, records

    # A bare 0 would make k weakly typed, which is another type than n's: another trace.
    return jax.lax.fori_loop(jnp.zeros_like(n), n, body, (state, records))

  options = device.compiler_options()
  return jax.jit(dispatch, donate_argnums=0, out_shardings=shardings, compiler_options=options)


@functools.lru_cache(maxsize=8)  # The same function again, so that JAX finds what it has compiled.
def make_evaluation(
  model: LanguageModel, max_batches: int, max_length: int, fill: int, sharding: Any = None
) -> Callable[[Params, Feed, Any], jax.Array]:
  """evaluate(params, feed, n) -> [max_batches] float32: each batch's weighted loss, nats.

  On a mesh, `sharding` is the result's.
  """

  def evaluate(params: Params, feed: Feed, n: jax.Array) -> jax.Array:
    def body(k, losses_K):
      batch = pick(feed, k, max_length, fill)
      x_BTD, _ = model.features(params, batch.inputs_BT, batch.weights_BT, None)
      return losses_K.at[k].set(model.loss(params, x_BTD, batch.targets_BT, batch.weights_BT))

    return jax.lax.fori_loop(0, n, body, jnp.zeros(max_batches))

  return jax.jit(evaluate, out_shardings=sharding, compiler_options=device.compiler_options())


def as_count(n: int) -> np.ndarray:
  """A loop count as a strongly typed scalar, so that every call has the same signature."""
  return np.asarray(n, np.int32)
