import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import filters


def _run(filter_, values):
  state, states = filter_.init(), []
  for value in values:
    state = filter_.update(state, jnp.asarray(value, jnp.float32))
    states.append(state)
  return states


def test_mean_is_plain_then_exponential():
  values = [s.value for s in _run(filters.exponential_mean((), 3), [3.0, 6.0, 9.0, 12.0])]
  np.testing.assert_allclose(values, [3, 4.5, 6, 8], rtol=1e-6)  # 6 + (12 - 6) / 3


def test_mean_holds_still_where_a_measurement_is_not_finite():
  states = _run(
    filters.exponential_mean((2,), 2), [[jnp.nan, 1.0], [4.0, jnp.inf], [jnp.nan, 3.0], [6.0, 5.0]]
  )
  np.testing.assert_allclose(states[0].value, [0, 1])  # nothing seen yet, one seen
  np.testing.assert_allclose(states[1].value, [4, 1])  # the first one counts fully
  np.testing.assert_allclose(states[2].value, [4, 2])
  np.testing.assert_allclose(states[3].value, [5, 3.5])
  np.testing.assert_array_equal(states[3].seen, [2, 2])


def test_mean_damps_white_noise_as_documented():
  mean = filters.exponential_mean((), 10)
  noise = jax.random.normal(jax.random.key(0), (20000,))
  _, values = jax.lax.scan(lambda s, x: (mean.update(s, x), s.value), mean.init(), noise)
  np.testing.assert_allclose(jnp.std(values[100:]), 1 / np.sqrt(19), rtol=0.05)


def test_window_holds_the_last_values_and_the_first_stands_in_for_the_missing():
  states = _run(filters.sliding_window((2,), 3), [[1, 9], [2, 8], [3, 7], [4, 6]])
  np.testing.assert_array_equal(states[0].values_W, [[1, 9]] * 3)
  np.testing.assert_array_equal(states[1].values_W, [[1, 9], [2, 8], [1, 9]])
  np.testing.assert_array_equal(states[3].values_W, [[4, 6], [2, 8], [3, 7]])
  assert [bool(filters.is_full(s)) for s in states] == [False, False, True, True]
  np.testing.assert_array_equal(filters.latest(states[3]), [4, 6])


def test_window_repeats_the_last_value_for_one_that_is_not_finite():
  states = _run(filters.sliding_window((), 2), [jnp.nan, 5.0, -jnp.inf])
  np.testing.assert_array_equal(states[0].values_W, [0, 0])
  np.testing.assert_array_equal(states[2].values_W, [5, 5])


@pytest.mark.parametrize("make", [filters.exponential_mean, filters.sliding_window])
def test_steps_are_checked(make):
  with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
    make((), 0)
