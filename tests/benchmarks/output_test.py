"""A benchmark's JSON says when, by which code and command, and on what it was made."""

import datetime
import json
import subprocess

import pytest

from benchmarks import output


@pytest.fixture
def written(tmp_path, monkeypatch):
  """written(argv) -> the content of a result's file, as this command line would write it."""

  def write(*argv):
    monkeypatch.setattr("sys.argv", list(argv))
    # XLA would read the flags that a test sets.
    monkeypatch.setattr(output, "environment", lambda: {"device": "here"})
    output.write(str(tmp_path / "r.json"), {"measurements": [{"x": 1}]})
    return json.loads((tmp_path / "r.json").read_text())

  return write


def test_a_result_can_be_made_again(written, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=2")
  content = written("/somewhere/benchmarks/memory.py", "--sweep=model.hyperedges=[[0, 1]]")
  assert content["command"] == (
    "XLA_FLAGS='--xla_a=1 --xla_b=2' python -m benchmarks.memory "
    "'--sweep=model.hyperedges=[[0, 1]]'"
  )
  assert datetime.date.fromisoformat(content["date"]) <= datetime.datetime.now(datetime.UTC).date()
  assert content["measurements"] == [{"x": 1}]
  assert content["device"] == "here"
  monkeypatch.delenv("XLA_FLAGS")
  assert written("/somewhere/benchmarks/data.py")["command"] == "python -m benchmarks.data"


def test_the_code_is_a_commit_or_one_that_was_changed(written, monkeypatch, tmp_path):
  def git(*words):
    identity = ["-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run(["git", *identity, "-C", str(tmp_path), *words], check=True, capture_output=True)

  monkeypatch.setattr(output, "_ROOT", tmp_path)
  assert written("x.py")["code"] is None
  git("init")
  code, result = tmp_path / "benchmarks" / "a.py", tmp_path / "benchmarks" / "results" / "a.json"
  result.parent.mkdir(parents=True)
  for file in (code, result):
    file.write_text("1")
  git("add", ".")
  git("commit", "-m", "a")
  commit = written("x.py")["code"]
  assert len(commit) >= 7 and not commit.endswith("+")
  result.write_text("2")
  assert written("x.py")["code"] == commit
  code.write_text("2")
  assert written("x.py")["code"] == f"{commit}+"
