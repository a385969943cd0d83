"""Jobs: verbs that change a store, each run by a process of its own beside the server, one at a time.

A job is what `growlm learn` and its like are in a terminal: it has the store's lock where it writes, is resumed where
it is asked for again, and may die without harm to anyone. Knows processes and what they print; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import signal
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growlm.errors import ConfigError
from growlm.units import format_size

_log = logging.getLogger("growlm.server")

_PRIORITY = 19  # the last: those who wait for an answer go first
_LOG_SECONDS = "1"
_LEAST_MEMORY = 256 << 20  # which Python and torch take by themselves
_MOST_LINES = 5_000
_MOST_KEPT = 50  # jobs that have ended
_LEAVES = 15.0  # seconds in which a job that is told to stop may keep what it has come to
# "law: training: 46% (18 of 39 steps), loss 2.283, 85 tokens/s"
_PROGRESS = re.compile(r": (?P<title>[^:;]+): \d+% \((?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>[^)]+)\)")
_SENT = re.compile(r"\S*growlm-files-\w+/\w+/")  # where a file lies that was sent, which nobody need know
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")  # as fields are called here
_MEMORY = re.compile(r"[Mm]emory|allocat|start new thread")
_LOSS = re.compile(r"\bloss (\d+\.\d+)")

_COMMANDS = {"update": "learn"}  # of verbs that are options of others
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
_ENDED = (DONE, FAILED, CANCELLED)


@dataclass(eq=False)
class Job:
    """
    Attributes:
        verb: learn, update, remove or verify.
        arguments: of its command, behind the store.
        state: queued, running, done, failed or cancelled.
        lines: what it said of itself.
        progress: of the newest phase: its title, how many of what are done, the loss.
        result: what it printed as JSON.
        error: its last line, where it failed.
    """

    verb: str
    module: str | None
    arguments: Sequence[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: str = QUEUED
    lines: list[str] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    error: str | None = None
    began: float | None = None
    ended: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    def to_json(self) -> dict[str, Any]:
        seconds = None if self.began is None else (self.ended or time.time()) - self.began
        told = {name: getattr(self, name) for name in ("id", "verb", "module", "state", "progress", "result", "error")}
        return {**told, "seconds": seconds}

    def says(self, line: str) -> None:
        line = _SENT.sub("", line)
        if len(self.lines) < _MOST_LINES:
            self.lines.append(line)
        if found := _PROGRESS.search(line):
            done, total = (int(found[name].replace(",", "")) for name in ("done", "total"))
            self.progress = {"title": found["title"].strip(), "done": done, "total": total, "unit": found["unit"]}
            if loss := _LOSS.search(line):
                self.progress["loss"] = float(loss[1])
        self._tell()

    def turns(self, state: str) -> None:
        self.state = state
        if state == RUNNING:
            self.began = time.time()
        elif state in _ENDED:
            self.ended = time.time()
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """All that it has said, and goes on saying, until it has ended."""
        told = 0
        while True:
            changed, state = self.changed, self.state
            for line in self.lines[told:]:
                yield {"type": "line", "line": line}
            told = len(self.lines)
            yield {"type": "job", **self.to_json()}
            if state in _ENDED:
                return
            await changed.wait()


class Jobs:
    """Of one server.

    Args:
        store: the folder.
        memory: bytes that a job may take; None for no bound.
        most: that may wait.
        ended: called once one has ended that may have changed the store.
    """

    def __init__(
        self, store: str, *, memory: int | None = None, most: int = 16, ended: Callable[[], Awaitable[object]]
    ) -> None:
        if memory is not None and memory < _LEAST_MEMORY:
            raise ConfigError(
                f"--job-memory is {format_size(memory)}; no job runs in less than {_LEAST_MEMORY >> 20} MB"
            )
        if memory is not None and not hasattr(resource, "prlimit"):
            raise ConfigError("--job-memory needs Linux, which bounds a process; leave it out")
        self._store, self._memory, self._most, self._tell = store, memory, most, ended
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._wanted = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._working = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ends the job that runs, which keeps what it has come to."""
        for job in self.all():
            await self.cancel(job)
        if self._working is not None:
            self._working.cancel()
            with suppress(asyncio.CancelledError):
                await self._working

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    @property
    def full(self) -> bool:
        return sum(job.state == QUEUED for job in self.all()) >= self._most

    def add(self, job: Job) -> Job:
        """Has it run once those before it have ended."""
        while len(self._jobs) >= _MOST_KEPT + self._most and (old := self._oldest_ended()):
            del self._jobs[old]
        self._jobs[job.id] = job
        self._wanted.set()
        return job

    def _oldest_ended(self) -> str | None:
        return next((name for name, job in self._jobs.items() if job.state in _ENDED), None)

    async def cancel(self, job: Job) -> None:
        """Ends a job as Ctrl-C does; one that has ended stays as it is."""
        if job.state == QUEUED:
            job.turns(CANCELLED)
        elif job.state == RUNNING and (process := job.process) is not None:
            job.state = CANCELLED
            _signal(process, signal.SIGINT)
            try:
                async with asyncio.timeout(_LEAVES):
                    await process.wait()
            except TimeoutError:
                _signal(process, signal.SIGKILL)
                await process.wait()

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while job := next((one for one in self.all() if one.state == QUEUED), None):
                try:
                    await self._run(job)
                except OSError as error:
                    job.error = str(error)
                    job.turns(FAILED)

    async def _run(self, job: Job) -> None:
        job.turns(RUNNING)
        process = job.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "growlm", _COMMANDS.get(job.verb, job.verb), self._store, *job.arguments, "--json",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "GROWLM_LOG_SECONDS": _LOG_SECONDS, "COLUMNS": "200"},
            start_new_session=True, limit=1 << 22,
        )  # fmt: skip
        with suppress(ProcessLookupError):  # it may have ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, _PRIORITY)
            _goes_first(process.pid)
            if self._memory is not None:
                resource.prlimit(process.pid, resource.RLIMIT_DATA, (self._memory, self._memory))
        assert process.stdout is not None
        printed, _ = await asyncio.gather(process.stdout.read(), self._listen(job, process))
        status = await process.wait()
        with suppress(ValueError):
            job.result = json.loads(printed)
        if job.state == CANCELLED:
            job.turns(CANCELLED)
        elif status == 0:
            await self._take_over(job)
            job.turns(DONE)
        else:
            job.error = self._why(job, status)
            job.turns(FAILED)

    def _why(self, job: Job, status: int) -> str:
        """What a job has failed for, in a line."""
        if isinstance(job.result, dict) and job.result.get("problems"):
            first, *more = map(str, job.result["problems"])
            return f"{first}; and {len(more)} more" if more else first
        if status < 0:
            return f"it was ended by signal {-status}"
        said = [line.removeprefix("growlm: ") for line in job.lines if line.startswith("growlm: ")] or job.lines
        told = _OPTION.sub(lambda found: found[1].replace("-", "_"), said[-1]) if said else f"status {status}"
        if self._memory is not None and _MEMORY.search(told):
            told += f"; it may have needed more than --job-memory {format_size(self._memory)}"
        return told

    async def _take_over(self, job: Job) -> None:
        try:
            await self._tell()
        except Exception as error:  # the store has changed all the same, and is watched
            _log.exception("what a job has changed is not served yet")
            job.says(f"it is not served yet: {error}")

    async def _listen(self, job: Job, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            job.says(line.decode(errors="replace").rstrip())


def _goes_first(process: int) -> None:
    """Where the machine has no memory left, Linux ends the job and not the server."""
    with suppress(OSError):
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
