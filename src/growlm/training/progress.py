"""Progress: a bar on stderr for long work. Knows steps and seconds only; results go to stdout, never through here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from growlm.training.loop import StepReport


@contextmanager
def training_bar(title: str, show: bool | None = None) -> Iterator[Callable[[StepReport], None]]:
    """A bar with loss, tokens/s and time left. By default shown where stderr is a terminal."""
    with bar(title, show, "{task.fields[note]}") as (progress, task):

        def report(step: StepReport) -> None:
            speed = step.tokens / max(step.seconds, 1e-9)
            note = f"loss {step.loss:.3f}  {speed:,.0f} tokens/s"
            progress.update(task, total=step.num_steps, completed=step.step, note=note)

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
