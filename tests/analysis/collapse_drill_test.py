"""The drill's measures by hand, and the drill itself on a tiny run."""

import json

import pytest

from hgnn_moe_jax.analysis import collapse_drill
from hgnn_moe_jax.analysis.collapse_drill import Outcome
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import loop


def record(score, experts):
  return {"output_specialization": score, "effective_experts": experts, "output_strength": [0, 0]}


@pytest.fixture
def pair(write_run):
  """A healthy run and its copy: fault after step 60; layer 1 comes back later than layer 0.

  From the fault on the score of layer 0 rises by 0.02 a step from 0, that of layer 1 by 0.01; the
  effective experts of both stay at 1 for 30 steps and are 4 from there.
  """
  before = [record([0.8, 0.8], [4.0, 4.0])] * 60
  after = [
    record([min(0.02 * k, 0.8), min(0.01 * k, 0.8)], [4.0 if k > 30 else 1.0] * 2)
    for k in range(1, 141)
  ]
  events = [
    {"step": 40, "name": "emergency_on", "layer": 1},  # before the fault: not its detection
    {"step": 60, "name": "fault"},
    {"step": 63, "name": "emergency_on", "layer": 0},
    {"step": 67, "name": "emergency_on", "layer": 1},
    {"step": 90, "name": "emergency_on", "layer": 0},  # a second one
  ]
  last = {"token_perplexity": 100.0, "word_perplexity": 400.0}
  healthy = write_run("arm", before * 2, events[:1], last)
  damaged = write_run("arm-fault", before + after, events, last | {"token_perplexity": 103.0})
  return healthy, damaged


def test_measures_by_hand(pair):
  """90 % of 0.8 is 0.72. The mean of 10 values that rise by 0.01 is 0.01 (k - 4.5): k = 77.
  Of the effective experts 9 of 10 must be 4: (9 * 4 + 1) / 10 = 3.7 > 3.6: k = 39."""
  outcome = collapse_drill.measure("arm", *map(read_run, pair))
  assert outcome == Outcome(
    arm="arm",
    detected=7,
    score_recovered=77,
    experts_recovered=39,
    score_before=pytest.approx([0.8, 0.8]),
    score_end=pytest.approx([0.8, 0.8]),
    experts_before=[4.0, 4.0],
    experts_end=[4.0, 4.0],
    perplexity=103.0,
    healthy_perplexity=100.0,
    false_alarms=1,
  )
  text = collapse_drill.table([outcome])
  assert "| arm | 7 | 77 | 39 | 0.800/0.800, 0.800/0.800 |" in text
  assert "100.0 → 103.0 (+3.0 %) | 1 |" in text


def test_what_did_not_happen_is_no(pair):
  healthy, damaged = map(read_run, pair)
  short = {name: values[:100] for name, values in damaged.train.items()}
  events = [e for e in damaged.events if e.get("layer") != 1]
  outcome = collapse_drill.measure("arm", healthy, damaged._replace(train=short, events=events))
  assert outcome.detected is None, "one layer is not all"
  assert outcome.score_recovered is None and outcome.experts_recovered == 39
  assert "| arm | no | no | 39 |" in collapse_drill.table([outcome])


@pytest.fixture
def config(tiny_config):
  return tiny_config(
    **{
      "training.steps": 24,
      "training.log_every": 5,  # for others to read; the drill counts steps
      # Masks of their own would make even exact copies of one expert look different.
      "model.dropout": 0.0,
      "orthogonality.weight_strength": 0.0,
      "orthogonality.output_strength": 0.0,
      "adaptive.signal": "output",
      "adaptive.objective": "output",
      "adaptive.emergency_window": 10,
      "adaptive.emergency_grace": 0,
      "adaptive.target_specialization": 0.5,
    }
  )


def test_a_drill(config, tmp_path, shared_programs, monkeypatch):
  """What a clone of all experts does to a run is seen, and by the controller as well."""
  arms = ["none", "adaptive_boost"]
  none, boost = collapse_drill.drill(config, tmp_path, arms, fault_step=12, noise=0.0)
  assert none.detected is None and boost.detected <= 10
  assert none.false_alarms == 0
  for outcome in (none, boost):
    assert min(outcome.experts_before) > 2.0 and outcome.perplexity != outcome.healthy_perplexity
  run = read_run(tmp_path / "none-fault")
  assert len(run.train["step"]) == 24
  assert run.train["effective_experts"][12].max() < 1.01, "the first step after the fault"
  assert run.train["output_specialization"][12].max() < 0.01
  assert config.name == "tiny" and config.adaptive.controller == "constant", "left as it was"

  def refuse(*args, **kwargs):
    raise AssertionError("trained again")

  monkeypatch.setattr(loop, "train", refuse)
  again = collapse_drill.drill(config, tmp_path, arms, fault_step=12, noise=0.0)
  assert again == [none, boost]
  # What is there belongs to these settings and to no others.
  for fault_step, noise in ((13, 0.0), (12, 0.1)):
    with pytest.raises(UserError, match=r'none-fault belongs to another fault: .*"step": 12'):
      collapse_drill.drill(config, tmp_path, ["none"], fault_step, noise)
  config.seed += 1
  with pytest.raises(UserError, match=r"/none belongs to another run: seed: 42 -> 43\."):
    collapse_drill.drill(config, tmp_path, ["none"], fault_step=12, noise=0.0)


@pytest.mark.parametrize(
  ("arms", "fault_step", "message"),
  [
    (["none", "nobody"], 12, "--arms=nobody: unknown; use some of none,constant,adaptive"),
    (["none"], 24, "--fault_step=24: use a step before the end, config.training.steps=24"),
  ],
)
def test_a_drill_that_cannot_be(config, tmp_path, arms, fault_step, message):
  with pytest.raises(UserError, match=message):
    collapse_drill.drill(config, tmp_path, arms, fault_step, noise=0.0)
  assert list(tmp_path.iterdir()) == []


def test_the_command(config, config_file, command, tmp_path, shared_programs, drawn):
  """A table on the terminal; the same, its numbers and a figure in the folder."""
  folder, config.model.num_layers = tmp_path / "drill", 1
  options = [f"--workdir={folder}", "--arms=feedback", "--fault_step=12", "--healthy_steps=3"]
  done = command(collapse_drill.main, config_file(config), *options)
  assert done.status == 0, done.err
  content = json.loads((folder / "drill.json").read_text())
  assert content["arms"][0]["arm"] == "feedback" and content["noise"] == 0.01
  assert content["healthy"] == [{"arm": "feedback", "steps": 3, "false_alarms": 0}]
  assert done.out.startswith((folder / "drill.md").read_text())
  assert done.out.endswith("feedback: 0 false alarms in 3 steps of a small model\n")
  assert (folder / "drill.png").read_bytes().startswith(b"\x89PNG")
  assert (folder / "drill.svg").stat().st_size > 1000
