"""What commands print: results to stdout, remarks and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any

from growlm.progress import phase, reporting


def reports(subject: str, *, long: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Shows the progress of a command, under the name in its argument `subject`, from before its imports on.

    Args:
        long: it takes minutes, and soon says that it has begun: the imports alone take seconds.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**arguments: Any) -> None:
            with reporting(name_of(arguments[subject]), long=long):
                command(**arguments)

        return run

    return wrap


def name_of(path: str | Path) -> str:
    """What to call a store, a checkpoint or a module for short."""
    return Path(path).name or Path(path).resolve().name


def print_stream(pieces: Any, subject: str) -> Any:
    """Prints the texts as they come; returns what comes last. Reads to the end: only then has the stream finished.

    Args:
        subject: what answers, for the time until it does.
    """
    pieces, result = iter(pieces), None
    with reporting(subject), phase("reading the prompt"):
        first = next(pieces)
    for piece in chain([first], pieces):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        else:
            result = piece
    print(flush=True)
    assert result is not None
    return result


def print_json(content: Any) -> None:
    # JSON has no nan: the loss of a module that diverged is null.
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    print(json.dumps(plain, ensure_ascii=False))


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
