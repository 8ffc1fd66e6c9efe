"""The text files of a run folder, and the sentence that a full disk is told in."""

import errno
import importlib.metadata
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import hgnn_moe_jax
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import records, run_folder


def test_plain_is_strict_json():
  value = {
    "nan": float("nan"),
    "inf": np.float32("inf"),
    "minus": [-np.inf, (1.5, np.int64(3))],
    "array": np.asarray([[1.0, np.nan]], np.float32),
    "jax": jnp.asarray([True, False]),
    "scalar": jnp.float32(0.5),
    "flag": np.bool_(True),
    "none": None,
    "text": "nan",
  }
  wanted = {
    "nan": "nan",
    "inf": "inf",
    "minus": ["-inf", [1.5, 3]],
    "array": [[1.0, "nan"]],
    "jax": [True, False],
    "scalar": 0.5,
    "flag": True,
    "none": None,
    "text": "nan",
  }
  assert records.plain(value) == wanted
  assert json.loads(json.dumps(records.plain(value), allow_nan=False)) == wanted
  assert type(records.plain(np.float32(0.5))) is float
  assert type(records.plain(np.bool_(True))) is bool


def test_float32_is_written_exactly():
  value = np.float32(0.1)
  assert np.float32(json.loads(json.dumps(records.plain(value)))) == value


def test_what_is_added_is_no_part_of_a_line_cut_short(tmp_path):
  """By a full disk. A continued run writes the cut line again and keeps what was added."""
  path = tmp_path / "metrics.jsonl"
  whole = b'{"kind": "train", "step": 1}\n'
  for content in (b"", whole):
    path.write_bytes(content)
    records.MetricWriter(tmp_path).close()
    assert path.read_bytes() == content
  path.write_bytes(whole + b'{"kind": "train", "st')
  writer = records.MetricWriter(tmp_path)
  writer.write("eval", 1, split="test", checkpoint="last")
  writer.close()
  added = b'{"kind": "eval", "step": 1, "split": "test", "checkpoint": "last"}\n'
  assert path.read_bytes() == whole + b'{"kind": "train", "st\n' + added
  records.MetricWriter(tmp_path, keep_bytes=len(whole)).close()
  assert path.read_bytes() == whole + added


def test_metric_writer_appends_and_cuts(tmp_path):
  writer = records.MetricWriter(tmp_path)
  writer.write("train", 1, loss=float("inf"))
  kept = writer.flush()
  writer.write("train", 2, loss=1.0)
  writer.close()
  assert kept == len('{"kind": "train", "step": 1, "loss": "inf"}\n')
  writer = records.MetricWriter(tmp_path, keep_bytes=kept)
  writer.write("event", 1, name="best")
  writer.close()
  records.MetricWriter(tmp_path, keep_bytes=10_000).close()  # never longer than it is
  assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
    '{"kind": "train", "step": 1, "loss": "inf"}',
    '{"kind": "event", "step": 1, "name": "best"}',
  ]


@pytest.mark.parametrize("cut", [3, 0])
def test_what_was_scored_beside_training_is_not_cut(tmp_path, cut):
  """An evaluation that somebody asked for between two parts of a run: nobody writes it again."""
  writer = records.MetricWriter(tmp_path)
  writer.write("train", 1, loss=2.0)
  kept = writer.flush()
  writer.write("eval", 2, split="validation", loss=1.0)
  writer.write("eval", 1, split="test", checkpoint="best", loss=3.0)
  writer.write("event", 2, name="checkpoint")
  writer.write("eval", 1, split="test", checkpoint="last", loss=4.0)
  writer.close()
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  # The last one again, but for its end: such a line is not finished, whatever it holds.
  path.write_bytes(whole + whole.splitlines()[-1][: -cut or None])
  for _ in range(2):
    writer = records.MetricWriter(tmp_path, keep_bytes=kept)
    writer.write("train", 2, loss=1.5)
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.0, 3.0, 4.0, 1.5]


def test_write_json_replaces_as_a_whole(tmp_path):
  path = tmp_path / "new" / "summary.json"
  records.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    records.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  records.write_json(path, {"a": [2.0, float("nan")]})
  assert json.loads(path.read_text()) == {"a": [2.0, "nan"]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_an_unwritable_folder_is_one_sentence(number, tmp_path):
  with (
    pytest.raises(UserError, match="cannot write") as error,
    records.run_folder_errors(tmp_path),
  ):
    raise OSError(number, os.strerror(number))
  assert str(error.value) == (
    f"--workdir={tmp_path}: cannot write ({os.strerror(number)}). Free space or choose a folder "
    "you may write to, then run the same command again: it continues from the last checkpoint."
  )


def test_other_errors_pass():
  for raised in (OSError(errno.EIO, "Input/output error"), ValueError("no code"), KeyError("k")):
    with pytest.raises(type(raised)) as error, records.run_folder_errors("w"):
      raise raised
    assert error.value is raised


def test_a_full_disk_while_writing_metrics(tmp_path):
  """/dev/full fails as a full disk does: not when written to, but when flushed."""
  os.symlink("/dev/full", tmp_path / "metrics.jsonl")
  writer = records.MetricWriter(tmp_path)
  writer.write("train", 1, loss=1.0)
  with pytest.raises(UserError, match="No space left on device"):
    writer.flush()
  with pytest.raises(UserError, match="No space left on device"):
    writer.close()


def test_a_full_disk_while_writing_the_config(tmp_path):
  os.symlink("/dev/full", tmp_path / "config.json.tmp")
  with pytest.raises(UserError, match="No space left on device"):
    records.write_json(tmp_path / "config.json", {"a": 1})
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"[]", b'{"a": 1}', b'{"config": []}', b'{"config": {"model": 3}}', b"\xff\xfe\x00"],
)
def test_a_damaged_config_is_a_user_error(content, tmp_path):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    run_folder.read_config(tmp_path)


def test_no_config_is_a_user_error(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
    with pytest.raises(UserError, match=r"no config\.json there"):
      run_folder.read_config(folder)


def test_a_checkout_that_was_never_installed_has_a_version(monkeypatch):
  known = importlib.metadata.version

  def version(name):
    if name == "hgnn_moe_jax":
      raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  assert records.environment()["versions"]["hgnn_moe_jax"] == hgnn_moe_jax.__version__
