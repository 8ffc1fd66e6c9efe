"""The page about a comparison: the answer in sentences, tables, figures, how it was computed."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from hgnn_moe_jax.analysis import figures, page, tables
from hgnn_moe_jax.analysis.answer import beyond_chance
from hgnn_moe_jax.analysis.page import Figure, Section
from hgnn_moe_jax.analysis.runs import RunData
from hgnn_moe_jax.analysis.statistics import Comparison, Difference, Row
from hgnn_moe_jax.analysis.tables import interval_text, seconds_text

_LEVEL = 0.05

_METHOD = (
  "± is half of a 95 % interval of the mean over seeds by Student's t: "
  "t(0.975, n - 1) s / sqrt(n). One seed has none.",
  "Differences from the baseline are paired by seed: runs of one seed, batch size and length see "
  "the same batches in the same order. p is that of the two-sided paired t-test of no difference.",
  "No p-value is corrected for the number of comparisons: of twenty groups without any difference, "
  "one is expected below 0.05.",
  "Perplexities are those of the whole validation split.",
  "Training time has the steps, their batches and the writing of records in it; not compilation, "
  "evaluation and checkpoints. It is the clock's, with whatever else ran on the machine. From "
  "metrics.jsonl: tokens / tokens_per_second, summed over the steps; with training.log_every above "
  "1 each record stands for the steps since the one before.",
  "Equal time is the longest training time that every run has reached. Between two evaluations the "
  "logarithm of the perplexity is interpolated. A run that is cut there has not come to the end of "
  "its learning-rate schedule: planned for that time, it would end lower.",
  "Scores are means over the last tenth of the steps and over seeds, layer by layer. Chance is "
  "what independent random experts of that size score; beyond it are scores whose overlap, 1 - "
  "score, is at least a tenth less. Outputs are compared in training: with dropout, masks make "
  "experts differ more than they do.",
)


def draw(
  groups: Mapping[str, Sequence[RunData]], comparison: Comparison, output: pathlib.Path
) -> list[Figure]:
  """Writes comparison_curves.png and comparison.png, and SVG, into a folder."""
  curves, layers = output / "comparison_curves.png", output / "comparison.png"
  figures.comparison_curves(groups, comparison.seconds, curves)
  drawn = [
    Figure(
      curves,
      "Perplexity over steps and time",
      "Mean over seeds, and their range. The line on the right is the time at which the table "
      "compares; dots are the evaluations of single runs.",
    )
  ]
  if figures.comparison(groups, layers):
    drawn.append(
      Figure(
        layers,
        "Specialization and strengths",
        "Layer by layer: mean over seeds, and their range. Dashed: what unrelated experts would "
        "score.",
      )
    )
  return drawn


def comparison_page(
  groups: Mapping[str, Sequence[RunData]],
  comparison: Comparison,
  drawn: Sequence[Figure],
  left_out: Sequence[str],
) -> str:
  """The page as HTML.

  Args:
    groups: of the comparison.
    comparison: its numbers.
    drawn: embedded, in this order.
    left_out: what could not be shown, and why.
  """
  count = sum(map(len, groups.values()))
  steps = next(iter(groups.values()))[0].train["step"][-1]
  baseline = "no baseline" if comparison.baseline is None else f"baseline {comparison.baseline!r}"
  return page.document(
    f"Comparison of {', '.join(groups)}"
    if len(groups) < 4
    else f"Comparison of {len(groups)} groups",
    f"{count} runs of {steps} steps, {baseline}",
    answer(comparison),
    left_out,
    [
      Section("tables", "Tables", _tables(comparison)),
      *map(page.figure, drawn),
      Section("method", "How the numbers were computed", page.bullets(_METHOD)),
      Section("runs", "Runs", _runs(groups)),
    ],
  )


def answer(comparison: Comparison) -> list[tuple[str, str]]:
  """(question, answer) pairs."""
  told = [
    ("Which group has the lowest perplexity?", _lowest(comparison)),
    ("Which groups differ from the baseline?", _differences(comparison)),
    ("Whose experts exceed chance?", _chance(comparison.rows)),
    ("What did it cost in time?", _cost(comparison)),
  ]
  if comparison.seconds is not None:
    told.append(("And after equal time?", _equal_time(comparison)))
  return told


def _lowest(comparison: Comparison) -> str:
  ranked = sorted(comparison.rows, key=lambda r: r.perplexity.mean)
  best, worst = ranked[0], ranked[-1]
  text = (
    f"{best.name}: validation token perplexity {interval_text(best.perplexity, 2)}, "
    f"{_seeds(len(best.seeds))}."
  )
  if len(ranked) > 1:
    text += f" The highest is {worst.name} with {interval_text(worst.perplexity, 2)}."
  return text


def _differences(comparison: Comparison) -> str:
  if comparison.baseline is None:
    names = ", ".join(row.name for row in comparison.rows)
    return f"Unknown: no baseline was given. Add --baseline=NAME, one of {names}."
  return _tested(comparison.baseline, {r.name: r.difference for r in comparison.rows})


def _tested(baseline: str | None, given: Mapping[str, Difference | None]) -> str:
  """What the paired t-test says of each group that has a difference from the baseline."""
  differences = {name: d for name, d in given.items() if d is not None and not math.isnan(d.mean)}
  if not differences:
    return "There is nothing to pair."
  clear, unclear, untested = [], [], []
  for name, d in differences.items():
    kind = untested if math.isnan(d.p) else clear if d.p < _LEVEL else unclear
    p = "" if math.isnan(d.p) else f" (p = {d.p:.2g})"
    kind.append(f"{name} {d.mean:+.2f}{p}")
  kinds = {
    "distinguishable from zero": clear,
    "not distinguishable from zero": unclear,
    "not tested, for want of a second seed in common": untested,
  }
  told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
  tests = len(clear) + len(unclear)
  by = f", by a paired t-test over seeds at {_LEVEL}" if tests else ""
  uncorrected = f" Uncorrected for {tests} comparisons." if tests > 1 else ""
  return f"Difference from {baseline}{by}: {told}.{uncorrected}"


def _chance(rows: Sequence[Row]) -> str:
  """By the output specialization; whole sentences for every, some and no layer."""
  everywhere, somewhere, nowhere, unknown = [], [], [], []
  for row in rows:
    score_L, chance = row.output_specialization, row.chance.get("output_specialization")
    if row.experts == 1 or not score_L or chance is None:
      unknown.append(f"{row.name} has one expert" if row.experts == 1 else row.name)
      continue
    above = int(beyond_chance(score_L, chance).sum())
    if above == len(score_L):
      everywhere.append(row.name)
    elif above:
      somewhere.append(f"{row.name} ({above} of {len(score_L)})")
    else:
      nowhere.append(row.name)
  kinds = {
    "in every layer": everywhere,
    "in some layers": somewhere,
    "in no layer": nowhere,
    "unknown": unknown,
  }
  told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
  return f"By what they do, {told}. Chance is what unrelated experts score."


def _cost(comparison: Comparison) -> str:
  """Seconds of each group, and in per cent of the baseline's."""
  seconds = {row.name: row.seconds for row in comparison.rows}
  base = seconds.get(comparison.baseline) if comparison.baseline is not None else None
  parts = []
  for name, value in seconds.items():
    share = ""
    if base and name != comparison.baseline:
      share = f" ({100.0 * (value / base - 1.0):+.0f} %)"
    parts.append(f"{name} {seconds_text(value)}{share}")
  return f"Training, mean over seeds: {', '.join(parts)}."


