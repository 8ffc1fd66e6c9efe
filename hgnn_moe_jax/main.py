"""Command line: train or continue a run, evaluate it, let it write.

python -m hgnn_moe_jax.main --config=configs/quickstart.py
python -m hgnn_moe_jax.main --mode=evaluate --workdir=runs/quickstart --split=test
python -m hgnn_moe_jax.main --mode=generate --workdir=runs/quickstart --prompt="My fellow citizens"
"""

import itertools
import pathlib

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import report

FLAGS = flags.FLAGS


def main() -> None:
  """Exit status 0, or that of the UserError, whose message is all that is printed."""
  cli.define_config()
  flags.DEFINE_string("workdir", None, "Run folder; runs/NAME of the config if not given.")
  flags.DEFINE_enum("mode", "train", ["train", "evaluate", "generate"], "What to do.")
  flags.DEFINE_enum("split", "validation", ["validation", "test"], "What to evaluate on.")
  flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which one to read.")
  flags.DEFINE_integer(
    "stride", None, "Evaluate with a sliding context: each window scores its last STRIDE tokens.", 1
  )
  flags.DEFINE_boolean(
    "distributed", False, "This is one of several processes that train together."
  )
  flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of them; found by itself under SLURM and the like."
  )
  flags.DEFINE_integer("num_processes", None, "How many.", 1)
  flags.DEFINE_integer("process_id", None, "This one's number, from 0.", 0)
  flags.DEFINE_boolean("quiet", False, "No progress, only the result.")
  flags.DEFINE_multi_string("prompt", [], "Text to continue; several make a batch.")
  flags.DEFINE_string("prompts", None, "File with a text to continue in every line.")
  flags.DEFINE_integer("max_tokens", 100, "Most tokens to generate.")
  flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
  flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
  flags.DEFINE_float("top_p", 1.0, "Keep the likeliest tokens that reach p together.")
  flags.DEFINE_float("repetition_penalty", 1.0, "On tokens already there; 1 is none.")
  flags.DEFINE_multi_string("stop", [], "End before this text; may be given several times.")
  flags.DEFINE_integer("sample_seed", 0, "Of the draws.")
  flags.DEFINE_boolean("colour", False, "Colour each token by the expert that led to it.")
  cli.start(_run)


# What each mode reads, beside --mode and --workdir. The other flags would do nothing there.
_READS = {
  "train": ("config", "distributed", "coordinator", "num_processes", "process_id", "quiet"),
  "evaluate": ("split", "checkpoint", "stride"),
  "generate": (
    *("checkpoint", "prompt", "prompts", "max_tokens", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "stop", "sample_seed", "colour"),
  ),
}


def _run(argv: list[str]) -> None:
  cli.refuse_words(argv)
  for name in itertools.chain(*_READS.values()):
    if FLAGS[name].present and name not in _READS[FLAGS.mode]:
      why = "the run's own config counts" if name == "config" else "it does nothing there"
      raise UserError(f"--{name}: not with --mode={FLAGS.mode}, {why}; leave it out")
  {"train": _train, "evaluate": _evaluate, "generate": _generate}[FLAGS.mode]()


# Imports in these are late: a mistake on the command line is told at once.


def _train() -> None:
  from hgnn_moe_jax.training import loop, processes

  if FLAGS.distributed:
    processes.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  config = cli.validated(FLAGS.config)
  workdir = pathlib.Path(FLAGS.workdir or cli.default_folder(config.name))
  summary = loop.train(config, workdir, FLAGS.quiet)
  if processes.is_first():
    print(report.summary(summary, workdir))


def _evaluate() -> None:
  from hgnn_moe_jax.training import evaluate

  cli.keep_compiled()
  result = evaluate.evaluate_run(_folder(), FLAGS.split, FLAGS.checkpoint, FLAGS.stride)
  print(report.evaluation(result))


def _generate() -> None:
  from hgnn_moe_jax import generation, generation_view, trained

  sampling = generation.Sampling(
    max_tokens=FLAGS.max_tokens,
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    repetition_penalty=FLAGS.repetition_penalty,
    stop=tuple(FLAGS.stop),
    seed=FLAGS.sample_seed,
  )
  generation.check(sampling)
  prompts = generation_view.prompts(FLAGS.prompt, FLAGS.prompts)
  cli.keep_compiled()
  model = trained.load(_folder(), FLAGS.checkpoint)
  generation_view.show(model, prompts, sampling, FLAGS.colour)


def _folder() -> pathlib.Path:
  if FLAGS.workdir is None:
    raise UserError(f"--mode={FLAGS.mode}: give the run folder with --workdir")
  return pathlib.Path(FLAGS.workdir)


if __name__ == "__main__":
  main()
