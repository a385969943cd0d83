"""Data: what is read from files, what is held out, and that packing neither loses nor repeats a token."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from growlm import data
from growlm.data import Document, TextData, batches, pack, passages, read, schedule, split, start_tokens
from growlm.errors import ConfigError, DataError
from growlm.progress import reporting

EOS = "<|end|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["the law of the land", "a cat and the other cat", "def f(x): return x"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS, model_max_length=16)


TOKENIZER = build_tokenizer()
fast = settings(max_examples=50, deadline=None)
words = st.text(alphabet="abc é\n", min_size=1, max_size=40).filter(lambda text: not text.isspace())


def texts_of(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def as_data(texts: list[str]) -> TextData:
    return TextData([Document(text, f"d:{n}") for n, text in enumerate(texts, 1)], [])


def refused(*paths: object, error: type[Exception] = DataError, **options: str) -> str:
    with pytest.raises(error) as caught:
        read(list(paths), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def numbered(count: int, width: int = 20, start: int = 0) -> list[str]:
    """Distinct texts; a hash decides where each goes, so the same numbers always give the same split."""
    return [f"text {n} " + "x" * width for n in range(start, start + count)]


# read: files and folders


def test_a_text_file_is_one_document_with_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_bytes("\ufeffü one\r\n\r\ntwo\n".encode())
    body = read([file])
    assert body.documents == [Document("ü one\n\ntwo\n", file.as_posix())]
    content = file.read_bytes()
    assert body.sources == [data.Source(file.as_posix(), hashlib.sha256(content).hexdigest(), len(content), 1)]
    assert read(str(file)) == body  # one path need not be wrapped in a list


def test_a_separator_may_be_typed_with_escapes_and_one_that_is_nowhere_is_told(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\tthree")
    assert [d.text for d in read([tmp_path / "a.txt"], separator="\\n\\n").documents] == ["one", "two\tthree"]
    assert [d.text for d in read([tmp_path / "a.txt"], separator="\\t").documents] == ["one\n\ntwo", "three"]
    with reporting("data"):
        read([tmp_path / "a.txt"], separator="\\n\\n")
        read([tmp_path / "a.txt"], separator="---")
    assert (
        capsys.readouterr().err
        == "data: the separator '---' is in none of the files; a blank line is written '\\n\\n'\n"
    )


def test_separator_cuts_a_text_file_into_documents_and_blank_ones_go(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n \n\ntwo\n\n")
    body = read([tmp_path / "a.txt"], separator="\n\n")
    assert texts_of(body.documents) == ["one", "two"]
    assert [document.source.rsplit(":")[-1] for document in body.documents] == ["1", "3"]
    assert body.sources[0].documents == 2
    assert "separator" in refused(tmp_path / "a.txt", error=ConfigError, separator="")


def test_a_folder_is_walked_in_order_and_only_text_is_read(tmp_path: Path) -> None:
    for name in ["b.txt", "a.PY", "sub/c.rst", "sub/.git/d.txt", ".hidden.txt", "e.json", "Makefile"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "f.ts").write_bytes(b"G\0video")
    (tmp_path / "g.jsonl").write_text('{"text": "g1"}\n\n{"text": "g2", "id": 3}\n')
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    body = read([tmp_path])
    assert texts_of(body.documents) == ["a.PY", "b.txt", "g1", "g2", "sub/c.rst"]
    assert [source.documents for source in body.sources] == [1, 1, 2, 1]
    assert body.documents[3].source == f"{tmp_path.as_posix()}/g.jsonl:3"


def test_a_linked_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    assert texts_of(read([tmp_path / "data"]).documents) == ["a"]


def test_a_file_that_is_named_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    for name in ["Makefile", ".hidden", "a.log"]:
        (tmp_path / name).write_text(name)
        assert texts_of(read([tmp_path / name]).documents) == [name]


def test_many_files_become_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growlm.data.reading.FILES_LISTED", 2)
    for home in (tmp_path / "one", tmp_path / "two"):
        home.mkdir()
        for name in "abc":
            (home / f"{name}.txt").write_text(name * 3)
    first, second = (read([tmp_path / name]).sources for name in ("one", "two"))
    assert [(source.bytes, source.documents) for source in first] == [(9, 3)]
    assert first[0].sha256 == second[0].sha256  # of what is in the folder, not of where it is
    (tmp_path / "two" / "c.txt").write_text("ddd")
    assert read([tmp_path / "two"]).sources[0].sha256 != first[0].sha256


def test_digest_is_of_texts_their_order_and_their_ends() -> None:
    same = as_data(["ab", "c"])
    assert same.digest == TextData([Document("ab", "x"), Document("c", "y")], []).digest
    others = [as_data(texts).digest for texts in (["c", "ab"], ["a", "bc"], ["abc"], ["ab"])]
    assert len({same.digest, *others}) == 5


def test_paths_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    assert "nowhere.txt" in refused(tmp_path / "nowhere.txt")
    assert "no such file" in refused("")
    assert "no source" in refused()
    (tmp_path / "empty").mkdir()
    assert ".jsonl" in refused(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text(" \n")
    assert "blank.txt" in refused(tmp_path / "blank.txt")


def test_bytes_that_are_no_utf8_are_located(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    message = refused(tmp_path / "a.txt")
    assert "a.txt" in message
    assert "0xe9 at offset 3" in message
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "offset 24" in refused(tmp_path / "a.jsonl")
    (tmp_path / "a.bin").write_bytes(b"ab\0")
    assert "offset 2" in refused(tmp_path / "a.bin")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert "Permission denied" in refused(tmp_path)


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    message = refused(tmp_path)
    assert "a.txt" in message
    assert "Permission denied" in message


# read: JSONL


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ('{"text": "a"} x', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "list"),
        ("null", "null"),
        ('{"body": "a", "id": 1}', "'body', 'id'"),
        ("{}", "none"),
        ('{"text": null}', "null"),
        ('{"text": ["a"]}', "list"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    message = refused(tmp_path / "a.jsonl")
    assert "a.jsonl:3: " in message
    assert expected in message


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@fast
@given(texts=st.lists(words, min_size=1, max_size=6), bad=json_values, at=st.integers(0, 6))
def test_any_record_is_read_or_refused_by_its_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], bad: object, at: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "a.jsonl"  # one for all examples
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert texts_of(read([file]).documents) == texts
    assume(not isinstance(bad, dict) or not isinstance(bad.get("text"), str))
    at = min(at, len(lines))
    file.write_text("\n".join([*lines[:at], json.dumps(bad), *lines[at:]]), encoding="utf-8")
    assert f"a.jsonl:{at + 1}: " in refused(file)


def test_text_key_names_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"body": "a", "text": 1}\r\n', encoding="utf-8")
    assert texts_of(read([tmp_path / "a.jsonl"], text_key="body").documents) == ["a"]


# read: Parquet and hub datasets


def write_parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=["one", None, " ", "four"], id=[1, 2, 3, 4])
    body = read([tmp_path])
    assert body.documents == [
        Document("one", f"{file.as_posix()}:1"),
        Document("four", f"{file.as_posix()}:4"),
    ]
    assert body.sources[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "'text', 'id'" in refused(file, text_key="body")
    assert "int" in refused(file, text_key="id")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not at all")
    assert "a.parquet: not a Parquet file" in refused(tmp_path)


def test_a_hub_dataset_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    (folder / "test.jsonl").write_text('{"text": "three", "n": 3}\n')
    spec = f"hub:{folder}"
    body = read([spec])
    assert body.documents == [Document("one", f"{spec}:1"), Document("two", f"{spec}:2")]
    assert (body.sources[0].path, body.sources[0].bytes, body.sources[0].documents) == (spec, 6, 2)
    assert body.sources[0].sha256 == body.digest
    assert texts_of(read([f"{spec}:test"]).documents) == ["three"]
    assert texts_of(read([f"{spec}:train[1:]"]).documents) == ["two"]
    assert "'text', 'n'" in refused(spec, text_key="body")
    assert "int" in refused(spec, text_key="n")
    assert "validation" in refused(f"{spec}:validation")


# split


def test_whole_documents_are_held_out_when_there_are_many() -> None:
    texts = numbered(1000)
    train, held = split(as_data(texts))
    assert 16 <= len(held) <= 40  # about 2 %
    assert sorted(texts_of(train) + texts_of(held)) == sorted(texts)
    assert texts_of(train) == [text for text in texts if text in set(texts_of(train))]  # order is kept
    assert texts_of(split(as_data(texts), seed=1)[1]) != texts_of(held)


@pytest.mark.parametrize(("count", "expected"), [(64, 16), (300, 16), (12_000, 128)])
def test_the_number_held_out_is_bounded(count: int, expected: int) -> None:
    train, held = split(as_data(numbered(count)))
    assert (len(train), len(held)) == (count - expected, expected)


def test_one_long_text_gives_passages_and_stretches() -> None:
    lines = "".join(f"line {n}\n" + "\n" * (n % 5 == 0) for n in range(20_000))
    train, held = split(as_data([lines]))
    assert len(held) == 16
    assert all(1000 <= len(document.text) <= 3000 for document in held)
    assert all(document.text.endswith("\n\n") for document in held)  # cut between paragraphs
    assert len(train) <= 17  # stretches between the held-out passages, not passages
    assert sum(len(document.text) for document in train + held) == len(lines)
    assert not any(document.text in stretch.text for document in held for stretch in train)


def test_a_giant_line_is_cut() -> None:
    text = "".join(f"{n:06d}" for n in range(20_000))
    train, held = split(as_data([text]))
    assert len(held) == 15  # a quarter of 60
    assert {len(document.text) for document in held} == {2000}
    assert sum(len(document.text) for document in train + held) == len(text)


def test_long_held_out_documents_are_truncated() -> None:
    texts = [f"{n} " + f"words {n}\n" * 10_000 for n in range(64)]
    train, held = split(as_data(texts))
    assert len(held) == 16
    assert all(len(document.text) <= 4 * 3000 for document in held)
    assert {document.text[:3] for document in held}.isdisjoint(document.text[:3] for document in train)


def test_copies_of_a_held_out_text_leave_train() -> None:
    texts = numbered(100)
    (held,) = split(as_data(texts), at_least=1, fraction=0)[1]
    train, again = split(as_data([f"{held.text}\n", *texts, held.text]), at_least=1, fraction=0)
    assert again == [Document(f"{held.text}\n", "d:1")]  # the first copy stands for all
    assert texts_of(train) == [text for text in texts if text != held.text]
    # A text that equals what is left of a longer one after truncation is a copy too.
    (cut,) = split(as_data(texts), at_least=1, fraction=0, passage_chars=4)[1]
    assert held.text.startswith(cut.text)
    assert len(cut.text) < len(held.text)
    train, again = split(as_data([*texts, cut.text]), at_least=1, fraction=0, passage_chars=4)
    assert again == [cut]
    assert cut.text.strip() not in texts_of(train)
    assert len(train) == 99


def test_blank_passages_are_never_held_out() -> None:
    text = "".join(f"{n:010d}" + " " * 10 for n in range(8))
    for seed in range(20):
        train, held = split(as_data([text]), seed=seed, passage_chars=10)
        assert len(held) == 2
        assert all(document.text.strip() for document in held + train)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="1 different passages"):
        split(as_data(["short"] * 100))
    with pytest.raises(ConfigError, match="fraction"):
        split(as_data(numbered(100)), fraction=0.5)
    with pytest.raises(ConfigError, match="at_most"):
        split(as_data(numbered(100)), at_most=4)


@fast
@given(texts=st.lists(words, min_size=4, max_size=60), seed=st.integers(0, 3), chars=st.integers(1, 60))
def test_no_held_out_text_is_left_in_train(texts: list[str], seed: int, chars: int) -> None:
    try:
        train, held = split(as_data(texts), seed=seed, at_least=3, passage_chars=chars)
    except DataError:
        return
    assert held
    assert {text.strip() for text in texts_of(held)}.isdisjoint(text.strip() for text in texts_of(train))
    assert all(text.strip() for text in texts_of(train) + texts_of(held))
    if chars == 60 and len({text.strip() for text in texts}) >= 12:  # nothing is cut
        assert {text.strip() for text in texts_of(train + held)} == {text.strip() for text in texts}


@fast
@given(
    count=st.integers(40, 300),
    more=st.integers(0, 300),
    fraction=st.sampled_from([0, 0.02, 0.1]),
    r=st.randoms(),
)
def test_more_data_takes_nothing_from_train(count: int, more: int, fraction: float, r) -> None:
    options = {"fraction": fraction, "at_least": 5, "at_most": 20}
    texts = numbered(count)
    train, held = split(as_data(texts), **options)
    assume(len(held) < count // 4)
    larger = texts + numbered(more, start=count)
    r.shuffle(larger)
    more_train, more_held = split(as_data(larger), **options)
    assert set(texts_of(train)) <= set(texts_of(more_train))
    if len(held) > 5 and len(more_held) < 20:  # no bound is met: nothing moves at all
        assert set(texts_of(held)) <= set(texts_of(more_held))


# pack, passages, batches


def stream_of(texts: list[str]) -> list[int]:
    ids = []
    for text in texts:
        ids += [
            *TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"],
            TOKENIZER.eos_token_id,
        ]
    return ids


@fast
@given(texts=st.lists(words, max_size=12), length=st.integers(1, 24), limit=st.none() | st.integers(24, 60))
def test_every_token_is_a_label_once_in_order(texts: list[str], length: int, limit: int | None) -> None:
    stream = stream_of(texts)
    num_windows = max(min(len(stream) - 1, limit or len(stream)), 0) // length
    if num_windows == 0:
        with pytest.raises(DataError, match=f"{len(stream)} tokens, sequence length {length}"):
            pack(as_data(texts).documents, TOKENIZER, length, max_tokens=limit)
        return
    packed = pack(as_data(texts).documents, TOKENIZER, length, max_tokens=limit)
    assert packed.tokens.shape == (num_windows, length + 1)
    assert packed.tokens.dtype == np.int32
    assert len(packed) == num_windows
    assert packed.num_tokens == num_windows * length
    assert packed.tokens[:, 1:].ravel().tolist() == stream[1 : packed.num_tokens + 1]
    assert packed.tokens[:, :-1].ravel().tolist() == stream[: packed.num_tokens]


def beginning(template: str, **special: str) -> PreTrainedTokenizerFast:
    """The tokenizer, with special tokens of its own around every text."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(special)
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {EOS, *special.values()}]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    return tokenizer


