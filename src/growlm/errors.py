"""Errors that a user or a file can cause. Each message says what failed, where, and what to do next, in one line.

What only a bug of ours can cause is an `assert`, never one of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class GrowlmError(Exception):
    """Base class: the command line prints its message in one line and exits with status 1."""


class DataError(GrowlmError):
    """A text source is missing, empty, too short or malformed."""


class BaseModelError(GrowlmError):
    """A base is missing, of an unknown family, or not the one that a store was made for."""


class StoreError(GrowlmError):
    """A store cannot be created, opened or changed as asked."""


class IntegrityError(StoreError):
    """A file of a store is not what its manifest says."""


class NotBetterError(GrowlmError):
    """What was learned does no better on held-out text than what was there, and was not saved."""


class UnknownModuleError(StoreError):
    """A module name that the store does not hold. Never answered by the base in silence."""


class BudgetError(GrowlmError):
    """The weights asked for do not fit the memory budget."""


class ConfigError(GrowlmError):
    """A setting is out of range, or two settings contradict each other."""


class TrainingError(GrowlmError):
    """Training has gone wrong: its loss became NaN or infinite."""


class RankError(GrowlmError):
    """Another process that trains along has ended, or cannot be reached."""


class Interrupted(GrowlmError):
    """A long run was stopped by the user; the message says how to go on."""


class ClosedError(GrowlmError):
    """An engine was asked for something after it was closed."""


class GrowlmWarning(UserWarning):
    """Something that goes on and may not be what was meant. The command line prints it in one line on stderr."""


_written: ContextVar[Callable[[str], str]] = ContextVar("written", default=str)


def setting(name: str) -> str:
    """A setting's name as the reader of a message would write it: a field in Python, on the command line an option."""
    return _written.get()(name)


@contextmanager
def settings_written(write: Callable[[str], str]) -> Iterator[None]:
    """Inside, messages name settings in this way."""
    token = _written.set(write)
    try:
        yield
    finally:
        _written.reset(token)


def first_error(error: ValidationError, name: Callable[[str], str] = str) -> str:
    """The first thing that was refused, as our own messages say it: which key, what it is, what it may be.

    Args:
        name: how the key is called.
    """
    first = error.errors()[0]
    # Without the names of what was tried of several types.
    parts = [str(p) for p in first["loc"] if p not in ("[key]", "constrained-int") and not str(p).startswith("tuple[")]
    where = shortened(".".join([*map(name, parts[:1]), *parts[1:]]))
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}"
    where, message = where[1:-1], first["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if first["type"] == "missing":
        return f"{where}: {message}"
    # As our own messages say it.
    message = re.sub(r"^Input should be (a valid )?", "expected ", message)
    message = message.replace("less than or equal to", "at most").replace("greater than or equal to", "at least")
    return (
        f"{where} is {shortened(first['input'])}, {message}"
        if message.startswith("expected")
        else (f"{where} is {shortened(first['input'])}: {message}")
    )


def shortened(value: Any) -> str:
    """A value for a message of one line."""
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:60]}..."
