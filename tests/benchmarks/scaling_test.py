"""The plan for many devices of a small model, in a process that has 256 virtual ones."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import scaling
from benchmarks.collectives import Collective


def test_the_command(tmp_path):
  out = tmp_path / "scaling.json"
  command = [sys.executable, "-m", "benchmarks.scaling", "--shape=tiny", "--devices=8"]
  # A program that comes out of this cache would not be partitioned, and have no account.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  done = subprocess.run(
    [*command, f"--out={out}"], capture_output=True, text=True, env={**os.environ, **cache}
  )
  assert done.returncode == 0, done.stderr
  assert list(tmp_path.iterdir()) == [out]
  assert "| tiny | 0.00 B | 8 | 2 x 2 x 2 | 64 |" in done.stdout
  (cell,) = json.loads(out.read_text())["measurements"]
  # Data parallel sums gradients, experts send their updates, FSDP gathers parameters.
  assert {"all-reduce", "all-gather"} <= cell["sent_bytes"].keys()
  assert all(count > 0 for count in cell["sent_bytes"].values())
  # Three copies of the parameters (two moments), which FSDP, experts and heads divide by 8 nearly.
  whole = 3 * 4 * cell["parameters"]
  assert whole / 8 < cell["state_bytes"] < whole / 4
  for low, high in cell["predicted_seconds"].values():
    assert 0 < low <= high


def test_times_by_hand():
  device = scaling.Device(flops=1e12, node=8, link=1e9, network=1e8)
  inside = Collective("collective-permute", devices=8, span=8, bytes=10**9, times=1)  # 1 s
  across = Collective("collective-permute", devices=2, span=9, bytes=10**8, times=3)  # 3 s
  cell = {"collectives": [inside, across]}
  # 9e12 operations on two devices at 45 % of 1e12: 10 s.
  assert scaling.predicted(cell, 9 * 10**12, 2, device) == pytest.approx((10.0, 14.0))
  assert scaling.predicted(cell, 9 * 10**11, 2, device) == pytest.approx((4.0, 5.0))


def test_unknown_names_are_told(command):
  for flag, cure in (("--shape=huge", "large,10b"), ("--devices=7", "8,64,256")):
    done = command(scaling.main, flag)
    assert done.status == 2 and done.err.startswith(f"error: {flag}: use some of")
    assert cure in done.err
