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
# # Collapse and recovery: what brings experts apart again
#
# In the middle of a run, this notebook makes all experts of every layer copies of one, plus a
# little noise, and trains on. Does the controller notice? Do the experts become different again,
# and what brings that about? The same run without the fault is the comparison: same text, same
# order, same number of steps.
#
# Run the cells from top to bottom. No GPU is needed; if there is one, it is used.

# %% [markdown]
# ## Settings
#
# Nothing is printed here. The fault strikes after half of `STEPS`. `ARMS` are the ways to set the
# strength of the penalty that are put to the test. All files go below `FOLDER`, compiled programs
# too, so that a second run starts sooner. `REPOSITORY` is the address of the project's git
# repository, needed only where the library is not installed yet; replace the placeholder OWNER.
# `TINY` is for the project's tests, which set the variable to get a toy model on one message:
# seconds instead of minutes.

# %%
import os
import pathlib

STEPS = 400
ARMS = ["none", "constant", "adaptive_boost"]
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
from hgnn_moe_jax.analysis import collapse_drill, figures
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import with_fields
from hgnn_moe_jax.training.records import write_json

SOURCE = pathlib.Path(hgnn_moe_jax.__file__).parents[1]
print(f"hgnn_moe_jax {hgnn_moe_jax.__version__}, jax {jax.__version__}, {jax.devices()}")

# %% [markdown]
# ## The run that will be damaged
#
# `configs/collapse_drill.py` on the State of the Union messages and with a smaller model. You will
# see what each arm sets: `none` has no penalty, `constant` a constant one on experts whose outputs
# are alike, `adaptive` a controller, `adaptive_boost` the same with an emergency boost, `feedback`
# a controller of another kind.

# %%
config = runpy.run_path(str(SOURCE / "configs" / "collapse_drill.py"))["get_config"]()
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
  "adaptive.emergency_grace": 100,
  "training.steps": STEPS,
  "training.warmup_steps": 30,
  "evaluation.every": STEPS,
}
if TINY:
  fields |= runpy.run_path(str(SOURCE / "tests" / "colab" / "tiny.py"))["FIELDS"]
config = with_fields(config, fields)
for arm, changes in collapse_drill.ARMS.items():
  print(arm, changes)

# %% [markdown]
# ## The drill
#
# Each arm is trained to the end; a copy of it, made at the fault step, has its experts damaged and
# is trained to the end as well. One line is printed per arm. Running the cell again does not train
# again what is finished.

# %%
folder = FOLDER / f"collapse_drill-{STEPS}-steps-seed-{config.seed}"
fault_step = config.training.steps // 2
outcomes = []
for arm in ARMS:
  outcomes += collapse_drill.drill(config, folder, [arm], fault_step, noise=0.01)
  print(f"{arm}: done")
content = {"fault_step": fault_step, "arms": [outcome._asdict() for outcome in outcomes]}
write_json(folder / "drill.json", content)

# %% [markdown]
# ## Detection and recovery
#
# You will see a row per arm; steps count from the fault. *Detected*: until the controller flagged
# an emergency in every layer; arms without a controller detect nothing. *Recovered*: until the
# output specialization, or the effective number of experts, was back at 90 % of its level before
# the fault in every layer. Both levels follow, layer by layer. The perplexities at the end, without
# and with the fault, say what it cost. *False alarms* are emergencies in the run without fault.

# %%
display(Markdown(collapse_drill.table(outcomes)))

# %% [markdown]
# ## When alarms were raised
#
# You will see every event of the damaged runs that is no checkpoint.

# %%
damaged = {arm: read_run(folder / f"{arm}-fault") for arm in ARMS}
for arm, run in damaged.items():
  for name in ["fault", "emergency_on", "emergency_off"]:
    for event in run.events_of(name):
      print(arm, "step", event["step"], name, "layer", event.get("layer", "all"))

# %% [markdown]
# ## Before and after
#
# You will see output specialization, effective number of experts and strength of the penalty around
# the fault (dotted), a column per layer. The dashed line is chance, what unrelated experts score:
# only compared with it is a score high or low. Look at how far each arm comes back, and whether the
# strength of the controller rises after the fault.

# %%
figures.collapse_drill(damaged, fault_step, folder / "drill.png")
display(Image(folder / "drill.png", width=900))

# %% [markdown]
# ## How to read it
#
# - Levels before the fault differ between the arms, and *recovered* is relative to them: without a
#   penalty, there may be little to come back to.
# - It is one seed, one size of model and one kind of fault. A difference of a few steps between two
#   arms, or of a few percent in perplexity, may well be chance: add `"seed"` to `fields` and see
#   whether it stays.
# - After the fault the learning rate is already falling, and how much of the run is left decides
#   how much can recover.
#
# The same from a terminal, with all arms:
# `python -m hgnn_moe_jax.analysis.collapse_drill --config=configs/collapse_drill.py`
