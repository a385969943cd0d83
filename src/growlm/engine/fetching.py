"""Fetching: a thread beside the engine's steps that reads modules, one after another.

A file that hangs, as on a disk far away, holds up its own module alone: after a while another thread reads on, and a
process that ends waits for it for some seconds only. Knows functions; not what they read.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

HANGS = 10.0  # seconds that others wait for one that is read
_CLOSING = 5.0  # and that `close`, or the end of the process, waits for all of them together
_MOST = 16  # threads: where so many hang the disk is gone, and nobody goes on
_IDLE = 30.0  # and after which a thread that has nothing to do ends


class Fetcher:
    """Calls functions in the order in which they come, at most a few at a time: one, and those that hang."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        self._at: dict[threading.Thread, tuple[float, Future[Any]]] = {}  # what each is at, and since when
        self._closed = False
        _open.add(self)

    def submit(self, fetch: Callable[[], Any]) -> Future[Any]:
        """What it will return, or raise.

        Raises:
            RuntimeError: it was closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._queue.append((future, fetch))
            self._changed.notify()
        self.tend()
        return future

    def tend(self) -> None:
        """Has another thread go on where all hang and something waits; to be called now and then."""
        with self._changed:
            if not self._queue or self._able() or len(self._threads) >= _MOST:
                return
            thread = threading.Thread(target=self._work, name="growlm-load", daemon=True)
            thread.start()
            self._threads.append(thread)

    def hanging(self) -> list[Future[Any]]:
        """What has been read for so long that others go before it."""
        with self._changed:
            return self._late()

    def close(self) -> None:
        """What waits is cancelled; what is being read is waited for, but for some seconds only."""
        _join(self._end())

    def _end(self) -> list[threading.Thread]:
        """Begins nothing more; the threads that are still at something."""
        with self._changed:
            self._closed = True
            waiting, threads = list(self._queue), list(self._threads)
            self._queue.clear()
            self._changed.notify_all()
        for future, _ in waiting:  # not with the lock held: whoever is told may hold another
            future.cancel()
        return threads

    def _able(self) -> int:
        """Threads that do not hang."""
        return len(self._threads) - len(self._late())

    def _late(self) -> list[Future[Any]]:
        late = time.monotonic() - HANGS
        return [future for since, future in self._at.values() if since <= late and not future.done()]

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._at.pop(me, None)
                if self._able() > 1:  # this one hung, and another has taken over
                    self._threads.remove(me)
                    return
                self._changed.wait_for(lambda: bool(self._queue) or self._closed, _IDLE)
                if not self._queue:
                    self._threads.remove(me)
                    return
                future, fetch = self._queue.popleft()
                self._at[me] = time.monotonic(), future
            _call(future, fetch)
            del future, fetch  # a module is held by nobody but who asked for it


_open: weakref.WeakSet[Fetcher] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that comes back from torch while Python shuts down aborts the process."""
    _join([thread for fetcher in list(_open) for thread in fetcher._end()])


def _join(threads: Sequence[threading.Thread]) -> None:
    """Waits for them, but for some seconds only."""
    end = time.monotonic() + _CLOSING
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))


def _call(future: Future[Any], fetch: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = fetch()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)
    finally:  # an error holds this frame: what was read before it would be held as long
        del future, fetch
