"""Ray tasks: each learning on a machine of a cluster, in a process of its own; one that dies is begun anew elsewhere.

The store and the texts have to lie where all machines see the same files. Knows Ray; not how a module is learned.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from growlm.cluster.learning import FAILED, THERE, Outcome, Runner, in_process
from growlm.cluster.plan import Learning
from growlm.errors import ConfigError, Interrupted
from growlm.progress import say
from growlm.requirements import require_extra
from growlm.store import Store
from growlm.units import counted

_TRIES = 3  # of a learning whose machine or process dies; each goes on from the last checkpoint
_PATIENCE = 10.0  # seconds for a cluster to answer
_OWN = "local"  # no cluster, but one of this machine alone


def on_ray(address: str) -> Runner:
    """Learns as tasks of a Ray cluster.

    Args:
        address: HOST:PORT, `auto` to find one that this machine is of, or `local` to start one.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    require_extra("cluster", "ray")
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _require_listening(address)
    try:
        ray.init(address=None if address == _OWN else address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0][:200]
        raise ConfigError(f"--ray {address}: no cluster answers there ({told}); start one with ray start") from None

    @ray.remote(max_retries=_TRIES, num_cpus=1)
    def task(store: str, one: Learning, seen: str) -> Outcome:
        if not Path(seen).exists():
            told = "does not see the store's files; it has to lie where all machines see the same ones"
            return Outcome(one.name, FAILED, error=f"{os.uname().nodename}: {store}: {told}")
        found = in_process(Path(store), one, lines=lambda line: None)
        if found.state == FAILED and not one.update and Store.open(store).find(one.name) is not None:
            return Outcome(one.name, THERE)  # an earlier try has saved it, and could not say so
        return found

    def run(store: Path, left: Sequence[Learning]) -> Iterator[Outcome]:
        store = store.resolve()
        seen = Store.open(store).work / f".seen-{uuid.uuid4().hex[:12]}"
        seen.parent.mkdir(exist_ok=True)
        seen.touch()
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            options: dict[str, Any] = {"num_gpus": 1} if gpus else {}
            names = {task.options(**options).remote(str(store), _absolute(one), str(seen)): one.name for one in left}
            places = int(gpus) or int(ray.cluster_resources()["CPU"])
            say(f"{len(names)} modules on {counted(len(ray.nodes()), 'machine')}, {places} at a time")
            waiting = list(names)
            while waiting:
                ended, waiting = ray.wait(waiting, num_returns=1)
                try:
                    yield ray.get(ended[0])
                except RayError as error:
                    yield Outcome(names[ended[0]], FAILED, error=" ".join(str(error).split())[:300])
        except KeyboardInterrupt:
            raise Interrupted("stopped; what was learned is in the store: the same plan again goes on") from None
        finally:
            seen.unlink(missing_ok=True)
            ray.shutdown()

    return run


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


def _absolute(one: Learning) -> Learning:
    """With paths that mean the same in every folder."""
    data = tuple(path if path.startswith("hub:") else str(Path(path).resolve()) for path in one.data)
    return Learning(one.name, data, one.settings, one.update)
