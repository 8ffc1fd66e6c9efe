"""What a config must hold to be a run: the values of each field, and of fields that go together.

The field that cannot work is named with its value and what to do about it. Fields and their
defaults are in `config`.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, cast

from hgnn_moe_jax import extensions
from hgnn_moe_jax.errors import ConfigError

if TYPE_CHECKING:
  from hgnn_moe_jax.config import Config

COUPLERS = ("graph", "hypergraph", "mean", "matrix", "attention")
SOURCES = ("sotu", "text", "json", "parquet", "hf", "tfds")
TOKENIZERS = ("gpt2", "bpe", "bytes")
# adaptive: schedule x depth x performance x emergency. schedule: schedule x depth. feedback: nuPI
# on the score. convergence, performance: similarity, or the training loss, sets the strength.
CONTROLLERS = ("constant", "schedule", "adaptive", "feedback", "convergence", "performance")

_CHOICES = {
  "model.coupler": COUPLERS,
  "model.hypergraph_normalization": ("symmetric", "row"),
  "model.pooling": ("mean", "gate"),
  "model.positions": ("learned", "rotary"),
  "model.compute_dtype": ("auto", "float32", "bfloat16"),
  "data.source": SOURCES,
  "data.rows": ("documents", "lines"),
  "data.protocol": ("packed", "lines"),
  "data.placement": ("auto", "device", "host"),
  "orthogonality.weight_target": ("ffn_input", "ffn_output", "attention", "combined"),
  "orthogonality.weight_form": ("gram", "spectral"),
  "orthogonality.output_form": ("cosine", "covariance"),
  "adaptive.controller": CONTROLLERS,
  "adaptive.signal": ("weight", "output"),
  "adaptive.objective": ("weight", "output", "both"),
  "adaptive.decay_schedule": ("cosine", "exponential", "linear", "step", "none"),
  "training.optimizer": ("adamw", "muon"),
  "training.schedule": ("cosine", "wsd", "constant"),
}

_RANGES = {
  "model.embed_dim": (1, math.inf),
  "model.num_layers": (1, math.inf),
  "model.num_heads": (1, math.inf),
  "model.num_experts": (1, math.inf),
  "model.ffn_multiplier": (1, math.inf),
  "model.selected_experts": (0, math.inf),
  "model.balance_strength": (0.0, math.inf),
  "model.coupler_layers": (1, math.inf),
  "model.dropout": (0.0, 0.99),
  "model.max_length": (2, math.inf),
  "model.unrolled_layers": (1, math.inf),
  "data.vocab_size": (258, math.inf),
  "data.split_seed": (0, math.inf),
  "orthogonality.weight_strength": (0.0, math.inf),
  "orthogonality.output_strength": (0.0, math.inf),
  "orthogonality.subspace_rank": (1, math.inf),
  "orthogonality.warmup_steps": (0, math.inf),
  "adaptive.initial_strength": (1e-9, math.inf),
  "adaptive.minimum_strength": (0.0, math.inf),
  "adaptive.maximum_strength": (1e-9, math.inf),
  "adaptive.decay_floor": (1e-6, 1.0),
  "adaptive.adaptation_frequency": (1, math.inf),
  "adaptive.target_specialization": (0.01, 0.9999),
  "adaptive.specialization_tolerance": (1e-6, 0.5),
  "adaptive.deeper_layer_scaling": (0.01, 1.0),
  "adaptive.pair_emphasis": (0.0, 10.0),
  "adaptive.performance_window": (1, math.inf),
  "adaptive.collapse_threshold": (0.001, 0.9999),
  "adaptive.boost_multiplier": (1.0, math.inf),
  "adaptive.emergency_window": (10, math.inf),
  "adaptive.emergency_grace": (0, math.inf),
  "adaptive.integral_gain": (1e-9, math.inf),
  "adaptive.proportional_gain": (0.0, math.inf),
  "adaptive.error_filtering": (0.0, 0.9999),
  "training.steps": (0, math.inf),
  "training.epochs": (0.0, math.inf),
  "training.batch_size": (1, math.inf),
  "training.accumulation": (1, math.inf),
  "training.learning_rate": (0.0, math.inf),
  "training.warmup_steps": (0, math.inf),
  "training.decay_fraction": (0.0, 1.0),
  "training.final_learning_rate": (0.0, math.inf),
  "training.weight_decay": (0.0, math.inf),
  "training.beta1": (0.0, 0.9999),
  "training.beta2": (0.0, 0.999999),
  "training.clip_norm": (0.0, math.inf),
  "training.ema_decay": (0.0, 0.999999),
  "training.steps_per_dispatch": (1, math.inf),
  "training.log_every": (1, math.inf),
  "training.checkpoint_every": (1, math.inf),
  "training.keep_checkpoints": (1, math.inf),
  "evaluation.every": (1, math.inf),
  "evaluation.batch_size": (0, math.inf),
  "evaluation.stride": (0, math.inf),
  "mesh.data": (0, math.inf),
  "mesh.expert": (1, math.inf),
  "mesh.model": (1, math.inf),
}


_OF_HYPERGRAPHS = ("hyperedges", "hypergraph_normalization", "hyperedge_attention")


def check(config: "Config") -> None:
  """Raises ConfigError on the first field of this config that cannot work."""
  _require_types(config)
  if not 0 <= config.seed < 2**32:
    raise ConfigError("seed", config.seed, "use a value in [0, 2**32)")
  for field, choices in _CHOICES.items():
    value = _value(config, field)
    if field in extensions.FIELDS and extensions.is_path(value):
      extensions.load(field, value)
    elif value not in choices:
      raise ConfigError(field, value, f"use one of {', '.join(choices)}")
  for field, (low, high) in _RANGES.items():
    value = _value(config, field)
    if not (math.isfinite(value) and low <= value <= high):
      bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
      raise ConfigError(field, value, f"use a value {bounds}")
  _check_model(config)
  _check_control(config)
  _check_data(config)
  _check_training(config)
  _check_mesh(config)


def idle(config: "Config") -> list[str]:
  """A line for each field that is not as by default and does nothing in this config.

  No errors: a sweep over couplers keeps their hyperedges, and old run folders can still be read.
  """
  m = config.model
  if m.coupler not in COUPLERS or m.coupler == "hypergraph":  # One brought along may read them.
    return []
  return [
    f"model.{field.name}={getattr(m, field.name)!r} does nothing: model.coupler={m.coupler}"
    for field in dataclasses.fields(m)
    if field.name in _OF_HYPERGRAPHS and getattr(m, field.name) != field.default
  ]


def _require_types(config: Any, prefix: str = "") -> None:
  """Command-line values are converted and checked by their flags; those in a file are not."""
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), cast(type, field.type)
    if dataclasses.is_dataclass(kind):
      _require_types(value, f"{field.name}.")
    elif type(value) is not kind and not (kind is float and type(value) is int):
      raise ConfigError(prefix + field.name, value, f"use a value of type {kind.__name__}")


def _value(config: "Config", field: str) -> Any:
  group, name = field.split(".")
  return getattr(getattr(config, group), name)


def _check_model(config: "Config") -> None:
  m, o = config.model, config.orthogonality
  if m.embed_dim % m.num_heads:
    raise ConfigError(
      "model.num_heads", m.num_heads, f"use a divisor of model.embed_dim={m.embed_dim}"
    )
  if m.selected_experts > m.num_experts:
    raise ConfigError(
      "model.selected_experts",
      m.selected_experts,
      f"use at most model.num_experts={m.num_experts}, or 0 for all of them",
    )
  if m.positions == "rotary" and (m.embed_dim // m.num_heads) % 2:
    raise ConfigError(
      "model.positions",
      m.positions,
      f"rotary needs an even head size, not {m.embed_dim // m.num_heads}",
    )
  if m.coupler == "hypergraph":
    m.hyperedge_list()
  if o.weight_form == "spectral" and o.subspace_rank >= m.embed_dim:
    raise ConfigError(
      "orthogonality.subspace_rank", o.subspace_rank, f"use less than embed_dim={m.embed_dim}"
    )
  if m.num_experts == 1 and any(config.penalties()):
    raise ConfigError(
      "model.num_experts",
      1,
      "orthogonality needs two experts; set both strengths to 0 and adaptive.controller=constant",
    )


def _check_control(config: "Config") -> None:
  a, o = config.adaptive, config.orthogonality
  if a.controller == "constant":
    if a.pair_emphasis:
      raise ConfigError(
        "adaptive.pair_emphasis",
        a.pair_emphasis,
        "set it to 0: adaptive.controller=constant adapts nothing",
      )
    return
  if a.minimum_strength > a.maximum_strength:
    raise ConfigError(
      "adaptive.minimum_strength",
      a.minimum_strength,
      f"use at most adaptive.maximum_strength={a.maximum_strength}",
    )
  if a.specialization_tolerance >= a.target_specialization:
    raise ConfigError(
      "adaptive.specialization_tolerance",
      a.specialization_tolerance,
      f"use less than adaptive.target_specialization={a.target_specialization}",
    )
  driven = {"weight": ("weight",), "output": ("output",), "both": ("weight", "output")}
  for name in driven[a.objective]:
    if strength := getattr(o, f"{name}_strength"):
      raise ConfigError(
        f"orthogonality.{name}_strength",
        strength,
        f"set it to 0: adaptive.controller={a.controller} drives this penalty",
      )


def _check_data(config: "Config") -> None:
  d = config.data
  if d.tokenizer not in TOKENIZERS and not d.tokenizer.endswith(".json"):
    raise ConfigError(
      "data.tokenizer",
      d.tokenizer,
      f"use {', '.join(TOKENIZERS)} or the path of a tokenizer.json",
    )
  if d.source != "sotu" and not d.path:
    what = "the data set's name" if d.source in ("hf", "tfds") else "a file or a folder"
    raise ConfigError("data.path", d.path, f"data.source={d.source} needs {what}")
  if config.evaluation.stride > config.model.max_length:
    raise ConfigError(
      "evaluation.stride",
      config.evaluation.stride,
      f"use at most model.max_length={config.model.max_length}",
    )
  if config.evaluation.stride and d.protocol == "lines":
    raise ConfigError(
      "evaluation.stride", config.evaluation.stride, "a sliding context needs data.protocol=packed"
    )


def _check_training(config: "Config") -> None:
  t = config.training
  if t.steps and t.epochs:
    raise ConfigError(
      "training.steps", t.steps, f"training.epochs={t.epochs} says otherwise; set one of them to 0"
    )
  if not t.steps and not t.epochs:
    raise ConfigError("training.steps", 0, "set it or training.epochs: how long is the run?")
  if t.batch_size % t.accumulation:
    raise ConfigError(
      "training.accumulation",
      t.accumulation,
      f"use a divisor of training.batch_size={t.batch_size}",
    )


def _check_mesh(config: "Config") -> None:
  for field, size, divided in (
    ("mesh.expert", config.mesh.expert, "model.num_experts"),
    ("mesh.model", config.mesh.model, "model.num_heads"),
  ):
    if (whole := getattr(config.model, divided.removeprefix("model."))) % size:
      raise ConfigError(field, size, f"use a divisor of {divided}={whole}")
