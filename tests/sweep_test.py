"""Grids, their commands, and a sweep that is stopped and continued."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from hgnn_moe_jax import sweep
from hgnn_moe_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def test_a_grid_is_a_product_with_the_types_of_the_fields(tiny_config):
  grid = ["training.batch_size=4,8", "training.learning_rate=1e-3", "model.tie_embeddings=True"]
  first, second = sweep.parse_grid(grid, tiny_config())
  assert first.values == {
    "training.batch_size": 4,
    "training.learning_rate": 0.001,
    "model.tie_embeddings": True,
  }
  assert first.name == "batch_size=4,learning_rate=0.001,tie_embeddings=True"
  assert second.values["training.batch_size"] == 8


def test_commas_in_brackets_belong_to_the_value(tiny_config):
  config = tiny_config(**{"model.coupler": "hypergraph"})
  grid = ["model.hyperedges=pairs,[[0,1],[0,1,2]]"]
  pairs, listed = sweep.parse_grid(grid, config)
  assert pairs.values == {"model.hyperedges": "pairs"}
  assert listed.values == {"model.hyperedges": "[[0,1],[0,1,2]]"}
  assert "[" not in listed.name


def test_without_a_grid_there_is_the_config(tiny_config):
  assert sweep.parse_grid([], tiny_config()) == [sweep.Cell("tiny", {})]


@pytest.mark.parametrize(
  ("grid", "message"),
  [
    (["training.batch_size"], "give a field and its values"),
    (["training.batch_size="], "give a field and its values"),
    (["training.batch=4"], "no field training.batch; they are in"),
    (["training=4"], "no field training;"),
    (["model.num_heads=two"], "'two' is not of type int"),
    (["model.tie_embeddings=yes"], "'yes' is not of type bool"),
    (["model.num_heads=2,3"], "num_heads=3 cannot be trained: .*use a divisor"),
    (["training.batch_size=4,4"], "a combination comes twice"),
  ],
)
def test_grids_that_cannot_be(tiny_config, grid, message):
  with pytest.raises(UserError, match=message) as error:
    sweep.parse_grid(grid, tiny_config())
  assert str(error.value).startswith("--grid")


@pytest.mark.parametrize(
  ("field", "changes"),
  [
    ("seed=1,2", {}),
    ("name=a", {}),
    ("model.num_layers=1,2", {}),
    ("evaluation.stride=0,4", {}),
    ("data.tokenizer=bytes,bpe", {}),
    ("training.batch_size=4,8", {"training.epochs": 1.0, "training.steps": 0}),
    ("model.max_length=8,16", {"data.protocol": "lines"}),
  ],
)
def test_runs_that_could_not_be_compared_are_not_trained(tiny_config, field, changes):
  """Told before the first of them; one value of a field is no difference, but for the seed."""
  config = tiny_config(**changes)
  with pytest.raises(UserError, match=rf"--grid={field}: (not a field|runs that differ in)"):
    sweep.require_comparable(["training.learning_rate=1e-3", field], config)
  if field.startswith(("seed", "name")):
    return
  sweep.require_comparable([field.split(",")[0]], config)
  if changes:  # Without them the field is one like others.
    sweep.require_comparable([field], tiny_config())


def test_an_array_job_runs_every_command_as_written(tmp_path):
  """bash with an srun that runs what it is given: the words arrive whole."""
  words = [["-c", f"import sys; open({str(tmp_path / name)!r}, 'w').write(sys.argv[1])", "a 'b' $c"]
           for name in ("one", "two")]  # fmt: skip
  script = tmp_path / "job.sh"
  script.write_text(sweep.slurm_script(words, "tiny"))
  assert "#SBATCH --array=0-1\n" in script.read_text()
  binaries = tmp_path / "bin"
  binaries.mkdir()
  (binaries / "srun").write_text('#!/bin/sh\nexec "$@"\n')
  (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  for tool in binaries.iterdir():
    tool.chmod(0o755)
  environment = {"PATH": f"{binaries}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1"}
  assert subprocess.run(["bash", script], env=environment).returncode == 0
  assert (tmp_path / "two").read_text() == "a 'b' $c" and not (tmp_path / "one").exists()


def test_a_preempted_task_is_queued_again(tmp_path):
  script = tmp_path / "job.sh"
  script.write_text(sweep.slurm_script([["-m", "hgnn_moe_jax.main"]], "tiny"))
  for name, body in {"srun": "exit 75", "scontrol": f'echo "$@" > {tmp_path}/asked'}.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / name).chmod(0o755)
  ids = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **ids}
  assert subprocess.run(["bash", script], env=environment).returncode == 75
  assert (tmp_path / "asked").read_text() == "requeue 7_0\n"


@pytest.fixture
def words(tiny_config, config_file, tmp_path):
  """The command line of a sweep over two strengths of a tiny run; two words for the config."""
  quick = {"training.steps": 4, "model.num_layers": 1, "model.coupler": "mean"}
  flag = config_file(tiny_config(**quick))
  grid = "--grid=orthogonality.output_strength=0.0,0.2"
  return [*flag.split("=", 1), grid, f"--workdir={tmp_path}/sweep"]


@pytest.fixture
def run_sweep(words, command):
  """run_sweep(*words) -> Outcome of this command line with these words behind it."""
  return lambda *more: command(sweep.main, *words, *more)


def test_a_sweep_continues_and_ends_with_the_comparison(run_sweep, tmp_path):
  folders = [tmp_path / "sweep" / f"output_strength={s}-0" for s in (0.0, 0.2)]
  first = run_sweep()
  assert first.status == 0, first.err
  assert all((folder / "summary.json").exists() for folder in folders)
  assert "| output_strength=0.0 | 1 |" in first.out and "1 pairs" in first.out
  assert (tmp_path / "sweep" / "comparison" / "comparison.csv").exists()
  config = json.loads((folders[1] / "config.json").read_text())["config"]
  assert config["orthogonality"]["output_strength"] == 0.2 and config["seed"] == 0

  # What has ended under another config is refused: else the table would be the old settings'.
  table = tmp_path / "sweep" / "comparison" / "comparison.md"
  before = table.read_bytes()
  other = run_sweep("--config.training.learning_rate=0.5", "--config.training.log_every=2")
  assert other.status == 2 and table.read_bytes() == before
  assert re.search(
    r"--workdir=.*output_strength=0.0-0 belongs to another run: training.learning_rate: 0.01 -> "
    r"0.5\. Use the old values",
    other.err,
  )

  # As if it had been stopped before the second run's end.
  before = (folders[0] / "metrics.jsonl").read_bytes()
  (folders[1] / "summary.json").unlink()
  second = run_sweep()
  assert f"1/2 {folders[0]}: finished before" in second.out
  assert f"2/2 {folders[1]}: validation token perplexity" in second.out
  assert (folders[0] / "metrics.jsonl").read_bytes() == before
  assert second.out.splitlines()[-4:] == first.out.splitlines()[-4:]


def test_what_diverges_is_a_result(run_sweep, tmp_path, monkeypatch):
  """The others are trained and compared; a perplexity may be infinite."""
  statuses, compared = iter([3, 0]), []

  def end(words, stop):
    folder = pathlib.Path(next(w for w in words if w.startswith("--workdir=")).partition("=")[2])
    folder.mkdir(parents=True)
    if (status := next(statuses)) == 0:
      (folder / "summary.json").write_text('{"last": {"token_perplexity": "inf"}}')
    return status

  def compare(jobs, folder, baseline):
    compared.append(([job.folder.name for job in jobs], folder, baseline))

  monkeypatch.setattr(sweep, "_run_process", end)
  monkeypatch.setattr(sweep, "_compare", compare)
  done, folder = run_sweep(), tmp_path / "sweep"
  assert done.status == 3
  assert done.err == f"diverged, and left out: {folder}/output_strength=0.0-0\n"
  assert done.out.endswith("output_strength=0.2-0: validation token perplexity inf\n")
  assert compared == [(["output_strength=0.2-0"], folder, "output_strength=0.2")]


def test_a_diverged_run_is_not_trained_again_and_its_combination_stays_the_baseline(
  run_sweep, tmp_path, monkeypatch, tiny_config
):
  """Of two seeds one has diverged; the other one is the first combination's."""
  monkeypatch.setattr(sweep, "_run_process", lambda words, stop: pytest.fail("trained again"))
  monkeypatch.setattr(sweep, "_compare", lambda *given: compared.append(given))
  monkeypatch.setattr(sweep.run_folder, "require_same", lambda *given: None)
  compared, folder = [], tmp_path / "sweep"
  for name in ("0.0-0", "0.2-0", "0.0-1", "0.2-1"):
    run = folder / f"output_strength={name}"
    run.mkdir(parents=True)
    if name == "0.0-0":
      (run / "metrics.jsonl").write_text('{"kind": "event", "step": 3, "name": "non_finite"}\n')
    else:
      (run / "summary.json").write_text("{}")
  done = run_sweep("--seeds=2")
  assert done.status == 3 and f"{folder}/output_strength=0.0-0: diverged before" in done.out
  ((jobs, _, baseline),) = compared
  assert len(jobs) == 3 and baseline == "output_strength=0.0"
  (folder / "output_strength=0.0-1" / "summary.json").unlink()
  last = '{"kind": "event", "step": 3, "name": "non_finite"}\n'
  (folder / "output_strength=0.0-1" / "metrics.jsonl").write_text(last)
  done = run_sweep("--seeds=2", "--baseline=output_strength=0.0")
  assert compared[1][2] == "output_strength=0.2"
  assert (
    "--baseline=output_strength=0.0 has diverged: compared with output_strength=0.2" in done.err
  )


