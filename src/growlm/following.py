"""Following: a process that ends with the one that began it, however that one ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_LEAVES = 15.0  # seconds in which it may keep what it has come to


def end_with_parent() -> None:
    """From here on, interrupts this process, as by Ctrl-C, once its standard input ends: whoever has begun it holds the
    other end, and the system closes it for one that was killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which one that runs in the background may have lost
    threading.Thread(target=_follow, name="growlm-following", daemon=True).start()


def _follow() -> None:
    while os.read(sys.stdin.fileno(), 1 << 12):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_LEAVES)
    os._exit(1)
