"""Every test here shares compiled programs; runs are compared bit by bit."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from hgnn_moe_jax.training import loop
from hgnn_moe_jax.training.checkpoint import Checkpointer


@pytest.fixture(autouse=True)
def _shared(shared_programs):
  pass


def _host_bytes(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
  """Every leaf's dtype, shape and bytes, by path; keys by their data."""

  def one(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return str(leaf.dtype), array.shape, array.tobytes()

  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): one(leaf) for path, leaf in leaves}


@pytest.fixture(scope="session")
def assert_same():
  """assert_same(tree, tree): equal structure, dtypes and bits."""

  def compare(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    ours, theirs = _host_bytes(a), _host_bytes(b)
    assert [name for name in ours if ours[name] != theirs[name]] == []

  return compare


@pytest.fixture(scope="session")
def read_metrics():
  """read_metrics(workdir) -> records, parsed strictly, without the one field that is a time."""

  def read(workdir: Any) -> list[dict[str, Any]]:
    def refuse(constant):
      raise AssertionError(f"bare {constant}")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    for record in records:
      record.pop("tokens_per_second", None)
    return records

  return read


@pytest.fixture(scope="session")
def assert_same_curve():
  """assert_same_curve(records, wanted): losses to 1e-5, all else that was measured nearly so."""

  def compare(records: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in wanted]
    for ours, theirs in zip(records, wanted, strict=True):
      assert ours.keys() == theirs.keys()
      for field, value in theirs.items():
        if "loss" in field:
          np.testing.assert_allclose(ours[field], value, rtol=1e-5, err_msg=f"{theirs['step']}")
        elif isinstance(value, float | list):
          np.testing.assert_allclose(ours[field], value, rtol=1e-3, atol=1e-5, err_msg=field)
        else:
          assert ours[field] == value, field

  return compare


@pytest.fixture
def rewound():
  """rewound(folder, copy, step) -> a copy of a finished run as it was before the checkpoint."""

  def make(folder: pathlib.Path, copy: pathlib.Path, step: int) -> pathlib.Path:
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / str(step))
    (copy / "summary.json").unlink()
    return copy

  return make


@pytest.fixture(scope="session")
def finished(_factories, tiny_config, tmp_path_factory) -> pathlib.Path:
  """The folder of the reference run, never interrupted; not to be changed."""
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  with jax.numpy_dtype_promotion("standard"):
    loop.train(tiny_config(), workdir, quiet=True)
  return workdir


@pytest.fixture
def final_state(tiny_config):
  """final_state(workdir) -> the TrainState of the newest checkpoint."""

  def read(workdir: pathlib.Path):
    config = tiny_config()
    assembly = loop.assemble(config, loop.load_corpus(config))
    checkpointer = Checkpointer(workdir)
    state, _ = checkpointer.restore(assembly.abstract_state, checkpointer.latest_step())
    checkpointer.close()
    return state

  return read


@pytest.fixture
def assert_same_run(finished, final_state, assert_same, read_metrics):
  """assert_same_run(workdir): state and records are the reference run's, bit by bit."""

  def compare(workdir: pathlib.Path) -> None:
    assert read_metrics(workdir) == read_metrics(finished)
    assert_same(final_state(workdir), final_state(finished))

  return compare
