"""Numbers in the documentation are those that the library computes or that results/ holds."""

import contextlib
import csv
import io
import json
import math
import pathlib
import re

import pytest

import hgnn_moe_jax
from benchmarks import data, generation, growth, memory, overhead, parts, scaling, train_step
from hgnn_moe_jax.analysis import collapse_drill

ROOT = pathlib.Path(__file__).parent.parent.parent


def page(name: str) -> str:
  return (ROOT / "docs" / name).read_text()


def rows(text: str, first: str) -> list[list[str]]:
  """The cells of a table's rows whose first cell matches."""
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return [row for row in cells if re.fullmatch(first, row[0])]


def test_the_page_computes_its_table_of_chance_levels():
  text = page("measuring-specialization.md")
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(code, {})
  table = rows(text, r"\d+")
  assert len(table) == 6
  assert rows(printed.getvalue(), r"\d+") == table


@pytest.mark.parametrize("row", rows(page("measuring-specialization.md"), r"\d+"))
def test_chance_levels_by_the_formula_in_the_text(row):
  D, square, weight, penalty, output, output_penalty = map(float, row)
  cosine = lambda n: math.sqrt(2 / (math.pi * n))  # noqa: E731
  sides = (4 * D, 4 * D, 3 * D, D)
  assert square == pytest.approx(1 - cosine(D * D), abs=6e-5)
  assert weight == pytest.approx(1 - sum(cosine(D * K) for K in sides) / 4, abs=6e-5)
  assert output == pytest.approx(1 - cosine(D), abs=1e-3)
  assert penalty == pytest.approx(sum(1 / (D * K) for K in sides), rel=0.05)
  assert output_penalty == pytest.approx(1 / D, rel=0.05)


def test_the_overhead_table_is_the_measured_one():
  result = json.loads((ROOT / "benchmarks" / "results" / "overhead_cpu.json").read_text())["steps"]
  table = rows(page("performance.md"), r"without:.*|measured,.*|adaptive,.*")
  assert len(table) == len(result)
  for (_, milliseconds, ratio, megabytes), r in zip(table, result.values(), strict=True):
    assert milliseconds == f"{1000 * r['seconds']:.1f}"
    assert megabytes == f"{r['temporary_bytes'] / 1e6:.1f}"
    told = f"{r['ratio']:.3f} [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
    assert ratio == ("1" if r["ratio_low"] == r["ratio_high"] == 1.0 else told)


def test_the_overhead_of_other_forms_is_the_measured_one():
  result = json.loads((ROOT / "benchmarks" / "results" / "overhead_forms_cpu.json").read_text())
  text = page("performance.md")
  for forms, found in result["forms"].items():
    row = overhead.table({forms: found["steps"]["adaptive both"]}).splitlines()[-1]
    assert row in text


def test_the_overhead_on_a_gpu_is_the_measured_one():
  result = json.loads((ROOT / "benchmarks" / "results" / "overhead_h200.json").read_text())
  _, _, *lines = overhead.table(result["steps"]).splitlines()
  assert "\n".join(lines) in page("performance.md")


@pytest.mark.parametrize(
  ("name", "benchmark", "where"),
  [
    ("small_cpu", train_step, "performance.md"),
    ("h200", train_step, "performance.md"),
    ("sweeps_h200", train_step, "performance.md"),
    ("turns_h200", train_step, "performance.md"),
    ("sweeps_cpu", train_step, "performance.md"),
    ("sparse_cpu", train_step, "performance.md"),
    ("accumulation_cpu", train_step, "performance.md"),
    ("layers_cpu", train_step, "performance.md"),
    ("dispatch_cpu", train_step, "performance.md"),
    ("generation_cpu", generation, "performance.md"),
    ("data_cpu", data, "performance.md"),
    ("scaling_h200", scaling, "scaling.md"),
    ("scaling_sparse_h200", scaling, "scaling.md"),
    ("scaling_muon_h200", scaling, "scaling.md"),
    ("memory_a100", memory, "gpus-and-clusters.md"),
    ("layers_h200", memory, "gpus-and-clusters.md"),
  ],
)
def test_a_benchmarks_table_is_the_measured_one(name, benchmark, where):
  result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
  assert benchmark.table(result["measurements"]) in page(where)


