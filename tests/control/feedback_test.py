import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import base, schedules
from hgnn_moe_jax.control.feedback import FeedbackState, feedback
from hgnn_moe_jax.control.supervision import SupervisedState, make_actuator, make_watch

ALWAYS = schedules.constant_schedule()
# No smoothing: the score is what was observed last.
WATCH = make_watch(1, smoothing=1, target=0.8)


def _controller(schedule=ALWAYS, minimum=0.0, maximum=1.0, **changes):
  gains = {"integral_gain": 0.1, "proportional_gain": 0.5, "filtering": 0.75, **changes}
  return feedback(WATCH, make_actuator("weight", minimum, maximum), schedule, **gains)


def _observation(score):
  return base.Observation(
    step=jnp.int32(0),
    weight_specialization_L=jnp.full(1, score, jnp.float32),
    output_specialization_L=jnp.full(1, score, jnp.float32),
    effective_experts_L=jnp.full(1, 4.0),
    lm_loss=jnp.ones(()),
  )


def _with(state: SupervisedState, integral, filtered, emergency=False) -> SupervisedState:
  collapse = state.watch.collapse._replace(active_L=jnp.full(1, emergency))
  return state._replace(
    law=FeedbackState(jnp.full(1, integral), jnp.full(1, filtered)),
    watch=state.watch._replace(collapse=collapse),
  )


def _strength(controller, state):
  return float(controller.strengths(state).weight_L[0])


def _run(controller, scores, state=None):
  def step(state, score):
    return controller.update(state, _observation(score)), controller.strengths(state).weight_L[0]

  scan = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))
  state, strength_T = scan(controller.init() if state is None else state, jnp.asarray(scores))
  return state, np.asarray(strength_T)


def test_one_step_by_hand():
  # e = 0.8 - 0.6 = 0.2; xi = 0.75 x 0.04 + 0.25 x 0.2 = 0.08; I = 0.3 + 0.1 x 0.2 = 0.32
  controller = _controller()
  state = controller.update(_with(controller.init(), 0.3, 0.04), _observation(0.6))
  np.testing.assert_allclose(state.law.filtered_error_L, [0.08], rtol=1e-5)
  np.testing.assert_allclose(state.law.integral_L, [0.32], rtol=1e-5)
  np.testing.assert_allclose(_strength(controller, state), 0.32 + 0.5 * 0.08, rtol=1e-5)


def test_between_the_bounds_it_is_nupi():
  # lambda_{t+1} = lambda_t + K_I e_t + K_P (xi_t - xi_{t-1}), the paper's increment.
  scores = 0.8 - 0.1 * np.random.default_rng(0).random(40).astype(np.float32)
  _, strength_T = _run(_controller(maximum=100.0, initial_strength=0.2), scores)
  error_T = 0.8 - scores
  xi, expected = 0.0, [0.2]
  for error in error_T[:-1]:
    last, xi = xi, 0.75 * xi + 0.25 * error
    expected.append(expected[-1] + 0.1 * error + 0.5 * (xi - last))
  np.testing.assert_allclose(strength_T, expected, rtol=1e-4)


@pytest.mark.parametrize(
  ("integral", "filtered", "score", "moves"),
  [
    (1.2, 0.0, 0.6, False),  # at the maximum, and more is wanted
    (1.2, 0.0, 0.9, True),
    (-0.2, 0.0, 0.9, False),  # at the minimum, and less is wanted
    (-0.2, 0.0, 0.6, True),
    (0.4, -1.0, 0.9, False),  # at the minimum by the proportional part
    (0.5, 0.0, 0.9, True),
  ],
)
def test_conditional_integration(integral, filtered, score, moves):
  controller = _controller()
  state = controller.update(_with(controller.init(), integral, filtered), _observation(score))
  expected = integral + (0.1 * (0.8 - score) if moves else 0.0)
  np.testing.assert_allclose(state.law.integral_L, [expected], rtol=1e-5)


def test_no_windup_over_ten_thousand_steps():
  controller = _controller()
  state, strength_T = _run(controller, np.full(10_000, 0.2, np.float32))
  assert strength_T.max() == 1.0
  # Well above the target it is soon off again: K_I e = 0.015 per step, and the proportional part.
  _, strength_T = _run(controller, np.full(100, 0.95, np.float32), state)
  assert strength_T[-1] == 0.0


def test_exactly_zero_when_the_constraint_is_inactive():
  # Noise would be rectified if the increments were clipped, not the sum.
  scores = 0.9 + 0.01 * np.random.default_rng(0).standard_normal(2000).astype(np.float32)
  _, strength_T = _run(_controller(initial_strength=0.5), scores)
  assert np.all(strength_T[200:] == 0.0)


def test_the_schedule_moves_the_set_point():
  controller = _controller(schedules.decay("linear", 100, 0.5))
  state = controller.init()._replace(count=jnp.int32(99))
  state = controller.update(state, _observation(0.3))  # the set-point at step 100 is 0.8 x 0.5
  np.testing.assert_allclose(state.law.integral_L, [0.1 * (0.4 - 0.3)], rtol=1e-5)
  assert _strength(controller, controller.init()) == 0.0


def test_an_emergency_raises_the_proportional_gain_and_leaves_no_trace():
  controller = _controller(boost_multiplier=3.0)
  calm, alarmed = (_with(controller.init(), 0.1, 0.2, emergency=e) for e in (False, True))
  np.testing.assert_allclose(_strength(controller, calm), 0.1 + 0.5 * 0.2, rtol=1e-6)
  np.testing.assert_allclose(_strength(controller, alarmed), 0.1 + 1.5 * 0.2, rtol=1e-6)
  off = _controller(boost_multiplier=3.0, emergency_boost=False)
  np.testing.assert_allclose(_strength(off, alarmed), 0.1 + 0.5 * 0.2, rtol=1e-6)
  # Experts may collapse while the score is above its target: the boost must not let go of them.
  above = _with(controller.init(), 0.2, -0.1, emergency=True)
  np.testing.assert_allclose(_strength(controller, above), 0.2 - 0.5 * 0.1, rtol=1e-6)


@pytest.mark.parametrize(
  ("parameter", "value"),
  [
    ("initial_strength", -0.1),
    ("integral_gain", 0.0),
    ("integral_gain", math.nan),
    ("proportional_gain", -1.0),
    ("filtering", 1.0),
    ("boost_multiplier", 0.9),
  ],
)
def test_parameters_are_checked(parameter, value):
  with pytest.raises(ValueError, match=f"{parameter} must be .* got {value}"):
    _controller(**{parameter: value})
