"""Serving: replicas of the engine on a Ray cluster, by Ray Serve, and an edge here that has them answer.

Ray Serve begins replicas, watches over them, adds and takes away as many as there is to do, and hands each order to one
of them as `ByModule` says; no proxy of it runs. Knows Ray; nothing of how a request is answered.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from growlm.cluster.joining import connect, one_of, places, seen_file
from growlm.errors import ConfigError
from growlm.store import Store

_DEPLOYMENT = "engine"
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
def on_cluster(address: str, store: Path, fewest: int) -> Iterator[None]:
    """This process as part of a cluster that can serve a store.

    Args:
        fewest: engines that it has to have room for.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, it has no room, or its machines do not see the store's
            files.
    """
    connect(address)
    import ray

    try:
        what, room = places()
        if fewest > room:
            told = f"--replicas: {fewest} engines take a {what} each, and the cluster has {room}"
            raise ConfigError(f"{told}; ask for fewer, or add machines")
        with seen_file(Store.open(store).work) as seen:
            _require_shared(store, seen)
        yield
    finally:
        ray.shutdown()


class Replicas:
    """Engines of a store on the cluster that this process is part of; a context manager.

    Args:
        settings: of `Engine`.
        number: the fewest and the most.
        drain: seconds for answers to end where a replica is taken away.
        place: of the edge: one that was killed and begins again takes over what its replicas have left.

    Raises:
        ConfigError: they cannot begin.
    """

    def __init__(
        self, store: Path, settings: Mapping[str, Any], number: tuple[int, int], *, drain: float, place: str
    ) -> None:
        self._store, self._settings, self._number, self._drain = store.resolve(), dict(settings), number, drain
        self._name = "growlm-" + hashlib.sha256(f"{place} {self._store}".encode()).hexdigest()[:12]

    def __enter__(self) -> Self:
        from ray import serve

        for name in ("ray", "ray.serve"):  # which is louder again once it is imported
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "ERROR"})
            application = self._engines().bind(str(self._store), self._settings)
            try:
                handle = serve.run(application, name=self._name, route_prefix=None)
            except RuntimeError as error:
                raise ConfigError(f"the engines on the cluster do not begin: {self._why() or error}") from None
        except BaseException:
            self._delete()
            raise
        self.order = handle.options(method_name="answer", stream=True).remote
        return self

    def __exit__(self, *error: object) -> None:
        self._delete()

    def running(self) -> int:
        """How many there are now."""
        deployment = self._deployment()
        return 0 if deployment is None else int(deployment.replica_states.get("RUNNING", 0))

    def _engines(self) -> Any:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig

        from growlm.cluster.by_module import ByModule
        from growlm.cluster.replica import Replica

        together, (fewest, most) = self._settings["max_batch"], self._number
        how_many: dict[str, Any] = {"num_replicas": fewest}
        if fewest != most:
            wanted = max(together * _BUSY, 1.0)
            scaling = AutoscalingConfig(min_replicas=fewest, max_replicas=most, target_ongoing_requests=wanted)
            how_many = {"autoscaling_config": scaling}
        return serve.deployment(
            Replica,
            name=_DEPLOYMENT,
            max_ongoing_requests=together,
            graceful_shutdown_timeout_s=self._drain,
            health_check_period_s=2.0,
            health_check_timeout_s=30.0,
            ray_actor_options=one_of(places()[0]),
            request_router_config=RequestRouterConfig(request_router_class=ByModule),  # type: ignore[arg-type]
            **how_many,
        )

    def _deployment(self) -> Any:
        from ray import serve

        application = serve.status().applications.get(self._name)
        return None if application is None else application.deployments.get(_DEPLOYMENT)

    def _why(self) -> str:
        """What a replica says of why it does not begin."""
        with suppress(Exception):  # whoever knows may be gone
            lines = str(self._deployment().message).splitlines()
            named = [line for line in lines if "Error: " in line]
            return (named or lines)[-1].strip()
        return ""

    def _delete(self) -> None:
        from ray import serve

        with suppress(Exception):  # there may be nothing to delete, or nobody to ask
            serve.delete(self._name, _blocking=False)  # answers have had their time to end


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
