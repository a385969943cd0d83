"""Corpora: real text that every install of growlm already has on disk, so a demonstration downloads none.

One general corpus (`english`), three domains for a small base to learn: `python`, `cpp`, `maths`, and two that a
published base knows less well: `models`, `operators`. Files are read as text; no installed package is imported. What
comes out depends on the installed versions of
Python, torch, SymPy and others, so numbers measured on it compare within one environment. Knows no tokenizer
and no model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from growlm.demo import prose
from growlm.errors import ConfigError, DataError
from growlm.progress import track

PASSAGE_BYTES = 4096
DEFAULT_MAX_BYTES: Mapping[str, int] = {
    "english": 12_000_000,
    "python": 3_000_000,
    "cpp": 3_000_000,
    "maths": 3_000_000,
    "models": 3_000_000,
    "operators": 600_000,
}

_MAX_SOURCE_BYTES = 200_000  # larger files of code are generated, or tables
_MAX_DOCSTRINGS_BYTES = 2_000_000  # some files hold nothing but docstrings
_KEY_CHARACTERS = 200  # two passages that begin with the same ones are near duplicates
_MIN_CHARACTERS = 100  # a shorter passage says nothing

# What growlm needs at run time, and what that needs: in every install, whatever else shares the environment.
# The base must not have read a domain's test, so some are absent: the standard library (its docstrings are in
# `python`), setuptools and multiprocess (they hold copies of it), SymPy and mpmath (theirs are `maths`).
_ENGLISH_PACKAGES = """
PIL anyio click contourpy datasets dateutil dill filelock fontTools fsspec httpx2 huggingface_hub jinja2
markdown_it matplotlib networkx numpy packaging pandas pyarrow pydantic pygments pyparsing regex
rich safetensors tokenizers torch torchgen tqdm transformers typer
"""
# Tables, test data, other people's packages: not the standard library's own code.
_NOT_PYTHON = """
dist-packages encodings idlelib lib-dynload lib2to3 pydoc_data site-packages test tests
"""
_LICENCE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
_LEADING_COMMENT = re.compile(r"\s*(?:/\*.*?\*/|(?://[^\n]*\n\s*)+|(?:#(?:[ \t][^\n]*)?\n)+)", re.DOTALL)
_GENERATED = re.compile(r"@generated|(?:generated|created) (?:automatically )?by|do not edit", re.IGNORECASE)
_OPERATORS_EACH = 24  # entries of one file that stand for a file of their own
_STABLE_GUARD = re.compile(  # wrapped around every header of torch
    r"#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n"
    r"|#else\n#error \"This file should not be included[^\n]*\n#endif[^\n]*"
)
_MATHS = re.compile(r">>> |:math:|\.\. math::|\$")


@dataclass(frozen=True)
class Corpus:
    """Passages of at most `PASSAGE_BYTES`, without duplicates; `origins[i]` is the file of `documents[i]`."""

    name: str
    description: str
    documents: list[str]
    origins: list[str] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 in all documents."""
        return sum(len(document.encode()) for document in self.documents)


class _Origin(NamedTuple):
    """A file, or what stands for one. Read when its turn comes: a small corpus does not open every file."""

    name: str
    blocks: Callable[[], Iterable[str]]


def names() -> tuple[str, ...]:
    """The corpora there are; the first is the general one."""
    return tuple(_SOURCES)


def corpus(name: str, *, max_bytes: int, seed: int = 0) -> Corpus:
    """Read the corpus `name`, at most `max_bytes` of UTF-8.

    Files are taken in the order of a hash of `seed` and their names until `max_bytes` are full; then the
    passages are shuffled by a hash too. One seed and environment give the same documents on any file system.

    Raises:
        ConfigError: `name` is no corpus, or `max_bytes` is less than one passage.
        DataError: the source is not on this machine, or has less than half of `max_bytes`.
    """
    if name not in _SOURCES:
        raise ConfigError(f"no corpus {name!r}: expected one of {', '.join(_SOURCES)}")
    if max_bytes < PASSAGE_BYTES:
        raise ConfigError(f"corpus {name}: max_bytes is {max_bytes}, expected at least {PASSAGE_BYTES}")
    description, origins = _SOURCES[name]
    found: list[tuple[str, str, str]] = []  # digest, origin, passage
    seen: set[str] = set()
    size = 0
    ordered = sorted(origins(), key=lambda origin: _digest(seed, origin.name))
    for origin in track(ordered, f"collecting {name}", "files"):
        blocks = origin.blocks()
        if name == "english":  # docstrings repeat a sentence in hundreds of files; code repeats only whole files
            blocks = _unseen(blocks, seen)
        for index, passage in enumerate(_passages(blocks)):
            key = " ".join(passage.split())[:_KEY_CHARACTERS]
            if len(key) < _MIN_CHARACTERS or key in seen:
                continue
            num_bytes = len(passage.encode())
            if size + num_bytes > max_bytes:
                break
            seen.add(key)
            size += num_bytes
            found.append((_digest(seed, f"{origin.name}\0{index}"), origin.name, passage))
        if size > max_bytes - PASSAGE_BYTES:
            break
    if 2 * size < max_bytes:
        raise DataError(
            f"corpus {name}: found {size} bytes ({description}), expected at least {max_bytes // 2}; "
            "lower max_bytes, or reinstall the packages it is read from"
        )
    found.sort()
    return Corpus(name, description, [text for _, _, text in found], [origin for _, origin, _ in found])


