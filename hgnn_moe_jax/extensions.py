"""Parts that users bring along: fields of the config may name them by import path.

`--config.model.coupler=my_project.couplers:Ring` takes `Ring` of the module my_project.couplers,
which Python must find: in the folder that the command runs in, or installed. The run folder keeps
the path, so evaluation, generation and analysis need the module, too. docs/extending.md has one
example per field.
"""

import importlib
import operator
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hgnn_moe_jax.errors import ConfigError

if TYPE_CHECKING:
  from hgnn_moe_jax.config import Config

# Field -> what it names.
FIELDS = {
  "model.coupler": "an operator over experts: module(config, name=...)(h_EBTD) -> P",
  "adaptive.controller": "a factory of controllers: (watch, actuator, schedule, strength, scaling)",
  "orthogonality.weight_form": "an overlap of weights: w_LEDK -> [L, E, E]",
  "orthogonality.output_form": "an overlap of updates: (centred_EBTD, shares_BT) -> [E, E]",
}


def fields(config: "Config") -> dict[str, str]:
  """The values that the config has in FIELDS."""
  return {field: operator.attrgetter(field)(config) for field in FIELDS}


def is_path(value: str) -> bool:
  """Whether a field's value is an import path and not one of this project's own names."""
  return ":" in value


def load(field: str, path: str) -> Callable[..., Any]:
  """What the import path names.

  Args:
    field: of FIELDS, for the message.
    path: "package.module:name".

  Raises:
    ConfigError: the module or the name is not there, or cannot be called.
  """
  module, _, name = path.partition(":")
  try:
    imported = importlib.import_module(module)
  except (ImportError, ValueError) as error:
    cure = f"{error}; run where Python finds the module, or install it"
    raise ConfigError(field, path, cure) from error
  found = getattr(imported, name, None)
  if found is None:
    raise ConfigError(field, path, f"{module} has no {name or 'empty name'}")
  if not callable(found):
    raise ConfigError(field, path, f"not callable; give {FIELDS[field]}")
  return found


def require_outside(folder: pathlib.Path, config: "Config") -> None:
  """Raises ConfigError if a module that a folder's config names lies in that folder.

  A run or an exported model may come from somebody else, and reading it must not run its code.

  Args:
    folder: that is read.
    config: found there, not validated: that would import the module.
  """
  folder = folder.resolve()
  for field, value in fields(config).items():
    if not isinstance(value, str) or not is_path(value):  # What is no text is told by `validate`.
      continue
    relative = value.partition(":")[0].replace(".", "/")
    for place in ((pathlib.Path(entry) / relative).resolve() for entry in sys.path):
      if not (place.is_dir() or any(place.parent.glob(f"{place.name}.*"))):
        continue
      if place.is_relative_to(folder):
        cure = f"the module lies in {folder}; if you trust it, move it out"
        raise ConfigError(field, value, cure)
      break  # Python takes the first.


def resolve(field: str, value: str) -> Any:
  """The value itself if it is one of the project's own names, else what it names."""
  return load(field, value) if is_path(value) else value
