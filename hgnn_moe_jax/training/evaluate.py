"""Scoring a finished or running run from its folder alone."""

import pathlib
from typing import Any

from hgnn_moe_jax import extensions, sharding
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import run_folder
from hgnn_moe_jax.training.assembly import assemble
from hgnn_moe_jax.training.checkpoint import Checkpointer
from hgnn_moe_jax.training.evaluation import Evaluator
from hgnn_moe_jax.training.optimizer import averaged_params
from hgnn_moe_jax.training.records import MetricWriter


def evaluate_run(
  workdir: pathlib.Path, split: str, checkpoint: str = "best", stride: int | None = None
) -> dict[str, Any]:
  """Scores one split with a saved checkpoint and appends the record to metrics.jsonl.

  On all devices there are, if the run's expert and model axes divide their number, else on one.

  Args:
    workdir: of a run that has saved at least once.
    split: "validation" or "test".
    checkpoint: "best" by validation loss, or "last".
    stride: of the sliding context; None as in the run's config.

  Raises:
    UserError: no run, no readable checkpoint, or other data than the run was trained on.
  """
  config, content = run_folder.read_config(workdir)
  extensions.require_outside(workdir, config)
  if stride is not None:
    config.evaluation.stride = stride
  config.validate()
  corpus = load_corpus(config)
  if corpus.fingerprint != content["data"]["fingerprint"]:
    raise UserError(
      f"--workdir={workdir}: the text at config.data.path={config.data.path!r} is not the one this "
      "run was trained on; restore it"
    )
  mesh = sharding.evaluation_mesh(config)
  assembly = assemble(config, corpus, mesh)
  checkpointer = Checkpointer(workdir)
  step = checkpointer.best_step() if checkpoint == "best" else checkpointer.latest_step()
  if step is None:
    if checkpointer.latest_step() is not None:
      raise UserError(
        f"--workdir={workdir}: no scored checkpoint there yet; evaluate with --checkpoint=last"
      )
    raise UserError(f"--workdir={workdir}: no checkpoint there yet; train the run first")
  state, _ = checkpointer.restore(assembly.abstract_state, step)
  checkpointer.close()
  # Every part of the data axis takes as many rows; what a batch holds makes no difference.
  parts = 1 if mesh is None else mesh.shape["data"]
  batch_size = config.evaluation.batch_size or config.training.batch_size
  with sharding.using(mesh):
    evaluator = Evaluator(
      assembly.model,
      corpus.splits[split],
      -(-batch_size // parts) * parts,
      config.model.max_length,
      corpus.tokenizer.end_of_text,
      config.data.placement,
      mesh,
    )
    score = evaluator(averaged_params(state.opt_state, state.params))
  fields = {
    "split": split,
    "checkpoint": checkpoint,
    "stride": config.evaluation.stride,
    **score._asdict(),
  }
  metrics = MetricWriter(workdir)
  metrics.write("eval", step, **fields)
  metrics.close()
  return {"step": step, **fields}
