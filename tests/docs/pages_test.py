"""README.md and docs/: links and figures lead somewhere, commands parse, names exist.

docs/from-the-seed.md and docs/extending.md have tests of their own, which train what they show.
"""

import configparser
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import unicodedata

import pytest
import yaml

from hgnn_moe_jax.config import Config

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n|\n)+", re.MULTILINE)


def name(page: pathlib.Path) -> str:
  return str(page.relative_to(ROOT))


@functools.cache
def prose(page: pathlib.Path) -> str:
  """The page without its blocks of code."""
  return _INDENTED.sub("\n", _FENCE.sub("", page.read_text()))


@functools.cache
def anchors(page: pathlib.Path) -> list[str]:
  """The ids of the headings, as Python-Markdown and GitHub make them."""
  return [_slug(title) for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)]


def _slug(title: str) -> str:
  title = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title)
  ascii_only = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
  return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def commands(page: pathlib.Path) -> list[str]:
  """Every `python -m ...` of the page in one line each, in blocks of code and within sentences.

  Without the variables before it.
  """
  text = re.sub(r"\\\n\s*", "", page.read_text())
  in_blocks = re.findall(r"^\s*(?:\w+=\S+ )*(python -m .+)$", text, re.MULTILINE)
  inline = re.findall(r"`(python -m [^`]+)`", text.replace("\n", " "))
  return [re.sub(r"\s+#.*", "", command).strip() for command in [*in_blocks, *inline]]


_LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")


def broken_links(page) -> list[str]:
  """Targets that do not exist, as they are written."""
  broken = []
  for target in _LINK.findall(prose(page)):
    if re.match(r"https?:|mailto:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or (anchor and anchor not in anchors(file)):
      broken.append(target)
  return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_figures_exist(page):
  assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_headings_are_unique(page):
  assert len(set(anchors(page))) == len(anchors(page))


def test_broken_links_are_found(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "# A `title`, 99.8 % of\n\n"
    "[a](#a-title-998-of) [b](#b) ![c](c.png) [d](page.md) [e](page.md#e)\n"
    "\n```\n[f](f.md)\n```\n\n    [g](g.md)\n\n[h](https://example.org)\n"
  )
  assert broken_links(page) == ["#b", "c.png", "page.md#e"]


def test_pages_of_the_site_link_to_pages_of_the_site():
  """A link out of docs/ works in the repository and not on the site."""
  for page in DOCS.rglob("*.md"):
    for target in _LINK.findall(prose(page)):
      if not re.match(r"https?:|#", target):
        assert (page.parent / target.partition("#")[0]).resolve().is_relative_to(DOCS), target


def nav_pages(entry) -> list[str]:
  if isinstance(entry, str):
    return [entry]
  children = entry.values() if isinstance(entry, dict) else entry
  return [page for child in children for page in nav_pages(child)]


def test_the_map_of_the_site_lists_every_page_once():
  listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
  assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


_WITH_TESTS = ("from-the-seed.md", "extending.md")
COMMANDS = sorted(
  {
    command
    for page in PAGES
    if page.name not in _WITH_TESTS
    for command in commands(page)
    if re.match(r"python -m (hgnn_moe_jax|benchmarks)\b", command)
  }
)


def problems(lines: list[str]) -> list[str]:
  """Why these commands would not start: one entry each, "" for those that would."""
  words = [shlex.split(line)[2:] for line in lines]
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__).parent / "command_lines.py"],
    input=json.dumps(words),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


_QUICKSTART = "python -m hgnn_moe_jax.main --config=configs/quickstart.py"
WRONG = [
  "python -m hgnn_moe_jax.mane",
  "python -m hgnn_moe_jax.main --config=configs/quickest.py",
  f"{_QUICKSTART} --workdirs=runs/first",
  f"{_QUICKSTART} --config.model.num_headz=3",
  f"{_QUICKSTART} --config.model.num_heads=3",
  f"{_QUICKSTART} --config.training.steps=5",
  f"{_QUICKSTART} runs/first",
  "python -m hgnn_moe_jax.sweep --config=configs/quickstart.py --grid=model.num_headz=1,2",
  "python -m hgnn_moe_jax.analysis.compare runs/a runs/b --baselines=none",
]


@pytest.fixture(scope="module")
def problem() -> dict[str, str]:
  """Command -> why it would not start."""
  lines = [*COMMANDS, *WRONG]
  return dict(zip(lines, problems(lines), strict=True))


def test_commands_parse(problem):
  assert len(COMMANDS) > 15
  wrong = [f"{command}: {problem[command]}" for command in COMMANDS if problem[command]]
  assert not wrong, "\n".join(wrong)


def test_commands_that_do_not_parse_are_found(problem):
  assert [command for command in WRONG if not problem[command]] == []


def is_field(dotted: str) -> bool:
  owner = Config()
  for part in dotted.split("."):
    if not dataclasses.is_dataclass(owner) or part not in {
      f.name for f in dataclasses.fields(owner)
    }:
      return False
    owner = getattr(owner, part)
  return True


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_fields_exist(page):
  """`--config.group.field` anywhere; `group.field` in code within sentences, or it is a module."""
  for field in re.findall(r"--config\.([a-z_.]+[a-z_])", page.read_text()):
    assert is_field(field), field
  groups = "|".join(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))
  for code in re.findall(r"`([^`\n]+)`", prose(page)):
    for group, field in re.findall(rf"(?<![\w./-])({groups})\.(?!safetensors)(\w+)", code):
      module = ROOT / "hgnn_moe_jax" / group / f"{field}.py"
      assert is_field(f"{group}.{field}") or module.exists(), f"{group}.{field}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_code_exist(page):
  for file in re.findall(
    r"`((?:configs|launch|benchmarks|hgnn_moe_jax|tests)/[\w./-]+)`", prose(page)
  ):
    assert (ROOT / file).exists(), file


def test_make_targets_and_extras_exist():
  text = "\n".join(page.read_text() for page in PAGES)
  targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  named = set(re.findall(r"^ *make ([a-z]+)|`make ([a-z]+)`", text, re.MULTILINE))
  assert {a or b for a, b in named} >= {"train", "test", "docs"}
  assert {a or b for a, b in named} <= targets
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = set(setup["options.extras_require"])
  asked = {e for es in re.findall(r"(?:'\.|hgnn_moe_jax)\[([\w,]+)\]", text) for e in es.split(",")}
  assert asked and asked <= extras
  page = (DOCS / "getting-started.md").read_text()
  rows = page.split("| extra | what it adds |")[1].split("\n\n")[0].splitlines()[2:]
  listed = [extra for row in rows for extra in re.findall(r"`(\w+)`", row.split("|")[1])]
  assert sorted(listed) == sorted(extras)
