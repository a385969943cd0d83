"""Joining: this process becomes part of a Ray cluster, and sees to it that its machines see the same files."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growlm.errors import ConfigError
from growlm.requirements import require_extra

_PATIENCE = 10.0  # seconds for a cluster to answer


def connect(address: str) -> None:
    """
    Args:
        address: HOST:PORT, `auto` to find one that this machine is of, or `local` to start one.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    require_extra("cluster", "ray")
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _require_listening(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0][:200]
        raise ConfigError(f"--ray {address}: no cluster answers there ({told}); start one with ray start") from None


@contextmanager
def seen_file(folder: Path) -> Iterator[Path]:
    """A file by which machines tell whether they see a folder of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = folder / f".seen-{uuid.uuid4().hex[:12]}"
    seen.touch()
    try:
        yield seen
    finally:
        seen.unlink(missing_ok=True)


def _require_listening(address: str) -> None:
    """Ray itself waits for minutes.

    Raises:
        ConfigError: nobody listens at HOST:PORT.
    """
    place = address
    if address == "auto":  # where the last cluster of this machine wrote that it is, which may be there no more
        last = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        place = os.environ.get("RAY_ADDRESS") or (last.read_text().strip() if last.exists() else "")
    host, colon, port = place.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        told = f"--ray {address}: no cluster answers there ({reason}); start one with ray start"
        raise ConfigError(told) from None


def places() -> tuple[str, int]:
    """What each piece of work takes of the cluster, a GPU where it has some and else a core, and how many there are."""
    import ray

    resources = ray.cluster_resources()
    what = "GPU" if resources.get("GPU") else "CPU"
    return what, int(resources.get(what, 0))


def one_of(what: str) -> dict[str, int]:
    """As options of Ray."""
    return {f"num_{what.lower()}s": 1}
