"""Records: every kind of file gives the same documents, packed or not, and what is malformed is named by its line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from growlm.data import Document, look_at, read
from growlm.errors import ConfigError, DataError
from growlm.progress import reporting

# White space, quotes, separators and ends of lines: what a reader could stumble over.
TEXTS = ["one", 'two, or\nmore\tof "it"', "ünicode", "'", "l" * 200_000]
RECORDS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]


def refused(path: Path, by: Callable[..., Any] = read, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        by([path], **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent.as_posix()}/")


def table(records: list[dict[str, Any]], separator: str) -> bytes:
    def cell(value: object) -> str:
        quoted = str(value).replace('"', '""')
        return f'"{quoted}"'

    rows = [list(records[0]), *(list(r.values()) for r in records)]
    return "".join(separator.join(map(cell, row)) + "\n" for row in rows).encode()


def arrow(records: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    found = pyarrow.Table.from_pylist(records)
    sink = pyarrow.BufferOutputStream()
    with new(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def json_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


WRITTEN: dict[str, bytes] = {
    "list.json": json.dumps(RECORDS, indent=1).encode(),
    "around.json": json.dumps({"version": 1, "tags": ["a"], "data": RECORDS}).encode(),
    "lines.json": json_lines(RECORDS),
    "a.jsonl": json_lines(RECORDS),
    "a.csv": table(RECORDS, ","),
    "mark.csv": b"\xef\xbb\xbf" + table(RECORDS, ","),
    "a.tsv": table(RECORDS, "\t"),
    "a.parquet": parquet(RECORDS),
    "file.arrow": arrow(RECORDS, pyarrow.ipc.new_file),
    "stream.arrow": arrow(RECORDS, pyarrow.ipc.new_stream),
}


def packed(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        half = len(content) // 2  # as of two files that were joined
        return gzip.compress(content[:half], mtime=0) + gzip.compress(content[half:], mtime=0)
    return lzma.compress(content) if packing == ".xz" else pyarrow.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name, packing):
    content = packed(WRITTEN[name], packing) if packing else WRITTEN[name]
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(content)
    body = read([path])
    assert [d.text for d in body.documents] == TEXTS
    (source,) = body.sources
    assert (source.bytes, source.documents) == (len(content), len(TEXTS))
    assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert list(tmp_path.iterdir()) == [path]  # nothing is unpacked on the disk


def test_packed_text_is_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\n\r\ntwo", mtime=0))
    (tmp_path / "b.PY.XZ").write_bytes(lzma.compress(b"x = 1"))
    assert [d.text for d in read([tmp_path], separator="\n\n").documents] == ["one", "two", "x = 1"]


def test_places_are_lines_of_text_and_numbers_of_the_rest(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'id,text\r\n1,"one\r\nand"\r\n\r\n2,two\r\n')
    (tmp_path / "b.json").write_text('[{"text": "one"},\n\n{"text": " "}, {"text": "two"}]')
    (tmp_path / "c.parquet").write_bytes(parquet([{"text": "one"}, {"text": None}, {"text": "two"}]))
    found = read([tmp_path / name for name in ("a.csv", "b.json", "c.parquet")]).documents
    at = [(d.text, d.source.rsplit("/")[-1]) for d in found]
    assert at[:2] == [("one\r\nand", "a.csv:2"), ("two", "a.csv:5")]
    assert at[2:4] == [("one", "b.json:1"), ("two", "b.json:3")]
    assert at[4:] == [("one", "c.parquet:1"), ("two", "c.parquet:3")]


def test_json_of_a_folder_is_left_out_with_a_word(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text\none\n")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with reporting("law", True):
        assert [d.text for d in read([tmp_path]).documents] == ["one"]
    assert "1 .json left out" in capsys.readouterr().err
    (tmp_path / "a.csv").unlink()
    assert "name its files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"first line\nsecond\n", "a.csv: header line: no column 'text' among 'first line'; name the one"),
        ("a.csv", b"id,body\n1,x\n", "a.csv: header line: no column 'text' among 'id', 'body'; name the one"),
        ("a.csv", b"text,id\nx,1\ny\n", "a.csv:3: 1 fields, the header line has 2;"),
        ("a.csv", b'text,id\nx,1\n"y"z,2\n', "a.csv:3: not a table ("),
        ("a.csv", b'text,id\n"x,1\ny,2\n', "a.csv:3: not a table (unexpected end of data);"),
        ("a.csv", b"text,text\nx,1\n", "a.csv: header line: 2 columns 'text';"),
        ("a.csv", b"text\nx\n\xff\n", "a.csv: not UTF-8 (byte 0xff at offset 7)"),
        ("a.tsv", b"text,id\nx,1\n", "a.tsv: header line: no column 'text' among 'text,id'"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json:2: not JSON ("),
        ("a.json", b'[{"text": "a"}, {"body": "a"}]', "a.json:2: no key 'text' among 'body'; name the one"),
        ("a.json", b'[{"text": "a"}, 7]', "a.json:2: of type int, expected a JSON object"),
        ("a.json", b'{"text": "a"}\n{"body": "a"}', "a.json:2: no key 'text' among 'body'"),
        ("a.json", b'{"body": "a"}', "a.json: one object with no list of objects; give a list of objects"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "a.json: one object with 2 lists of objects ('a', 'b');"),
        ("a.json", b"17", "a.json: of type int; give a list of objects"),
        ("a.json", b"[" * 100_000, "a.json: not JSON ("),
        ("a.json", b"\xff", "a.json: not UTF-8 (byte 0xff at offset 0)"),
        ("a.arrow", b"not at all", "a.arrow: not an Arrow file ("),
        ("a.parquet.gz", gzip.compress(b"not at all", mtime=0), "a.parquet.gz: not a Parquet file ("),
        ("a.jsonl.gz", b"not at all", "a.jsonl.gz: not a whole .gz file ("),
        ("a.jsonl.gz", gzip.compress(json_lines(RECORDS), mtime=0)[:-20], "a.jsonl.gz: not a whole .gz file ("),
        ("a.jsonl.xz", lzma.compress(json_lines(RECORDS))[:-20], "a.jsonl.xz: not a whole .xz file ("),
        ("a.txt.zst", b"not at all", "a.txt.zst: not a whole .zst file ("),
        ("a.txt.zst", packed(b"x" * 999, ".zst")[:-5], "a.txt.zst: not a whole .zst file ("),
        ("a.tar.gz", gzip.compress(b"a\0b", mtime=0), "a.tar.gz: a binary file (zero byte at offset 1)"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    told = refused(path)
    assert told.startswith(expected)
    if path.suffix in (".gz", ".zst") and ".jsonl" not in path.suffixes:  # is unpacked whole
        look_at([path])
    else:
        assert refused(path, by=look_at) == told


@pytest.mark.parametrize("format", ["text", "auto"])
def test_one_object_around_a_list_may_have_keys_of_conversations(tmp_path, format):
    (tmp_path / "a.json").write_text(json.dumps({"query": "heart", "response": [{"text": "one"}, {"text": "two"}]}))
    assert [d.text for d in read([tmp_path / "a.json"], format=format).documents] == ["one", "two"]


def test_a_look_at_data_is_short(tmp_path):
    """It says what is wrong with the beginning of files; a pipe can be read once, and is left alone."""
    bad = b'{"body": "a"}\n'
    (tmp_path / "late.jsonl").write_bytes(json_lines([{"text": "a" * 1000}] * 9999) + bad)
    (tmp_path / "huge.jsonl").write_bytes(json_lines([{"text": "a" * 3_000_000}]))
    (tmp_path / "early.jsonl").write_bytes(json_lines([{"text": "a" * 10}] * 9) + bad)
    assert refused(tmp_path / "early.jsonl", by=look_at).startswith("early.jsonl:10: no key 'text'")
    look_at([tmp_path / "late.jsonl"])
    (tmp_path / "late.csv").write_bytes(b"text\n" + b"a\n" * 99_999 + b'"a"b\n')
    look_at([tmp_path / "late.csv"])
    with pytest.raises(DataError, match="no such file or folder"):
        look_at([tmp_path / "late.jsonl", tmp_path / "missing"])  # all of them are asked for
    with pytest.raises(DataError, match=r"early.jsonl:10: no key 'text'"):
        look_at([tmp_path / "huge.jsonl", tmp_path / "late.csv", tmp_path / "early.jsonl"])
    (tmp_path / "more").mkdir()
    assert refused(tmp_path / "more", by=look_at) == refused(tmp_path / "more")
    (tmp_path / "more" / "settings.json").write_text("{")
    assert "no file to read in this folder" in refused(tmp_path / "more", by=look_at)
    (tmp_path / "more" / "a.csv").write_text("id,body\n")
    assert refused(tmp_path / "more", by=look_at) == refused(tmp_path / "more")
    (tmp_path / "large.parquet").write_bytes(parquet([{"body": f"{n}" * 9999} for n in range(300)]))
    assert refused(tmp_path / "large.parquet", by=look_at).startswith("large.parquet: no column 'text' among 'body'")
    look_at([tmp_path / "large.parquet"], text_key="body")
    os.mkfifo(tmp_path / "pipe")
    look_at([tmp_path / "pipe", "hub:owner/name"])
    with pytest.raises(ConfigError, match="format 'chat' is not one of"):
        look_at([], format="chat")


def test_a_look_does_not_read_on(tmp_path, monkeypatch):
    """However much there is."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([{"text": "a" * 1000}] * 9999))
    seen = []
    monkeypatch.setattr(json, "loads", lambda text: seen.append(text) or {"text": "a" * 1000})
    look_at([path, path])
    assert 1000 < len(seen) < 3000


def test_text_key_names_the_key_or_column(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [{"body": "one"}]}')
    (tmp_path / "b.tsv").write_text("n\tbody\n1\ttwo\n")
    (tmp_path / "c.json").write_text('{"body": "three", "notes": [{"body": "no"}]}')  # is a record itself
    found = read([tmp_path / name for name in ("a.json", "b.tsv", "c.json")], text_key="body").documents
    assert [d.text for d in found] == ["one", "two", "three"]


def test_a_long_field_of_a_table_changes_nothing_for_others(tmp_path):
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_bytes(WRITTEN["a.csv"])
    assert read([tmp_path]).documents[-1] == Document("l" * 200_000, f"{tmp_path.as_posix()}/a.csv:7")
    (tmp_path / "a.csv").write_text("body\n")
    refused(tmp_path / "a.csv")
    assert csv.field_size_limit() == limit
