"""Progress: what long work says of itself on stderr, as a bar on a terminal and as lines in a log.

A verb opens a report, and whatever takes long inside it, however deep, is a phase: a title, how many of what, a note.

    with reporting("law"):
        with phase("scoring held-out text", len(passages), "passages") as scoring:
            scoring.advance(16)
        for module in track(modules, "fitting the router", "modules"):
            ...

The report is the context's and no argument: what takes long lies at the bottom, as the hash of a file or a batch of
passages, where one knows neither the verb nor whether anyone listens, and most of what is between has nothing to say.
Where no verb reports, a phase does nothing. A new thread has no report: the one that waits for it speaks.

A phase inside another of the same unit is a part of it and only counts on; one of another unit is shown beside it.
Knows titles, counts and seconds, not what is counted. Results go to stdout, never through here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from growlm.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.table import Table

_LOG_SECONDS = float(os.environ.get("GROWLM_LOG_SECONDS", "10"))  # between two lines in a log
_FIRST_SECONDS = 1.0  # before the first one of a verb that takes long
_LEAST_SECONDS = 1.0  # that a phase lasts of which a log says something
_BAR_SECONDS = 0.5  # between two drawings of bars; what is over sooner has none, which would only flicker

_Item = TypeVar("_Item")


@contextmanager
def reporting(subject: str, show: bool | None = None, *, long: bool = False) -> Iterator[None]:
    """Shows the phases of what is done inside, and its remarks (`say`), each after the name of its subject.

    Args:
        subject: what is worked on, for people: a module's name, a store's.
        show: False for nothing at all. None is automatic: what is shown is up to the verb that calls this one, where
            there is one, and else as for True: bars where stderr is a terminal, and where it is not, at most a line
            every ten seconds, the first one after ten seconds, and none of phases that take less than one.
        long: the first line comes after one second: who waits for minutes should know that it has begun.
    """
    outer = _report.get()
    display, own = None if outer is None else outer.display, None
    if show is False:
        display = None
    elif outer is None or (show and display is None):
        display = own = _new_display(subject, long)
    token = _report.set(_Report(subject, display))
    try:
        yield
    finally:
        _report.reset(token)
        if own is not None:
            own.close()


def leave_to_others() -> None:
    """Shows nothing more of the verb that reports: another process goes on and speaks for itself."""
    report = _report.get()
    if report is not None and report.display is not None:
        report.display.close()


def log_seconds() -> float:
    """Between two lines in a log."""
    return _LOG_SECONDS


def say(line: str) -> None:
    """A remark, where progress is shown."""
    report = _report.get()
    if report is not None and report.display is not None:
        report.display.write(f"{report.subject}: {line}")


def phase(title: str, total: int | None = None, unit: str = "", *, done: int = 0, note: str = "") -> Phase:
    """A part of a verb that may take long, as a context manager.

    Args:
        total: how many there are; None where no one knows.
        unit: of what, in the plural; "bytes" are written as sizes.
        done: so many before it begins, as by an earlier run.
    """
    return Phase(_report.get() or _SILENT, title, total, unit, done, note)


def track(
    items: Iterable[_Item],
    title: str,
    unit: str,
    *,
    total: int | None = None,
    count: Callable[[_Item], int] = lambda item: 1,
) -> Iterator[_Item]:
    """The items of a loop that may take long, as a phase.

    Args:
        total: by default how many items there are, where they have a length.
        count: of an item, as the passages in a batch.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with phase(title, total, unit) as part:
        for item in items:
            yield item
            part.advance(count(item))


class Phase:
    """One phase, from `phase`. How far it is it is told with `advance`, best once a batch."""

    def __init__(self, report: _Report, title: str, total: int | None, unit: str, done: int, note: str) -> None:
        self.subject, self.title, self.total, self.unit, self.done, self.note = (
            report.subject, title, total, unit, done, note,
        )  # fmt: skip
        self._display = report.display
        self._first = done
        self._whole: Phase | None = None  # of which this is a part
        self.began = 0.0
        self._last, self._step = 0.0, 0  # when it got on, and by how much
        self.spoke = False

    def __enter__(self) -> Self:
        if self._display is not None:
            self.began = monotonic()
            self._whole = self._display.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._display is not None and self._whole is None:
            self._display.end(self, finished=kind is None)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """
        Args:
            count: how many more are done.
            note: what else there is to know, as the loss.
        """
        if self._whole is not None:
            self._whole.advance(count, note)
        elif self._display is not None:
            self.done += count
            self._last, self._step = monotonic(), count
            self.note = self.note if note is None else note
            self._display.look()

    def told(self, now: float) -> str:
        """How far it is, what else there is to know, how long it took and takes still."""
        seconds, gone = now - self.began, self.done - self._first
        said = []
        if self.total:
            total = max(self.total, self.done)  # it was known but roughly
            share = 100 * self.done // total
            said.append(f"{share}% ({self._number(self.done)} of {self._number(total)}{self._of(total)})")
        elif self.done:
            said.append(f"{self._number(self.done)}{self._of(self.done)}")
        said += [*([self.note] if self.note else []), format_seconds(seconds)]
        if self.total and gone > 0:
            # Since it got on last, time went by, but no more than the step takes that is under way.
            each, left = (self._last - self.began) / gone, self.total - self.done
            still = max(each * left - (now - self._last), each * (left - self._step))
            said += [f"about {format_seconds(still)} left"] if still >= 1 else []
        return ", ".join(said)

    def ended(self, now: float) -> str:
        """What there is to say of it in the end."""
        what = f"{self._number(self.done)}{self._of(self.done)}" if self.done else "done"
        noted = f", {self.note}" if self.note else ""
        return f"{self.subject}: {self.title}: {what} in {format_seconds(now - self.began)}{noted}"

    def _number(self, count: int) -> str:
        return format_size(count) if self.unit == "bytes" else f"{count:,}"

    def _of(self, count: int) -> str:
        if self.unit in ("", "bytes"):
            return ""
        one = self.unit.removesuffix("es") if self.unit.endswith("ches") else self.unit.removesuffix("s")
        return f" {one if count == 1 else self.unit}"