STARTING = beginning("<s> $A", bos_token="<s>")


def test_texts_begin_as_the_tokenizer_by_itself_begins_them() -> None:
    llama = beginning("<s> $A", bos_token="<s>")
    assert start_tokens(llama) == [llama.bos_token_id]
    assert start_tokens(TOKENIZER) == []
    assert start_tokens(beginning("$A", bos_token=EOS)) == []  # as gpt2: there is one, and it is not written
    assert start_tokens(beginning(f"$A {EOS}", bos_token="<s>")) == []


@fast
@given(texts=st.lists(words, max_size=12), length=st.integers(1, 24), limit=st.none() | st.integers(24, 60))
def test_every_row_begins_with_the_start_token_and_has_the_next_of_the_stream(texts, length, limit) -> None:
    tokenizer = STARTING
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = [t for text in texts for t in (start, *TOKENIZER(text, verbose=False)["input_ids"], end)]
    if len(stream) <= length:
        with pytest.raises(DataError, match=f"{len(stream)} tokens, sequence length {length}"):
            pack(as_data(texts).documents, tokenizer, length, max_tokens=limit)
        return
    packed, at = pack(as_data(texts).documents, tokenizer, length, max_tokens=limit), 0
    assert packed.tokens.shape[1] == length + 1
    for row in packed.tokens.tolist():
        own = row if stream[at] == start else row[1:]
        assert row[0] == start
        assert own == stream[at : at + len(own)]
        at += len(own)
    if limit is None:
        assert len(stream) - at < length + 1  # less than one more row
    else:
        assert len(packed) == limit // length or len(stream) - at < length + 1
        assert packed.num_tokens <= limit


