import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.control import schedules

TOTAL, FLOOR = 40, 0.1


def _values(schedule, steps):
  return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32)))


CLOSED_FORMS = {
  "cosine": lambda p: FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * p)) / 2,
  "exponential": lambda p: FLOOR**p,
  "linear": lambda p: 1 - (1 - FLOOR) * p,
  "step": lambda p: FLOOR ** (math.floor(4 * p) / 4),
  "none": lambda p: 1.0,
}


def test_every_kind_has_a_closed_form_here():
  assert set(CLOSED_FORMS) == set(schedules.DECAYS)


@pytest.mark.parametrize("kind", schedules.DECAYS)
def test_decay_follows_its_closed_form_and_stays_at_the_end(kind):
  steps = np.arange(0, 2 * TOTAL)
  expected = [CLOSED_FORMS[kind](min(t / TOTAL, 1)) for t in steps]
  np.testing.assert_allclose(
    _values(schedules.decay(kind, TOTAL, FLOOR), steps), expected, rtol=1e-5
  )


@pytest.mark.parametrize("kind", ["cosine", "exponential", "linear", "step"])
@settings(deadline=None, max_examples=10)
@given(total=st.integers(1, 10**6), floor=st.floats(0.01, 1.0))
def test_decay_starts_at_one_ends_at_the_floor_exactly_and_never_rises(kind, total, floor):
  steps = np.unique(np.linspace(0, total, 20).astype(int))
  values = _values(schedules.decay(kind, total, floor), [*steps, total + 1, 2 * 10**9])
  assert values[0] == 1.0
  np.testing.assert_array_equal(values[-3:], [np.float32(floor)] * 3)
  assert np.all(np.diff(values) <= 1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_end_is_exact_where_a_reciprocal_is_not(kind):
  # 61 * (1 / 61) = 1 - 2^-24 in float32, which is how compiled code divides by 61.
  assert _values(schedules.decay(kind, 61, 0.25), [61])[0] == np.float32(0.25)


def test_a_product_is_the_product():
  schedule = schedules.product(schedules.linear_warmup(4), schedules.decay("linear", 8, 0.0))
  np.testing.assert_allclose(_values(schedule, [0, 2, 4, 6, 8]), [0, 0.375, 0.5, 0.25, 0])
  assert schedules.product()(3) == 1.0 and schedules.product()(3).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_to_zero(kind):
  assert schedules.decay(kind, 7, 0.0)(7) == 0.0


def test_step_decay_by_hand():
  # 3 drops over 7 steps: at ceil(7/3) = 3, ceil(14/3) = 5 and 7; ratio 0.001^(1/3) = 0.1
  values = _values(schedules.decay("step", 7, 0.001, num_drops=3), range(9))
  np.testing.assert_allclose(values, [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_step_decay_drops_on_time_where_float32_rounds_down():
  # All boundaries of 100 drops over 2,000,000 steps, and the steps before them.
  schedule = schedules.decay("step", 2_000_000, 0.5, num_drops=100)
  at = 20_000 * np.arange(1, 101)
  np.testing.assert_allclose(_values(schedule, at), 0.5 ** (np.arange(1, 101) / 100), rtol=1e-6)
  np.testing.assert_allclose(_values(schedule, at - 1), 0.5 ** (np.arange(100) / 100), rtol=1e-6)


def test_linear_warmup_by_hand():
  np.testing.assert_allclose(
    _values(schedules.linear_warmup(4), range(-1, 7)), [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
  )


def test_warmup_of_no_steps_and_the_constant_are_one_everywhere():
  for schedule in (schedules.linear_warmup(0), schedules.constant_schedule()):
    np.testing.assert_array_equal(_values(schedule, [0, 1, 10**9]), [1, 1, 1])


ALL = [
  schedules.constant_schedule(),
  schedules.linear_warmup(3),
  *(schedules.decay(kind, 9, 0.2) for kind in schedules.DECAYS),
]


@pytest.mark.parametrize("schedule", ALL)
def test_python_integers_and_arrays_give_float32_scalars_with_and_without_jit(schedule):
  traces = []
  compiled = jax.jit(lambda step: (traces.append(step), schedule(step))[1])
  for step in (0, 4, 9):
    plain = schedule(step)
    traced = compiled(jnp.asarray(step, jnp.int32))
    for value in (plain, schedule(jnp.asarray(step, jnp.int32)), traced):
      assert value.dtype == jnp.float32 and value.shape == () and not value.weak_type
      np.testing.assert_allclose(value, plain, rtol=1e-6)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: schedules.linear_warmup(-1), "steps must be an integer of at least 0, got -1"),
    (lambda: schedules.linear_warmup(2.5), "steps .* got 2.5"),
    (
      lambda: schedules.decay("cosin", 9, 0.1),
      "kind must be one of cosine, exponential, linear, step, none, got 'cosin'",
    ),
    (lambda: schedules.decay("cosine", 0, 0.1), "total_steps .* at least 1, got 0"),
    (lambda: schedules.decay("cosine", 9, 1.1), r"floor must be in \[0, 1\], got 1.1"),
    (lambda: schedules.decay("linear", 9, float("nan")), r"floor must be in \[0, 1\], got nan"),
    (lambda: schedules.decay("exponential", 9, 0.0), "floor must be above 0 .*got 0.0"),
    (lambda: schedules.decay("step", 9, 0.0), "floor must be above 0 .*got 0.0"),
    (lambda: schedules.decay("step", 9, 0.1, num_drops=0), "num_drops .* got 0"),
  ],
)
def test_hyper_parameters_are_checked_in_the_factory(call, message):
  with pytest.raises(ValueError, match=message):
    call()
