"""Each trigger from hand-built states: fires when it must, and not one step before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.control import triggers
from hgnn_moe_jax.control.filters import Window


def _floats(*values):
  return jnp.asarray(values, jnp.float32)


def _ints(*values):
  return jnp.asarray(values, jnp.int32)


def _bools(*values):
  return jnp.asarray(values, bool)


def _window(rows, count):
  return Window(jnp.asarray(rows, jnp.float32), jnp.asarray(count, jnp.int32))


def _active(trigger, *inputs):
  """`active` after each step of the inputs, which have a leading time axis; [T, ...]."""

  def step(state, xs):
    state = trigger.update(state, *xs)
    active = state.active if hasattr(state, "active") else state.active_L
    return state, active

  return np.asarray(jax.jit(lambda xs: jax.lax.scan(step, trigger.init(), xs))(inputs)[1])


def test_below_target_has_hysteresis():
  trigger = triggers.below_target(5, target=0.8, tolerance=0.125)
  scores = _floats(0.67, 0.68, 0.79, 0.8, 0.9)
  off = trigger.update(triggers.BelowTarget(_bools(*[False] * 5)), scores)
  np.testing.assert_array_equal(off.active_L, [True, False, False, False, False])
  on = trigger.update(triggers.BelowTarget(_bools(*[True] * 5)), scores)
  np.testing.assert_array_equal(on.active_L, [True, True, True, False, False])


def test_below_target_keeps_its_mind_without_a_measurement():
  trigger = triggers.below_target(6, target=0.8, tolerance=0.1)
  blind = _floats(*[jnp.nan, jnp.inf, -jnp.inf] * 2)
  before = triggers.BelowTarget(_bools(True, True, True, False, False, False))
  np.testing.assert_array_equal(trigger.update(before, blind).active_L, before.active_L)


def test_plateau_field_by_field():
  trigger = triggers.plateau(window=100, improvement=0.01)
  before = triggers.Plateau(
    best=jnp.float32(4.0), since=jnp.int32(500), active=jnp.asarray(True, bool)
  )
  better = trigger.update(before, jnp.int32(599), jnp.float32(3.95))  # by 1.25 %
  assert (better.best, better.since, better.active) == (np.float32(3.95), 599, False)
  same = trigger.update(before, jnp.int32(600), jnp.float32(3.97))  # by 0.75 %, 100 steps later
  assert (same.best, same.since, same.active) == (4.0, 500, True)
  early = trigger.update(before, jnp.int32(599), jnp.float32(3.97))
  assert (early.best, early.since, early.active) == (4.0, 500, False)
  for loss in (jnp.nan, jnp.inf, -jnp.inf):
    blind = trigger.update(before, jnp.int32(700), jnp.float32(loss))
    assert (blind.best, blind.since, blind.active) == (4.0, 500, True)


@pytest.mark.parametrize("cadence", [1, 30, 100, 333])
def test_plateau_fires_at_any_cadence_and_never_before_the_window(cadence):
  steps = np.arange(cadence, 20 * cadence + 1000, cadence)
  active = _active(triggers.plateau(100, 0.01), _ints(*steps), _floats(*[3.0] * len(steps)))
  expected = steps - cadence >= 100  # the first loss is an improvement on nothing
  np.testing.assert_array_equal(active, expected)
  assert active.any()


def test_small_improvements_add_up():
  # 0.4 % a step: the third step after each improvement is the next, 100 steps never pass.
  steps = np.arange(50) * 30
  losses = 5.0 * 0.996 ** np.arange(50)
  assert not _active(triggers.plateau(100, 0.01), _ints(*steps), _floats(*losses)).any()
  # 0.2 % a step takes 6 steps of 30.
  losses = 5.0 * 0.998 ** np.arange(50)
  assert _active(triggers.plateau(100, 0.01), _ints(*steps), _floats(*losses)).any()


def test_plateau_ends_with_an_improvement():
  active = _active(triggers.plateau(10, 0.1), _ints(0, 10, 20, 30), _floats(3, 3, 2.6, 2.6))
  np.testing.assert_array_equal(active, [False, True, False, True])


def test_converged_after_a_full_window_and_not_before():
  trigger = triggers.converged(1, target=0.9, tolerance=0.05, window=4)
  scores = [0.85, 0.91, 0.93, 0.92, 0.94, 0.94]  # from step 1 on at the target
  active = _active(trigger, jnp.asarray(scores, jnp.float32)[:, None])[:, 0]
  np.testing.assert_array_equal(active, [False] * 4 + [True] * 2)


def test_converged_needs_a_window_even_if_it_starts_at_the_target():
  active = _active(triggers.converged(1, 0.9, 0.05, 4), jnp.full((6, 1), 0.95))[:, 0]
  np.testing.assert_array_equal(active, [False] * 3 + [True] * 3)


def test_converged_field_by_field():
  trigger = triggers.converged(4, target=0.8, tolerance=0.1, window=2)
  #   layer          0: stable  1: too wide  2: one below  3: lost (was on)
  before = triggers.Converged(
    scores=_window([[0.85, 0.98, 0.79, 0.9], [0.1, 0.1, 0.1, 0.1]], 3),
    active_L=_bools(False, False, False, True),
  )
  after = trigger.update(before, _floats(0.9, 0.85, 0.85, 0.69))
  np.testing.assert_array_equal(after.active_L, [True, False, False, False])
  np.testing.assert_allclose(after.scores.values_W[1], [0.9, 0.85, 0.85, 0.69], rtol=1e-6)
  assert after.scores.count == 4


def test_converged_has_hysteresis_and_ignores_what_is_not_finite():
  trigger = triggers.converged(2, target=0.8, tolerance=0.1, window=2)
  state = triggers.Converged(_window([[0.8, 0.8], [0.9, 0.9]], 2), _bools(True, True))
  state = trigger.update(state, _floats(0.71, jnp.nan))  # inside the tolerance; nothing
  np.testing.assert_array_equal(state.active_L, [True, True])
  state = trigger.update(state, _floats(0.69, -jnp.inf))
  np.testing.assert_array_equal(state.active_L, [False, True])


def _collapse(**changes):
  settings = {
    "threshold": 0.1,
    "window": 3,
    "effective_share": 0.5,
    "recovered_share": 0.9,
    "max_duration": 20,
    "refractory": 5,
  }
  return {**settings, **changes}


def _collapse_state(num_layers, active, **changes):
  """Three steps at score 0.9 with 4 effective experts, faults from the same."""
  state = triggers.Collapse(
    scores=_window(np.full((3, num_layers), 0.9), 3),
    effective=_window(np.full((3, num_layers), 4.0), 3),
    score_before_L=jnp.full(num_layers, 0.9 if active else 0.0),
    effective_before_L=jnp.full(num_layers, 4.0 if active else 0.0),
    duration_L=jnp.zeros(num_layers, jnp.int32),
    refractory_L=jnp.zeros(num_layers, jnp.int32),
    active_L=jnp.full(num_layers, active),
  )
  return state._replace(**changes)


def test_collapse_begins_with_a_fall_of_either():
  trigger = triggers.collapse(5, **_collapse())
  #        by less than 0.1, by more, experts to half, to less than half, nothing measured
  score, effective = _floats(0.81, 0.79, 0.9, 0.9, jnp.nan), _floats(4, 4, 2.01, 1.99, jnp.inf)
  after = trigger.update(_collapse_state(5, False), score, effective)
  np.testing.assert_array_equal(after.active_L, [False, True, False, True, False])
  np.testing.assert_allclose(after.score_before_L, [0, 0.9, 0, 0.9, 0], rtol=1e-6)
  np.testing.assert_array_equal(after.effective_before_L, [0, 4, 0, 4, 0])
  np.testing.assert_array_equal(after.duration_L, [0] * 5)
  np.testing.assert_array_equal(after.refractory_L, [0] * 5)


def test_collapse_ends_when_both_are_back():
  trigger = triggers.collapse(4, **_collapse())
  score, effective = _floats(0.84, 0.86, 0.86, jnp.nan), _floats(4, 3.55, 3.65, jnp.nan)
  state = _collapse_state(4, True, scores=_window([[0.5] * 4] * 3, 3), duration_L=_ints(7, 7, 7, 7))
  after = trigger.update(state, score, effective)
  np.testing.assert_array_equal(after.active_L, [True, True, False, True])
  np.testing.assert_array_equal(after.duration_L, [8, 8, 0, 8])
  np.testing.assert_array_equal(after.refractory_L, [0, 0, 5, 0])


def test_collapse_ends_after_its_time_and_not_before():
  trigger = triggers.collapse(2, **_collapse())
  state = _collapse_state(2, True, duration_L=_ints(18, 19))
  after = trigger.update(state, _floats(0.2, 0.2), _floats(1, 1))
  np.testing.assert_array_equal(after.active_L, [True, False])
  np.testing.assert_array_equal(after.refractory_L, [0, 5])


def test_no_collapse_in_the_refractory_period():
  trigger = triggers.collapse(3, **_collapse())
  state = _collapse_state(3, False, refractory_L=_ints(0, 1, 5))
  after = trigger.update(state, _floats(0.2, 0.2, 0.2), _floats(4, 4, 4))
  np.testing.assert_array_equal(after.active_L, [True, False, False])
  np.testing.assert_array_equal(after.refractory_L, [0, 0, 4])


def test_emergencies_are_a_refractory_period_apart():
  # Every fourth step the score falls by 0.5, and is back a step later.
  scores = np.where(np.arange(60) % 4 == 3, 0.4, 0.9).astype(np.float32)[:, None]
  active = _active(triggers.collapse(1, **_collapse()), jnp.asarray(scores), jnp.ones((60, 1)))[
    :, 0
  ]
  begins = np.flatnonzero(np.diff(active.astype(int)) == 1) + 1
  assert begins[0] == 3
  assert np.all(np.diff(begins) == 8)  # ends at +1, blind for 5 steps, the next fall is at +8


def test_no_collapse_in_the_grace_period():
  scores = jnp.asarray([0.9, 0.5, 0.9, 0.9, 0.9, 0.5, 0.5], jnp.float32)[:, None]
  active = _active(triggers.collapse(1, **_collapse(grace=5)), scores, jnp.ones((7, 1)))[:, 0]
  np.testing.assert_array_equal(active, [False] * 5 + [True] * 2)


@pytest.mark.parametrize(("steps", "fires"), [(4, True), (5, False)])
def test_collapse_compares_within_its_window(steps, fires):
  # A fall by 0.12 in all: within 4 steps a window of 5 sees it whole, within 5 it sees 4/5 of it.
  scores = jnp.asarray(np.interp(np.arange(20), [8, 8 + steps], [0.9, 0.78]), jnp.float32)[:, None]
  trigger = triggers.collapse(1, **_collapse(window=5))
  assert _active(trigger, scores, jnp.ones((20, 1))).any() == fires


@pytest.mark.parametrize(
  ("make", "name"),
  [
    (lambda: triggers.below_target(0, 0.9, 0.1), "num_layers"),
    (lambda: triggers.below_target(1, 1.1, 0.1), "target must be in .0, 1., got 1.1"),
    (lambda: triggers.below_target(1, float("nan"), 0.1), "target .* got nan"),
    (lambda: triggers.below_target(1, 0.9, 0.0), "tolerance must be .* got 0.0"),
    (lambda: triggers.converged(1, 0.9, 0.9, 10), "tolerance"),
    (lambda: triggers.converged(1, 0.9, 0.1, 0), "window"),
    (lambda: triggers.plateau(0, 0.1), "window"),
    (lambda: triggers.plateau(1, 1.0), "improvement must be in .0, 1., got 1.0"),
    (lambda: triggers.collapse(1, **_collapse(threshold=0.0)), "threshold"),
    (lambda: triggers.collapse(1, **_collapse(window=0)), "window"),
    (lambda: triggers.collapse(1, **_collapse(effective_share=1.0)), "effective_share"),
    (lambda: triggers.collapse(1, **_collapse(recovered_share=0.5)), "recovered_share"),
    (lambda: triggers.collapse(1, **_collapse(max_duration=0)), "max_duration"),
    (lambda: triggers.collapse(1, **_collapse(refractory=-1)), "refractory"),
    (lambda: triggers.collapse(1, **_collapse(grace=-1)), "grace"),
  ],
)
def test_parameters_are_checked(make, name):
  with pytest.raises(ValueError, match=name):
    make()