def test_every_document_and_every_piece_of_one_begins_with_the_start_token() -> None:
    tokenizer = beginning("<s> $A", bos_token="<s>")
    start = tokenizer.bos_token_id
    texts = ["the law of the land", "a", "x" * 11]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    found = passages(as_data(texts).documents, tokenizer, 4)
    pieces = [(number, text[at : at + 3]) for number, text in enumerate(ids) for at in range(0, len(text), 3)]
    assert [(p.document_index, p.tokens) for p in found] == [(number, [start, *piece]) for number, piece in pieces]
    assert min(len(p.tokens) for p in found) == 2  # one token of text is predicted


def test_less_than_one_sequence_is_refused() -> None:
    documents = as_data(["the law"]).documents
    size = len(stream_of(["the law"]))
    assert len(pack(documents, TOKENIZER, size - 1)) == 1
    with pytest.raises(DataError, match=f"{size} tokens, sequence length {size}; give more text"):
        pack(documents, TOKENIZER, size)  # it needs one more, the last label


def test_packed_tokens_give_batches_of_int64() -> None:
    packed = pack(as_data(numbered(20)).documents, TOKENIZER, 8)
    for indices in ([2, 0], np.array([2, 0]), slice(0, 2)):
        batch = packed[indices]
        assert batch.dtype == torch.int64
        assert batch.shape == (2, 9)
        assert batch.numpy().tolist() == packed.tokens[indices].tolist()
        batch.zero_()  # a copy: the packed tokens are shared by all epochs
    assert packed.tokens.any()


