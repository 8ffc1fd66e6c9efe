import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import base, schedules, strategies
from hgnn_moe_jax.control.supervision import make_actuator, make_watch

ALWAYS = schedules.constant_schedule()
WIDE = make_actuator(minimum=0.0, maximum=100.0)


def _run(controller, scores_TL, losses_T=None):
  """Strengths, with those after the last step, [T + 1, L]."""
  scores_TL = jnp.asarray(scores_TL, jnp.float32)
  losses_T = jnp.ones(scores_TL.shape[0]) if losses_T is None else jnp.asarray(losses_T)

  def step(state, xs):
    score_L, lm_loss = xs
    observation = base.Observation(
      step=state.count,
      weight_specialization_L=score_L,
      output_specialization_L=score_L,
      effective_experts_L=jnp.full_like(score_L, 4.0),
      lm_loss=lm_loss.astype(jnp.float32),
    )
    return controller.update(state, observation), controller.strengths(state).weight_L

  @jax.jit
  def run(xs):
    state, strength_TL = jax.lax.scan(step, controller.init(), xs)
    return jnp.concatenate([strength_TL, controller.strengths(state).weight_L[None]])

  return np.asarray(run((scores_TL, losses_T)))


def test_scheduled_is_base_schedule_depth_whatever_happens():
  controller = strategies.scheduled(
    make_watch(2), WIDE, schedules.decay("exponential", 100, 0.01), 0.3, 0.5
  )
  scores_TL = np.where(np.arange(100) < 50, 0.9, 0.1)[:, None] * np.ones((1, 2))
  expected = 0.3 * 0.01 ** (np.arange(101) / 100)[:, None] * np.array([1, 0.5])
  np.testing.assert_allclose(_run(controller, scores_TL), expected, rtol=1e-4)


def test_convergence_follows_the_similarity():
  # overlap / (1 - target) = 0.1, 0.2, 0.05 and 0.9 over 0.1; the last beyond the limit.
  watch = make_watch(4, target=0.9, smoothing=1)
  scores_TL = np.tile([0.9, 0.8, 0.95, 0.1], (3, 1))
  strength_TL = _run(strategies.convergence(watch, WIDE, ALWAYS, 0.1, 1.0, limit=5.0), scores_TL)
  np.testing.assert_allclose(strength_TL[0], [0.1] * 4, rtol=1e-5)  # nothing seen yet
  np.testing.assert_allclose(strength_TL[-1], [0.1, 0.2, 0.05, 0.5], rtol=1e-5)
  squared = strategies.convergence(watch, WIDE, ALWAYS, 0.1, 1.0, sensitivity=2.0, limit=5.0)
  np.testing.assert_allclose(_run(squared, scores_TL)[-1], [0.1, 0.4, 0.025, 0.5], rtol=1e-4)


def test_convergence_of_orthogonal_experts_is_finite():
  watch = make_watch(1, target=0.9, smoothing=1)
  strength_TL = _run(strategies.convergence(watch, WIDE, ALWAYS, 0.1), np.ones((3, 1)))
  np.testing.assert_allclose(strength_TL[-1], [0.1 / 4], rtol=1e-5)


def test_performance_relaxes_while_the_loss_stalls_or_rises_and_restores_as_it_falls():
  steps = np.arange(600)
  # Falls by 0.2 % a step, rises, falls again.
  log_loss = np.where(steps < 200, -0.002 * steps, -0.4 + 0.001 * (steps - 200))
  log_loss = np.where(steps < 400, log_loss, -0.2 - 0.02 * (steps - 400))
  controller = strategies.performance(
    make_watch(1, performance_window=50, improvement=0.01),
    WIDE,
    ALWAYS,
    0.1,
    relaxation_floor=0.25,
    relaxation_steps=60,
  )
  strength_T = _run(controller, np.full((600, 1), 0.96), 5 * np.exp(log_loss))[:, 0]
  np.testing.assert_allclose(strength_T[:230], 0.1, rtol=1e-5)
  np.testing.assert_allclose(strength_T[340:400], 0.025, rtol=1e-4)
  np.testing.assert_allclose(strength_T[-50:], 0.1, rtol=1e-5)
  falling = np.log(strength_T[260:270])
  np.testing.assert_allclose(np.diff(falling), math.log(0.25) / 60, rtol=1e-3)


@pytest.mark.parametrize("make", [strategies.convergence, strategies.performance])
def test_a_collapse_boosts_unless_switched_off(make):
  scores_TL = np.full((120, 2), 0.9)
  scores_TL[100:, 1] = 0.5
  watch = make_watch(2, target=0.8)
  settings = {"limit": 1.0001} if make is strategies.convergence else {"relaxation_floor": 1.0}
  boosted = make(watch, WIDE, ALWAYS, 0.1, 1.0, boost_multiplier=3.0, **settings)
  np.testing.assert_allclose(_run(boosted, scores_TL)[-1], [0.1, 0.3], rtol=1e-3)
  calm = make(watch, WIDE, ALWAYS, 0.1, 1.0, emergency_boost=False, **settings)
  np.testing.assert_allclose(_run(calm, scores_TL)[-1], [0.1, 0.1], rtol=1e-3)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: strategies.scheduled(make_watch(1), WIDE, ALWAYS, 0.0), "initial_strength"),
    (lambda: strategies.scheduled(make_watch(1), WIDE, ALWAYS, 0.1, 2.0), "deeper_layer_scaling"),
    (lambda: strategies.convergence(make_watch(1, target=1.0), WIDE, ALWAYS), "target .*below 1"),
    (lambda: strategies.convergence(make_watch(1), WIDE, ALWAYS, sensitivity=0.0), "sensitivity"),
    (lambda: strategies.convergence(make_watch(1), WIDE, ALWAYS, limit=1.0), "limit"),
    (
      lambda: strategies.performance(make_watch(1), WIDE, ALWAYS, relaxation_floor=1.5),
      "relaxation_floor",
    ),
    (
      lambda: strategies.performance(make_watch(1), WIDE, ALWAYS, relaxation_steps=0),
      "relaxation_steps",
    ),
  ],
)
def test_parameters_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()
