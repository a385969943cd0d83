"""Ray tasks: each learning on a machine of a cluster, in a process of its own; one that dies is begun anew elsewhere.

The store and the texts have to lie where all machines see the same files. Knows Ray; not how a module is learned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from growlm.cluster.joining import connect, one_of, places, seen_file
from growlm.cluster.learning import FAILED, THERE, Outcome, Runner, Tell, in_process
from growlm.cluster.plan import Learning
from growlm.errors import Interrupted
from growlm.progress import say
from growlm.store import Store
from growlm.units import counted

_LOOK = 1.0  # seconds between two looks at what is said
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
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(max_retries=_TRIES, num_cpus=1)
    def task(store: str, one: Learning, seen: str, said: Queue) -> Outcome:
        if not Path(seen).exists():
            told = "does not see the store's files; it has to lie where all machines see the same ones"
            return Outcome(one.name, FAILED, error=f"{os.uname().nodename}: {store}: {told}")
        host = os.uname().nodename
        found = in_process(Path(store), one, lines=lambda line: said.put((one.name, f"{host}: {line}")))
        if found.state == FAILED and not one.update and Store.open(store).find(one.name) is not None:
            return Outcome(one.name, THERE)  # an earlier try has saved it, and could not say so
        return found

    def run(store: Path, left: Sequence[Learning], tell: Tell) -> Iterator[Outcome]:
        store = store.resolve()
        try:
            with seen_file(Store.open(store).work) as seen:
                what, number = places()
                # Where this process is: a machine that dies takes no other's word with it.
                mine = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
                said = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": mine})
                names = {
                    task.options(**one_of(what)).remote(str(store), _absolute(one), str(seen), said): one.name
                    for one in left
                }
                say(f"{len(names)} modules on {counted(len(ray.nodes()), 'machine')}, {number} at a time")
                waiting = list(names)
                while waiting:
                    ended, waiting = ray.wait(waiting, num_returns=1, timeout=_LOOK)
                    for name, line in said.get_nowait_batch(said.qsize()):
                        tell(name, line)
                    for one in ended:
                        try:
                            yield ray.get(one)
                        except RayError as error:
                            yield Outcome(names[one], FAILED, error=" ".join(str(error).split())[:300])
        except KeyboardInterrupt:
            raise Interrupted("stopped; what was learned is in the store: the same plan again goes on") from None
        finally:
            ray.shutdown()

    return run


def _absolute(one: Learning) -> Learning:
    """With paths that mean the same in every folder."""
    data = tuple(path if path.startswith("hub:") else str(Path(path).resolve()) for path in one.data)
    return Learning(one.name, data, one.settings, one.update)
