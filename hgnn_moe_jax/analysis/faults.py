"""Damage to a run, on purpose: a copy of its folder in which the experts have become one."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.data.corpus import load_corpus
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.models.language_model import is_expert_parameter
from hgnn_moe_jax.training import run_folder
from hgnn_moe_jax.training.assembly import assemble
from hgnn_moe_jax.training.checkpoint import Checkpointer
from hgnn_moe_jax.training.state import TrainState


# Leaf by leaf it would be hundreds of programs: one operation each, of every shape.
@functools.partial(jax.jit, static_argnames="noise")
def clone_experts(state: TrainState, noise: float, seed: int = 0) -> TrainState:
  """Expert 0 of every layer in the place of all experts.

  Parameters and the optimizer's moments are copied. With moments of their own the copies would part
  at the next step, whatever the loss: that would test the optimizer's memory.

  Args:
    state: any; the control state is left as it is, so the controller does not know.
    noise: standard deviation of what is added to the parameters of experts 1 ... E - 1, as a share
      of the root mean square of expert 0's; per layer and parameter. 0 gives exact copies.
    seed: of that noise.
  """

  def clone(path, leaf):
    if not is_expert_parameter(path):
      return leaf
    first = leaf[:, :1]
    return jnp.broadcast_to(first, leaf.shape).astype(leaf.dtype)

  def disturb(path, leaf, key):
    if not is_expert_parameter(path) or noise == 0.0:
      return leaf
    first = leaf[:, :1]
    rms = jnp.sqrt(jnp.mean(jnp.square(first), axis=tuple(range(1, leaf.ndim)), keepdims=True))
    added = (noise * rms * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
    return leaf + added.at[:, 0].set(0.0)

  params = jax.tree_util.tree_map_with_path(clone, state.params)
  leaves, structure = jax.tree.flatten(params)
  keys = jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(seed), len(leaves))))
  return state._replace(
    params=jax.tree_util.tree_map_with_path(disturb, params, keys),
    opt_state=jax.tree_util.tree_map_with_path(clone, state.opt_state),
  )


def fork(
  source: pathlib.Path,
  target: pathlib.Path,
  step: int,
  change: Callable[[TrainState], TrainState],
  **event: object,
) -> None:
  """Copies a run as it was at a checkpoint and changes its state; training continues the copy.

  The change is an event of name "fault" in the copy's metrics.jsonl. Nothing is done if `target`
  is such a copy already, with the same event.

  Args:
    source: a run that has a checkpoint at `step`.
    target: a folder that does not exist yet, or that this function has made.
    step: optimizer steps taken.
    change: state -> state of the same structure.
    event: further fields of the event.

  Raises:
    UserError: no such run or checkpoint, or `target` holds another fault.
  """
  wanted = {"kind": "event", "step": step, "name": "fault", **event}
  if (target / "config.json").exists():
    _require_fault(target, wanted)
    return
  config, _ = run_folder.read_config(source)
  like = assemble(config, load_corpus(config)).abstract_state
  reader = Checkpointer(source)
  state, note = reader.restore(like, step)
  reader.close()
  if target.exists():  # Left half made.
    shutil.rmtree(target)
  target.mkdir(parents=True)
  kept = (source / "metrics.jsonl").read_bytes()[: note["metrics_bytes"]]
  content = kept + json.dumps(wanted).encode() + b"\n"
  (target / "metrics.jsonl").write_bytes(content)
  writer = Checkpointer(target, config.training.keep_checkpoints)
  writer.save(step, change(state), {**note, "metrics_bytes": len(content)})
  writer.wait()
  writer.close()
  if (source / run_folder.TOKENIZER).exists():
    shutil.copy(source / run_folder.TOKENIZER, target)
  shutil.copy(source / "config.json", target / "config.json")  # Last: the copy is complete.


def _require_fault(folder: pathlib.Path, wanted: dict[str, object]) -> None:
  found = read_run(folder).events_of("fault")
  if found != [wanted]:
    raise UserError(
      f"{folder} belongs to another fault: {json.dumps(found)}, not {json.dumps(wanted)}; use its "
      "values or another --workdir"
    )
