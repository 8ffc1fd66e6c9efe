import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import base, schedules
from hgnn_moe_jax.control.constant import ConstantState, constant


def _observation(step):
  return base.Observation(
    step=jnp.asarray(step, jnp.int32),
    weight_specialization_L=jnp.full(3, 0.9),
    output_specialization_L=jnp.full(3, 0.4),
    effective_experts_L=jnp.full(3, 2.5),
    lm_loss=jnp.asarray(4.2),
  )


def test_init_is_step_zero():
  state = constant(0.1, 0.2, 3, schedules.constant_schedule()).init()
  assert isinstance(state, ConstantState)
  assert state.count == 0 and state.count.dtype == jnp.int32 and state.count.shape == ()


def test_strengths_are_base_times_factor_in_every_layer():
  controller = constant(0.1, 0.4, 3, schedules.linear_warmup(4))
  strengths = controller.strengths(ConstantState(count=jnp.asarray(1, jnp.int32)))
  assert strengths.weight_L.dtype == strengths.output_L.dtype == jnp.float32
  np.testing.assert_allclose(strengths.weight_L, [0.025] * 3, rtol=1e-6)  # 0.1 * 1/4
  np.testing.assert_allclose(strengths.output_L, [0.1] * 3, rtol=1e-6)  # 0.4 * 1/4


def test_update_counts_and_ignores_what_it_sees():
  controller = constant(0.1, 0.2, 3, schedules.linear_warmup(4))
  state = controller.update(ConstantState(count=jnp.asarray(7, jnp.int32)), _observation(7))
  assert state.count == 8 and state.count.dtype == jnp.int32
  blind = _observation(7)._replace(lm_loss=jnp.asarray(jnp.nan))
  chex.assert_trees_all_equal(controller.update(controller.init(), blind).count, jnp.int32(1))


def test_count_is_the_step_whose_strengths_come_next():
  # Strengths at step t come after t updates: factors 0, 1/4, 2/4, 3/4, 1, 1.
  controller = constant(0.2, 0.0, 1, schedules.linear_warmup(4))
  state, seen = controller.init(), []
  for step in range(6):
    assert state.count == step
    seen.append(float(controller.strengths(state).weight_L[0]))
    state = controller.update(state, _observation(step))
  np.testing.assert_allclose(seen, [0, 0.05, 0.1, 0.15, 0.2, 0.2], rtol=1e-6)


def test_the_base_does_not_compound():
  # A thousand steps at factor one half: an overwritten base would be 2^-1000.
  controller = constant(0.2, 0.2, 2, lambda step: jnp.asarray(0.5))
  state = jax.lax.fori_loop(
    0, 1000, lambda i, s: controller.update(s, _observation(i)), controller.init()
  )
  assert state.count == 1000
  np.testing.assert_allclose(controller.strengths(state).output_L, [0.1, 0.1], rtol=1e-6)


def test_no_flag_ever_is_raised():
  controller = constant(0.1, 0.2, 3, schedules.constant_schedule())
  flags = controller.flags(controller.init())
  assert all(flag.dtype == jnp.bool_ for flag in flags)
  np.testing.assert_array_equal(flags.emergency_L, [False] * 3)
  np.testing.assert_array_equal(flags.converged_L, [False] * 3)
  assert flags.plateau.shape == () and not flags.plateau


def test_an_evaluation_changes_nothing():
  controller = constant(0.1, 0.2, 3, schedules.constant_schedule())
  state = ConstantState(count=jnp.asarray(7, jnp.int32))
  assert controller.observe_evaluation(state, 3.0) is state


def test_one_trace_for_all_steps_and_the_state_keeps_its_types():
  controller = constant(0.1, 0.2, 3, schedules.decay("cosine", 10, 0.1))

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(state, observation):
    return controller.strengths(state), controller.update(state, observation)

  state = controller.init()
  for t in range(5):
    _, new = step(state, _observation(t))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    state = new


def test_jit_and_scan_give_what_plain_calls_give():
  controller = constant(0.1, 0.2, 2, schedules.decay("exponential", 5, 0.1))

  def step(state, t):
    return controller.update(state, _observation(t)), controller.strengths(state).weight_L

  _, scanned = jax.lax.scan(step, controller.init(), jnp.arange(7))
  state = controller.init()
  for t in range(7):
    np.testing.assert_allclose(scanned[t], controller.strengths(state).weight_L, rtol=1e-6)
    state = controller.update(state, _observation(t))


def test_no_gradient_flows_through_strengths():
  def total(slope):
    controller = constant(0.1, 0.2, 2, lambda step: slope * step.astype(jnp.float32))
    return jnp.sum(controller.strengths(ConstantState(jnp.asarray(3, jnp.int32))).output_L)

  value, gradient = jax.value_and_grad(total)(2.0)
  np.testing.assert_allclose(value, 0.2 * 2 * 3 * 2, rtol=1e-6)
  assert gradient == 0.0


def test_init_makes_new_arrays_that_can_be_donated():
  controller = constant(0.1, 0.2, 2, schedules.constant_schedule())
  step = jax.jit(lambda s: controller.update(s, _observation(0)), donate_argnums=0)
  first = controller.init()
  step(first)
  assert step(controller.init()).count == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-0.1, 0.0, 2), "weight_strength must be finite and at least 0, got -0.1"),
    ((float("nan"), 0.0, 2), "weight_strength .* got nan"),
    ((0.0, float("inf"), 2), "output_strength .* got inf"),
    ((0.0, 0.0, 0), "num_layers must be an integer of at least 1, got 0"),
    ((0.0, 0.0, 2.0), "num_layers .* got 2.0"),
    ((0.0, 0.0, True), "num_layers .* got True"),
  ],
)
def test_hyper_parameters_are_checked_in_the_factory(arguments, message):
  with pytest.raises(ValueError, match=message):
    constant(*arguments, schedules.constant_schedule())
