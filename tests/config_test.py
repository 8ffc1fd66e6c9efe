"""The configuration's own rules, and that every experiment in configs/ keeps to them."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import pytest

from hgnn_moe_jax import config_rules
from hgnn_moe_jax.config import Config, ModelConfig, difference
from hgnn_moe_jax.errors import ConfigError
from hgnn_moe_jax.training import loop

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "configs").glob("*.py"))
GROUPS = [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]


def load(path: pathlib.Path) -> Config:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def valid(**changes) -> Config:
  config = Config()
  config.training.steps = 10
  for field, value in changes.items():
    *group, name = field.split(".")
    setattr(getattr(config, group[0]) if group else config, name, value)
  return config


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_are_valid_and_say_what_they_are(path):
  config = load(path).validate()
  assert config.name == path.stem
  doc = path.read_text().split('"""')[1]
  assert f"--config=configs/{path.name}" in doc and "Shows: " in doc


@pytest.mark.parametrize("name", ["quickstart", "hypergraph", "dense"])
def test_experiments_run_when_shrunk(name, tiny_config, tmp_path, shared_programs):
  """The couplers, penalties and schedules of the file; sizes and text of the tiny run."""
  config, tiny = load(ROOT / "configs" / f"{name}.py"), tiny_config()
  for field in ("embed_dim", "num_heads", "ffn_multiplier", "max_length"):
    setattr(config.model, field, getattr(tiny.model, field))
  config.model.num_layers, config.data = 1, tiny.data
  config.training.steps, config.training.epochs, config.training.batch_size = 2, 0.0, 8
  config.training.warmup_steps, config.model.dropout = 1, 0.0
  summary = loop.train(config, tmp_path, quiet=True)
  assert summary["steps"] == 2 and summary["best"]["loss"] > 0


def test_a_config_survives_json():
  config = valid(**{"model.hyperedges": "[[0,1]]", "training.learning_rate": 0.1 + 0.2, "seed": 7})
  again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
  assert again == config and again is not config
  assert Config.from_dict({}) == Config()


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"modle": {}}, r"config\.modle=\{\}: unknown to this version"),
    ({"model": {"num_headz": 3}}, r"config\.model\.num_headz=3: unknown to this version"),
  ],
)
def test_from_dict_refuses_what_it_does_not_know(values, message):
  with pytest.raises(ConfigError, match=message):
    Config.from_dict(values)


def test_difference_names_what_changes_a_run_and_nothing_else():
  old = valid()
  assert difference(old, valid()) == []
  changed = valid(
    **{"seed": 1, "model.num_layers": 2, "data.cache_dir": "x", "training.log_every": 9}
  )
  assert difference(old, changed) == ["seed: 42 -> 1", "model.num_layers: 4 -> 2"]
  free = {
    f.name
    for g in GROUPS
    for f in dataclasses.fields(g.type)
    if not f.metadata.get("meaning", True)
  }
  assert free == {
    *("path", "cache_dir", "placement", "steps_per_dispatch", "log_every", "checkpoint_every"),
    *("keep_checkpoints", "tensorboard", "wandb_project", "remat", "unrolled_layers"),
    "batch_size",  # of the evaluation
    *("data", "expert", "model", "fsdp"),
  }


def test_a_misspelt_field_is_an_error():
  config = Config()
  for group in (config, *(getattr(config, g.name) for g in GROUPS)):
    with pytest.raises(AttributeError):
      group.num_headz = 3


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_every_field_is_read_somewhere(group):
  """A field that nobody reads is a knob that does nothing."""
  package = ROOT / "hgnn_moe_jax"
  source = "\n".join(
    file.read_text() for file in sorted(package.rglob("*.py")) if file.name != "config.py"
  )
  # `hyperedges` is read through hyperedge_list(), which stands in config.py.
  source = source.replace(".hyperedge_list(", ".hyperedges(")
  for field in dataclasses.fields(group.type):
    assert re.search(rf"\.{field.name}\b(?!\s*=[^=])", source), f"{group.name}.{field.name}"


