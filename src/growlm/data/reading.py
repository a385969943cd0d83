"""Reading: files, folders and hub datasets -> documents in a stable order, each with where it came from."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from growlm.data.extracting import EXTRACTED, Extraction
from growlm.data.records import (
    RECORDS,
    Fields,
    Record,
    decode,
    kind_of,
    one_line,
    opened,
    read_records,
    take_rows,
    type_of,
)
from growlm.errors import ConfigError, DataError
from growlm.progress import phase, say, track

# What is read from a folder, packed or not.
PROSE = ".txt .md .rst .tex"
CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .cs .css .go .hs .java .jl .js .jsx .kt .lua .php .r .rb .rs"
    " .scala .sh .sql .swift .ts .tsx"
)
# No .json: in a folder it is settings more often than text.
SUFFIXES = frozenset(f"{PROSE} {CODE}".split()) | RECORDS - {".json"} | EXTRACTED
_BINARY = EXTRACTED | {".parquet", ".arrow"}

FILES_LISTED = 1000  # a folder with more files than this is recorded as one source
_ROWS = 1000  # of a hub dataset that are read at a time


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from: `notes/a.md`, or `more.jsonl:17` (line, row or number, counted from 1)."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Source:
    """What the manifest records of one source.

    `sha256` and `bytes` are of the file. Of a folder with more than 1000 files they are of its list of
    `sha256  path` lines and the sum; of a hub dataset, which is no one file, of the text itself.
    """

    path: str
    sha256: str
    bytes: int
    documents: int


@dataclass(frozen=True)
class TextData:
    """The documents of one body of text, in a stable order, and the sources that they were read from."""

    documents: list[Document]
    sources: list[Source]

    @cached_property
    def digest(self) -> str:
        """sha256 over the documents' texts in order; a run may only be resumed on the same one."""
        return _digest_of(self.documents)[0]


def read(paths: Sequence[str | Path], *, text_key: str = "text", separator: str | None = None) -> TextData:
    """Documents of files, folders and hub datasets, in the order given.

    A folder is walked in sorted order, links followed; hidden, binary and unknown files are skipped (see
    `SUFFIXES`), and so is `.json`, with a remark. A file that is named itself is read as UTF-8 text if its suffix
    is unknown. A text file is one document, or several with `separator` (such as a blank line, `"\\n\\n"`).
    `.json` (a list of objects, or one object around it), `.jsonl`, `.csv`, `.tsv`, `.parquet` and `.arrow` hold one a
    record, under the key or in the column `text_key`. Of `.html`, `.htm`, `.pdf` and `.docx` the extra `documents`
    reads the text. All of these may be packed: `.gz`, `.xz`, `.zst`.
    `hub:owner/name[:split]` is loaded with `datasets` (split `train` unless told; `train[:1000]` works), and so is
    `hub:folder`. Blank documents are dropped, as are nulls in Parquet, Arrow and hub columns.

    Raises `DataError` for what is missing, unreadable, malformed or empty, `ConfigError` for an empty
    separator.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if separator == "":
        raise ConfigError("the separator is empty; leave it out, or give one such as a blank line")
    data, extraction = TextData([], []), Extraction()
    for spec in paths:
        try:
            documents, sources = _read_spec(spec, text_key, separator, extraction)
        except OSError as error:
            where = spec if error.filename is None else error.filename
            reason = one_line(error.strerror or error)
            raise DataError(f"{where}: cannot be read ({reason}); check its permissions") from error
        data.documents.extend(documents)
        data.sources.extend(sources)
    for line in extraction.lines():
        say(line)
    if not data.documents:
        names = ", ".join(str(spec) for spec in paths[:3]) + (", ..." if len(paths) > 3 else "")
        found = f"no text in {names}: all of it is empty" if names else "no source of text was named"
        raise DataError(f"{found}; give files, folders or hub:owner/name that hold text")
    return data


def _read_spec(
    spec: str | Path, text_key: str, separator: str | None, extraction: Extraction
) -> tuple[list[Document], list[Source]]:
    path, name = Path(spec), str(spec)
    if not name or not os.path.exists(path):
        hub = re.fullmatch(r"hub:([^:]+)(?::(.+))?", name)
        if hub is None:
            advice = "check the path, or name a dataset as hub:owner/name"
            raise DataError(f"{name!r}: no such file or folder; {advice}")
        documents = _read_hub(name, hub[1], hub[2] or "train", text_key)
        return documents, [Source(name, *_digest_of(documents), len(documents))]
    files = [path]
    if path.is_dir():
        found = list(_walk(path))
        files = [file for file in found if kind_of(file)[0] != ".json"]
        if len(files) < len(found):
            say(f"{name}: {len(found) - len(files)} .json left out, as they may be settings; name those that are text")
    if not files:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(
            f"{name}: no file to read in this folder; name its files themselves, or give a folder with any of {kinds}"
        )
    documents, sources = [], []
    with phase(f"reading {path.name or name}", sum(file.stat().st_size for file in files), "bytes") as reading:
        for file in files:
            before = reading.done
            found, sha256, size = _read_file(file, _name(file), text_key, separator, extraction)
            reading.advance(before + size - reading.done)  # what was not counted on the way
            documents.extend(found)
            sources.append(Source(_name(file), sha256, size, len(found)))
    if len(files) > FILES_LISTED:
        lines = (f"{s.sha256}  {_name(f.relative_to(path))}\n" for f, s in zip(files, sources, strict=True))
        sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        sources = [Source(_name(path), sha256, sum(s.bytes for s in sources), len(documents))]
    return documents, sources


def _walk(folder: Path) -> Iterator[Path]:
    """Files of known kinds, sorted within each folder; one that links reach again is not entered again."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder in silence

    entered = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            kind, packing = kind_of(path)
            if name.startswith(".") or kind not in SUFFIXES | {".json"} or not path.is_file():
                continue
            if not packing and kind not in _BINARY:
                with path.open("rb") as file:
                    if b"\0" in file.read(8192):
                        continue
            yield path