def test_long_documents_are_tokenized_in_pieces_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("growlm.data.packing.TOKENIZE_CHARS", 50)
    monkeypatch.setattr("growlm.data.packing.TOKENIZE_TEXTS", 3)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    documents = as_data([f"{n} " * 200 for n in range(5)]).documents
    packed = pack(documents, build_tokenizer(), 10)  # a new one: it warns but once
    text = TOKENIZER.decode(np.append(packed.tokens[:, :-1].ravel(), packed.tokens[-1, -1]))
    assert EOS.join(texts_of(documents)).startswith(text)
    assert len(text) > 1900
    assert not caplog.records


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ConfigError, match="end-of-text"):
        pack(as_data(["a b c"]).documents, bare, 2)
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        pack(as_data(["a b c"]).documents, TOKENIZER, 0)


@fast
@given(texts=st.lists(words, max_size=8), length=st.integers(2, 12), limit=st.none() | st.integers(0, 9))
def test_passages_are_pieces_of_single_documents(texts: list[str], length: int, limit: int | None) -> None:
    expected = []
    for index, text in enumerate(texts):
        ids = stream_of([text])[:-1]
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        expected += [data.Passage(piece, index) for piece in pieces if len(piece) >= 2]
    assert passages(as_data(texts).documents, TOKENIZER, length, limit=limit) == expected[:limit]


