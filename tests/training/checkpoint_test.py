"""What is saved comes back bit for bit; what is damaged is noticed, named and skipped."""

import errno
import itertools
import logging
import os
import pathlib
import shutil
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.training import checkpoint, processes
from hgnn_moe_jax.training.checkpoint import Checkpointer, _weighted_sum, checksums
from hgnn_moe_jax.training.state import TrainState

# Orbax leaves coroutines behind when it cannot read a file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NOTE = {"metrics_bytes": 12, "best": {"loss": 0.1 + 0.2, "word_perplexity": float("inf")}}


def make_state(step: int) -> TrainState:
  """Every dtype that a state may have, with bits that a detour through float would change."""
  rng = np.random.default_rng(step)
  return TrainState(
    step=jnp.int32(step),
    params={"head": jnp.asarray(rng.standard_normal((60, 50)), jnp.float32), "bias": jnp.zeros(3)},
    opt_state=(
      {"mu": jnp.asarray(rng.standard_normal((4, 5)), jnp.bfloat16)},
      jnp.asarray([-0.0, np.nan, np.inf, 1e-42], jnp.float32),
    ),
    control={"on": jnp.asarray([True, False]), "count": jnp.int32(step)},
    key=jax.random.key(step),
  )


@pytest.fixture
def open_folder(tmp_path):
  """open_folder(keep) -> Checkpointer of tmp_path; all are closed in the end."""
  opened = []

  def make(keep: int | None = 2) -> Checkpointer:
    opened.append(Checkpointer(tmp_path, keep))
    return opened[-1]

  yield make
  for checkpointer in opened:
    checkpointer.close()


def saved_steps(folder: pathlib.Path) -> list[int]:
  return sorted(int(f.name) for f in (folder / "checkpoints").iterdir() if f.name.isdigit())


def save_all(checkpointer: Checkpointer, losses: dict[int, float | None]) -> None:
  for step, loss in losses.items():
    checkpointer.save(step, make_state(step), {"step": step, **NOTE}, loss)
    checkpointer.wait()


def test_state_and_note_come_back_to_the_bit(open_folder, assert_same):
  save_all(open_folder(), {7: None})
  abstract = jax.eval_shape(lambda: make_state(0))
  state, note = open_folder().restore(abstract, 7)
  assert_same(state, make_state(7))
  assert note == {"step": 7, **NOTE}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_training_goes_on_while_a_state_is_saved(backend, open_folder, assert_same, monkeypatch):
  """What is saved is the state at that moment, though its buffers are soon the next one's."""
  writer, written = open_folder(), threading.Event()
  write = writer._manager.save
  monkeypatch.setattr(writer._manager, "save", lambda *a, **k: written.wait(60) and write(*a, **k))
  state = jax.device_put(make_state(3))
  with monkeypatch.context() as patch:
    patch.setattr(jax, "default_backend", lambda: backend)
    writer.save(3, state, NOTE)
  add_one = lambda tree: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), tree)  # noqa: E731
  others = jax.jit(
    lambda tree, key: (add_one(tree), jax.random.split(key)[0]), donate_argnums=(0, 1)
  )((state.params, state.opt_state), state.key)
  jax.block_until_ready(others)
  assert state.params["head"].is_deleted() and state.key.is_deleted()
  written.set()
  writer.wait()
  saved, _ = open_folder().restore(jax.eval_shape(lambda: make_state(0)), 3)
  assert_same(saved, make_state(3))


def _full_disk(*args, **kwargs):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("backend", "copies"), [("cpu", 0), ("gpu", 1)])
def test_pinned_memory_is_taken_beforehand(backend, copies, open_folder, monkeypatch, tmp_path):
  """CPU has none: what a save needs there is as quickly had at any time."""
  made = []
  monkeypatch.setattr(checkpoint, "_copied", lambda state: made.append(state) or state)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  open_folder().reserve(make_state(0))
  assert len(made) == copies and not saved_steps(tmp_path)


def test_what_fails_in_our_thread_is_told_once(open_folder, monkeypatch):
  writer = open_folder()
  monkeypatch.setattr(writer._manager, "save", _full_disk)
  writer.save(3, make_state(3), NOTE)
  with pytest.raises(UserError, match="No space left"):
    writer.wait()
  writer.wait()


