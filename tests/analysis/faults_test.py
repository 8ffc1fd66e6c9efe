"""Clones, and copies of runs that go on from them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.analysis import faults
from hgnn_moe_jax.models.language_model import is_expert_parameter
from hgnn_moe_jax.orthogonality import outputs
from hgnn_moe_jax.training import loop


@pytest.fixture(autouse=True)
def _shared(shared_programs):
  pass


class Kept(Exception):
  """Raised instead of writing; holds the state."""


@pytest.fixture
def run(tiny_config, tmp_path):
  """A finished run of 12 steps with a checkpoint at step 4, and its folder."""
  config = tiny_config(**{"training.keep_checkpoints": 9})
  loop.train(config, tmp_path / "run", quiet=True)
  return config, tmp_path / "run"


def state_at(folder, target, step=4):
  """The state of a checkpoint, taken where `fork` would change it."""

  def keep(state):
    raise Kept(state)

  with pytest.raises(Kept) as kept:
    faults.fork(folder, target, step, keep)
  return kept.value.args[0]


def by_path(tree):
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_expert_parameters_are_those_with_layers_and_experts_in_front(run, tmp_path):
  _, folder = run
  state = state_at(folder, tmp_path / "unused")
  found = [leaf for path, leaf in by_path(state.params) if is_expert_parameter(path)]
  assert len(found) == 12  # two norms of two, and four products with bias
  assert {leaf.shape[:2] for leaf in found} == {(2, 3)}
  names = {jax.tree_util.keystr(path) for path, _ in by_path(state.params["layers"]["experts"])}
  assert len(names) == 12, "nothing of the experts is missed"
  moments = [leaf for path, leaf in by_path(state.opt_state) if is_expert_parameter(path)]
  assert len(moments) == 3 * 12  # two moments and the parameter average


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_clones(run, tmp_path, noise):
  _, folder = run
  state = state_at(folder, tmp_path / "unused")
  cloned = faults.clone_experts(state, noise)
  assert jax.tree.structure(cloned) == jax.tree.structure(state)
  for (path, before), (_, after) in zip(by_path(state), by_path(cloned), strict=True):
    assert before.dtype == after.dtype and before.shape == after.shape
    if not is_expert_parameter(path):
      same = (
        jax.random.key_data if jnp.issubdtype(before.dtype, jax.dtypes.prng_key) else np.asarray
      )
      np.testing.assert_array_equal(same(before), same(after))
      continue
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    of_parameters = path[0].name == "params"
    for expert in (1, 2):
      difference = np.asarray(after[:, expert] - before[:, 0])
      if noise == 0.0 or not of_parameters:
        assert not difference.any(), jax.tree_util.keystr(path)
      elif before[0, 0].size >= 256:
        share = np.std(difference[0]) / np.sqrt(np.mean(np.square(before[0, 0])))
        assert share == pytest.approx(noise, rel=0.15)


def test_noise_differs_between_experts_and_repeats_with_its_seed(run, tmp_path):
  state = state_at(run[1], tmp_path / "unused")
  kernel = lambda s: np.asarray(s.params["layers"]["experts"]["ffn_in_kernel"])  # noqa: E731
  a, b, c = (kernel(faults.clone_experts(state, 0.1, seed)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c)[:, 1:].all() and (a[:, 1] != a[:, 2]).all()


def test_an_unchanged_copy_continues_like_the_original(run, tmp_path):
  """So whatever differs after a fault is the fault's."""
  config, folder = run
  target = tmp_path / "copy"
  faults.fork(folder, target, 4, lambda state: state, noise=0.5)
  loop.train(config, target, quiet=True)

  def lines(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]

  ours = lines(target)
  fault = {"kind": "event", "step": 4, "name": "fault", "noise": 0.5}
  assert ours.count(fault) == 1
  at = ours.index(fault)
  assert ours[at - 1]["step"] == 4 and ours[at + 1]["step"] == 5
  assert ours[:at] + ours[at + 1 :] == lines(folder)


def test_a_copy_is_made_once(run, tmp_path):
  config, folder = run
  target = tmp_path / "copy"
  faults.fork(folder, target, 4, lambda state: faults.clone_experts(state, 0.0))
  loop.train(config, target, quiet=True)
  before = (target / "metrics.jsonl").read_bytes()

  def refuse(state):
    raise AssertionError("the copy was there")

  faults.fork(folder, target, 4, refuse)
  assert (target / "metrics.jsonl").read_bytes() == before


def test_a_copy_left_half_made_is_made_anew(run, tmp_path):
  _, folder = run
  target = tmp_path / "copy"
  (target / "checkpoints").mkdir(parents=True)
  (target / "metrics.jsonl").write_text("half")
  (folder / "tokenizer.json").write_text("{}")  # Of a run that has trained its own.
  faults.fork(folder, target, 4, lambda state: state)
  assert (target / "config.json").exists()
  assert (target / "tokenizer.json").read_text() == "{}"
  assert (target / "metrics.jsonl").read_text().startswith('{"kind"')


def test_the_penalty_alone_cannot_part_exact_copies():
  """Its gradient is 0 there and grows in proportion to the distance: the copies are a stationary
  point, and an unstable one."""
  shared, noise = jax.random.normal(jax.random.key(0), (2, 1, 2, 8, 16))
  updates = jnp.broadcast_to(shared, (3, 2, 8, 16))
  apart = noise * jnp.asarray([0.0, 1.0, -1.0]).reshape(3, 1, 1, 1)

  @jax.jit
  @jax.grad
  def gradient(updates):
    overlap = outputs.update_overlap(updates, jnp.ones((2, 8)))
    return outputs.output_penalty(overlap.overlap_EE, overlap.scale_E, "cosine")

  size = np.linalg.norm
  small, double = (gradient(updates + eps * apart) for eps in (1e-3, 2e-3))
  assert size(gradient(updates)) < 1e-3 * size(small)
  assert size(double) == pytest.approx(2.0 * size(small), rel=0.01)
  assert np.sum(small * apart) < 0.0, "descent drives them apart"
