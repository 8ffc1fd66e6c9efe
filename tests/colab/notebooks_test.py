"""The notebooks in colab/: true to their sources, without logic, and run from top to bottom.

A run is a fresh kernel of this interpreter, whatever kernels the machine has installed.
"""

import ast
import configparser
import csv
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import jupytext
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from hgnn_moe_jax.analysis.runs import read_run

_ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = ["adaptive_vs_static", "collapse_and_recovery", "quickstart"]


def source(name):
  return jupytext.read(_ROOT / "colab" / f"{name}.py", fmt="py:percent")


def notebook(name):
  return nbformat.read(_ROOT / "colab" / f"{name}.ipynb", as_version=4)


def code_cells(name):
  return [cell.source for cell in notebook(name).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("ending", [".py", ".ipynb"])
def test_every_notebook_is_tested(ending):
  assert sorted(path.stem for path in (_ROOT / "colab").glob(f"*{ending}")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_without_outputs(name):
  content = lambda cells: [(cell.cell_type, cell.source) for cell in cells]  # noqa: E731
  made = notebook(name)
  nbformat.validate(made)
  assert content(made.cells) == content(source(name).cells), (
    f"jupytext --to ipynb --update colab/{name}.py writes it anew"
  )
  for cell in made.cells:
    assert not cell.get("outputs") and cell.get("execution_count") is None, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_logic_belongs_in_the_library(name):
  definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
  for cell in code_cells(name):
    assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse(cell))), cell


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_introduced(name):
  kinds = [cell.cell_type for cell in notebook(name).cells]
  assert all(kinds[k - 1] == "markdown" for k, kind in enumerate(kinds) if kind == "code")


@pytest.mark.parametrize("gpu", [False, True])
def test_installing_where_the_library_is_missing(gpu, monkeypatch, tmp_path):
  """All notebooks have the same cell. Its extras exist, and the clone is found at once."""
  (install,) = {cells[1] for cells in map(code_cells, NAMES)}
  commands = []
  monkeypatch.setattr("subprocess.run", lambda words, check: commands.append([*map(str, words)]))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr("shutil.which", lambda name: "/bin/nvidia-smi" if gpu else None)
  monkeypatch.setattr(sys, "path", [])
  exec(install, {"FOLDER": tmp_path, "REPOSITORY": "https://example.org/it"})
  clone, pip = commands
  assert clone[:2] == ["git", "clone"] and clone[-2:] == [
    "https://example.org/it",
    f"{tmp_path}/source",
  ]
  assert pip[:4] == [sys.executable, "-m", "pip", "install"]
  folder, extras = pip[-1].removesuffix("]").split("[")
  assert folder == f"{tmp_path}/source" and sys.path == [folder]
  setup = configparser.ConfigParser()
  setup.read(_ROOT / "setup.cfg")
  known = setup["options.extras_require"]
  assert all(extra in known for extra in extras.split(","))
  assert gpu == ("cuda" in extras)


class Executed(NamedTuple):
  """A notebook's folder, what it printed, and how many figures it showed."""

  folder: pathlib.Path
  printed: str
  figures: int


@pytest.fixture
def execute(tmp_path, monkeypatch):
  """execute(name) -> Executed."""
  kernel = tmp_path / "jupyter" / "kernels" / "this"
  kernel.mkdir(parents=True)
  argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  spec = {"argv": argv, "display_name": "this", "language": "python"}
  (kernel / "kernel.json").write_text(json.dumps(spec))
  for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name))
  monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
  monkeypatch.setenv("HGNN_MOE_NOTEBOOK_TINY", "1")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  cwd = tmp_path / "cwd"
  cwd.mkdir()

  def run(name):
    cells = notebook(name)
    client = NotebookClient(
      cells, timeout=900, kernel_name="this", resources={"metadata": {"path": str(cwd)}}
    )
    client.execute()
    outputs = [output for cell in cells.cells for output in cell.get("outputs", [])]
    texts = [o.text for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    data = [o.data for o in outputs if o.output_type == "display_data"]
    texts += [d["text/markdown"] for d in data if "text/markdown" in d]
    assert [path.name for path in cwd.iterdir()] == ["hgnn_moe"], "all files below one folder"
    return Executed(cwd / "hgnn_moe", "\n".join(texts), sum("image/png" in d for d in data))

  return run


def test_quickstart(execute):
  folder, printed, figures = execute("quickstart")
  run = read_run(folder / "quickstart-100-steps")
  assert run.summary["steps"] == 24
  assert run.train["lm_loss"][-1] < run.train["lm_loss"][0] - 1.0
  assert f"token perplexity {run.summary['last']['token_perplexity']:.6g}" in printed
  assert f"unrelated experts have {run.chance['output_specialization']:.3f}" in printed
  page = run.folder / "analysis" / "report.html"
  assert str(page) in printed and "Did the experts specialise" in page.read_text()
  assert figures == 3
  texts = printed[printed.index("My fellow citizens") :]
  assert "\nThe Congress" in texts and len(texts) > 60


def test_adaptive_vs_static(execute):
  folder, printed, figures = execute("adaptive_vs_static")
  results = folder / "adaptive_vs_static"
  strengths = {
    name: read_run(results / f"{name}-seed1-300-steps").train["output_strength"][4:]
    for name in ("graph", "static_output", "adaptive_output")
  }
  assert np.all(strengths["graph"] == 0.0)
  assert np.allclose(strengths["static_output"], 0.1)
  assert np.ptp(strengths["adaptive_output"], axis=0).min() > 0.01
  table = (results / "comparison" / "comparison.md").read_text()
  assert table in printed and table.count("2 pairs") >= 2
  with open(results / "comparison" / "comparison.csv") as file:
    rows = list(csv.DictReader(file))
  assert [(row["group"], row["seeds"]) for row in rows] == [(name, "2") for name in strengths]
  assert figures == 1 and (results / "comparison" / "comparison.svg").exists()
  assert str(read_run(results / "graph-seed0-300-steps").chance) in printed


def test_collapse_and_recovery(execute):
  folder, printed, figures = execute("collapse_and_recovery")
  results = folder / "collapse_drill-400-steps-seed-42"
  drill = json.loads((results / "drill.json").read_text())
  outcomes = {outcome["arm"]: outcome for outcome in drill["arms"]}
  assert list(outcomes) == ["none", "constant", "adaptive_boost"] and drill["fault_step"] == 12
  assert outcomes["none"]["detected"] is None
  detected = outcomes["adaptive_boost"]["detected"]
  assert 0 < detected <= 12 and f"| adaptive_boost | {detected} |" in printed
  assert f"adaptive_boost step {12 + detected} emergency_on layer" in printed
  for arm in outcomes:
    experts = read_run(results / f"{arm}-fault").train["effective_experts"]
    assert experts[:12].min() > 1.5 and experts[12].max() < 1.1
  assert figures == 1 and (results / "drill.svg").exists()