def test_what_fails_in_orbaxs_thread_is_told_once_and_costs_no_other_save(
  open_folder, monkeypatch, tmp_path
):
  writer = open_folder(5)
  with monkeypatch.context() as patch:
    patch.setattr(writer._manager, "_finalize", _full_disk)
    writer.save(1, make_state(1), NOTE)
    writer._saving.result()
    while writer._manager._finalize_thread.get_not_none().is_alive():
      time.sleep(0.01)
  writer.save(2, make_state(2), NOTE)
  with pytest.raises(UserError, match="No space left"):
    writer.save(3, make_state(3), NOTE)
  writer.save(3, make_state(3), NOTE)
  writer.wait()
  assert saved_steps(tmp_path)[-2:] == [2, 3]


def test_closing_tells_what_failed_and_closes(tmp_path, monkeypatch):
  writer = Checkpointer(tmp_path, 2)
  closed, close = [], writer._manager.close
  monkeypatch.setattr(writer._manager, "close", lambda: closed.append(close()))
  monkeypatch.setattr(writer._manager, "save", _full_disk)
  writer.save(3, make_state(3), NOTE)
  with pytest.raises(UserError, match="No space left"):
    writer.close()
  assert closed == [None]


def test_the_newest_few_and_the_best_stay(open_folder, tmp_path):
  losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: None, 10: 2.5}
  checkpointer = open_folder(2)
  save_all(checkpointer, losses)
  assert saved_steps(tmp_path) == [4, 8, 10]
  for again in (checkpointer, open_folder(), open_folder(None)):
    assert again.best_step() == 4 and again.latest_step() == 10
  save_all(open_folder(1), {12: 0.5})
  assert saved_steps(tmp_path) == [12]


def test_a_step_that_is_saved_stays_as_it_is(open_folder, assert_same):
  checkpointer = open_folder()
  save_all(checkpointer, {3: None})
  checkpointer.save(3, make_state(4), NOTE)
  checkpointer.wait()
  assert_same(checkpointer.restore(make_state(0), 3)[0], make_state(3))


def test_without_checkpoints_there_is_nothing_to_restore(open_folder):
  checkpointer = open_folder()
  assert checkpointer.restore_latest(make_state(0)) is None
  assert checkpointer.latest_step() is None and checkpointer.best_step() is None


def test_unscored_checkpoints_have_no_best(open_folder):
  checkpointer = open_folder()
  save_all(checkpointer, {1: None})
  assert checkpointer.best_step() is None


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def delete_arrays(folder: pathlib.Path) -> None:
  largest(folder).unlink()


def delete_note(folder: pathlib.Path) -> None:
  shutil.rmtree(folder / "note")


