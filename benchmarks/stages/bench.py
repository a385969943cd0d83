"""Bench: what the stages of `benchmarks.gpu` share: clocks, turns within a budget of time, results kept as they come.

A stage tells its cases one by one; each is a line, and in the stage's file at once, so that a run that is cut off has
lost nothing but the case that it was at.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from growlm.disk.files import write_atomic

_LEAST = 3  # counted turns, unless the time is over
_FLUSHED = 256 << 20  # bytes that are written between two timings by the device's clock: more than its caches hold

Side = Callable[[], object]


def nothing() -> None:
    """What is done before a timing, by default."""


class TimeOver(BaseException):
    """A stage's time is over, whatever it is at. No `Exception`, so that nothing takes it for a failure of its own."""


@dataclass(frozen=True)
class Target:
    """A number that was asked for. `measured` is None where it could not be."""

    what: str
    asked: float
    least: bool  # whether it is to be at least so much, or at most
    measured: float | None
    why: str = ""

    @property
    def missed(self) -> bool:
        return self.measured is None or (
            self.measured < self.asked if self.least else self.measured > self.asked
        )  # fmt: skip


@dataclass
class Bench:
    """One run.

    Attributes:
        tiny: shapes that show nothing but that the code runs.
        out: folder of results and of what stages keep for one another.
        floors: what the machine was measured at, per second: `copy` (bytes read and written), `host` (bytes from pinned
            memory), `disk` and `cached` (bytes of a file), `matmul` (FLOPs in bfloat16).
        problems: of the stage that runs, one line each.
    """

    device: torch.device
    tiny: bool
    out: Path
    floors: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _stage: str = ""
    _end: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "processor"

    # Stages

    def begin(self, stage: str, seconds: float) -> None:
        self._stage, self._end = stage, time.monotonic() + seconds
        self.problems, self.results[stage] = [], []

    def left(self) -> float:
        """Seconds of the stage's budget."""
        return self._end - time.monotonic()

    def over(self, case: str) -> bool:
        """Whether the stage's time is over; if so, says which case is left out."""
        if self.left() > 0:
            return False
        self.tell(case, {"left out": "the time of this stage is over"})
        return True

    def tell(self, case: str, numbers: Mapping[str, Any]) -> None:
        """One case's result: a line, and in the stage's file."""
        row = {"case": case, **numbers}
        self.results[self._stage].append(row)
        print(json.dumps({"stage": self._stage, **rounded(row)}), flush=True)
        self.keep()

    def keep(self) -> None:
        kept = {
            "stage": self._stage,
            "tiny": self.tiny,
            "results": self.results[self._stage],
            "problems": self.problems,
        }
        write_atomic(self.out / f"{self._stage}.json", json.dumps(kept, indent=1).encode())

    def problem(self, what: str, error: BaseException) -> None:
        """Something of the stage has failed, and the rest goes on."""
        line = f"{what}: {one_line(error)}"
        self.problems.append(line)
        print(f"{self._stage}: {line}", flush=True)
        self.keep()
        # Frames of the error hold tensors of what has failed.
        error.__traceback__ = None
        self.tidy()

    def ask(self, what: str, asked: float, measured: float | None, *, least: bool = False, why: str = "") -> None:
        self.targets.append(Target(what, asked, least, measured, why))

    # Clocks

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Lets go of what nobody holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wall(self, side: Side) -> float:
        """Seconds until the device has done it too."""
        self.sync()
        start = time.perf_counter()
        side()
        self.sync()
        return time.perf_counter() - start

    def on_device(self, side: Side) -> float:
        """Seconds by the device's clock, with nothing of its inputs in the caches. While they are flushed, what follows
        is queued, so that small kernels are not timed by how fast Python starts them."""
        if not self.cuda:
            return self.wall(side)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(_FLUSHED, dtype=torch.int8, device=self.device).zero_()
        start.record()
        side()
        end.record()
        self.sync()
        return start.elapsed_time(end) / 1e3

    def turns(
        self,
        what: str,
        sides: Mapping[str, Side],
        *,
        seconds: float,
        rounds: int = 11,
        warmup: int = 2,
        kernels: bool = False,
        before: Callable[[], None] = nothing,
    ) -> dict[str, float]:
        """Median seconds of each side, in turns: so many rounds, or as many as fit the time. A side that fails is told
        and left out.

        Args:
            warmup: rounds that are not counted.
            kernels: by the device's clock.
            before: called before each timing.
        """
        clock, times = self.on_device if kernels else self.wall, {name: [] for name in sides}
        rounds, warmup = (2, 1) if self.tiny else (rounds, warmup)
        end = time.monotonic() + min(seconds, max(self.left(), 0.0))
        for counted in range(-warmup, rounds):
            late = time.monotonic() > end
            if late and counted >= (1 if self.left() <= 0 else _LEAST):
                break
            for name in list(times):
                try:
                    before()
                    taken = clock(sides[name])
                except Exception as error:
                    del times[name]
                    self.problem(f"{what}, {name}", error)
                else:
                    if counted >= 0:
                        times[name].append(taken)
        return {name: statistics.median(taken) for name, taken in times.items() if taken}

    # Floors

    def moving(self, num_bytes: float) -> float:
        """Seconds that so many bytes of the device's memory take, read or written."""
        return num_bytes / self.floors["copy"]

    def multiplying(self, flops: float) -> float:
        """Seconds that so many FLOPs take in matrix products."""
        return flops / self.floors["matmul"]


def ms(seconds: float) -> float:
    return seconds * 1e3


def ratio(one: float | None, other: float | None) -> float | None:
    """None where either is missing."""
    return None if not one or not other else one / other


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def rounded(value: Any) -> Any:
    """For a line: four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
