"""The collapse drill: every expert becomes a copy of expert 0 in the middle of a real run.

python -m hgnn_moe_jax.analysis.collapse_drill --config=configs/collapse_drill.py

Five ways to set the strength of the penalty (ARMS) train the same run. Each is copied at the fault
step, its experts are made one, plus noise, and both the copy and the original train to the end. So
what the fault cost is a paired difference: same data, same order, same steps. The folders are
ordinary runs: stopped, the same command continues.

Writes WORKDIR/drill.json, drill.md and drill.png; WORKDIR/ARM and WORKDIR/ARM-fault are the runs.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis.runs import RunData, read_run
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.errors import ConfigError, UserError
from hgnn_moe_jax.training.records import write_json

ARMS: dict[str, dict[str, Any]] = {
  "none": {"adaptive.controller": "constant"},
  # The strength the adaptive arms start from.
  "constant": {"adaptive.controller": "constant", "orthogonality.output_strength": 0.1},
  "adaptive": {"adaptive.controller": "adaptive", "adaptive.emergency_boost": False},
  "adaptive_boost": {"adaptive.controller": "adaptive", "adaptive.emergency_boost": True},
  "feedback": {
    "adaptive.controller": "feedback",
    "adaptive.decay_schedule": "none",  # it would lower the set-point
    "adaptive.minimum_strength": 0.0,
  },
}
# What counts as recovered, as a share of the level before the fault.
_RECOVERED = 0.9
# Steps over which the level before the fault, and that of a moment after it, are averaged.
_BEFORE, _MOMENT = 50, 10
# A model on which 10,000 steps take minutes, for false alarms.
_SMALL = {
  **{"model.embed_dim": 32, "model.num_layers": 2, "model.num_heads": 2, "model.max_length": 32},
  **{"data.vocab_size": 512, "training.batch_size": 8, "training.steps_per_dispatch": 100},
  **{"evaluation.every": 2500},
}


class Outcome(NamedTuple):
  """What a fault did to one arm. Steps count from the fault; None: not in this run.

  Attributes:
    arm: name.
    detected: until the controller flagged an emergency in every layer.
    score_recovered: until the specialization was back at 90 % of its level before, in every layer.
    experts_recovered: the same of the effective number of experts.
    score_before, score_end: output specialization by layer, means over 50 steps.
    experts_before, experts_end: effective number of experts by layer, means over 50 steps.
    perplexity, healthy_perplexity: validation token perplexity at the end, with and without fault.
    false_alarms: emergencies in the run without fault.
  """

  arm: str
  detected: int | None
  score_recovered: int | None
  experts_recovered: int | None
  score_before: list[float]
  score_end: list[float]
  experts_before: list[float]
  experts_end: list[float]
  perplexity: float
  healthy_perplexity: float
  false_alarms: int


def drill(
  config: Config, workdir: pathlib.Path, arms: list[str], fault_step: int, noise: float
) -> list[Outcome]:
  """Trains what is missing and measures every arm.

  Args:
    config: of the run to damage; the arms change its controller only.
    workdir: where the runs go.
    arms: of ARMS.
    fault_step: below the run's length in steps.
    noise: of `faults.clone_experts`.

  Raises:
    UserError: an unknown arm, a fault after the end, or a folder with other runs than these; and
      all that training raises.
  """
  if unknown := [arm for arm in arms if arm not in ARMS]:
    raise UserError(f"--arms={unknown[0]}: unknown; use some of {','.join(ARMS)}")
  if not config.training.steps:
    raise ConfigError(
      "training.steps", 0, "a drill counts in steps; set it, and training.epochs to 0"
    )
  if not 0 < fault_step < config.training.steps:
    raise UserError(
      f"--fault_step={fault_step}: use a step before the end, "
      f"config.training.steps={config.training.steps}"
    )
  return [_arm(config, workdir, arm, fault_step, noise) for arm in arms]


def _arm(config: Config, workdir: pathlib.Path, arm: str, fault_step: int, noise: float) -> Outcome:
  from hgnn_moe_jax.analysis import faults

  config = with_fields(config, {**ARMS[arm], "name": arm})
  config.training.checkpoint_every = fault_step
  config.training.keep_checkpoints = config.training.steps  # all of them: the fault's is one
  config.training.log_every = 1  # records are counted as steps
  healthy, damaged = workdir / arm, workdir / f"{arm}-fault"
  _finish(config, healthy)
  faults.fork(
    healthy, damaged, fault_step, lambda state: faults.clone_experts(state, noise), noise=noise
  )
  _finish(config, damaged)
  return measure(arm, read_run(healthy), read_run(damaged))


def _finish(config: Config, folder: pathlib.Path) -> None:
  """Trains what is missing of the config's run; raises UserError if the folder has another one."""
  from hgnn_moe_jax.training import loop, run_folder

  if (folder / "summary.json").exists():
    run_folder.require_same(folder, config)
  else:
    loop.train(config, folder, quiet=True)


