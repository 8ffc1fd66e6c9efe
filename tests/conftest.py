"""Strict numerics for every test: no silent dtype or rank promotion, compiled code kept on disk."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing may be fetched from a hub by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

_ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".jax_cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
