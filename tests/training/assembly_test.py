"""What runs of one process share: all that is traced and compiled, and no number."""

import importlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import config_rules
from hgnn_moe_jax.config import with_fields
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.training import assembly, loop

V, STEPS = 257, 12


@pytest.fixture
def traced():
  """The names of the functions that JAX traces from here on."""
  names = []

  def listen(event, seconds, fun_name=None, **_):
    del seconds
    if event.endswith("jaxpr_trace_duration"):
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def test_another_seed_traces_nothing_and_has_its_own_numbers(
  tiny_config, finished, tmp_path, traced, read_metrics
):
  """`finished` is the run of another seed; alone, with nothing to share, this one is the same."""
  config = tiny_config(seed=7, name="another")
  loop.train(config, tmp_path / "shared", quiet=True)
  assert not {"dispatch", "evaluate", "init"} & set(traced)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(assembly, "_assembled", assembly._assembled.__wrapped__)
    loop.train(config, tmp_path / "alone", quiet=True)
  assert {"dispatch", "init"} <= set(traced)
  shared, alone = read_metrics(tmp_path / "shared"), read_metrics(tmp_path / "alone")
  assert shared == alone
  assert shared != read_metrics(finished)


def _leaves(config):
  return {
    f"{group}.{field}": value
    for group, fields in config.to_dict().items()
    if isinstance(fields, dict)
    for field, value in fields.items()
  }


def _other(value):
  """Another value of its type. It is not asked for sense: nothing is built."""
  return not value if isinstance(value, bool) else value + type(value)(1)


@pytest.mark.parametrize("controller", ["schedule", "adaptive", "feedback", "convergence"])
def test_a_controller_is_made_at_both_ends_of_every_range(controller, tiny_config):
  """What the rules let pass, the controllers take."""
  ends = {f: r for f, r in config_rules._RANGES.items() if f.startswith("adaptive.")}
  assert len(ends) > 10
  for field, (low, high) in ends.items():
    for value in (low, high):
      if math.isinf(value):
        continue
      changes = {
        "orthogonality.weight_strength": 0.0,
        "adaptive.minimum_strength": 0.0,
        "adaptive.specialization_tolerance": 1e-3,
        "adaptive.controller": controller,
        field: value,
      }
      try:
        config = tiny_config(**changes).validate()
      except ConfigError:
        continue  # By another rule, of two fields.
      assembly.make_controller(config, STEPS)


def test_only_what_a_run_alone_reads_is_left_out(tiny_config, monkeypatch):
  """Every other field makes another assembly, those to come as well."""
  monkeypatch.setattr(assembly, "_assembled", lambda *key: key)
  config = tiny_config()
  key = assembly.assemble_sized(config, V, STEPS)
  left_out = set()
  for field, value in _leaves(config).items():
    changed = with_fields(config, {field: _other(value)})
    assert changed != config
    if assembly.assemble_sized(changed, V, STEPS) == key:
      left_out.add(field)
  wanted = {f for f in _leaves(config) if f.split(".")[0] in ("data", "evaluation")}
  cadences = ("log_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "wandb_project")
  assert left_out == wanted | {f"training.{name}" for name in cadences}
  assert assembly.assemble_sized(with_fields(config, {"seed": 7, "name": "b"}), V, STEPS) == key
  for other in ((V + 1, STEPS), (V, STEPS + 1), (V, STEPS, None, 3)):
    assert assembly.assemble_sized(config, *other) != key


@pytest.mark.parametrize("controller", ["constant", "adaptive", "feedback"])
def test_every_strength_of_orthogonality_warms_up(tiny_config, controller):
  """Also that of the penalty which the controller does not drive."""
  config = tiny_config(
    **{
      "adaptive.controller": controller,
      "adaptive.objective": "output",
      "orthogonality.weight_strength": 0.4,
      "orthogonality.output_strength": 0.0,
      "orthogonality.warmup_steps": 4,
    }
  )
  control = assembly.assemble_sized(config, V, STEPS).controller
  state, strengths = control.init(), []
  for count in (0, 1, 4, 9):
    strengths.append(control.strengths(state._replace(count=jnp.int32(count))).weight_L[0])
  np.testing.assert_allclose(strengths, [0.0, 0.1, 0.4, 0.4], rtol=1e-6)


def test_what_an_assembly_is_made_from_stays(tiny_config):
  """The caller's config may be changed and used again."""
  config = tiny_config()
  made = assembly.assemble(config, load_corpus(config))
  config.training.learning_rate = 5.0
  assert made.config.training.learning_rate == 1e-2
  assert made is assembly.assemble(tiny_config(), load_corpus(tiny_config()))


def test_a_module_that_is_loaded_again_is_another(tiny_config, tmp_path, monkeypatch):
  """A user's function that was edited in a notebook's session is not mistaken for the old one."""
  (tmp_path / "brought_along.py").write_text("def form(w_LEDK):\n  return w_LEDK\n")
  monkeypatch.syspath_prepend(tmp_path)
  config = tiny_config(**{"orthogonality.weight_form": "brought_along:form"})
  made = assembly.assemble_sized(config, V, STEPS)
  assert made is assembly.assemble_sized(config, V, STEPS)
  importlib.reload(importlib.import_module("brought_along"))
  again = assembly.assemble_sized(config, V, STEPS)
  assert made is not again is assembly.assemble_sized(config, V, STEPS)
  monkeypatch.delitem(sys.modules, "brought_along")