def measure(arm: str, healthy: RunData, damaged: RunData) -> Outcome:
  """Compares a run with its damaged copy."""
  fault_step = damaged.events_of("fault")[0]["step"]
  before = (damaged.train["step"] > fault_step - _BEFORE) & (damaged.train["step"] <= fault_step)
  after = damaged.train["step"] > fault_step
  score, experts = damaged.train["output_specialization"], damaged.train["effective_experts"]
  alarms = {}
  for event in damaged.events_of("emergency_on"):
    if event["step"] > fault_step:
      alarms.setdefault(event["layer"], event["step"] - fault_step)
  complete = len(alarms) == damaged.config.model.num_layers
  assert healthy.summary is not None and damaged.summary is not None
  return Outcome(
    arm=arm,
    detected=max(alarms.values()) if complete else None,
    score_recovered=_recovery(score[after], score[before].mean(axis=0)),
    experts_recovered=_recovery(experts[after], experts[before].mean(axis=0)),
    score_before=score[before].mean(axis=0).tolist(),
    score_end=score[-_BEFORE:].mean(axis=0).tolist(),
    experts_before=experts[before].mean(axis=0).tolist(),
    experts_end=experts[-_BEFORE:].mean(axis=0).tolist(),
    perplexity=damaged.summary["last"]["token_perplexity"],
    healthy_perplexity=healthy.summary["last"]["token_perplexity"],
    false_alarms=len(healthy.events_of("emergency_on")),
  )


def _recovery(values_SL: np.ndarray, before_L: np.ndarray) -> int | None:
  """Steps until the mean of the last few values is at 90 % of the level before in every layer."""
  for last in range(_MOMENT, len(values_SL) + 1):
    if np.all(values_SL[last - _MOMENT : last].mean(axis=0) >= _RECOVERED * before_L):
      return last
  return None


def false_alarms(config: Config, workdir: pathlib.Path, arm: str, steps: int) -> dict[str, Any]:
  """Emergencies in so many healthy steps of a small model under the arm's controller."""
  changes = {**ARMS[arm], **_SMALL, "name": f"{arm}-healthy", "training.steps": steps}
  config = with_fields(config, {**changes, "training.checkpoint_every": 1000})
  _finish(config, workdir / config.name)
  run = read_run(workdir / config.name)
  return {"arm": arm, "steps": steps, "false_alarms": len(run.events_of("emergency_on"))}


def table(outcomes: list[Outcome]) -> str:
  """The outcomes as a Markdown table."""
  lines = [
    "| arm | detected | score recovered | experts recovered | score before, end "
    "| experts before, end | perplexity, healthy → fault | false alarms |",
    "|---|---|---|---|---|---|---|---|",
  ]
  steps = lambda n: "no" if n is None else str(n)  # noqa: E731
  levels = lambda a, digits: "/".join(f"{x:.{digits}f}" for x in a)  # noqa: E731
  for o in outcomes:
    cost = 100.0 * (o.perplexity / o.healthy_perplexity - 1.0)
    lines.append(
      f"| {o.arm} | {steps(o.detected)} | {steps(o.score_recovered)} "
      f"| {steps(o.experts_recovered)} | {levels(o.score_before, 3)}, {levels(o.score_end, 3)} "
      f"| {levels(o.experts_before, 2)}, {levels(o.experts_end, 2)} "
      f"| {o.healthy_perplexity:.1f} → {o.perplexity:.1f} ({cost:+.1f} %) | {o.false_alarms} |"
    )
  return "\n".join(lines) + "\n"


def main() -> None:
  """The command."""
  given_config = cli.define_config()
  folder = flags.DEFINE_string("workdir", "runs/collapse_drill", "Folder of the drill's runs.")
  given_arms = flags.DEFINE_list("arms", list(ARMS), "Which arms, of " + ", ".join(ARMS) + ".")
  fault_step = flags.DEFINE_integer("fault_step", 300, "Steps before the fault.", 1)
  noise = flags.DEFINE_float("noise", 0.01, "Noise on the copies, as a share of the RMS weight.", 0)
  healthy_steps = flags.DEFINE_integer(
    "healthy_steps", 0, "Also train a small model so long, without fault, and count alarms.", 0
  )

  def run(argv: list[str]) -> None:
    cli.refuse_words(argv)
    # Early: a missing matplotlib is told before training.
    from hgnn_moe_jax.analysis import figures

    config, workdir = cli.validated(given_config.value), pathlib.Path(folder.value)
    arms = given_arms.value
    outcomes = drill(config, workdir, arms, fault_step.value, noise.value)
    healthy = [
      false_alarms(config, workdir, arm, healthy_steps.value)
      for arm in arms
      if healthy_steps.value and ARMS[arm]["adaptive.controller"] != "constant"
    ]
    content = {"fault_step": fault_step.value, "noise": noise.value, "healthy": healthy}
    write_json(workdir / "drill.json", {**content, "arms": [o._asdict() for o in outcomes]})
    (workdir / "drill.md").write_text(table(outcomes))
    damaged = {arm: read_run(workdir / f"{arm}-fault") for arm in arms}
    figures.collapse_drill(damaged, fault_step.value, workdir / "drill.png")
    print(table(outcomes), end="")
    for h in healthy:
      print(
        f"{h['arm']}: {h['false_alarms']} false alarms in {h['steps']:,} steps of a small model"
      )

  cli.start(run)


if __name__ == "__main__":
  main()