def split(
    corpus: Corpus, *, test_share: float = 0.05, max_test: int = 60, max_per_origin: int = 4, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Train and test documents; no file has passages in both.

    The test gets `test_share` of the documents, at most `max_test`, `max_per_origin` from one file, so that a
    long file is not the whole test. What is left of a test file is in neither.

    Raises:
        DataError: everything comes from the files held out, so that there is nothing to train on.
    """
    by_origin: dict[str, list[str]] = {}
    for origin, document in zip(corpus.origins, corpus.documents, strict=True):
        by_origin.setdefault(origin, []).append(document)
    wanted = max(1, min(max_test, round(test_share * len(corpus.documents))))
    test: list[str] = []
    held_out: set[str] = set()
    for origin in sorted(by_origin, key=lambda origin: _digest(seed, f"test\0{origin}")):
        if len(test) == wanted:
            break
        held_out.add(origin)
        test += by_origin[origin][: min(max_per_origin, wanted - len(test))]
    pairs = zip(corpus.origins, corpus.documents, strict=True)
    train = [document for origin, document in pairs if origin not in held_out]
    if not train:
        raise DataError(f"corpus {corpus.name}: found one file only, expected two or more; raise max_bytes")
    return train, test


def write(
    out_dir: Path, *, max_bytes: Mapping[str, int] = DEFAULT_MAX_BYTES, seed: int = 0
) -> dict[str, tuple[Path, Path]]:
    """Write `<name>/train.jsonl` and `<name>/test.jsonl` under `out_dir` for every name in `max_bytes`.

    One JSON object a line, with the key "text". Returns both paths by name. Raises what `corpus` and `split`
    raise; a corpus that fails leaves no file, those before it stay.
    """
    written: dict[str, tuple[Path, Path]] = {}
    for name, limit in max_bytes.items():
        train, test = split(corpus(name, max_bytes=limit, seed=seed), seed=seed)
        folder = Path(out_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "train.jsonl", folder / "test.jsonl"
        for path, documents in zip(paths, (train, test), strict=True):
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            path.write_text("".join(lines), encoding="utf-8", newline="\n")
        written[name] = paths
    return written


# Sources: each yields its origins, in any order.


def _english() -> Iterator[_Origin]:
    for package in _ENGLISH_PACKAGES.split():
        yield _Origin(f"README/{package}", partial(_readme, package))
        root = _package(package)
        if root is not None:
            for path in root.rglob("*.py"):
                yield _Origin(f"{package}/{path.relative_to(root).as_posix()}", partial(_english_of, path))
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions put it in a package of its own
        return
    for topic, text in topics.items():
        yield _Origin(f"reference/{topic}", partial(prose.paragraphs, text))


def _python() -> Iterator[_Origin]:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise DataError(
            f"corpus python: found no source of the standard library in {root}, expected its .py files; "
            "use a Python that is installed with them"
        )
    unwanted = set(_NOT_PYTHON.split())
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if unwanted.isdisjoint(name.parts) and not name.parts[0].startswith(("_sysconfigdata", "config-")):
            yield _Origin(name.as_posix(), partial(_code, path))


def _cpp() -> Iterator[_Origin]:
    root = _package("torch")
    if root is None or not (root / "include" / "ATen").is_dir():
        raise DataError(
            f"corpus cpp: found no C++ headers in {root}, expected torch/include; install torch from its own wheel"
        )
    root = root / "include"
    for path in root.rglob("*.h"):
        name = path.relative_to(root).as_posix()
        # ATen/ops: thousands of generated headers that differ by an operator's name. The top: C interfaces.
        if "/" in name and not name.startswith("ATen/ops/"):
            yield _Origin(name, partial(_code, path))


def _maths() -> Iterator[_Origin]:
    if _package("sympy") is None:
        raise DataError("corpus maths: found no SymPy, expected it beside torch; pip install sympy")
    for package in ("sympy", "mpmath"):
        root = _package(package)
        if root is not None:
            for path in root.rglob("*.py"):
                name = path.relative_to(root)
                if "tests" not in name.parts:
                    yield _Origin(f"{package}/{name.as_posix()}", partial(_maths_of, path))


def _models() -> Iterator[_Origin]:
    root = _package("transformers")
    if root is None or not (root / "models").is_dir():
        raise DataError(f"corpus models: found no models in {root}, expected transformers/models; reinstall it")
    for path in root.glob("models/*/modeling_*.py"):
        yield _Origin(path.relative_to(root).as_posix(), partial(_code, path))


def _operators() -> Iterator[_Origin]:
    root = _package("torchgen")
    files = [] if root is None else sorted(root.glob("packaged/*/**/*.yaml"))
    if not files:
        raise DataError(
            f"corpus operators: found no declarations in {root}, expected torchgen/packaged; install torch from its "
            "own wheel"
        )
    for path in files:
        entries = _blocks(_read(path, limit=_MAX_DOCSTRINGS_BYTES))
        for at in range(0, len(entries), _OPERATORS_EACH):
            part = entries[at : at + _OPERATORS_EACH]
            yield _Origin(f"{path.name}/{at // _OPERATORS_EACH}", partial(list, part))


_SOURCES: Mapping[str, tuple[str, Callable[[], Iterator[_Origin]]]] = {
    "english": ("English: docstrings, comments and READMEs of packages, the language reference", _english),
    "python": ("Python: source of the standard library", _python),
    "cpp": ("C++: headers of torch", _cpp),
    "maths": ("mathematics: explanations and worked examples of SymPy and mpmath", _maths),
    "models": ("Python: models of transformers", _models),
    "operators": ("YAML: torch's operators and their derivatives, as it declares them", _operators),
}


# Readers: each gives the blocks of one origin, which passages consist of; one is cut only if it is too long.


def _english_of(path: Path) -> Iterator[str]:
    source = _read(path, limit=_MAX_DOCSTRINGS_BYTES)
    for text in itertools.chain(prose.docstrings(source), prose.comments(source)):
        yield from prose.paragraphs(text)


def _maths_of(path: Path) -> Iterator[str]:
    for text in prose.docstrings(_read(path, limit=_MAX_DOCSTRINGS_BYTES)):
        if _MATHS.search(text):
            yield from _blocks(text)


def _readme(distribution: str) -> Iterator[str]:
    try:
        metadata = importlib.metadata.distribution(distribution).read_text("METADATA") or ""
    except importlib.metadata.PackageNotFoundError:  # a package whose distribution has another name
        return iter(())
    return prose.paragraphs(metadata.partition("\n\n")[2])


def _code(path: Path) -> list[str]:
    text = _read(path, limit=_MAX_SOURCE_BYTES)
    if _GENERATED.search(text[:1000]):
        return []
    text = _STABLE_GUARD.sub("", text)
    comment = _LEADING_COMMENT.match(text)
    if comment and _LICENCE.search(comment[0]):
        # Else the files under one licence would begin alike, and be taken for near duplicates.
        text = text[comment.end() :]
    return _blocks(text)


# Helpers.


def _package(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path, *, limit: int) -> str:
    """The text of a file; "" if it has more than `limit` bytes or is not UTF-8."""
    if path.stat().st_size > limit:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _blocks(text: str) -> list[str]:
    return [block.rstrip() for block in re.split(r"\n[ \t]*\n", text.strip("\n")) if block.strip()]


def _unseen(blocks: Iterable[str], seen: set[str]) -> Iterator[str]:
    for block in blocks:
        if block not in seen:
            seen.add(block)
            yield block


def _passages(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks by a blank line, up to `PASSAGE_BYTES`; a longer block is cut between its lines."""
    pieces = itertools.chain.from_iterable(_join(block.split("\n"), "\n") for block in blocks)
    return _join(pieces, "\n\n")


def _join(parts: Iterable[str], separator: str) -> Iterator[str]:
    chosen: list[str] = []
    size = 0
    for part in parts:
        num_bytes = len(part.encode()) + len(separator)
        if num_bytes > PASSAGE_BYTES + len(separator):
            continue  # a line of more than 4 kB is data, not text
        if size + num_bytes > PASSAGE_BYTES + len(separator):  # the last separator is not written
            yield separator.join(chosen)
            chosen, size = [], 0
        chosen.append(part)
        size += num_bytes
    if chosen:
        yield separator.join(chosen)


def _digest(seed: int, text: str) -> str:
    return hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=16).hexdigest()
