"""Files on the disk: all below a folder, text to read, and what goes wrong: a changed bit, a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def all_files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path from there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def edit(path: Path, **changes: object) -> None:
    """Sets keys of an object in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> bytes:
    """Changes one bit near the end of a file; returns what it held before."""
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    return content


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """As a full disk does, the system refuses to write any file beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
