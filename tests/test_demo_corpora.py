"""The text and the accounting of the demonstration."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config

from growlm.demo import accounting, corpora, prose
from growlm.errors import ConfigError, DataError

MAX_BYTES = 300_000
NAMES = ["english", "python", "cpp", "maths", "models", "operators"]


@pytest.fixture(scope="module")
def found() -> dict[str, corpora.Corpus]:
    return {name: corpora.corpus(name, max_bytes=MAX_BYTES) for name in corpora.names()}


def key(text: str) -> str:
    return " ".join(text.split())[:200]


def test_names_general_first() -> None:
    assert list(corpora.names()) == NAMES
    assert set(corpora.DEFAULT_MAX_BYTES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_size_and_passages(found: dict[str, corpora.Corpus], name: str) -> None:
    corpus = found[name]
    assert MAX_BYTES - corpora.PASSAGE_BYTES <= corpus.num_bytes <= MAX_BYTES
    assert len(corpus.documents) == len(corpus.origins) > 50
    assert max(len(document.encode()) for document in corpus.documents) <= corpora.PASSAGE_BYTES
    assert len({key(document) for document in corpus.documents}) == len(corpus.documents)


def test_corpora_are_distinct(found: dict[str, corpora.Corpus]) -> None:
    keys = [{key(document) for document in corpus.documents} for corpus in found.values()]
    assert len(set.union(*keys)) == sum(map(len, keys))
    # A mark of each, per byte: no other corpus has half as many.
    marks = {"english": " the ", "python": "except ", "cpp": "::", "maths": ">>> "}
    marks |= {"models": "hidden_states", "operators": "- name: "}
    for name, mark in marks.items():
        rates = {other: sum(d.count(mark) for d in c.documents) / c.num_bytes for other, c in found.items()}
        assert max(rates, key=lambda other: rates[other]) == name
        assert sorted(rates.values())[-2] < rates[name] / 2


def test_same_seed_same_documents(found: dict[str, corpora.Corpus]) -> None:
    assert corpora.corpus("maths", max_bytes=MAX_BYTES) == found["maths"]
    other = corpora.corpus("maths", max_bytes=MAX_BYTES, seed=1)
    assert set(other.documents) != set(found["maths"].documents)


def test_order_of_the_file_system_does_not_matter(
    found: dict[str, corpora.Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listed(path, pattern))))
    assert corpora.corpus("python", max_bytes=MAX_BYTES) == found["python"]


def test_write_shares_no_file_between_train_and_test(found: dict[str, corpora.Corpus], tmp_path: Path) -> None:
    written = corpora.write(tmp_path, max_bytes=dict.fromkeys(NAMES, MAX_BYTES))
    assert list(written) == NAMES
    for name, paths in written.items():
        origin_of = dict(zip(found[name].documents, found[name].origins, strict=True))
        train, test = (
            [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()] for path in paths
        )
        assert train
        assert 1 <= len(test) <= max(1, round(0.05 * len(origin_of)))
        assert {origin_of[text] for text in train}.isdisjoint(origin_of[text] for text in test)
        assert {key(text) for text in train}.isdisjoint(key(text) for text in test)


def test_split_caps_the_test_and_each_file() -> None:
    documents = [f"document {index}" for index in range(2000)]
    corpus = corpora.Corpus("toy", "", documents, [f"file {index // 20}" for index in range(2000)])
    train, test = corpora.split(corpus)
    assert len(test) == 60
    files = [int(text.split()[1]) // 20 for text in test]
    assert max(files.count(file) for file in files) == 4
    assert len(train) == 2000 - 20 * len(set(files))
    with pytest.raises(DataError, match="one file only"):
        corpora.split(corpora.Corpus("toy", "", documents, ["file"] * 2000))


def no_stdlib(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(empty))


def no_packages(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setattr(corpora, "_package", lambda name: None)


@pytest.mark.parametrize(
    ("name", "remove", "message"),
    [
        ("python", no_stdlib, "no source of the standard library"),
        ("cpp", no_packages, r"no C\+\+ headers"),
        ("maths", no_packages, "no SymPy"),
        ("models", no_packages, "no models"),
        ("operators", no_packages, "no declarations"),
        ("english", no_packages, r"found \d+ bytes .* expected at least 1000000"),
    ],
)
def test_missing_source(
    name: str,
    remove: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    remove(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        corpora.corpus(name, max_bytes=2_000_000)
    assert "\n" not in str(raised.value)


def test_unknown_name_and_too_few_bytes() -> None:
    with pytest.raises(ConfigError, match="expected one of english, python"):
        corpora.corpus("french", max_bytes=MAX_BYTES)
    with pytest.raises(ConfigError, match="at least 4096"):
        corpora.corpus("maths", max_bytes=100)


SOURCE = '''
def area(radius):  # a comment behind code
    """Return the area of a circle, which is computed from its radius.

    Parameters
    ----------
    radius : float
        The radius of the circle in metres. It must not
        be negative.

    - The result is exact up to the precision of a double,
      and it is not rounded.

    >>> area(1.0)
    3.141592653589793
    """
    # The constant is written out, because importing a module
    # for it would be slower than the call.
    query = """SELECT radius FROM circles WHERE the_name_of_the_circle IS NOT NULL ORDER BY radius"""
    return 3.14 * radius * radius


def quoted():
    "Short."
    \'\'\'A string with \\u0041 escape and """ quotes, of a length that is enough to be found.\'\'\'
'''


def test_docstrings_and_comments() -> None:
    first, second = prose.docstrings(SOURCE)
    assert first.startswith("Return the area")
    assert second == 'A string with A escape and """ quotes, of a length that is enough to be found.'
    (comment,) = prose.comments(SOURCE)
    assert comment.split("\n")[1] == "for it would be slower than the call."


def test_paragraphs_keep_sentences_only() -> None:
    assert list(prose.paragraphs(next(prose.docstrings(SOURCE)))) == [
        "Return the area of a circle, which is computed from its radius.",
        "The radius of the circle in metres. It must not be negative.",
        "The result is exact up to the precision of a double, and it is not rounded.",
    ]


def test_accounting_of_the_paper() -> None:
    hidden, intermediate, vocabulary = 4096, 11008, 151936
    layer = 4 * hidden * hidden + 3 * hidden + 3 * hidden * intermediate + 2 * hidden
    base = 32 * layer + 2 * vocabulary * hidden + hidden
    counted = accounting.account(accounting.paper_config())
    assert counted.base == base
    assert counted.block == counted.router == 4 * layer
    assert counted.total == base + 23 * 4 * layer
    assert counted.resident == base + 2 * 4 * layer
    # The paper's B is 2**30.
    assert counted.base / 2**30 == pytest.approx(7.2, abs=0.05)
    assert counted.block / 2**30 == pytest.approx(0.75, abs=0.005)
    assert counted.total / 2**30 == pytest.approx(24.5, abs=0.05)
    assert counted.resident / 2**30 == pytest.approx(8.7, abs=0.05)
    assert counted.share_saved == pytest.approx(0.65, abs=0.01)
    assert any(line.startswith("total") and line.endswith("24.5") for line in counted.lines())


def test_accounting_of_another_base() -> None:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=100, n_positions=32)
    counted = accounting.account(config, num_domains=3, num_layers=1)
    assert counted.block == 12 * 16 * 16 + 13 * 16
    assert counted.total == counted.base + 4 * counted.block
    assert not any("paper" in line for line in counted.lines())
    with pytest.raises(ConfigError, match="num_domains is 0"):
        accounting.account(config, num_domains=0)
