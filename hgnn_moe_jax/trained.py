"""A trained model without its training: from a run folder, or from a folder of exported weights.

An exported folder holds model.safetensors (float32 arrays, named by their path in the parameter
tree), card.json (config, tokenizer, result) and, for a tokenizer that its name alone does not
define, tokenizer.json. It can be read on any machine, without the text of the training.
"""

import json
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from hgnn_moe_jax import extensions
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.data.tokenizers import Tokenizer, stored_tokenizer
from hgnn_moe_jax.errors import ConfigError, UserError
from hgnn_moe_jax.models.language_model import LanguageModel, Params
from hgnn_moe_jax.training import run_folder
from hgnn_moe_jax.training.assembly import assemble_sized, build_model
from hgnn_moe_jax.training.checkpoint import Checkpointer
from hgnn_moe_jax.training.optimizer import averaged_params
from hgnn_moe_jax.training.records import environment, write_json

WEIGHTS, CARD = "model.safetensors", run_folder.CARD
_FORMAT = 1


class Trained(NamedTuple):
  """Attributes:
  config: of the run.
  model: its pure functions.
  params: float32; the moving average, where the run kept one.
  tokenizer: of the run.
  step: optimizer steps behind these parameters.
  result: the validation record of that step, {} if it was not scored.
  """

  config: Config
  model: LanguageModel
  params: Params
  tokenizer: Tokenizer
  step: int
  result: dict[str, Any]


def load(folder: str | pathlib.Path, checkpoint: str = "best") -> Trained:
  """Reads a run folder or an exported folder.

  Args:
    folder: either.
    checkpoint: of a run folder: "best" by validation loss (the last, if none was scored) or "last".

  Raises:
    UserError: neither is there, no checkpoint yet, or something is damaged.
  """
  folder = pathlib.Path(folder)
  if (folder / CARD).exists():
    return _load_exported(folder)
  return _load_run(folder, checkpoint)


def export(trained: Trained, folder: str | pathlib.Path, overwrite: bool = False) -> pathlib.Path:
  """Writes an exported folder; returns the path of its card. `load` gives the same model back.

  Args:
    trained: of `load`.
    folder: made if it is not there.
    overwrite: an exported model that lies there is replaced; until all is written it stays.

  Raises:
    UserError: the folder cannot be written, holds an exported model already, or is a run folder,
      which `load` would then take for an exported one.
  """
  folder = pathlib.Path(folder)
  if folder.is_file() or (folder / "config.json").exists():
    raise UserError(f"--output={folder}: is a file or a run folder; choose a folder of its own")
  if (folder / CARD).exists() and not overwrite:
    raise UserError(
      f"--output={folder}: there is a {CARD} already; choose another folder, or give --overwrite"
    )
  arrays = {name: np.asarray(leaf) for name, leaf in _named(trained.params).items()}
  private = _private(trained.config)
  card = {
    "format": _FORMAT,
    "config": private.to_dict(),
    "tokenizer": {
      "name": private.data.tokenizer,
      "vocab_size": trained.tokenizer.vocab_size,
      "fingerprint": trained.tokenizer.fingerprint,
    },
    "parameters": sum(a.size for a in arrays.values()),
    "step": trained.step,
    "result": trained.result,
    "versions": environment()["versions"],
  }
  definition = trained.tokenizer.definition
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=folder) as name:
      made = pathlib.Path(name)
      safetensors.numpy.save_file(arrays, made / WEIGHTS, {"format": "hgnn_moe_jax"})
      if definition is not None:
        (made / run_folder.TOKENIZER).write_text(definition, encoding="utf-8")
      write_json(made / CARD, card)
      # Weights of one export with the card of another would pass for a model.
      (folder / CARD).unlink(missing_ok=True)
      for file in sorted(made.iterdir(), key=lambda file: file.name == CARD):
        file.replace(folder / file.name)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f"--output={folder}: cannot be written ({error}); choose another folder, or free space"
    ) from error
  return folder / CARD


