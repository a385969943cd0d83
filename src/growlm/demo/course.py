"""Course: what differs between the demo of a base of its own and that of a published one. `run.py` knows none of it.

A course measures the machine, says how much fits a number of seconds, and what there is to say of it. How much a demo
does is a size: its `stages`, in their order, and whatever else they need to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from growlm.demo.record import Request
from growlm.demo.result import DemoResult

S = TypeVar("S")


class Course(ABC, Generic[S]):
    """One kind of demo, as it was asked for.

    Attributes:
        first: stages that come before the machine is measured, and need no size.
        wanted, reached: what a user may hope for and minutes may be too few for, as "too few minutes ..." and
            "... from about 3 minutes on" go on.
        subject: of which the least that fits is said.
    """

    first: ClassVar[tuple[str, ...]] = ()
    wanted: ClassVar[str]
    reached: ClassVar[str]
    subject: ClassVar[str] = "a demo"

    def __init__(self, request: Request, out: Path, progress: bool | None) -> None:
        self.request, self.out, self.progress = request, out, progress

    @property
    @abstractmethod
    def fast(self) -> S:
        """The size of `--fast`."""

    @abstractmethod
    def measure(self, seconds: float) -> dict[str, Any]:
        """What this machine takes, as JSON.

        Args:
            seconds: in which the demo is to end.
        """

    @abstractmethod
    def take(self, measured: Mapping[str, Any]) -> None:
        """Goes by what `measure` gave, in this process or an earlier one."""

    @abstractmethod
    def plan(self, seconds: float) -> S | None:
        """The most that fits; None if not even the least does."""

    @abstractmethod
    def less(self, size: S, stages: Collection[str], seconds: float, pace: float) -> S:
        """A size cut down so that the stages that have not begun fit the time that is left; the least if nothing does.

        Args:
            stages: that have not begun.
            seconds: left.
            pace: what stages take, for a second that was measured.
        """

    @abstractmethod
    def seconds_of(self, size: S) -> dict[str, float]:
        """What each stage takes; empty where nothing was measured."""

    @abstractmethod
    def least(self) -> float:
        """The seconds in which a demo can be done at all."""

    @abstractmethod
    def most_wanted(self) -> float:
        """The seconds from which on what is `wanted` fits."""

    @abstractmethod
    def enough(self, size: S) -> bool:
        """Whether what is `wanted` is done."""

    @abstractmethod
    def described(self, size: S) -> str:
        """What will be done."""

    @abstractmethod
    def note(self, stage: str, size: S | None) -> str:
        """What a stage does."""

    @abstractmethod
    def do(self, stage: str, size: S | None, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Runs a stage."""

    @abstractmethod
    def told(
        self, size: S, results: Mapping[str, dict[str, Any]], seconds: Mapping[str, float], pace: float
    ) -> DemoResult:
        """The result of a demo that is complete."""
