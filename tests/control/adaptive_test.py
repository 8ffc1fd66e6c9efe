import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import base, laws, schedules
from hgnn_moe_jax.control.adaptive import adaptive
from hgnn_moe_jax.control.laws import LogFactor
from hgnn_moe_jax.control.supervision import Saturation, Sight, make_actuator, make_watch, product

ALWAYS = schedules.constant_schedule()
WIDE = make_actuator(minimum=0.0, maximum=100.0)
STILL = {"gain": 1e-6, "convergence_decay": 0.0}  # a tracking that hardly moves


def _sight(score, count=10, low=False, converged=False, emergency=False, plateau=False):
  return Sight(
    count=jnp.int32(count),
    score_L=jnp.full(1, score, jnp.float32),
    low_L=jnp.full(1, low),
    converged_L=jnp.full(1, converged),
    emergency_L=jnp.full(1, emergency),
    plateau=jnp.asarray(plateau),
    stalled=jnp.asarray(False),
  )


def _saturation(minimum=False, maximum=False):
  return Saturation(jnp.full(1, minimum), jnp.full(1, maximum))


# gain x frequency = 1, so that log f moves by the push itself; at most by log 1.5.
_WATCH = make_watch(1, target=0.8, tolerance=0.1)
_TRACKING = laws.tracking(
  _WATCH, frequency=10, gain=0.1, max_change=1.5, limit=4.0, convergence_decay=0.002
)


@pytest.mark.parametrize(
  ("sight", "saturation", "change"),
  [
    (_sight(0.6, low=True), _saturation(), 0.2),  # raise, in proportion
    (_sight(0.1, low=True), _saturation(), math.log(1.5)),  # but bounded
    (_sight(0.75, low=True), _saturation(), 0.05),  # up to the target, once begun
    (_sight(0.75), _saturation(), 0.0),  # in the dead zone
    (_sight(0.85), _saturation(), 0.0),
    (_sight(0.95), _saturation(), -0.05),  # above it
    (_sight(0.85, converged=True), _saturation(), -0.02),  # decay
    (_sight(0.75, converged=True), _saturation(), 0.0),  # not below the target
    (_sight(0.6, count=11, low=True), _saturation(), 0.0),  # only every tenth step
    (_sight(0.6, low=True, plateau=True), _saturation(), 0.0),
    (_sight(0.6, low=True, plateau=True, emergency=True), _saturation(), 0.2),
    (_sight(0.95, plateau=True), _saturation(), -0.05),
    (_sight(0.6, low=True), _saturation(maximum=True), 0.0),  # anti-windup
    (_sight(0.95), _saturation(maximum=True), -0.05),
    (_sight(0.95), _saturation(minimum=True), 0.0),
    (_sight(0.6, low=True), _saturation(minimum=True), 0.2),
  ],
)
def test_tracking_moves_by_its_formula(sight, saturation, change):
  state = _TRACKING.update(LogFactor(jnp.full(1, 0.3)), sight, saturation)
  np.testing.assert_allclose(state.log, [0.3 + change], rtol=1e-5)
  np.testing.assert_allclose(_TRACKING.value(state, sight), np.exp(state.log), rtol=1e-6)


@pytest.mark.parametrize(("score", "bound"), [(0.1, 4.0), (1.0, 0.25)])
def test_tracking_is_bounded(score, bound):
  sight, state = _sight(score, low=score < 0.7), _TRACKING.init()
  for _ in range(60):
    state = _TRACKING.update(state, sight, _saturation())
  np.testing.assert_allclose(_TRACKING.value(state, sight), [bound], rtol=1e-6)


def test_relaxation_falls_to_its_floor_and_returns():
  law = laws.relaxation(lambda sight: sight.plateau, floor=0.25, steps=4)
  state, values = law.init(), []
  for plateau in [True] * 6 + [False] * 6:
    state = law.update(state, _sight(0.8, plateau=plateau), _saturation())
    values.append(float(law.value(state, _sight(0.8, plateau=plateau))[0]))
  falling = [0.25 ** (k / 4) for k in (1, 2, 3, 4, 4, 4)]
  np.testing.assert_allclose(values, falling + falling[2::-1] + [1.0] * 3, rtol=1e-5)
  np.testing.assert_allclose(
    law.value(LogFactor(jnp.float32(-1.0)), _sight(0.1, emergency=True)), 1
  )


