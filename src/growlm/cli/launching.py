"""Launching: the ranks of one run on this machine, each a process of its own with this very command.

What the first one prints is what the command prints; of the others it is told only where one of them fails first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from growlm.errors import ConfigError
from growlm.following import end_with_parent
from growlm.progress import leave_to_others

_LOOK = 0.1  # seconds between two looks at whether all are well
_LEAVES = 30.0  # seconds in which the others may end by themselves once one has
_LEAVES_SOON = 10.0  # and once somebody has asked for it
_KEPT = 4000  # characters of what a rank has said
GONE = 75  # exit status of a rank that ends because another one has
_GOES_ON = "; the same command goes on from the last checkpoint, if there is one"
STARTED = "GROWLM_STARTED_RANKS"  # in the environment of those that are looked after here


def of_several() -> bool:
    """Whether this process is one of several ranks, whoever has started it."""
    if "WORLD_SIZE" not in os.environ:
        return False  # which needs no torch to tell
    from growlm.training.parallel import launched

    return launched()


def is_first() -> bool:
    """Whether this process tells and writes what several ranks, if there are several, have come to."""
    return not of_several() or os.environ["RANK"] == "0"


def other_rank() -> str:
    """Of a rank that somebody else has started, but for the first, who it is, for messages; else nothing."""
    if is_first() or STARTED in os.environ:
        return ""
    return f"rank {os.environ['RANK']} on {socket.gethostname()}: "


def leave(status: int) -> NoReturn:
    """Ends a rank at once, once what it has said is written.

    Python does not shut down first: torch keeps the process group of a model in parts to the last, and a thread of it
    that lets go of a tensor while Python shuts down aborts the process (github.com/pytorch/pytorch, issue 190489).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it was closed when the process began
                stream.flush()
        except OSError:  # nobody reads it any more
            status = status or 1
    os._exit(status)


def run_on(devices: int) -> None:
    """Has as many processes run this command, and ends with the first one's status; returns where there is one device,
    or in each of these processes.

    Raises:
        ConfigError: there are not so many devices.
    """
    from growlm.base.placement import num_gpus

    if devices < 1:
        raise ConfigError(f"--devices is {devices}; it must be at least 1")
    if STARTED in os.environ:
        return end_with_parent()
    if devices == 1 or of_several():
        return None
    if 0 < num_gpus() < devices:
        raise ConfigError(f"--devices is {devices}; this machine has {num_gpus()}")
    leave_to_others()
    sys.exit(_Launch([sys.executable, "-m", "growlm", *sys.argv[1:]], devices).wait())


class _Launch:
    def __init__(self, command: Sequence[str], devices: int) -> None:
        import torch

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(torch.get_num_threads() // devices, 1)))
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._said = [b""] * devices
        self._listening: list[threading.Thread] = []
        self._told_to_end = False
        for rank in range(devices):
            known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": devices, "MASTER_PORT": port}
            environment = {**os.environ, **{key: str(value) for key, value in known.items()}}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads, STARTED: "1"}
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,  # which ends with this process, and they do then
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is told to the first alone, which tells the others
            )
            self._ranks.append(process)
            if rank:
                thread = threading.Thread(target=self._listen, args=(rank,), daemon=True)
                thread.start()
                self._listening.append(thread)

    def wait(self) -> int:
        """The exit status: that of the first rank, or of the one that has failed before it."""
        handlers: dict[signal.Signals, Callable[[int, object], None]] = {
            signal.SIGTERM: self._tell, signal.SIGINT: self._tell,
            signal.SIGTSTP: self._pause, signal.SIGCONT: self._go_on,
        }  # fmt: skip
        # What is ignored stays so, as Ctrl-C is by what runs in the background.
        heard = [number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handlers[number]) for number in heard}
        try:
            return self._wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> int:
        while not self._over():
            time.sleep(_LOOK)
        ended = time.monotonic()
        while any(rank.poll() is None for rank in self._ranks):
            if time.monotonic() - ended > (_LEAVES_SOON if self._told_to_end else _LEAVES):
                break
            time.sleep(_LOOK)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        for thread in self._listening:
            thread.join()
        return self._told()

    def _told(self) -> int:
        """The exit status; says what the first rank has not said itself."""
        statuses = [int(rank.returncode) for rank in self._ranks]
        if not any(statuses):
            return 0
        # Those that end because another has are no culprits, nor are those that were killed here.
        at = next((n for n, status in enumerate(statuses) if status > 0 and status != GONE), None)
        if at is None:
            at = next((n for n, status in enumerate(statuses) if status < 0), 0)
        status = statuses[at]
        if at or status < 0:
            lines = [line for line in self._said[at].decode(errors="replace").splitlines() if line.strip()]
            said = lines[-1].removeprefix("growlm: ") if lines and status > 0 else f"it was ended by signal {-status}"
            print(f"growlm: device {at}: {said}{_GOES_ON if status < 0 else ''}", file=sys.stderr)
        return status if status > 0 else 128 - status

    def _over(self) -> bool:
        """Whether the first rank has ended, or any has failed."""
        statuses = [rank.poll() for rank in self._ranks]
        return statuses[0] is not None or any(statuses)

    def _listen(self, rank: int) -> None:
        stream = self._ranks[rank].stderr
        assert stream is not None
        while part := os.read(stream.fileno(), 1 << 16):
            self._said[rank] = (self._said[rank] + part)[-_KEPT:]

    def _tell(self, number: int, _: object) -> None:
        """The first rank ends the run as it should; once it has gone, the others may not stay."""
        self._told_to_end = True
        if self._ranks[0].poll() is None:
            self._ranks[0].send_signal(number)
        else:
            self._send(signal.SIGKILL)

    def _pause(self, _: int, __: object) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _go_on(self, _: int, __: object) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)
