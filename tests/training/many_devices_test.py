"""Runs on virtual CPU devices are the run on one device, but for rounding."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from hgnn_moe_jax.training import evaluate, loop

_SCRIPT = pathlib.Path(__file__).parent / "train_here.py"

# Everything that could depend on the layout: dropout, couplers, penalties, controller, optimizers,
# averages, rounds of accumulation. Several models, so that each has to get along with the others'.
# No mesh splits layers: two of them in one model are enough.
MODELS = {
  "graph": {
    "model.num_layers": 1,
    "model.coupler": "graph",
    "adaptive.controller": "adaptive",
    "adaptive.objective": "both",
    "orthogonality.weight_strength": 0.0,
    "orthogonality.output_strength": 0.0,
  },
  "hypergraph": {
    "model.num_layers": 1,
    "model.coupler": "hypergraph",
    "model.hyperedges": "triplets",
    "model.hyperedge_attention": True,
    "model.pooling": "gate",
    "model.positions": "rotary",
    "training.optimizer": "muon",
    "training.accumulation": 2,
  },
  "sparse": {"model.num_layers": 2, "model.coupler": "graph", "model.selected_experts": 2},
}
# Name -> (model, data x expert x model, fsdp, placement).
MESHES = {
  "data": ("graph", (8, 1, 1), False, "device"),
  "fsdp": ("sparse", (8, 1, 1), True, "device"),
  "expert": ("graph", (2, 4, 1), False, "device"),
  "tensor": ("graph", (4, 1, 2), False, "device"),
  "sparse experts": ("sparse", (1, 4, 2), True, "device"),
  "all at once": ("hypergraph", (2, 2, 2), True, "host"),
}


@pytest.fixture(scope="module")
def config(tiny_config):
  """config(model, mesh, fsdp, placement) of 16 examples a step and 4 experts."""

  def make(model, mesh=(0, 1, 1), fsdp=False, placement="device"):
    data, expert, heads = mesh
    return tiny_config(
      **MODELS[model],
      **{
        "model.num_experts": 4,
        "training.batch_size": 16,
        # No more is saved than what is continued from: eight parts of every array take a while.
        "training.checkpoint_every": 8,
        "evaluation.every": 12,
        "mesh.data": data,
        "mesh.expert": expert,
        "mesh.model": heads,
        "mesh.fsdp": fsdp,
        "data.placement": placement,
      },
    )

  return make


def train_on(count, runs, score=False):
  """Trains {workdir: config} in a process that has so many devices, and scores if asked to.

  A config of None is for a run that is finished.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  environment = {
    **os.environ,
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
  }
  lines = [
    json.dumps({"config": c and c.to_dict(), "workdir": str(w), "score": score})
    for w, c in runs.items()
  ]
  done = subprocess.run(
    [sys.executable, str(_SCRIPT)],
    input="\n".join(lines),
    capture_output=True,
    text=True,
    env=environment,
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n")[:-1] == [str(w) for w in runs]


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory, _factories):
  """{name: run folder} of every mesh, and of every model on one device."""
  root = tmp_path_factory.mktemp("meshes")
  with jax.numpy_dtype_promotion("standard"):
    for model in MODELS:
      loop.train(config(model), root / f"one {model}", quiet=True)
  train_on(8, {root / name: config(*mesh) for name, mesh in MESHES.items()})
  return {name: root / name for name in [*(f"one {model}" for model in MODELS), *MESHES]}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_loss_curve_of_one_device(name, folders, read_metrics, assert_same_curve):
  model = MESHES[name][0]
  assert_same_curve(read_metrics(folders[name]), read_metrics(folders[f"one {model}"]))
  device = json.loads((folders[name] / "config.json").read_text())["device"]
  assert device["count"] == 8


def test_eight_devices_then_two(
  folders, config, tmp_path, read_metrics, assert_same_curve, rewound
):
  copy = rewound(folders["expert"], tmp_path / "two", 12)
  train_on(2, {copy: config("graph", (1, 2, 1))})
  assert_same_curve(read_metrics(copy), read_metrics(folders["one graph"]))
  # Its first eight steps are those of eight devices to the last bit.
  first = lambda folder: [r for r in read_metrics(folder) if r["step"] <= 8]  # noqa: E731
  assert first(copy) == first(folders["expert"])


def test_three_devices_score_what_eight_have_trained(folders, tmp_path, read_metrics):
  copy = tmp_path / "three"
  shutil.copytree(folders["data"], copy)
  train_on(3, {copy: None}, score=True)
  found = read_metrics(copy)[-1]
  assert found["checkpoint"] == "last"
  alone = evaluate.evaluate_run(copy, "validation", "last")
  assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
  assert found["tokens"] == alone["tokens"]


def test_eight_devices_then_one(
  folders, config, tmp_path, read_metrics, assert_same_curve, rewound
):
  copy = rewound(folders["fsdp"], tmp_path / "one", 12)
  loop.train(config("sparse"), copy, quiet=True)
  assert_same_curve(read_metrics(copy), read_metrics(folders["one sparse"]))
