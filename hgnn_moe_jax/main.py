"""Command line: train or continue a run, evaluate it, let it write.

python -m hgnn_moe_jax.main --config=configs/quickstart.py
python -m hgnn_moe_jax.main --mode=evaluate --workdir=runs/quickstart --split=test
python -m hgnn_moe_jax.main --mode=generate --workdir=runs/quickstart --prompt="My fellow citizens"
"""

import pathlib

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import report

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config if not given.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "generate"], "What to do.")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "What to evaluate on.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which one to read.")
_STRIDE = flags.DEFINE_integer(
  "stride", None, "Evaluate with a sliding context: each window scores its last STRIDE tokens.", 1
)
_DISTRIBUTED = flags.DEFINE_boolean(
  "distributed", False, "This is one of several processes that train together."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of the first of them; found by itself under SLURM and the like."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one's number, from 0.", 0)
_QUIET = flags.DEFINE_boolean("quiet", False, "No progress, only the result.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; several make a batch.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a text to continue in every line.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 100, "Most tokens to generate.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens that reach p together.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "On tokens already there; 1 is none.")
_STOP = flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times.")
_SAMPLE_SEED = flags.DEFINE_integer("sample_seed", 0, "Of the draws.")
_COLOUR = flags.DEFINE_boolean("colour", False, "Colour each token by the expert that led to it.")


def main() -> None:
  """Exit status 0, or that of the UserError, whose message is all that is printed."""
  cli.start(_run)


def _run(argv: list[str]) -> None:
  cli.refuse_words(argv)
  {"train": _train, "evaluate": _evaluate, "generate": _generate}[_MODE.value]()


# Imports in these are late: a mistake on the command line is told at once.


def _train() -> None:
  from hgnn_moe_jax.training import loop, processes

  if _DISTRIBUTED.value:
    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  config = cli.validated(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs", config.name))
  summary = loop.train(config, workdir, _QUIET.value)
  if processes.is_first():
    print(report.summary(summary, workdir))


def _evaluate() -> None:
  from hgnn_moe_jax.training import evaluate

  result = evaluate.evaluate_run(_folder(), _SPLIT.value, _CHECKPOINT.value, _STRIDE.value)
  print(report.evaluation(result))


def _generate() -> None:
  from hgnn_moe_jax import generation, generation_view, trained

  sampling = generation.Sampling(
    max_tokens=_MAX_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    repetition_penalty=_PENALTY.value,
    stop=tuple(_STOP.value),
    seed=_SAMPLE_SEED.value,
  )
  prompts = generation_view.prompts(_PROMPT.value, _PROMPTS.value)
  model = trained.load(_folder(), _CHECKPOINT.value)
  cli.keep_compiled(model.config)
  generation_view.show(model, prompts, sampling, _COLOUR.value)


def _folder() -> pathlib.Path:
  if _WORKDIR.value is None:
    raise UserError(f"--mode={_MODE.value}: give the run folder with --workdir")
  return pathlib.Path(_WORKDIR.value)


if __name__ == "__main__":
  main()
