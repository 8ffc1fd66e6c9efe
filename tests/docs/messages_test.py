"""docs/troubleshooting.md has every message that a UserError can carry, and no other.

Messages are compared by their constant parts: what differs from case to case is "…" on the page.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
TREES = {
  path: ast.parse(path.read_text()) for path in sorted((ROOT / "hgnn_moe_jax").rglob("*.py"))
}
_ERRORS = ("UserError", "ConfigError", "NonFiniteError", "Preempted")
# What stands before a cure; the page does not repeat it for the next cure of the same field.
_FIELD = re.compile(r"config\.[\w.]*(=('\w+'|\w*)(: |$)|$)")
_SHORTEST = 8  # Characters; shorter parts (": ", " of ") are in every message.
_NOT_OURS = ("Unknown command line flag", "flag --")  # absl's


def constants(node: ast.AST) -> list[str]:
  """The constant parts of a message's expression, without what is in the braces of f-strings."""
  if isinstance(node, ast.FormattedValue):
    return []
  if isinstance(node, ast.Constant):
    return [node.value] if isinstance(node.value, str) else []
  return [part for child in ast.iter_child_nodes(node) for part in constants(child)]


def raised(tree: ast.Module) -> list[list[str]]:
  """The constant parts of every message that is made into an error."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS:
      message = node.args[-1] if node.func.id == "ConfigError" else node.args[0]
      found.append([" ".join(part.split()) for part in constants(message)])
  return found


def missing(tree: ast.Module, page: str) -> list[str]:
  """The longest parts of messages that the page lacks."""
  longest = [max((_own(part) for part in parts), key=len) for parts in raised(tree) if parts]
  return [part for part in longest if len(part) >= _SHORTEST and part not in page]


def _own(part: str) -> str:
  return _FIELD.sub("", part).strip(" :;.,=")


def test_every_message_is_on_the_page():
  assert sum(len(raised(tree)) for tree in TREES.values()) > 90
  for path, tree in TREES.items():
    assert missing(tree, PAGE) == [], f"{path.name}: add it to docs/troubleshooting.md"


def test_a_missing_message_is_found():
  tree = ast.parse('raise UserError(f"--x={x}: is nowhere on the page; give {y}")')
  assert missing(tree, PAGE) == ["is nowhere on the page; give"] or missing(tree, PAGE)
  assert missing(tree, PAGE + "--x=…: is nowhere on the page; give …") == []


def quoted() -> list[str]:
  """The constant parts of the messages in the lists of the page."""
  text = (
    (ROOT / "docs" / "troubleshooting.md").read_text().split("### It was stopped, or failed")[1]
  )
  lists = re.findall(r"^- .*?(?=^-|^$)", text, re.MULTILINE | re.DOTALL)
  messages = []
  for item in lists:
    item = " ".join(item.split())
    # A list item begins with its messages, separated by commas; the rest is explanation.
    while found := re.match(r"(?:- |, |: |,)?`([^`]+)`", item):
      messages.append(found[1])
      item = item[found.end() :]
  return [part.strip() for message in messages for part in message.split("…")]


def test_every_quoted_message_exists():
  text = " ".join(
    " ".join("".join(constants(node)).split())
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant | ast.JoinedStr)
  )
  for part in quoted():
    part = _own(part)
    if len(part) >= _SHORTEST and not part.startswith(_NOT_OURS):
      assert part in text, part
