"""Reading run folders: whole, broken, and of other versions."""

import json
import math

import numpy as np
import pytest

from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError

TRAIN = [{"loss": 3.0, "score": [0.1, 0.2]}, {"loss": "nan", "score": [0.3, "inf"]}]
LAST = {"token_perplexity": 2.0, "word_perplexity": "inf"}


def test_a_run_becomes_arrays(write_run):
  events = [{"step": 1, "name": "emergency_on", "layer": 1}, {"step": 2, "name": "checkpoint"}]
  run = read_run(write_run("run", TRAIN, events, LAST, evaluations=[(2, 1.0)], seed=7))
  assert run.config.seed == 7 and run.unknown == {}
  assert run.summary["steps"] == 2 and run.summary["last"]["word_perplexity"] == math.inf
  assert run.chance == {"weight_specialization": 0.99, "output_specialization": 0.8}
  np.testing.assert_array_equal(run.train["step"], [1, 2])
  assert run.train["loss"][0] == 3.0 and math.isnan(run.train["loss"][1])
  np.testing.assert_array_equal(run.train["score"], [[0.1, 0.2], [0.3, np.inf]])
  assert [e["step"] for e in run.events_of("emergency_on")] == [1]
  assert run.events_of("plateau") == []
  assert [e["token_perplexity"] for e in run.evaluations] == [math.e]
  assert run.oddities() == [] and run.lacks("loss", "score") == ""


def test_only_evaluations_of_training_count(write_run, rewrite):
  """Those that --mode=evaluate appends have a stride."""
  folder = write_run("run", TRAIN, evaluations=[(1, 1.5), (2, 1.0), (3, 0.5)])
  more = {2: {"stride": 8}, 3: {"split": "test", "stride": 0}}
  rewrite(folder, lambda r: {**r, **more.get(r["step"], {})} if r["kind"] == "eval" else r)
  run = read_run(folder)
  assert [e["loss"] for e in run.evaluations] == [1.5] and run.summary is None


def test_a_last_line_cut_short_is_left_out(write_run):
  folder = write_run("run", TRAIN)
  content = (folder / "metrics.jsonl").read_text()
  for cut in (1, 10, len(content) // 2 - 3):
    (folder / "metrics.jsonl").write_text(content[: -1 - cut])
    assert len(read_run(folder).train["step"]) == 1


def test_an_evaluation_may_stand_behind_a_line_cut_short(write_run):
  folder = write_run("run", TRAIN)
  path = folder / "metrics.jsonl"
  first = path.read_text().splitlines()[0]
  scored = {"kind": "eval", "step": 1, "split": "test", "checkpoint": "last", "loss": 1.0}
  scored |= {f"{name}_perplexity": 2.0 for name in ("token", "word")} | {"bits_per_byte": 1.0}
  added = json.dumps(scored)
  path.write_text(f'{first}\n{{"kind": "train", "st\n{added}\n{added}\n')
  assert read_run(folder).train["step"].tolist() == [1]
  path.write_text(f'{first}\n{{"kind": "train", "st\n{added}\n{first}\n')
  with pytest.raises(UserError, match="line 2 is damaged"):
    read_run(folder)


def test_fields_of_another_version(write_run, rewrite):
  """Unknown config fields are passed over and told; train fields that only some have are gone."""
  folder = write_run("run", [{"loss": 3.0, "pairs": None, "old": 1.0}, {"loss": 2.0, "pairs": 0.0}])
  content = json.loads((folder / "config.json").read_text())
  content["config"]["model"]["flux"] = 3
  content["config"]["adapters"] = {"rank": 4}
  del content["config"]["model"]["pooling"], content["chance"]["weight_specialization"]
  (folder / "config.json").write_text(json.dumps(content))
  run = read_run(folder)
  assert run.unknown == {"model.flux": 3, "adapters": {"rank": 4}}
  assert run.config.model.embed_dim == 16 and run.config.model.pooling == "mean"
  assert set(run.train) == {"step", "loss"}
  assert run.lacks("loss", "pairs", "old").startswith("no pairs, old in some or all train records")
  first, second, third = run.oddities()
  assert first == "model.flux=3 of config.json is unknown to this version and was passed over"
  assert second.startswith("adapters={'rank': 4} of config.json is unknown")
  assert third.startswith("config.json holds no chance level of weight_specialization")


def garble(line: str):
  """Another second line in metrics.jsonl."""

  def change(folder):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[1] = line.encode("latin-1")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")

  return change


def write(name: str, content: str):
  return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda f: f.rename(f.parent / "elsewhere"), "no such folder; give that of a run"),
    (lambda f: [path.unlink() for path in f.iterdir()], "no config.json there; give the folder of"),
    (lambda f: (f / "config.json").unlink(), "no config.json there"),
    (write("config.json", "{"), "config.json is damaged .*; restore it"),
    (write("config.json", "[]"), "config.json is damaged"),
    (write("config.json", '{"config": {"model": 3}}'), "config.json is damaged"),
    (lambda f: (f / "metrics.jsonl").unlink(), "no metrics.jsonl there; let the run start"),
    (lambda f: [(f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()], "cannot be read"),
    (write("metrics.jsonl", ""), "no training step is logged there yet; let the run go on"),
    (garble('{"kind": "train", "st'), "line 2 is damaged; restore the file"),
    (garble(""), "line 2 is damaged"),
    (garble("\xff\xfe\x00"), "line 2 is damaged"),
    (garble("{}"), "line 2 is damaged"),
    (garble("5"), "line 2 is damaged"),
    (garble("[1]"), "line 2 is damaged"),
    (garble('{"kind": [1]}'), "line 2 is damaged"),
    (garble('{"kind": "train", "step": null}'), "line 2 is damaged"),
    (garble('{"kind": "event", "step": 2}'), "line 2 is damaged"),
    (garble('{"kind": "eval", "step": 2, "split": "validation"}'), "line 2 is damaged"),
    (garble('{"kind": "train", "step": 2, "loss": [1.0, 2.0]}'), "loss of the train records is"),
    (garble('{"kind": "train", "step": 2, "loss": "low"}'), "loss of the train records is damaged"),
    (garble('{"kind": "train", "step": "two"}'), "step of the train records is damaged"),
    (write("summary.json", '{"steps": 3'), "summary.json: is damaged or .*; delete it and give"),
    (write("summary.json", "{}"), "summary.json: is damaged"),
    (write("summary.json", "[]"), "summary.json: is damaged"),
    (write("summary.json", '{"steps": 3, "train_seconds": 1, "last": {"loss": 1}}'), "is damaged"),
    (write("summary.json", '{"steps": 3, "train_seconds": 1.0, "last": null}'), "summary.json: is"),
  ],
)
def test_what_cannot_be_read_is_said(write_run, damage, message):
  folder = write_run("run", [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}], (), LAST)
  damage(folder)
  with pytest.raises(UserError, match=message) as error:
    read_run(folder)
  assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_no_run(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="no such folder"):
    read_run(tmp_path / "run")