def test_a_product_multiplies_and_keeps_each_state():
  law = product(laws.boost(3.0), _TRACKING)
  sight = _sight(0.6, low=True, emergency=True)
  states = law.update(((), LogFactor(jnp.full(1, math.log(2.0)))), sight, _saturation())
  assert states[0] == ()
  np.testing.assert_allclose(law.value(states, sight), [3 * 2 * math.exp(0.2)], rtol=1e-6)


def _observation(score_L, effective_L=None):
  score_L = jnp.asarray(score_L, jnp.float32)
  return base.Observation(
    step=jnp.int32(0),
    weight_specialization_L=score_L,
    output_specialization_L=score_L,
    effective_experts_L=jnp.full_like(score_L, 4.0) if effective_L is None else effective_L,
    lm_loss=jnp.ones(()),
  )


def _run(controller, scores_TL, state=None):
  def step(state, score_L):
    record = (controller.strengths(state).weight_L, controller.flags(state).emergency_L)
    return controller.update(state, _observation(score_L)), record

  run = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))
  state, (strength_TL, emergency_TL) = run(
    controller.init() if state is None else state, jnp.asarray(scores_TL, jnp.float32)
  )
  return state, np.asarray(strength_TL), np.asarray(emergency_TL)


def test_without_events_the_law_is_base_schedule_depth():
  controller = adaptive(
    make_watch(3, target=0.9, grace=20),
    WIDE,
    schedules.decay("linear", 10, 0.0),
    initial_strength=0.2,
    deeper_layer_scaling=0.5,
  )
  _, strength_TL, _ = _run(controller, np.full((11, 3), 0.9))
  expected = 0.2 * (1 - np.arange(11) / 10)[:, None] * np.array([1, 0.5, 0.25])
  np.testing.assert_allclose(strength_TL, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("score", "bound"), [(0.2, 4.0), (1.0, 0.25)])
def test_ten_thousand_steps_of_error_end_at_the_bound(score, bound):
  # A base that is overwritten would be at the clip, or 0, instead: 2 layers, base 0.1 and 0.08.
  controller = adaptive(make_watch(2, target=0.8), WIDE, ALWAYS, initial_strength=0.1)
  _, strength_TL, _ = _run(controller, np.full((10_000, 2), score))
  expected = np.broadcast_to(bound * np.array([0.1, 0.08]), (5000, 2))
  np.testing.assert_allclose(strength_TL[5000:], expected, rtol=1e-5)


def _collapse_at(step, steps, layers, layer, healthy=0.9, fallen=0.1):
  scores_TL = np.full((steps, layers), healthy)
  scores_TL[step:, layer] = fallen
  return scores_TL


def test_a_collapse_in_one_layer_boosts_that_layer_only():
  controller = adaptive(
    make_watch(3, target=0.8), WIDE, ALWAYS, 0.1, 1.0, boost_multiplier=3.0, **STILL
  )
  _, strength_TL, emergency_TL = _run(controller, _collapse_at(100, 150, 3, layer=1))
  np.testing.assert_array_equal(emergency_TL[-1], [False, True, False])
  np.testing.assert_allclose(strength_TL[-1], [0.1, 0.3, 0.1], rtol=1e-4)
  begins = int(np.argmax(emergency_TL[:, 1]))
  assert 100 < begins <= 105
  np.testing.assert_allclose(strength_TL[:begins], 0.1, rtol=1e-4)


