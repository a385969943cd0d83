"""Mutations of JSON: one value of a document becomes what it cannot be, or the text around it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]

_DEEP: Any = 7
for _ in range(400):
    _DEEP = [_DEEP]
VALUES = [
    None, True, -1, 0, 1, 2**31, 2**40, 2**70, -(2**70), 1.5, -0.5, 1e300, float("nan"), float("inf"),
    "", "x", "x" * 5000, "\n", "\0", "\ud800", [], {}, [1], ["x"], [None], {"a": 1}, {"": None}, _DEEP,
]  # fmt: skip
RAW = [b"", b"[]", b"3", b"null", b"\xff{}", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": 1']


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """Where each value of a document stands, those that hold others too."""
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*above, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a JSON file after one change. Places near the top are as likely as all below them together."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(RAW))
    document = json.loads(content)
    found = list(places(document))
    shallow = [place for place in found if len(place) <= 2]
    place = draw(st.sampled_from(shallow) | st.sampled_from(found))
    changed = json.dumps(replaced(document, place, draw(st.sampled_from(VALUES))))
    return changed.encode()


def rewritten(path: Path, content: bytes) -> bytes:
    """Writes a file; returns what it held."""
    before = path.read_bytes()
    path.write_bytes(content)
    return before
