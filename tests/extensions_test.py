"""What users bring along: the examples of docs/extending.md as they stand there, and bad paths."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import extensions, trained
from hgnn_moe_jax.config import Config, ModelConfig, with_fields
from hgnn_moe_jax.control import plant, schedules
from hgnn_moe_jax.control.supervision import make_actuator, make_watch
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.orthogonality import outputs
from hgnn_moe_jax.training import loop

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """The page's examples as the module `mine`."""
  blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.S)
  assert len(blocks) == 3
  assert all(len(block.splitlines()) <= 30 for block in blocks)
  (tmp_path / "mine.py").write_text("\n\n".join(blocks))
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "mine", raising=False)
  yield extensions.load("model.coupler", "mine:Ring").__module__
  sys.modules.pop("mine")


def _train(config, folder):
  loop.train(config, folder, quiet=True)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [line for line in lines if line["kind"] == "train"]


def test_the_ring_couples_neighbours_and_learns(mine, quick_model, random_params):
  config = ModelConfig(
    embed_dim=8, num_layers=2, num_heads=2, num_experts=4, coupler="mine:Ring", max_length=6,
    ffn_multiplier=2, coupler_layers=1, compute_dtype="float32",
  )  # fmt: skip
  ring = sys.modules["mine"].Ring(config, name="ring")
  operator = ring.apply(
    {"params": {"neighbour_scale": jnp.array([2.0, 3.0])}}, jnp.zeros((4, 1, 1, 8))
  )
  wanted = np.zeros((4, 4))
  for i in range(4):
    wanted[i, i - 1], wanted[i, (i + 1) % 4] = 2.0, 3.0
  np.testing.assert_array_equal(operator, wanted)
  logits, params = quick_model(config)
  before_BT = np.arange(6, dtype=np.int32)[None]
  after_BT = before_BT.copy()
  after_BT[0, 4] += 3
  one, two = logits(params, before_BT), logits(params, after_BT)
  np.testing.assert_array_equal(one[:, :4], two[:, :4])
  assert np.any(one[:, 4:] != two[:, 4:])


def test_an_operator_of_another_shape_is_refused(mine, quick_model, monkeypatch):
  """Weights of all rows at once would be read past their end."""
  whole = sys.modules["mine"].Ring.__call__
  monkeypatch.setattr(
    sys.modules["mine"].Ring, "__call__", lambda self, h: whole(self, h)[..., None, None]
  )
  config = ModelConfig(embed_dim=8, num_heads=2, coupler="mine:Ring", max_length=6)
  message = (
    r"coupler='mine:Ring': its operator has the shape \[4, 4, 1, 1\]; make it \[E, E\] or, by "
    r"token, \[E, E, B, T\], here \[4, 4\] or \[4, 4, 1, 2\]"
  )
  with pytest.raises(ConfigError, match=message):
    quick_model(config)


@pytest.fixture
def quick_model(random_params):
  def make(config):
    model = language_model.build(config, 11, lambda updates_EBTD, weights_BT: None)
    params = random_params(jax.eval_shape(model.init, jax.random.key(0)))
    return jax.jit(model.logits), params

  return make


def test_all_three_train_together(mine, tiny_config, tmp_path, shared_programs):
  config = tiny_config(
    **{
      "model.coupler": "mine:Ring",
      "orthogonality.output_form": "mine:same_direction",
      "orthogonality.output_strength": 0.0,
      "adaptive.controller": "mine:switch",
      "adaptive.signal": "output",
      "adaptive.objective": "output",
      "adaptive.minimum_strength": 0.0,
      # Out of reach: never below its floor, so the law itself is what acts.
      "adaptive.target_specialization": 0.9999,
      "adaptive.specialization_tolerance": 1e-6,
      "adaptive.decay_schedule": "none",
    }
  )
  steps = _train(config, tmp_path / "run")
  low = np.array([step["output_specialization"] for step in steps]) < 0.9999
  assert low.all()
  strength = np.array([step["output_strength"] for step in steps])
  # 0.1 x warm-up over 4 steps x 0.8^layer, from the second step on: before it, nothing was seen.
  warmup = np.minimum(np.arange(12) / 4, 1.0)
  wanted = 0.1 * warmup[:, None] * np.array([1.0, 0.8])
  np.testing.assert_allclose(strength[1:], wanted[1:], rtol=1e-5)
  operator = trained.load(tmp_path / "run").params["layers"]["coupler"]["operator_0"]
  assert np.any(operator["neighbour_scale"] != 0.5)  # It was trained.


def test_the_objective_on_known_experts(mine):
  objective = sys.modules["mine"].same_direction
  x = np.random.default_rng(0).standard_normal((1, 1, 64, 8)).astype(np.float32)
  alike_EBTD = jnp.concatenate([x, 3.0 * x, -x])
  overlap = outputs.update_overlap(alike_EBTD, jnp.ones((1, 64)), objective).overlap_EE
  np.testing.assert_allclose(overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-5)
  penalty = outputs.output_penalty(overlap, jnp.ones(3), objective)
  np.testing.assert_allclose(penalty, 1 / 3, rtol=1e-5)  # One pair of three.


