"""Interruptions: training that is stopped at a step, and processes that are killed at any instant."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from growlm.training import loop

# Processes that have run nothing yet and have one thread, so that they may fork: children of one that has imported what
# takes seconds, which is started once.
fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["pytest", "hypothesis", "growlm.engine", "growlm.training.learn"])

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@contextmanager
def each_step(watch: Callable[[int], object]) -> Iterator[None]:
    """Calls `watch` with every step of training when it begins, once for each group of parameters."""
    original = loop.rate_at

    def watched(step: int, *arguments: Any) -> float:
        watch(step)
        return original(step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "rate_at", watched)
        yield


@contextmanager
def at_step(wanted: int, action: Callable[[], object]) -> Iterator[None]:
    """Does something when a step of training begins, once."""
    done = []

    def watch(step: int) -> None:
        if step == wanted and not done:
            done.append(step)
            action()

    with each_step(watch):
        yield
    assert done


def steps_of(action: Callable[[], object]) -> list[int]:
    """The steps of training that an action takes, from the one with which it begins."""
    steps: list[int] = []
    with each_step(steps.append):
        action()
    return list(dict.fromkeys(steps))


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(action: Callable[..., object], *arguments: object) -> int:
    """Starts an action in a child process; returns the child's id."""
    pid = os.fork()
    if pid == 0:
        try:
            action(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    """Waits for a child process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_new_process(function: Callable[..., object], *arguments: object) -> None:
    """Runs a function in a fresh process, which may fork. It must succeed."""
    helper = fresh.Process(target=_on_one_thread, args=(function, *arguments))
    helper.start()
    helper.join(600)
    assert helper.exitcode == 0


def _on_one_thread(function: Callable[..., object], *arguments: object) -> None:
    torch.set_num_threads(1)
    # A tokenizer's threads are not there in a fork, which would wait for them for good; the command line asks for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    function(*arguments)


def die_at(point: int, folder: str) -> None:
    """Kills this process when it asks the system for the `point`-th thing to do to files of `folder`.

    To open a file for writing counts twice: killed before it, and killed when the file is there and empty.
    """
    seen, busy = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen, busy
        if busy or event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"):
            return
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike):
            name = os.fsdecode(path)
            if os.path.isabs(name) and not name.startswith(folder):
                return
        seen += 1
        if seen == point:
            kill()
        if event == "open" and arguments[2] & _WRITES:
            seen += 1
            if seen == point:
                busy = True
                os.close(os.open(path, arguments[2]))
                kill()

    sys.addaudithook(hook)


def kill_everywhere(action: Callable[[Path], object], folder: Path, out: Path) -> None:
    """Runs an action on copies of a folder, `out/1`, `out/2` and so on: each is killed one point later, the last never.

    To be run `in_new_process`: it forks a child for every point.
    """

    def until_killed(copy: Path, point: int) -> None:
        die_at(point, str(copy))
        action(copy)

    for point in range(1, 1000):
        copy = shutil.copytree(folder, out / str(point))
        code = exit_code(forked(until_killed, copy, point))
        if code != -signal.SIGKILL:
            break
    assert code == 0
