"""Generated text on the terminal: as it comes, and coloured by expert."""

import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.generation import Sampling, generate
from hgnn_moe_jax.trained import Trained

_STYLES = ["blue", "dark_orange", "green", "magenta", "yellow", "cyan", "red", "bright_black"]


def prompts(given: Sequence[str], file: str | None) -> list[str]:
  """The prompts of the command line and the lines of a file, in this order.

  Raises:
    UserError: no prompt at all, one that is no text, a file that cannot be read, or an empty line
      in it.
  """
  for text in given:
    try:
      text.encode()
    except UnicodeEncodeError:  # A byte of the command line that was no text.
      raise UserError(
        f"--prompt={text!r}: not UTF-8; give text, or write it to a file for --prompts"
      ) from None
  lines: list[str] = []
  if file is not None:
    try:
      lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"--prompts={file}: cannot be read ({error}); give a text file") from None
    if empty := [n for n, line in enumerate(lines, 1) if not line.strip()]:
      raise UserError(f"--prompts={file}: line {empty[0]} is empty; give a prompt in every line")
  if not given and not lines:
    raise UserError("no prompt: give --prompt=TEXT, or --prompts=FILE with a prompt per line")
  return [*given, *lines]


def show(trained: Trained, prompts: Sequence[str], sampling: Sampling, colour: bool) -> None:
  """Prints every prompt with its continuation.

  A single one appears as it is generated. Several are printed when all are done, a line "---"
  between them. In colour each piece of text has that of the expert with the largest part in
  predicting it, and a legend stands below.

  Raises:
    UserError: as `generation.generate`.
  """
  console = Console(highlight=False, soft_wrap=True)
  style = lambda expert: f"bold {_STYLES[expert % len(_STYLES)]}" if colour else ""  # noqa: E731
  pieces: list[list[Text]] = [[] for _ in prompts]
  streaming = len(prompts) == 1

  def on_text(row: int, text: str, leader: int) -> None:
    pieces[row].append(Text(text, style(leader)))
    if streaming:
      console.print(pieces[row][-1], end="")
      console.file.flush()

  if streaming and prompts[0]:
    console.print(Text(prompts[0]), end="")
    console.file.flush()
  generate(trained, prompts, sampling, on_text, lambda line: print(line, file=sys.stderr))
  for number, (prompt, parts) in enumerate(zip(prompts, pieces, strict=True)):
    if not streaming:
      if number:
        console.print("---")
      console.print(Text.assemble(Text(prompt), *parts), end="")
    console.print()
  if colour:
    names = [
      Text(f" expert {expert} ", style(expert))
      for expert in range(trained.config.model.num_experts)
    ]
    console.print(Text.assemble("led by:", *names))
