"""What is in launch/: scripts run dry, files parsed, and every command of theirs would start."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from benchmarks import train_step
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.sweep import parse_grid

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TRAIN = ["--config=configs/quickstart.py", "--workdir=runs/my run"]


def dry(script, *arguments, **environment):
  """The commands, as lists of words, that the script would run."""
  # `make test PYTHON=...` exports what the scripts read as the user's choice of interpreter.
  bare = {k: v for k, v in os.environ.items() if k not in {"PYTHON", "PROCESSES", "PORT"}}
  done = subprocess.run(
    [LAUNCH / script, *arguments],
    env={**bare, "DRY_RUN": "1", **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  return [shlex.split(line) for line in done.stdout.splitlines()]


def assert_starts(*commands):
  """Each of `python -m module arguments` has flags that its module has, and a valid config."""
  given = [words[words.index("-m") + 1 :] for words in commands]
  done = subprocess.run(
    [sys.executable, ROOT / "tests" / "docs" / "command_lines.py"],
    input=json.dumps(given),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=True,
  )
  assert json.loads(done.stdout.splitlines()[-1]) == [""] * len(commands)


def test_every_file_opens_with_its_command():
  for path in LAUNCH.iterdir():
    head = path.read_text().split("\n\n")[0]
    commands = re.findall(r"^#   (.+)$", path.read_text(), re.MULTILINE)
    assert f"launch/{path.name}" in commands[0], path.name
    assert path.suffix != ".sh" or os.access(path, os.X_OK), path.name
    assert head.startswith("#")
  guide = (ROOT / "docs" / "gpus-and-clusters.md").read_text()
  assert [p.name for p in LAUNCH.iterdir() if p.name not in guide] == []


def test_scripts_are_scripts():
  for path in LAUNCH.glob("*.sh"):
    subprocess.run(["bash", "-n", path], check=True)


def test_one_local_process():
  (command,) = dry("local.sh", *TRAIN)
  assert command == ["python", "-m", "hgnn_moe_jax.main", *TRAIN]
  assert_starts(command)


def test_two_local_processes():
  commands = dry("local.sh", *TRAIN, PROCESSES="2", PORT="4321")
  assert [words[1] for words in commands] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]
  assert [words[-1] for words in commands] == ["--process_id=0", "--process_id=1"]
  assert all("--coordinator=127.0.0.1:4321" in words for words in commands)
  assert_starts(*commands)


def test_figures_of_a_gpu():
  everything = dry("gpu_figures.sh", "runs/my figures", WIKITEXT="my text")
  (tests,) = [words for words in everything if "tests/gpu_test.py" in words]
  commands = [words for words in everything if words is not tests]
  assert_starts(*commands)
  assert tests[-4:] == ["pytest", "-p", "no:cacheprovider", "tests/gpu_test.py"]
  for words in commands:
    given = [w.partition("=")[::2] for w in words]
    for shape in [name for flag, names in given if flag == "--shape" for name in names.split(",")]:
      base = with_fields(Config(), {**train_step.EVERYWHERE, **train_step.SHAPES[shape][0]})
      parse_grid([values for flag, values in given if flag == "--sweep"], base)
    for option in [option for flag, option in given if flag == "--compiler_option"]:
      train_step.parse_option(option)
  runs = [words for words in commands if "hgnn_moe_jax.main" in words]
  text = f"--config.data.path={pathlib.Path.cwd()}/my text"
  assert len(runs) == 3 and all(text in words for words in runs)
  results = [
    word.partition("=")[2]
    for words in commands
    for word in words
    if re.match(r"--(out|workdir)=", word)
  ]
  assert len(set(results)) == len(commands)
  own = f"{pathlib.Path.cwd()}/runs/my figures/"  # The caller's, not the script's.
  assert all(re.fullmatch(re.escape(own) + r"\w+(\.json)?", result) for result in results)


def test_figures_of_a_gpu_continue_and_tell_what_failed(tmp_path):
  """An interpreter that writes what a command would, fails in two of them, and keeps a list."""
  stub, folder, told = tmp_path / "python", tmp_path / "figures", tmp_path / "started"
  stub.write_text(
    f"#!{sys.executable}\n"
    "import os, pathlib, sys\n"
    "assert os.environ['JAX_PLATFORMS'] == 'cuda'\n"
    "words = dict(w.partition('=')[::2] for w in sys.argv)\n"
    "mended = pathlib.Path(sys.argv[0] + '.mended').exists()\n"
    f"with open({str(told)!r}, 'a') as file:\n"
    "  print(words.get('--out') or words.get('--workdir') or 'tests', file=file)\n"
    "if 'benchmarks.data' in sys.argv and not mended:\n"
    "  sys.exit('error: no such thing')\n"
    "if '--workdir' in words:\n"
    "  folder = pathlib.Path(words['--workdir'])\n"
    "  assert not folder.exists(), folder\n"
    "  folder.mkdir()\n"
    "  words['--out'] = folder / 'summary.json'\n"
    "  cache = pathlib.Path(words['--config.data.cache_dir'])\n"
    "  assert cache.exists() != (folder.name == 'cold'), cache\n"
    "  cache.mkdir(exist_ok=True)\n"
    "  if folder.name == 'cold' and not mended:\n"
    "    sys.exit('error: no text')\n"
    "if '--out' in words:\n"
    "  pathlib.Path(words['--out']).write_text('{}')\n"
    "print('| a | row |')\n"
  )
  stub.chmod(0o755)

  def start():
    told.write_text("")
    done = subprocess.run(
      [LAUNCH / "gpu_figures.sh", folder],
      env={**os.environ, "PYTHON": str(stub), "DRY_RUN": "0", "JAX_PLATFORMS": ""},
      capture_output=True,
      text=True,
    )
    return done, [pathlib.Path(line).stem for line in told.read_text().splitlines()]

  # A run that was stopped, and what an earlier call kept.
  (folder / "cold").mkdir(parents=True)
  (folder / "cached_1").mkdir()  # Timed with programs that will not be there.
  (folder / "cached_1" / "summary.json").touch()
  (folder / "cache_of_runs").mkdir()
  (folder / "cache").mkdir()
  (folder / "cache" / "of somebody else").touch()
  done, started = start()
  assert (folder / "cache" / "of somebody else").exists()
  # What cold has not compiled, nothing is timed with.
  assert done.returncode == 1 and done.stderr == "failed: cold cached_1 cached_2 data\n"
  assert "cached_1: failed, for want of the programs that cold compiles" in done.stdout
  assert f"data: failed, see {folder}/data.log\n" in done.stdout
  assert (folder / "data.log").read_text() == "error: no such thing\n"
  assert len(set(started)) == len(started) == 17
  assert done.stdout.startswith("| a | row |\nshapes: ")
  (tmp_path / "python.mended").touch()
  done, started = start()
  assert (done.returncode, done.stderr) == (0, "")
  assert started == ["cold", "cached_1", "cached_2", "tests", "data"]
  assert re.search(r"^cold: \d+\.\d s$", (folder / "cold.log").read_text(), re.MULTILINE)
  assert done.stdout.startswith("shapes: there already\n")
  shutil.rmtree(folder / "cache_of_runs")
  shutil.rmtree(folder / "cached_2")
  done, started = start()
  assert (done.returncode, done.stderr, started) == (1, "failed: cached_2\n", ["tests"])


def test_figures_of_a_gpu_hand_on_a_request_to_stop(tmp_path):
  """Else what runs would go on using the GPU."""
  stub, told = tmp_path / "python", tmp_path / "told"
  stub.write_text(
    f"#!{sys.executable}\n"
    "import pathlib, signal, sys, time\n"
    f"told = pathlib.Path({str(told)!r})\n"
    "def stop(number, frame):\n"
    "  told.write_text('stopped')\n"
    "  sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "told.write_text('ready')\n"
    "time.sleep(60)\n"
  )
  stub.chmod(0o755)
  environment = {**os.environ, "PYTHON": str(stub), "DRY_RUN": "0"}
  script = subprocess.Popen([LAUNCH / "gpu_figures.sh", tmp_path / "figures"], env=environment)
  while not (told.exists() and told.read_text() == "ready"):
    assert script.poll() is None
    time.sleep(0.05)
  script.terminate()
  assert script.wait(timeout=30) == 130 and told.read_text() == "stopped"


def test_the_study():
  commands = dry("adaptive_study.sh", "runs/my study", "--config.training.steps=400")
  assert len(commands) == 18
  own = f"--workdir={pathlib.Path.cwd()}/runs/my study/"
  runs = {w.removeprefix(own) for words in commands for w in words if w.startswith(own)}
  weight, output = ("static_weight", "adaptive_weight"), ("static_output", "adaptive_output")
  arms = ("none", *weight, *output, "feedback")
  assert runs == {f"{arm}-{seed}" for arm in arms for seed in range(3)}
  assert_starts(*commands[:6])


def test_slurm():
  (command,) = dry("slurm.sh", *TRAIN)
  assert command[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=90", "python"]
  assert command[-3:] == ["--distributed", *TRAIN]
  assert_starts(command)
  text = (LAUNCH / "slurm.sh").read_text()
  assert re.search(r'"\$status" -eq 75 \]; then.*\n\s+scontrol requeue "\$SLURM_JOB_ID"', text)
  options = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
  assert "--signal=TERM@120" in options and "--requeue" in options
  # JAX gives local task i its device i, which it has to see among all of the node's.
  per_node = dict(o.split("=") for o in options if "=" in o)
  assert per_node["--ntasks-per-node"] == per_node["--gpus-per-node"]


def test_tpu_vm():
  archive, copy, start = dry("tpu_vm.sh", "tpu", "here", *TRAIN)
  assert archive[0] == "git" and archive[-1] == "HEAD"
  assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
  assert {"--zone=here", "--worker=all"} <= set(copy) & set(start)
  remote = next(w for w in start if w.startswith("--command=")).split("exec ")[1]
  assert shlex.split(remote)[-2:] == TRAIN
  assert_starts(shlex.split(remote))


def test_jobset():
  job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  (group,) = job["spec"]["replicatedJobs"]
  spec = group["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  arguments = dict(a.lstrip("-").partition("=")[::2] for a in container["args"])
  assert int(arguments["num_processes"]) == spec["completions"] == spec["parallelism"]
  # JobSet's name of the first pod: JOBSET-GROUP-JOB-POD.JOBSET.
  name = job["metadata"]["name"]
  assert arguments["coordinator"].split(":")[0] == f"{name}-{group['name']}-0-0.{name}"
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  started = [w.replace("$(JOB_COMPLETION_INDEX)", "1") for w in container["args"]]
  assert_starts(["-m", "hgnn_moe_jax.main", *started])


def test_skypilot():
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  values = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
  shown = task["run"].replace("python -m", "echo python -m")
  done = subprocess.run(
    ["bash", "-euc", shown],
    env={**os.environ, **values, "SKYPILOT_NODE_RANK": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  command = shlex.split(done.stdout)
  assert command[-3:] == ["--coordinator=10.0.0.1:12355", "--num_processes=2", "--process_id=1"]
  assert_starts(command)


@pytest.mark.parametrize("line", ["COPY", "ENTRYPOINT"])
def test_the_image_has_what_a_run_needs(line):
  text = (LAUNCH / "Dockerfile").read_text()
  if line == "ENTRYPOINT":
    assert json.loads(text.split("ENTRYPOINT ")[1]) == ["python", "-m", "hgnn_moe_jax.main"]
    return
  sources = [
    w for copy in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for w in copy.split()[:-1]
  ]
  assert all((ROOT / source).exists() for source in sources)
  assert {"setup.cfg", "pyproject.toml", "hgnn_moe_jax", "configs", "README.md"} <= set(sources)
