"""One step against a naive twin, and many steps in one dispatch against one at a time."""

import contextlib
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from hgnn_moe_jax import sharding
from hgnn_moe_jax.control.base import Controller, Strengths
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.data.examples import Batch
from hgnn_moe_jax.orthogonality import outputs, weights
from hgnn_moe_jax.training import loop
from hgnn_moe_jax.training.optimizer import averaged_params
from hgnn_moe_jax.training.state import TrainState
from hgnn_moe_jax.training.step import Feed, as_count, make_dispatch, make_train_step

RATE = 0.5
T = 16


class Pieces(NamedTuple):
  """A config's parts, with plain gradient descent: params_0 - params_1 = RATE x gradient."""

  config: Any
  assembly: Any
  state: Any
  step: Any


@pytest.fixture
def plain_step(tiny_config):
  """plain_step(**changes) -> Pieces of a step without dropout; compiled once per meaning."""

  def build(**changes) -> Pieces:
    config = tiny_config(**{"model.dropout": 0.0, "training.ema_decay": 0.0} | changes)
    a = loop.assemble(config, load_corpus(config))
    descent = optax.sgd(RATE)
    state = a.init_state(3)
    state = state._replace(opt_state=descent.init(state.params))
    step = make_train_step(a.model, descent, a.controller, a.learning_rate, config)
    return Pieces(config, a, state, jax.jit(step))

  return build


def batch_of(rows: int, seed: int = 0, lengths: Any = None) -> Batch:
  rng = np.random.default_rng(seed)
  lengths = np.full(rows, T) if lengths is None else np.asarray(lengths)
  return Batch(
    rng.integers(0, 257, (rows, T)).astype(np.int32),
    rng.integers(0, 257, (rows, T)).astype(np.int32),
    (np.arange(T)[None] < lengths[:, None]).astype(np.float32),
  )


def gradient_of(pieces: Pieces, state: Any, batch: Batch) -> Any:
  after, _ = pieces.step(state, batch)
  return descended(state, after)


def descended(before: Any, after: Any) -> Any:
  """The gradient by which one state became the other, in numpy: many shapes, an operation each."""
  return jax.tree.map(
    lambda a, b: (np.asarray(a) - np.asarray(b)) / np.float32(RATE), before.params, after.params
  )


def assert_close(a: Any, b: Any, tolerance: float) -> None:
  scale = math.sqrt(sum(float(np.sum(np.square(np.asarray(x)))) for x in jax.tree.leaves(b)))
  for (path, x), y in zip(
    jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))


def naive_terms(model: Any, params: Any, batch: Batch) -> tuple[Any, Any, Any, Any]:
  """Cross-entropy from the whole logits; penalties per layer, from their own functions; balance."""
  log_p = jax.nn.log_softmax(model.logits(params, batch.inputs_BT))
  chosen_BT = jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
  lm_loss = -jnp.sum(chosen_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)
  _, aux = model.features(params, batch.inputs_BT, batch.weights_BT, None)
  output_L = outputs.output_penalty(aux.measured.overlap_EE, aux.measured.scale_E, "cosine")
  weight_L = jnp.zeros(2)
  for w_LEDK in model.expert_matrices(params, "combined").values():
    vectors_LEX = w_LEDK.reshape(2, 3, -1)
    units_LEX = vectors_LEX / jnp.linalg.norm(vectors_LEX, axis=-1, keepdims=True)
    squared_LEE = jnp.einsum("lex,lfx->lef", units_LEX, units_LEX) ** 2
    weight_L += (squared_LEE.sum((1, 2)) - jnp.trace(squared_LEE, axis1=1, axis2=2)) / 6
  return lm_loss, weight_L, output_L, aux.balance_L


