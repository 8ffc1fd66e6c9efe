"""Trained models from run folders and from exported weights: the same logits, or one clear line."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hgnn_moe_jax import export, main, trained
from hgnn_moe_jax.analysis import experts
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.config import with_fields
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import evaluate, loop
from hgnn_moe_jax.training.checkpoint import Checkpointer
from hgnn_moe_jax.training.optimizer import averaged_params

QUICKSTART = pathlib.Path(__file__).parent.parent / "configs" / "quickstart.py"


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory, _factories):
  """A finished run with a BPE of its own; its best step is not its last."""
  folder = tmp_path_factory.mktemp("runs") / "tiny"
  changes = {"data.tokenizer": "bpe", "data.vocab_size": 270, "training.keep_checkpoints": 9}
  with jax.numpy_dtype_promotion("standard"):
    loop.train(tiny_config(**changes), folder, quiet=True)
  return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported") / "tiny"
  trained.export(trained.load(run), folder)
  return folder


@pytest.fixture
def copy(exported, tmp_path):
  return shutil.copytree(exported, tmp_path / "copy")


def _same(left, right):
  return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), left, right))


def test_a_run_gives_its_averaged_parameters(run):
  config = trained.load(run).config
  state, note = Checkpointer(run).restore(
    loop.assemble(config, load_corpus(config)).abstract_state, 12
  )
  last = trained.load(run, "last")
  assert last.step == 12
  assert _same(last.params, averaged_params(state.opt_state, state.params))
  assert not _same(last.params, state.params)  # training.ema_decay is on.
  assert last.result == note["last"]
  assert last.result["step"] == 12


def test_the_best_checkpoint_is_the_default(run):
  manager = Checkpointer(run)
  assert trained.load(run).step == manager.best_step()


def test_a_round_trip_changes_no_bit(run, exported):
  before, after = trained.load(run), trained.load(exported)
  inputs_BT = np.arange(32, dtype=np.int32).reshape(2, 16)
  logits = lambda t: np.asarray(jax.jit(t.model.logits)(t.params, inputs_BT))  # noqa: E731
  assert _same(before.params, after.params)
  np.testing.assert_array_equal(logits(before), logits(after))
  name = pathlib.Path(before.config.data.path).name
  assert after.config == with_fields(before.config, {"data.path": name, "data.cache_dir": ""})
  assert (after.step, after.result) == (before.step, before.result)
  text = "the experts of one layer"
  ids = before.tokenizer.encode([text])[0]
  np.testing.assert_array_equal(after.tokenizer.encode([text])[0], ids)
  assert after.tokenizer.decode(ids) == text


def test_an_export_does_not_say_where_its_author_keeps_things(run, exported):
  config = trained.load(run).config
  for place in (config.data.path, config.data.cache_dir):
    assert pathlib.Path(place).is_absolute()
    assert str(pathlib.Path(place).parent) not in (exported / "card.json").read_text()


@pytest.mark.parametrize(
  ("fields", "written"),
  [
    ({"data.path": "/home/a/b.txt", "data.tokenizer": "/home/a/t.json"}, ("b.txt", "t.json")),
    ({"data.path": ".", "data.tokenizer": "bpe"}, (pathlib.Path.cwd().name, "bpe")),
    ({"data.path": "/", "data.tokenizer": "bytes"}, ("text", "bytes")),
    ({"data.source": "hf", "data.path": "Salesforce/wikitext"}, ("Salesforce/wikitext", "bpe")),
    ({"data.source": "hf", "data.path": "/usr/bin"}, ("bin", "bpe")),
  ],
)
def test_an_exported_config_is_valid_without_its_paths(run, fields, written):
  config = trained._private(with_fields(trained.load(run).config, fields)).validate()
  assert (config.data.path, config.data.tokenizer) == written


@pytest.mark.parametrize("where", ["run", "exported"])
def test_neither_brings_code_along(where, run, exported, tmp_path, monkeypatch):
  folder = shutil.copytree(run if where == "run" else exported, tmp_path / "theirs")
  name = "config.json" if where == "run" else "card.json"
  content = json.loads((folder / name).read_text())
  content["config"]["model"]["coupler"] = "theirs.evil:Op"
  (folder / name).write_text(json.dumps(content))
  (folder / "evil.py").write_text("raise AssertionError('it was run')\n")
  monkeypatch.syspath_prepend(tmp_path)
  readers = [trained.load]
  if where == "run":
    readers += [
      lambda f: evaluate.evaluate_run(f, "test", "best"),
      lambda f: experts.load_experts(read_run(f)),
    ]
  for read in readers:
    with pytest.raises(UserError, match=r"the module lies in .*theirs"):
      read(folder)
  content["config"]["model"]["coupler"] = None
  (folder / name).write_text(json.dumps(content))
  with pytest.raises(UserError, match="coupler=None: use a value of type str"):
    readers[-1](folder)


def test_the_card_and_the_names(exported):
  card = json.loads((exported / "card.json").read_text())
  arrays = safetensors.numpy.load_file(exported / "model.safetensors")
  assert arrays["layers/experts/qkv_kernel"].shape == (2, 3, 16, 3, 2, 8)  # L E D 3 N H
  assert card["parameters"] == sum(a.size for a in arrays.values())
  assert card["result"]["token_perplexity"] > 1
  assert card["config"]["model"]["embed_dim"] == 16


def test_neither_needs_the_text(run, exported, tmp_path, monkeypatch):
  def refuse(config):
    raise AssertionError("the text was read")

  monkeypatch.setattr(trained, "load_corpus", refuse)
  trained.load(run)
  trained.load(exported)


def test_a_run_without_a_stored_tokenizer_finds_it_through_its_text(run, tmp_path):
  old = shutil.copytree(run, tmp_path / "old")
  (old / "tokenizer.json").unlink()
  assert trained.load(old).tokenizer.fingerprint == trained.load(run).tokenizer.fingerprint


def _edit(folder, **changes):
  path = folder / "card.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without_an_array(folder):
  path = folder / "model.safetensors"
  arrays = safetensors.numpy.load_file(path)
  del arrays["head"]
  safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda f: (f / "card.json").write_text("{"), "card.json: damaged"),
    (lambda f: _edit(f, format=99), "card.json: format 99; this version reads 1"),
    (lambda f: _edit(f, config={"model": {"width": 3}}), "card.json: config.model.width=3"),
    (lambda f: _edit(f, tokenizer={"name": "bpe"}), "card.json: damaged"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json.*cannot be read"),
    (
      lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text() + " "),
      "tokenizer.json is not the model's",
    ),
    (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors: cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    (_without_an_array, r"head is missing, the config in card.json wants \(270, 16\)"),
  ],
)
def test_damaged_exports(copy, damage, message):
  damage(copy)
  with pytest.raises(UserError, match=message):
    trained.load(copy)


def test_places_that_are_no_models(run, tmp_path):
  with pytest.raises(UserError, match=r"no config.json there"):
    trained.load(tmp_path)
  young = tmp_path / "young"
  young.mkdir()
  shutil.copy(run / "config.json", young)
  shutil.copy(run / "tokenizer.json", young)
  with pytest.raises(UserError, match="no checkpoints there; copy them, too, or let the run go on"):
    trained.load(young)
  assert not (young / "checkpoints").exists()  # Nothing is left behind in somebody's run.
  (young / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no checkpoint was saved yet; let the run go on"):
    trained.load(young)


def test_no_export_into_a_run_or_a_file(run, tmp_path):
  model = trained.load(run)
  (tmp_path / "file").touch()
  for folder in (run, tmp_path / "file"):
    with pytest.raises(UserError, match="is a file or a run folder"):
      trained.export(model, folder)


def test_an_export_replaces_another_only_if_asked(run, copy, monkeypatch):
  model, before = trained.load(run), _content(copy)
  (copy / "model.safetensors").write_bytes(b"no")
  with pytest.raises(UserError, match=r"copy: there is a card.json already; choose .* --overwrite"):
    trained.export(model, copy)
  trained.export(model, copy, overwrite=True)  # What a damaged export is told to do.
  assert _content(copy) == before
  trained.export(trained.load(copy), copy, overwrite=True)  # Onto itself.
  assert _content(copy).keys() == before.keys()

  def full(*given):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match=r"copy: cannot be written \(.*No space left .*free space"):
      trained.export(model, copy, overwrite=True)
  assert trained.load(copy).step == model.step  # The old one is still there.
  assert _content(copy).keys() == before.keys()

  def stop(self, target):
    raise KeyboardInterrupt

  # Old weights with a new card, or the other way round, would pass for a model.
  monkeypatch.setattr(pathlib.Path, "replace", stop)
  with pytest.raises(KeyboardInterrupt):
    trained.export(model, copy, overwrite=True)
  assert not (copy / "card.json").exists()


def _content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_names_the_folder_after_the_run(run, command, tmp_path, monkeypatch):
  """Not after its config, of which there may be several runs; and no run begins there."""
  monkeypatch.chdir(tmp_path)
  done = command(export.main, run)
  assert done == (0, "exported/tiny/card.json\n", "")
  (tmp_path / "second").symlink_to(run)
  refused = command(export.main, "second")  # It is the same one.
  assert refused.status == 2 and "exported/tiny: there is a card.json already" in refused.err
  assert command(export.main, "second", "--overwrite").out == done.out
  before = _content(tmp_path / "exported" / "tiny")
  refused = command(main.main, "--config=" + str(QUICKSTART), "--workdir=exported/tiny")
  assert refused.status == 2 and "holds an exported model (card.json); choose" in refused.err
  assert _content(tmp_path / "exported" / "tiny") == before