def truncate(folder: pathlib.Path) -> None:
  file = largest(folder)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_one_bit(folder: pathlib.Path) -> None:
  """Orbax and TensorStore read this without complaint: random numbers are stored as they are."""
  file = largest(folder)
  raw = bytearray(file.read_bytes())
  raw[len(raw) // 2] ^= 4
  file.write_bytes(bytes(raw))


def change_note(folder: pathlib.Path) -> None:
  file = folder / "note" / "metadata"
  text = file.read_text()
  assert '"metrics_bytes": 12' in text
  file.write_text(text.replace('"metrics_bytes": 12', '"metrics_bytes": 13'))


DAMAGES = [delete_arrays, delete_note, truncate, flip_one_bit, change_note]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_newest_is_named_skipped_and_set_aside(
  damage, open_folder, tmp_path, caplog, assert_same
):
  save_all(open_folder(), {3: None, 6: None})
  damage(tmp_path / "checkpoints" / "6")
  checkpointer = open_folder()
  with caplog.at_level(logging.WARNING, logger="absl"):
    state, note = checkpointer.restore_latest(make_state(0))
  assert_same(state, make_state(3))
  assert note["step"] == 3
  ours = [r.getMessage() for r in caplog.records if "trying the one before" in r.getMessage()]
  assert len(ours) == 1
  assert f"checkpoint {tmp_path / 'checkpoints' / '6'} cannot be read (" in ours[0]
  # Its place is free: training saves the same step again when it gets there.
  assert saved_steps(tmp_path) == [3]
  assert [folder.name for folder in (tmp_path / "unreadable").iterdir()] == ["6"]
  save_all(checkpointer, {6: None})
  assert_same(open_folder().restore_latest(make_state(0))[0], make_state(6))


def test_a_flipped_bit_is_told_by_the_name_of_its_array(open_folder, tmp_path):
  save_all(open_folder(), {6: None})
  flip_one_bit(tmp_path / "checkpoints" / "6")
  with pytest.raises(UserError, match=r"wrong checksum of params/head"):
    open_folder().restore(make_state(0), 6)


def test_all_damaged_is_an_error_and_deletes_nothing(open_folder, tmp_path):
  save_all(open_folder(), {3: None, 6: None})
  flip_one_bit(tmp_path / "checkpoints" / "3")
  truncate(tmp_path / "checkpoints" / "6")
  with pytest.raises(UserError, match=r"none of the checkpoints \[3, 6\] can be read"):
    open_folder().restore_latest(make_state(0))
  assert saved_steps(tmp_path) == [3, 6]


def test_another_structure_cannot_be_read(open_folder):
  save_all(open_folder(), {6: None})
  other = make_state(0)._replace(params={"head": jnp.zeros((60, 50)), "gain": jnp.zeros(3)})
  with pytest.raises(UserError, match=r"6 cannot be read"):
    open_folder().restore(other, 6)


def test_an_interrupted_save_is_ignored_and_cleaned_up(open_folder, tmp_path, assert_same):
  save_all(open_folder(), {3: None})
  folder = tmp_path / "checkpoints"
  half = folder / "5.orbax-checkpoint-tmp"
  shutil.copytree(folder / "3", half)
  reader = open_folder(None)
  assert reader.latest_step() == 3
  assert half.exists()  # it may be a running process's
  checkpointer = open_folder()
  assert_same(checkpointer.restore_latest(make_state(0))[0], make_state(3))
  save_all(checkpointer, {6: None})
  assert sorted(f.name for f in folder.iterdir()) == ["3", "6"]


def test_what_another_process_cannot_read_is_read_by_none(open_folder, monkeypatch):
  """Else one would go on with an older checkpoint, and the others wait for it for ever."""
  save_all(open_folder(), {3: 1.0})
  reader = open_folder(None)
  asked = []

  def one_failed(values):
    asked.append(values.copy())
    return values + np.uint32(1) if values.shape == (1,) else values

  monkeypatch.setattr(processes, "sum_over_processes", one_failed)
  with pytest.raises(UserError, match=r"3 cannot be read \(by 1 of the other processes\)"):
    reader.restore(make_state(0), 3)
  assert [values.tolist() for values in asked] == [[0]]


def test_reading_changes_nothing(open_folder, tmp_path):
  save_all(open_folder(), {3: 1.0, 6: None})
  before = sorted(str(f) for f in tmp_path.rglob("*"))
  reader = open_folder(None)
  assert int(reader.restore(make_state(0), 3)[0].step) == 3
  reader.close()
  assert sorted(str(f) for f in tmp_path.rglob("*")) == before


def test_a_checkpoint_that_goes_while_the_folder_is_opened(open_folder, monkeypatch):
  """As the oldest does beside a run that trains there: it is opened again, and not for ever."""
  save_all(open_folder(), {3: 1.0})
  manager, calls = ocp.CheckpointManager, []

  def opened(fails, error):
    calls.clear()

    def make(*args, **kwargs):
      calls.append(None)
      if len(calls) <= fails:
        raise error(2, "gone")
      return manager(*args, **kwargs)

    monkeypatch.setattr(ocp, "CheckpointManager", make)
    return open_folder(None).latest_step()

  assert opened(2, FileNotFoundError) == 3 and len(calls) == 3
  assert opened(1, NotADirectoryError) == 3 and len(calls) == 2
  with pytest.raises(FileNotFoundError):
    opened(100, FileNotFoundError)
  assert len(calls) < 10


@pytest.mark.parametrize("content", [b"", b'{"lo', b'{"lass": 0.5}', b'{"loss": "x"}', b"\xff\xfe"])
def test_a_damaged_loss_costs_the_rank_and_not_the_checkpoint(
  content, open_folder, tmp_path, caplog, assert_same
):
  save_all(open_folder(), {3: 1.0, 6: 0.5})
  (tmp_path / "checkpoints" / "6" / "metrics" / "metrics").write_bytes(content)
  with caplog.at_level(logging.WARNING, logger="absl"):
    checkpointer = open_folder()
  assert "checkpoints/6/metrics/metrics cannot be read" in caplog.text
  assert checkpointer.best_step() == 3
  assert_same(checkpointer.restore_latest(make_state(0))[0], make_state(6))
  save_all(checkpointer, {9: 0.8})
  assert checkpointer.best_step() == 9


def test_checksums_by_hand():
  """1 x 3 + 3 x 0 + 5 x 255; a float counts as its 32 bits; the note's is CRC-32 of its JSON."""
  state = make_state(0)._replace(
    step=jnp.asarray([3, 0, 255], jnp.uint8),
    params={"head": jnp.ones((2, 1)), "bias": jnp.ones(())},
  )
  sums = checksums(state, {})
  assert sums["step"] == 3 + 5 * 255
  assert sums["params/bias"] == 0x3F800000
  assert sums["params/head"] == (1 + 3) * 0x3F800000 % 2**32
  assert sums["note"] == zlib.crc32(b"{}")
  assert set(sums) == {
    *("step", "params/head", "params/bias", "opt_state/0/mu", "opt_state/1"),
    *("control/on", "control/count", "key", "note"),
  }
  other = checksums(state._replace(key=jax.random.key(1)), {"a": 1})
  assert {name for name in sums if sums[name] != other[name]} == {"key", "note"}


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "bool", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_changed_element_and_any_exchange_of_two_changes_the_checksum(dtype, shape):
  rng = np.random.default_rng(0)
  values = rng.permutation(int(np.prod(shape))).reshape(shape) % 251
  base = jnp.asarray(values, dtype)
  wanted = sum_of(base)
  for i in range(base.size):
    changed = base.reshape(-1).at[i].set(jnp.asarray(values.reshape(-1)[i] == 0, dtype))
    if (changed != base.reshape(-1)).any():
      assert sum_of(changed.reshape(shape)) != wanted
  if dtype != "bool" and base.size > 1:
    assert sum_of(jnp.flip(base.reshape(-1)).reshape(shape)) != wanted


@pytest.mark.parametrize("cut", [(1, 1, 1), (2, 1, 3), (2, 2, 1), (1, 4, 3)])
def test_a_checksum_is_the_sum_over_the_parts(cut):
  """However an array is cut into blocks, also beyond 2^31 elements."""
  shape = (4, 8, 6)
  whole = np.random.default_rng(1).integers(0, 2**32, shape, np.uint32)
  everything = tuple(slice(None) for _ in shape)
  parts = 0
  for block in itertools.product(*(range(n) for n in cut)):
    index = tuple(
      slice(k * s // n, (k + 1) * s // n) for k, s, n in zip(block, shape, cut, strict=True)
    )
    parts += int(_weighted_sum(whole[index], index, shape))
  assert parts % 2**32 == int(_weighted_sum(whole, everything, shape))
  naive = sum((2 * i + 1) * int(v) for i, v in enumerate(whole.reshape(-1))) % 2**32
  assert parts % 2**32 == naive
  far = (slice(3, 4), slice(7, 8), slice(2**30, 2**30 + 2))
  index = 2**31 * (3 * 8 + 7) + 2**30
  got = _weighted_sum(np.asarray([[[5, 7]]], np.uint32), far, (4, 8, 2**31))
  assert int(got) == ((2 * index + 1) * 5 + (2 * index + 3) * 7) % 2**32


def sum_of(array):
  return checksums(make_state(0)._replace(step=array), {})["step"]


def test_a_full_disk_is_a_user_error(open_folder, monkeypatch, tmp_path):
  """TensorStore reports it as a ValueError, in the background: this is what it raised."""
  checkpointer = open_folder()

  def full():
    raise ValueError(
      'RESOURCE_EXHAUSTED: Error writing "params.b/0.0" in OCDBT database: Failed to write 123843 '
      "bytes to file 4: No space left on device [os_error_code='28']"
    )

  with monkeypatch.context() as patch:
    patch.setattr(checkpointer._manager, "wait_until_finished", full)
    with pytest.raises(UserError, match=r"cannot write \(No space left on device\). Free space"):
      checkpointer.wait()

  def other():
    raise ValueError("RESOURCE_EXHAUSTED: something else")

  with monkeypatch.context() as patch:
    patch.setattr(checkpointer._manager, "wait_until_finished", other)
    with pytest.raises(ValueError, match="something else"):
      checkpointer.wait()
