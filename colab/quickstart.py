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
# # Quickstart: train, look, generate
#
# This notebook trains a small language model on the State of the Union messages, shows whether its
# experts do different things, and lets it write. The model has four experts per layer. Each is a
# whole transformer block and reads every token, and a graph network lets them exchange messages
# about it.
#
# Run the cells from top to bottom. No GPU is needed; if there is one, it is used.

# %% [markdown]
# ## Settings
#
# Nothing is printed here. `STEPS` is the length of training: more steps, a better model, a longer
# wait. All files go below `FOLDER`, compiled programs too, so that a second run starts sooner.
# `REPOSITORY` is the address of the project's git repository, needed only where the library is not
# installed yet; replace the placeholder OWNER. `TINY` is for the project's tests, which set the
# variable to get a toy model on one message: seconds instead of minutes.

# %%
import os
import pathlib

STEPS = 100
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
from IPython.display import Image, display

import hgnn_moe_jax
from hgnn_moe_jax.analysis import analyze_adaptive_orthogonality
from hgnn_moe_jax.analysis.answer import answer
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import with_fields
from hgnn_moe_jax.generation import Sampling, generate
from hgnn_moe_jax.trained import load
from hgnn_moe_jax.training import loop, report

SOURCE = pathlib.Path(hgnn_moe_jax.__file__).parents[1]
print(f"hgnn_moe_jax {hgnn_moe_jax.__version__}, jax {jax.__version__}, {jax.devices()}")

# %% [markdown]
# ## The experiment
#
# Each file in `configs/` describes one run. This notebook takes `configs/quickstart.py` and
# shortens it. You will see the model's fields; `hgnn_moe_jax/config.py` explains every one.

# %%
config = runpy.run_path(str(SOURCE / "configs" / "quickstart.py"))["get_config"]()
fields = {
  "training.steps": STEPS,
  "evaluation.every": STEPS // 2,
  "adaptive.signal": "output",  # the score that is printed while the run trains
  "data.cache_dir": str(FOLDER / "cache"),
}
if TINY:
  fields |= runpy.run_path(str(SOURCE / "tests" / "colab" / "tiny.py"))["FIELDS"]
config = with_fields(config, fields)
print(config.model)

# %% [markdown]
# ## Train
#
# The first lines come when the text has been cut into tokens and the program is compiled, then one
# every ten seconds: `lm` is the loss in nats per token, `spec` how different the experts are by
# what they do (the next cell says how to read it), `tok/s` the speed. Half-way and at the end the
# whole validation split is scored. Look at the last comparison: a *unigram* model knows how
# frequent each token is and nothing else, so a model that has learned anything from context must
# have a lower perplexity. The stop button saves before it stops, and running the cell again
# continues.

# %%
run = FOLDER / f"quickstart-{STEPS}-steps"
summary = loop.train(config, run)
print(report.summary(summary, run))

# %% [markdown]
# ## The answer in five lines
#
# You will read whether the experts specialised. The score by what they do compares what two experts
# add to the same token: 0 for copies, and for unrelated experts not 1 but the *chance* level, which
# depends on the width of the model. A score is only high or low compared with chance. This run has
# no penalty that keeps the experts different, and one short run with one seed shows what happened
# in it, not what happens in general.

# %%
for question, told in answer(read_run(run)):
  print(f"{question}\n  {told}\n")

# %% [markdown]
# ## The report
#
# The next cell draws all figures of the run and writes them into one page. It prints the page's
# path: open it in a browser, on Colab after a download from the file panel. You will see the loss
# here, in training and on the validation split.

# %%
page = analyze_adaptive_orthogonality(run)
print(page)
display(Image(page.parent / "loss.png", width=800))

# %% [markdown]
# You will see the scores over the run, a line per layer: by the weights, by what the experts do,
# and the effective number of experts, which is 4 if all four do different things and 1 if all do
# the same. The dashed lines are chance.

# %%
display(Image(page.parent / "specialization.png", width=800))

# %% [markdown]
# You will see which experts are alike at the end, pair by pair: 1 is a copy. Below are the same
# experts on different tokens: what is alike there are directions that they share whatever they
# read.

# %%
display(Image(page.parent / "similarity.png", width=800))

# %% [markdown]
# ## Generate text
#
# You will see how the model continues two beginnings. After so short a training, do not expect
# sentences that make sense. The same seed gives the same text.

# %%
model = load(run)
sampling = Sampling(max_tokens=60, temperature=0.8, top_p=0.95, seed=0)
for one in generate(model, ["My fellow citizens", "The Congress"], sampling):
  print(f"{one.prompt}{one.text}\n")

# %% [markdown]
# ## Where to go from here
#
# - More `STEPS`, or another file of `configs/`.
# - `adaptive_vs_static.ipynb` compares penalties that keep the experts different.
# - `collapse_and_recovery.ipynb` makes all experts copies of one and watches what happens.
# - The same from a terminal: `python -m hgnn_moe_jax.main --config=configs/quickstart.py`
