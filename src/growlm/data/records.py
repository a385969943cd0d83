"""Records: files of JSON, JSON lines, CSV, TSV, Parquet and Arrow -> objects by key, each with its line or number.

Unpacks files and hashes what it reads. Does not know which of the keys holds a text, nor what a document is.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from growlm.errors import DataError
from growlm.progress import Phase, phase, track

TABLES = frozenset((".csv", ".tsv", ".parquet", ".arrow"))
RECORDS = TABLES | {".json", ".jsonl"}
PACKED = frozenset((".gz", ".xz", ".zst"))
_BUFFER = 1 << 20  # bytes of a file that are read at a time, after which it is told how far it is

Record = Mapping[str, Any]


class Fields(ABC):
    """What is looked for in records, for `read_records`."""

    @abstractmethod
    def columns(self, names: Sequence[str], where: str) -> list[str]:
        """Of a table's columns, those that are read.

        Raises:
            DataError: what is looked for is not among them.
        """

    @abstractmethod
    def is_record(self, record: Record) -> bool:
        """Whether an object has what is looked for; else it may be one around a list of records."""

    @abstractmethod
    def take(self, record: Record, where: str) -> None:
        """Receives each record in turn.

        Raises:
            DataError: it lacks what is looked for.
        """


def kind_of(path: Path) -> tuple[str, str]:
    """(suffix of what is in a file, that of its packing or ""): `.jsonl` and `.gz` of `more.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else ""), packing


def read_records(path: Path, name: str, fields: Fields) -> tuple[str, int]:
    """Hands every record of a file to `fields`. Returns sha256 and bytes of the file.

    Of tables a null is how a column says "nothing here": it is left out, and so is a row of nothing else.

    Args:
        name: of the file, for messages; a record's is `name:line` or `name:number`, both counted from 1.

    Raises:
        DataError: a file or a record that is malformed.
    """
    kind, packing = kind_of(path)
    if kind in (".parquet", ".arrow") and not packing:
        _read_columns(kind, path, name, fields)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return sha256, path.stat().st_size
    with opened(path, name) as (stream, read):
        if kind == ".jsonl":
            _read_lines(lines(stream, name), name, fields)
        elif kind == ".json":
            _read_json(decode(stream.read(), name), name, fields)
        elif kind in (".csv", ".tsv"):
            _read_table(lines(stream, name), name, "\t" if kind == ".tsv" else ",", fields)
        else:
            _read_columns(kind, stream.read(), name, fields)
    return read.sha256.hexdigest(), read.size


# Bytes


class Hashed(io.RawIOBase):
    """A file that is read once, and hashed and counted on the way."""

    def __init__(self, file: io.RawIOBase, told: Phase) -> None:
        self._file, self._told = file, told
        self.sha256, self.size = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.size += count
        self._told.advance(count)
        return count


@contextmanager
def opened(path: Path, name: str) -> Iterator[tuple[BinaryIO, Hashed]]:
    """What is in a file, unpacked, and the file as it lies on the disk. Whoever unpacks reads it to its end, to see
    whether more is joined to it.

    Raises:
        DataError: it cannot be unpacked.
    """
    _, packing = kind_of(path)
    with path.open("rb", buffering=0) as file, phase("reading", unit="bytes") as told:
        hashed = Hashed(file, told)
        packed = io.BufferedReader(hashed, _BUFFER)
        try:
            yield _unpacked(packed, packing), hashed
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if not packing:
                raise
            raise DataError(f"{name}: not a whole {packing} file ({one_line(error)}); get it again") from error


def _unpacked(packed: BinaryIO, packing: str) -> BinaryIO:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=packed)  # type: ignore[return-value]
    if packing == ".xz":
        return lzma.LZMAFile(packed)  # type: ignore[return-value]
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd"), _BUFFER)
    return packed


def lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    offset = 0
    for line in stream:
        yield decode(line, name, offset)
        offset += len(line)


def decode(content: bytes, name: str, offset: int = 0) -> str:
    """Text of UTF-8, without the mark that it may begin with.

    Args:
        offset: of `content` in its file.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at offset {offset + error.start}"
        raise DataError(f"{name}: not UTF-8 ({found}); convert it to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


# JSON


def _read_lines(texts: Iterable[str], name: str, fields: Fields) -> None:
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({one_line(error)})"
            raise DataError(f"{where}: {reason}; every line must be one JSON object") from error
        _take_object(record, where, fields)


def _read_json(text: str, name: str, fields: Fields) -> None:
    if not text.strip():
        return
    advice = "give a list of objects, one object that holds a list of them, or one object a line"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object a line
            _read_lines(io.StringIO(text), name, fields)
            return
        raise DataError(f"{name}:{error.lineno}: not JSON ({one_line(error)}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON ({one_line(error)}); {advice}") from error
    if isinstance(content, dict) and fields.is_record(content):
        content = [content]
    if isinstance(content, dict):
        found = {key: value for key, value in content.items() if isinstance(value, list)}
        of_objects = {key: value for key, value in found.items() if all(isinstance(v, dict) for v in value)}
        if len(of_objects) != 1:
            several = f"{len(of_objects)} lists of objects ({', '.join(map(repr, of_objects))})" if of_objects else ""
            raise DataError(f"{name}: one object with {several or 'no list of objects'}; {advice}")
        (content,) = of_objects.values()
    if not isinstance(content, list):
        raise DataError(f"{name}: {type_of(content)}; {advice}")
    for number, record in enumerate(content, 1):
        _take_object(record, f"{name}:{number}", fields)


def _take_object(record: Any, where: str, fields: Fields) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type_of(record)}, expected a JSON object")
    fields.take(record, where)


# Tables


def _read_table(texts: Iterator[str], name: str, delimiter: str, fields: Fields) -> None:
    advice = "a field that holds a separator, a quote or a line's end is written in quotes, and quotes in it twice"
    limit = csv.field_size_limit(sys.maxsize)  # of a cell, for the whole process: a text may be long
    try:
        rows = csv.reader(texts, delimiter=delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            return
        chosen = fields.columns(header, f"{name}: header line")
        for column in chosen:
            if header.count(column) > 1:
                raise DataError(f"{name}: header line: {header.count(column)} columns {column!r}; rename all but one")
        places = {column: header.index(column) for column in chosen}
        while True:
            number = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if row and len(row) != len(header):
                raise DataError(f"{name}:{number}: {len(row)} fields, the header line has {len(header)}; {advice}")
            if row:
                fields.take({column: row[place] for column, place in places.items()}, f"{name}:{number}")
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: not a table ({one_line(error)}); {advice}") from error
    finally:
        csv.field_size_limit(limit)


def _read_columns(kind: str, content: Path | bytes, name: str, fields: Fields) -> None:
    import pyarrow

    what = "a Parquet" if kind == ".parquet" else "an Arrow"
    try:
        with _source(content) as source:
            names, batches = (_of_parquet if kind == ".parquet" else _of_arrow)(source)
            take_rows(names, batches, name, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not {what} file ({one_line(error)}); write it again") from error


def take_rows(
    names: Sequence[str], batches: Callable[[list[str]], Iterable[Sequence[Record]]], name: str, fields: Fields
) -> None:
    """Hands the rows of a table to `fields`.

    Args:
        batches: rows by the columns that are read.
    """
    number = 0
    for rows in batches(fields.columns(names, name)):
        for row in rows:
            number += 1
            if found := {column: value for column, value in row.items() if value is not None}:
                fields.take(found, f"{name}:{number}")


def _source(content: Path | bytes) -> Any:
    import pyarrow

    return pyarrow.BufferReader(content) if isinstance(content, bytes) else pyarrow.OSFile(str(content))


def _of_parquet(source: Any) -> tuple[list[str], Callable[[list[str]], Iterable[Sequence[Record]]]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(source)
    size, rows = source.size(), max(table.metadata.num_rows, 1)

    def batches(columns: list[str]) -> Iterator[Sequence[Record]]:
        found = table.iter_batches(columns=columns)
        for batch in track(found, "reading", "bytes", count=lambda group: size * group.num_rows // rows):
            yield batch.to_pylist()

    return table.schema_arrow.names, batches


def _of_arrow(source: Any) -> tuple[list[str], Callable[[list[str]], Iterable[Sequence[Record]]]]:
    import pyarrow.ipc

    try:
        table = pyarrow.ipc.open_file(source)
        found = (table.get_batch(i) for i in range(table.num_record_batches))
    except pyarrow.ArrowInvalid:  # the other of the two forms, which the datasets package writes
        source.seek(0)
        table = found = pyarrow.ipc.open_stream(source)
    return table.schema.names, lambda columns: (batch.select(columns).to_pylist() for batch in found)


# Values


def string_at(value: object, key: str, where: str) -> str:
    """The text under a key.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type_of(value)}, expected a string; correct it or drop it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no text; a tokenizer would refuse it later
        raise DataError(f"{where}: {key!r} holds half of a surrogate pair; remove it") from error
    return value


def type_of(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:300]
