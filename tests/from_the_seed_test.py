"""docs/from-the-seed.md: the table is complete, its fields exist, its commands run."""

import dataclasses
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.training import loop

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "from-the-seed.md").read_text()
SEED_FLAGS = re.findall(
  r"\w+",
  """
adaptive_weight_orthogonality initial_weight_orthogonality_strength
minimum_weight_orthogonality_strength maximum_weight_orthogonality_strength adaptive_decay_schedule
adaptation_frequency target_specialization_score specialization_tolerance layer_specific_adaptation
deeper_layer_scaling performance_aware_adaptation performance_monitor_window
collapse_detection_threshold emergency_constraint_boost emergency_boost_multiplier
emergency_detection_window coupler_type num_experts embed_dim num_layers
apply_weight_orthogonality_loss weight_orthogonality_loss_weight dataset_config_name run_name
""",
)
ROWS = dict(re.findall(r"^\| `--(\w+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE))


def commands() -> list[str]:
  """Every command of the page's bash blocks in one line, loops written out."""
  found = []
  for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
    text = block.replace("\\\n", " ")
    loops = re.fullmatch(r"for (\w+) in (.*?); do\n(.*)done\n", text, re.DOTALL)
    if loops is None:
      found += text.strip().splitlines()
      continue
    name, values, body = loops.groups()
    for value in values.split():
      found += body.replace(f"${{{name}}}", value).strip().splitlines()
  return [" ".join(command.split()) for command in found]


COMMANDS = commands()


def split(command: str) -> list[str]:
  """The arguments of a command that is to run in the project's root."""
  program, option, module, *arguments = shlex.split(command)
  assert (program, option, module) == ("python", "-m", "hgnn_moe_jax.main")
  return [a.replace("=configs/", f"={ROOT}/configs/") for a in arguments]


def parse(arguments: list[str]) -> Config:
  """The config of these arguments of hgnn_moe_jax.main, by flags of their own."""
  values, argv = flags.FlagValues(), ["main", *arguments]
  sys.modules.pop("config_config", None)  # The last config file's, into which this one would load.
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  assert values(argv) == ["main"], "every word is a flag"
  return values.config


def test_every_flag_of_the_seed_has_a_field():
  assert sorted(ROWS) == sorted(SEED_FLAGS)
  for path in ROWS.values():
    *group, name = path.split(".")
    owner = getattr(Config(), group[0]) if group else Config()
    assert name in {f.name for f in dataclasses.fields(owner)}, path


@pytest.mark.parametrize(
  ("flag", "value"), re.findall(r"`--(\w+)` \|.*?\| ([\d.]+), as in the seed", PAGE)
)
def test_defaults_that_are_said_to_be_the_seeds(flag, value):
  group, name = ROWS[flag].split(".")
  assert getattr(getattr(Config(), group), name) == float(value)


def test_the_page_has_the_seeds_runs():
  names = {parse(split(command)).name for command in COMMANDS}
  assert names == {
    *("adaptive_basic", "static_baseline", "adaptive_vs_static_comparison"),
    *(f"adaptive_{s}" for s in ("cosine", "exponential", "linear", "step")),
    *("adaptive_advanced", "adaptive_experimental", "adaptive_by_the_letter"),
  }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split("--config")[-1][:60])
def test_commands_run_when_shrunk(command, tiny_config, tmp_path, shared_programs):
  """As written, then the sizes, text and length of the tiny run: the last value counts."""
  arguments, tiny = split(command), tiny_config()
  for field in ("embed_dim", "num_heads", "ffn_multiplier", "max_length"):
    arguments.append(f"--config.model.{field}={getattr(tiny.model, field)}")
  for field in ("source", "path", "tokenizer", "cache_dir", "name", "rows"):
    arguments.append(f"--config.data.{field}={getattr(tiny.data, field)}")
  arguments += ["--config.model.num_layers=1", "--config.training.steps=3"]
  arguments.append("--config.training.epochs=0")
  arguments += ["--config.training.batch_size=8", "--config.training.warmup_steps=1"]
  arguments.append("--config.model.dropout=0.0")  # Drawing takes a fifth of the compilation.
  config = parse(arguments)
  summary = loop.train(config, tmp_path, quiet=True)
  assert summary["config_name"] == config.name
  assert summary["steps"] == 3 and summary["best"]["loss"] > 0
