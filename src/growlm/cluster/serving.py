"""Serving: replicas of the engine on a Ray cluster, by Ray Serve, and an edge here that has them answer.

Ray Serve begins replicas, watches over them, adds and takes away as many as there is to do, and hands each order to one
of them as `ByModule` says; no proxy of it runs. Knows Ray; nothing of how a request is answered.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growlm.cluster.joining import connect, seen_file
from growlm.errors import ConfigError
from growlm.store import Store

_BUSY = 0.5  # share of the answers that a replica writes together, beyond which more replicas are begun


def replica_range(text: str) -> tuple[int, int]:
    """
    Args:
        text: `2`, or `1-8` for as many as there is to do.

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise ConfigError(f"--replicas is {text!r}; give a number like 2, or a range like 1-8")
    return fewest, most


@contextmanager
def serving_on(
    address: str, store: Path, settings: Mapping[str, Any], number: tuple[int, int], *, drain: float, place: str
) -> Iterator[Any]:
    """Replicas of a store's engine, as long as this runs; gives what has one of them answer an order.

    Args:
        settings: of `Engine`.
        number: the fewest and the most replicas.
        drain: seconds for answers to end where a replica is taken away.
        place: of the edge: one that was killed and begins again takes over what its replicas have left.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or its machines do not see the store's files.
    """
    connect(address)
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from growlm.cluster.by_module import ByModule
    from growlm.cluster.replica import Replica

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with seen_file(Store.open(store).work) as seen:
            _require_shared(store, seen)
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "ERROR"})
        together = settings["max_batch"]
        fewest, most = number
        how_many: dict[str, Any] = {"num_replicas": fewest}
        if fewest != most:
            wanted = max(together * _BUSY, 1.0)
            scaling = AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=wanted)
            how_many = {"autoscaling_config": scaling}
        gpus = ray.cluster_resources().get("GPU", 0)
        engines: Any = serve.deployment(
            Replica,
            name="engine",
            max_ongoing_requests=together,
            graceful_shutdown_timeout_s=drain,
            health_check_period_s=2.0,
            health_check_timeout_s=30.0,
            ray_actor_options={"num_gpus": 1} if gpus else {"num_cpus": 1},
            request_router_config=RequestRouterConfig(request_router_class=ByModule),  # type: ignore[arg-type]
            **how_many,
        )
        name = "growlm-" + hashlib.sha256(f"{place} {store.resolve()}".encode()).hexdigest()[:12]
        handle = serve.run(engines.bind(str(store.resolve()), dict(settings)), name=name, route_prefix=None)
        try:
            yield handle.options(method_name="answer", stream=True).remote
        finally:
            serve.delete(name)
    finally:
        ray.shutdown()


def _require_shared(store: Path, seen: Path) -> None:
    """
    Raises:
        ConfigError: a machine of the cluster does not see the file.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    def sees(file: str) -> bool:
        return Path(file).exists()

    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(str(seen))
        for node in nodes
    ]
    blind = [node["NodeManagerHostname"] for node, there in zip(nodes, ray.get(asked), strict=True) if not there]
    if blind:
        raise ConfigError(
            f"{', '.join(blind)} does not see the files of {store}; it has to lie where all machines see the same ones"
        )
