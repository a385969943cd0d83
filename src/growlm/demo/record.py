"""Record: what the folder of a demo says of it: what was asked for, its sizes, and each stage's seconds and result.

`demo.json` has the sizes; `stages/` a file for every stage, complete when it has a result. Knows files; not what a
stage does. A process that is killed loses a few seconds of the count, nothing else.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from growlm import __version__
from growlm.demo.published_sizing import PublishedSize
from growlm.demo.sizing import DemoSize
from growlm.disk.files import locked, make_folders, write_atomic
from growlm.errors import BaseModelError, ConfigError, IntegrityError, StoreError

FORMAT = 2
_MARKER, _LOCK = "demo.json", ".lock"
_COUNT_EVERY = 5.0  # seconds
_M = TypeVar("_M", bound="_File")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    growlm: str = __version__


class _Demo(_File):
    """demo.json."""

    command: str  # as it was typed, less --out
    size: DemoSize | PublishedSize | None = None  # None until the machine has been measured
    settled: tuple[str, ...] = ()  # stages that have begun: their sizes stay as they are


class _Stage(_File):
    """A file of stages/."""

    seconds: float  # in all attempts
    expected: float | None = None  # by the sizing, when it began
    result: dict[str, Any] | None = None  # None until it is complete


@dataclass(frozen=True)
class Request:
    """What a user asks of a demo.

    Args:
        base: a GGUF file or a checkpoint folder; None pretrains one.
        limit: minutes; by default 10, with a base 30.

    Raises:
        ConfigError: minutes that are none, or that are given beside `fast`; no such device or precision.
        BaseModelError: `base` is not there.
    """

    fast: bool = False
    limit: float | None = None
    device: str = "auto"
    precision: str = "auto"
    base: Path | None = None

    def __post_init__(self) -> None:
        if self.base is not None and not self.base.exists():
            raise BaseModelError(f"{self.base}: no such file or folder; give a GGUF file or a checkpoint folder")
        if not 0 < self.minutes < float("inf"):
            raise ConfigError(f"minutes is {self.minutes:g}; it must be above 0, e.g. --minutes 10")
        if self.fast and self.minutes != self._usual:
            raise ConfigError(
                f"--fast is of one size, so that --minutes {self.minutes:g} is of no effect; leave out one"
            )
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"precision {self.precision!r} is not one of auto, bfloat16, float32")
        if self.device != "auto":
            from growlm.base.placement import find_device  # not to wait for torch where the table is there already

            find_device(self.device)

    @property
    def minutes(self) -> float:
        return self._usual if self.limit is None else self.limit

    @property
    def _usual(self) -> float:
        return 10.0 if self.base is None else 30.0

    @property
    def command(self) -> str:
        words = ["growlm demo", *([f"--base {self.base}"] if self.base else [])]
        words += ["--fast" if self.fast else f"--minutes {self.minutes:g}"]
        words += [f"--{n} {v}" for n, v in (("device", self.device), ("precision", self.precision)) if v != "auto"]
        return " ".join(words)


class Record:
    """The record of one demo, for the process that runs it: see `record_of`."""

    def __init__(self, out: Path, demo: _Demo, started: float) -> None:
        self.out, self._demo, self._lap = out, demo, started

    @property
    def size(self) -> DemoSize | PublishedSize | None:
        return self._demo.size

    def settled(self, stage: str) -> bool:
        return stage in self._demo.settled

    def settle(self, size: DemoSize | PublishedSize, *stages: str) -> None:
        """Keeps a size, of which the parts that are about `stages` will not change any more."""
        names = (*self._demo.settled, *(s for s in stages if s not in self._demo.settled))
        self._write_demo(self._demo.model_copy(update={"size": size, "settled": names}))

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a stage gave; None if it is not complete.

        Raises:
            IntegrityError: its file is damaged.
        """
        found = self._read(stage)
        return found.result if found else None

    def seconds(self, stage: str) -> float:
        """What a stage has taken so far, in all attempts."""
        found = self._read(stage)
        return found.seconds if found else 0.0

    def expected(self, stage: str) -> float | None:
        """What it should have taken."""
        found = self._read(stage)
        return found.expected if found else None

    @contextmanager
    def stage(self, stage: str, expected: float | None = None) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Counts the seconds of a stage, from the end of the one before it. Yields what takes its result."""
        found = self._read(stage)
        before = (
            _Stage(seconds=found.seconds, expected=found.expected) if found else _Stage(seconds=0.0, expected=expected)
        )
        ended = threading.Event()
        results: list[dict[str, Any]] = []

        def write() -> None:
            seconds = before.seconds + time.monotonic() - self._lap
            update = {"seconds": seconds, "result": results[0] if results else None}
            _write(self._path(stage), before.model_copy(update=update))

        def count() -> None:
            while not ended.wait(_COUNT_EVERY):
                with suppress(OSError, StoreError):  # of no room on the disk tells what the stage itself writes
                    write()

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield results.append
        finally:
            ended.set()
            counter.join()
            write()
            self._lap = time.monotonic()

    def forget(self, stage: str) -> None:
        """As if a stage had never begun."""
        self._path(stage).unlink(missing_ok=True)

    def _path(self, stage: str) -> Path:
        return self.out / "stages" / f"{stage}.json"

    def _read(self, stage: str) -> _Stage | None:
        path = self._path(stage)
        return _load(path, _Stage, "remove it to do this stage again") if path.exists() else None

    def _write_demo(self, demo: _Demo) -> None:
        _write(self.out / _MARKER, demo)
        self._demo = demo


@contextmanager
def record_of(out: Path, request: Request, started: float) -> Iterator[Record]:
    """The record in a folder: that of the same request, or a new one. One process at a time has it.

    Args:
        started: when work on it began, by the monotonic clock.

    Raises:
        StoreError: the folder holds something else, the demo of another request or of another version of growlm, or
            another process is at it.
        IntegrityError: `demo.json` is damaged.
    """
    _check(out, request)
    make_folders(out)
    with locked(out / _LOCK, wait=False, keep=False) as mine:
        if not mine:
            raise StoreError(f"{out}: another demo is running in it; wait for it, or choose another --out")
        demo = _check(out, request)
        record = Record(out, demo or _Demo(command=request.command), started)
        if demo is None:
            for left in (out / "stages").glob("*.json"):  # of a demo for which there was too little time
                left.unlink()
            record._write_demo(record._demo)
        yield record


def discard(out: Path) -> None:
    """Takes away the record of a demo that has made nothing, and the folder if nothing else is in it."""
    for path in (out / _MARKER, *(out / "stages").glob("*.json")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        (out / "stages").rmdir()
        out.rmdir()


def _check(out: Path, request: Request) -> _Demo | None:
    """The demo in a folder; None for a folder in which there is nothing yet."""
    marker = out / _MARKER
    if not marker.is_file():
        # A process that was killed when it began may have left its lock, or half of the file.
        ours = (_LOCK, f".{_MARKER}-")
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(ours) for p in out.iterdir())):
            raise StoreError(f"{out}: holds something else than a demo; choose another --out")
        return None
    demo = _load(marker, _Demo, "restore it, or choose another --out; the rest of the folder is as it was")
    if demo.command != request.command:
        if demo.size is None:
            return None  # nothing was made
        raise StoreError(f"{out}: holds the demo of `{demo.command}`; run that, or choose another --out, or remove it")
    return demo


def _load(path: Path, kind: type[_M], hint: str) -> _M:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: damaged ({error}); {hint}") from None
    if (found := content.get("format")) != FORMAT:
        raise StoreError(
            f"{path}: of another version of growlm (format {found}, this one's is {FORMAT}); use that, or choose "
            "another --out"
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path}: damaged ({where}: {first['msg']}); {hint}") from None


def _write(path: Path, content: _File) -> None:
    write_atomic(path, content.model_dump_json(indent=2).encode())
