# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adaptive or static: three ways to keep experts different
#
# This notebook trains the same small model in three ways and compares them: with no penalty, with a
# constant penalty on experts that do the same, and with a penalty whose strength a controller sets
# in every step. All have the same text, the same number of steps and the same seeds.
#
# Run the cells from top to bottom. No GPU is needed; if there is one, it is used.

# %% [markdown]
# ## Settings
#
# Nothing is printed here. Every approach is trained once per seed for `STEPS` steps. All files go
# below `FOLDER`, compiled programs too, so that a second run starts sooner. `REPOSITORY` is the
# address of the project's git repository, needed only where the library is not installed yet;
# replace the placeholder OWNER. `TINY` is for the project's tests, which set the variable to get a
# toy model on one message: seconds instead of minutes.

# %%
import os
import pathlib

STEPS = 300
SEEDS = [0, 1]
FOLDER = pathlib.Path("hgnn_moe").absolute()
REPOSITORY = "https://github.com/OWNER/hgnn_moe_jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(FOLDER / "cache" / "xla"))
TINY = os.environ.get("HGNN_MOE_NOTEBOOK_TINY") == "1"

# %% [markdown]
# ## Install
#
# Where the library is installed already, this cell does nothing. Elsewhere it clones the repository
# into `FOLDER/source` and installs it from there with pip, on a machine with an NVIDIA GPU together
# with JAX for CUDA 12; that takes some minutes. pip may replace the JAX and the NumPy of the
# machine. If this session has imported them before, restart it afterwards and begin at the top.

# %%
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("hgnn_moe_jax") is None:
  source = FOLDER / "source"
  extras = "analysis,cuda12" if shutil.which("nvidia-smi") else "analysis"
  if not source.exists():
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, source], check=True)
  pip = [sys.executable, "-m", "pip", "install", "--quiet"]
  subprocess.run([*pip, "--editable", f"{source}[{extras}]"], check=True)
  sys.path.insert(0, str(source))  # a running session does not see new packages by itself

# %% [markdown]
# ## Versions and device
#
# You will see the versions of the library and of JAX, and the devices. If a GPU is missing there,
# training will be done by the CPU.

# %%
import runpy

import jax
from IPython.display import Image, Markdown, display

import hgnn_moe_jax
from hgnn_moe_jax.analysis import compare_orthogonality_approaches
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import difference, with_fields
from hgnn_moe_jax.training import loop

SOURCE = pathlib.Path(hgnn_moe_jax.__file__).parents[1]
print(f"hgnn_moe_jax {hgnn_moe_jax.__version__}, jax {jax.__version__}, {jax.devices()}")

# %% [markdown]
# ## Three approaches
#
# In `configs/`, `graph.py` has no penalty, `static_output.py` a constant one on experts whose
# outputs are alike, and in `adaptive_output.py` a controller lowers and raises the strength of that
# penalty to hold a target. Here all three get the State of the Union messages and a smaller model.
# You will see in which fields each differs from the first: they all belong to the penalty.

# %%
fields = {
  "data.source": "sotu",
  "data.path": "",
  "data.name": "",
  "data.rows": "documents",
  "data.vocab_size": 2048,
  "data.cache_dir": str(FOLDER / "cache"),
  "model.embed_dim": 64,
  "model.max_length": 64,
  "orthogonality.warmup_steps": 30,
  "adaptive.target_specialization": 0.85,
  "training.steps": STEPS,
  "training.warmup_steps": 30,
  "evaluation.every": STEPS // 2,
}
if TINY:
  fields |= runpy.run_path(str(SOURCE / "tests" / "colab" / "tiny.py"))["FIELDS"]
approaches = {}
for name in ["graph", "static_output", "adaptive_output"]:
  config = runpy.run_path(str(SOURCE / "configs" / f"{name}.py"))["get_config"]()
  approaches[name] = with_fields(config, fields)
  print(name, *difference(approaches["graph"], approaches[name]), sep="\n  ")

# %% [markdown]
# ## Train
#
# One line is printed per finished run. *Token perplexity* on the validation split is the measure of
# the language model: lower is better. The stop button saves before it stops, and running the cell
# again continues; finished runs are not trained again.

# %%
runs = []
for seed in SEEDS:
  for name, config in approaches.items():
    run = FOLDER / "adaptive_vs_static" / f"{name}-seed{seed}-{STEPS}-steps"
    summary = loop.train(with_fields(config, {"seed": seed}), run, quiet=True)
    print(f"{name}, seed {seed}: token perplexity {summary['last']['token_perplexity']:.2f}")
    runs.append({"name": name, "run": run})

# %% [markdown]
# ## What chance is
#
# You will see the two chance levels of this model: what unrelated experts with random weights
# score. A score is only high or low compared with its chance level. Copies of one expert score 0.

# %%
print(read_run(runs[0]["run"]).chance)

# %% [markdown]
# ## The comparison
#
# You will see a table with one row per approach: means over the seeds, ± half of a 95 % interval,
# and the difference from `graph` (no penalty), paired by seed. Perplexities are compared after
# equal steps, and after equal training time; the second also tells what else the machine was doing.
# Scores are means over the last tenth of the steps, layer by layer. *Effective experts* is 4 if all
# four do different things and 1 if all do the same. `comparison.html` in the same folder has the
# same with an answer in words.

# %%
table = compare_orthogonality_approaches(
  runs, FOLDER / "adaptive_vs_static" / "comparison", baseline="graph"
)
display(Markdown(table.read_text()))

# %% [markdown]
# ## Over the run
#
# You will see both scores and the strength of the penalty, a column per layer; the shaded range is
# that of the seeds, the dashed line chance. Look at three things: where the output
# specialization of each approach settles, compared with chance; what the weight specialization does
# meanwhile, which says little about what experts do; and which strength the controller needs at the
# end, compared with the constant one.

# %%
display(Image(table.with_suffix(".png"), width=900))

# %% [markdown]
# ## How to read it
#
# - **One or two seeds prove nothing.** With one seed there is no interval. With two, ± is half of
#   the difference of two numbers times 12.7, so it is wide whatever the truth is.
#   A difference in perplexity whose interval includes zero is no result, in either direction.
# - **A penalty that raises its own score shows that it works as a penalty**, not that the model has
#   become better. Whether it has is the perplexity's to say.
# - **Above chance or below?** Scores below chance mean that the experts are still more alike than
#   unrelated ones.
# - **This model is small and its training short.** Nothing here says what happens in larger models
#   or longer runs.
#
# For a result, set `SEEDS = [0, 1, 2, 3, 4]` or more, raise `STEPS`, and decide before the run what
# you will compare. `docs/adaptive-orthogonality.md` has a study with three seeds on WikiText-2, and
# `docs/measuring-specialization.md` says what would count as evidence.