def test_loss_is_the_sum_of_its_terms_once(plain_step):
  """Values and gradients; strengths so large that a term missing or doubled shows."""
  pieces = plain_step(
    **{
      "orthogonality.weight_strength": 3.0,
      "orthogonality.output_strength": 2.0,
      "orthogonality.warmup_steps": 4,
      "model.selected_experts": 1,
      "model.balance_strength": 5.0,
    }
  )
  batch = batch_of(8, lengths=[16, 16, 5, 1, 16, 9, 16, 2])
  model = pieces.assembly.model
  # Half of the warm-up is over, so the strengths are 1.5 and 1.
  halfway = pieces.state._replace(control=pieces.state.control._replace(count=jnp.int32(2)))

  def naive(params, share):
    terms = lm_loss, weight_L, output_L, balance_L = naive_terms(model, params, batch)
    penalties = share * (3.0 * weight_L.sum() + 2.0 * output_L.sum())
    return lm_loss + penalties + 5.0 * balance_L.sum(), terms

  wanted_gradient = jax.jit(jax.value_and_grad(naive, has_aux=True))
  (loss, terms), gradient = wanted_gradient(halfway.params, 0.5)
  _, record = pieces.step(halfway, batch)
  np.testing.assert_allclose(record.loss, loss, rtol=1e-5)
  for got, wanted in zip(
    (record.lm_loss, record.weight_penalty, record.output_penalty, record.balance),
    terms,
    strict=True,
  ):
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
  np.testing.assert_allclose(record.weight_strength, [1.5, 1.5])
  np.testing.assert_allclose(record.output_strength, [1.0, 1.0])
  np.testing.assert_allclose(record.ffn_load.sum(1), [1.0, 1.0], rtol=1e-5)
  assert float(record.tokens) == 81
  assert_close(gradient_of(pieces, halfway, batch), gradient, 2e-5)
  np.testing.assert_allclose(record.grad_norm, optax.tree.norm(gradient), rtol=1e-5)
  # At step 0 the penalties' warm-up has not begun; balance has none.
  _, plain = wanted_gradient(pieces.state.params, 0.0)
  assert_close(gradient_of(pieces, pieces.state, batch), plain, 2e-5)


def test_pairs_weigh_their_overlap_in_the_loss(plain_step):
  """The pair 0, 1 counts three times in the weight penalty, the pair 1, 2 in the output penalty."""
  pieces, batch = plain_step(), batch_of(8)
  model, constant = pieces.assembly.model, pieces.assembly.controller
  weight_pairs, output_pairs = np.zeros((2, 2, 3, 3), np.float32)
  weight_pairs[:, (0, 1), (1, 0)] = output_pairs[:, (1, 2), (2, 1)] = 3.0
  controller = constant._replace(
    strengths=lambda s: Strengths(jnp.ones(2), jnp.ones(2), weight_pairs, output_pairs)
  )
  step = jax.jit(
    make_train_step(model, optax.sgd(RATE), controller, lambda count: 0.1, pieces.config)
  )

  def naive(params):
    lm_loss, *_ = naive_terms(model, params, batch)
    _, aux = model.features(params, batch.inputs_BT, batch.weights_BT, None)
    output_L = aux.measured.overlap_EE[:, 1, 2]
    weight_L = jnp.zeros(2)
    for w_LEDK in model.expert_matrices(params, "combined").values():
      a_LX, b_LX = w_LEDK[:, 0].reshape(2, -1), w_LEDK[:, 1].reshape(2, -1)
      norms_L = jnp.linalg.norm(a_LX, axis=-1) * jnp.linalg.norm(b_LX, axis=-1)
      weight_L += jnp.square(jnp.sum(a_LX * b_LX, axis=-1) / norms_L)
    return lm_loss + weight_L.sum() + output_L.sum(), (weight_L, output_L)

  (loss, (weight_L, output_L)), gradient = jax.jit(jax.value_and_grad(naive, has_aux=True))(
    pieces.state.params
  )
  after, record = step(pieces.state, batch)
  np.testing.assert_allclose(record.loss, loss, rtol=1e-5)
  np.testing.assert_allclose(record.weight_penalty, weight_L, rtol=1e-5)
  np.testing.assert_allclose(record.output_penalty, output_L, rtol=1e-5)
  assert_close(descended(pieces.state, after), gradient, 2e-5)
  np.testing.assert_array_equal(record.weight_pairs, weight_pairs)


@pytest.fixture
def without_penalties(plain_step):
  return plain_step(**{"orthogonality.weight_strength": 0.0, "orthogonality.output_strength": 0.0})


def test_zero_strength_leaves_the_gradient_alone_and_still_measures(without_penalties, plain_step):
  pieces, batch = without_penalties, batch_of(8)
  with_strength = plain_step(
    **{
      "orthogonality.weight_strength": 3.0,
      "orthogonality.output_strength": 2.0,
      "orthogonality.warmup_steps": 4,
    }
  )
  # In its warm-up, the other run's strengths are zero too, but not its program.
  assert_close(
    gradient_of(pieces, pieces.state, batch),
    gradient_of(with_strength, with_strength.state, batch),
    1e-5,
  )
  _, record = pieces.step(pieces.state, batch)
  assert float(record.loss) == float(record.lm_loss)
  assert (np.asarray(record.weight_penalty) > 0).all()
  assert (np.asarray(record.output_penalty) > 0).all()
  roles = pieces.assembly.model.expert_matrices(pieces.state.params, "combined")
  np.testing.assert_allclose(
    record.weight_specialization, weights.weight_specialization(roles), rtol=1e-6
  )


