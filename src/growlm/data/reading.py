"""Reading: files, folders and hub datasets -> documents in a stable order, each with where it came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from growlm.errors import ConfigError, DataError
from growlm.progress import phase, track

# What is read from a folder. No .json: it is settings and data more often than text.
PROSE = ".txt .md .rst .tex .html"
CODE = (
    ".py .pyi .c .h .cc .cpp .hpp .cu .cuh .cs .css .go .hs .java .jl .js .jsx .kt .lua .php .r .rb .rs"
    " .scala .sh .sql .swift .ts .tsx"
)
SUFFIXES = frozenset(f"{PROSE} {CODE} .jsonl .parquet".split())

FILES_LISTED = 1000  # a folder with more files than this is recorded as one source
_TOLD = 1 << 20  # bytes of a file after which it is told how far it is read
_ROWS = 1000  # of a hub dataset that are read at a time


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from: `notes/a.md`, or `more.jsonl:17` (line or row, counted from 1)."""

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
    `SUFFIXES`). A file that is named itself is read as UTF-8 text if its suffix is unknown. A text file is
    one document, or several with `separator` (such as a blank line, `"\\n\\n"`). `.jsonl` and `.parquet` hold
    one a line or row, under `text_key`. `hub:owner/name[:split]` is loaded with `datasets` (split `train`
    unless told; `train[:1000]` works), and so is `hub:folder`. Blank documents are dropped, as are nulls in
    Parquet and hub columns.

    Raises `DataError` for what is missing, unreadable, malformed or empty, `ConfigError` for an empty
    separator.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if separator == "":
        raise ConfigError("the separator is empty; leave it out, or give one such as a blank line")
    data = TextData([], [])
    for spec in paths:
        try:
            documents, sources = _read_spec(spec, text_key, separator)
        except OSError as error:
            where = spec if error.filename is None else error.filename
            reason = _one_line(error.strerror or error)
            raise DataError(f"{where}: cannot be read ({reason}); check its permissions") from error
        data.documents.extend(documents)
        data.sources.extend(sources)
    if not data.documents:
        names = ", ".join(str(spec) for spec in paths[:3]) + (", ..." if len(paths) > 3 else "")
        found = f"no text in {names}: all of it is empty" if names else "no source of text was named"
        raise DataError(f"{found}; give files, folders or hub:owner/name that hold text")
    return data


def _read_spec(spec: str | Path, text_key: str, separator: str | None) -> tuple[list[Document], list[Source]]:
    path, name = Path(spec), str(spec)
    if not name or not os.path.exists(path):
        hub = re.fullmatch(r"hub:([^:]+)(?::(.+))?", name)
        if hub is None:
            advice = "check the path, or name a dataset as hub:owner/name"
            raise DataError(f"{name!r}: no such file or folder; {advice}")
        documents = _read_hub(name, hub[1], hub[2] or "train", text_key)
        return documents, [Source(name, *_digest_of(documents), len(documents))]
    files = list(_walk(path)) if path.is_dir() else [path]
    if not files:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(
            f"{name}: no file to read in this folder; name its files themselves, or give a folder with any of {kinds}"
        )
    documents, sources = [], []
    with phase(f"reading {path.name or name}", sum(file.stat().st_size for file in files), "bytes") as reading:
        for file in files:
            before = reading.done
            found, sha256, size = _read_file(file, _name(file), text_key, separator)
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
            suffix = path.suffix.lower()
            if name.startswith(".") or suffix not in SUFFIXES or not path.is_file():
                continue
            if suffix != ".parquet":
                with path.open("rb") as file:
                    if b"\0" in file.read(8192):
                        continue
            yield path


def _read_file(path: Path, name: str, key: str, separator: str | None) -> tuple[list[Document], str, int]:
    """(documents, sha256, bytes); the hash is of the very bytes that were read."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path, name, key)
    if suffix == ".parquet":
        return _read_parquet(path, name, key)
    content = path.read_bytes()
    if b"\0" in content:
        raise DataError(f"{name}: a binary file (zero byte at offset {content.index(0)}); give text in UTF-8")
    text = _decode(content, name).replace("\r\n", "\n")
    documents = [Document(text, name)]
    if separator is not None:
        documents = [Document(part, f"{name}:{n}") for n, part in enumerate(text.split(separator), 1)]
    return _not_blank(documents), hashlib.sha256(content).hexdigest(), len(content)


def _read_jsonl(path: Path, name: str, text_key: str) -> tuple[list[Document], str, int]:
    documents: list[Document] = []
    sha256, offset, told = hashlib.sha256(), 0, 0
    with path.open("rb") as file, phase("reading", unit="bytes") as reading:
        for number, line in enumerate(file, 1):
            sha256.update(line)
            text, where = _decode(line, name, offset), f"{name}:{number}"
            offset += len(line)
            if offset - told >= _TOLD:
                reading.advance(offset - told)
                told = offset
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({_one_line(error)})"
                raise DataError(f"{where}: {reason}; every line must be one JSON object") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: {_kind(record)}, expected a JSON object with key {text_key!r}")
            if text_key not in record:
                raise DataError(f"{where}: {_lacks('key', text_key, record)}")
            documents.append(Document(_string(record[text_key], text_key, where), where))
    return _not_blank(documents), sha256.hexdigest(), offset


def _read_parquet(path: Path, name: str, text_key: str) -> tuple[list[Document], str, int]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                raise DataError(f"{name}: {_lacks('column', text_key, table.schema_arrow.names)}")
            size, rows = path.stat().st_size, max(table.metadata.num_rows, 1)
            groups = track(
                table.iter_batches(columns=[text_key]), "reading", "bytes", count=lambda g: size * g.num_rows // rows
            )
            values = (value for group in groups for value in group.column(0).to_pylist())
            return _rows(values, text_key, name), sha256, size
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a Parquet file ({_one_line(error)}); write it again") from error


def _read_hub(name: str, dataset: str, split: str, text_key: str) -> list[Document]:
    import datasets

    try:
        table = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # no common class: hub, network, cache, split and format errors all end here
        advice = "check its name, split and your network, or download it and give its files"
        raise DataError(f"{name}: the dataset cannot be loaded ({_one_line(error)}); {advice}") from error
    if text_key not in table.column_names:
        raise DataError(f"{name}: {_lacks('column', text_key, table.column_names)}")
    groups = table.select_columns([text_key]).iter(batch_size=_ROWS)
    told = track(groups, f"reading {name}", "batches", total=-(-len(table) // _ROWS))
    return _rows((value for group in told for value in group[text_key]), text_key, name)


def _rows(values: Iterable[object], text_key: str, name: str) -> list[Document]:
    """Documents of a column. A null is how a column says "nothing here", so unlike JSONL's it is no error."""
    rows = ((value, f"{name}:{number}") for number, value in enumerate(values, 1) if value is not None)
    return _not_blank([Document(_string(value, text_key, where), where) for value, where in rows])


def _string(value: object, text_key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {text_key!r} is {_kind(value)}, expected a string; correct it or drop it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no text; a tokenizer would refuse it later
        raise DataError(f"{where}: {text_key!r} holds half of a surrogate pair; remove it") from error
    return value


def _decode(content: bytes, name: str, offset: int = 0) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {offset + error.start}"
        raise DataError(f"{name}: not UTF-8 ({found}); convert it to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


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


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _lacks(what: str, text_key: str, found: Iterable[str]) -> str:
    names = [repr(name) for name in found]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"no {what} {text_key!r} among {shown or 'none'}; name the one that holds the text with --text-key"


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:300]
