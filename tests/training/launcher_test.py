"""Calls one after the other: the next begins when the last ends, whatever the caller does."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from hgnn_moe_jax.training.launcher import Launcher


@pytest.fixture
def stop():
  return threading.Event()


def test_the_next_call_begins_without_the_caller(stop):
  order = []
  began = [threading.Event() for _ in range(3)]

  def call(k):
    order.append(k)
    began[k].set()
    return jnp.asarray(k)

  with Launcher(stop) as launcher:
    assert launcher.depth == 2
    results = [launcher(call, k) for k in range(3)]
    assert all(event.wait(60) for event in began)  # Nobody has asked for a result.
    assert [int(r.result().result) for r in results] == order == [0, 1, 2]


def test_a_request_to_stop_lets_the_running_call_end_and_no_other_begin(stop):
  running, go = threading.Event(), threading.Event()

  def call(k):
    running.set()
    assert go.wait(60)
    return k

  with Launcher(stop) as launcher:
    results = [launcher(call, k) for k in (1, 2)]
    assert running.wait(60)
    stop.set()
    go.set()
    assert results[0].result().result == 1 and results[1].result() is None


def test_a_call_ends_when_its_results_are_there(stop, monkeypatch):
  clock = iter([7.5])
  waited = []
  monkeypatch.setattr(jax, "block_until_ready", lambda x: (waited.append(x), x)[1])
  monkeypatch.setattr(time, "perf_counter", lambda: (waited.append("clock"), next(clock))[1])
  with Launcher(stop) as launcher:
    assert launcher(lambda a, b: a + b, 1, 2).result() == (3, 7.5)
  assert waited == [3, "clock"]


def test_an_error_is_that_of_the_call_and_no_other_begins(stop):
  def fail():
    raise ArithmeticError("no")

  with Launcher(stop) as launcher:
    first, second = launcher(fail), launcher(lambda: 1)
    with pytest.raises(ArithmeticError, match="no"):
      first.result()
    assert second.result() is None


def test_leaving_drops_what_has_not_begun(stop):
  running, go = threading.Event(), threading.Event()
  made = []

  def call(k):
    made.append(k)
    running.set()
    assert go.wait(60)

  launcher = Launcher(stop)
  with pytest.raises(KeyError), launcher:
    results = [launcher(call, k) for k in (1, 2)]
    assert running.wait(60)
    threading.Timer(0.05, go.set).start()  # Leaving waits for the first.
    raise KeyError
  assert results[0].done() and results[1].cancelled() and made == [1]


def test_several_processes_make_every_call_at_once_in_their_own_thread(stop, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  threads = []

  def call(k):
    threads.append(threading.current_thread())
    return k

  stop.set()  # They all stop after the same step, which they agree upon: none stops by itself.
  with Launcher(stop) as launcher:
    assert launcher.depth == 1
    result = launcher(call, 7)
    assert threads == [threading.current_thread()] and result.done()
    assert result.result() == (7, None)