def _equal_time(comparison: Comparison) -> str:
  assert comparison.seconds is not None
  rows = {r.name: r.timed_perplexity for r in comparison.rows if r.timed_perplexity is not None}
  known = {name: value for name, value in rows.items() if not math.isnan(value.mean)}
  late = [name for name in rows if name not in known]
  text = f"After {seconds_text(comparison.seconds)} of training, which every run has reached, "
  if known:
    best = min(known, key=lambda name: known[name].mean)
    text += f"{best} is lowest with {interval_text(known[best], 2)}."
  else:
    text += "no group was evaluated."
  if known and late:
    text += f" Not evaluated by then: {', '.join(late)}."
  if comparison.baseline is None:
    return text
  differences = {r.name: r.timed_difference for r in comparison.rows}
  return f"{text} {_tested(comparison.baseline, differences)}"


def _seeds(count: int) -> str:
  return f"mean of {count} seeds" if count > 1 else "one seed"


def _tables(comparison: Comparison) -> str:
  parts = {
    "After equal steps": tables.equal_steps(comparison),
    "Training time": tables.equal_time(comparison),
    "Experts, layer by layer": tables.scores(comparison),
  }
  return "".join(
    f"<h3>{title}</h3>{page.table(*tables.cells(columns, comparison.rows))}"
    for title, columns in parts.items()
  )


def _runs(groups: Mapping[str, Sequence[RunData]]) -> str:
  rows = []
  for name, runs in groups.items():
    for run in runs:
      assert run.summary is not None
      device = run.summary.get("device", {}).get("kind", "")
      last = f"{run.summary['last']['token_perplexity']:.2f}"
      seconds = f"{run.summary['train_seconds']:.4g}"
      rows.append([name, str(run.config.seed), last, seconds, device, str(run.folder)])
  head = ["group", "seed", "token perplexity", "training seconds", "device", "folder"]
  return page.table(head, rows)