def test_the_controller_on_the_plant(mine):
  watch = make_watch(num_layers=1, target=0.7)
  actuator = make_actuator(minimum=0.0, maximum=2.0)
  controller = sys.modules["mine"].switch(watch, actuator, schedules.constant_schedule(), 1.0, 1.0)
  response = plant.bench({"switch": controller}, plant.Plant(), 4000, 2, 0.3)["switch"]
  assert np.all(response.max_strength == 1.0)
  assert np.all(response.swing == 1.0)  # It switches to the end.


def test_an_overlap_of_weights(tmp_path, monkeypatch, tiny_config, shared_programs):
  (tmp_path / "constant_overlap.py").write_text(
    "import jax.numpy as jnp\n\n\ndef half(w_LEDK):\n"
    "  return jnp.full((w_LEDK.shape[0], w_LEDK.shape[1], w_LEDK.shape[1]), 0.5)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  small = {"model.num_layers": 1, "model.coupler": "mean"}
  config = tiny_config(**small, **{"orthogonality.weight_form": "constant_overlap:half"})
  train = _train(config, tmp_path / "run")
  # Four roles of 0.5 each.
  assert all(step["weight_penalty"] == [2.0] for step in train)


def test_a_measure_that_is_no_number_stops_nothing_where_nothing_is_penalised(
  tmp_path, monkeypatch, tiny_config, shared_programs
):
  (tmp_path / "no_number.py").write_text(
    "import jax.numpy as jnp\n\n\ndef overlap(centred_EBTD, shares_BT):\n"
    "  return jnp.full((centred_EBTD.shape[0],) * 2, jnp.nan)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  strengths = {f"orthogonality.{kind}_strength": 0.0 for kind in ("weight", "output")}
  small = {"model.num_layers": 1, "model.coupler": "mean", "training.steps": 4}
  config = tiny_config(**small, **strengths, **{"orthogonality.output_form": "no_number:overlap"})
  train = _train(config, tmp_path / "run")
  assert all(step["loss"] == step["lm_loss"] > 0 for step in train)
  assert all(step["output_penalty"] == ["nan"] for step in train)


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("no_such_module:Ring", "No module named 'no_such_module'; run where Python finds the module"),
    ("math:Ring", "math has no Ring"),
    ("math:", "math has no empty name"),
    (":Ring", "run where Python finds the module"),
    ("math:pi", "not callable; give an operator over experts"),
    ("ring", "use one of graph, hypergraph, mean, matrix, attention"),
  ],
)
def test_bad_paths(path, message):
  with pytest.raises(ConfigError, match=re.escape(message)) as error:
    with_fields(Config(), {"model.coupler": path, "training.steps": 1}).validate()
  assert error.value.field == "model.coupler"


def test_reading_a_folder_runs_none_of_its_code(tmp_path, monkeypatch):
  """It may be somebody else's; Python looks for modules in the folder that one works in."""
  folder = tmp_path / "exported" / "nice"
  folder.mkdir(parents=True)
  monkeypatch.syspath_prepend(tmp_path)
  inside, beside = "exported.nice.own:Ring", "own:Ring"
  named, other = (with_fields(Config(), {"model.coupler": path}) for path in (inside, beside))
  extensions.require_outside(folder, named)  # Nothing is there.
  (folder / "own.py").touch()
  with pytest.raises(ConfigError, match=f"coupler='{inside}': the module lies in {folder}; if you"):
    extensions.require_outside(folder, named)
  extensions.require_outside(folder, other)
  (tmp_path / "own.py").touch()
  extensions.require_outside(folder, other)
  monkeypatch.syspath_prepend(folder)
  extensions.require_outside(folder, with_fields(Config(), {"model.coupler": "chex:dataclass"}))
  with pytest.raises(ConfigError, match="the module lies in"):
    extensions.require_outside(folder, other)
  monkeypatch.syspath_prepend(tmp_path)  # Python takes the first that it finds.
  extensions.require_outside(folder, other)


def test_a_mistake_inside_the_module_is_told_as_it_is(tmp_path, monkeypatch):
  """Not as if the module had no such name."""
  (tmp_path / "broken_here.py").write_text("import math\n\nmath.nothere\nRing = print\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(AttributeError, match="nothere"):
    with_fields(Config(), {"model.coupler": "broken_here:Ring"}).validate()


def test_only_four_fields_take_paths():
  for field in ("model.pooling", "adaptive.signal", "training.optimizer"):
    with pytest.raises(ConfigError, match="use one of"):
      with_fields(Config(), {field: "math:pi", "training.steps": 1}).validate()
