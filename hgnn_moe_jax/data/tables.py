"""Text in tables: JSON and Parquet files, the Hugging Face hub, TensorFlow Datasets.

Imported only by the sources that need it; `datasets` and `tensorflow_datasets` are imported only
inside the loader that needs them, because each costs seconds and neither is needed offline.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import logging

from hgnn_moe_jax.config import DataConfig
from hgnn_moe_jax.data.sources import (
  SPLITS,
  Documents,
  cut_documents,
  existing_path,
  hold_out,
  split_files,
  visible_files,
)
from hgnn_moe_jax.errors import ConfigError, UserError

_SUFFIXES = {"json": (".json", ".jsonl"), "parquet": (".parquet",)}
_WIKITEXT = ("wikitext", "Salesforce/wikitext")
_ROWS_AT_ONCE = 1000


def load(config: DataConfig) -> Documents:
  """Documents of the three splits of `data.source` = json, parquet, hf or tfds.

  A split that the source lacks is held out from its training split. Rows of white space only are
  no documents.
  """
  loaders = {"json": _files, "parquet": _files, "hf": _hub, "tfds": _tfds}
  rows = loaders[config.source](config)
  if not rows.get("train"):
    raise ConfigError(
      "data.path", config.path, f"no rows in a train split; it has {', '.join(rows) or 'none'}"
    )
  missing = [split for split in ("test", "validation") if split not in rows]
  documents = {split: _documents(rows[split], config, cut=False) for split in rows}
  if missing:
    documents |= hold_out(_documents(rows["train"], config, cut=True), config, missing)
  if empty := [split for split in SPLITS if not documents[split]]:
    raise ConfigError("data.path", config.path, f"no text in {', '.join(empty)}; check the rows")
  return documents


def join_lines(rows: Iterable[str], empty: str = "\n") -> str:
  """One text of rows that are its lines.

  A row that does not end with a line end gets one; a row that is "" becomes `empty`.
  """
  return "".join(row if row.endswith("\n") else row + "\n" if row else empty for row in rows)


def _documents(rows: Sequence[str], config: DataConfig, cut: bool) -> tuple[str, ...]:
  if config.rows == "documents":
    return tuple(row for row in rows if row.strip())
  # The hub's wikitext yields "" for every line that is blank in the original files, where all of
  # these are a space and a line end. Written back, the split equals the file byte for byte.
  is_wikitext = config.source == "hf" and config.path in _WIKITEXT
  text = join_lines(rows, empty=" \n" if is_wikitext else "\n")
  # One text cannot be divided between splits unless it is cut the way a single file is.
  return cut_documents(text) if cut else (text,) if text.strip() else ()


def _files(config: DataConfig) -> dict[str, list[str]]:
  import datasets
  from datasets.exceptions import DatasetGenerationError

  kind, data_files = config.source, _data_files(config)
  try:
    # Streaming reads the files as they are now; the alternative keeps a copy in another cache.
    table = datasets.load_dataset(
      kind,
      data_files={split: [str(f) for f in files] for split, files in data_files.items()},
      streaming=True,
    )
    return {
      split: _column(table[split].iter(batch_size=_ROWS_AT_ONCE), split, config)
      for split in data_files
    }
  except (ValueError, OSError, DatasetGenerationError) as error:
    raise ConfigError(
      "data.path", config.path, f"not readable as {kind} ({_first_line(error)}); repair the files"
    ) from error


def _data_files(config: DataConfig) -> dict[str, list[pathlib.Path]]:
  """Files by split; all belong to "train" where no name tells a split."""
  path = existing_path(config)
  if path.is_file():
    files = [path]
  else:
    files = [f for f in visible_files(path) if f.suffix in _SUFFIXES[config.source]]
  if not files:
    suffixes = " or ".join(f"*{s}" for s in _SUFFIXES[config.source])
    raise ConfigError("data.path", config.path, f"no {suffixes} in this folder")
  if empty := [f for f in files if not f.stat().st_size]:
    raise ConfigError("data.path", config.path, f"{empty[0].name} is empty; remove or replace it")
  if path.is_file():
    return {"train": files}
  found = {split: of_split for split, of_split in split_files(files).items() if of_split}
  if not found:
    return {"train": files}
  named = {file for of_split in found.values() for file in of_split}
  for file in files:
    if file not in named:
      logging.warning("%s is left out: its name tells no split, as others' names do", file)
  return found


def _hub(config: DataConfig) -> dict[str, list[str]]:
  import datasets
  from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

  try:
    table = datasets.load_dataset(config.path, config.name or None)
  except DatasetNotFoundError as error:
    raise ConfigError("data.path", config.path, f"{_first_line(error)}; check the name") from error
  except ConnectionError as error:
    raise UserError(
      f"config.data.path={config.path!r}: the Hugging Face hub is not reachable and no copy is in "
      "its cache; download the data set elsewhere and use data.source=text, json or parquet, or "
      "set HF_HOME to a cache that holds it and HF_HUB_OFFLINE=1"
    ) from error
  except (ValueError, OSError, DatasetGenerationError) as error:
    raise ConfigError(
      "data.name", config.name, f"{config.path} cannot be loaded: {_first_line(error)}"
    ) from error
  found = {}
  for split, names in {**{s: (s,) for s in SPLITS}, "validation": ("validation", "valid")}.items():
    for name in names:
      if name in table:
        found[split] = _column(table[name].iter(batch_size=_ROWS_AT_ONCE), split, config)
  return found


def _column(batches: Iterable[Any], split: str, config: DataConfig) -> list[str]:
  """The text column of a table read in batches. Raises ConfigError if it is not one of text."""
  rows: list[str] = []
  for batch in batches:
    if config.text_field not in batch:
      columns = ", ".join(batch)
      raise ConfigError("data.text_field", config.text_field, f"use one of {columns}")
    rows += _strings(batch[config.text_field], len(rows), split, config)
  return rows


def _strings(values: list[Any], first: int, split: str, config: DataConfig) -> Iterator[str]:
  for row, value in enumerate(values, start=first):
    if not isinstance(value, str):
      raise ConfigError(
        "data.text_field",
        config.text_field,
        f"row {row} of {split} holds {type(value).__name__}; use a column of text",
      )
    yield value


def _tfds(config: DataConfig) -> dict[str, list[str]]:
  import tensorflow_datasets as tfds

  found = {}
  for split in SPLITS:
    try:
      source = tfds.data_source(config.path, split=split, download=False)
    except tfds.core.DatasetNotFoundError:
      raise ConfigError(
        "data.path", config.path, "unknown to tensorflow_datasets; check the name"
      ) from None
    except (NotImplementedError, AssertionError, KeyError, OSError) as error:
      raise ConfigError(
        "data.path",
        config.path,
        'not prepared in $TFDS_DATA_DIR; run python -c "import tensorflow_datasets as t; '
        f"t.builder('{config.path}', file_format='array_record').download_and_prepare()\"",
      ) from error
    except ValueError:
      continue  # The data set has no split of this name.
    found[split] = _tfds_column(source, split, config)
  return found


def _tfds_column(source: Any, split: str, config: DataConfig) -> list[str]:
  rows: list[str] = []
  for index in range(len(source)):
    row = source[index]
    if config.text_field not in row:
      raise ConfigError("data.text_field", config.text_field, f"use one of {', '.join(row)}")
    value = row[config.text_field]
    if isinstance(value, bytes):
      try:
        value = value.decode()
      except UnicodeDecodeError as error:
        raise ConfigError(
          "data.text_field", config.text_field, f"row {index} of {split} is not UTF-8 ({error})"
        ) from None
    rows += _strings([value], index, split, config)
  return rows


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)
