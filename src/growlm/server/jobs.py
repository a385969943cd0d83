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
import signal
import sys
import time
import uuid
from collections import OrderedDict, deque
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
_MOST_LINES, _LONGEST_LINE = 5_000, 4_000
_MOST_KEPT = 50  # jobs that have ended
_LOOK = 0.2  # seconds between two looks at what a job takes
_LEAVES = 15.0  # seconds in which a job that is told to stop may keep what it has come to
# "law: training: 46% (18 of 39 steps), loss 2.283, 85 tokens/s"
_PROGRESS = re.compile(r": (?P<title>[^:;]+): \d+% \((?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>[^)]+)\)")
_SENT = re.compile(r"\S*growlm-files-\w+/\w+/")  # where a file lies that was sent, which nobody need know
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")  # as fields are called here
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
        learns_from: ids of files that were sent, which are let go of once it is done.
        state: queued, running, done, failed or cancelled.
        lines, said: the newest of what it said of itself, and how many lines that were.
        left, too_large: whether it was cancelled, or took more memory than it may.
        progress: of the newest phase: its title, how many of what are done, the loss.
        result: what it printed as JSON.
        error: its last line, where it failed.
    """

    verb: str
    module: str | None
    arguments: Sequence[str]
    learns_from: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: str = QUEUED
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_LINES))
    said: int = 0
    left: bool = False
    too_large: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    error: str | None = None
    began: float | None = None
    ended: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None

    @property
    def over(self) -> bool:
        return self.state in _ENDED

    def to_json(self) -> dict[str, Any]:
        seconds = None if self.began is None else (self.ended or time.time()) - self.began
        told = {name: getattr(self, name) for name in ("id", "verb", "module", "state", "progress", "result", "error")}
        return {**told, "seconds": seconds}

    def says(self, line: str) -> None:
        line = _SENT.sub("", line)
        found = _PROGRESS.search(line)
        if found is None:  # how far it is is told besides
            self.lines.append(line)
            self.said += 1
        else:
            done, total = (int(found[name].replace(",", "")) for name in ("done", "total"))
            self.progress = {"title": found["title"].strip(), "done": done, "total": total, "unit": found["unit"]}
            if loss := _LOSS.search(line):
                self.progress["loss"] = float(loss[1])
        self._tell()

    def turns(self, state: str) -> None:
        self.state = state
        if state == RUNNING:
            self.began = time.time()
        elif self.over:
            self.ended, self.progress = time.time(), {}
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def events(self, ending: asyncio.Event | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """All that it has said, and goes on saying, until it has ended.

        Args:
            ending: set once nobody is told any more.
        """
        told = 0
        while True:
            changed, state, said = self.changed, self.state, self.said
            for line in list(self.lines)[max(len(self.lines) - (said - told), 0) :]:
                yield {"type": "line", "line": line}
            told = said
            yield {"type": "job", **self.to_json()}
            if state in _ENDED or (ending is not None and ending.is_set()):
                return
            waits = [asyncio.ensure_future(event.wait()) for event in (changed, ending) if event is not None]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()


class Jobs:
    """Of one server.

    Args:
        store: the folder.
        memory: bytes that a job may take; None for no bound.
        most: that may wait.
        ended: called once one has ended that may have changed the store.
        done: called with each that is done.
    """

    def __init__(
        self,
        store: str,
        *,
        memory: int | None = None,
        most: int = 16,
        ended: Callable[[], Awaitable[object]],
        done: Callable[[Job], None] = lambda job: None,
    ) -> None:
        if memory is not None and memory < _LEAST_MEMORY:
            raise ConfigError(
                f"--job-memory is {format_size(memory)}; no job runs in less than {_LEAST_MEMORY >> 20} MB"
            )
        if memory is not None and not Path("/proc/self/statm").exists():
            raise ConfigError("--job-memory needs Linux, which says what a process takes; leave it out")
        self._store, self._memory, self._most, self._tell = store, memory, most, ended
        self.done = done
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._wanted = asyncio.Event()
        self.ending = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._working = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ends the job that runs, which keeps what it has come to."""
        self.ending.set()
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
        elif job.state == RUNNING:
            job.left = True  # where it has no process yet, it is ended as soon as there is one
            if job.process is not None:
                await _end(job.process)
            while job.state == RUNNING:  # until what it leaves has been read
                await job.changed.wait()

    async def _work(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while job := next((one for one in self.all() if one.state == QUEUED), None):
                try:
                    await self._run(job)
                except Exception as error:  # of this job, and none of the next
                    _log.exception("a job could not be run")
                    job.error = str(error)
                    job.turns(FAILED)

    async def _run(self, job: Job) -> None:
        job.turns(RUNNING)
        command = _COMMANDS.get(job.verb, job.verb), self._store, *job.arguments, "--json"
        process = job.process = await asyncio.create_subprocess_exec(
            # -P: what lies in the folder that the server was started in is not for it
            sys.executable, "-P", "-m", "growlm.server.job_process", *command,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "GROWLM_LOG_SECONDS": _LOG_SECONDS, "COLUMNS": "200"}, start_new_session=True,
        )  # fmt: skip
        try:
            with suppress(ProcessLookupError):  # it may have ended already
                os.setpriority(os.PRIO_PROCESS, process.pid, _PRIORITY)
                _goes_first(process.pid)
            if job.left:
                _signal(process, signal.SIGKILL)
            assert process.stdout is not None
            printed, *_ = await asyncio.gather(
                process.stdout.read(), self._listen(job, process), self._bound(job, process)
            )
            status = await process.wait()
        except BaseException:
            _signal(process, signal.SIGKILL)  # nobody would look after it
            raise
        with suppress(ValueError):
            job.result = json.loads(printed)
        if status == 0:  # though it was cancelled: it was through by then
            await self._take_over(job)
            job.turns(DONE)
            self.done(job)
        elif job.left:
            job.turns(CANCELLED)
        else:
            job.error = self._why(job, status)
            job.turns(FAILED)

    def _why(self, job: Job, status: int) -> str:
        """What a job has failed for, in a line."""
        if isinstance(job.result, dict) and job.result.get("problems"):
            first, *more = map(str, job.result["problems"])
            return f"{first}; and {len(more)} more" if more else first
        if job.too_large:
            return f"it took more memory than --job-memory {format_size(self._memory or 0)}; raise it"
        if status < 0:
            return f"it was ended by signal {-status}"
        said = [line.removeprefix("growlm: ") for line in job.lines if line.startswith("growlm: ")] or list(job.lines)
        return _OPTION.sub(lambda found: found[1].replace("-", "_"), said[-1]) if said else f"status {status}"

    async def _take_over(self, job: Job) -> None:
        try:
            await self._tell()
        except Exception as error:  # the store has changed all the same, and is watched
            _log.exception("what a job has changed is not served yet")
            job.says(f"it is not served yet: {error}")

    async def _bound(self, job: Job, process: asyncio.subprocess.Process) -> None:
        """Ends a process that takes too much: a limit of the system's would have it fail anywhere, or hang."""
        while self._memory is not None and process.returncode is None:
            if _taken_by(process.pid) > self._memory:
                job.too_large = True
                _signal(process, signal.SIGKILL)
            await asyncio.sleep(_LOOK)

    async def _listen(self, job: Job, process: asyncio.subprocess.Process) -> None:
        """What it says, line by line, however long one is."""
        assert process.stderr is not None
        held = b""
        while part := await process.stderr.read(1 << 16):
            *lines, held = (held + part).split(b"\n")
            for line in lines:
                job.says(line[:_LONGEST_LINE].decode(errors="replace").rstrip())
            held = held[:_LONGEST_LINE]
        if held:
            job.says(held.decode(errors="replace").rstrip())


def _goes_first(process: int) -> None:
    """Where the machine has no memory left, Linux ends the job and not the server."""
    with suppress(OSError):
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")


def _taken_by(process: int) -> int:
    """Bytes of memory that a process takes; 0 where it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a process as Ctrl-C does, and otherwise where it does not."""
    _signal(process, signal.SIGINT)
    try:
        async with asyncio.timeout(_LEAVES):
            await process.wait()
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        await process.wait()


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