@pytest.fixture
def four(plain_step):
  """As `without_penalties`, in four rounds."""
  return plain_step(
    **{
      "orthogonality.weight_strength": 0.0,
      "orthogonality.output_strength": 0.0,
      "training.accumulation": 4,
    }
  )


def test_accumulation_in_four_rounds_is_one_batch(without_penalties, four):
  """Rounds hold 26, 32, 0 and 2 scored tokens: a mean over rounds would weigh them wrongly."""
  batch = batch_of(8, lengths=[16, 10, 16, 16, 0, 0, 1, 1])
  whole, parts = (
    without_penalties.step(without_penalties.state, batch),
    four.step(four.state, batch),
  )
  assert_close(parts[0].params, whole[0].params, 1e-6)
  for field in ("loss", "lm_loss", "grad_norm"):
    np.testing.assert_allclose(
      getattr(parts[1], field), getattr(whole[1], field), rtol=1e-5, err_msg=field
    )
  assert float(parts[1].tokens) == float(whole[1].tokens) == 60


def test_a_round_without_tokens_has_nothing_to_say(without_penalties, four):
  """All scored tokens are in one of the rounds: what is measured is what one round would."""
  batch = batch_of(8, lengths=[16, 0, 0, 0, 10, 0, 0, 0])
  _, whole = without_penalties.step(without_penalties.state, batch)
  _, parts = four.step(four.state, batch)
  for field in ("output_penalty", "output_specialization", "effective_experts", "gate_entropy"):
    np.testing.assert_allclose(
      getattr(parts, field), getattr(whole, field), rtol=1e-5, err_msg=field
    )
  _, nothing = four.step(four.state, batch_of(8, lengths=[0] * 8))
  assert np.all(np.isfinite(nothing.effective_experts)) and float(nothing.lm_loss) == 0.0


@pytest.mark.parametrize(
  ("weight_strength", "output_strength"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)]
)
def test_penalties_wait(weight_strength, output_strength, plain_step):
  """Their gradients for the rest: of the outputs for the loss, of the weights for all others."""
  pieces = plain_step(
    **{
      "orthogonality.weight_strength": weight_strength,
      "orthogonality.output_strength": output_strength,
    }
  )
  (call,) = jax.make_jaxpr(pieces.step)(pieces.state, batch_of(8)).eqns
  eqns = call.params["jaxpr"].eqns
  # Others than those of a layer's strengths belong to normalisation.
  barriers = [
    e
    for e in eqns
    if e.primitive.name == "optimization_barrier" and e.outvars[-1].aval.shape == (2,)
  ]
  waited_for = [e.outvars[0].aval.shape for e in barriers]
  embedding = pieces.state.params["embedding"].shape
  assert waited_for == [()] * (output_strength > 0) + [embedding] * (weight_strength > 0)
  made_by = {v: e for e in eqns for v in e.outvars}
  used = {v for e in eqns for v in e.invars if not hasattr(v, "val")}
  for barrier in barriers:
    _, strength = barrier.outvars
    assert strength.aval.shape == (2,) and strength in used
  if weight_strength:
    (gradient,) = made_by[barriers[-1].invars[0]].invars  # of the stopped gradient
    assert made_by[gradient].primitive.name in ("add_any", "scatter-add"), "not the whole one"


def test_own_code_promotes_no_dtype_and_no_rank(plain_step):
  """Optax needs implicit promotion; nothing else does."""
  pieces = plain_step(**{"training.accumulation": 2})
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    step = make_train_step(
      pieces.assembly.model,
      optax.sgd(RATE),
      pieces.assembly.controller,
      lambda count: 0.1,
      pieces.config,
    )
    jax.eval_shape(step, pieces.state, batch_of(8))


