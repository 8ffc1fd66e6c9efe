"""What generation shows on a terminal and in a pipe; prompts from files."""

import re
from types import SimpleNamespace

import pytest

from hgnn_moe_jax import generation_view
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.generation import Sampling

TRAINED = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(num_experts=2)))


@pytest.fixture
def scripted(monkeypatch):
  """Continues prompt i by " [red] i!" in two pieces, the first led by expert 0."""

  def generate(trained, prompts, sampling, on_text, warn):
    warn("a line about a prompt")
    for row in range(len(prompts)):
      on_text(row, " [red] ", 0)
    for row in range(len(prompts)):
      on_text(row, f"{row}!\n", 1)

  monkeypatch.setattr(generation_view, "generate", generate)


def _shown(capsys, prompts, colour=False):
  generation_view.show(TRAINED, prompts, Sampling(), colour)
  return capsys.readouterr()


def test_text_is_shown_as_it_is(scripted, capsys):
  """Brackets are no markup, long lines are not broken, warnings do not mix with the text."""
  long = "word " * 60 + "end"
  assert _shown(capsys, [long]) == (f"{long} [red] 0!\n\n", "a line about a prompt\n")


def test_a_batch_is_shown_row_by_row(scripted, capsys):
  assert _shown(capsys, ["one", "two"]).out == "one [red] 0!\n\n---\ntwo [red] 1!\n\n"


def test_colours_tell_the_leading_expert(scripted, capsys, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLORTERM", "truecolor")
  monkeypatch.setenv("TERM", "xterm-256color")
  out = _shown(capsys, ["one"], colour=True).out
  text, legend = out.split("led by:")
  assert text.startswith("one")  # The prompt has no colour.
  styles = dict(re.findall(r"\x1b\[([\d;]+)m ?(\[red\]|0!|expert \d)", out))
  by_text = {piece: code for code, piece in styles.items()}
  assert by_text.keys() >= {"expert 0", "expert 1"}
  assert re.search(rf"\x1b\[{by_text['expert 0']}m \[red\] ", text)
  assert re.search(rf"\x1b\[{by_text['expert 1']}m0!", text)
  plain = re.sub(r"\x1b\[[\d;]*m", "", legend)
  assert plain == " expert 0  expert 1 \n"


def test_prompts_of_both_kinds(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("two\nthree \n", encoding="utf-8")
  assert generation_view.prompts(["one"], str(file)) == ["one", "two", "three "]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"one\n\ntwo\n", "line 2 is empty; give a prompt in every line"),
    (b"one\n  \n", "line 2 is empty"),
    (b"\xff\xfe", "cannot be read .*give a text file"),
    (b"", "no prompt: give --prompt=TEXT, or --prompts=FILE"),
  ],
)
def test_files_that_are_no_prompts(content, message, tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes(content)
  with pytest.raises(UserError, match=message):
    generation_view.prompts([], str(file))