@pytest.mark.parametrize(
  ("study", "where"),
  [
    ("adaptive_study", "adaptive-orthogonality.md"),
    ("coupler_study", "measuring-specialization.md"),
  ],
)
def test_a_studys_table_is_the_measured_one(study, where):
  with open(ROOT / "docs" / "figures" / f"{study}.csv") as file:
    measured = list(csv.DictReader(file))
  for group in measured:
    (row,) = [row for row in rows(page(where), group["group"]) if "±" in row[2]]
    mean, half = (group[f"token_perplexity_{part}"] for part in ("mean", "half_width"))
    assert row[1:3] == [group["seeds"], f"{float(mean):.2f} ± {float(half):.2f}"]
    if group["difference_mean"]:
      mean, half = (float(group[f"difference_{part}"]) for part in ("mean", "half_width"))
      assert row[3].startswith(f"{mean:+.2f} ± {half:.2f} (p = ")


def test_the_drills_table_is_the_measured_one():
  result = json.loads((ROOT / "docs" / "figures" / "collapse_drill.json").read_text())
  outcomes = [collapse_drill.Outcome(**arm) for arm in result["arms"]]
  assert collapse_drill.table(outcomes) in page("collapse-drill.md")
  plain, *penalised = [100 * o.healthy_perplexity for o in outcomes]
  low, high = (100 * (end(penalised) / plain - 1) for end in (min, max))
  assert f"{low:+.1f} to {high:+.1f} % at 800 steps" in page("adaptive-orthogonality.md")
  assert {h["false_alarms"] for h in result["healthy"]} == {0}


def test_what_penalties_keep_is_the_planned():
  result = json.loads((ROOT / "benchmarks" / "results" / "memory_h200.json").read_text())
  before, now = (
    {(m["config"], m["sweep"]): m["temporary_bytes"] for m in found["measurements"]}
    for found in (result["before"], result)
  )
  names = "|".join({config for config, _ in now})
  table = [row for row in rows(page("performance.md"), names) if len(row) == 5]
  assert len(table) == 4
  for config, *told in table:
    expected = []
    for planned in (before, now):
      plain, needed = planned[config, "without"], planned[config, ""]
      expected += [f"{plain / 1e6:,.0f}", f"{needed / 1e6:,.0f}, {needed / plain - 1:+.1%}"]
    assert told == expected


def test_what_was_done_about_the_traffic_is_the_measured():
  found = {}
  for name in ("scaling_before", "scaling"):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    for m in result["measurements"]:
      low, high = m["predicted_seconds"]["H100, H200"]
      told = (f"{sum(m['sent_bytes'].values()) / 1e9:.1f}", f"{low:.2f} to {high:.2f}")
      found.setdefault((m["shape"], " x ".join(map(str, m["mesh"]))), []).append(told)
  table = [row for row in rows(page("scaling.md"), "large|10b") if len(row) == 6]
  assert len(table) == 6
  for shape, mesh, *told in table:
    (sent, seconds), (sent_now, seconds_now) = found[shape, mesh]
    assert told == [sent, sent_now, seconds, seconds_now]


