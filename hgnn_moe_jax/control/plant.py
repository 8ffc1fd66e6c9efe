"""A bench for controllers: a plant that answers a strength as experts roughly do.

`python -m hgnn_moe_jax.control.plant` prints how every controller does on it. Use it to try gains
before they cost a training run; it knows nothing about language models.
"""

import functools
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
    noise: standard deviation of the measured score.
    clone_at: the step at which all experts become copies (overlap 0.9); -1 for never.
  """

  free_overlap: float = 0.6
  slope: float = 0.5
  time_constant: float = 200.0
  noise: float = 0.01
  clone_at: int = -1


class Trace(NamedTuple):
  """What happened in each step: true overlap before it, strength, emergency."""

  overlap_NT: jax.Array
  strength_NT: jax.Array
  emergency_NT: jax.Array


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


@functools.partial(jax.jit, static_argnames=("controller", "steps", "delay"))
def simulate(
  controller: Controller, plant: Plant, keys_N: jax.Array, steps: int, delay: int = 10
) -> Trace:
  """Runs a controller of one layer's weight strength on N copies of the plant.

  Args:
    controller: with num_layers = 1.
    plant: its numbers are traced: another plant is no new compilation.
    keys_N: random keys, of the noise.
    steps: T.
    delay: steps from a strength to its effect, at least 1.

  Returns:
    A Trace of arrays [N, T].
  """

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

  def run(key):
    noise_T = plant.noise * jax.random.normal(key, (steps,))
    start = (controller.init(), jnp.asarray(plant.free_overlap, jnp.float32), jnp.zeros(delay))
    return jax.lax.scan(step, start, (jnp.arange(steps), noise_T))[1]

  return jax.vmap(run)(keys_N)


@jax.jit
def response(trace: Trace, set_point: float) -> Response:
  """Measures the answers to a step from a trace's first overlap to the set-point; [N] each."""
  overlap_NT, strength_NT = trace.overlap_NT, trace.strength_NT
  steps = overlap_NT.shape[1]
  way_N1 = overlap_NT[:, :1] - set_point
  beyond_NT = (set_point - overlap_NT) / way_N1
  count_1T = jnp.arange(1, steps + 1)[None]
  rest_N = jnp.mean(beyond_NT[:, -(steps // 4) :], axis=1)
  return Response(
    overshoot=jnp.maximum(jnp.max(beyond_NT, axis=1), 0.0),
    settling=jnp.max(jnp.where(jnp.abs(beyond_NT) > 0.05, count_1T, 0), axis=1),
    steady_error=jnp.abs(rest_N),
    max_strength=jnp.max(strength_NT, axis=1),
    swing=jnp.ptp(strength_NT[:, -1000:], axis=1),
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
  entries: Mapping[str, Controller],
  plant: Plant,
  steps: int,
  seeds: int,
  set_point: float,
  delay: int = 10,
) -> dict[str, Response]:
  """Each controller's Response on the plant, for so many seeds of the noise."""
  keys = jax.random.split(jax.random.key(0), seeds)
  return {
    name: response(simulate(controller, plant, keys, steps, delay), set_point)
    for name, controller in entries.items()
  }


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
