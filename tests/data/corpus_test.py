"""Text to splits: what is scored, what is counted, what is cached, and what is refused."""

import logging
import math

import numpy as np
import pytest
import tokenizers

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data import corpus as ours
from hgnn_moe_jax.data import examples as ex
from hgnn_moe_jax.data.tokenizers import ByteTokenizer, train_bpe
from hgnn_moe_jax.errors import ConfigError

LINE = "This line is long enough to be kept: {}."


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
  """One cache for all tests that read WikiText-2."""
  return tmp_path_factory.mktemp("cache")


def make_config(path, cache_dir, **data) -> Config:
  config = Config()
  config.data.source, config.data.path, config.data.cache_dir = "text", str(path), str(cache_dir)
  config.data.tokenizer = "bytes"
  config.training.steps, config.training.batch_size, config.model.max_length = 1, 2, 8
  for name, value in data.items():
    setattr(config.data, name, value)
  return config.validate()


def write_splits(folder, train="abc de\nfg\n", valid="hij\n", test="k\n"):
  for name, text in {"train": train, "valid": valid, "test": test}.items():
    (folder / f"{name}.txt").write_text(text)
  return folder


def scored_text(split: ours.Split) -> str:
  return ByteTokenizer().decode(ex.scored_targets(split.examples).tolist())


def test_packed_golden(tmp_path):
  corpus = ours.load_corpus(make_config(write_splits(tmp_path), tmp_path / "cache"))
  train = corpus.splits["train"]
  # One document: an end of text as context in front, none behind.
  assert train.examples.tokens.tolist() == [256, *b"abc de\nfg\n"]
  assert train.examples.tokens.dtype == np.uint16
  assert (train.tokens, train.words, train.bytes) == (10, 3 + 2, 10)
  assert train.examples.length_X.tolist() == [8, 2]
  assert scored_text(train) == "abc de\nfg\n"


def test_packed_documents_end_with_an_end_of_text():
  tokenized = ours.tokenize_packed(["ab c", "d\n"], ByteTokenizer())
  assert tokenized.tokens.tolist() == [256, *b"ab c", 256, *b"d\n", 256]
  assert tokenized.counts == {"tokens": 8, "documents": 2, "words": 3, "line_ends": 1, "bytes": 6}


def test_lines_golden():
  # 30 characters are too few, 31 enough; white space at the ends does not count.
  short, kept = "x" * 30, "é" + "y z" * 10
  tokenized = ours.tokenize_lines([f" {short} \n\n \t{kept} \n"], ByteTokenizer(), 9)
  ids = list(kept.encode())[:9]
  assert tokenized.tokens.tolist() == ids
  assert tokenized.size_X is not None and tokenized.size_X.tolist() == [9]
  # Scored: the second byte of "é", alone no character and so U+FFFD (3 bytes), then "y zy zy".
  assert tokenized.counts == {"tokens": 8, "documents": 1, "words": 3, "line_ends": 0, "bytes": 10}


def test_lines_are_tokenised_alone_and_keep_token_zero(tmp_path):
  write_splits(tmp_path, *("".join(f"{c}{LINE.format(k)}!\n" for k in range(3)) for c in "!#$"))
  config = make_config(tmp_path, tmp_path / "cache", protocol="lines", tokenizer="gpt2")
  config.model.max_length = 64
  corpus = ours.load_corpus(config)
  batch = ex.gather(corpus.splits["train"].examples, np.arange(3, dtype=np.int32), 64, 0)
  # GPT-2's id of "!" is 0, and 0 is the fill here; only the weights tell them apart.
  assert batch.inputs_BT[:, 0].tolist() == [0, 0, 0]
  assert np.any((batch.targets_BT == 0) & (batch.weights_BT > 0))
  scored = batch.targets_BT[0][batch.weights_BT[0] > 0]
  assert corpus.tokenizer.decode(scored) == LINE.format(0) + "!"
  assert corpus.splits["train"].tokens == batch.weights_BT.sum()


