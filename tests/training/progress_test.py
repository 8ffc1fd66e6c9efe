"""What is shown on a terminal, in a log and elsewhere."""

import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import progress, report

FIELDS = {
  "loss": 5.4321,
  "lm_loss": 5.39,  # The rest of the loss is not orthogonality alone.
  "weight_strength": np.asarray([0.1, 0.05], np.float32),
  "output_strength": np.asarray([0.0, 0.2], np.float32),
  "weight_penalty": np.asarray([0.121, 0.2], np.float32),
  "output_penalty": np.asarray([0.9, 0.05], np.float32),
  "specialization_mean": 0.9637,
  "emergency": np.asarray([False, True]),
  "grad_norm": 1.234,
  "tokens_per_second": 12345.6,
  "learning_rate": 4.5e-4,
}


def test_describe_golden():
  assert progress.describe(FIELDS) == (
    "total=5.432 lm=5.390 orth=0.0321 adapt=[0.1,0.25] spec=0.964 emergency=True grad=1.23 "
    "tok/s=12346 lr=4.50e-04"
  )
  calm = FIELDS | {"emergency": np.zeros(2, bool)}
  assert "emergency=False" in progress.describe(calm)


def test_lines_come_every_ten_seconds_and_at_the_end(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(progress.time, "monotonic", lambda: now)
  lines = progress.make_display(100, 20, quiet=False)
  assert isinstance(lines, progress.Lines)
  for step, now in ((21, 102.0), (22, 104.0), (25, 112.0), (26, 113.0), (100, 114.0)):  # noqa: B007
    lines.train(step, FIELDS)
  lines.message("hello")
  lines.close()
  out, err = capsys.readouterr()
  assert out == ""
  shown = err.splitlines()
  assert [line.split(" left")[0] for line in shown] == [
    *("step 21/100", "step 25/100", "step 100/100", "hello"),
  ]
  # Nothing is known of the pace before the first line. Then 4 steps took 10 s and 75 are left.
  assert "left=? total=5.432" in shown[0]
  assert "left=00:03:07 total=5.432" in shown[1]
  assert "left=00:00:00" in shown[2]


def test_more_than_a_day_is_left(monkeypatch, capsys):
  now = 0.0
  monkeypatch.setattr(progress.time, "monotonic", lambda: now)
  lines = progress.Lines(100_000, 0)
  for step, now in ((1, 1.0), (2, 11.0)):  # noqa: B007
    lines.train(step, FIELDS)
  # 99,998 steps of 10 s.
  assert "left=277:46:20 total=5.432" in capsys.readouterr().err


def test_quiet_shows_nothing(capsys):
  silent = progress.make_display(10, 0, quiet=True)
  silent.train(10, FIELDS)
  silent.message("hello")
  silent.close()
  assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "200")
  bar = progress.make_display(10, 0, quiet=False)
  assert isinstance(bar, progress.Bar)
  bar.train(10, FIELDS)
  bar.message("[bold] brackets are no markup")
  bar.close()
  out, err = capsys.readouterr()
  assert out == ""
  assert "total=5.432" in err and "10/10" in err and "[bold] brackets are no markup" in err
  assert "adapt=[0.1,0.25]" in err


def test_tensorboard_gets_every_number(tiny_config, tmp_path):
  tracker = progress.Tracker(tiny_config(**{"training.tensorboard": True}), tmp_path)
  written = {}
  tracker._board.add_scalar = lambda name, value, step: written.update({name: (value, step)})
  tracker.log("train", 7, FIELDS | {"gate_load": np.ones((2, 3)), "split": "validation"})
  tracker.close()
  assert written["train/loss"] == (5.4321, 7)
  assert written["train/output_strength/layer_1"] == (pytest.approx(0.2), 7)
  assert written["train/emergency/layer_1"] == (1.0, 7)
  assert len(written) == 6 + 5 * 2  # scalars, and two layers of three arrays
  assert any(f.name.startswith("events.out") for f in (tmp_path / "tensorboard").iterdir())


def test_tensorboard_shows_no_step_twice(tiny_config, tmp_path):
  """A run that goes on from step 4 after it was killed at 6: what was sent of 5 and 6 is hidden."""
  config = tiny_config(**{"training.tensorboard": True})
  for first, steps in ((0, range(1, 7)), (4, range(5, 9))):
    tracker = progress.Tracker(config, tmp_path, step=first)
    for step in steps:
      tracker.log("train", step, {"loss": 1.0})
    tracker.close()
  starts = []
  for file in (tmp_path / "tensorboard").iterdir():
    data, at = file.read_bytes(), 0
    while at < len(data):  # length, its checksum, a record, its checksum
      size = int.from_bytes(data[at : at + 8], "little")
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += size + 16
      if event.session_log.status == event_pb2.SessionLog.START:
        starts.append(event.step)
  assert starts == [5]


def test_wandb_goes_on_under_the_same_id(tiny_config, tmp_path, monkeypatch):
  given = []
  fake = types.SimpleNamespace(init=lambda **settings: given.append(settings))
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = tiny_config(**{"training.wandb_project": "p"})
  for folder in ("one", "one", "two"):
    (tmp_path / folder).mkdir(exist_ok=True)
    progress.Tracker(config, tmp_path / folder)
  first, again, other = (settings["id"] for settings in given)
  assert first == again != other and len(first) == 32
  assert all(settings["resume"] == "allow" for settings in given)
  assert given[0]["project"] == "p" and given[0]["config"] == config.to_dict()


@pytest.mark.parametrize(
  ("module", "changes", "message"),
  [
    (
      "wandb",
      {"training.wandb_project": "p"},
      r"wandb_project='p': pip install 'hgnn_moe_jax\[wandb",
    ),
    ("tensorboardX", {"training.tensorboard": True}, r"True: pip install 'hgnn_moe_jax\[tensorb"),
  ],
)
def test_a_missing_tracker_says_what_to_install(
  module, changes, message, tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=message):
    progress.Tracker(tiny_config(**changes), tmp_path)


SCORE = {
  "step": 6,
  "split": "validation",
  "tokens": 12345,
  "token_perplexity": 64.40918,
  "word_perplexity": 3725835318.7,
  "bits_per_byte": 6.18363,
}


def test_evaluation_report_golden():
  assert report.evaluation(SCORE) == (
    "validation, step 6, 12,345 tokens\n"
    "  token perplexity 64.4092\n"
    "  word perplexity  3.72584e+09\n"
    "  bits per byte    6.1836"
  )
  assert "word perplexity  inf" in report.evaluation(SCORE | {"word_perplexity": float("inf")})


def test_summary_report_names_the_next_commands(tmp_path):
  text = report.summary(
    {
      **{"config_name": "tiny", "parameters": 23028, "steps": 12, "tokens_seen": 1522},
      **{"train_seconds": 3.2, "compile_seconds": 39.5, "tokens_per_second": 2393.1},
      **{"unigram_perplexity": 128.81836, "best": SCORE},
    },
    tmp_path,
  )
  assert text.startswith(
    "tiny: 23,028 parameters, 12 steps, 1,522 tokens in 3 s (2,393 tokens/s) after 40 s of "
  )
  assert "token perplexity 128.818: 2.0 times this" in text
  assert f"--mode=evaluate --workdir={tmp_path} --split=test" in text
