"""Ray tasks: each learning on a machine of a cluster, in a process of its own; one that dies is begun anew elsewhere.

The store and the texts have to lie where all machines see the same files. Knows Ray; not how a module is learned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from growlm.cluster.joining import connect, seen_file
from growlm.cluster.learning import FAILED, THERE, Outcome, Runner, in_process
from growlm.cluster.plan import Learning
from growlm.errors import Interrupted
from growlm.progress import say
from growlm.store import Store
from growlm.units import counted

_TRIES = 3  # of a learning whose machine or process dies; each goes on from the last checkpoint


def on_ray(address: str) -> Runner:
    """Learns as tasks of a Ray cluster.

    Args:
        address: HOST:PORT, `auto` to find one that this machine is of, or `local` to start one.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    connect(address)
    import ray
    from ray.exceptions import RayError

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
        try:
            with seen_file(Store.open(store).work) as seen:
                gpus = ray.cluster_resources().get("GPU", 0)
                options: dict[str, Any] = {"num_gpus": 1} if gpus else {}
                names = {
                    task.options(**options).remote(str(store), _absolute(one), str(seen)): one.name for one in left
                }
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
            ray.shutdown()

    return run


def _absolute(one: Learning) -> Learning:
    """With paths that mean the same in every folder."""
    data = tuple(path if path.startswith("hub:") else str(Path(path).resolve()) for path in one.data)
    return Learning(one.name, data, one.settings, one.update)
