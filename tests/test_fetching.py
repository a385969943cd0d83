"""Fetching: in order, one at a time; what hangs holds up the others, and whoever closes, for a while only."""

from __future__ import annotations

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
    assert not fetcher._threads[0].is_alive()
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
