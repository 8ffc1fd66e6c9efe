"""How figures look: colours of Okabe and Ito (2008), safe for the colour-blind; PNG and SVG."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hgnn_moe_jax.errors import UserError

try:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  import matplotlib.ticker
except ImportError:
  raise UserError("figures need matplotlib: pip install 'hgnn_moe_jax[analysis]'") from None

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
_STYLE: Any = {
  "font.size": 12,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.alpha": 0.25,
  "legend.frameon": False,
  "figure.constrained_layout.use": True,
  "svg.fonttype": "none",  # text stays text: small files, and searchable
  "svg.hashsalt": "hgnn_moe_jax",  # the same figure gives the same file
}


@contextmanager
def panels(
  rows: int,
  columns: int,
  path: pathlib.Path,
  width: float = 8.0,
  height: float = 4.5,
  **kwargs: Any,
) -> Iterator[tuple[Any, Any]]:
  """A figure and its axes, [rows, columns]; on leaving, `path` and the SVG beside it are written.

  Args:
    rows, columns: of panels.
    path: of the PNG.
    width, height: of the figure, inches; at 150 dots per inch it is readable at half width.
    **kwargs: of `plt.subplots`.
  """
  with plt.rc_context(_STYLE):
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **kwargs)
    try:
      yield figure, axes
      path.parent.mkdir(parents=True, exist_ok=True)
      figure.savefig(path, dpi=150)
      figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    finally:
      plt.close(figure)


def colour(index: int) -> str:
  return COLOURS[index % len(COLOURS)]


def line_style(index: int) -> Any:
  """Another dash pattern for each round of the colours, so that 16 lines can be told apart."""
  return ["-", "--", ":", "-."][index // len(COLOURS) % 4]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the last `window` values, of fewer at the start; [S] or [S, ...]. NaN stays where
  it is in the window."""
  padded = np.concatenate([np.zeros((window, *values.shape[1:])), values.astype(np.float64)])
  sums = np.stack([padded[k : k + len(values)] for k in range(1, window + 1)]).sum(axis=0)
  counts = np.minimum(np.arange(1, len(values) + 1), window)
  return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def plain_numbers(axes: Any) -> None:
  """150 and 0.3 on a logarithmic axis, not powers of ten."""
  for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
    which(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def draw_chance(axes: Any, level: float | None) -> None:
  """A dashed line at what independent random experts score; none if the run does not know."""
  if level is not None:
    axes.axhline(level, color="0.35", linestyle="--", linewidth=1.2)
    axes.annotate(
      "chance", (0.005, level), xycoords=("axes fraction", "data"), va="bottom", size=10
    )
