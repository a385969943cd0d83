"""By module: Ray Serve's way to a replica, in the order that an order's modules prefer. Knows orders by their names."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from growlm.cluster.preference import preferred


class ByModule(RequestRouter):
    """Ray Serve asks the replicas in the order that is given here, and takes the first with room (its
    `max_ongoing_requests`)."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        order: Any = pending_request.args[0]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not order.names:  # the base alone, which all have: whoever has least to do
            return [candidate_replicas]
        return [[replicas[name]] for name in preferred("+".join(order.names), list(replicas))]