def _read_file(
    path: Path, name: str, key: str, separator: str | None, extraction: Extraction
) -> tuple[list[Document], str, int]:
    """(documents, sha256, bytes); the hash is of the very bytes that were read."""
    kind, packing = kind_of(path)
    if kind in RECORDS:
        fields = _TextFields(key)
        sha256, size = read_records(path, name, fields)
        return _not_blank(fields.documents), sha256, size
    if packing:
        with opened(path, name) as (stream, file):
            content = stream.read()
        sha256, size = file.sha256.hexdigest(), file.size
    else:
        content = path.read_bytes()
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    if kind in EXTRACTED:
        text = extraction.text(kind, content, name)
    elif b"\0" in content:
        raise DataError(f"{name}: a binary file (zero byte at offset {content.index(0)}); give text in UTF-8")
    else:
        text = decode(content, name).replace("\r\n", "\n")
    documents = [Document(text, name)]
    if separator is not None:
        documents = [Document(part, f"{name}:{n}") for n, part in enumerate(text.split(separator), 1)]
    return _not_blank(documents), sha256, size


class _TextFields(Fields):
    """Records that hold a text under one key: each becomes a document."""

    def __init__(self, text_key: str) -> None:
        self._key = text_key
        self.documents: list[Document] = []

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        if self._key not in names:
            raise DataError(f"{where}: {_lacks('column', self._key, names)}")
        return [self._key]

    def is_record(self, record: Record) -> bool:
        return self._key in record

    def take(self, record: Record, where: str) -> None:
        if self._key not in record:
            raise DataError(f"{where}: {_lacks('key', self._key, record)}")
        self.documents.append(Document(_string(record[self._key], self._key, where), where))


def _read_hub(name: str, dataset: str, split: str, text_key: str) -> list[Document]:
    import datasets

    try:
        table = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # no common class: hub, network, cache, split and format errors all end here
        advice = "check its name, split and your network, or download it and give its files"
        raise DataError(f"{name}: the dataset cannot be loaded ({one_line(error)}); {advice}") from error
    fields = _TextFields(text_key)

    def batches(columns: list[str]) -> Iterator[Sequence[Record]]:
        groups = table.select_columns(columns).iter(batch_size=_ROWS)
        for group in track(groups, f"reading {name}", "batches", total=-(-len(table) // _ROWS)):
            yield [dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)]

    take_rows(table.column_names, batches, name, fields)
    return _not_blank(fields.documents)


def _string(value: object, text_key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {text_key!r} is {type_of(value)}, expected a string; correct it or drop it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no text; a tokenizer would refuse it later
        raise DataError(f"{where}: {text_key!r} holds half of a surrogate pair; remove it") from error
    return value


def _not_blank(documents: list[Document]) -> list[Document]:
    return [document for document in documents if document.text and not document.text.isspace()]


def _digest_of(documents: Iterable[Document]) -> tuple[str, int]:
    """(sha256, bytes) of the texts in order; each length goes first, so that where one ends counts too."""
    sha256, size = hashlib.sha256(), 0
    for document in track(documents, "hashing the text", "documents"):
        content = document.text.encode()
        sha256.update(len(content).to_bytes(8, "little") + content)
        size += len(content)
    return sha256.hexdigest(), size


def _name(path: Path) -> str:
    # On Linux a file's name can be bytes that are no text, which a manifest could not hold.
    return os.fsencode(path.as_posix()).decode(errors="replace")


def _lacks(what: str, text_key: str, found: Iterable[str]) -> str:
    names = [repr(name) for name in found]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"no {what} {text_key!r} among {shown or 'none'}; name the one that holds the text with --text-key"
