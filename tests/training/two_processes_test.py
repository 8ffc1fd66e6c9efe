"""Two processes on loopback train one run, are stopped, lose one of them, and end bit-equal."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import loop, processes

_LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"
_PATIENCE = 240  # seconds, on a machine that does other things, too


@pytest.fixture(scope="module")
def config(tiny_config):
  """Small: all that it is compiled for, over and over, is to be stopped and continued."""
  return tiny_config(
    **{
      "model.num_layers": 1,
      "model.coupler": "mean",
      "training.steps": 40,
      "training.checkpoint_every": 10,
      "evaluation.every": 20,
    }
  )


@pytest.fixture(scope="module")
def config_flag(config, tmp_path_factory):
  file = tmp_path_factory.mktemp("config") / "config.py"
  file.write_text(
    "from hgnn_moe_jax.config import Config\n\n\n"
    f"def get_config():\n  return Config.from_dict({config.to_dict()!r})\n"
  )
  return f"--config={file}"


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def environment():
  return {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}


@pytest.fixture(scope="module")
def pair(config_flag):
  """pair(workdir) -> the two processes of a run on two devices, started."""
  started = []

  def go(workdir):
    port = free_port()
    both = [
      subprocess.Popen(
        [
          *(sys.executable, "-m", "hgnn_moe_jax.main", config_flag, f"--workdir={workdir}"),
          *("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"),
          f"--process_id={index}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
      )
      for index in range(2)
    ]
    started.extend(both)
    return both

  yield go
  for process in started:
    process.kill()
    process.communicate()


def outcome(both):
  """[(status, stdout, stderr)] of both, once they have ended."""
  return [(*p.communicate(timeout=_PATIENCE), p.returncode) for p in both]


def wait_for(both, folder, pattern):
  deadline = time.monotonic() + _PATIENCE
  while not any(folder.glob(pattern)):
    assert all(p.poll() is None for p in both), [p.communicate()[1] for p in both]
    assert time.monotonic() < deadline, f"no {pattern}"
    time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
  """The folder of a run of two processes that nothing happened to."""
  folder = tmp_path_factory.mktemp("two") / "whole"
  (out, err, status), (other_out, other_err, other_status) = outcome(pair(folder))
  assert (status, other_status) == (0, 0), (err, other_err)
  # One of them speaks; a line of each is from the transport.
  assert [line for line in (other_out + other_err).splitlines() if "[Gloo]" not in line] == []
  assert "\ntiny: " in out and "step 40/40" in err
  return folder


def test_asked_to_stop_then_bereaved_then_finished(
  whole, pair, config_flag, tmp_path, read_metrics
):
  folder = tmp_path / "run"
  both = pair(folder)
  wait_for(both, folder, "checkpoints/10")
  both[1].send_signal(signal.SIGTERM)  # Only one is asked; both stop, after the same step.
  said = set()
  for _, err, status in outcome(both):
    assert status == 75, err
    said.add(err.splitlines()[-1])
  (message,) = said
  assert message.startswith("error: stopped on request at step ")
  assert not (folder / "summary.json").exists()

  both = pair(folder)
  wait_for(both, folder, "checkpoints/30")
  both[1].kill()
  both[1].wait()
  time.sleep(0.5)
  assert both[0].poll() is None  # It waits for the other; launchers end it.
  both[0].kill()
  both[0].wait()

  launched = subprocess.run(
    [_LAUNCHER, config_flag, f"--workdir={folder}"],
    env={**environment(), "PROCESSES": "2", "PORT": str(free_port()), "PYTHON": sys.executable},
    capture_output=True,
    text=True,
    timeout=_PATIENCE,
  )
  assert launched.returncode == 0, launched.stderr
  assert read_metrics(folder) == read_metrics(whole)


def test_one_process_goes_on_where_two_were(
  whole, config, rewound, tmp_path, read_metrics, assert_same_curve
):
  copy = rewound(whole, tmp_path / "alone", 40)
  loop.train(config, copy, quiet=True)
  assert_same_curve(read_metrics(copy), read_metrics(whole))


def test_processes_that_do_not_find_each_other():
  """Nothing says who they are: a line and a status, not a traceback."""
  with pytest.raises(UserError, match=r"--distributed: .*; give --coordinator=HOST:PORT, --num_pr"):
    processes.start(None, None, None)