def test_packed_wikitext2(wikitext2, cache_dir):
  config = make_config(wikitext2, cache_dir, tokenizer="gpt2")
  config.model.max_length = 128
  corpus = ours.load_corpus(config)
  sizes = {name: (s.tokens, s.words, s.bytes) for name, s in corpus.splits.items()}
  assert sizes == {
    "train": (2_448_382, 2_088_628, 10_797_148),
    "validation": (258_659, 217_646, 1_121_681),
    "test": (295_877, 245_569, 1_256_449),
  }
  for split in corpus.splits.values():
    assert split.examples.num_examples == math.ceil(split.tokens / 128)
    assert (split.examples.length_X - split.examples.skip_X).sum() == split.tokens
  assert not isinstance(corpus.splits["train"].examples.tokens, np.memmap)
  assert not corpus.splits["train"].examples.tokens.flags.owndata


def test_lines_wikitext2(wikitext2, cache_dir):
  config = make_config(wikitext2, cache_dir, tokenizer="gpt2", protocol="lines")
  config.model.max_length = 128
  corpus = ours.load_corpus(config)
  for name, lines, tokens in (("train", 18_131, 1_685_688), ("validation", 1_913, 178_585)):
    split = corpus.splits[name]
    assert split.examples.num_examples == lines
    # The published counts hold each line's first token, which is never predicted.
    assert split.examples.tokens.size == tokens
    assert split.tokens == tokens - lines


def test_second_load_reads_the_cache(tmp_path, monkeypatch):
  config = make_config(write_splits(tmp_path), tmp_path / "cache")
  first = ours.load_corpus(config)
  monkeypatch.setattr(ours, "tokenize_packed", lambda *args: pytest.fail("tokenised again"))
  second = ours.load_corpus(config)
  assert second.fingerprint == first.fingerprint
  for name, split in first.splits.items():
    for array, again in zip(split.examples, second.splits[name].examples, strict=True):
      np.testing.assert_array_equal(array, again)
    assert split[1:] == second.splits[name][1:]


def test_damaged_tokens_are_announced_and_made_anew(tmp_path, caplog):
  config = make_config(write_splits(tmp_path), tmp_path / "cache")
  ours.load_corpus(config)
  (file,) = (tmp_path / "cache").glob("tokens-*/train.tokens.npy")
  file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
  with caplog.at_level(logging.WARNING, logger="absl"):
    corpus = ours.load_corpus(config)
  assert "is damaged (train.tokens.npy has changed)" in caplog.text
  assert scored_text(corpus.splits["train"]) == "abc de\nfg\n"


def test_fingerprint_covers_what_matters_and_nothing_else(tmp_path):
  write_splits(tmp_path, train=LINE * 3, valid=LINE, test=LINE)
  base = make_config(tmp_path, tmp_path / "cache")
  base.training.batch_size = 1

  def fingerprint(change):
    config = Config.from_dict(base.to_dict())
    change(config)
    return ours.load_corpus(config).fingerprint

  def set_data(**fields):
    return lambda config: [setattr(config.data, k, v) for k, v in fields.items()]

  def set_length(config):
    config.model.max_length = 9

  def set_lines_and_length(config):
    set_data(protocol="lines")(config)
    set_length(config)

  same = [set_data(), set_data(cache_dir=str(tmp_path / "other")), set_data(placement="host")]
  assert len({fingerprint(change) for change in [*same, set_length]}) == 1
  others = [set_data(tokenizer="bpe", vocab_size=300), set_data(protocol="lines")]
  others += [set_lines_and_length, set_data()]
  assert len({fingerprint(change) for change in others}) == 4


def test_fingerprint_tells_where_documents_and_splits_end():
  layouts = [
    {"train": ("a", "b"), "validation": ("c",), "test": ("d",)},
    {"train": ("a",), "validation": ("b", "c"), "test": ("d",)},
    {"train": ("a",), "validation": ("bc",), "test": ("d",)},
    {"train": ("b", "a"), "validation": ("c",), "test": ("d",)},
  ]
  prints = {ours._fingerprint(layout, ByteTokenizer(), Config()) for layout in layouts}
  assert len(prints) == 4


def test_evaluation_stride(tmp_path):
  config = make_config(write_splits(tmp_path, valid="0123456789ab"), tmp_path / "cache")
  config.evaluation.stride = 2
  corpus = ours.load_corpus(config)
  assert corpus.splits["train"].examples.start_X.tolist() == [0, 8]
  validation = corpus.splits["validation"].examples
  assert validation.start_X.tolist() == [0, 2, 4]
  assert validation.skip_X.tolist() == [0, 6, 6]


