"""The adaptive law: base times schedule, depth, performance and emergency, layer by layer."""

from hgnn_moe_jax.control import laws
from hgnn_moe_jax.control.base import Controller, Schedule
from hgnn_moe_jax.control.supervision import Actuator, Watch, product, supervise


def adaptive(
  watch: Watch,
  actuator: Actuator,
  schedule: Schedule,
  initial_strength: float = 0.1,
  deeper_layer_scaling: float = 0.8,
  performance_aware: bool = True,
  adaptation_frequency: int = 50,
  gain: float = 0.004,
  max_change: float = 1.5,
  limit: float = 4.0,
  convergence_decay: float = 0.0005,
  relaxation_floor: float = 0.5,
  relaxation_steps: int = 500,
  emergency_boost: bool = True,
  boost_multiplier: float = 2.0,
) -> Controller:
  """strength_l(t) = clip(base schedule(t) scaling^l performance_l(t) emergency_l(t), min, max).

  performance_l = tracking_l x relaxation: the first moves the layer's score to its target (see
  `laws.tracking`), the second lowers all strengths while the validation loss is on a plateau (see
  `laws.relaxation`). In an emergency the layer is boosted and not relaxed, so a plateau and a
  collapse at the same time do not cancel. Only the state of these factors is remembered: the base
  is what it was at the start.

  Args:
    watch: what is seen, with target and tolerance; `supervision.make_watch`.
    actuator: which penalties, and the bounds; `supervision.make_actuator`.
    schedule: step -> factor, e.g. `schedules.decay`.
    initial_strength: the base, above 0.
    deeper_layer_scaling: in (0, 1].
    performance_aware: whether performance_l acts; else it is 1.
    adaptation_frequency: steps between two changes of tracking_l, at least 1.
    gain: of tracking_l: change of log strength per unit of score and step, above 0.
    max_change: largest factor of one change of tracking_l, above 1.
    limit: tracking_l stays in [1 / limit, limit]; above 1.
    convergence_decay: fall of log tracking_l per step where the layer has converged, in [0, 1).
    relaxation_floor: smallest relaxation, in (0, 1]; 1 for none.
    relaxation_steps: steps from 1 to the floor, and back, at least 1.
    emergency_boost: whether emergency_l acts; else it is 1. Collapses are flagged all the same.
    boost_multiplier: emergency_l during an emergency, at least 1.

  Returns:
    A Controller whose state is a SupervisedState.

  Raises:
    ValueError: a parameter is outside its range.
  """
  plan = laws.planned(schedule, watch.num_layers, initial_strength, deeper_layer_scaling)
  performance = product(
    laws.tracking(watch, adaptation_frequency, gain, max_change, limit, convergence_decay),
    laws.relaxation(lambda sight: sight.plateau, relaxation_floor, relaxation_steps),
  )
  emergency = laws.boost(boost_multiplier if emergency_boost else 1.0)
  law = product(plan, performance, emergency) if performance_aware else product(plan, emergency)
  return supervise(law, watch, actuator)
