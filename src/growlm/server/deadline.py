"""Deadline: since when what is asked is being answered, whatever has to be waited for on the way."""

from __future__ import annotations

import time
from contextvars import ContextVar

_began: ContextVar[float | None] = ContextVar("began", default=None)


def begins() -> None:
    """From here on, what is done is for a request that has just come."""
    _began.set(time.monotonic())


def began() -> float:
    """When this request has come, on the monotonic clock; now, where nobody said so."""
    found = _began.get()
    return time.monotonic() if found is None else found
