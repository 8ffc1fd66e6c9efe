"""A run in the terminal, live or finished: `python -m hgnn_moe_jax.analysis.watch RUN`.

Reads the run folder every two seconds until the run is finished. Ctrl-C leaves; the run goes on.
Where the output is no terminal, it is printed once.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis import timing
from hgnn_moe_jax.analysis.answer import at_the_end
from hgnn_moe_jax.analysis.runs import RunData, read_run
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training.progress import clock

_SECONDS = 2.0
_BARS = " ▁▂▃▄▅▆▇█"
_EVENTS = 6


def sparkline(values: np.ndarray, width: int) -> str:
  """The values, oldest left, as one line of bars between their extremes; not finite: a space.

  More values than `width` are averaged in groups.
  """
  values = np.asarray(values, np.float64)
  if len(values) > width:
    values = np.array([part.mean() for part in np.array_split(values, width)])
  finite = values[np.isfinite(values)]
  if not len(finite):
    return " " * len(values)
  low, span = finite.min(), np.ptp(finite)
  shares = (values - low) / span if span > 0.0 else np.where(np.isfinite(values), 0.5, np.nan)
  return "".join(_BARS[1 + int(7.999 * s)] if np.isfinite(s) else " " for s in shares)


def view(run: RunData, width: int) -> Group:
  """What is shown of a run: progress, losses, layers, events.

  Args:
    run: as it is now.
    width: of the terminal, in characters.
  """
  return Group(_head(run), _losses(run, width), _layers(run), _events(run))


def _head(run: RunData) -> Panel:
  step = int(run.train["step"][-1])
  share = step / run.total_steps
  filled = round(30 * share)
  bar = "━" * filled + "╌" * (30 - filled)
  parts = [f"{bar} {share:.0%}", f"step {step:,}/{run.total_steps:,}"]
  speed = None
  if not run.lacks(*timing.NEEDS):
    speed = float(np.median(run.train["tokens_per_second"][-50:]))
    parts.append(f"{speed:,.0f} tokens/s")
  if run.summary is not None:
    parts.append(f"finished in {run.summary['train_seconds']:.0f} s")
  elif run.events_of("non_finite"):
    parts.append("stopped: not finite")
  elif speed is not None:
    per_step = float(np.median(run.train["tokens"][-50:])) / max(speed, 1e-9)
    parts.append(f"{clock(per_step * (run.total_steps - step))} left at this speed")
  return Panel(Text("  ".join(parts)), title=f"{run.config.name}, seed {run.config.seed}")


def _losses(run: RunData, width: int) -> Panel:
  # Logarithms: most of a run is in the last tenth of its loss.
  lines = [
    f"{name}  {run.train[field][-1]:8.3f}  {sparkline(np.log(run.train[field]), width - 24)}"
    for name, field in {"loss": "lm_loss", "grad": "grad_norm"}.items()
    if not run.lacks(field)
  ]
  if run.evaluations:
    last = run.evaluations[-1]
    lines.append(
      f"validation at step {last['step']}: token perplexity {last['token_perplexity']:.2f}, "
      f"word perplexity {last['word_perplexity']:.1f}"
    )
  return Panel(Text("\n".join(lines), no_wrap=True), title="losses")


def _layers(run: RunData) -> Table:
  table = Table(expand=True)
  output, weight = (run.chance.get(f"{k}_specialization") for k in ("output", "weight"))
  chance = lambda level: "" if level is None else f" ({level:.3f})"  # noqa: E731
  table.add_column("layer")
  table.add_column(f"output spec.{chance(output)}", justify="right")
  table.add_column(f"weight spec.{chance(weight)}", justify="right")
  table.add_column("effective experts", justify="right")
  table.add_column("weight str.", justify="right")
  table.add_column("output str.", justify="right")
  table.add_column("state")
  for layer in range(run.config.model.num_layers):
    table.add_row(
      str(layer),
      _cell(run, "output_specialization", layer, 3, at_the_end),
      _cell(run, "weight_specialization", layer, 4, at_the_end),
      _cell(run, "effective_experts", layer, 2, at_the_end) + f" of {run.config.model.num_experts}",
      _cell(run, "weight_strength", layer, 4, _now),
      _cell(run, "output_strength", layer, 4, _now),
      _state(run, layer),
    )
  table.caption = "means over the last tenth of the steps; in brackets what unrelated experts score"
  return table


def _now(run: RunData, field: str) -> np.ndarray:
  return run.train[field][-1]


def _cell(
  run: RunData, field: str, layer: int, digits: int, of: Callable[[RunData, str], np.ndarray]
) -> str:
  """A number; "?" where the run, of another version, has not logged it."""
  return "?" if run.lacks(field) else f"{of(run, field)[layer]:.{digits}f}"


def _state(run: RunData, layer: int) -> Text:
  state = Text()
  for field, style in {"emergency": "bold red", "converged": "green"}.items():
    if not run.lacks(field) and _now(run, field)[layer]:
      state.append(f"{field} ", style)
  return state


def _events(run: RunData) -> Panel:
  told = [e for e in run.events if e["name"] not in ("checkpoint", "best")][-_EVENTS:]
  lines = [
    f"step {e['step']:>6}  {e['name']}" + (f", layer {e['layer']}" if "layer" in e else "")
    for e in told
  ]
  return Panel(Text("\n".join(lines) or "none"), title="events")


def watch(folder: pathlib.Path, console: Console) -> None:
  """Shows the run until it is finished; once, where the console is no terminal.

  Raises:
    UserError: nothing to read there.
  """
  run = read_run(folder)
  if not console.is_terminal:
    console.print(view(run, console.width))
    return
  with Live(view(run, console.width), console=console, auto_refresh=False) as live:
    while run.summary is None:
      time.sleep(_SECONDS)
      run = read_run(folder)
      live.update(view(run, console.width), refresh=True)


def main() -> None:
  """The command."""

  def run(argv: list[str]) -> None:
    if len(argv) != 2:
      raise UserError("give one run folder: python -m hgnn_moe_jax.analysis.watch runs/quickstart")
    with contextlib.suppress(KeyboardInterrupt):
      watch(pathlib.Path(argv[1]), Console())

  cli.start(run)


if __name__ == "__main__":
  main()
