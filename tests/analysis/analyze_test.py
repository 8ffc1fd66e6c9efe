"""Figures and the report of real, tiny runs; what figures compute, by hand."""

import html.parser
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import analysis
from hgnn_moe_jax.analysis import curves, experts, style
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import ModelConfig
from hgnn_moe_jax.models.coupling import learned_ties
from hgnn_moe_jax.training import loop

FIGURES = {
  *("loss", "specialization", "strengths", "emergencies", "correlation", "throughput", "gates"),
  *("similarity", "couplings"),
}


@pytest.fixture
def train(tiny_config, tmp_path, shared_programs):
  """train(folder, **changes) -> folder of a finished tiny run."""

  def go(folder, **changes):
    loop.train(tiny_config(**changes), tmp_path / folder, quiet=True)
    return tmp_path / folder

  return go


class Page(html.parser.HTMLParser):
  """Ids, links, images and text of a page; every tag closed."""

  VOID = ("meta", "img")

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.links, self.images, self.texts = [], [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    if tag not in self.VOID:
      self.open.append(tag)
    if "id" in given:
      self.ids.append(given["id"])
    if tag == "a":
      self.links.append(given["href"])
    if tag == "img":
      self.images.append(given)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def test_a_report_of_a_run(train):
  folder = train("run")
  path = analysis.analyze_adaptive_orthogonality(folder)
  assert path == folder / "analysis" / "report.html"
  for name in FIGURES:
    assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (path.parent / f"{name}.svg").read_text()
  page = Page(path.read_text())
  assert page.open == [] and len(page.images) == len(FIGURES)
  assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in page.images)
  assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
  assert "http" not in path.read_text().replace("http-equiv", ""), "no network"
  assert "Did the experts specialise beyond chance?" in page.texts
  perplexity = json.loads((folder / "summary.json").read_text())["last"]["token_perplexity"]
  assert f"{perplexity:.2f}" in page.texts


@pytest.mark.parametrize(
  ("changes", "missing"),
  [
    ({"model.num_experts": 1, "orthogonality.weight_strength": 0.0,
      "orthogonality.output_strength": 0.0}, {"similarity", "couplings"}),
    ({"model.coupler": "mean"}, {"couplings"}),
    ({"model.coupler": "attention"}, {"couplings"}),
    ({"model.coupler": "hypergraph", "model.hyperedges": "all"}, set()),
  ],
  ids=["one expert", "mean", "attention", "hypergraph"],
)  # fmt: skip
def test_every_kind_of_model_has_its_figures(train, changes, missing):
  folder = train("run", **changes)
  analysis.analyze_adaptive_orthogonality(folder)
  drawn = {path.stem for path in (folder / "analysis").glob("*.png")}
  assert drawn == FIGURES - missing


def test_the_same_run_gives_the_same_figures(train, tmp_path):
  folder = train("run")
  one, two = (analysis.analyze_adaptive_orthogonality(folder, tmp_path / n) for n in "ab")
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
  np.testing.assert_allclose(found.weight_similarity[:, range(3), range(3)], 1.0, rtol=1e-5)


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


def test_two_approaches(train, tmp_path):
  runs = [
    {"name": name, "run": train(f"{name}-{seed}", seed=seed, **changes)}
    for name, changes in {"weak": {}, "strong": {"orthogonality.output_strength": 1.0}}.items()
    for seed in (1, 2)
  ]
  path = analysis.compare_orthogonality_approaches(runs, tmp_path / "out", baseline="weak")
  table = path.read_text()
  assert "| weak | 2 |" in table and "2 pairs" in table.splitlines()[3]
  assert {p.suffix for p in path.parent.iterdir()} == {".md", ".csv", ".png", ".svg"}


def command(*words):
  return subprocess.run(
    [sys.executable, "-m", "hgnn_moe_jax.analysis", *map(str, words)],
    capture_output=True,
    text=True,
  )


def test_the_command_and_its_refusals(train, tmp_path):
  folder = train("run")
  done = command(folder, f"--baseline={folder}")
  assert (done.returncode, done.stdout) == (0, f"{folder}/analysis/report.html\n"), done.stderr
  assert "(+0.0 %)" in (folder / "analysis" / "report.html").read_text()
  nothing, nowhere = command(), command(tmp_path / "nowhere")
  assert nothing.returncode == nowhere.returncode == 2
  assert nothing.stderr.startswith("error: give the folder of a run")
  assert "no config.json there" in nowhere.stderr and len(nowhere.stderr.splitlines()) == 1


def test_without_matplotlib_the_extra_is_named(train):
  folder = train("run")
  hide = "import sys; sys.modules['matplotlib'] = None; from hgnn_moe_jax.analysis.__main__ import "
  done = subprocess.run(
    [sys.executable, "-c", f"{hide}main; main()", str(folder)], capture_output=True, text=True
  )
  assert done.returncode == 2 and "pip install 'hgnn_moe_jax[analysis]'" in done.stderr
