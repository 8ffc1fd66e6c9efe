"""Simpler controllers from the same pieces: a schedule alone, similarity, language-model loss.

`convergence` and `performance` are the two strategies of the phase-2 plan: the similarity of the
experts drives the strength, or the loss of the language model does.
"""

from hgnn_moe_jax.control import laws
from hgnn_moe_jax.control.base import Controller, Schedule
from hgnn_moe_jax.control.supervision import Actuator, Watch, product, supervise


def scheduled(
  watch: Watch,
  actuator: Actuator,
  schedule: Schedule,
  initial_strength: float = 0.1,
  deeper_layer_scaling: float = 0.8,
) -> Controller:
  """strength_l(t) = clip(base schedule(t) scaling^l, minimum, maximum): open loop.

  The watch only raises flags. Parameters as in `adaptive.adaptive`.

  Raises:
    ValueError: a parameter is outside its range.
  """
  plan = laws.planned(schedule, watch.num_layers, initial_strength, deeper_layer_scaling)
  return supervise(plan, watch, actuator)


def convergence(
  watch: Watch,
  actuator: Actuator,
  schedule: Schedule,
  initial_strength: float = 0.1,
  deeper_layer_scaling: float = 0.8,
  sensitivity: float = 1.0,
  limit: float = 4.0,
  emergency_boost: bool = True,
  boost_multiplier: float = 2.0,
) -> Controller:
  """strength_l = clip(base schedule scaling^l ((1 - score_l) / (1 - target))^sensitivity boost_l).

  The more alike the experts, the stronger the constraint: base strength at the target, more below
  it, less above it. See `laws.similarity`.

  Args:
    watch: what is seen; its target is below 1.
    actuator, schedule, initial_strength, deeper_layer_scaling, emergency_boost, boost_multiplier:
      as in `adaptive.adaptive`.
    sensitivity: exponent, above 0.
    limit: the similarity's factor stays in [1 / limit, limit]; above 1.

  Raises:
    ValueError: a parameter is outside its range.
  """
  law = product(
    laws.planned(schedule, watch.num_layers, initial_strength, deeper_layer_scaling),
    laws.similarity(watch, sensitivity, limit),
    laws.boost(boost_multiplier if emergency_boost else 1.0),
  )
  return supervise(law, watch, actuator)


def performance(
  watch: Watch,
  actuator: Actuator,
  schedule: Schedule,
  initial_strength: float = 0.1,
  deeper_layer_scaling: float = 0.8,
  relaxation_floor: float = 0.25,
  relaxation_steps: int = 500,
  emergency_boost: bool = True,
  boost_multiplier: float = 2.0,
) -> Controller:
  """strength_l = clip(base schedule scaling^l relaxation boost_l), led by the training loss.

  relaxation falls from 1 to its floor while the language model's loss stalls or rises (no
  improvement in the watch's performance_window) and returns to 1 while it falls. See
  `laws.relaxation`.

  Args:
    watch, actuator, schedule, initial_strength, deeper_layer_scaling, emergency_boost,
      boost_multiplier: as in `adaptive.adaptive`.
    relaxation_floor: in (0, 1].
    relaxation_steps: from 1 to the floor, and back, at least 1.

  Raises:
    ValueError: a parameter is outside its range.
  """
  law = product(
    laws.planned(schedule, watch.num_layers, initial_strength, deeper_layer_scaling),
    laws.relaxation(lambda sight: sight.stalled, relaxation_floor, relaxation_steps),
    laws.boost(boost_multiplier if emergency_boost else 1.0),
  )
  return supervise(law, watch, actuator)
