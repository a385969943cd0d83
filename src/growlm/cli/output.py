"""What commands print: results to stdout, remarks to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def print_stream(pieces: Any) -> Any:
    """Prints the texts as they come; returns what comes last. Reads to the end: only then has the stream finished."""
    result = None
    for piece in pieces:
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
