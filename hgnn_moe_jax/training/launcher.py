"""Calls that follow one another without waiting for whoever made them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax


class Launcher:
  """Makes calls one after the other; their results are futures.

  One process makes them in a thread. A GPU's loop asks the host whether to go on, so that a call
  lasts as long as its steps: the next one is launched behind it at once, although the caller may
  be writing records, making a feed or waiting for Python's lock. Where calls return before they are
  done, as on CPU, a future waits for the results, so that as much is under way on every device.

  Several processes have to launch everything in the same order: each makes the calls at once.

  Attributes:
    depth: how many calls there should be at any time, the running one included.

  Args:
    stop: once it is set, no call begins that was waiting (with several processes they all do); its
      result is None.
  """

  def __init__(self, stop: threading.Event):
    self._stop = stop
    self._thread = ThreadPoolExecutor(1, "dispatch") if jax.process_count() == 1 else None
    self.depth = 1 if self._thread is None else 2

  def __call__(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
    if self._thread is not None:
      return self._thread.submit(self._in_turn, call, *args)
    done: Future[Any] = Future()
    done.set_result(call(*args))
    return done

  def _in_turn(self, call: Callable[..., Any], *args: Any) -> Any:
    return None if self._stop.is_set() else jax.block_until_ready(call(*args))

  def __enter__(self) -> "Launcher":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    del kind, error, trace
    if self._thread is not None:
      self._thread.shutdown(cancel_futures=True)