class _Log:
    """The phases of a verb that are under way, the outermost first, and stderr, which here is a log.

    Phases are looked at when they begin and get on, and by a thread, for the sake of those that are silent for long.
    """

    def __init__(self, subject: str, long: bool = False) -> None:
        self._subject, self._soon = subject, long
        self._phases: list[Phase] = []
        self._lock = threading.RLock()
        self._began = self._shown = monotonic()
        self._held: float | None = None  # since when it has waited for something to say
        self._newest: str | None = None  # title of the phase that began last
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="growlm-progress", daemon=True).start()

    def close(self) -> None:
        with self._lock:  # not while the thread is saying something
            self._closed.set()

    def begin(self, new: Phase) -> Phase | None:
        """Returns the phase of which the new one is a part, if it is one."""
        with self._lock:
            if self._phases and new.unit and self._phases[-1].unit == new.unit:
                return self._phases[-1]
            self._phases.append(new)
            self._newest = new.title
        self.look()
        return None

    def end(self, old: Phase, *, finished: bool) -> None:
        with self._lock:
            self._phases.remove(old)
        if finished and self.is_long(old):
            self.write(old.ended(monotonic()))

    def look(self) -> None:
        """Shows how far the phases are, unless it was shown just now."""
        if monotonic() - self._shown < self.pause():
            return
        with self._lock:
            now = monotonic()
            if now - self._shown >= self.pause() and not self._closed.is_set() and self.tells(now):
                self._shown, self._held = now, None
                with _broken_is_silent():
                    self.show(now)

    def pause(self) -> float:
        """Seconds between two times that they are shown."""
        return _FIRST_SECONDS if self._soon else _LOG_SECONDS

    def tells(self, now: float) -> bool:
        """Whether there is something to say yet: of what may be over in a moment there is not, unless it goes on so."""
        if not self._phases or self._lasting(now):
            return True
        if self._held is None:
            self._held = now
        return now - self._held >= 2 * _LEAST_SECONDS

    def _lasting(self, now: float) -> list[Phase]:
        return [p for p in self._phases if now - p.began >= _LEAST_SECONDS]

    def show(self, now: float) -> None:
        lasting = self._lasting(now)
        for current in lasting:
            current.spoke = True
        first = lasting[0].subject if lasting else self._subject
        told = "; ".join(f"{p.title}: {p.told(now)}" for p in lasting)
        self.write(f"{first}: {told or self._between(now)}")

    def _between(self, now: float) -> str:
        """What there is to say where no phase lasts: where the verb is, as in the import of torch."""
        seconds = format_seconds(now - self._began)
        if self._newest is None:
            return f"starting: {seconds}"
        return f"{seconds} so far, {'now' if self._phases else 'after'} {self._newest}"

    def is_long(self, old: Phase) -> bool:
        """Whether a phase's end is worth a line: it has spoken before, or should have by now."""
        now = monotonic()
        return old.spoke or (now - old.began >= _LEAST_SECONDS and now - self._shown >= self.pause())

    def write(self, line: str) -> None:
        self._soon = False
        with self._lock, _broken_is_silent():
            self._shown = monotonic()
            print(line, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._closed.wait(max(self._shown + self.pause() - monotonic(), 0.1)):
            self.look()


class _Bars(_Log):
    """On a terminal: bars of phases that last; those that took long leave a line."""

    def __init__(self, subject: str, long: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # results are not for stderr
        )
        super().__init__(subject, long)

    def close(self) -> None:
        with self._lock, _broken_is_silent():
            super().close()
            self._live.stop()

    def end(self, old: Phase, *, finished: bool) -> None:
        super().end(old, finished=finished)
        with self._lock, _broken_is_silent():
            if not self._phases:
                self._live.stop()  # what is printed next has the terminal for itself

    def pause(self) -> float:
        return _BAR_SECONDS

    def tells(self, now: float) -> bool:
        return True

    def show(self, now: float) -> None:
        if any(now - p.began >= _BAR_SECONDS for p in self._phases) or (self._soon and self._newest is None):
            self._live.start()
            self._live.update(self._table(now), refresh=True)

    def is_long(self, old: Phase) -> bool:
        return monotonic() - old.began >= _LOG_SECONDS

    def write(self, line: str) -> None:
        with self._lock, _broken_is_silent():
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _table(self, now: float) -> Table:
        from rich.markup import escape
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        if not self._phases:
            table.add_row(escape(f"{self._subject}: {self._between(now)}"))
        for p in self._phases:
            bar = ProgressBar(p.total, p.done, width=min(self._live.console.width // 8, 20), pulse=not p.total)
            table.add_row(escape(f"{p.subject}: {p.title}"), bar, escape(p.told(now)))
        return table


def _broken_is_silent() -> AbstractContextManager[None]:
    """A log that is full and a terminal that is gone are no reason to stop."""
    return suppress(OSError, ValueError)


@dataclass(frozen=True)
class _Report:
    """What a verb has opened."""

    subject: str
    display: _Log | None  # None is silent


_SILENT = _Report("", None)
_report: ContextVar[_Report | None] = ContextVar("growlm.progress", default=None)


def _new_display(subject: str, long: bool) -> _Log | None:
    if sys.stderr is None:
        return None
    draws = os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    return (_Bars if sys.stderr.isatty() and draws else _Log)(subject, long)
