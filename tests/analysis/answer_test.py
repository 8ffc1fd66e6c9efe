"""The five lines, from runs whose story is known."""

import pytest

from hgnn_moe_jax.analysis.answer import answer, comparable
from hgnn_moe_jax.analysis.runs import read_run

LAST = {"token_perplexity": 50.0, "word_perplexity": 500.0}
SUMMARY = {
  **{"parameters": 1234, "tokens_seen": 2048, "train_seconds": 10.0, "compile_seconds": 2.0},
  **{"tokens_per_second": 204.8, "unigram_perplexity": 400.0, "device": {"kind": "cpu"}},
}


def step(score, strength=0.0):
  return {
    "output_specialization": score,
    "weight_specialization": [0.995, 0.985],
    "effective_experts": [2.5, 2.0],
    "weight_strength": [0.0, 0.0],
    "output_strength": [strength, strength / 2],
    "lm_loss": 4.0,
  }


@pytest.fixture
def make(write_run):
  """make(folder, score, ...) -> RunData of 20 steps; chance: 0.8 for outputs, 0.99 for weights."""

  def build(folder, score, strength=0.0, events=(), last=LAST, loss=3.0, steps=20, **changes):
    records = [step(score, strength)] * steps
    run = read_run(write_run(folder, records, events, last, evaluations=[(steps, loss)], **changes))
    return run if last is None else run._replace(summary={**run.summary, **SUMMARY})

  return build


def told(run, baseline=None):
  return [text for _, text in answer(run, baseline)]


def test_questions_are_five(make):
  questions = [question for question, _ in answer(make("run", [0.5, 0.9]))]
  assert questions == [
    "Did the experts specialise beyond chance?",
    "What did it cost?",
    "What did the controller do?",
    "Did it beat its baseline?",
    "What to try next?",
  ]


@pytest.mark.parametrize(
  ("score", "verdict"),
  [
    ([0.5, 0.7], "No."),
    ([0.5, 0.9], "In 1 of 2 layers."),
    ([0.85, 0.9], "Yes."),
    ([0.81, 0.815], "No."),  # as newly initialised experts: an overlap of 0.19, chance is 0.2
    ([0.81, 0.825], "In 1 of 2 layers."),
  ],
)
def test_beyond_chance(make, score, verdict):
  first, *_ = told(make("run", score))
  assert first.startswith(f"{verdict} By what they do: {score[0]:.3f} / {score[1]:.3f}")
  assert "unrelated experts have 0.800" in first and "chance 0.9900" in first
  assert "2.50 / 2.00 effective experts of 3" in first
  assert "in training, where dropout of 0.1 makes them differ more; unrelated" in first
  assert "dropout" not in told(make("without", score, **{"model.dropout": 0.0}))[0]


def test_one_expert_has_nobody_to_differ_from(make):
  changes = {"model.num_experts": 1}
  first, *_, last = told(make("run", [1.0, 1.0], **changes))
  assert "one expert" in first and "configs/graph.py" in last


def test_cost(make):
  cost = told(make("run", [0.5, 0.9]))[1]
  assert "1,234 parameters" in cost and "10 s of training (205 tokens/s)" in cost
  assert "token perplexity 50.0" in cost and "a unigram model has 400" in cost


def test_a_run_that_goes_on(make):
  lines = told(make("run", [0.5, 0.9], last=None))
  assert lines[1] == "The run is not finished: step 20 of 100."
  assert lines[4].startswith("Let the run go on")


def test_controller(make):
  events = [{"step": 3, "name": "emergency_on", "layer": n} for n in (0, 1)]
  events += [{"step": 9, "name": "checkpoint"}, {"step": 9, "name": "plateau"}]
  line = told(make("a", [0.5, 0.9], 0.2, events, **{"adaptive.controller": "feedback"}))[2]
  assert line == (
    "feedback: output penalty at most 0.200 / 0.100, 0.200 / 0.100 at the end. Events, layer by "
    "layer: emergencies: 2, validation plateaus: 1."
  )
  assert told(make("b", [0.5, 0.9]))[2] == "None adapted anything; no penalty acted."


def test_baseline(make):
  run, better = make("run", [0.5, 0.9]), make("better", [0.5, 0.9], loss=2.9, name="plain")
  assert told(run)[3].startswith("Unknown: no baseline was given")
  assert told(run, better)[3] == (
    "No, by one seed each: token perplexity 20.09, plain has 18.17 (+10.5 %)."
  )
  assert told(better, run)[3].startswith("Yes, by one seed each: token perplexity 18.17")
  other = make("other", [0.5, 0.9], fingerprint="else")
  assert told(run, other)[3].startswith("They cannot be compared: they were trained on different")
  assert comparable(run, make("short", [0.5, 0.9], steps=10)) == "they have 20 and 10 steps"
  sliding = make("sliding", [0.5, 0.9], **{"evaluation.stride": 4})
  assert comparable(run, sliding) == "they were scored with evaluation.stride=0 and 4"


def test_next(make):
  unpenalised, weak = make("a", [0.5, 0.9]), make("b", [0.5, 0.9], 0.1)
  done = make("c", [0.85, 0.9], 0.1)
  assert "--config.orthogonality.output_strength=0.1, in a new --workdir" in told(unpenalised)[4]
  assert "too weak" in told(weak)[4] and "raise orthogonality.output_strength." in told(weak)[4]
  adaptive = {"adaptive.controller": "adaptive"}
  assert "--config.adaptive.objective=output" in told(make("d", [0.5, 0.9], **adaptive))[4]
  assert "raise adaptive.maximum_strength" in told(make("e", [0.5, 0.9], 0.1, **adaptive))[4]
  assert "without penalties" in told(done)[4]
  assert "analysis.compare" in told(done, weak)[4]


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_experts_at_chance_are_not_called_alike(make, strength):
  """Overlaps of 0.205 and 0.215 where unrelated experts have 0.2; of 0.225 is more."""
  at, below = make("at", [0.795, 0.785], strength), make("below", [0.795, 0.775], strength)
  advice = (
    "Find out what it is worth" if strength else "They differ as unrelated ones do, and nothing"
  )
  assert told(at)[4].startswith(advice)
  assert "output_strength" in told(below)[4]


def test_what_another_version_has_not_logged_is_unknown(make):
  whole = make("run", [0.85, 0.9], 0.1)
  run = whole._replace(train={k: whole.train[k] for k in ("step", "lm_loss")})
  specialised, _, controller, _, advice = told(run)
  assert specialised.startswith(
    "Unknown: no output_specialization, weight_specialization, effective"
  )
  assert controller.startswith("Unknown: no weight_strength, output_strength in some or all train")
  assert advice.startswith("Train it again with this version")


def test_without_chance_levels_nothing_is_beyond_them(make):
  run = make("run", [0.85, 0.9])._replace(chance={"weight_specialization": 0.99})
  specialised, *_, advice = told(run)
  assert specialised == "Unknown: config.json holds no chance level of output_specialization."
  assert advice.startswith("Train it again with this version")


def test_a_summary_of_another_version(make):
  run = make("run", [0.5, 0.9])
  del run.summary["unigram_perplexity"], run.summary["device"]
  assert (
    told(run)[1] == "Unknown: summary.json, of another version, has no device, unigram_perplexity."
  )


def test_a_run_that_stopped_because_it_was_not_finite(make):
  lines = told(make("run", ["nan", 0.9], events=[{"step": 20, "name": "non_finite"}], last=None))
  assert lines[0] == "Unknown: the last steps measured no finite numbers."
  assert lines[4].startswith("Start anew in another folder with a lower training.learning_rate")
