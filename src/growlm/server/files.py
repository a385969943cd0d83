"""Files: what is given to learn from: sent to the server, or in a folder that it may read."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterable, Sequence
from pathlib import Path
from typing import Any

from growlm.data import SUFFIXES, require_reader
from growlm.server.refusals import Refusal
from growlm.units import format_size

_LONGEST_NAME = 200
FILE_KINDS = SUFFIXES | {".json"}


class Files:
    """Those that were sent are kept until the server ends.

    Args:
        folder: in which files may be named; None for none.
        most_bytes: of one that is sent.
        most: that are kept.
    """

    def __init__(self, folder: Path | None = None, *, most_bytes: int = 256 << 20, most: int = 64) -> None:
        self._folder = None if folder is None else folder.resolve()
        self.most_bytes, self._most = most_bytes, most
        self._kept: Path | None = None
        self._sent: dict[str, Path] = {}
        self._coming = 0

    async def take(self, name: str, content: AsyncIterable[bytes]) -> str:
        """Keeps a file that is sent; returns what to call it in a job.

        Raises:
            Refusal: a name that is no file's, a kind that is not learned from, too large, or too many.
            DataError: the package that reads this kind is missing.
        """
        self._check(name)
        require_reader(name)
        if len(self._sent) + self._coming >= self._most:
            raise Refusal(400, f"{self._most} files were sent already; remove some", "too_many_files")
        if self._kept is None:
            self._kept = Path(tempfile.mkdtemp(prefix="growlm-files-"))
            atexit.register(self.close)  # however the server ends
        folder = self._kept / uuid.uuid4().hex[:12]
        folder.mkdir()
        path, size = folder / name, 0
        self._coming += 1
        try:
            with path.open("wb") as file:
                async for part in content:
                    size += len(part)
                    if size > self.most_bytes:
                        told = f"{name} is larger than {format_size(self.most_bytes)}; put it in --learn-from"
                        raise Refusal(413, told, "too_large")
                    file.write(part)
            if not size:
                raise Refusal(400, f"{name} is empty", "invalid_value", "name")
        except BaseException:
            shutil.rmtree(folder)
            raise
        finally:
            self._coming -= 1
        self._sent[folder.name] = path
        return folder.name

    def all(self) -> list[dict[str, Any]]:
        """Ids, names and bytes of those that were sent."""
        return [{"id": name, "name": path.name, "bytes": path.stat().st_size} for name, path in self._sent.items()]

    def sent(self, name: str) -> bool:
        """Whether it is the id of one that was sent."""
        return name in self._sent

    def remove(self, name: str) -> bool:
        path = self._sent.pop(name, None)
        if path is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
        return path is not None

    def remove_all(self, names: Sequence[str]) -> None:
        for name in names:
            self.remove(name)

    def paths(self, names: Sequence[str]) -> list[Path]:
        """
        Raises:
            Refusal: neither sent nor in the folder.
        """
        return [self._path(name) for name in names]

    def _path(self, name: str) -> Path:
        if name in self._sent:
            return self._sent[name]
        if self._folder is None:
            told = f"files: {name!r} was not sent, and this server reads no folder; start it with --learn-from"
            raise Refusal(400, told, "no_such_file", "files")
        try:
            path = (self._folder / name).resolve()
            there = path.exists()
        except (OSError, ValueError):  # a name that no file can have
            path, there = self._folder, False
        if not path.is_relative_to(self._folder):
            raise Refusal(400, f"files: {name!r} is not in the folder of --learn-from", "no_such_file", "files")
        if not there:
            raise Refusal(400, f"files: there is no {name!r} in the folder of --learn-from", "no_such_file", "files")
        return path

    @staticmethod
    def _check(name: str) -> None:
        told = None
        if (
            not name.isprintable()
            or "/" in name
            or "\\" in name
            or name.startswith(".")
            or len(name.encode()) > _LONGEST_NAME
        ):
            told = "that is no name of a file"
        elif Path(name).suffix.lower() not in FILE_KINDS:
            told = f"text is read from {' '.join(sorted(FILE_KINDS))}; archives are to be unpacked before they are sent"
        if told is not None:
            raise Refusal(400, f"{name!r}: {told}", "unknown_kind", "name")

    def close(self) -> None:
        if self._kept is not None:
            shutil.rmtree(self._kept, ignore_errors=True)
