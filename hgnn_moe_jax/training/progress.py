"""What a person sees while a run trains, and where else its numbers go."""

import math
import pathlib
import sys
import time
import uuid
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hgnn_moe_jax.config import Config
from hgnn_moe_jax.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
  """Shows a run. `step` counts finished steps."""

  def train(self, step: int, fields: dict[str, Any]) -> None: ...
  def message(self, text: str) -> None: ...
  def close(self) -> None: ...


def clock(seconds: float) -> str:
  """HH:MM:SS; the hours go on past 24."""
  minutes, rest = divmod(int(seconds), 60)
  return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"


def describe(fields: dict[str, Any]) -> str:
  """A train record in one line: losses, strengths per layer, score, emergency, gradient, speed."""
  strength = [
    w + o for w, o in zip(fields["weight_strength"], fields["output_strength"], strict=True)
  ]
  orthogonality = sum(
    float(np.dot(fields[f"{kind}_strength"], fields[f"{kind}_penalty"]))
    for kind in ("weight", "output")
  )
  return (
    f"total={fields['loss']:.3f} lm={fields['lm_loss']:.3f} orth={orthogonality:.4f} "
    f"adapt=[{','.join(f'{s:.3g}' for s in strength)}] spec={fields['specialization_mean']:.3f} "
    f"emergency={bool(any(fields['emergency']))} grad={fields['grad_norm']:.2f} "
    f"tok/s={fields['tokens_per_second']:.0f} lr={fields['learning_rate']:.2e}"
  )


class Bar:
  """A rich progress bar on a terminal."""

  def __init__(self, total: int, completed: int):
    self._progress = Progress(
      TextColumn("{task.percentage:>3.0f}%"),
      BarColumn(bar_width=20),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.description}"),
      console=Console(file=sys.stderr),
    )
    self._task = self._progress.add_task("compiling", total=total, completed=completed)
    self._progress.start()

  def train(self, step: int, fields: dict[str, Any]) -> None:
    self._progress.update(self._task, completed=step, description=describe(fields))

  def message(self, text: str) -> None:
    self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

  def close(self) -> None:
    self._progress.stop()


class Lines:
  """Plain lines for logs: a train line every ten seconds and for the last step."""

  def __init__(self, total: int, completed: int):
    self._total, self._first = total, completed
    self._started, self._last = time.monotonic(), -math.inf

  def train(self, step: int, fields: dict[str, Any]) -> None:
    now = time.monotonic()
    if now - self._last < _SECONDS_BETWEEN_LINES and step < self._total:
      return
    if self._last == -math.inf:  # Compilation lies before the first line and tells no pace.
      self._started, self._first = now, step
    self._last = now
    pace = (now - self._started) / max(1, step - self._first)
    left = clock(pace * (self._total - step)) if step > self._first else "?"
    self.message(f"step {step}/{self._total} left={left} {describe(fields)}")

  def message(self, text: str) -> None:
    print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    pass


class Silent:
  """Nothing but what `main` prints at the end."""

  def train(self, step: int, fields: dict[str, Any]) -> None:
    pass

  def message(self, text: str) -> None:
    pass

  def close(self) -> None:
    pass


def announce(text: str, quiet: bool) -> None:
  """What happens before there is a display: reading text and compiling take their time."""
  if not quiet:
    print(text, file=sys.stderr, flush=True)


def make_display(total: int, completed: int, quiet: bool) -> Display:
  """A bar on a terminal, lines elsewhere, nothing if quiet."""
  if quiet:
    return Silent()
  return Bar(total, completed) if sys.stderr.isatty() else Lines(total, completed)


class Tracker:
  """Sends scalars to TensorBoard and Weights & Biases where the config asks for them.

  Args:
    config: `training.tensorboard` and `training.wandb_project` switch the two on.
    workdir: event files go to WORKDIR/tensorboard.
    active: False to send nothing: of several processes only the first does.
    step: where the run goes on. TensorBoard then hides what was sent of later steps, and Weights &
      Biases gets the rest under the same id, kept in WORKDIR/wandb_id.

  Raises:
    UserError: a package is missing; the message says which extra to install.
  """

  def __init__(self, config: Config, workdir: pathlib.Path, active: bool = True, step: int = 0):
    self._board = self._wandb = None
    if not active:
      return
    if config.training.tensorboard:
      try:
        from tensorboardX import SummaryWriter
      except ImportError:
        raise UserError(
          "config.training.tensorboard=True: pip install 'hgnn_moe_jax[tensorboard]'"
        ) from None
      purge_step = step + 1 if step else None
      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)
    if config.training.wandb_project:
      try:
        import wandb
      except ImportError:
        raise UserError(
          f"config.training.wandb_project={config.training.wandb_project!r}: "
          "pip install 'hgnn_moe_jax[wandb]'"
        ) from None
      self._wandb = wandb.init(
        project=config.training.wandb_project,
        name=config.name,
        id=_kept_id(workdir / "wandb_id"),
        resume="allow",
        dir=str(workdir),
        config=config.to_dict(),
      )

  def log(self, kind: str, step: int, fields: dict[str, Any]) -> None:
    """Numbers under `kind/name`, layers apart under `kind/name/layer_l`; the rest is left out."""
    if self._board is None and self._wandb is None:
      return
    scalars = dict(_scalars(kind, fields))
    if self._board is not None:
      for name, value in scalars.items():
        self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(scalars, step=step)

  def close(self) -> None:
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _kept_id(path: pathlib.Path) -> str:
  """What stands in the file; a new id if there is none."""
  if not path.exists():
    path.write_text(uuid.uuid4().hex)
  return path.read_text()


def _scalars(prefix: str, fields: dict[str, Any]):
  for name, value in fields.items():
    if isinstance(value, int | float) or getattr(value, "ndim", None) == 0:
      yield f"{prefix}/{name}", float(value)
    elif getattr(value, "ndim", None) == 1:
      for layer, entry in enumerate(value):
        yield f"{prefix}/{name}/layer_{layer}", float(entry)
