"""Calls that follow one another without waiting for whoever made them."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax


class Made(NamedTuple):
  """What a call has returned, and when: `time.perf_counter()`, or None if it may be under way."""

  result: Any
  ended: float | None


class Launcher:
  """Makes calls one after the other; what they return, as `Made`, are futures.

  One process makes them in a thread. A GPU's loop asks the host whether to go on, so that a call
  lasts as long as its steps: the next one is launched behind it at once, although the caller may
  be writing records, making a feed or waiting for Python's lock. Where calls return before they are
  done, as on CPU, a future waits for the results, so that as much is under way on every device.

  Several processes have to launch everything in the same order: each makes the calls at once.

  Attributes:
    depth: how many calls there should be at any time, the running one included.

  Args:
    stop: once it is set, or a call has failed, no call begins that was waiting, and None takes the
      place of what it returns. (With several processes all begin.)
  """

  def __init__(self, stop: threading.Event):
    self._stop, self._failed = stop, False
    self._thread = ThreadPoolExecutor(1, "dispatch") if jax.process_count() == 1 else None
    self.depth = 1 if self._thread is None else 2

  def __call__(self, call: Callable[..., Any], *args: Any) -> Future[Made | None]:
    if self._thread is not None:
      return self._thread.submit(self._in_turn, call, *args)
    done: Future[Made | None] = Future()
    done.set_result(Made(call(*args), None))
    return done

  def _in_turn(self, call: Callable[..., Any], *args: Any) -> Made | None:
    if self._stop.is_set() or self._failed:
      return None
    try:
      return Made(jax.block_until_ready(call(*args)), time.perf_counter())
    except BaseException:  # Whatever it was, the future tells it.
      self._failed = True
      raise

  def __enter__(self) -> "Launcher":
    return self

  def __exit__(self, *_: object) -> None:
    if self._thread is not None:
      self._thread.shutdown(cancel_futures=True)
