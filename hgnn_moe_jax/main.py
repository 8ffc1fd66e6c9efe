"""Command line: train, continue or evaluate a run.

python -m hgnn_moe_jax.main --config=configs/quickstart.py
python -m hgnn_moe_jax.main --mode=evaluate --workdir=runs/quickstart --split=test
"""

import pathlib

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import report

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config if not given.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "What to do.")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "What to evaluate on.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which one to evaluate.")
_STRIDE = flags.DEFINE_integer(
  "stride", None, "Evaluate with a sliding context: each window scores its last STRIDE tokens.", 1
)
_QUIET = flags.DEFINE_boolean("quiet", False, "No progress, only the result.")


def main() -> None:
  """Exit status 0, or that of the UserError, whose message is all that is printed."""
  cli.start(_run)


def _run(argv: list[str]) -> None:
  cli.refuse_words(argv)
  # Imported late: a mistake on the command line is told at once.
  from hgnn_moe_jax.training import evaluate, loop

  if _MODE.value == "evaluate":
    if _WORKDIR.value is None:
      raise UserError("--mode=evaluate: give the run folder with --workdir")
    workdir = pathlib.Path(_WORKDIR.value)
    result = evaluate.evaluate_run(workdir, _SPLIT.value, _CHECKPOINT.value, _STRIDE.value)
    print(report.evaluation(result))
    return
  config = cli.validated(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs", config.name))
  summary = loop.train(config, workdir, _QUIET.value)
  print(report.summary(summary, workdir))


if __name__ == "__main__":
  main()
