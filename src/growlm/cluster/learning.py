"""Learning many modules: each by a process of its own, here one after another, or as tasks of a Ray cluster.

What is done is in the store, and what was stopped goes on where it was: the same plan again does the rest.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from growlm.cluster.board import Board
from growlm.cluster.plan import Learning, taken
from growlm.errors import ConfigError, Interrupted
from growlm.progress import say
from growlm.store import Store

DONE, THERE, FAILED = "done", "there", "failed"


@dataclass(frozen=True)
class Outcome:
    """What one module of a plan has come to.

    Attributes:
        state: done; there, from before; or failed.
        result: as `growlm learn --json` tells it, of one that is done.
        error: why it failed, in a line.
    """

    name: str
    state: str
    result: dict[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Tell = Callable[[str, str], None]  # what a module's learning has said
Runner = Callable[[Path, Sequence[Learning], Tell], Iterator[Outcome]]


def learn_all(store: Store, plan: Sequence[Learning], run: Runner | None = None) -> list[Outcome]:
    """Learns the modules of a plan that are not there yet; one that fails stops no other.

    Args:
        run: how; by default here, one after another.

    Raises:
        ConfigError: what cannot be done in this store; nothing was begun.
        Interrupted: stopped by the user; the same plan goes on.
    """
    existing = store.modules
    if faults := taken(plan, existing):
        raise ConfigError(f"{store.path}: " + f"\n{store.path}: ".join(faults))
    store.check_base()
    there = [one for one in plan if one.name in existing and not one.update]
    left = [one for one in plan if one not in there]
    found = {one.name: Outcome(one.name, THERE) for one in there}
    if there:
        say(f"{len(there)} of {len(plan)} modules are there already: {', '.join(one.name for one in there)}")
    with Board([one.name for one in left]) as board:
        for outcome in (run or here)(store.path, left, board.tell):
            found[outcome.name] = outcome
            told = outcome.error if outcome.state == FAILED else _gain(outcome) if outcome.result else "saved before"
            board.end(outcome.name, outcome.state, f"after {outcome.seconds:,.0f} s: {told}")
    return [found[one.name] for one in plan]


def here(store: Path, left: Sequence[Learning], tell: Tell) -> Iterator[Outcome]:
    """One after another, each by a process of its own."""
    for one in left:
        yield in_process(store, one, lines=partial(tell, one.name))


def in_process(store: Path, one: Learning, *, lines: Callable[[str], None]) -> Outcome:
    """Learns a module in a process of its own.

    Args:
        lines: given each line that it says.

    Raises:
        Interrupted: it was stopped by the user.
    """
    asked = json.dumps(
        {"store": str(store), "name": one.name, "data": one.data, "settings": dict(one.settings), "update": one.update}
    )
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "growlm.cluster.one"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # told once that it should stop, and not by the terminal as well: twice is at once
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        last = ""
        try:
            process.stdin.write(asked + "\n")
            process.stdin.flush()  # and kept open: the process ends with this one
            for line in process.stderr:
                last = line.rstrip() or last
                lines(line.rstrip())
            printed = process.stdout.read()
            status = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise Interrupted("stopped; what was learned is in the store: the same plan again goes on") from None
    seconds = time.monotonic() - began
    if status == 0:
        return Outcome(one.name, DONE, json.loads(printed), seconds=seconds)
    if status == _INTERRUPTED:
        raise Interrupted("stopped; what was learned is in the store: the same plan again goes on")
    why = last.removeprefix("growlm: ") if status > 0 else f"it was ended by signal {-status}"
    return Outcome(one.name, FAILED, error=why or f"it has ended with status {status}", seconds=seconds)


_INTERRUPTED = 130


def _gain(outcome: Outcome) -> str:
    assert outcome.result is not None
    return f"held-out loss {outcome.result['loss_before']:.3f} -> {outcome.result['loss_after']:.3f}"
