"""Fetching: in order, one at a time; what hangs holds up the others, and whoever closes, for a while only."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from growlm.engine import fetching
from growlm.engine.fetching import Fetcher


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    monkeypatch.setattr(fetching, "_CLOSING", 0.2)


def tended(fetcher: Fetcher, future) -> object:
    for _ in range(600):
        fetcher.tend()
        if future.done():
            break
        time.sleep(0.01)
    return future.result(0)


def test_what_is_asked_for_is_fetched_in_order_and_errors_are_its_own():
    fetcher, calls, running = Fetcher(), [], []

    def fetch(number: int) -> int:
        running.append(number)
        assert len(running) == 1
        time.sleep(0.002)
        calls.append(number)
        running.remove(number)
        return 10 // (number - 3)

    futures = [fetcher.submit(lambda number=number: fetch(number)) for number in range(8)]
    with pytest.raises(ZeroDivisionError):
        futures[3].result(30)
    assert [future.result(30) for future in futures if future is not futures[3]] == [-4, -5, -10, 10, 5, 3, 2]
    assert calls == list(range(8))
    fetcher.close()
    assert not fetcher._threads
    with pytest.raises(RuntimeError):
        fetcher.submit(lambda: None)


def test_others_are_fetched_while_one_hangs_and_what_hung_is_there_in_the_end(soon):
    fetcher, gate = Fetcher(), threading.Event()
    hangs = fetcher.submit(gate.wait)
    assert tended(fetcher, fetcher.submit(lambda: "other")) == "other"
    assert not hangs.done()
    gate.set()
    assert hangs.result(30) is True
    assert tended(fetcher, fetcher.submit(lambda: "later")) == "later"
    for _ in range(600):  # the thread that hung is gone
        if len(fetcher._threads) == 1:
            break
        time.sleep(0.01)
    assert len(fetcher._threads) == 1
    fetcher.close()


def test_one_that_hangs_does_not_keep_it_from_closing(soon):
    fetcher, begun, gate = Fetcher(), threading.Event(), threading.Event()
    hangs, waits = fetcher.submit(lambda: begun.set() or gate.wait()), fetcher.submit(lambda: None)
    assert begun.wait(30)
    start = time.monotonic()
    fetcher.close()
    assert time.monotonic() - start < 5
    assert waits.cancelled()
    gate.set()
    assert hangs.result(30) is True


def test_whoever_is_told_that_it_was_closed_may_hold_a_lock_that_others_want_while_they_ask():
    fetcher, lock, gate, begun = Fetcher(), threading.Lock(), threading.Event(), threading.Event()
    fetcher.submit(lambda: begun.set() or gate.wait())
    assert begun.wait(30)

    def told(_: object) -> None:
        with lock:
            pass

    fetcher.submit(lambda: None).add_done_callback(told)
    with lock:
        closing = threading.Thread(target=fetcher.close)
        closing.start()
        while not fetcher._closed:
            time.sleep(0.001)
        with pytest.raises(RuntimeError):
            fetcher.submit(lambda: None)
        gate.set()
    closing.join(30)
    assert not closing.is_alive()


def test_a_thread_that_cannot_begin_is_tried_again(monkeypatch):
    fetcher, start = Fetcher(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        fetcher.submit(lambda: 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert fetcher.submit(lambda: 2).result(30) == 2
    fetcher.close()


def test_a_thread_that_has_nothing_to_do_ends(monkeypatch):
    monkeypatch.setattr(fetching, "_IDLE", 0.01)
    fetcher = Fetcher()
    assert fetcher.submit(lambda: 1).result(30) == 1
    (thread,) = list(fetcher._threads) or [None]
    if thread is not None:
        thread.join(30)
    assert fetcher._threads == []
    assert fetcher.submit(lambda: 2).result(30) == 2


ENDS = """
import sys, threading, time
import torch
from growlm.engine.fetching import Fetcher
begun, fetcher = threading.Event(), Fetcher()
def fetch():
    begun.set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        torch.ones(2000) + 1  # without Python's lock
    print("fetched", flush=True)
fetcher.submit(fetch)
begun.wait()
sys.exit(3)
"""


def test_a_process_that_ends_while_something_is_fetched_ends_as_it_should():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "fetched\n", "")


HANG = """
import atexit, threading, time
atexit.register(lambda: print(time.monotonic() - began))  # called after what was registered later
from growlm.engine import fetching
fetching._CLOSING = 1.0
kept = [fetching.Fetcher() for _ in range(12)]
for fetcher in kept:
    begun = threading.Event()
    fetcher.submit(lambda: begun.set() or threading.Event().wait())
    begun.wait()
began = time.monotonic()
"""


def test_a_process_waits_for_all_that_hang_together():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 <= float(done.stdout) < 6
