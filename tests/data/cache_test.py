"""A cached folder is complete or absent, verified, and survives races and damage."""

import errno
import json
import logging
import multiprocessing
import pathlib

import pytest

from hgnn_moe_jax.data import cache
from hgnn_moe_jax.errors import ConfigError


def write(folder: pathlib.Path) -> dict:
  (folder / "a.bin").write_bytes(b"a" * 1000)
  (folder / "b.bin").write_bytes(b"b" * 1000)
  return {"count": 2}


def never(folder: pathlib.Path) -> dict:
  pytest.fail("made again")


def test_made_once(tmp_path):
  folder, details = cache.cached_folder(tmp_path / "deep" / "root", "name", write)
  assert folder == tmp_path / "deep" / "root" / "name"
  assert sorted(f.name for f in folder.iterdir()) == ["a.bin", "b.bin", "manifest.json"]
  assert cache.cached_folder(tmp_path / "deep" / "root", "name", never) == (folder, details)
  assert details == {"count": 2}
  # sha256 of a thousand "a", by sha256sum.
  manifest = json.loads((folder / "manifest.json").read_text())
  digest = "41edece42d63e8d9bf515a9ba6932e1c20cbc9f5a5d134645adb5db1b9737ea3"
  assert manifest["content"]["files"]["a.bin"] == digest


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


DAMAGES = {
  "flipped bit": lambda f: flip(f / "b.bin"),
  "cut": lambda f: (f / "a.bin").write_bytes(b"a" * 999),
  "file missing": lambda f: (f / "a.bin").unlink(),
  "manifest missing": lambda f: (f / "manifest.json").unlink(),
  "manifest empty": lambda f: (f / "manifest.json").write_bytes(b""),
  "manifest of another kind": lambda f: (f / "manifest.json").write_text("[]"),
  "count changed": lambda f: (f / "manifest.json").write_text(
    (f / "manifest.json").read_text().replace('"count": 2', '"count": 3')
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_announced_and_repaired(tmp_path, caplog, damage):
  folder, _ = cache.cached_folder(tmp_path, "name", write)
  DAMAGES[damage](folder)
  with caplog.at_level(logging.WARNING, logger="absl"):
    _, details = cache.cached_folder(tmp_path, "name", write)
  assert f"Cache {folder} is damaged" in caplog.text
  assert details == {"count": 2}
  assert (folder / "b.bin").read_bytes() == b"b" * 1000
  cache.cached_folder(tmp_path, "name", never)
  assert list(tmp_path.iterdir()) == [folder]


def test_the_first_writer_wins(tmp_path):
  def slow(folder):
    # While this one writes, another process finishes.
    cache.cached_folder(tmp_path, "name", write)
    (folder / "a.bin").write_bytes(b"late")
    return {"count": 9}

  folder, details = cache.cached_folder(tmp_path, "name", slow)
  assert details == {"count": 2}
  assert (folder / "a.bin").read_bytes() == b"a" * 1000
  assert list(tmp_path.iterdir()) == [folder]


def _write_from_a_process(root):
  for number in range(20):
    folder, details = cache.cached_folder(pathlib.Path(root), f"name{number}", write)
    assert details == {"count": 2} and (folder / "a.bin").read_bytes() == b"a" * 1000


def test_concurrent_writers(tmp_path):
  context = multiprocessing.get_context("fork")
  processes = [
    context.Process(target=_write_from_a_process, args=(str(tmp_path),)) for _ in range(3)
  ]
  for process in processes:
    process.start()
  for process in processes:
    process.join(30)
  assert [process.exitcode for process in processes] == [0, 0, 0]
  assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f"name{n}" for n in range(20))


def test_failed_writer_leaves_nothing(tmp_path):
  def fail(folder):
    (folder / "a.bin").write_bytes(b"a")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.cached_folder(tmp_path, "name", fail)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("code", "words"),
  [
    (errno.ENOSPC, "No space left on device"),
    (errno.EACCES, "Permission denied"),
    (errno.EROFS, "Read-only file system"),
  ],
)
def test_unwritable(tmp_path, code, words):
  def fail(folder):
    raise OSError(code, words)

  with pytest.raises(ConfigError, match=rf"data\.cache_dir='.*': cannot be used \({words}\); give"):
    cache.cached_folder(tmp_path, "name", fail)
  assert not list(tmp_path.iterdir())


def test_root_is_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"data\.cache_dir=.*give a writable folder"):
    cache.cached_folder(tmp_path / "file" / "root", "name", write)


def test_read_only_cache_is_read(tmp_path, monkeypatch):
  folder, _ = cache.cached_folder(tmp_path, "name", write)
  monkeypatch.setattr(pathlib.Path, "mkdir", lambda *args, **kwargs: pytest.fail("written"))
  assert cache.cached_folder(tmp_path, "name", never)[0] == folder


def test_default_root(monkeypatch, tmp_path):
  assert cache.cache_root(str(tmp_path)) == tmp_path
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache.cache_root("") == tmp_path / "hgnn_moe_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert cache.cache_root("") == tmp_path / "home" / ".cache" / "hgnn_moe_jax"
