"""Board: what each module of a plan is at, in one table on a terminal, and in a log as a line now and then.

Knows names, states and what was said last; not who says it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from growlm.progress import log_seconds

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

WAITS, LEARNS = "waits", "learns"
_SHOWN = 24  # rows of a table, those that learn first


class Board:
    """A context manager, told from any thread.

    Args:
        names: of all modules, in the plan's order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._rows: dict[str, tuple[str, str]] = dict.fromkeys(names, (WAITS, ""))
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._logged = monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), get_renderable=self._table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, name: str, line: str) -> None:
        """What a module's learning says, which is under way."""
        with self._lock:
            self._rows[name] = LEARNS, line.removeprefix(f"{name}: ")
            due = self._live is None and monotonic() - self._logged >= log_seconds()
            if due:
                self._logged = monotonic()
        if due:
            print(self.line(), file=sys.stderr, flush=True)

    def end(self, name: str, state: str, line: str) -> None:
        """What it has come to."""
        with self._lock:
            self._rows[name] = state, line
        if self._live is None:
            print(f"{name}: {state}: {line}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """How many are in each state, and what those that learn are at."""
        with self._lock:
            rows = dict(self._rows)
        counts = Counter(state for state, _ in rows.values())
        told = ", ".join(f"{number} {state}" for state, number in counts.items())
        at = "; ".join(f"{name}: {line}" for name, (state, line) in rows.items() if state == LEARNS and line)
        return f"{told}; {at}" if at else told

    def _table(self) -> Table:
        from rich.table import Table

        with self._lock:
            rows = list(self._rows.items())
        order = {LEARNS: 0, WAITS: 2}
        rows.sort(key=lambda row: order.get(row[1][0], 1))
        table = Table("module", "", "", box=None, pad_edge=False)
        for name, (state, line) in rows[:_SHOWN]:
            table.add_row(name, state, line, style=None if state == LEARNS else "dim")
        if len(rows) > _SHOWN:
            table.add_row(f"and {len(rows) - _SHOWN} more", "", "", style="dim")
        return table
