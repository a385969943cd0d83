"""Reading: files, folders and hub datasets -> documents in a stable order, each with where it came from."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from growlm.data.conversations import FORMATS, MORE_KEYS, Turn, format_of, keys_of, lacking, turns_of, written
from growlm.data.extracting import EXTRACTED, Extraction
from growlm.data.records import (
    RECORDS,
    TABLES,
    Fields,
    Record,
    decode,
    kind_of,
    one_line,
    opened,
    read_records,
    string_at,
    take_rows,
)
from growlm.errors import ConfigError, DataError, setting
from growlm.progress import phase, reporting, say, track

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
_IN_PARTS = frozenset((".jsonl", ".csv", ".tsv"))  # read no further than is asked for, packed or not
_LOOKED_AT = 2_000_000  # characters or so, before anything slow is begun
_LOOKED_AT_FILE = 4000  # of these for each file at the least,
_LOOKED_AT_RECORD = 40  # and for each record besides its text


@dataclass(frozen=True, slots=True)
class Document:
    """One text or conversation, and where it came from: `notes/a.md`, or `more.jsonl:17` (line, row or number, counted
    from 1).

    Attributes:
        turns: of a conversation; `text` is then a form of it that tells it from all others.
    """

    text: str
    source: str
    turns: tuple[Turn, ...] = ()

    @property
    def plain(self) -> str:
        """For readers: the text, or what the turns say."""
        return "\n\n".join(turn.content for turn in self.turns) if self.turns else self.text


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


def read(
    paths: Sequence[str | Path], *, text_key: str = "text", separator: str | None = None, format: str = "text"
) -> TextData:
    """Documents of files, folders and hub datasets, in the order given.

    A folder is walked in sorted order, links followed; hidden, binary and unknown files are skipped (see
    `SUFFIXES`), and so is `.json`, with a remark. A file that is named itself is read as UTF-8 text if its suffix
    is unknown. A text file is one document, or several with `separator` (such as a blank line, `"\\n\\n"`).
    `.json` (a list of objects, or one object around it), `.jsonl`, `.csv`, `.tsv`, `.parquet` and `.arrow` hold one a
    record, under the key or in the column `text_key`. Of `.html`, `.htm`, `.pdf` and `.docx` the extra `documents`
    reads the text. All of these may be packed: `.gz`, `.xz`, `.zst`.
    `hub:owner/name[:split]` is loaded with `datasets` (split `train` unless told; `train[:1000]` works), and so is
    `hub:folder`. Blank documents are dropped, as are nulls in Parquet, Arrow and hub columns.

    Records are conversations where `format` is `messages`, `sharegpt`, `alpaca` or `prompt`; with `auto` where they
    have no `text_key` and the keys of one of these (`growlm.data.conversations`). A file holds one form alone.

    Raises `DataError` for what is missing, unreadable, malformed or empty, `ConfigError` for an empty
    separator or an unknown format.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    data, how = TextData([], []), _How.checked(text_key, separator, format)
    for spec in paths:
        with _readable(spec):
            documents, sources = _read_spec(spec, how)
        data.documents.extend(documents)
        data.sources.extend(sources)
    for line in how.extraction.lines():
        say(line)
    if how.separator is not None and data.documents and not any(d.source.endswith(":2") for d in data.documents):
        say(f"the separator {how.separator!r} is in none of the files; a blank line is written '\\n\\n'")
    if not data.documents:
        names = ", ".join(str(spec) for spec in paths[:3]) + (", ..." if len(paths) > 3 else "")
        found = f"no text in {names}: all of it is empty" if names else "no source of text was named"
        raise DataError(f"{found}; give files, folders or hub:owner/name that hold text")
    return data


@dataclass(frozen=True, slots=True)
class _How:
    """Arguments of `read`, and what is counted over all that it reads."""

    text_key: str
    separator: str | None
    format: str
    extraction: Extraction

    @classmethod
    def checked(cls, text_key: str, separator: str | None, format: str) -> _How:
        if separator is not None:  # as it is typed: a backslash and an n are the end of a line
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        if separator == "":
            raise ConfigError("the separator is empty; leave it out, or give one such as a blank line")
        if format not in FORMATS:
            raise ConfigError(f"{setting('format')} {format!r} is not one of {', '.join(FORMATS)}")
        return cls(text_key, separator, format, Extraction())