def _private(config: Config) -> Config:
  """Without where the author's files lie, which is nobody's business and says nothing elsewhere."""
  data, changes = config.data, {"data.cache_dir": ""}
  last = lambda path: pathlib.Path(path).expanduser().resolve().name or "text"  # noqa: E731
  is_file = data.source in ("text", "json", "parquet")
  if is_file or (data.path and pathlib.Path(data.path).expanduser().exists()):
    changes["data.path"] = last(data.path)
  if data.tokenizer.endswith(".json"):
    changes["data.tokenizer"] = last(data.tokenizer)
  return with_fields(config, changes)


def _load_run(folder: pathlib.Path, checkpoint: str) -> Trained:
  config, content = run_folder.read_config(folder)
  extensions.require_outside(folder, config)
  if not (folder / "checkpoints").is_dir():  # Orbax would make it.
    raise UserError(f"{folder}: no checkpoints there; copy them, too, or let the run go on")
  tokenizer = _run_tokenizer(folder, config)
  assembly = assemble_sized(config, tokenizer.vocab_size, content["total_steps"])
  checkpointer = Checkpointer(folder)
  try:
    latest = checkpointer.latest_step()
    if latest is None:
      raise UserError(f"{folder}: no checkpoint was saved yet; let the run go on")
    best = checkpointer.best_step() if checkpoint == "best" else None
    step = latest if best is None else best
    state, note = checkpointer.restore(assembly.abstract_state, step)
  finally:
    checkpointer.close()
  params = averaged_params(state.opt_state, state.params)
  last = note["last"]
  result = last if last is not None and last["step"] == step else {}
  return Trained(config, assembly.model, params, tokenizer, step, result)


def _run_tokenizer(folder: pathlib.Path, config: Config) -> Tokenizer:
  file = folder / run_folder.TOKENIZER
  if config.data.tokenizer in ("gpt2", "bytes") or file.exists():
    return stored_tokenizer(config.data.tokenizer, file)
  return load_corpus(config).tokenizer  # A run of a version that kept no tokenizer.json.


def _load_exported(folder: pathlib.Path) -> Trained:
  try:
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if card["format"] != _FORMAT:
      raise UserError(f"{folder / CARD}: format {card['format']}; this version reads {_FORMAT}")
    config = Config.from_dict(card["config"])
    extensions.require_outside(folder, config)
    config.validate()
    named, step, result = card["tokenizer"], int(card["step"]), card["result"]
    vocab_size, fingerprint = int(named["vocab_size"]), named["fingerprint"]
  except ConfigError as error:
    raise UserError(f"{folder / CARD}: {error}") from None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{folder / CARD}: damaged ({error}); export the run again") from None
  tokenizer = stored_tokenizer(named["name"], folder / run_folder.TOKENIZER)
  if tokenizer.fingerprint != fingerprint:
    raise UserError(f"{folder}: {run_folder.TOKENIZER} is not the model's; export the run again")
  model = build_model(config, vocab_size)
  return Trained(config, model, _read_weights(folder / WEIGHTS, model), tokenizer, step, result)


def _read_weights(path: pathlib.Path, model: LanguageModel) -> Params:
  try:
    arrays = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{path}: cannot be read ({error}); export the run again") from None
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  wanted = {name: leaf.shape for name, leaf in _named(shapes).items()}
  found = {name: array.shape for name, array in arrays.items()}
  if wanted != found:
    name = min(set(wanted.items()) ^ set(found.items()))[0]
    raise UserError(
      f"{path}: {name} is {found.get(name, 'missing')}, the config in {CARD} wants "
      f"{wanted.get(name, 'none')}; export the run again"
    )
  return jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays[_name(path)]), shapes)


def _named(tree: Any) -> dict[str, Any]:
  """Leaves by their path, e.g. layers/experts/qkv_kernel."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
