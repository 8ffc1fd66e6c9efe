"""How figures look: colours of Okabe and Ito (2008), safe for the colour-blind; PNG and SVG."""

import math
import os
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

# Without their yellow, which cannot be seen on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DOTS_PER_INCH = 150
# Inches. A legend needs the least; what is wider than the most is too small on a page.
_LEAST_WIDTH, _MOST_WIDTH = 6.0, 15.0
COLUMNS = 4  # layers side by side
_TICKS = [1, 2, 5, 10]
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


def make_folder(folder: pathlib.Path) -> None:
  """Raises UserError if the folder cannot be made or written to."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
  except OSError:
    writable = False
  if not writable:
    raise UserError(f"{folder}: cannot be written to; choose another folder, or allow it")


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
    width, height: of the figure, inches; at 150 dots per inch it is readable at half width. A
      narrow figure is made wide enough for a legend.
    **kwargs: of `plt.subplots`.
  """
  with plt.rc_context(_STYLE):
    size = (max(width, _LEAST_WIDTH), height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    try:
      yield figure, axes
      figure.savefig(path, dpi=DOTS_PER_INCH)
      figure.set_layout_engine("none")  # The SVG keeps the PNG's: finding it is half of the work.
      figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    finally:
      plt.close(figure)


@contextmanager
def layer_panels(
  kinds: int, layers: int, path: pathlib.Path, width: float, height: float, **kwargs: Any
) -> Iterator[tuple[Any, Any]]:
  """A figure with a panel for each kind and layer, [kinds, layers]; written as `panels` does.

  Four layers stand side by side; those that follow go below, all kinds of them.

  Args:
    kinds, layers: how many.
    path: of the PNG.
    width, height: of a panel, inches; the width is reduced where the figure would be too wide.
    **kwargs: of `plt.subplots`.
  """
  columns = min(layers, COLUMNS)
  blocks = math.ceil(layers / columns)
  size = (columns * min(width, _MOST_WIDTH / columns), height * kinds * blocks)
  with panels(kinds * blocks, columns, path, *size, **kwargs) as (figure, axes_RC):
    axes_KL = axes_RC.reshape(blocks, kinds, columns).swapaxes(0, 1).reshape(kinds, -1)
    for axes in axes_KL[:, layers:].flat:
      axes.axis("off")
    yield figure, axes_KL[:, :layers]


def colour(index: int) -> str:
  return COLOURS[index % len(COLOURS)]


def line_style(index: int) -> Any:
  """Another dash pattern for each round of the colours, so that 28 lines can be told apart."""
  return ["-", "--", ":", "-."][index // len(COLOURS) % 4]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Mean over the last `window` values, of fewer at the start; [S] or [S, ...]. NaN stays where
  it is in the window."""
  padded = np.concatenate([np.zeros((window, *values.shape[1:])), values.astype(np.float64)])
  sums = np.stack([padded[k : k + len(values)] for k in range(1, window + 1)]).sum(axis=0)
  counts = np.minimum(np.arange(1, len(values) + 1), window)
  return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def marker(values: np.ndarray) -> str | None:
  """A dot where there is no line to be seen: for fewer than two finite values."""
  return "o" if np.isfinite(values).sum() < 2 else None


def step_axis(axes: Any) -> None:
  """Training steps are whole numbers, in the shortest run, too."""
  axes.set_xlabel("training step")
  ticks = matplotlib.ticker.MaxNLocator(6, steps=_TICKS, integer=True, min_n_ticks=1)
  axes.xaxis.set_major_locator(ticks)


def log_axis(axes: Any) -> None:
  """A logarithmic y axis with a few plain numbers, 150 and 0.3; to be called when all is drawn."""
  axes.set_yscale("log")
  low, high = axes.get_ylim()
  ticks = matplotlib.ticker
  if high < 10.0 * low:
    axes.yaxis.set_major_locator(ticks.MaxNLocator(6, steps=_TICKS))
  else:
    axes.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_minor_locator(ticks.NullLocator())
  axes.yaxis.set_major_formatter(ticks.FuncFormatter(lambda value, _: f"{value:g}"))


def say(axes: Any, text: str) -> None:
  """A sentence in an empty panel, instead of ticks that count nothing."""
  axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")
  axes.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
  axes.grid(visible=False)


def legend(figure: Any, axes: Any) -> None:
  """One legend above all panels, from the lines of some; as many columns as its words leave."""
  by_label: dict[str, Any] = {}
  for panel in np.ravel(axes):
    handles, labels = panel.get_legend_handles_labels()
    by_label |= dict(zip(labels, handles, strict=True))
  if not by_label:
    return
  widest = 0.8 + 0.1 * max(map(len, by_label))  # inches, at 12 points
  columns = max(1, min(6, len(by_label), int(figure.get_figwidth() / widest)))
  figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=columns)


def draw_chance(axes: Any, level: float | None, named: bool = True) -> None:
  """A dashed line at what independent random experts score; none if the run does not know.

  Its name, if it is to have one, stands outside, on the right, where no curve is.
  """
  if level is None:
    return
  axes.axhline(level, color="0.35", linestyle="--", linewidth=1.2)
  if named:
    axes.annotate("chance", (1.01, level), xycoords=("axes fraction", "data"), va="center", size=10)