def look_at(
    paths: Iterable[str | Path], *, text_key: str = "text", separator: str | None = None, format: str = "text"
) -> None:
    """Reads the beginning of the data in a fraction of a second and keeps nothing, for what is wrong with it to be told
    early. Hub datasets are left to `read`, and what is in pages, documents, and large files that are read as one.

    Raises as `read`.
    """
    how, left = _How.checked(text_key, separator, format), _LOOKED_AT
    local = [Path(spec) for spec in paths if _hub_dataset(spec) is None]
    with reporting("", False):
        for path in local:
            with _readable(path):
                found = (f for f in _walk(path) if kind_of(f)[0] != ".json") if path.is_dir() else iter([path])
                first = next(found, None)
                if first is None:
                    raise _nothing_in(path)
                for number, file in enumerate(itertools.chain([first], found)):
                    if number and left <= 0:
                        break
                    left -= max(_look_at(file, how, max(left, _LOOKED_AT_FILE)), _LOOKED_AT_FILE)


def _look_at(path: Path, how: _How, most: int) -> int:
    """How many characters or so were looked at."""
    name, (kind, packing), size = _name(path), kind_of(path), path.stat().st_size
    if not path.is_file():  # a pipe, which can be read once
        return 0
    if kind in EXTRACTED:
        how.extraction.reader(kind, name)
    elif kind in _IN_PARTS or (kind in TABLES and not packing) or (kind in RECORDS and not packing and size <= most):
        fields = _Beginning(how, most, columns_alone=kind not in _IN_PARTS and size > most)
        with suppress(_Enough):
            read_records(path, name, fields)
        return most - fields.left
    elif kind not in RECORDS and not packing and size <= most:
        return _read_file(path, name, how)[2]
    return 0


