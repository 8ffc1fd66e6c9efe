"""The command line: what it prints, and that every mistake is one line that names the cure."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from hgnn_moe_jax import main
from hgnn_moe_jax.cli import keep_compiled
from hgnn_moe_jax.training import loop

QUICKSTART = f"--config={pathlib.Path(__file__).parent.parent / 'configs' / 'quickstart.py'}"


@pytest.fixture
def cli(command, monkeypatch, tmp_path):
  """cli(*arguments) -> Outcome of the command line."""
  monkeypatch.chdir(tmp_path)  # runs/NAME, if it comes to that, goes there
  return functools.partial(command, main.main)


@pytest.fixture
def refused(cli):
  """refused(*arguments) -> the message: the last line, and the only one that tells of an error."""

  def run(*arguments: str, status: int = 2) -> str:
    outcome = cli(*arguments)
    assert outcome.status == status, outcome
    assert outcome.out == ""
    *before, last = outcome.err.splitlines()
    assert last.startswith("error: "), outcome.err
    # At most what a run announces: the text it reads, and that it compiles.
    assert all(re.match(r"\w+: reading |[\d,]+ parameters, ", line) for line in before), outcome.err
    return last.removeprefix("error: ")

  return run


def override(field: str, value: object) -> str:
  return f"--config.{field}={value}"


OVERRIDES = [
  ("model.num_headz=3", r"--config.model.num_headz=3: Field num_headz not found on dataclass"),
  ("modle.num_heads=3", r"--config.modle.num_heads=3: .*modle does not exist"),
  ("model.num_heads=abc", r"flag --config.model.num_heads=abc: invalid literal for int"),
  ("training.learning_rate=fast", r"flag --config.training.learning_rate=fast: could not convert"),
  ("model.coupler=ring", r"config.model.coupler='ring': use one of graph, hypergraph, mean"),
  ("model.num_heads=3", r"config.model.num_heads=3: use a divisor of model.embed_dim=128"),
  ("model.dropout=1.5", r"config.model.dropout=1.5: use a value in \[0.0, 0.99\]"),
  ("training.epochs=1", r"config.training.steps=\d+: training.epochs=1.0 says otherwise"),
  ("training.learning_rate=nan", r"config.training.learning_rate=nan: use a value at least 0.0"),
  ("training.accumulation=3", r"config.training.accumulation=3: use a divisor of .*batch_size=16"),
  ("seed=-1", r"config.seed=-1: use a value in"),
]


@pytest.mark.parametrize(("setting", "message"), OVERRIDES, ids=lambda v: v.split(":")[0])
def test_mistaken_settings(setting, message, refused):
  assert re.search(message, refused(QUICKSTART, f"--config.{setting}"))


def test_hyperedge_of_a_missing_expert(refused):
  message = refused(
    QUICKSTART,
    override("model.coupler", "hypergraph"),
    override("model.hyperedges", "[[0,1],[2,9]]"),
  )
  assert message == (
    "config.model.hyperedges='[[0,1],[2,9]]': expert 9 of [2, 9] does not exist; experts are 0..3"
  )


ARGUMENTS = [
  ((QUICKSTART, "--config.name=../out"), r"config\.name='\.\./out': use a word without /, or give"),
  ((QUICKSTART, "--config.name="), r"config\.name='': use a word without /"),
  (
    (QUICKSTART, "--config.data.path=a.txt"),
    r"config\.data\.path='a\.txt': data\.source=sotu has none, .*; use data\.source=text",
  ),
  ((), r"--config=: no Config there; give a file such as configs/quickstart\.py"),
  (("--config=missing.py",), r"--config=missing\.py: no such file; give a file"),
  (
    (QUICKSTART, "--mode=chat"),
    r"flag --mode=chat: value should be one of <train\|eval",
  ),
  ((QUICKSTART, "steps=3"), r"steps=3: not understood; every option starts with --"),
  ((QUICKSTART, "--stepz=3"), r"Unknown command line flag 'stepz'"),
  (("--mode=evaluate",), r"--mode=evaluate: give the run folder with --workdir"),
  (("--mode=generate",), r"no prompt: give --prompt=TEXT, or --prompts=FILE"),
  (("--mode=generate", "--prompt=a"), r"--mode=generate: give the run folder with --workdir"),
  (("--mode=generate", "--prompt=a", "--top_p=0", "--workdir=."), r"--top_p=0\.0: use a value"),
  (("--mode=generate", "--prompts=none.txt"), r"--prompts=none\.txt: cannot be read"),
  (("--mode=generate", "--prompt=a", "--workdir=."), r"--workdir=\.: no config\.json there"),
  (("--mode=evaluate", "--stride=0"), r"flag --stride=0: 0 is not a positive integer"),
  (
    (QUICKSTART, "--mode=evaluate", "--workdir=."),
    r"--config: not with --mode=evaluate, the run's own config counts; leave it out",
  ),
  ((QUICKSTART, "--stride=4"), r"--stride: not with --mode=train, it does nothing there; leave"),
  (("--mode=generate", "--prompt=a", "--quiet"), r"--quiet: not with --mode=generate, it does"),
  (("--mode=generate", "--prompt=a\udcff"), r"--prompt='a\\udcff': not UTF-8; give text"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=lambda v: str(v)[-40:])
def test_mistaken_arguments(arguments, message, refused):
  assert re.match(message, refused(*arguments))


def test_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
  """What is found there is run: never where the config of a folder that is read says."""
  kept = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    seen = []
    for before, given in ((None, ""), ("/elsewhere", ""), ("/elsewhere", str(tmp_path / "own"))):
      jax.config.update("jax_compilation_cache_dir", before)
      keep_compiled(given)
      seen.append(jax.config.jax_compilation_cache_dir)
  finally:
    jax.config.update("jax_compilation_cache_dir", kept)
  assert seen == [f"{tmp_path}/hgnn_moe_jax/xla", "/elsewhere", f"{tmp_path}/own/xla"]


def test_help_lists_every_flag_and_is_no_failure():
  done = subprocess.run(
    [sys.executable, "-m", "hgnn_moe_jax.main", "--help"], capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stderr == ""
  reads = {name for names in main._READS.values() for name in names}
  for name in ("mode", "workdir", *reads):
    assert re.search(rf"^  --(\[no\])?{name}:", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("platform", ["abacus", "cuda"])  # JAX refuses them in different ways.
def test_devices_that_are_not_there(platform):
  if jax.default_backend() == "gpu":
    pytest.skip("there is a GPU")
  done = subprocess.run(
    [sys.executable, "-m", "hgnn_moe_jax.main", QUICKSTART],
    env={**os.environ, "JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  line = rf"error: JAX_PLATFORMS={platform}: JAX cannot use it here \(\w.+\n"
  assert re.fullmatch(line, done.stderr)


def test_devices_that_are_there_and_cannot_be_used(cli, monkeypatch):
  """Nobody has asked for them by name: JAX's own reason, in one line."""
  code = compile("raise RuntimeError('cuda: out\\nof memory')", "jax/_src/xla_bridge.py", "exec")
  monkeypatch.setattr(main, "_train", lambda: exec(code, {}))
  asked = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)
  try:
    done = cli(QUICKSTART)
  finally:
    jax.config.update("jax_platforms", asked)
  assert done.status == 2
  assert done.err == "error: JAX cannot use the devices that it has found: cuda: out of memory\n"


