"""Strict numerics for every test: no silent dtype or rank promotion, compiled code kept on disk."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import platform
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is XLA's; a third of it without most optimisations, here and in the
# processes that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters compile unoptimised code in 2/5 of the time of the newer ones. But with them
# LLVM fuses a product and a sum into one rounding wherever they meet in a loop, so that a step's
# bits depend on the program around it: no instruction that does so, then. And every program is one
# piece to LLVM: sharing it out over threads costs more than it gains where both cores are busy. XLA
# stops at a flag that it does not know; these are there in the releases before 0.11.
if importlib.metadata.version("jaxlib") < "0.11" and platform.machine() == "x86_64":
  os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX "
    "--xla_cpu_parallel_codegen_split_count=1",
  )
# Where each operation came from, frame by frame, is a sixth of the time of lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Nothing may be fetched from a hub by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from absl import flags, logging
from absl.testing import flagsaver
from jax.sharding import AbstractDevice, AbstractMesh

from hgnn_moe_jax import sharding
from hgnn_moe_jax.config import Config

_ROOT = pathlib.Path(__file__).parent.parent

# Tracing makes millions of objects that live on; looking through them took an eighth of its time.
gc.set_threshold(200_000, 50, 50)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".jax_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# The files that take minutes, so that no worker is left with one of them at the end.
_FIRST = ("many_devices_test", "notebooks_test", "analyze_test", "two_processes_test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  items.sort(key=lambda item: _FIRST.index(s) if (s := item.path.stem) in _FIRST else len(_FIRST))


def _data_folder() -> pathlib.Path | None:
  """Where WikiText-2 lies: HGNN_MOE_DATA, or shared/data beside the checkout."""
  candidates = [_ROOT.parent / "shared" / "data"]
  if "HGNN_MOE_DATA" in os.environ:
    candidates.insert(0, pathlib.Path(os.environ["HGNN_MOE_DATA"]))
  return next((c for c in candidates if (c / "wikitext-2" / "train.txt").is_file()), None)


@pytest.fixture(scope="session")
def wikitext2() -> pathlib.Path:
  """The folder with WikiText-2's train.txt, valid.txt and test.txt."""
  folder = _data_folder()
  if folder is None:
    pytest.skip("WikiText-2 is not at hand; set HGNN_MOE_DATA to the folder that holds wikitext-2/")
  return folder / "wikitext-2"


_SENTENCE = (
  "the experts of one layer read the same stream and each adds its own update to it while a graph "
  "carries messages between them so that what one has seen another may use or leave aside"
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
  """A few hundred short paragraphs: 750 training examples of 16 bytes, 50 of validation."""
  rng = random.Random(0)
  paragraphs = [
    " ".join(rng.choices(_SENTENCE.split(), k=rng.randint(4, 9))) + "." for _ in range(300)
  ]
  path = tmp_path_factory.mktemp("text") / "paragraphs.txt"
  path.write_text("\n\n".join(paragraphs) + "\n")
  return path


@pytest.fixture(scope="session")
def tiny_config(text_file):
  """tiny_config(**{"training.steps": 6}) -> Config: the smallest run in which everything acts."""
  # Always the same place: JAX's key of a compiled program has the path of its cache in it, and
  # `main` keeps its programs below this one.
  cache_dir = pathlib.Path(jax.config.jax_compilation_cache_dir) / "runs"

  def make(**changes: Any) -> Config:
    c = Config(name="tiny")
    c.model.embed_dim, c.model.num_layers, c.model.num_heads, c.model.num_experts = 16, 2, 2, 3
    c.model.ffn_multiplier, c.model.coupler_layers, c.model.max_length = 2, 1, 16
    c.data.source, c.data.path, c.data.tokenizer = "text", str(text_file), "bytes"
    c.data.cache_dir = str(cache_dir)
    c.orthogonality.weight_strength = c.orthogonality.output_strength = 0.1
    c.orthogonality.warmup_steps = 4
    c.training.steps, c.training.batch_size, c.training.learning_rate = 12, 8, 1e-2
    c.training.warmup_steps, c.training.ema_decay = 2, 0.9
    c.training.steps_per_dispatch, c.training.checkpoint_every, c.evaluation.every = 3, 4, 6
    for field, value in changes.items():
      *group, name = field.split(".")
      setattr(getattr(c, group[0]) if group else c, name, value)
    return c

  return make


@pytest.fixture
def config_file(tmp_path) -> Callable[[Config], str]:
  """config_file(config) -> the --config flag of a file whose get_config() returns it."""

  def write(config: Config) -> str:
    path = tmp_path / "experiment.py"
    path.write_text(
      "from hgnn_moe_jax.config import Config\n\n\n"
      f"def get_config():\n  return Config.from_dict({config.to_dict()!r})\n"
    )
    return f"--config={path}"

  return write


@pytest.fixture
def lowered_for_gpu():
  """lowered_for_gpu(function, *shapes, mesh=()) -> the text that XLA for GPUs would compile.

  From JAX 0.11 on Pallas asks which GPU it is.
  """

  def lower(function: Callable[..., Any], *shapes: Any, mesh: tuple[int, ...] = ()) -> str:
    axes, kinds = (sharding.AXES, sharding.AXIS_TYPES) if mesh else ((), ())
    device = AbstractDevice("NVIDIA H100", None, "gpu")
    gpu = AbstractMesh(mesh, axes, axis_types=kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(gpu):
      return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()

  return lower


class Outcome(NamedTuple):
  """What a command line came to."""

  status: int
  out: str
  err: str


@pytest.fixture
def command(monkeypatch, capsys):
  """command(main, *words) -> Outcome of a command line, run in this process.

  Starting another one takes seconds; that commands start is seen in the tests that do.
  """

  def run(main: Callable[[], None], *words: Any) -> Outcome:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, words)])
    # The last config file's module, into which the next one would be loaded.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
      main()
    out, err = capsys.readouterr()
    return Outcome(stopped.value.code or 0, out, err)

  compiled, filters = jax.config.jax_compilation_cache_dir, list(logging.get_absl_logger().filters)
  verbosity = logging.get_verbosity()
  yield run
  flags.FLAGS.unparse_flags()
  jax.config.update("jax_compilation_cache_dir", compiled)
  logging.get_absl_logger().filters[:] = filters
  logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def _factories():
  """Everything that has been traced and compiled in this process is kept, not the last few only."""
  from hgnn_moe_jax.training import assembly, evaluation

  with pytest.MonkeyPatch.context() as patch:
    for module, name in ((assembly, "_assembled"), (evaluation, "make_evaluation")):
      patch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
    yield


@pytest.fixture
def shared_programs(_factories):
  """Runs in this process. Optax promotes dtypes: int32 counts meet float decays."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def _random_params(shapes: Any, seed: int = 0) -> Any:
  """Parameters of the given shapes, far from initialisation: no zero bias, no equal weights."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key.endswith("scale") else 0.0
    return np.asarray(around + 0.3 * rng.standard_normal(leaf.shape), np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def random_params():
  return _random_params
