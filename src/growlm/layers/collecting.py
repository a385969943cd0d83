"""Collecting: what layers decide in a forward pass, for whoever asks, without keeping any of it on the layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Collector(Generic[T]):
    """A list that is open within a `with` block, for that thread or task alone."""

    def __init__(self, name: str) -> None:
        self._found: ContextVar[list[T] | None] = ContextVar(name, default=None)

    @contextmanager
    def open(self) -> Iterator[list[T]]:
        """Within it, what is added goes to the list that this yields."""
        found: list[T] = []
        token = self._found.set(found)
        try:
            yield found
        finally:
            self._found.reset(token)

    @property
    def is_open(self) -> bool:
        return self._found.get() is not None

    def add(self, item: T) -> T:
        """Adds it to the list, if one is open; gives it back."""
        if (found := self._found.get()) is not None:
            found.append(item)
        return item