def test_a_config_that_ends_the_program_is_no_success(cli, tmp_path):
  path = tmp_path / "ends.py"
  path.write_text("import sys\n\n\ndef get_config():\n  sys.exit('no data: run prepare.py')\n")
  assert cli(f"--config={path}").status == "no data: run prepare.py"  # Python prints it: status 1.
  missing = cli(f"--config={QUICKSTART.partition('=')[2]}:argument")
  assert "no such file" not in missing.err


FILES = {
  "def get_config():\n  return Config(\n": r"'\(' was never closed \(broken\.py, line 2\)",
  "x = 1\n": r"module 'config_config' has no attribute 'get_config'",
  "import no_such_module\n": r"No module named 'no_such_module'",
  "from hgnn_moe_jax.config import Config\ndef get_config():\n  c = Config()\n"
  "  c.model.num_headz = 3\n  return c\n": r"'ModelConfig' object has no attribute 'num_headz'",
  "def get_config():\n  return Confg()\n": r"name 'Confg' is not defined",
  "def get_config():\n  return {}['steps']\n": r"steps",
  "def get_config():\n  raise KeyError\n": r"KeyError",
}


@pytest.mark.parametrize("content", FILES, ids=lambda c: c.splitlines()[-1])
def test_a_broken_config_file(content, refused, tmp_path):
  path = tmp_path / "broken.py"
  path.write_text(content)
  assert re.match(
    rf"--config={path}: {FILES[content]}; the fields are in", refused(f"--config={path}")
  )


