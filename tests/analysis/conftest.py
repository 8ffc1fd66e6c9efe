"""Run folders to read: made up, line by line, or trained in seconds."""

import base64
import html.parser
import json
import math
import pathlib
import shutil

import jax
import pytest

from hgnn_moe_jax.analysis import style
from hgnn_moe_jax.analysis.compare import group_runs
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.training import loop

# One black pixel.
_PNG = base64.b64decode(
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def _sketches(request, monkeypatch):
  """Figures are made but not drawn, which is most of a report's time, but for tests that ask."""
  if "drawn" in request.fixturenames:
    return

  def save(figure, path, **_):
    png = pathlib.Path(path).suffix == ".png"
    pathlib.Path(path).write_bytes(_PNG if png else b"<svg></svg>")

  monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


@pytest.fixture
def drawn(monkeypatch):
  """For tests of what is to be seen, of which few dots are enough."""
  monkeypatch.setattr(style, "DOTS_PER_INCH", 40)


@pytest.fixture
def write_run(tmp_path, tiny_config):
  """write_run(name, train, ..., **changes) -> folder of a run with these records.

  train: records without "kind" and, if of every step from the first on, without "step".
  last: of summary.json, None for a run that is not finished. evaluations: (step, loss) pairs.
  """

  def write(
    folder, train, events=(), last=None, fingerprint="text", evaluations=(), seconds=10.0, **changes
  ):
    path = tmp_path / folder
    path.mkdir()
    content = {
      "config": tiny_config(**changes).to_dict(),
      "total_steps": 100,
      "data": {"fingerprint": fingerprint},
      "chance": {"weight_specialization": 0.99, "output_specialization": 0.8},
    }
    (path / "config.json").write_text(json.dumps(content))
    records = [{"kind": "train", "step": n, **record} for n, record in enumerate(train, 1)]
    records += [evaluation(step, loss) for step, loss in evaluations]
    records += [{"kind": "event", **event} for event in events]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if last is not None:
      steps = records[len(train) - 1]["step"]
      summary = {"steps": steps, "train_seconds": seconds, "last": last}
      (path / "summary.json").write_text(json.dumps(summary))
    return path

  return write


def evaluation(step, loss):
  """An "eval" record of the validation split."""
  perplexities = {"token_perplexity": math.exp(loss), "word_perplexity": math.exp(2 * loss)}
  scores = {"loss": loss, **perplexities, "bits_per_byte": loss}
  return {"kind": "eval", "step": step, "split": "validation", **scores}


@pytest.fixture
def train(tiny_config, tmp_path, shared_programs):
  """train(folder, **changes) -> folder of a finished tiny run."""

  def go(folder, **changes):
    loop.train(tiny_config(**changes), tmp_path / folder, quiet=True)
    return tmp_path / folder

  return go


@pytest.fixture(scope="session")
def _finished(tiny_config, tmp_path_factory, _factories):
  folder = tmp_path_factory.mktemp("finished") / "run"
  with jax.numpy_dtype_promotion("standard"):
    loop.train(tiny_config(), folder, quiet=True)
  return folder


@pytest.fixture
def finished_run(_finished, tmp_path, shared_programs):
  """A copy, to be damaged, of a finished tiny run that was trained once."""
  return shutil.copytree(_finished, tmp_path / "finished")


@pytest.fixture
def rewrite():
  """rewrite(folder, change) -> None: every line of metrics.jsonl goes through change(record)."""

  def go(folder, change):
    path = folder / "metrics.jsonl"
    records = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in records if r is not None))

  return go


@pytest.fixture
def groups(write_run):
  """Two groups, "a" of seeds 0 to 2 and "b" of seeds 0 and 1, in the order b, a.

  Token perplexities at the end are 10, 12, 14 and 11, 15; half of the way they are e times that. A
  step of "a" takes 1 second, one of "b" 1.25. Scores: chance is 0.99 for weights, 0.8 for outputs.
  """
  settings = {"a": ([10.0, 12.0, 14.0], 100.0, 0.1), "b": ([11.0, 15.0], 80.0, 0.2)}
  runs = []
  for name, (perplexities, rate, strength) in settings.items():
    step = {
      "weight_specialization": [0.9, 0.8],
      "output_specialization": [0.5, 0.25] if name == "a" else [0.9, 0.7],
      "effective_experts": [3.0, 2.0],
      "weight_strength": [strength, strength],
      "output_strength": [0.0, 0.0],
      "tokens": 100,
      "tokens_per_second": rate,
    }
    for seed, perplexity in enumerate(perplexities):
      loss = math.log(perplexity)
      folder = write_run(
        f"{name}-{seed}",
        [step] * 20,
        last={"token_perplexity": perplexity, "word_perplexity": 10 * perplexity},
        evaluations=[(10, loss + 1.0), (20, loss)],
        seconds=2000.0 / rate,
        **{"name": name, "seed": seed, "orthogonality.weight_strength": strength},
      )
      runs.append(read_run(folder))
  return group_runs([(run.config.name, run) for run in runs[::-1]])


class Page(html.parser.HTMLParser):
  """Ids, links, images and text of a page; every tag closed, nothing loaded from elsewhere."""

  VOID = ("meta", "img")

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.links, self.images, self.texts = [], [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []
    assert "http" not in text, "no network"
    assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in self.images)
    assert {link.removeprefix("#") for link in self.links} <= set(self.ids)

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    if tag not in self.VOID:
      self.open.append(tag)
    if "id" in given:
      self.ids.append(given["id"])
    if tag == "a":
      self.links.append(given["href"])
    if tag == "img":
      self.images.append(given)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture
def read_page():
  """read_page(path) -> Page."""
  return lambda path: Page(path.read_text())