def counting_controller(constant: Controller) -> Controller:
  """strengths(t): the number of observations so far, and the loss that the last one brought."""

  class Seen(NamedTuple):
    count: jax.Array
    last_lm_loss: jax.Array

  return constant._replace(
    init=lambda: Seen(jnp.int32(0), jnp.float32(0.0)),
    strengths=lambda s: Strengths(
      jnp.full(2, s.count, jnp.float32), jnp.full(2, s.last_lm_loss, jnp.float32)
    ),
    update=lambda s, o: Seen(s.count + 1, o.lm_loss),
    flags=lambda s: constant.flags(constant.init())._replace(emergency_L=jnp.full(2, s.count == 1)),
  )


def test_strengths_of_a_step_come_from_the_steps_before_it(plain_step):
  pieces = plain_step()
  controller = counting_controller(pieces.assembly.controller)
  step = jax.jit(
    make_train_step(
      pieces.assembly.model, optax.sgd(RATE), controller, lambda count: 0.1, pieces.config
    )
  )
  state = pieces.state._replace(control=controller.init())
  seen = []
  for t in range(3):
    state, record = step(state, batch_of(8, seed=t))
    seen.append(record)
  assert [r.weight_strength.tolist() for r in seen] == [[0, 0], [1, 1], [2, 2]]
  assert seen[0].output_strength.tolist() == [0, 0]
  assert seen[1].output_strength.tolist() == [float(seen[0].lm_loss)] * 2
  assert seen[2].output_strength.tolist() == [float(seen[1].lm_loss)] * 2
  # The flags go with the strengths, so they too are those of before the step.
  assert [r.emergency.tolist() for r in seen] == [[False] * 2, [True] * 2, [False] * 2]
  assert int(state.control.count) == 3 and int(state.step) == 3


# The whole step: AdamW, dropout, both penalties, parameter average.


@pytest.fixture
def run(tiny_config):
  """run(plan, seed=3) -> (state, records, traces): the steps 0, 1, ... in dispatches of `plan`."""

  def go(plan: list[int], seed: int = 3, disallow_transfers: bool = False):
    config = tiny_config()
    corpus = load_corpus(config)
    a = loop.assemble(config, corpus)
    examples = jax.device_put(corpus.splits["train"].examples)
    state, records, t = a.init_state(seed), [], 0
    for n in plan:
      rows = (np.arange(24).reshape(3, 8) + 8 * t).astype(np.int32)
      inputs = jax.device_put((Feed(examples, rows, None), as_count(n)))
      if disallow_transfers:
        with jax.transfer_guard("disallow"):
          state, record = a.dispatch(state, *inputs)
      else:
        state, record = a.dispatch(state, *inputs)
      records += [jax.tree.map(lambda r, k=k: np.asarray(r)[k], record) for k in range(n)]
      t += n
    return state, records

  return go


@pytest.mark.parametrize("plan", [[1, 1, 1, 1, 1, 1], [2, 1, 2, 1], [1, 3, 2]], ids=str)
def test_results_do_not_depend_on_the_steps_per_dispatch(plan, run, assert_same):
  state, records = run(plan)
  same_state, same_records = run([3, 3])
  assert_same(state, same_state)
  assert_same(records, same_records)
  assert int(state.step) == 6
  assert len({float(r.loss) for r in records}) == 6  # they are six different steps


def test_nothing_is_transferred_inside_a_dispatch(run):
  run([3, 2], disallow_transfers=True)


def test_another_dispatch_size_gives_the_same_bits(tiny_config, run, assert_same):
  """Another compiled program, of one step per call, whose loop is the same loop."""
  config = tiny_config(**{"training.steps_per_dispatch": 1})
  corpus = load_corpus(config)
  a = loop.assemble(config, corpus)
  examples = jax.device_put(corpus.splits["train"].examples)
  state = a.init_state(3)
  for t in range(3):
    rows = (np.arange(8)[None] + 8 * t).astype(np.int32)
    state, _ = a.dispatch(state, Feed(examples, rows, None), as_count(1))
  assert_same(state, run([3])[0])


def test_dropout_follows_the_run_key_and_the_step(run, assert_same):
  first, records = run([2])
  again, same_records = run([2])
  assert_same((first, records), (again, same_records))
  other, other_records = run([2], seed=4)
  assert jax.random.key_data(other.key).tolist() != jax.random.key_data(first.key).tolist()
  assert float(other_records[0].loss) != float(records[0].loss)


