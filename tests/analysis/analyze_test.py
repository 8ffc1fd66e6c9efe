"""Figures and the report of real, tiny runs; what figures compute, by hand."""

import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import analysis
from hgnn_moe_jax.analysis import curves, experts, style
from hgnn_moe_jax.analysis.__main__ import main
from hgnn_moe_jax.analysis.analyze import analyze
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models.coupling import learned_ties

FIGURES = {
  *("loss", "specialization", "strengths", "emergencies", "correlation", "throughput", "gates"),
  *("similarity", "couplings"),
}


def test_a_report_of_a_run(finished_run, read_page, drawn):
  folder = finished_run
  path = analysis.analyze_adaptive_orthogonality(folder)
  assert path == folder / "analysis" / "report.html"
  for name in FIGURES:
    assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (path.parent / f"{name}.svg").read_text()
  page = read_page(path)
  assert len(page.images) == len(FIGURES) and "Left out" not in page.texts
  assert "Did the experts specialise beyond chance?" in page.texts
  perplexity = json.loads((folder / "summary.json").read_text())["last"]["token_perplexity"]
  assert f"{perplexity:.2f}" in page.texts
  caption = " ".join(page.texts)
  told = re.search(r"specialization ([\d./ ]+)\); .* tokens \(([\d./ ]+):", caption).groups()
  (same, same_1), (other, other_1) = (map(float, levels.split(" / ")) for levels in told)
  assert same < other and same_1 < other_1


@pytest.mark.parametrize(
  ("changes", "other"),
  [
    ({"model.num_experts": 1, "orthogonality.weight_strength": 0.0,
      "orthogonality.output_strength": 0.0}, FIGURES - {"loss", "throughput"}),
    ({"model.coupler": "mean", "model.selected_experts": 1}, {"couplings", "loads"}),
    ({"model.coupler": "attention"}, {"couplings"}),
    ({"model.coupler": "hypergraph", "model.hyperedges": "all"}, set()),
  ],
  ids=["one expert", "sparse mean", "attention", "hypergraph"],
)  # fmt: skip
def test_every_kind_of_model_has_its_figures(train, changes, other, drawn):
  folder = train("run", **{"model.num_layers": 1, "model.dropout": 0.0} | changes)
  analysis.analyze_adaptive_orthogonality(folder)
  drawn = {path.stem for path in (folder / "analysis").glob("*.png")}
  assert drawn == FIGURES ^ other


def test_the_same_run_gives_the_same_figures(finished_run, tmp_path, drawn):
  one, two = (analysis.analyze_adaptive_orthogonality(finished_run, tmp_path / n) for n in "ab")
  for name in FIGURES - {"throughput"}:
    assert (one.parent / f"{name}.svg").read_bytes() == (two.parent / f"{name}.svg").read_bytes()


def test_similarities_are_those_of_the_checkpoint(train):
  """Without dropout the output similarity of the tiny run is what its last step logged, nearly:
  other tokens, one step later. Of the weights it is the same."""
  folder = train("run", **{"model.dropout": 0.0, "training.ema_decay": 0.0})
  run = read_run(folder)
  found = experts.load_experts(run)
  off = ~np.eye(3, dtype=bool)
  logged = {key: run.train[f"{key}_specialization"][-1] for key in ("weight", "output")}
  score = lambda m: 1.0 - m[:, off].mean(axis=1)  # noqa: E731
  np.testing.assert_allclose(score(found.weight_similarity), logged["weight"], atol=0.01)
  np.testing.assert_allclose(score(found.output_similarity), logged["output"], atol=0.1)
  for similarity in (found.weight_similarity, found.other_tokens_similarity):
    np.testing.assert_allclose(similarity[:, range(3), range(3)], 1.0, rtol=1e-5)
  assert np.all(score(found.other_tokens_similarity) > score(found.output_similarity))