@pytest.mark.parametrize("protocol", ["packed", "lines"])
@pytest.mark.parametrize("lossy", ["", "case", "case of training", "white space"])
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, protocol, lossy):
  """Or bits per byte would be of a text with less in it. Only where text is scored."""
  tokenizer = train_bpe(["training text " * 9], 300)
  if lossy.startswith("case"):
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  if lossy == "white space":
    tokenizer.decoder = tokenizers.decoders.Replace("Ġ", "")
  tokenizer.save(str(tmp_path / "lossy.json"))
  valid = LINE.format("kept") + "\n"
  valid = valid.lower() if lossy == "case of training" else valid
  write_splits(tmp_path, LINE.format("In CAPITALS") + "\n" + LINE, valid, valid)
  given = {"tokenizer": str(tmp_path / "lossy.json"), "protocol": protocol}
  config = make_config(tmp_path, tmp_path / "cache", **given)
  if lossy in ("", "case of training"):
    assert ours.load_corpus(config).splits["validation"].bytes > 5
    return
  with pytest.raises(ConfigError) as error:
    ours.load_corpus(config)
  became = {"case": "'this line is long en'", "white space": "'Thislineislongenough"}[lossy]
  assert str(error.value).startswith(f"config.data.tokenizer={given['tokenizer']!r}: does not give")
  assert became in str(error.value) and "use a byte-level tokenizer" in str(error.value)
  assert not list((tmp_path / "cache").glob("tokens-*")), "nothing is kept of it"


def test_large_vocabulary_is_stored_wide(tmp_path, monkeypatch):
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16)
  corpus = ours.load_corpus(make_config(write_splits(tmp_path), tmp_path / "cache"))
  assert corpus.splits["train"].examples.tokens.dtype == np.int32


def test_corpus_smaller_than_a_batch(tmp_path):
  config = make_config(write_splits(tmp_path), tmp_path / "cache")
  config.training.batch_size = 3
  message = r"training\.batch_size=3: the corpus is smaller than a batch \(2 training examples"
  with pytest.raises(ConfigError, match=message):
    ours.load_corpus(config)


def test_no_line_is_long_enough(tmp_path):
  write_splits(tmp_path, train=f"{LINE}\n{LINE}\n", valid="short\n")
  message = r"data\.protocol='lines': no line is longer than 30 characters in validation; use pack"
  with pytest.raises(ConfigError, match=message):
    ours.load_corpus(make_config(tmp_path, tmp_path / "cache", protocol="lines"))


def test_no_word_is_scored(tmp_path):
  """Of each line the second character only, a space: there is no perplexity of no word."""
  spaced = "I " + LINE + "\n"
  write_splits(tmp_path, 2 * (LINE + "\n"), spaced, spaced)
  config = make_config(tmp_path, tmp_path / "cache", protocol="lines")
  config.model.max_length = 2
  with pytest.raises(ConfigError, match=r"protocol='lines': no word in validation; use packed"):
    ours.load_corpus(config)


def test_one_token_is_enough_to_be_scored(tmp_path):
  corpus = ours.load_corpus(make_config(write_splits(tmp_path, valid="a"), tmp_path / "cache"))
  assert (corpus.splits["validation"].tokens, corpus.splits["validation"].words) == (1, 1)


def test_unigram_perplexity_by_hand(tmp_path):
  write_splits(tmp_path, train="aaab" * 4, valid="abz")
  corpus = ours.load_corpus(make_config(tmp_path, tmp_path / "cache"))
  # 12 a, 4 b, no z; 257 ids get one more each.
  total = 16 + 257
  expected = (13 / total * 5 / total * 1 / total) ** (-1 / 3)
  assert ours.unigram_perplexity(corpus) == pytest.approx(expected, rel=1e-12)


def test_default_corpus_offline(tmp_path):
  config = Config()
  config.training.steps, config.data.cache_dir = 1, str(tmp_path)
  config.data.tokenizer = "bytes"
  corpus = ours.load_corpus(config.validate())
  assert sum(split.bytes for split in corpus.splits.values()) > 12_000_000
  assert 10 < ours.unigram_perplexity(corpus) < 30
