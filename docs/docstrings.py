"""Griffe extension of the API pages: reads this project's docstrings as they are meant.

The source keeps to two spaces, so what is set apart there by two spaces (formulas, tables) would
run together in Markdown. Fields of dataclasses and NamedTuples are explained by comments behind
them, which Griffe does not read. The text itself is never changed.
"""

import ast
import re

import griffe

_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
_SECTION = re.compile(rf"({'|'.join(_SECTIONS)}):$")
# Their lines are "name: what it is" or "name, name: ...".
_ENTRIES = ("Args", "Attributes", "Raises")
_NAMES = re.compile(r"(\w+(?:, \w+)*):(?: (.*))?$")
_FUNCTION = re.compile(r"\w+\(.*\) -> ")  # "init(key) -> params"


class Docstrings(griffe.Extension):
  """Rewrites every docstring's layout before it is parsed."""

  def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs) -> None:
    del loader, kwargs
    if obj.docstring is not None:
      obj.docstring.value = tidy(obj.docstring.value)
    if isinstance(obj, griffe.Class) and (fields := described_fields(obj)):
      section = ["", "Attributes:", *fields]
      if obj.docstring is None:
        obj.docstring = griffe.Docstring("", parent=obj)
      if "\nAttributes:" not in "\n" + obj.docstring.value:
        obj.docstring.value += "\n" + "\n".join(section)


def tidy(text: str) -> str:
  """The docstring with sections as Griffe knows them and everything set apart in fences."""
  lines = text.expandtabs().splitlines()
  out: list[str] = []
  position = 0
  while position < len(lines):
    if found := _SECTION.match(lines[position]):
      end = position + 1
      while end < len(lines) and not _SECTION.match(lines[end]):
        end += 1
      out += [lines[position], *_section(found[1], lines[position + 1 : end])]
    else:
      end = position
      while end < len(lines) and lines[end].strip() and not _SECTION.match(lines[end]):
        end += 1
      out += _paragraph(lines[position:end]) if end > position else [""]
      end = max(end, position + 1)
    position = end
  return "\n".join(out)


def _section(name: str, lines: list[str]) -> list[str]:
  """Indented by four, and one entry per name."""
  filled = [line for line in lines if line.strip()]
  base = min((len(line) - len(line.lstrip()) for line in filled), default=0)
  lines = [line[base:] for line in lines]
  if name in _ENTRIES:
    lines = _entries(lines)
  return ["    " + line if line.strip() else "" for line in lines]


def _entries(lines: list[str]) -> list[str]:
  out: list[str] = []
  rest: list[str] = []
  names: list[str] = []

  def close() -> None:
    for name in names:
      out.extend([f"{name}: {rest[0]}", *("    " + line for line in rest[1:])])
    names.clear()
    rest.clear()

  pending = ""
  for line in lines:
    if pending:  # Names that did not fit into one line.
      line, pending = f"{pending} {line.strip()}", ""
    if line.rstrip().endswith(",") and re.fullmatch(r"[\w, ]+", line) and line[0] != " ":
      pending = line.strip()
    elif (found := _NAMES.match(line)) and line[0] != " ":
      close()
      names.extend(found[1].split(", "))
      rest.append(found[2] or "")
    elif names:
      rest.append(line.strip())
    else:
      out.append(line)
  close()
  return [line.rstrip() for line in out]


def _paragraph(lines: list[str]) -> list[str]:
  """Commands and what is indented go into fences; functions with an arrow become a list."""
  if all(line.startswith((" ", "python ")) for line in lines):
    return ["```", *_dedent(lines), "```"]
  if sum(bool(_FUNCTION.match(line)) for line in lines) > 1:
    return [re.sub(r"^(?=\S)", "- ", line) for line in lines]
  out: list[str] = []
  block: list[str] = []
  for line in [*lines, "end"]:
    if line.startswith(" "):
      block.append(line)
      continue
    if block:
      out += ["", "```", *_dedent(block), "```", ""]
      block = []
    out.append(line)
  return out[:-1]


def _dedent(lines: list[str]) -> list[str]:
  base = min(len(line) - len(line.lstrip()) for line in lines)
  return [line[base:] for line in lines]


def described_fields(cls: griffe.Class) -> list[str]:
  """Entries of an Attributes section: annotated fields with defaults and their comments."""
  module = cls.module
  lines = module.lines_collection[module.filepath] if module.filepath else []
  fields = [
    a
    for a in cls.members.values()
    if isinstance(a, griffe.Attribute) and a.annotation is not None and a.lineno
  ]
  entries, any_comment = [], False
  for field in fields:
    comments = []
    before = field.lineno - 2
    while lines[before].strip().startswith("#"):
      comments.insert(0, lines[before].strip().lstrip("# "))
      before -= 1
    last = field.endlineno or field.lineno
    for line in lines[field.lineno - 1 : last]:
      if "  # " in line:
        comments.append(line.split("  # ", 1)[1].strip())
    any_comment |= bool(comments)
    sentences = [" ".join(comments), *_value(field)]
    entries.append(f"    {field.name}: " + ". ".join(filter(None, sentences)))
  return entries if any_comment else []


def _value(field: griffe.Attribute) -> list[str]:
  """The default of a field, if it is a plain value, and whether a continued run may change it."""
  text = "" if field.value is None else str(field.value)
  free = re.fullmatch(r"_free\(\s*(.*?)\s*\)", text, re.DOTALL)
  try:
    default = [f"Default `{ast.literal_eval(free[1] if free else text)!r}`"]
  except (ValueError, SyntaxError):
    default = []
  return [*default, "May differ on continuation"] if free else default