def test_a_validation_split_smaller_than_a_batch(train, text_file, tmp_path, monkeypatch):
  """One batch that goes round: the mean over its examples, however often they are in it."""
  folder = tmp_path / "short"
  folder.mkdir()
  lines = text_file.read_text().split("\n\n")
  for name, part in {"train": lines, "valid": lines[:2], "test": lines[2:4]}.items():
    (folder / f"{name}.txt").write_text("\n\n".join(part))
  run = read_run(train("run", **{"data.path": str(folder), "data.rows": "documents"}))
  examples = run.data["validation"]["examples"]
  assert 0 < examples < run.config.training.batch_size - 1
  found = experts.load_experts(run)
  run.config.training.batch_size = examples
  np.testing.assert_allclose(
    found.output_similarity, experts.load_experts(run).output_similarity, atol=0.05
  )
  assert found.output_similarity.shape == found.other_tokens_similarity.shape == (2, 3, 3)


def test_ties_by_hand():
  model = ModelConfig(num_experts=3, coupler="graph", coupler_layers=1, num_layers=1)
  # softplus(x) = log(1 + e^x): of log(e^2 - 1) it is 2, of log(e - 1) it is 1.
  one, two = np.log(np.e - 1), np.log(np.e**2 - 1)
  adjacency = jnp.asarray([[[9.0, two, one], [one, 9.0, one], [one, one, 9.0]]], jnp.float32)
  (ties,) = learned_ties(model, {"coupler": {"operator_0": {"adjacency": adjacency}}})
  assert ties.members == ((0, 1), (0, 2), (1, 2))
  # Shares of expert 0: 2/3 from 1, 1/3 from 2; of the others a half each.
  np.testing.assert_allclose(ties.weight_LM, [[(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2, 1 / 2]],
                             rtol=1e-5)  # fmt: skip
  model = ModelConfig(num_experts=3, coupler="hypergraph", hyperedges="all", coupler_layers=2)
  weight = jnp.full((4, 4), one, jnp.float32)
  operators = {f"operator_{g}": {"hyperedge_weight": weight} for g in range(2)}
  first, second = learned_ties(model, {"coupler": operators})
  assert first.members == second.members == ((0, 1), (0, 2), (1, 2), (0, 1, 2))
  np.testing.assert_allclose(first.weight_LM, np.ones((4, 4)), rtol=1e-5)
  assert learned_ties(ModelConfig(coupler="mean"), {}) == []


def test_smoothing_by_hand():
  values = np.array([1.0, 2.0, 6.0, 0.0])
  np.testing.assert_allclose(style.smooth(values, 2), [1.0, 1.5, 4.0, 3.0])
  np.testing.assert_allclose(style.smooth(values, 1), values)
  np.testing.assert_allclose(style.smooth(np.stack([values] * 2, 1), 2)[:, 1], [1, 1.5, 4, 3])
  np.testing.assert_array_equal(np.isnan(style.smooth(np.array([1, np.nan, 1, 1]), 2)),
                                [False, True, True, False])  # fmt: skip


def test_rank_correlation_by_hand():
  """Ranks 1 2 3 4 against 1 3 2 4: rho = 1 - 6 * 2 / (4 * 15) = 0.8."""
  rho = curves.rank_correlation(np.array([[1, 10, 100, 1000], [1, 3, 2, 4], [5, 5, 5, 5.0]]))
  assert rho[0, 1] == pytest.approx(0.8) and rho[0, 0] == pytest.approx(1.0)
  assert np.isnan(rho[2]).all()


def test_two_approaches(groups, tmp_path):
  runs = [{"name": name, "run": run.folder} for name, members in groups.items() for run in members]
  path = analysis.compare_orthogonality_approaches(runs, tmp_path / "out", baseline="b")
  table = path.read_text()
  assert "| b | 2 |" in table and "2 pairs" in table.splitlines()[3]
  assert {p.suffix for p in path.parent.iterdir()} == {".md", ".csv", ".html", ".png", ".svg"}


OLDER = {
  "emergencies": ["plateau", "converged"],
  "gates": ["gate_load"],
  "correlation": ["effective_experts"],
  "specialization": ["effective_experts"],
}


def test_a_run_of_an_older_version(finished_run, rewrite, read_page):
  """Fields that it has not logged, one of them logged from some step on, and no chance levels."""
  lacking = {field for fields in OLDER.values() for field in fields}

  def older(record):
    if record["kind"] == "train" and record["step"] < 9:
      record = {k: v for k, v in record.items() if k not in lacking}
    return {**record, "output_pairs": None} if record["kind"] == "train" else record

  rewrite(finished_run, older)
  content = json.loads((finished_run / "config.json").read_text())
  del content["chance"]
  content["config"]["model"]["flux"] = 3
  (finished_run / "config.json").write_text(json.dumps(content))
  report = analyze(read_run(finished_run), finished_run / "analysis", None)
  drawn = {path.stem for path in report.path.parent.glob("*.png")}
  assert drawn == FIGURES - set(OLDER) - {"similarity", "couplings"}
  page = read_page(report.path)
  assert set(report.left_out) <= set(page.texts) and "Left out" in page.texts
  assert report.left_out == [
    "model.flux=3 of config.json is unknown to this version and was passed over",
    "config.json holds no chance level of weight_specialization, so it is shown without",
    "config.json holds no chance level of output_specialization, so it is shown without",
    *(
      f"{title}: no {fields} in some or all train records; the run is of another version"
      for title, fields in {
        "Specialization": "effective_experts",
        "Timeline": "converged, plateau",
        "Correlations": "effective_experts",
        "Gate load": "gate_load",
      }.items()
    ),
    "Similarity of experts, Couplings: the model may be one that this version does not know "
    "(model.flux); look at it with the version that trained it",
  ]
  assert "effective experts" not in page.texts and "output specialization" in page.texts


def empty(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.unlink()


def garble(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"\x00" * 100)


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (lambda f: shutil.rmtree(f / "checkpoints"), "no checkpoints there; copy them, too"),
    (
      lambda f: [shutil.rmtree(p) for p in (f / "checkpoints").iterdir()],
      "no checkpoint was saved",
    ),
    (lambda f: empty(f / "checkpoints"), "cannot be read"),
    (lambda f: garble(f / "checkpoints"), "cannot be read"),
    (lambda f: [empty(p / "state") for p in (f / "checkpoints").iterdir()], "cannot be read"),
  ],
  ids=["no folder", "none", "emptied", "garbled", "no arrays"],
)
def test_a_checkpoint_missing_or_damaged(finished_run, read_page, damage, reason):
  damage(finished_run)
  report = analyze(read_run(finished_run), finished_run / "analysis", None)
  (line,) = report.left_out
  assert line.startswith("Similarity of experts, Couplings: ") and reason in line
  assert line in read_page(report.path).texts
  assert {p.stem for p in report.path.parent.glob("*.png")} == FIGURES - {"similarity", "couplings"}
  assert (finished_run / "checkpoints").exists() == ("copy them" not in line), "nothing is made"


