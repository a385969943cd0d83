"""Turns: one thread at a time makes a step, and who waits for something is let go as soon as it is there."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turns:
    """A lock, to be held with `with`, that goes before those who only want to move things on (`take_unless`)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._wanted = 0  # how many wait for it in `with`

    def __enter__(self) -> None:
        with self._changed:
            self._wanted += 1
            try:
                self._changed.wait_for(lambda: not self._held)
                self._held = True
            finally:
                self._wanted -= 1

    def __exit__(self, *exception: object) -> None:
        self.give_back()

    def take_unless(self, done: Callable[[], bool]) -> bool:
        """Waits for the turn, or for what others do with theirs to be enough; returns whether it has the turn."""
        with self._changed:
            self._changed.wait_for(lambda: done() or not (self._held or self._wanted))
            if done():
                return False
            self._held = True
            return True

    def take_now(self) -> bool:
        """Takes the turn if it is free; returns whether it was."""
        with self._changed:
            free = not self._held
            self._held = True
            return free

    def give_back(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()