REFUSED = [
  ({"model.num_heads": 3}, r"model\.num_heads=3: use a divisor of model\.embed_dim=256"),
  (
    {"model.selected_experts": 5},
    r"model\.selected_experts=5: use at most model\.num_experts=4, or 0",
  ),
  ({"model.num_heads": "4"}, r"model\.num_heads='4': use a value of type int"),
  ({"model.num_heads": True}, r"model\.num_heads=True: use a value of type int"),
  ({"model.dropout": None}, r"model\.dropout=None: use a value of type float"),
  ({"seed": -1}, r"seed=-1: use a value in \[0, 2\*\*32\)"),
  ({"seed": 2**32}, r"seed=4294967296: use a value in"),
  ({"name": 3}, r"config\.name=3: use a value of type str"),
  ({"model.num_layers": 0}, r"model\.num_layers=0: use a value at least 1"),
  ({"model.dropout": 1.0}, r"model\.dropout=1\.0: use a value in \[0\.0, 0\.99\]"),
  ({"training.learning_rate": float("nan")}, r"learning_rate=nan: use a value at least 0\.0"),
  ({"training.learning_rate": float("inf")}, r"learning_rate=inf: use a value at least 0\.0"),
  ({"model.coupler": "grap"}, r"coupler='grap': use one of graph, hypergraph, mean, matrix, att"),
  (
    {"model.positions": "rotary", "model.embed_dim": 12},
    r"positions='rotary': rotary needs an even head size, not 3",
  ),
  (
    {"model.coupler": "hypergraph", "model.hyperedges": "[[0,4]]"},
    r"hyperedges='\[\[0,4\]\]': expert 4 of \[0, 4\] does not exist; experts are 0\.\.3",
  ),
  ({"model.coupler": "hypergraph", "model.hyperedges": "pears"}, r"use pairs, triplets, all or"),
  ({"model.coupler": "hypergraph", "model.hyperedges": "[]"}, r"use pairs, triplets, all or"),
  ({"model.coupler": "hypergraph", "model.hyperedges": "[[0,1.5]]"}, r"use pairs, triplets"),
  (
    {"model.coupler": "hypergraph", "model.hyperedges": "[[1,1]]"},
    r"give \[1, 1\] two or more different experts",
  ),
  (
    {"model.coupler": "hypergraph", "model.num_experts": 2, "model.hyperedges": "triplets"},
    r"2 experts have none; use pairs",
  ),
  (
    {"orthogonality.weight_form": "spectral", "orthogonality.subspace_rank": 256},
    r"subspace_rank=256: use less than embed_dim=256",
  ),
  (
    {"model.num_experts": 1, "orthogonality.weight_strength": 0.1},
    r"num_experts=1: orthogonality needs two experts",
  ),
  ({"adaptive.pair_emphasis": 1.0}, r"pair_emphasis=1\.0: set it to 0: .*constant adapts nothing"),
  ({"data.tokenizer": "gpt9"}, r"tokenizer='gpt9': use gpt2, bpe, bytes or the path of a"),
  ({"data.source": "hf"}, r"data\.path='': data\.source=hf needs the data set's name"),
  ({"data.source": "text"}, r"data\.path='': data\.source=text needs a file or a folder"),
  ({"data.split_seed": -1}, r"split_seed=-1: use a value at least 0"),
  ({"evaluation.stride": 129}, r"stride=129: use at most model\.max_length=128"),
  ({"evaluation.stride": 4, "data.protocol": "lines"}, r"stride=4: a sliding context needs"),
  ({"training.epochs": 1.0}, r"steps=10: training\.epochs=1\.0 says otherwise; set one of them"),
  ({"training.steps": 0}, r"steps=0: set it or training\.epochs: how long is the run\?"),
  ({"training.accumulation": 5}, r"accumulation=5: use a divisor of training\.batch_size=32"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_validation_names_field_value_and_cure(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    valid(**changes).validate()
  assert len(str(error.value).splitlines()) == 1


def test_what_does_nothing_is_told():
  config = valid(**{"model.hyperedges": "triplets", "model.hyperedge_attention": True}).validate()
  assert config_rules.idle(config) == [
    "model.hyperedges='triplets' does nothing: model.coupler=graph",
    "model.hyperedge_attention=True does nothing: model.coupler=graph",
  ]
  for coupler in ("hypergraph", "mine:Ring"):
    config.model.coupler = coupler
    assert config_rules.idle(config) == []
  assert config_rules.idle(valid()) == []


def test_whole_numbers_do_for_float_fields():
  assert valid(**{"model.dropout": 0, "training.epochs": 0}).validate()


def test_hyperedges_golden():
  model = ModelConfig(num_experts=3)
  assert model.hyperedge_list() == ((0, 1), (0, 2), (1, 2))
  model.hyperedges = "triplets"
  assert model.hyperedge_list() == ((0, 1, 2),)
  model.hyperedges = "all"
  assert model.hyperedge_list() == ((0, 1), (0, 2), (1, 2), (0, 1, 2))
  model.hyperedges = "[[2,0],[0,1,2]]"
  assert model.hyperedge_list() == ((2, 0), (0, 1, 2))
  assert ModelConfig(num_experts=1).hyperedge_list() == ()
