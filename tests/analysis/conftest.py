"""Run folders to read: made up, line by line, or trained in seconds."""

import json

import pytest


@pytest.fixture
def write_run(tmp_path, tiny_config):
  """write_run(name, train, ..., **changes) -> folder of a run with these records.

  train: records without "kind" and "step", the first of step 1. last: of summary.json, None for a
  run that is not finished.
  """

  def write(folder, train, events=(), last=None, fingerprint="text", **changes):
    path = tmp_path / folder
    path.mkdir()
    content = {
      "config": tiny_config(**changes).to_dict(),
      "total_steps": 100,
      "data": {"fingerprint": fingerprint},
      "chance": {"weight_specialization": 0.99, "output_specialization": 0.8},
    }
    (path / "config.json").write_text(json.dumps(content))
    records = [{"kind": "train", "step": n, **record} for n, record in enumerate(train, 1)]
    records += [{"kind": "event", **event} for event in events]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if last is not None:
      summary = {"steps": len(train), "last": last}
      (path / "summary.json").write_text(json.dumps(summary))
    return path

  return write