def test_dropout_key_is_the_run_key_folded_with_the_step(tiny_config):
  """The loss of steps 0 and 1 recomputed with the key that the contract names."""
  config = tiny_config(**{"orthogonality.weight_strength": 0.0, "training.ema_decay": 0.0})
  a = loop.assemble(config, load_corpus(config))
  state = a.init_state(3)
  descent = optax.sgd(0.0)
  state = state._replace(opt_state=descent.init(state.params))
  step = jax.jit(make_train_step(a.model, descent, a.controller, a.learning_rate, config))
  batch = batch_of(8)

  @jax.jit
  def naive(params, key):
    x_BTD, _ = a.model.features(params, batch.inputs_BT, batch.weights_BT, key)
    return a.model.loss(params, x_BTD, batch.targets_BT, batch.weights_BT) / (8 * T)

  key, losses = state.key, []
  for t in range(2):
    state, record = step(state, batch)
    losses.append(float(record.lm_loss))
    wanted = float(naive(state.params, jax.random.fold_in(key, t)))
    assert losses[-1] == pytest.approx(wanted, rel=1e-6)
  assert losses[0] != losses[1]  # the parameters stand still, so the masks differ
  assert jax.random.key_data(state.key).tolist() == jax.random.key_data(key).tolist()


def test_the_average_follows_the_parameters(run):
  """d_t = min(0.9, (1 + t) / (10 + t)) over the parameters after each step."""
  start, _ = run([])
  average = np.asarray(start.params["head"], np.float64)
  for t in range(3):
    state, _ = run([t + 1] if t < 2 else [3])
    d = (1 + t) / (10 + t)
    average = d * average + (1 - d) * np.asarray(state.params["head"], np.float64)
    got = averaged_params(state.opt_state, state.params)["head"]
    np.testing.assert_allclose(got, average, rtol=1e-5, atol=1e-7)


def test_one_trace_for_any_number_of_steps(tiny_config, run):
  """The step is traced for the first call and never again, whatever n is."""
  config = tiny_config()
  corpus = load_corpus(config)
  a = loop.assemble(config, corpus)
  traces = []

  def step(state, batch):
    traces.append(None)
    return state._replace(step=state.step + 1), batch.weights_BT.sum()

  dispatch = make_dispatch(step, 5, T, 256)
  examples = jax.device_put(corpus.splits["train"].examples)
  rows = np.zeros((5, 8), np.int32)
  state = a.init_state(3)
  state, records = dispatch(state, Feed(examples, rows, None), as_count(2))
  first = len(traces)
  for n in (5, 1, 0, 3):
    state, records = dispatch(state, Feed(examples, rows, None), as_count(n))
    assert np.count_nonzero(records) == n  # the rest stays zero
  assert len(traces) == first == 1
  assert int(state.step) == 11


@pytest.mark.parametrize(
  ("backend", "mesh", "laid_out"),
  [
    ("gpu", None, ["4,6,8", "6"]),
    ("gpu", (1, 2, 1), ["2,6,8", "6"]),  # each device its part
    ("cpu", (1, 2, 1), []),
    ("cpu", None, []),
    ("tpu", None, []),
  ],
)
def test_the_loop_says_how_parameters_lie(backend, mesh, laid_out, monkeypatch):
  """XLA for GPUs turned them around; partitioners moved them, and gather what is told of all."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
  params = {"kernel": shape(4, 6, 8), "positions": shape(16, 6), "scale": shape(6)}
  state = TrainState(shape(), params, {"kernel": shape(4, 6, 8)}, shape(), shape())
  where, on = None, contextlib.nullcontext()
  if mesh:
    axes = AbstractMesh(mesh, sharding.AXES, axis_types=sharding.AXIS_TYPES)
    on = jax.sharding.use_abstract_mesh(axes)
    split = lambda s: PartitionSpec("expert") if s.ndim == 3 else PartitionSpec()  # noqa: E731
    where = (
      jax.tree.map(lambda s: NamedSharding(axes, split(s)), state),
      NamedSharding(axes, PartitionSpec()),
    )
  dispatch = make_dispatch(lambda state, batch: (state, batch.weights_BT.sum()), 2, T, 0, where)
  feed = Feed(None, None, Batch(*(shape(2, 3, T) for _ in range(3))))
  with on:
    traced = str(jax.make_jaxpr(dispatch)(state, feed, as_count(2)))
  _, in_loop = traced.split("body_jaxpr=")
  assert re.findall(r":f32\[([\d,]+)\]\S* = layout_constraint\[", in_loop) == laid_out
  assert traced.count("layout_constraint[") == len(laid_out)
  assert ("shard_map" in in_loop) == bool(mesh)
