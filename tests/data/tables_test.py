"""JSON, Parquet, the hub and TensorFlow Datasets, with local files and mock data."""

import json
import sys

import pytest

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.data import tables
from hgnn_moe_jax.data.sources import SPLITS, load_documents
from hgnn_moe_jax.errors import ConfigError, UserError

ROWS = [f"row {k} says something" for k in range(60)]


def write_json(path, rows, field="text"):
  path.write_text("".join(json.dumps({field: row, "n": 1}) + "\n" for row in rows))


def write_parquet(path, rows, field="text"):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({field: rows, "n": [1] * len(rows)}), path)


WRITERS = {"json": (write_json, "jsonl"), "parquet": (write_parquet, "parquet")}


@pytest.fixture(params=WRITERS)
def kind(request):
  return request.param


def config_for(kind, path, **fields) -> DataConfig:
  return DataConfig(source=kind, path=str(path), **fields)


def test_one_file_is_divided(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"a.{suffix}", [*ROWS, " \n"])
  documents = load_documents(config_for(kind, tmp_path / f"a.{suffix}"))
  assert sorted(sum(documents.values(), ())) == sorted(ROWS)
  assert all(documents[split] for split in SPLITS)


def test_folder_of_split_files(tmp_path, kind):
  write, suffix = WRITERS[kind]
  for name, rows in {
    "train-00000": ROWS[:10],
    "train-00001": ROWS[10:20],
    "validation": ROWS[20:30],
    "test": ROWS[30:40],
    "info": ROWS[40:],
  }.items():
    write(tmp_path / f"{name}.{suffix}", rows, "content")
  documents = load_documents(config_for(kind, tmp_path, text_field="content"))
  assert documents == {
    "train": tuple(ROWS[:20]),
    "validation": tuple(ROWS[20:30]),
    "test": tuple(ROWS[30:40]),
  }


def test_folder_without_split_names_is_divided(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"a.{suffix}", ROWS[:30])
  write(tmp_path / f"b.{suffix}", ROWS[30:])
  assert sum(map(len, load_documents(config_for(kind, tmp_path)).values())) == 60


def test_missing_split_comes_out_of_train(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"train.{suffix}", ROWS[:40])
  write(tmp_path / f"test.{suffix}", ROWS[40:])
  documents = load_documents(config_for(kind, tmp_path))
  assert documents["test"] == tuple(ROWS[40:])
  assert sorted(documents["train"] + documents["validation"]) == sorted(ROWS[:40])
  assert 0 < len(documents["validation"]) < 10


def test_rows_as_lines(tmp_path):
  for split in ("train", "valid", "test"):
    write_json(tmp_path / f"{split}.jsonl", [f"{split} a", "b\n", "", "c"])
  documents = load_documents(config_for("json", tmp_path, rows="lines"))
  assert documents["validation"] == ("valid a\nb\n\nc\n",)


def test_rows_as_lines_without_splits_are_cut_like_a_file(tmp_path):
  rows = [line for k in range(30) for line in (f"document {k}", "goes on", "")]
  write_json(tmp_path / "a.jsonl", rows)
  documents = load_documents(config_for("json", tmp_path, rows="lines"))
  assert sum(map(len, documents.values())) == 30
  assert "document 7\ngoes on" in sum(documents.values(), ())


def hub_rows(text: str) -> list[str]:
  """What the hub's wikitext makes of an original file: "" for lines that are blank."""
  return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


def serve(monkeypatch, splits: dict[str, list[str]]):
  """Lets `datasets.load_dataset` return these rows instead of asking the hub."""
  import datasets

  table = datasets.DatasetDict(
    {split: datasets.Dataset.from_dict({"text": rows}) for split, rows in splits.items()}
  )
  monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext"])
def test_wikitext_rows_give_back_the_file(monkeypatch, name):
  text = " \n = Title = \n \n Some text , with a title . \n \n \n = Next = \n"
  serve(monkeypatch, dict.fromkeys(SPLITS, hub_rows(text)))
  documents = load_documents(DataConfig(source="hf", path=name, rows="lines"))
  assert documents == dict.fromkeys(SPLITS, (text,))


def test_wikitext2_validation_is_restored_byte_for_byte(monkeypatch, wikitext2):
  raw = (wikitext2 / "valid.txt").read_bytes()
  serve(monkeypatch, dict.fromkeys(SPLITS, hub_rows(raw.decode())))
  config = DataConfig(source="hf", path="Salesforce/wikitext", name="wikitext-2-v1", rows="lines")
  (text,) = load_documents(config)["validation"]
  assert text.encode() == raw


def test_empty_rows_of_other_hub_data_are_empty_lines(monkeypatch):
  serve(monkeypatch, {split: ["a", "", "b\n"] for split in SPLITS})
  assert load_documents(DataConfig(source="hf", path="other", rows="lines"))["test"] == (
    "a\n\nb\n",
  )


