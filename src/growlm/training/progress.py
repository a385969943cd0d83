"""Progress: a bar on stderr for long work. Knows steps and seconds only; results go to stdout, never through here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from growlm.training.loop import StepReport

_LOG_SECONDS = 30  # between two lines where there is no terminal


@contextmanager
def training_bar(title: str, show: bool | None = None) -> Iterator[Callable[[StepReport], None]]:
    """A bar with loss, tokens/s and time left, by default where stderr is a terminal; in a log, a line at times."""
    logged = time.monotonic()
    with bar(title, show, "{task.fields[note]}") as (progress, task):

        def report(step: StepReport) -> None:
            nonlocal logged
            speed = step.tokens / max(step.seconds, 1e-9)
            note = f"loss {step.loss:.3f}  {speed:,.0f} tokens/s"
            progress.update(task, total=step.num_steps, completed=step.step, note=note)
            if show is None and progress.disable and time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                print(f"{title}: step {step.step} of {step.num_steps}  {note}", file=sys.stderr, flush=True)

        yield report


@contextmanager
def counting_bar(title: str, total: int, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many of `total` are done."""
    with bar(title, show, "") as (progress, task):
        progress.update(task, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def bar(title: str, show: bool | None, note: str) -> Iterator[tuple[Progress, TaskID]]:
    shown = sys.stderr.isatty() if show is None else show
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(note), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress, progress.add_task(title, total=None, note="")


def say(line: str, show: bool | None = None) -> None:
    """A line on stderr, where progress is shown."""
    if sys.stderr.isatty() if show is None else show:
        print(line, file=sys.stderr, flush=True)
