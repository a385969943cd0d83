"""Pool pruning: which sub-keys of a module's pools go, by how much of a text's weight their experts got.

Pools stay a grid of product keys: whole rows of side a go, each with all of its experts. Knows usage and a module of
kind peer; nothing of stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growlm.base import Base
from growlm.errors import ConfigError
from growlm.layers.peer import PEER
from growlm.modules.peer import Peer, PeerConfig
from growlm.surgery.choosing import Candidates, choose
from growlm.usage.usage import Usage

# a rows of side a, b experts of each


def prune_pools(
    base: Base, module: Peer, usage: Usage, *, keep: float, normalise: str
) -> tuple[Peer, list[dict[str, Any]]]:
    """A module without its least used sub-keys, and of every pool which it kept.

    Raises:
        ConfigError: nothing of it was ever opened, or a share that cannot be reached.
    """
    if not module.config.open_steps:
        raise ConfigError("its experts are untrained, so that none is used; run growlm learn")
    # A pool of the base itself in the same layer runs before the module's own.
    counted, b = {pool.layer: pool for pool in usage.pools["text"]}, module.config.sub_keys[1]
    assert module.config.layers is not None
    weights = [counted[layer].gates.view(-1, b).sum(-1) for layer in module.config.layers]
    rows, config = choose_rows(module, weights, keep=keep, normalise=normalise)
    kept = [
        {"place": f"layer {layer} sub-keys", "kept": found.tolist(), "of": module.config.steps[-1], "experts": b}
        for layer, found in zip(module.config.layers, rows, strict=True)
    ]
    return module.with_rows(base, rows, config), kept


def choose_rows(
    module: Peer, weights: Sequence[Tensor], *, keep: float, normalise: str
) -> tuple[list[Tensor], PeerConfig]:
    """The rows of side a that stay in every pool, ascending, and the config with what is left of every step.

    All pools have steps of the same sizes, so that a step loses as many rows in each: what is compared is the most used
    row of a step in every pool, the second in every pool, and so on, each by the sum over the pools. Of the first step
    as many rows stay as a token's `top_k` needs, so that later steps can still be taken back. A step may lose all.

    Args:
        weights: (a,) of every pool.
    """
    config, b = module.config, module.config.sub_keys[1]
    ends = (0, *config.steps)
    steps = [range(start, stop) for start, stop in zip(ends, config.steps, strict=False)]
    shares = [w / (w.max() if normalise == "max" else w.sum()).clamp_min(torch.finfo(w.dtype).tiny) for w in weights]
    orders = [[w[step.start : step.stop].argsort(descending=True, stable=True) for step in steps] for w in weights]
    by_pool = [
        torch.cat([share[step.start : step.stop][found] for step, found in zip(steps, order, strict=True)])
        for share, order in zip(shares, orders, strict=True)
    ]
    ranked = torch.stack(by_pool).sum(0)
    needed = -(-config.top_k // b)
    ranked[:needed] = ranked.max() + 1
    size = sum(_row_size(pool, b) for pool in module.pools)
    (slots,) = choose(
        [Candidates(ranked, 0, size, needed)], total=module.num_parameters(), keep=keep, normalise=normalise
    )
    left = [sum(slot in step for slot in slots) for step in steps]
    rows = [
        torch.cat([
            step.start + found[:count].sort().values for step, found, count in zip(steps, order, left, strict=True)
        ])
        for order in orders
    ]  # fmt: skip
    sizes = tuple(torch.tensor(left).cumsum(0).tolist())
    return rows, config.model_copy(update={"steps": sizes})


def _row_size(pool: nn.Module, b: int) -> int:
    """Parameters of a row of side a and its experts."""
    assert isinstance(pool, PEER)
    return pool.keys.keys_a.shape[1] + b * (pool.up.shape[1] + pool.down.shape[1])
