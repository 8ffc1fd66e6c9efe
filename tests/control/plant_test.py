"""Closed loops on a synthetic plant: how fast, how exact, how calm; false alarms and detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import plant, schedules
from hgnn_moe_jax.control.adaptive import adaptive
from hgnn_moe_jax.control.base import Observation
from hgnn_moe_jax.control.plant import Plant
from hgnn_moe_jax.control.supervision import make_actuator, make_watch

STEPS, SEEDS, SET_POINT = 8000, 5, 0.3
CONTROLLERS = plant.controllers(target=1 - SET_POINT)


@pytest.fixture(scope="module")
def results():
  return plant.bench(CONTROLLERS, Plant(), STEPS, SEEDS, SET_POINT)


def _simulate(name, plant_, seed=0):
  keys = jax.random.split(jax.random.key(seed), SEEDS)
  return jax.tree.map(np.asarray, plant.simulate(CONTROLLERS[name], plant_, keys, STEPS))


def test_response_measures_what_it_says():
  # From 0.6 towards 0.3: undershoots to 0.27 (10 % of the way), rests at 0.306 (2 %) from step 6.
  overlap_NT = jnp.asarray([[0.6, 0.5, 0.4, 0.27, 0.29, 0.33] + [0.306] * 10])
  strength_NT = jnp.asarray([[0.0, 1.5] + [1.0] * 14])
  result = plant.response(plant.Trace(overlap_NT, strength_NT, overlap_NT > 1), 0.3)
  np.testing.assert_allclose(np.stack(result)[:, 0], [0.1, 6, 0.02, 1.5, 1.5], rtol=1e-4)


def test_the_plant_answers_as_documented():
  # Free at 0.6; strength 0.3 from step 0, felt from step 10: 0.6 - 0.15 (1 - (1 - 1/200)^n).
  trace = _simulate("scheduled", Plant(noise=0.0))
  felt = np.maximum(np.arange(STEPS) - 10, 0)
  expected = 0.6 - 0.15 * (1 - 0.995**felt)
  np.testing.assert_allclose(trace.overlap_NT, np.tile(expected, (SEEDS, 1)), rtol=1e-4)


def test_feedback_settles_without_overshoot_or_error(results):
  feedback_ = results["feedback"]
  assert np.max(feedback_.overshoot) <= 0.05
  assert np.max(feedback_.settling) <= 1000
  assert np.max(feedback_.steady_error) <= 0.01
  assert np.max(feedback_.max_strength) <= 0.9


def test_adaptive_comes_within_its_tolerance_and_rests(results):
  law = results["adaptive"]
  assert np.max(law.overshoot) <= 0.05
  assert np.max(law.settling) <= 3000
  assert np.max(law.steady_error) <= 0.02 / 0.3  # the tolerance, as a share of the way
  assert np.max(law.swing) <= 0.03


def test_the_strategies_stay_where_their_formulas_say(results):
  # strength 0.3 throughout: overlap 0.45, half of the way missing
  np.testing.assert_allclose(results["scheduled"].steady_error, 0.5, atol=0.01)
  # strength = overlap, so overlap = 0.6 - 0.5 overlap = 0.4: a third missing
  np.testing.assert_allclose(results["convergence"].steady_error, 1 / 3, atol=0.01)
  # the loss stands still: relaxed to a quarter, overlap 0.5625
  np.testing.assert_allclose(results["performance"].steady_error, 0.875, atol=0.01)


def test_no_limit_cycle_without_noise_at_three_times_the_delay_and_the_gain():
  watch, actuator = make_watch(1, target=0.7), make_actuator(minimum=0.0, maximum=2.0)
  law = adaptive(watch, actuator, schedules.constant_schedule(), 0.3, gain=0.012)
  result = plant.bench({"": law}, Plant(noise=0.0), STEPS, 1, SET_POINT, delay=30)[""]
  np.testing.assert_array_equal(result.swing, [0.0])


@pytest.mark.parametrize("name", ["feedback", "adaptive"])
def test_strength_of_an_inactive_constraint(name):
  # Free overlap 0.1 is below 0.3: feedback is off, the multiplicative law at its lower limit.
  trace = _simulate(name, Plant(free_overlap=0.1), seed=1)
  if name == "feedback":
    assert np.all(trace.strength_NT[:, 500:] == 0.0)
  else:
    np.testing.assert_allclose(trace.strength_NT[:, -1], 0.3 / 4, rtol=1e-5)


def test_no_false_alarm_in_ten_thousand_healthy_steps():
  # sigma 0.01 around a mean that drifts by 0.1 and back; effective experts with 3 % of noise.
  watch = make_watch(1)

  def run(key):
    noise_T2 = jax.random.normal(key, (10_000, 2))
    t = jnp.arange(10_000)
    score_T = 0.85 + 0.05 * jnp.sin(t.astype(jnp.float32) / 800) + 0.01 * noise_T2[:, 0]
    effective_T = 3.5 + 0.1 * noise_T2[:, 1]

    def step(state, xs):
      t, score, effective = xs
      seen = Observation(t, score[None], score[None], effective[None], jnp.ones(()))
      state = watch.update(state, t, seen)
      return state, state.collapse.active_L[0]

    return jax.lax.scan(step, watch.init(), (t, score_T, effective_T))[1]

  alarms = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), 10))
  assert alarms.shape == (10, 10_000) and not np.any(alarms)


@pytest.mark.parametrize("name", ["adaptive", "feedback"])
def test_a_clone_is_detected_within_fifty_steps(name):
  # Score 0.95 or more -> 0.1 at step 1000, back with the plant's own 200 steps.
  trace = _simulate(name, Plant(free_overlap=0.05, clone_at=1000), seed=3)
  emergency_NT, strength_NT = trace.emergency_NT, trace.strength_NT
  assert not np.any(emergency_NT[:, :1000])
  delay_N = np.argmax(emergency_NT[:, 1000:], axis=1)
  assert np.all(emergency_NT.any(axis=1)) and np.all(delay_N <= 50), delay_N
  # The strength rises at once. The emergency ends when the score is back, and none follows.
  assert np.all(strength_NT[:, 1055] > 1.9 * strength_NT[:, 999])
  assert np.all(strength_NT[:, 1055] > 0.1)
  assert np.all((emergency_NT.sum(axis=1) > 100) & (emergency_NT.sum(axis=1) < 500))
  assert not np.any(emergency_NT[:, 1500:])


def test_the_table_has_a_line_for_each(results):
  lines = plant.table(results).splitlines()
  assert len(lines) == 2 + len(CONTROLLERS)
  assert lines[0] == (
    "| controller | overshoot | settling (5 % band) | steady-state error | max strength |"
  )
