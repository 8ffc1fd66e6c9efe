"""A corpus: three splits as examples, with the sizes that turn a loss into perplexities.

Two protocols. `packed`: the documents of a split are one stream and every token is scored once.
`lines`: each line of more than 30 characters is an example of its own, cut at T tokens.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hgnn_moe_jax.config import Config, DataConfig
from hgnn_moe_jax.config_rules import TOKENIZERS
from hgnn_moe_jax.data import cache
from hgnn_moe_jax.data.examples import Examples, line_examples, scored_targets, stream_examples
from hgnn_moe_jax.data.sources import SPLITS, Documents, load_documents, statistics
from hgnn_moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from hgnn_moe_jax.errors import ConfigError

_TOKENS_VERSION = 1  # Raise it when the same text and tokenizer give other tokens or counts.
_SHORTEST_LINE = 31  # Characters, after stripping; the `lines` protocol's own rule.


class Split(NamedTuple):
  """One split.

  Attributes:
    examples: what is trained on or scored.
    tokens: targets with weight 1, over all examples.
    words: white-space words plus line ends of the scored text, the denominator of word perplexity.
    bytes: UTF-8 bytes of the scored text, the denominator of bits per byte.

  Scored text is the whole split in `packed` (ends of text are scored too, and are no words), and in
  `lines` what the tokens after the first of each line decode to; a line's end is not scored there.
  """

  examples: Examples
  tokens: int
  words: int
  bytes: int


class Tokenized(NamedTuple):
  """A split's tokens. `size_X` is the number of tokens of each line, None in `packed`."""

  tokens: np.ndarray
  size_X: np.ndarray | None
  counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What training and evaluation need of the data.

  Attributes:
    splits: "train", "validation", "test". Training windows lie side by side; the other two follow
      `evaluation.stride`.
    tokenizer: its `end_of_text` is the id to pad with.
    fingerprint: sha256 hex over text, tokenizer, protocol and, for `lines`, T.
  """

  splits: dict[str, Split]
  tokenizer: Tokenizer
  fingerprint: str


def load_corpus(config: Config) -> Corpus:
  """Reads, tokenises (once; see `data.cache_dir`) and cuts the corpus that `config` describes.

  Raises:
    ConfigError, UserError: missing or unusable text, or too little of it; or a tokenizer that does
      not give it back.
  """
  root = cache.cache_root(config.data.cache_dir)
  documents = load_documents(config.data)
  tokenizer = load_tokenizer(config.data, documents["train"], root)
  fingerprint = _fingerprint(documents, tokenizer, config)
  tokenized = _cached_tokens(root, fingerprint, documents, tokenizer, config)
  splits = {}
  for name in SPLITS:
    stride = 0 if name == "train" else config.evaluation.stride
    splits[name] = _split(tokenized[name], config.model.max_length, stride)
    _require_content(name, splits[name], config)
  return Corpus(splits, tokenizer, fingerprint)


def unigram_perplexity(corpus: Corpus) -> float:
  """Token perplexity on validation of the training targets' frequencies.

  Each of the V ids gets one count more than it has (add-one smoothing), so that tokens which
  training lacks have a probability. A model that has learned anything is below this.
  """
  vocab_size = corpus.tokenizer.vocab_size
  counts, validation = (
    np.bincount(scored_targets(corpus.splits[name].examples), minlength=vocab_size)
    for name in ("train", "validation")
  )
  log_probability = np.log((counts + 1) / (counts.sum() + vocab_size))
  return float(np.exp(-(validation @ log_probability) / validation.sum()))


def tokenize_packed(documents: Sequence[str], tokenizer: Tokenizer) -> Tokenized:
  """One stream: an end of text as context, then the documents.

  Each document is followed by an end of text, unless it is the only one.
  """
  end = np.asarray([tokenizer.end_of_text], np.int32)
  parts = [end]
  for ids in tokenizer.encode(documents):
    parts += [ids, end] if len(documents) > 1 else [ids]
  tokens = np.concatenate(parts)
  counts = {"tokens": tokens.size - 1, "documents": len(documents)}
  return Tokenized(tokens, None, counts | statistics(documents)._asdict())


def tokenize_lines(documents: Sequence[str], tokenizer: Tokenizer, max_length: int) -> Tokenized:
  """Each stripped line of more than 30 characters, tokenised alone and cut at T tokens.

  Words and bytes are those of the text that the tokens after each line's first decode to: the rest
  of a word that begins in the first token counts as a word, a character that the cut at T divides
  counts as U+FFFD.
  """
  kept = _encoded_texts(documents, "lines")
  ids = [line_ids[:max_length] for line_ids in tokenizer.encode(kept)]
  size_X = np.asarray([line_ids.size for line_ids in ids], np.int32)
  scored = statistics([tokenizer.decode(line_ids[1:].tolist()) for line_ids in ids])
  counts = {
    "tokens": int(np.maximum(size_X - 1, 0).sum()),
    "documents": len(documents),
    "words": scored.words,
    "line_ends": 0,
    "bytes": scored.bytes,
  }
  return Tokenized(np.concatenate([np.zeros(0, np.int32), *ids]), size_X, counts)


def _encoded_texts(documents: Sequence[str], protocol: str) -> list[str]:
  """What the protocol encodes, one by one."""
  if protocol == "packed":
    return list(documents)
  lines = (line.strip() for text in documents for line in text.split("\n"))
  return [line for line in lines if len(line) >= _SHORTEST_LINE]


def _fingerprint(documents: Documents, tokenizer: Tokenizer, config: Config) -> str:
  protocol = config.data.protocol
  cut = config.model.max_length if protocol == "lines" else "whole"
  digest = hashlib.sha256(f"{_TOKENS_VERSION} {protocol} {cut} {tokenizer.fingerprint}".encode())
  for split in SPLITS:
    digest.update(f" {split} {len(documents[split])} ".encode())
    for text in documents[split]:
      digest.update(hashlib.sha256(text.encode()).digest())
  return digest.hexdigest()


def _cached_tokens(
  root: pathlib.Path, fingerprint: str, documents: Documents, tokenizer: Tokenizer, config: Config
) -> dict[str, Tokenized]:
  """Every split's tokens, mapped from the cache rather than read."""
  dtype = np.uint16 if tokenizer.vocab_size < 2**16 else np.int32

  def write(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    details = {}
    if config.data.tokenizer not in TOKENIZERS:  # A file; the project's own lose nothing.
      for name in ("validation", "test"):
        _require_faithful(documents[name], tokenizer, config.data)
    for name in SPLITS:
      if config.data.protocol == "lines":
        split = tokenize_lines(documents[name], tokenizer, config.model.max_length)
      else:
        split = tokenize_packed(documents[name], tokenizer)
      if split.size_X is not None:
        np.save(folder / f"{name}.sizes.npy", split.size_X)
      np.save(folder / f"{name}.tokens.npy", split.tokens.astype(dtype))
      details[name] = split.counts
    return details

  folder, details = cache.cached_folder(root, f"tokens-{fingerprint[:32]}", write)
  tokenized = {}
  for name in SPLITS:
    # A plain view of the mapped file: np.memmap makes every batch an np.memmap, too.
    tokens = np.asarray(np.load(folder / f"{name}.tokens.npy", mmap_mode="r"))
    sizes = folder / f"{name}.sizes.npy"
    size_X = np.load(sizes) if config.data.protocol == "lines" else None
    tokenized[name] = Tokenized(tokens, size_X, details[name])
  return tokenized


def _split(tokenized: Tokenized, max_length: int, stride: int) -> Split:
  tokens, counts = tokenized.tokens, tokenized.counts
  if tokens.size + max_length > np.iinfo(np.int32).max:
    raise ConfigError("data.path", f"{tokens.size} tokens", "positions are int32; give less text")
  if tokenized.size_X is None:
    examples = stream_examples(tokens, max_length, stride)
  else:
    examples = line_examples(tokens, tokenized.size_X)
  return Split(examples, counts["tokens"], counts["words"] + counts["line_ends"], counts["bytes"])


def _require_faithful(documents: Sequence[str], tokenizer: Tokenizer, data: DataConfig) -> None:
  """Raises ConfigError if the tokens do not give back the text that is scored.

  Word perplexity and bits per byte count the words and bytes of the text: where tokens say less
  than it (unknown words, letter case, white space), both would be too good.
  """
  texts = _encoded_texts(documents, data.protocol)
  for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
    decoded = tokenizer.decode(ids.tolist())
    if decoded != text:
      pairs = enumerate(zip(decoded, text, strict=False))
      first = next((k for k, (a, b) in pairs if a != b), min(len(decoded), len(text)))
      near = slice(max(0, first - 10), first + 20)
      raise ConfigError(
        "data.tokenizer",
        data.tokenizer,
        f"does not give the text back: {text[near]!r} becomes {decoded[near]!r}, so that word "
        "perplexity and bits per byte would not be of this text; use a byte-level tokenizer",
      )


def _require_content(name: str, split: Split, config: Config) -> None:
  if not split.tokens or not split.words:
    lines = config.data.protocol == "lines" and not split.tokens
    what = "no line is longer than 30 characters" if lines else "no word"
    raise ConfigError(
      "data.protocol", config.data.protocol, f"{what} in {name}; use packed, or give more text"
    )
  if name == "train" and split.examples.num_examples < config.training.batch_size:
    raise ConfigError(
      "training.batch_size",
      config.training.batch_size,
      f"the corpus is smaller than a batch ({split.examples.num_examples} training examples of up "
      f"to {config.model.max_length} tokens); use a smaller batch or more text",
    )