def test_the_originals_headline_is_the_measured_one():
  result = json.loads((ROOT / "benchmarks" / "results" / "original_h200.json").read_text())
  table = rows(page("from-the-seed.md"), r"4[23]")
  assert len(table) == len(result["runs"]) == 2
  for row, run in zip(table, result["runs"], strict=True):
    best, last = run["best"], run["last"]
    assert min(perplexity for _, perplexity in run["evaluations"]) == round(
      best["token_perplexity"], 3
    )
    assert row[:8] == [
      str(run["seed"]),
      f"{best['token_perplexity']:.2f}",
      f"{best['step']:,}",
      f"{last['token_perplexity']:.2f}",
      f"{best['word_perplexity']:.1f}",
      f"{best['bits_per_byte']:.3f}",
      f"{run['train_seconds']:.1f}",
      f"{run['wall_seconds']:.1f}",
    ]
  later, runs = result["later"], [result["later"]["cold"], *result["later"]["cached"]]
  cold, *cached = runs
  walls = " and ".join(f"{run['wall_seconds']:.1f}" for run in cached)
  seconds = [f"{run[f'{part}_seconds']:.1f}" for part in ("train", "compile") for run in runs]
  told = [
    f"took {cold['wall_seconds']} s in all, {seconds[0]} of them training and {seconds[3]}",
    f"they took {walls} s: {seconds[1]} and {seconds[2]} training, {seconds[4]} and {seconds[5]}",
  ]
  bests = [run["best"]["token_perplexity"] for run in cached] + [cold["best_token_perplexity"]]
  step = cached[0]["best"]["step"]
  told.append(f"best was {min(bests):.2f} to {max(bests):.2f} at step {step:,}")
  others = result["other_programs_best_of_seed_42"].values()
  every = (*others, result["runs"][0]["best"]["token_perplexity"], *bests)
  assert len(every) == 8
  told.append(f"had a best of {min(every):.2f} to {max(every):.2f}")
  text = " ".join(page("from-the-seed.md").split())
  assert [words for words in told if words not in text] == []
  before, text = later["before"], " ".join(page("performance.md").split())
  assert f"{before['wall_seconds']:.1f} → {walls.replace(' and ', ', ')} s" in text
  few, many = (later["dispatch_milliseconds_median"][f"{n} steps"] for n in (8, 40))
  further = (many - few) / 32
  assert f"{few} ms" in text and f"{many} ms" in text
  few_rate, many_rate = (round(n * 4096 / ms) for n, ms in ((8, few), (40, many)))
  told = f"{few - 8 * further:.1f} ms for itself and {further:.2f} for each step"
  assert f"{told}: {few_rate},000 tokens/s with 8, {many_rate},000 with 40" in text


@pytest.mark.parametrize("name", ["sweeps_h200", "sweeps_cpu"])
def test_exponents_are_those_of_the_measured_sweeps(name):
  """By the command on the page."""
  text = re.sub(r"\\\n\s*", "", page("performance.md"))
  (command,) = re.findall(rf"python -m benchmarks.growth \S*/{name}.json --within.*", text)
  ranges = [growth.parse_range(words) for words in re.findall(r"--within=(\S+)", command)]
  result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
  assert ranges and growth.table(growth.curves(result["measurements"]), ranges) in text


@pytest.mark.parametrize(("name", "shape"), [("parts_cpu", "small"), ("parts_h200", "large")])
def test_the_table_of_parts_is_the_measured_one(name, shape):
  result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
  (measured,) = (m for m in result["measurements"] if m["shape"] == shape)
  assert parts.table(measured["parts_milliseconds"]) in page("performance.md")


def test_what_the_last_changes_for_gpus_bought_is_the_measured():
  found = json.loads((ROOT / "benchmarks" / "results" / "changes_h200.json").read_text())
  steps = [f"{1000 * v['seconds_per_step']:.2f}" for v in found["variants"]]
  at_once, attention, head, barrier = steps
  text = page("performance.md")
  for told in (f"→ {at_once}.", f"{at_once} → {attention} |", f"{attention} → {head} ms"):
    assert told in text
  assert f"({head} against {barrier} ms" in text
  ways = found["steps_called_one_by_one"]["milliseconds_per_step"]
  told = f"{ways['one by one']:.2f} ms a step where the loop takes {ways['loop']:.2f}"
  assert told in " ".join(text.split())
  _, in_turn, together = found["temporary_bytes_planned"].values()
  for shape, digits in (("original, before", 2), ("original", 2), ("large", 1)):
    told = " → ".join(f"{b[shape] / 1e9:.{digits}f}" for b in (in_turn, together))
    assert told in text
  less = [1 - in_turn[shape] / together[shape] for shape in in_turn]
  told = f"{100 * min(less):.0f} to {100 * max(less):.0f} % less"
  assert told in page("gpus-and-clusters.md")


def test_the_counts_of_wikitext2_are_those_that_are_asserted_elsewhere():
  asserted = (ROOT / "tests" / "data" / "corpus_test.py").read_text()
  for row in rows(page("data-and-protocols.md"), "train|validation|test"):
    for count in row[1:]:
      assert count.replace(",", "_") in asserted, row


def test_the_version_is_the_packages():
  assert f"\nversion: {hgnn_moe_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
  assert f"\n## [{hgnn_moe_jax.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
