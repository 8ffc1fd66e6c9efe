"""Runs that must not be compared, and what the command writes about those that can."""

import json
import subprocess
import sys

import pytest

from hgnn_moe_jax.analysis import compare, figures
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError

STEP = {
  "weight_specialization": [0.9, 0.8],
  "output_specialization": [0.5, 0.25],
  "effective_experts": [3.0, 2.0],
}
LAST = {"token_perplexity": 1.0, "word_perplexity": 1.0}


def group(runs):
  return compare.group_runs([(run.config.name, run) for run in runs])


def test_groups_are_named_and_seeds_in_order(groups):
  assert list(groups) == ["b", "a"] and [r.config.seed for r in groups["a"]] == [0, 1, 2]


@pytest.mark.parametrize(
  ("second", "message"),
  [
    ({"last": None}, "not finished; continue it or leave it out"),
    ({"fingerprint": "other"}, "cannot be compared with .*: text other and text"),
    ({"train": [STEP] * 3}, "steps 3 and 2"),
    ({"model.num_layers": 3}, "layers 3 and 2"),
    ({"evaluation.stride": 4}, "evaluation.stride 4 and 0"),
    ({"seed": 1, "training.learning_rate": 0.5}, "differ in more than the seed"),
    ({}, "seed 42 is there twice"),
  ],
)
def test_runs_that_cannot_be_compared(write_run, second, message):
  settings = {"train": [STEP] * 2, "last": LAST}
  runs = [write_run("one", **settings), write_run("two", **{**settings, **second})]
  with pytest.raises(UserError, match=message) as error:
    group([read_run(run) for run in runs])
  assert "two" in str(error.value)


def with_config(folder, field, value):
  """The run with one more field in the model of its config."""
  content = json.loads((folder / "config.json").read_text())
  content["config"]["model"][field] = value
  (folder / "config.json").write_text(json.dumps(content))
  return read_run(folder)


def test_unknown_fields_are_part_of_the_meaning(write_run):
  one, two, three = (write_run(n, [STEP], (), LAST, seed=s) for s, n in enumerate("abc"))
  runs = [with_config(one, "flux", 1), with_config(two, "flux", 1)]
  assert len(group(runs)["tiny"]) == 2
  with pytest.raises(UserError, match="differ in more than the seed"):
    group([*runs, with_config(three, "flux", 2)])


def test_what_does_not_decide_the_result_may_differ(write_run):
  first = write_run("one", [STEP], (), LAST, seed=0)
  second = write_run("two", [STEP], (), LAST, **{"seed": 1, "training.steps_per_dispatch": 5})
  assert len(group([read_run(first), read_run(second)])["tiny"]) == 2
  third = read_run(write_run("three", [STEP], (), LAST, seed=2, name="renamed"))
  named = [("a", read_run(first)), ("a", third)]
  assert len(compare.group_runs(named)["a"]) == 2


def test_nothing_to_compare():
  with pytest.raises(UserError, match="nothing to compare"):
    group([])


FILES = {f"comparison.{ending}" for ending in ("html", "md", "csv", "png", "svg")}
CURVES = {"comparison_curves.png", "comparison_curves.svg"}


def test_the_page_holds_everything(groups, tmp_path, read_page):
  path = compare.write(groups, tmp_path / "out", "a")
  assert {p.name for p in path.parent.iterdir()} == FILES | CURVES
  page = read_page(path.with_suffix(".html"))
  assert len(page.images) == 2
  anchors = {"tables", "comparison_curves", "comparison", "method", "runs"}
  assert anchors == set(page.ids) == {link.removeprefix("#") for link in page.links}
  text = " ".join(page.texts)
  for said in ("not distinguishable from zero: b +2.00 (p = 0.3)", "paired t-test", "Student's t",
               "No p-value is corrected", "+2.00 ± 12.71 (p = 0.3, 2 pairs)", "12.00 ± 4.97",
               "token perplexity after 20 s"):  # fmt: skip
    assert said in text
  assert "Left out" not in text


def test_models_of_several_widths_have_several_levels_of_chance(groups, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, "draw_chance", lambda axes, level, named: drawn.append(level))
  groups["a"] = [run._replace(chance={**run.chance, "output_specialization": 0.7}) for run in
                 groups["a"]]  # fmt: skip
  figures.comparison(groups, tmp_path / "comparison.png")
  # Of two layers; the strengths have none.
  assert sorted(level for level in drawn if level) == [0.7, 0.7, 0.8, 0.8, 0.99, 0.99]


def test_it_leaves_out_what_a_run_has_not_logged(groups, tmp_path, read_page, drawn):
  first = groups["b"][0]
  for field in ("weight_strength", "weight_specialization", "tokens_per_second"):
    del first.train[field]
  run = first._replace(unknown={"model.flux": 3})
  path = compare.write({**groups, "b": [run, *groups["b"][1:]]}, tmp_path / "out", "a")
  told = compare.left_out({**groups, "b": [run, *groups["b"][1:]]})
  assert [line.split(":")[0] for line in told] == [
    *(str(run.folder), "Equal time", "Weight specialization", "Strength of the weight penalty")
  ]
  assert "model.flux=3" in told[0] and "no tokens_per_second in some or all" in told[1]
  page = read_page(path.with_suffix(".html"))
  assert set(told) <= set(page.texts) and len(page.images) == 2
  text = (path.parent / "comparison.svg").read_text()
  assert "output" in text and "weight penalty" not in text


def test_nothing_logged_no_figure(groups, tmp_path, read_page):
  for run in groups["a"]:
    run.train.pop("weight_specialization")
    run.train.pop("output_specialization")
    run.train.pop("weight_strength")
  path = compare.write(groups, tmp_path / "out")
  drawn = {p.name for p in path.parent.iterdir()}
  assert drawn == (FILES | CURVES) - {"comparison.png", "comparison.svg"}
  assert len(read_page(path.with_suffix(".html")).images) == 1


def test_an_output_that_cannot_be(groups, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file: cannot be written to; choose another"):
    compare.write(groups, tmp_path / "file")


def command(*words):
  done = subprocess.run(
    [sys.executable, "-m", "hgnn_moe_jax.analysis.compare", *map(str, words)],
    capture_output=True,
    text=True,
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


def test_the_command(groups, tmp_path):
  folders = [run.folder for runs in groups.values() for run in runs]
  output = f"--output={tmp_path / 'out'}"
  with_config(folders[0], "flux", 1), with_config(folders[1], "flux", 1)
  done = command(*folders, output, "--baseline=a")
  assert done.returncode == 0, done.stderr
  assert done.stdout == (tmp_path / "out" / "comparison.md").read_text()
  oddity = "model.flux=1 of config.json is unknown to this version and was passed over"
  assert done.stderr.splitlines() == [
    f"left out: {folder}: {oddity}" for folder in sorted(folders[:2])
  ]
  named = command(f"x={folders[0]}", f"y={folders[1]}", output)
  assert "\n| x | 1 |" in named.stdout and "\n| y | 1 |" in named.stdout
  (folders[0] / "summary.json").unlink()
  refused = command(*folders, output)
  assert refused.returncode == 2 and refused.stdout == ""
  (line,) = refused.stderr.splitlines()
  assert line == f"error: {folders[0]}: the run is not finished; continue it or leave it out"
