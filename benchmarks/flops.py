"""Floating-point operations of the matrix products in a function, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """Operations (a multiplication and an addition are two) of all matrix products in one call.

  Loops count as often as they run, branches as their most expensive one. Everything that is no
  matrix product counts nothing, and neither does what hides in a custom kernel: trace a variant
  that has none, e.g. in float32.

  Args:
    function: traceable.
    arguments: arrays or ShapeDtypeStructs.

  Raises:
    ValueError: a loop whose number of turns is not known when it is traced.
  """
  return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(left[axis] for axis in contracted) * math.prod(result)
  if name == "cond":
    return max(_count(branch.jaxpr) for branch in parameters["branches"])
  inner = sum(_count(jaxpr) for jaxpr in _inner(parameters))
  if name == "while" and inner:
    raise ValueError("matrix products in a loop of unknown length; count one turn of it")
  return inner * (parameters["length"] if name == "scan" else 1)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
  """The jaxprs among an equation's parameters; of a custom derivative, the function itself."""
  found = []
  for value in parameters.values():
    for part in value if isinstance(value, tuple | list) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        found.append(part.jaxpr)
      elif isinstance(part, core.Jaxpr):
        found.append(part)
  return found