@fast
@given(rows=st.integers(0, 50), size=st.integers(1, 20), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_batches_hold_every_row_once(rows: int, size: int, seed: int, epoch: int) -> None:
    order = batches(rows, size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate([[], *order]).tolist()) == list(range(rows))
    assert [len(batch) for batch in order[:-1]] == [size] * (len(order) - 1)
    again = batches(rows, size, seed=seed, epoch=epoch)
    assert [batch.tolist() for batch in order] == [batch.tolist() for batch in again]


def test_batches_differ_by_epoch_and_seed() -> None:
    orders = {tuple(np.concatenate(batches(50, 8, seed=s, epoch=e))) for s, e in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3
    with pytest.raises(ConfigError, match="batch_size"):
        batches(5, 0, seed=0, epoch=0)
    with pytest.raises(ConfigError, match="seed"):
        batches(5, 1, seed=-1, epoch=0)


@fast
@given(rows=st.integers(1, 30), size=st.integers(1, 20), wanted=st.integers(1, 100), seed=st.integers(0, 9))
def test_a_schedule_reads_what_is_wanted_and_stops(rows: int, size: int, wanted: int, seed: int) -> None:
    order = schedule(rows, size, wanted=wanted, seed=seed)
    assert sum(map(len, order)) >= wanted > sum(map(len, order[:-1]))
    epochs = [batch for epoch in range(wanted // rows + 1) for batch in batches(rows, size, seed=seed, epoch=epoch)]
    assert [batch.tolist() for batch in order] == [batch.tolist() for batch in epochs[: len(order)]]
