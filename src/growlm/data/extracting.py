"""Extracting: the text of HTML pages, PDF files and Word documents. Their markup is never learned as prose.

Knows the packages of the extra `documents`, each imported when a file needs it; not where a file lies.
"""

from __future__ import annotations

import importlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from growlm.data.records import one_line
from growlm.errors import DataError

_NAMES = {".html": "HTML", ".htm": "HTML", ".pdf": "PDF", ".docx": "Word"}
EXTRACTED = frozenset(_NAMES)


class Extraction:
    """Texts of files, and what of them was left out."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def text(self, kind: str, content: bytes, name: str) -> str:
        """Text of one file.

        Args:
            kind: its suffix, of `EXTRACTED`.

        Raises:
            DataError: the package that reads it is missing, or it cannot be read.
        """
        what, reader = _NAMES[kind], self.reader(kind, name)
        _, read = _READERS[what]
        counts = self._counts.setdefault(what, Counter())
        try:
            text = read(reader, content, counts)
        except Exception as error:  # each package has errors of its own
            raise DataError(f"{name}: cannot be read as {what} ({one_line(error)}); give its text as .txt") from error
        counts["files"] += 1
        counts["characters"] += len(text)
        counts["empty"] += not text.strip()
        return text

    @staticmethod
    def reader(kind: str, name: str) -> Any:
        """The package that reads a file of this suffix.

        Raises:
            DataError: it is missing.
        """
        what = _NAMES[kind]
        try:
            return importlib.import_module(_READERS[what][0])
        except ImportError:
            raise DataError(
                f'{name}: {what} is read with an extra: pip install "growlm[documents]"; or give its text as .txt'
            ) from None

    def lines(self) -> list[str]:
        """For people: a line for each kind of file that there was."""
        found = []
        for what, counts in self._counts.items():
            files = f"{counts['files']:,} {what} file{'' if counts['files'] == 1 else 's'}"
            line = f"{files}: {counts['characters']:,} characters of text; left out: {_LEFT_OUT[what].format(**counts)}"
            found.append(line + (f"; {counts['empty']:,} without any text" if counts["empty"] else ""))
        return found


def require_reader(name: str) -> None:
    """
    Args:
        name: of a file of any kind.

    Raises:
        DataError: the package that reads it is missing.
    """
    if (kind := PurePath(name).suffix.lower()) in EXTRACTED:
        Extraction.reader(kind, name)


def _html(trafilatura: Any, content: bytes, counts: Counter[str]) -> str:
    counts["bytes"] += len(content)
    return trafilatura.extract(content, include_comments=False, include_tables=True, favor_recall=True) or ""


def _pdf(pypdf: Any, content: bytes, counts: Counter[str]) -> str:
    pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(content)).pages]
    counts["pages"] += len(pages)
    counts["scanned"] += sum(not page.strip() for page in pages)
    return "\n\n".join(page for page in pages if page.strip())


def _word(docx: Any, content: bytes, counts: Counter[str]) -> str:
    parts = []
    for part in docx.Document(io.BytesIO(content)).iter_inner_content():
        rows = getattr(part, "rows", None)
        parts.append(part.text if rows is None else "\n".join("\t".join(c.text for c in row.cells) for row in rows))
    return "\n\n".join(part for part in parts if part.strip())


_READERS: dict[str, tuple[str, Callable[[Any, bytes, Counter[str]], str]]] = {
    "HTML": ("trafilatura", _html),
    "PDF": ("pypdf", _pdf),
    "Word": ("docx", _word),
}
_LEFT_OUT = {
    "HTML": "markup, scripts, menus and what else surrounds it, of {bytes:,} bytes in all",
    "PDF": "pictures, and {scanned:,} of {pages:,} pages, which have no text",
    "Word": "pictures, headers and footers, notes and comments",
}