@contextmanager
def _readable(spec: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = spec if error.filename is None else error.filename
        reason = one_line(error.strerror or error)
        raise DataError(f"{where}: cannot be read ({reason}); check its permissions") from error


def _hub_dataset(spec: str | Path) -> re.Match[str] | None:
    """Owner and name, and the split; None of a file or folder that is there."""
    name = str(spec)
    if name and os.path.exists(spec):
        return None
    hub = re.fullmatch(r"hub:([^:]+)(?::(.+))?", name)
    if hub is None:
        advice = "check the path, or name a dataset as hub:owner/name"
        raise DataError(f"{name!r}: no such file or folder; {advice}")
    return hub


def _read_spec(spec: str | Path, how: _How) -> tuple[list[Document], list[Source]]:
    path, name = Path(spec), str(spec)
    if (hub := _hub_dataset(spec)) is not None:
        documents = _read_hub(name, hub[1], hub[2] or "train", how)
        return documents, [Source(name, *_digest_of(documents), len(documents))]
    files = [path]
    if path.is_dir():
        walked = list(_walk(path))
        files = [file for file in walked if kind_of(file)[0] != ".json"]
        if len(files) < len(walked):
            say(f"{name}: {len(walked) - len(files)} .json left out, as they may be settings; name those that are text")
    if not files:
        raise _nothing_in(name)
    documents, sources = [], []
    with phase(f"reading {path.name or name}", sum(file.stat().st_size for file in files), "bytes") as reading:
        for file in files:
            before = reading.done
            found, sha256, size = _read_file(file, _name(file), how)
            reading.advance(before + size - reading.done)  # what was not counted on the way
            documents.extend(found)
            sources.append(Source(_name(file), sha256, size, len(found)))
    if len(files) > FILES_LISTED:
        lines = (f"{s.sha256}  {_name(f.relative_to(path))}\n" for f, s in zip(files, sources, strict=True))
        sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        sources = [Source(_name(path), sha256, sum(s.bytes for s in sources), len(documents))]
    return documents, sources


def _nothing_in(folder: str | Path) -> DataError:
    kinds = " ".join(sorted(SUFFIXES))
    return DataError(
        f"{folder}: no file to read in this folder; name its files themselves, or give a folder with any of {kinds}"
    )


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


def _read_file(path: Path, name: str, how: _How) -> tuple[list[Document], str, int]:
    """(documents, sha256, bytes); the hash is of the very bytes that were read."""
    kind, packing = kind_of(path)
    if kind in RECORDS:
        fields = _Documents(how)
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
        text = how.extraction.text(kind, content, name)
    elif b"\0" in content:
        raise DataError(f"{name}: a binary file (zero byte at offset {content.index(0)}); give text in UTF-8")
    else:
        text = decode(content, name).replace("\r\n", "\n")
    documents = [Document(text, name)]
    if how.separator is not None:
        documents = [Document(part, f"{name}:{n}") for n, part in enumerate(text.split(how.separator), 1)]
    return _not_blank(documents), sha256, size


class _Documents(Fields):
    """Records of one file: each becomes a document, a text or a conversation."""

    def __init__(self, how: _How) -> None:
        self._how = how
        self._format: str | None = None  # that the file has
        self._columns: list[str] = []  # of a table, those that are read
        self.documents: list[Document] = []

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        self._format = self._format_of(names, where, "column")
        if self._format == "text":
            self._columns = [self._how.text_key]
        else:
            more = (key for key in MORE_KEYS.get(self._format, ()) if key in names)
            self._columns = [*keys_of(names, self._format), *more]
        return self._columns

    def is_record(self, record: Record) -> bool:
        if self._how.text_key in record:
            return True
        found = None if self._how.format == "text" else format_of(record)
        if found not in ("prompt", "alpaca"):
            return found is not None
        # One object around a list may have such keys as well.
        return not any(isinstance(record[key], list) for key in keys_of(record, found))

    def take(self, record: Record, where: str) -> None:
        found = self._format
        if found is None or not self._columns:  # of a table the columns have said it
            found = self._format_of(record, where, "key")
        if self._format is None:
            self._format = found
        elif found != self._format:
            raise DataError(
                f"{where}: a record of format {found} among those of format {self._format}; put each in a file of its "
                "own, or name one with --format"
            )
        if found == "text":
            text = string_at(record[self._how.text_key], self._how.text_key, where)
            self.documents.append(Document(text, where))
        else:
            turns = turns_of({**dict.fromkeys(self._columns), **record}, found, where)  # with a table's nulls
            self.documents.append(Document(written(turns), where, turns))

    def _format_of(self, names: Collection[str], where: str, what: str) -> str:
        key, wanted = self._how.text_key, self._how.format
        if wanted in ("auto", "text"):
            if key in names:
                return "text"
            if wanted == "auto" and (found := format_of(names)):
                return found
            advice = "name the one that holds the text with --text-key"
            if wanted == "auto":
                advice += ", or rename two to question and answer for conversations"
            raise DataError(f"{where}: {_lacks(what, key, names)}; {advice}")
        for key in lacking(names, wanted):
            found = format_of(names)
            advice = "see --format" if found is None else f"these are of --format {found}, which auto finds"
            raise DataError(f"{where}: {_lacks(what, key, names)}, as --format {wanted} has it; {advice}")
        return wanted


class _Enough(Exception):
    pass


class _Beginning(_Documents):
    """The first records of a file, of so many characters or so; of a table perhaps its columns alone. Raises `_Enough`
    where there may be more."""

    def __init__(self, how: _How, most: int, *, columns_alone: bool) -> None:
        super().__init__(how)
        self.left, self._alone = most, columns_alone

    def columns(self, names: Sequence[str], where: str) -> list[str]:
        found = super().columns(names, where)
        if self._alone:
            raise _Enough
        return found

    def take(self, record: Record, where: str) -> None:
        super().take(record, where)
        self.left -= len(self.documents.pop().text) + _LOOKED_AT_RECORD
        if self.left <= 0:
            raise _Enough


def _read_hub(name: str, dataset: str, split: str, how: _How) -> list[Document]:
    import datasets

    try:
        table = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # no common class: hub, network, cache, split and format errors all end here
        advice = "check its name, split and your network, or download it and give its files"
        raise DataError(f"{name}: the dataset cannot be loaded ({one_line(error)}); {advice}") from error
    fields = _Documents(how)

    def batches(columns: list[str]) -> Iterator[Sequence[Record]]:
        groups = table.select_columns(columns).iter(batch_size=_ROWS)
        for group in track(groups, f"reading {name}", "batches", total=-(-len(table) // _ROWS)):
            yield [dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)]

    take_rows(table.column_names, batches, name, fields)
    return _not_blank(fields.documents)


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


def _lacks(what: str, key: str, found: Iterable[str]) -> str:
    names = [repr(name) for name in found]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"no {what} {key!r} among {shown or 'none'}"
