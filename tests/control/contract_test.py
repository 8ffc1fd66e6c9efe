"""What every controller has in common."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.control import base, schedules, strategies
from hgnn_moe_jax.control.adaptive import adaptive
from hgnn_moe_jax.control.constant import constant
from hgnn_moe_jax.control.feedback import feedback
from hgnn_moe_jax.control.supervision import SupervisedState, make_actuator, make_watch

LAYERS = 3
MINIMUM, MAXIMUM = 0.01, 0.25
SUPERVISED = {
  "scheduled": strategies.scheduled,
  "adaptive": adaptive,
  "feedback": feedback,
  "convergence": strategies.convergence,
  "performance": strategies.performance,
}


def _controller(name):
  schedule = schedules.decay("cosine", 40, 0.1)
  if name == "constant":
    return constant(0.1, 0.0, LAYERS, schedule)
  watch = make_watch(LAYERS, smoothing=2, emergency_window=5, performance_window=4)
  return SUPERVISED[name](watch, make_actuator("weight", MINIMUM, MAXIMUM), schedule)


CONTROLLERS = {name: _controller(name) for name in ("constant", *SUPERVISED)}


def observation(step, score, effective=3.0, lm_loss=4.0):
  score_L = jnp.broadcast_to(jnp.asarray(score, jnp.float32), (LAYERS,))
  return base.Observation(
    step=jnp.asarray(step, jnp.int32),
    weight_specialization_L=score_L,
    output_specialization_L=score_L,
    effective_experts_L=jnp.full(LAYERS, effective, jnp.float32),
    lm_loss=jnp.asarray(lm_loss, jnp.float32),
  )


def _scores(steps):
  """Healthy, cloned at step 5, back at 10; with noise."""
  noise = 0.01 * np.random.default_rng(0).standard_normal(steps)
  return (np.where((np.arange(steps) // 5) % 3 == 1, 0.2, 0.93) + noise).astype(np.float32)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_one_trace_and_the_state_keeps_its_types(name):
  controller = CONTROLLERS[name]
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(state, seen):
    return controller.strengths(state), controller.flags(state), controller.update(state, seen)

  state = jax.jit(controller.init)()
  chex.assert_trees_all_equal_shapes_and_dtypes(state, controller.init())
  for t, score in enumerate(_scores(4)):
    strengths, flags, new = step(state, observation(t, score))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert strengths.weight_pairs_LEE is None and strengths.output_pairs_LEE is None
    for strength_L in (strengths.weight_L, strengths.output_L):
      assert strength_L.shape == (LAYERS,) and strength_L.dtype == jnp.float32
    for flag in flags:
      assert flag.dtype == jnp.bool_
    state = new
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.jit(controller.observe_evaluation)(state, 4.0), state
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {
    jnp.dtype(d) for d in (np.float32, np.int32, np.bool_)
  }


# Plain calls compile each operation by itself, so two controllers stand for all.
@pytest.mark.parametrize("name", ["adaptive", "feedback"])
def test_a_scan_gives_what_plain_calls_give(name):
  controller, scores = CONTROLLERS[name], _scores(12)

  def step(state, xs):
    t, score = xs
    record = (controller.strengths(state), controller.flags(state))
    return controller.update(state, observation(t, score)), record

  @jax.jit
  def run(state):
    return jax.lax.scan(step, state, (jnp.arange(12), jnp.asarray(scores)))

  _, (strengths, flags) = run(controller.init())
  state = controller.init()
  for t in range(12):
    np.testing.assert_allclose(
      strengths.weight_L[t], controller.strengths(state).weight_L, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(flags.emergency_L[t], controller.flags(state).emergency_L)
    state = controller.update(state, observation(t, scores[t]))
    assert state.count == t + 1
  assert flags.emergency_L.any()


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_gradient_flows_through_a_strength(name):
  controller = CONTROLLERS[name]

  def total(score):
    state = controller.update(controller.init(), observation(0, score))
    return jnp.sum(controller.strengths(state).weight_L)

  assert jax.jit(jax.grad(total))(0.5) == 0.0


@pytest.mark.parametrize("name", SUPERVISED)
def test_what_is_not_finite_does_not_poison(name):
  controller = CONTROLLERS[name]

  def step(state, xs):
    t, score, lm_loss = xs
    state = controller.update(state, observation(t, score, lm_loss=lm_loss))
    return state, (controller.strengths(state).weight_L, controller.flags(state).emergency_L)

  # Healthy, with a bad step now and then, also the first; an evaluation gone wrong in between.
  scores, lm_loss = jnp.full(30, 0.95), jnp.full(30, 4.0)
  bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf] * 3)
  where = jnp.asarray([0, 1, 7, 8, 9, 15, 20, 24, 28])
  xs = (jnp.arange(30), scores.at[where].set(bad), lm_loss.at[where].set(bad))

  @jax.jit
  def run(xs):
    state = controller.observe_evaluation(controller.init(), jnp.nan)
    state, record = jax.lax.scan(step, state, xs)
    return controller.observe_evaluation(state, jnp.inf), record

  state, (strength_TL, emergency_TL) = run(xs)
  assert np.all(np.isfinite(strength_TL)) and not np.any(emergency_TL)
  assert not controller.flags(state).plateau
  np.testing.assert_allclose(state.watch.score.value, [0.95] * LAYERS, rtol=1e-5)
  np.testing.assert_allclose(state.watch.lm_loss.value, 4.0)


def _extreme(scores, effective, losses):
  """Strengths of all supervised controllers over a run of arbitrary observations."""
  runs = []
  for name in SUPERVISED:
    controller = CONTROLLERS[name]

    def step(state, xs, controller=controller):
      t, score, effective, loss = xs
      state = controller.update(state, observation(t, score, effective, loss))
      return controller.observe_evaluation(state, loss), controller.strengths(state).weight_L

    xs = (jnp.arange(scores.shape[0]), scores, effective, losses)
    runs.append(jax.lax.scan(step, controller.init(), xs)[1])
  return jnp.stack(runs)


_extreme_jitted = jax.jit(_extreme)


@settings(deadline=None, max_examples=40)
@given(
  seed=st.integers(0, 2**32 - 1),
  low=st.floats(0, 1, width=32),
  high=st.floats(0, 1, width=32),
  share=st.floats(0, 1),
)
def test_strengths_stay_within_the_bounds_whatever_is_seen(seed, low, high, share):
  # Scores jump between two levels, now and then nothing is measured.
  random = np.random.default_rng(seed)
  scores = np.where(random.random(60) < share, low, high).astype(np.float32)
  scores[random.random(60) < 0.05] = np.nan
  effective = random.uniform(1, 4, 60).astype(np.float32)
  losses = random.uniform(0, 9, 60).astype(np.float32)
  strengths = np.asarray(_extreme_jitted(scores, effective, losses))
  assert np.all(strengths >= np.float32(MINIMUM)) and np.all(strengths <= np.float32(MAXIMUM))


@pytest.mark.parametrize("name", SUPERVISED)
def test_the_objective_says_which_penalty_is_driven(name):
  watch = make_watch(LAYERS)

  def strengths(objective, other):
    actuator = make_actuator(objective, MINIMUM, MAXIMUM, other)
    controller = SUPERVISED[name](watch, actuator, schedules.constant_schedule())
    return controller.strengths(controller.init())

  driven_L = strengths("both", 0.0).weight_L
  np.testing.assert_array_equal(strengths("both", 0.0).output_L, driven_L)
  np.testing.assert_array_equal(strengths("weight", 0.0).weight_L, driven_L)
  np.testing.assert_array_equal(strengths("weight", 0.0).output_L, [0] * LAYERS)
  np.testing.assert_array_equal(strengths("output", 0.7).output_L, driven_L)
  np.testing.assert_array_equal(strengths("output", 0.7).weight_L, np.float32([0.7] * LAYERS))


@pytest.mark.parametrize("name", SUPERVISED)
def test_the_penalty_that_is_not_driven_has_a_schedule(name):
  actuator = make_actuator("output", MINIMUM, MAXIMUM, 0.8, schedules.linear_warmup(4))
  controller = SUPERVISED[name](make_watch(LAYERS), actuator, schedules.constant_schedule())
  state, strengths = controller.init(), []
  for count in (0, 1, 3, 4, 9):
    state = state._replace(count=jnp.int32(count))
    strengths.append(controller.strengths(state).weight_L)
  np.testing.assert_array_equal(
    strengths, np.float32([[x] * LAYERS for x in [0, 0.2, 0.6, 0.8, 0.8]])
  )


@pytest.mark.parametrize("signal", ["weight", "output"])
def test_the_signal_says_which_score_is_watched(signal):
  watch = make_watch(LAYERS, signal=signal)
  seen = observation(0, 0.9)._replace(output_specialization_L=jnp.full(LAYERS, 0.4))
  state = watch.update(watch.init(), jnp.int32(0), seen)
  expected = {"weight": 0.9, "output": 0.4}[signal]
  np.testing.assert_allclose(watch.sight(state, jnp.int32(1)).score_L, [expected] * 3, rtol=1e-6)


def test_flags_are_those_of_the_state():
  controller = CONTROLLERS["adaptive"]
  state: SupervisedState = controller.init()
  watch = state.watch
  watch = watch._replace(
    collapse=watch.collapse._replace(active_L=jnp.asarray([False, True, False])),
    converged=watch.converged._replace(active_L=jnp.asarray([True, False, False])),
    plateau=watch.plateau._replace(active=jnp.asarray(True)),
  )
  flags = controller.flags(state._replace(watch=watch))
  np.testing.assert_array_equal(flags.emergency_L, [False, True, False])
  np.testing.assert_array_equal(flags.converged_L, [True, False, False])
  assert flags.plateau


def test_evaluations_make_a_plateau_at_their_own_cadence():
  controller = CONTROLLERS["adaptive"]  # performance_window=4

  def at(state, count):
    return state._replace(count=jnp.int32(count))

  state = controller.observe_evaluation(at(controller.init(), 10), 5.0)
  assert state.count == 10
  state = controller.observe_evaluation(at(state, 13), 4.99)  # 0.2 % better after 3 steps
  assert not controller.flags(state).plateau
  state = controller.observe_evaluation(at(state, 14), 4.99)
  assert controller.flags(state).plateau
  assert not controller.flags(controller.observe_evaluation(at(state, 15), 4.9)).plateau


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: make_actuator(objective="weights"), "objective must be one of weight, output, both"),
    (lambda: make_actuator(minimum=-0.1), "minimum"),
    (lambda: make_actuator(minimum=0.2, maximum=0.1), "maximum must be .* minimum=0.2, got 0.1"),
    (lambda: make_actuator(minimum=0.0, maximum=0.0), "maximum must be above 0"),
    (lambda: make_actuator(other_strength=float("nan")), "other_strength"),
    (lambda: make_actuator("both", other_strength=0.1), "other_strength must be 0 .*both"),
    (lambda: make_watch(3, signal="loss"), "signal must be one of weight, output, got 'loss'"),
    (lambda: make_watch(3, smoothing=0), "smoothing"),
    (lambda: make_watch(3, smoothing=51), "smoothing must be at most emergency_window=50, got 51"),
    (lambda: make_watch(0), "num_layers"),
  ],
)
def test_parameters_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()