def test_what_diverged_under_another_config_is_refused_before_any_run(
  run_sweep, tmp_path, monkeypatch, tiny_config
):
  monkeypatch.setattr(sweep, "_run_process", lambda words, stop: pytest.fail("trained"))
  last = tmp_path / "sweep" / "output_strength=0.2-0"
  last.mkdir(parents=True)
  other = tiny_config(**{"training.learning_rate": 1e5}).to_dict()
  (last / "config.json").write_text(json.dumps({"config": other}))
  (last / "metrics.jsonl").write_text('{"kind": "event", "step": 3, "name": "non_finite"}\n')
  done = run_sweep()
  assert done.status == 2 and f"--workdir={last} belongs to another run: " in done.err


def test_overrides_arrive_however_they_are_written(run_sweep, tmp_path):
  """One dash, a switch without value, one that is switched off, a value in a word of its own."""
  seen = run_sweep(
    "-config.training.learning_rate=0.5",
    "--config.training.remat",
    "--noconfig.adaptive.emergency_boost",
    *("--config.training.batch_size", "4"),
    *("--config.name=mine", "--config.seed=5", "--dry_run"),
  )
  first = shlex.split(seen.out.splitlines()[0])
  given = [word for word in first if word.startswith("--config.")]
  assert given == [
    *("--config.training.learning_rate=0.5", "--config.training.remat=True"),
    *("--config.adaptive.emergency_boost=False", "--config.training.batch_size=4"),
    *("--config.orthogonality.output_strength=0.0", "--config.name=output_strength=0.0"),
    "--config.seed=0",
  ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_handed_on_and_waited_for(tmp_path, number):
  """The run gets one SIGTERM, whatever came; it ends in its own time and says how."""
  told = tmp_path / "told"
  child = f"""
import os, pathlib, signal, sys, time
parent, told = os.getppid(), pathlib.Path({str(told)!r})
def ask(number, frame):
  time.sleep(0.5)  # it saves
  told.write_text(told.read_text() + f"{{signal.Signals(number).name}} ")
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, ask)
told.write_text("ready ")
while "SIG" not in told.read_text() and os.getppid() == parent:  # Not for ever, whatever fails.
  time.sleep(0.01)
time.sleep(0.2)
sys.exit(75)
"""
  parent = f"""
import sys
from hgnn_moe_jax import sweep
from hgnn_moe_jax.training.processes import stop_requests
with stop_requests() as stop:
  sys.exit(sweep._run_process([sys.executable, "-c", {child!r}], stop))
"""
  process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, process_group=0)
  try:
    while not told.exists():
      time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does: to all of the group
    assert process.wait(timeout=60) == 75
    assert told.read_text() == "ready SIGTERM "
  finally:
    process.kill()