@pytest.mark.parametrize(
  ("field", "value", "reason"),
  [
    ("path", "/nowhere.txt", "/nowhere.txt"),
    ("split_seed", 1, "is not the one this run was trained on"),
    ("tokenizer", "runes", "config.data.tokenizer='runes'"),
  ],
)
def test_a_text_that_is_not_at_hand(finished_run, field, value, reason):
  content = json.loads((finished_run / "config.json").read_text())
  content["config"]["data"][field] = value
  (finished_run / "config.json").write_text(json.dumps(content))
  report = analyze(read_run(finished_run), finished_run / "analysis", None)
  (line,) = report.left_out
  assert line.startswith("Similarity of experts, Couplings: ") and reason in line
  assert {p.stem for p in report.path.parent.glob("*.png")} == FIGURES - {"similarity", "couplings"}


def test_an_unfinished_run_that_was_cut_short(finished_run, read_page, drawn):
  """Killed in the middle of its fifth record: no evaluation yet, and no checkpoint."""
  (finished_run / "summary.json").unlink()
  shutil.rmtree(finished_run / "checkpoints")
  lines = (finished_run / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
  (finished_run / "metrics.jsonl").write_text("".join(lines)[:-20])
  path = analyze(read_run(finished_run), finished_run / "analysis", None).path
  page = read_page(path)
  assert f"{finished_run}, seed 42, not finished: step 4 of 12" in page.texts
  assert "The run is not finished: step 4 of 12." in page.texts and "None yet." in page.texts
  assert "not evaluated yet" in (path.parent / "loss.svg").read_text()


def test_a_run_of_one_step_that_was_not_finite(finished_run, rewrite):
  """Points are seen where there is no line, and nothing fails on NaN."""

  def diverge(record):
    if record["kind"] == "event" or record["step"] > 2:
      return None
    return {k: _nan(v) if record["step"] == 2 else v for k, v in record.items()}

  rewrite(finished_run, diverge)
  (finished_run / "summary.json").unlink()
  shutil.rmtree(finished_run / "checkpoints")
  report = analyze(read_run(finished_run), finished_run / "analysis", None)
  assert len(list(report.path.parent.glob("*.png"))) == len(FIGURES) - 2
  answered = report.path.read_text()
  assert "Unknown: the last steps measured no finite numbers." in answered
  assert style.marker(np.array([1.0, np.nan])) == "o" and style.marker(np.arange(2.0)) is None


def _nan(value):
  if isinstance(value, list):
    return [_nan(v) for v in value]
  return "nan" if isinstance(value, float) else value


@pytest.mark.parametrize(("layers", "shape"), [(1, (2, 1)), (4, (2, 4)), (6, (4, 4))])
def test_layers_wrap_after_four(tmp_path, layers, shape):
  """Of six layers and two kinds: layers 0 to 3 of both, then 4 and 5 of both; the rest is off."""
  with style.layer_panels(2, layers, tmp_path / "f.png", 3.0, 1.0) as (figure, axes_KL):
    assert axes_KL.shape == (2, layers)
    places = [[panel.get_subplotspec() for panel in axes_L] for axes_L in axes_KL]
    assert places[0][0].get_gridspec().get_geometry() == shape
    for kind in range(2):
      for layer in range(layers):
        spec = places[kind][layer]
        assert (spec.rowspan.start, spec.colspan.start) == (2 * (layer // 4) + kind, layer % 4)
    unused = [axes for axes in figure.axes if axes not in axes_KL.ravel()]
    assert not any(axes.axison for axes in unused) and len(unused) == np.prod(shape) - 2 * layers
    assert figure.get_figwidth() == max(6.0, 3.0 * shape[1])


def test_the_command(command, finished_run):
  done = command(main, finished_run, f"--baseline={finished_run}")
  page = finished_run / "analysis" / "report.html"
  assert done == (0, f"{page}\n", "")
  assert "(+0.0 %)" in page.read_text()


def test_the_command_starts(tmp_path):
  words = ["-m", "hgnn_moe_jax.analysis", tmp_path / "nowhere"]
  done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such folder")


def test_one_run_that_cannot_be_read_does_not_stop_the_others(command, finished_run, tmp_path):
  """What was left out, and what could not be done, is told in a line each."""
  shutil.rmtree(finished_run / "checkpoints")
  other, nowhere = shutil.copytree(finished_run, tmp_path / "other"), tmp_path / "nowhere"
  done = command(main, finished_run, nowhere, other)
  pages = [folder / "analysis" / "report.html" for folder in (finished_run, other)]
  assert done.status == 2
  assert done.out.splitlines() == list(map(str, pages)) and all(p.exists() for p in pages)
  missing = "Similarity of experts, Couplings: no checkpoints there; copy them, too, or let the run"
  assert done.err.splitlines() == [
    f"left out: {finished_run}: {missing} go on",
    f"error: {nowhere}: no such folder; give that of a run, such as runs/quickstart",
    f"left out: {other}: {missing} go on",
  ]
  shutil.rmtree(finished_run / "analysis")
  (finished_run / "analysis").write_text("")
  for words, line in {
    (): "error: give the folder of a run: python -m hgnn_moe_jax.analysis runs/quickstart",
    (other, f"--baseline={nowhere}"): f"error: {nowhere}: no such folder",
    (finished_run,): f"error: {finished_run}/analysis: cannot be written to",
  }.items():
    refused = command(main, *words)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(line) and len(refused.err.splitlines()) == 1


def test_without_matplotlib_the_extra_is_named(tmp_path):
  hide = "import sys; sys.modules['matplotlib'] = None; from hgnn_moe_jax.analysis.__main__ import "
  done = subprocess.run(
    [sys.executable, "-c", f"{hide}main; main()", str(tmp_path), str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "pip install 'hgnn_moe_jax[analysis]'" in done.stderr
  assert len(done.stderr.splitlines()) == 1
