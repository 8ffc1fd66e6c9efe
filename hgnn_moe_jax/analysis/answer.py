"""The run's answer in five lines: what a reader wants to know before any figure."""

import collections
from collections.abc import Sequence

import numpy as np

from hgnn_moe_jax.analysis.runs import RunData

# Of summary.json.
_COST = (
  *("parameters", "tokens_seen", "train_seconds", "tokens_per_second", "compile_seconds"),
  *("device", "last", "unigram_perplexity"),
)


# A score is beyond chance, or below it, if experts overlap by at least a tenth less, or more, than
# unrelated ones do: newly initialised ones are within a twentieth of it.
_MARGIN = 0.1


def answer(run: RunData, baseline: RunData | None = None) -> list[tuple[str, str]]:
  """(question, answer) pairs, five of them.

  Args:
    run: with at least one training record.
    baseline: of the same text, tokenizer and steps; see `comparable`.
  """
  return [
    ("Did the experts specialise beyond chance?", _specialization(run)),
    ("What did it cost?", _cost(run)),
    ("What did the controller do?", _controller(run)),
    ("Did it beat its baseline?", _baseline(run, baseline)),
    ("What to try next?", _next(run, baseline)),
  ]


def at_the_end(run: RunData, field: str) -> np.ndarray:
  """Mean over the last tenth of the logged steps; by layer if the field is."""
  values = run.train[field]
  return values[-max(1, len(values) // 10) :].mean(axis=0)


def beyond_chance(score_L: Sequence[float] | np.ndarray, chance: float) -> np.ndarray:
  """Layer by layer, whether the overlap `1 - score` is at most 0.9 of that of unrelated experts."""
  return 1.0 - np.asarray(score_L) <= (1.0 - _MARGIN) * (1.0 - chance)


def _below_chance(score_L: np.ndarray, chance: float) -> bool:
  """Whether in some layer the overlap is at least 1.1 times that of unrelated experts."""
  return bool(np.any(1.0 - score_L >= (1.0 + _MARGIN) * (1.0 - chance)))


def comparable(run: RunData, other: RunData) -> str:
  """Why two runs' perplexities cannot be compared; empty if they can."""
  if run.data.get("fingerprint") != other.data.get("fingerprint"):
    return "they were trained on different texts or tokenizers"
  if run.train["step"][-1] != other.train["step"][-1]:
    return f"they have {run.train['step'][-1]} and {other.train['step'][-1]} steps"
  ours, theirs = run.config.evaluation.stride, other.config.evaluation.stride
  if ours != theirs:
    return f"they were scored with evaluation.stride={ours} and {theirs}"
  return ""


def levels(values_L: Sequence[float] | np.ndarray, digits: int = 3) -> str:
  """One number per layer, as it is written everywhere: 0.452 / 0.347."""
  return " / ".join(f"{value:.{digits}f}" for value in np.atleast_1d(values_L))


def _specialization(run: RunData) -> str:
  experts = run.config.model.num_experts
  if experts == 1:
    return "There is one expert: nothing to compare."
  if reason := run.lacks("output_specialization", "weight_specialization", "effective_experts"):
    return f"Unknown: {reason}."
  if missing := [
    k for k in ("output_specialization", "weight_specialization") if k not in run.chance
  ]:
    return f"Unknown: config.json holds no chance level of {' and '.join(missing)}."
  score_L, chance = at_the_end(run, "output_specialization"), run.chance["output_specialization"]
  if not np.isfinite(score_L).all():
    return "Unknown: the last steps measured no finite numbers."
  above = int(np.sum(beyond_chance(score_L, chance)))
  verdict = {0: "No", len(score_L): "Yes"}.get(above, f"In {above} of {len(score_L)} layers")
  dropout = run.config.model.dropout
  masks = f", in training, where dropout of {dropout:g} makes them differ more" if dropout else ""
  effective = levels(at_the_end(run, "effective_experts"), 2)
  by_weights = levels(at_the_end(run, "weight_specialization"))
  return (
    f"{verdict}. By what they do: {levels(score_L)} layer by layer{masks}; unrelated experts have "
    f"{chance:.3f}, give or take a tenth of the overlap, and copies 0; {effective} effective "
    f"experts of {experts}. By their weights: {by_weights}, chance "
    f"{run.chance['weight_specialization']:.4f}, which says little about what they do."
  )


def _cost(run: RunData) -> str:
  if run.summary is None:
    return f"The run is not finished: step {run.train['step'][-1]} of {run.total_steps}."
  s = run.summary
  if missing := [field for field in _COST if field not in s]:
    return f"Unknown: summary.json, of another version, has no {', '.join(missing)}."
  return (
    f"{s['parameters']:,} parameters, {s['tokens_seen']:,} tokens in {s['train_seconds']:.0f} s of "
    f"training ({s['tokens_per_second']:,.0f} tokens/s) and {s['compile_seconds']:.0f} s of "
    f"compilation on {s['device']['kind']}. Validation token perplexity "
    f"{s['last']['token_perplexity']:.1f}, word perplexity {s['last']['word_perplexity']:.1f}; a "
    f"unigram model has {s['unigram_perplexity']:.0f} per token."
  )


def _controller(run: RunData) -> str:
  if reason := run.lacks("weight_strength", "output_strength"):
    return f"Unknown: {reason}."
  kind = run.config.adaptive.controller
  parts = []
  for penalty in ("weight", "output"):
    strength_SL = run.train[f"{penalty}_strength"]
    if strength_SL.any():
      parts.append(
        f"{penalty} penalty at most {levels(strength_SL.max(axis=0))}, "
        f"{levels(strength_SL[-1])} at the end"
      )
  strengths = "; ".join(parts) or "no penalty acted"
  if kind == "constant":
    return f"None adapted anything; {strengths}."
  counts = collections.Counter(event["name"] for event in run.events)
  names = {
    "emergency_on": "emergencies",
    "converged": "convergences",
    "plateau": "validation plateaus",
  }
  seen = ", ".join(f"{label}: {counts[name]}" for name, label in names.items() if counts[name])
  return f"{kind}: {strengths}. Events, layer by layer: {seen or 'none'}."


def _baseline(run: RunData, baseline: RunData | None) -> str:
  if baseline is None:
    return "Unknown: no baseline was given. Add --baseline=FOLDER of a run without penalties."
  if reason := comparable(run, baseline):
    return f"They cannot be compared: {reason}."
  if not run.evaluations or not baseline.evaluations:
    return "Unknown: one of the two has not been evaluated yet."
  ours, theirs = (np.exp(float(r.evaluations[-1]["loss"])) for r in (run, baseline))
  verdict = "Yes" if ours < theirs else "No"
  return (
    f"{verdict}, by one seed each: token perplexity {ours:.2f}, {baseline.config.name} has "
    f"{theirs:.2f} ({100 * (ours / theirs - 1):+.1f} %)."
  )


def _next(run: RunData, baseline: RunData | None) -> str:
  if run.events_of("non_finite"):
    return (
      "Start anew in another folder with a lower training.learning_rate or a longer "
      "training.warmup_steps: the loss or its gradient was not finite."
    )
  if run.summary is None:
    return "Let the run go on: the same command continues it."
  if run.config.model.num_experts == 1:
    return "Compare with coupled experts: configs/graph.py."
  lacking = run.lacks("output_specialization", "output_strength", "weight_strength")
  if lacking or "output_specialization" not in run.chance:
    return "Train it again with this version: its records do not tell whether the experts differ."
  score_L, chance = at_the_end(run, "output_specialization"), run.chance["output_specialization"]
  penalised = bool(run.train["output_strength"].any())
  constant = run.config.adaptive.controller == "constant"
  alike = _below_chance(score_L, chance)
  if alike and not penalised:
    cure = (
      "--config.orthogonality.output_strength=0.1"
      if constant
      else "--config.adaptive.objective=output with --config.adaptive.signal=output"
    )
    return (
      "The experts are more alike than unrelated ones, and nothing asks them to differ in what "
      f"they do: {cure}, in a new --workdir."
    )
  if alike:
    cure = (
      "orthogonality.output_strength"
      if constant
      else "adaptive.maximum_strength, or adaptive.target_specialization if the controller had "
      "converged"
    )
    return f"The penalty is too weak for some layer: raise {cure}."
  if not penalised and not run.train["weight_strength"].any():
    return (
      "They differ as unrelated ones do, and nothing asks them to: train more seeds, and see "
      "whether they do again."
    )
  if baseline is None:
    return "Find out what it is worth: train the same config without penalties, and compare seeds."
  return "Repeat it with more seeds: python -m hgnn_moe_jax.analysis.compare says how sure it is."