def test_a_request_that_comes_early_or_not_at_all():
  """Before a run begins, and before it listens; its own end is told as a shell would."""
  stop = threading.Event()
  status = lambda code: sweep._run_process([sys.executable, "-c", code], stop)  # noqa: E731
  assert status("import sys; sys.exit(3)") == 3
  assert status("import os; os.kill(os.getpid(), 9)") == 137
  threading.Timer(0.5, stop.set).start()
  assert status("import time; time.sleep(60)") == 75
  assert status("raise AssertionError('it was started')") == 75


def test_commands_can_be_seen_and_written(run_sweep, tmp_path):
  seen = run_sweep("--dry_run", "--seeds=2")
  commands = [shlex.split(line) for line in seen.out.splitlines()]
  assert len(commands) == 4 and not (tmp_path / "sweep").exists()
  assert commands[3][-4:] == [
    *("--config.name=output_strength=0.2", "--config.seed=1"),
    *(f"--workdir={tmp_path}/sweep/output_strength=0.2-1", "--quiet"),
  ]
  written = run_sweep(f"--slurm={tmp_path}/job.sh", "--seeds=2")
  assert written.out.startswith(f"sbatch {tmp_path}/job.sh   # 4 runs")
  assert "#SBATCH --array=0-3" in (tmp_path / "job.sh").read_text()
  nowhere = run_sweep(f"--slurm={tmp_path}/none/job.sh")
  assert nowhere.status == 2 and "job.sh: cannot be written (No such file" in nowhere.err


def test_a_run_that_fails_stops_the_sweep(words, tmp_path):
  """The folder belongs to another run: main says so, the sweep stops with its status."""
  folder = tmp_path / "sweep" / "output_strength=0.0-0"
  folder.mkdir(parents=True)
  (folder / "config.json").write_text("{}")
  done = subprocess.run(
    [sys.executable, "-m", "hgnn_moe_jax.sweep", *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2 and "config.json is damaged" in done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1] == f"stopped at {folder}; the same command continues"
