"""Real processes, really killed: what they leave is continued as if nothing had happened."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from hgnn_moe_jax.training import loop

_PATIENCE = 300  # seconds, on a machine that does other things, too


@pytest.fixture
def start(tiny_config, config_file, tmp_path):
  """start() -> the command line's process, training in tmp_path / "run"."""
  processes = []

  def go() -> subprocess.Popen:
    command = [sys.executable, "-m", "hgnn_moe_jax.main", config_file(tiny_config())]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes.append(
      subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
      )
    )
    return processes[-1]

  yield go
  for process in processes:
    process.kill()
    process.communicate()


def wait_for(process: subprocess.Popen, folder: pathlib.Path, pattern: str) -> None:
  """Until a file of that name appears. Fails when the process ends first."""
  deadline = time.monotonic() + _PATIENCE
  while not any(folder.glob(pattern)):
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < deadline, f"no {pattern}"
    time.sleep(0.002)


# While step 4 is being saved, so that there is no checkpoint at all; and with one, while the next
# is being written.
@pytest.mark.parametrize("moment", ["checkpoints/4.orbax*/state*", "checkpoints/6.orbax*/state*"])
def test_killed_outright(moment, start, tmp_path, tiny_config, assert_same_run):
  process, workdir = start(), tmp_path / "run"
  wait_for(process, workdir, moment)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert not (workdir / "summary.json").exists()
  loop.train(tiny_config(), workdir, quiet=True)
  assert_same_run(workdir)
  assert not list((workdir / "checkpoints").glob("*orbax*"))


def test_asked_to_stop(start, tmp_path, tiny_config, assert_same_run):
  process, workdir = start(), tmp_path / "run"
  wait_for(process, workdir, "checkpoints/4")
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=_PATIENCE)
  assert process.returncode == 75, err
  assert out == ""
  lines = err.splitlines()
  assert lines[-1].startswith("error: stopped on request at step ")
  assert lines[-1].endswith("everything is saved. Run the same command again to continue")
  assert "Traceback" not in err and "orbax" not in err.lower()
  assert any(line.startswith("step 1/12 left=") for line in lines)
  loop.train(tiny_config(), workdir, quiet=True)
  assert_same_run(workdir)
