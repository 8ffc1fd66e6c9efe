"""A bench for controllers: a plant that answers a strength as experts roughly do.

`python -m hgnn_moe_jax.control.plant` prints how every controller does on it. Use it to try gains
before they cost a training run; it knows nothing about language models.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hgnn_moe_jax.control import schedules, strategies
from hgnn_moe_jax.control.adaptive import adaptive
from hgnn_moe_jax.control.base import Controller, Observation
from hgnn_moe_jax.control.feedback import feedback
from hgnn_moe_jax.control.supervision import make_actuator, make_watch


class Plant(NamedTuple):
  """First order with delay and noise, one layer.

    overlap += (free_overlap - slope strength_{t - delay} - overlap) / time_constant
    score = 1 - (overlap + noise N(0, 1))

  The true overlap stays in [0, 1]. The effective number of experts is 1 + 3 (1 - overlap).

  Attributes:
    free_overlap: where it rests without a constraint, and where it starts.
    slope: how much lower it rests per unit of strength.
    time_constant: in steps.
    delay: in steps, at least 1.
    noise: standard deviation of the measured score.
    clone_at: the step at which all experts become copies (overlap 0.9); -1 for never.
  """

  free_overlap: float = 0.6
  slope: float = 0.5
  time_constant: float = 200.0
  delay: int = 10
  noise: float = 0.01
  clone_at: int = -1


class Trace(NamedTuple):
  """What happened, per step: true overlap (before the step), strength, emergency."""

  overlap_T: jax.Array
  strength_T: jax.Array
  emergency_T: jax.Array


class Response(NamedTuple):
  """How a controller brought the overlap from where it was free to its set-point.

  Attributes:
    overshoot: furthest excursion below the set-point, as a share of the way.
    settling: steps until the overlap stays within 5 % of the way; the length of the run if never.
    steady_error: |mean overlap of the last quarter - set-point|, as a share of the way.
    max_strength: largest strength.
    swing: largest minus smallest strength of the last 1,000 steps.
  """

  overshoot: jax.Array
  settling: jax.Array
  steady_error: jax.Array
  max_strength: jax.Array
  swing: jax.Array


def simulate(controller: Controller, plant: Plant, steps: int, key: jax.Array) -> Trace:
  """Runs a controller of one layer's weight strength; `key` is for the noise and may be mapped."""

  def step(carry, xs):
    (control, overlap, pipeline), (t, noise) = carry, xs
    strength = controller.strengths(control).weight_L[0]
    measured = 1.0 - overlap - noise
    observation = Observation(
      step=t,
      weight_specialization_L=measured[None],
      output_specialization_L=measured[None],
      effective_experts_L=1.0 + 3.0 * (1.0 - overlap[None]),
      lm_loss=jnp.ones(()),
    )
    trace = Trace(overlap, strength, controller.flags(control).emergency_L[0])
    rest = plant.free_overlap - plant.slope * pipeline[0]
    overlap = jnp.clip(overlap + (rest - overlap) / plant.time_constant, 0.0, 1.0)
    overlap = jnp.where(t + 1 == plant.clone_at, 0.9, overlap)
    pipeline = jnp.append(pipeline[1:], strength)
    return (controller.update(control, observation), overlap, pipeline), trace

  start = (controller.init(), jnp.asarray(plant.free_overlap), jnp.zeros(plant.delay))
  noise_T = plant.noise * jax.random.normal(key, (steps,))
  return jax.lax.scan(step, start, (jnp.arange(steps), noise_T))[1]


def response(trace: Trace, set_point: float) -> Response:
  """Measures the answer to a step from the first overlap of the trace to the set-point."""
  overlap_T, strength_T = trace.overlap_T, trace.strength_T
  steps = overlap_T.shape[0]
  way = overlap_T[0] - set_point
  outside_T = jnp.abs(overlap_T - set_point) > 0.05 * way
  last = strength_T[-1000:]
  return Response(
    overshoot=jnp.maximum(set_point - jnp.min(overlap_T), 0.0) / way,
    settling=jnp.max(jnp.where(outside_T, jnp.arange(steps) + 1, 0)),
    steady_error=jnp.abs(jnp.mean(overlap_T[-(steps // 4) :]) - set_point) / way,
    max_strength=jnp.max(strength_T),
    swing=jnp.max(last) - jnp.min(last),
  )


def controllers(target: float = 0.7) -> dict[str, Controller]:
  """One of each kind for the default plant, on which 0.6 is the strength that holds 0.7.

  All but `feedback` begin at half of that; the schedule is constant, or the set-point would move.
  """
  watch = make_watch(num_layers=1, target=target)
  actuator = make_actuator(minimum=0.0, maximum=2.0)
  schedule = schedules.constant_schedule()
  return {
    "scheduled": strategies.scheduled(watch, actuator, schedule, 0.3),
    "adaptive": adaptive(watch, actuator, schedule, 0.3),
    "feedback": feedback(watch, actuator, schedule),
    "convergence": strategies.convergence(watch, actuator, schedule, 0.3),
    "performance": strategies.performance(watch, actuator, schedule, 0.3),
  }


def bench(
  entries: Mapping[str, Controller], plant: Plant, steps: int, seeds: int, set_point: float
) -> dict[str, Response]:
  """Each controller's Response on the plant, with an axis of `seeds` in each of its fields."""
  keys = jax.random.split(jax.random.key(0), seeds)

  def run(controller: Controller) -> Response:
    return jax.jit(
      jax.vmap(lambda key: response(simulate(controller, plant, steps, key), set_point))
    )(keys)

  return {name: run(controller) for name, controller in entries.items()}


def table(results: Mapping[str, Response]) -> str:
  """The means over the seeds, as a Markdown table."""
  lines = [
    "| controller | overshoot | settling (5 % band) | steady-state error | max strength |",
    "|---|---|---|---|---|",
  ]
  for name, result in results.items():
    mean = jax.tree.map(lambda a: float(jnp.mean(a)), result)
    lines.append(
      f"| {name} | {mean.overshoot:.1%} | {mean.settling:.0f} steps | {mean.steady_error:.1%} "
      f"| {mean.max_strength:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(table(bench(controllers(), Plant(), steps=8000, seeds=5, set_point=0.3)))