def test_a_misspelt_keyword_in_a_config_file(refused, tmp_path):
  path = tmp_path / "broken.py"
  path.write_text(
    "from hgnn_moe_jax.config import ModelConfig\n"
    "def get_config():\n  return ModelConfig(embedd_dim=16)\n"
  )
  assert refused(f"--config={path}") == (
    f"flag --config={path}: TypeError: ModelConfig.__init__() got an unexpected keyword argument "
    "'embedd_dim'"
  )


def test_a_config_file_that_returns_something_else(refused, tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("def get_config():\n  return {}\n")
  assert re.match(rf"--config={path}: no Config there", refused(f"--config={path}"))


def test_text_that_cannot_be_trained_on(refused, tmp_path, tiny_config, config_file):
  path = tmp_path / "text"
  config = tiny_config(**{"data.path": str(path)})
  experiment = config_file(config)
  arguments = (experiment, f"--workdir={tmp_path / 'run'}")
  assert re.match(r"config\.data\.path='.*text': does not exist; give", refused(*arguments))
  cases = {
    b"": r"config\.data\.path='.*text': the file is empty; give plain UTF-8 text",
    b"ab\0cd": r"config\.data\.path='.*text': binary: byte 2 is NUL",
    b"\x89PNG\xff": r"config\.data\.path='.*text': not UTF-8: byte 0 is 0x89",
    b"a\n\nb": r"config\.data\.path='.*text': too few documents \(2\) to hold out",
    b"one\n\ntwo\n\nthree\n": r"config\.training\.batch_size=8: the corpus is smaller than a batch",
  }
  for content, message in cases.items():
    path.write_bytes(content)
    assert re.match(message, refused(*arguments)), content
  path.unlink()
  path.mkdir()
  assert re.match(
    r"config\.data\.path=.*: no file for train, validation, test", refused(*arguments)
  )
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_hub_out_of_reach(refused, tiny_config, config_file, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  config = tiny_config(**{"data.source": "hf", "data.path": "no-such/data-set"})
  message = refused(config_file(config), f"--workdir={tmp_path / 'run'}")
  assert message.startswith("config.data.path='no-such/data-set': ")


def test_an_unwritable_cache(refused, tiny_config, config_file, tmp_path):
  (tmp_path / "file").write_text("")
  config = tiny_config(**{"data.cache_dir": str(tmp_path / "file" / "cache")})
  message = refused(config_file(config), f"--workdir={tmp_path / 'run'}")
  assert "config.data.cache_dir=" in message and "give a writable folder" in message


def test_a_workdir_that_cannot_be_one(refused, tiny_config, config_file, tmp_path):
  (tmp_path / "file").write_text("")
  experiment = config_file(tiny_config())
  message = refused(experiment, f"--workdir={tmp_path / 'file'}")
  assert message == f"--workdir={tmp_path / 'file'}: is a file; choose a folder"
  message = refused(experiment, f"--workdir={tmp_path / 'file' / 'run'}")
  assert "run: cannot write (Not a directory). Free space or choose a folder" in message


def small(tiny_config):
  """Of one layer, which is soon compiled."""
  return tiny_config(**{"model.num_layers": 1})


def test_a_full_disk(refused, tiny_config, config_file, tmp_path, shared_programs, monkeypatch):
  """While the first checkpoint is being written, in Orbax's threads."""
  from hgnn_moe_jax.training.checkpoint import ocp

  def full(self, *args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  message = refused(config_file(small(tiny_config)), f"--workdir={tmp_path / 'run'}", "--quiet")
  assert "cannot write (No space left on device). Free space" in message
  assert message.endswith("it continues from the last checkpoint.")


@pytest.fixture
def claimed(tiny_config, tmp_path) -> pathlib.Path:
  """A run folder with a config and no checkpoint."""
  corpus = loop.load_corpus(tiny_config())
  workdir = tmp_path / "claimed"
  workdir.mkdir()
  content = {"config": tiny_config().to_dict(), "data": {"fingerprint": corpus.fingerprint}}
  (workdir / "config.json").write_text(json.dumps(content))
  return workdir


def test_run_folders_that_cannot_be_continued(
  refused, claimed, tiny_config, config_file, shared_programs
):
  experiment, workdir = config_file(tiny_config()), f"--workdir={claimed}"
  message = refused(experiment, workdir, override("model.num_layers", 3))
  assert message.startswith(f"{workdir} belongs to another run: model.num_layers: 2 -> 3. Use the")
  with open(claimed / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another process is training there" in refused(experiment, workdir)
  (claimed / "config.json").write_text('{"config": ')
  assert re.match(
    rf"{workdir}: config\.json is damaged \(.*\); restore it", refused(experiment, workdir)
  )
  (claimed / "config.json").unlink()
  (claimed / "checkpoints").mkdir()
  assert "has checkpoints but no config.json" in refused(experiment, workdir)


def test_run_folders_that_cannot_be_evaluated(refused, claimed, tmp_path, shared_programs):
  def evaluate(folder: pathlib.Path) -> str:
    return refused("--mode=evaluate", f"--workdir={folder}")

  for folder in (tmp_path / "missing", tmp_path, tmp_path / "file" / "below"):
    with contextlib.suppress(FileExistsError):
      (tmp_path / "file").touch()
    assert evaluate(folder).startswith(f"--workdir={folder}: no config.json there; give the folder")
  assert evaluate(claimed).endswith("no checkpoint there yet; train the run first")
  (claimed / "config.json").write_bytes(b"\xff")
  assert "config.json is damaged" in evaluate(claimed)


def test_a_run_from_start_to_text(
  cli, tiny_config, config_file, tmp_path, shared_programs, monkeypatch
):
  """Train, run again, evaluate, generate; and settings given on the command line arrive."""
  workdir = tmp_path / "run"
  arguments = (
    config_file(small(tiny_config)),
    f"--workdir={workdir}",
    override("training.log_every", 5),
  )
  first = cli(*arguments)
  assert first.status == 0
  assert re.search(r"^tiny: [\d,]+ parameters, 12 steps, [\d,]+ tokens in \d+ s", first.out)
  assert f"Look next: {workdir / 'metrics.jsonl'}" in first.out
  assert "step 12/12 left=00:00:00 total=" in first.err
  assert "step 12 validation: token perplexity" in first.err
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  trained = [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"]
  assert trained == [5, 10, 12]

  # Where a folder that is only read says that programs are kept is not where they are looked for.
  told = []
  monkeypatch.setattr(main.cli, "keep_compiled", lambda *given: told.append(given))
  again = cli(*arguments, "--quiet")
  assert (again.status, again.err) == (0, "")
  assert again.out.split("best ")[1] == first.out.split("best ")[1]

  scored = cli("--mode=evaluate", f"--workdir={workdir}", "--split=test", "--stride=5")
  assert scored.status == 0
  assert re.match(r"test, step 12, [\d,]+ tokens\n  token perplexity [\d.]+\n", scored.out)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert (last["kind"], last["split"], last["stride"]) == ("eval", "test", 5)
  assert not list(tmp_path.glob("runs"))

  prompts = tmp_path / "prompts.txt"
  prompts.write_text("carries\nmessages\n")
  write = ("--mode=generate", f"--workdir={workdir}", "--prompt=the experts", "--max_tokens=8")
  one = cli(*write)
  assert (one.status, one.err) == (0, "")
  assert one.out.startswith("the experts")
  assert cli(*write).out == one.out != cli(*write, "--sample_seed=1").out
  many = cli(*write, f"--prompts={prompts}", "--temperature=0")
  starts = [text.split()[0] for text in many.out.split("\n---\n")]
  assert [start[:7] for start in starts] == ["the", "carries", "message"]
  long = cli(*write, f"--prompt={'x' * 20}")
  assert long.err == "prompt 2 has 20 tokens, the context holds 16: its end is read\n"
  train, *others = told
  assert train == (tiny_config().data.cache_dir,) and others == [()] * 6
