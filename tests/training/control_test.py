"""Controllers from the config, what they do in a run, and their events."""

import numpy as np
import pytest

from hgnn_moe_jax.config_rules import CONTROLLERS
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.training import events, loop
from hgnn_moe_jax.training.assembly import make_controller


def adaptive_changes(controller: str, **changes):
  return {
    "orthogonality.weight_strength": 0.0,
    "orthogonality.output_strength": 0.0,
    "orthogonality.warmup_steps": 0,
    "adaptive.controller": controller,
    **changes,
  }


@pytest.mark.parametrize("name", [c for c in CONTROLLERS if c != "constant"])
def test_every_controller_starts_from_the_config(name, tiny_config):
  config = tiny_config(**adaptive_changes(name, **{"adaptive.initial_strength": 0.05})).validate()
  controller = make_controller(config, total_steps=100)
  strengths = controller.strengths(controller.init())
  # Base 0.05, layer 1 scaled by 0.8, all factors 1; feedback starts at its minimum, 0.001.
  first = {"feedback": [0.001, 0.001]}.get(name, [0.05, 0.04])
  np.testing.assert_allclose(strengths.weight_L, first, rtol=1e-6)
  np.testing.assert_array_equal(strengths.output_L, [0.0, 0.0])


def test_the_penalty_that_is_not_driven_keeps_its_strength(tiny_config):
  changes = adaptive_changes("schedule", **{"adaptive.objective": "output"})
  config = tiny_config(**{**changes, "orthogonality.weight_strength": 0.3}).validate()
  assert config.penalties() == (True, True)
  controller = make_controller(config, total_steps=100)
  np.testing.assert_allclose(controller.strengths(controller.init()).weight_L, [0.3, 0.3])


@pytest.mark.parametrize(
  ("objective", "penalties"),
  [("weight", (True, False)), ("output", (False, True)), ("both", (True, True))],
)
def test_the_objective_decides_which_penalties_are_in_the_loss(objective, penalties, tiny_config):
  config = tiny_config(**adaptive_changes("adaptive", **{"adaptive.objective": objective}))
  assert config.penalties() == penalties


def test_pairs_share_a_layers_strength_in_a_run(tiny_config, tmp_path, read_metrics):
  changes = adaptive_changes("adaptive", **{"adaptive.pair_emphasis": 1.0})
  loop.train(tiny_config(**changes), tmp_path, quiet=True)
  train = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
  first, *rest = (np.asarray(r["weight_pairs"]) for r in train)
  np.testing.assert_array_equal(first, [1.0 - np.eye(3)] * 2)
  for pairs in rest:
    assert pairs.sum() == pytest.approx(12.0, rel=1e-4) and pairs.std() > 0.5
  assert np.asarray(train[-1]["output_pairs"]).shape == (2, 3, 3)


def test_two_masters_for_one_penalty_are_refused(tiny_config):
  changes = adaptive_changes("adaptive")
  with pytest.raises(ConfigError, match=r"orthogonality.weight_strength=0.1: set it to 0"):
    tiny_config(**{**changes, "orthogonality.weight_strength": 0.1}).validate()


def test_changes_of_flags_are_events():
  calm = events.no_flags(2)
  busy = events.Flags(emergency=[False, True], plateau=True, converged=[True, False])
  assert events.changes(calm, calm) == []
  assert events.changes(calm, busy) == [
    {"name": "emergency_on", "layer": 1},
    {"name": "plateau"},
    {"name": "converged", "layer": 0},
  ]
  # The end of a plateau and of convergence is no event of its own.
  assert events.changes(busy, calm) == [{"name": "emergency_off", "layer": 1}]


def test_an_adaptive_run_tells_its_events_and_continues_bit_for_bit(
  tiny_config, tmp_path, monkeypatch, read_metrics
):
  """At learning rate 0 validation cannot improve: a plateau, and the law relaxes."""
  config = tiny_config(
    **adaptive_changes(
      "adaptive",
      **{
        "training.learning_rate": 0.0,
        "training.final_learning_rate": 0.0,
        "training.schedule": "constant",
        "evaluation.every": 2,
        "adaptive.performance_window": 3,
        "adaptive.decay_schedule": "none",
      },
    )
  )
  loop.train(config, tmp_path / "whole", quiet=True)
  whole = read_metrics(tmp_path / "whole")
  assert not any("pairs" in name for record in whole for name in record), "no pair_emphasis"
  # Evaluations at 2, 4, 6, ...: the first is the best; at 6 it is 4 steps old, at least the window
  # of 3, so step 7 runs in a plateau.
  assert [(r["step"], r["name"]) for r in whole if r.get("name") == "plateau"] == [(7, "plateau")]
  strength = {r["step"]: r["weight_strength"][0] for r in whole if r["kind"] == "train"}
  assert strength[1] == pytest.approx(0.1)
  assert strength[12] < strength[8] < strength[6] == strength[1]

  def crash(self):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:  # Right after the plateau's first step was recorded.
    record = loop.Run._record
    patch.setattr(
      loop.Run, "_record", lambda self, p: (record(self, p), self.step >= 8 and crash(self))
    )
    with pytest.raises(KeyboardInterrupt):
      loop.train(config, tmp_path / "cut", quiet=True)
  loop.train(config, tmp_path / "cut", quiet=True)
  assert read_metrics(tmp_path / "cut") == whole
