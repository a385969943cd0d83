"""History: the loss of every step of a run, a line of JSON each, which others can read while it trains.

Knows numbers and one file. A run that goes on from a checkpoint takes up its lines there, so that in the end they are
those of a run that was never stopped.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from growlm.disk.files import write_atomic
from growlm.errors import StoreError

FILE = "losses.jsonl"
_POINTS = 200  # that a shortened history has, at most


class History:
    """The lines of one run, as they come. A line that cannot be written is lost, and the run goes on.

    Args:
        folder: of the run.
        done: steps that are done already; lines of later ones are those of a process that was killed, and go.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self._path = folder / FILE
        kept = [line for line in read(folder) if line["step"] <= done] if done else []
        with suppress(OSError, StoreError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, "".join(map(_written, kept)).encode())

    def add(self, step: int, tokens: int, loss: float, learning_rate: float, heldout: float | None) -> None:
        """
        Args:
            step, tokens: how many have been done, this one's included.
            loss: of the step, in nats a token, before its change.
            heldout: loss of held-out text after it, where it was scored.
        """
        line = {"step": step, "tokens": tokens, "loss": loss, "learning_rate": learning_rate}
        if heldout is not None:
            line["heldout"] = heldout
        with suppress(OSError), self._path.open("a") as file:
            file.write(_written(line))


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run has left in its folder, by steps; what is no such line is left out."""
    found: dict[int, dict[str, Any]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for text in (folder / FILE).read_text().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                if all(math.isfinite(line[key]) for key in ("step", "tokens", "loss", "learning_rate")):
                    found[int(line["step"])] = line
    return [found[step] for step in sorted(found)]


def lines(history: list[dict[str, Any]]) -> str:
    """A history as a file holds it."""
    return "".join(map(_written, history))


def shortened(history: list[dict[str, Any]]) -> list[list[float]]:
    """Steps and losses [step, mean loss since the one before], few enough for a manifest."""
    width = -(-len(history) // _POINTS) or 1
    parts = (history[at : at + width] for at in range(0, len(history), width))
    return [[part[-1]["step"], round(sum(line["loss"] for line in part) / len(part), 6)] for part in parts]


def _written(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