def test_hub_split_called_valid(monkeypatch):
  serve(monkeypatch, {"train": ["a"], "valid": ["b"], "test": ["c"], "extra": ["d"]})
  assert load_documents(DataConfig(source="hf", path="x")) == {
    "train": ("a",),
    "validation": ("b",),
    "test": ("c",),
  }


def test_hub_without_train(monkeypatch):
  serve(monkeypatch, {"test": ["a"]})
  with pytest.raises(ConfigError, match=r"no rows in a train split; it has test"):
    load_documents(DataConfig(source="hf", path="x"))


def test_hub_not_reachable(monkeypatch):
  import datasets

  def unreachable(*args, **kwargs):
    raise ConnectionError("Couldn't reach 'x' on the Hub")

  monkeypatch.setattr(datasets, "load_dataset", unreachable)
  with pytest.raises(UserError, match=r"'x/y': the Hugging Face hub is not reachable.*source=text"):
    load_documents(DataConfig(source="hf", path="x/y"))


def test_hub_offline_for_real():
  # tests/conftest.py sets HF_HUB_OFFLINE.
  with pytest.raises(UserError, match="the Hugging Face hub is not reachable"):
    load_documents(DataConfig(source="hf", path="nobody/nothing"))


def test_missing_column(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"a.{suffix}", ROWS, "body")
  with pytest.raises(ConfigError, match=r"config\.data\.text_field='text': use one of body, n"):
    load_documents(config_for(kind, tmp_path))


def test_column_of_numbers(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"a.{suffix}", ROWS)
  with pytest.raises(ConfigError, match=r"'n': row 0 of train holds int; use a column of text"):
    load_documents(config_for(kind, tmp_path, text_field="n"))


def test_row_without_text(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"n": 2}\n')
  with pytest.raises(ConfigError, match=r"row 1 of train holds NoneType"):
    load_documents(config_for("json", tmp_path))


@pytest.mark.parametrize("content", [b'{"text": "x"}\n{"n":\n', b"\0\xff\xfe", b"plain words"])
def test_broken_file(tmp_path, kind, content):
  (tmp_path / f"a.{WRITERS[kind][1]}").write_bytes(content)
  with pytest.raises(ConfigError, match=rf"not readable as {kind}") as raised:
    load_documents(config_for(kind, tmp_path))
  assert "\n" not in str(raised.value)


def test_empty_file_and_empty_folder(tmp_path, kind):
  with pytest.raises(ConfigError, match=r"no \*\.\w+.* in this folder"):
    load_documents(config_for(kind, tmp_path))
  (tmp_path / f"a.{WRITERS[kind][1]}").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"a\.\w+ is empty"):
    load_documents(config_for(kind, tmp_path))


def test_too_few_rows(tmp_path, kind):
  write, suffix = WRITERS[kind]
  write(tmp_path / f"a.{suffix}", ["one", "two"])
  with pytest.raises(ConfigError, match=r"too few documents \(2\)"):
    load_documents(config_for(kind, tmp_path))


def test_split_of_white_space(tmp_path):
  for split, rows in {"train": ROWS, "valid": [" ", ""], "test": ROWS}.items():
    write_json(tmp_path / f"{split}.jsonl", rows)
  with pytest.raises(ConfigError, match="no text in validation"):
    load_documents(config_for("json", tmp_path))


def test_join_lines():
  assert tables.join_lines(["a", "b\n", "", "\n"]) == "a\nb\n\n\n"
  assert tables.join_lines(["", "a"], empty=" \n") == " \na\n"


def test_tfds_mock_data():
  import tensorflow_datasets as tfds

  with tfds.testing.mock_data(num_examples=40):
    documents = load_documents(DataConfig(source="tfds", path="lm1b"))
  assert all(isinstance(text, str) and text for split in SPLITS for text in documents[split])
  assert "tensorflow" not in sys.modules


def test_tfds_prepared_folder(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  class TinySayings(tfds.core.GeneratorBasedBuilder):
    """Two splits; validation is missing."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
      return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._rows(ROWS[:40]), "test": self._rows(ROWS[40:])}

    def _generate_examples(self):
      raise NotImplementedError

    def _rows(self, rows):
      yield from ((k, {"text": row + " ü"}) for k, row in enumerate(rows))

  TinySayings(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  documents = load_documents(DataConfig(source="tfds", path="tiny_sayings"))
  assert sorted(documents["test"]) == sorted(row + " ü" for row in ROWS[40:])
  assert len(documents["train"] + documents["validation"]) == 40
  with pytest.raises(ConfigError, match=r"'body': use one of text"):
    load_documents(DataConfig(source="tfds", path="tiny_sayings", text_field="body"))


def test_tfds_unknown_or_not_prepared(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  with pytest.raises(ConfigError, match="unknown to tensorflow_datasets"):
    load_documents(DataConfig(source="tfds", path="no_such_data"))
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  with pytest.raises(ConfigError, match=r"not prepared in \$TFDS_DATA_DIR; run python -c"):
    load_documents(DataConfig(source="tfds", path="lm1b"))