def test_layers_that_are_not_specific_share_one_score():
  watch = make_watch(2, target=0.8, layer_specific=False)
  controller = adaptive(watch, WIDE, ALWAYS, 0.1, 1.0, boost_multiplier=3.0, **STILL)
  _, strength_TL, emergency_TL = _run(controller, _collapse_at(100, 150, 2, layer=1))
  np.testing.assert_array_equal(emergency_TL[-1], [True, True])  # mean 0.9 -> 0.5
  np.testing.assert_allclose(strength_TL[-1], [0.3, 0.3], rtol=1e-4)


def test_plateau_and_collapse_hold_together_and_do_not_cancel():
  watch = make_watch(2, target=0.9, performance_window=50)
  settings = {"relaxation_floor": 0.5, "relaxation_steps": 100, **STILL}
  controller = adaptive(watch, WIDE, ALWAYS, 0.1, 1.0, **settings)
  scores_TL = _collapse_at(200, 300, 2, layer=1)
  state, _, _ = _run(controller, scores_TL[:50])
  state = controller.observe_evaluation(state, 4.0)
  state, _, _ = _run(controller, scores_TL[50:100], state)
  state = controller.observe_evaluation(state, 4.0)
  state, strength_TL, emergency_TL = _run(controller, scores_TL[100:], state)
  flags = controller.flags(state)
  assert flags.plateau
  np.testing.assert_array_equal(flags.emergency_L, [False, True])
  np.testing.assert_allclose(strength_TL[-1], [0.05, 0.2], rtol=1e-4)  # relaxed; boosted
  assert not emergency_TL[:100].any()


@pytest.mark.parametrize(
  ("switches", "expected"),
  [
    ({"performance_aware": False}, 0.2),  # boost only
    ({"emergency_boost": False, "performance_aware": False}, 0.1),
    ({"emergency_boost": False}, 0.4),  # the tracking, at its limit
    ({}, 0.8),  # both
  ],
)
def test_the_switches(switches, expected):
  watch = make_watch(1, target=0.9, max_emergency=10_000)
  settings = {"adaptation_frequency": 1, "gain": 0.1, **switches}
  controller = adaptive(watch, WIDE, ALWAYS, 0.1, **settings)
  _, strength_TL, emergency_TL = _run(controller, _collapse_at(100, 400, 1, layer=0))
  assert emergency_TL[-1, 0]
  np.testing.assert_allclose(strength_TL[-1], [expected], rtol=1e-5)


def test_converged_layers_decay_until_the_score_leaves_the_target():
  watch = make_watch(2, target=0.8, convergence_window=20)
  controller = adaptive(watch, WIDE, ALWAYS, 0.1, 1.0, adaptation_frequency=10, gain=1e-6)
  scores_TL = np.full((400, 2), 0.81)
  scores_TL[200:, 1] = 0.79
  state, strength_TL, _ = _run(controller, scores_TL)
  np.testing.assert_array_equal(controller.flags(state).converged_L, [True, True])
  assert np.all(strength_TL[19] == strength_TL[0])
  # Layer 0 changes 38 times by 0.0005 x 10, from step 20 to step 390; layer 1 until step 200 or so.
  np.testing.assert_allclose(strength_TL[-1, 0], 0.1 * math.exp(-0.005 * 38), rtol=1e-4)
  assert np.all(strength_TL[210:, 1] == strength_TL[210, 1])
  assert strength_TL[210, 1] < strength_TL[0, 1]


@pytest.mark.parametrize(
  ("parameter", "value"),
  [
    ("initial_strength", 0.0),
    ("initial_strength", math.nan),
    ("deeper_layer_scaling", 0.0),
    ("deeper_layer_scaling", 1.1),
    ("adaptation_frequency", 0),
    ("gain", 0.0),
    ("max_change", 1.0),
    ("limit", math.inf),
    ("convergence_decay", -0.1),
    ("relaxation_floor", 0.0),
    ("relaxation_steps", 0),
    ("boost_multiplier", 0.5),
  ],
)
def test_parameters_are_checked(parameter, value):
  with pytest.raises(ValueError, match=f"{parameter} must be .* got {value}"):
    adaptive(make_watch(1), WIDE, ALWAYS, **{parameter: value})
