"""Peer: pools of tiny experts in chosen layers of a frozen base, beside the feed-forward or in its place (PEER).

A pool holds any number of experts of a few neurons each, of which a token reads heads x k: what a module knows and what
it costs to run are chosen apart. Pools grow by steps: a step appends sub-keys and the experts that they find, and
renumbers and changes nothing that was there.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from growlm.base import Base, LayerToRun, tensor_bytes
from growlm.errors import ConfigError
from growlm.layers.around import variant
from growlm.layers.peer import PEER
from growlm.layers.pools import WithPools
from growlm.layers.row_cache import CachedPool, cache_bytes
from growlm.layers.tables import require_room_for_rows
from growlm.modules.contract import KnowledgeModule, numbered
from growlm.modules.shapes import PeerConfig
from growlm.modules.vocabulary import VocabularyRows

# a rows of side a, b rows of side b; every row of side a has b experts

_IMITATION = 0.25  # share of the steps in which a pool in place of a feed-forward learns to compute what that does
_TABLES = (".up", ".down")


class Peer(KnowledgeModule):
    """Pools of tiny experts in layers of a frozen base. See `PeerConfig`."""

    kind = "peer"
    combines = True
    exports = False
    Config = PeerConfig
    config: PeerConfig

    def __init__(self, base: Base, config: PeerConfig, rows: VocabularyRows) -> None:
        config = config.completed(base)
        super().__init__(base, config, rows)
        assert config.layers is not None
        self.fork = 0 if rows.input is not None else config.layers[0]
        self._anatomy, self.device = base.anatomy, base.device
        a, b = config.sub_keys
        try:
            self.pools = nn.ModuleList(
                PEER(
                    base.hidden_size,
                    a * b,
                    config.num_heads,
                    config.top_k,
                    neurons_per_expert=config.neurons_per_expert,
                    key_size=config.key_size,
                    query_norm=config.query_norm,
                    sub_keys=(a, b),
                    num_open=config.rows_open,
                )
                for _ in config.layers
            )
        except (ValueError, MemoryError) as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def create(cls, base: Base, config: PeerConfig, row_ids: Tensor | None = None) -> Self:
        module = cls(base, config, VocabularyRows.create(base, config.vocabulary, row_ids))
        if not config.replace_feed_forward:
            with torch.no_grad():
                for pool in module.pools:
                    pool.down.zero_()  # type: ignore[operator]  # training begins where the base is
        return module.float().to(base.device).eval()

    def enable_new_experts(self) -> None:
        """All steps of growth can be found from now on."""
        self.config = self.config.model_copy(update={"open_steps": len(self.config.steps)})
        for pool in self.pools:
            pool.keys.num_open = self.config.steps[-1]  # type: ignore[union-attr]

    def begin_training(self) -> None:
        self.pools.train()

    # Growing and shrinking: other modules, with the same tensors but for rows of side a and their experts

    def grown(self, base: Base, num_experts: int, seed: int = 0) -> Peer:
        """With so many more experts in every pool, which nothing finds before `train_new`.

        New sub-keys are drawn as large as the old ones are on average: smaller ones would hardly be found. `up` is
        drawn as in a new pool; `down` is zero: a new expert adds nothing before it has learned to.

        Raises:
            ConfigError: no whole number of sub-keys, more than memory has room for, or tables on the disk.
        """
        config = self.config.grown(num_experts)
        self.require_whole()
        rows, tensors = config.steps[-1] - self.config.steps[-1], dict(self.state_dict())
        try:
            width = sum(t.shape[1] for name, t in tensors.items() if self.is_table(name))
            require_room_for_rows(
                config.steps[-1] * config.sub_keys[1], width, self.device, tensors["pools.0.up"].dtype
            )
        except MemoryError as error:
            raise ConfigError(str(error)) from None
        # Steps of one seed must differ: two equal sub-keys would always be found together.
        drawn = hashlib.sha256(f"{seed}, steps {config.steps}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
        for i, pool in enumerate(self.pools):
            assert isinstance(pool, PEER)
            keys = pool.keys.keys_a[: self.config.rows_open].detach()
            size = float(keys.float().square().mean().sqrt())
            new = {
                "keys.keys_a": torch.randn(rows, keys.shape[1], generator=generator).mul_(size),
                "up": torch.randn(num_experts, pool.up.shape[1], generator=generator).mul_(base.hidden_size**-0.5),
                "down": torch.zeros(num_experts, pool.down.shape[1]),
            }
            for part, values in new.items():
                old = tensors[f"pools.{i}.{part}"]
                tensors[f"pools.{i}.{part}"] = torch.cat([old, values.to(old)])
        return Peer.restore(base, config, tensors, "the grown module")

    def taken_back(self, base: Base) -> Peer:
        """Without what its last step of growth appended: to the bit as it was before.

        Raises:
            ConfigError: it has not grown, or its tables are on the disk.
        """
        steps = self.config.steps[:-1]
        if not steps:
            raise ConfigError("its pools are as they were made: there is no step of growth to take back")
        changes = {"steps": steps, "open_steps": min(self.config.open_steps, len(steps))}
        kept = torch.arange(steps[-1])
        return self.with_rows(base, [kept] * len(self.pools), self.config.model_copy(update=changes))

    def with_rows(self, base: Base, rows: Sequence[Tensor], config: PeerConfig) -> Peer:
        """With these rows of side a and their experts alone, renumbered in this order.

        Args:
            rows: of every pool, (rows,).
            config: its own with the steps that this makes.

        Raises:
            ConfigError: its tables are on the disk.
        """
        self.require_whole()
        b, tensors = config.sub_keys[1], dict(self.state_dict())
        for i, kept in enumerate(rows):
            kept = kept.to(self.device)
            experts = (kept[:, None] * b + torch.arange(b, device=self.device)).flatten()
            for part, at in (("keys.keys_a", kept), ("up", experts), ("down", experts)):
                tensors[f"pools.{i}.{part}"] = tensors[f"pools.{i}.{part}"][at]
        return Peer.restore(base, config, tensors, "the module with fewer rows")

    def train_new(self) -> None:
        """Opens what was appended and never trained, as one step, and lets a gradient reach that alone."""
        trained, before = self.config.open_steps, self.config.rows_open
        assert 0 < trained < len(self.config.steps), "nothing is new"
        self.config = self.config.model_copy(update={"steps": (*self.config.steps[:trained], self.config.steps[-1])})
        self.enable_new_experts()
        self.requires_grad_(False)
        b = self.config.sub_keys[1]
        for pool in self.pools:
            assert isinstance(pool, PEER)
            for p, first in ((pool.keys.keys_a, before), (pool.up, before * b), (pool.down, before * b)):
                p.requires_grad_(True)
                p.register_post_accumulate_grad_hook(_from_row(first))

    def require_whole(self) -> None:
        if not all(isinstance(pool, PEER) for pool in self.pools):
            raise ConfigError(
                "its tables are on the disk, where they are in use and cannot change their size; load it without "
                "row_cache"
            )

    @classmethod
    def is_table(cls, name: str) -> bool:
        return name.startswith("pools.") and name.endswith(_TABLES)

    def keep_rows(self, num_bytes: int) -> None:
        each = num_bytes // len(self.pools)
        try:
            for i, pool in enumerate(self.pools):
                assert isinstance(pool, PEER)
                self.pools[i] = CachedPool(pool, each, self.device)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def bytes_from_disk(cls, config: PeerConfig, outline: dict[str, Tensor], num_bytes: int) -> int:
        tables = [[t for n, t in outline.items() if n.startswith(f"pools.{i}.") and cls.is_table(n)]
                  for i in range(len(config.layers or ()))]  # fmt: skip
        others = tensor_bytes(t for n, t in outline.items() if not cls.is_table(n))
        try:
            each, at_once = num_bytes // max(len(tables), 1), config.num_heads * config.top_k
            return others + sum(cache_bytes(pair, each, at_once) for pair in tables)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def num_bytes(self) -> int:
        caches = [pool.cache.num_bytes() for pool in self.pools if isinstance(pool, CachedPool)]
        return super().num_bytes() + sum(caches)

    @property
    def imitation_share(self) -> float:
        # What joins a pool later has nothing to imitate: the pool does it already.
        return _IMITATION if self.config.replace_feed_forward and len(self.config.steps) == 1 else 0.0

    @classmethod
    def stage_of(cls, base: Base, config: PeerConfig, name: str) -> int | None:
        number = numbered("pools", name)
        return None if number is None else dict(enumerate(config.completed(base).layers or ())).get(number)

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        extended = list(layers)
        if self.config.open_steps:
            assert self.config.layers is not None
            for index, pool in zip(self.config.layers, self.pools, strict=True):
                extended[index] = layers[index]._replace(layer=self._with(layers[index].layer, pool))
        return extended

    def extended_config(self, config: Any) -> Any:
        return copy.deepcopy(config)

    def _with(self, layer: nn.Module, pool: nn.Module) -> nn.Module:
        """A layer that runs as `layer` does with a pool at its feed-forward: a shallow copy that shares its parameters,
        those of other modules' pools included."""
        original: nn.Module = layer.__dict__.get("_growlm_original", layer)
        beside, instead = layer.__dict__.get("_growlm_pools", ((), ()))
        if self.config.replace_feed_forward:
            instead = (*instead, pool)
        else:
            beside = (*beside, pool)
        name = self._anatomy.feed_forward
        made = variant(original, {name: WithPools(getattr(original, name), beside, instead)})
        made.__dict__["_growlm_original"], made.__dict__["_growlm_pools"] = original, (beside, instead)
        return made


def _from_row(first: int) -> Callable[[Tensor], None]:
    """A hook that takes the rows before `first` out of a parameter's gradient, so that an optimiser leaves them alone:
    of a table's they go, of a dense one's they are zero."""

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        if not p.grad.is_sparse:
            p.grad[:first] = 0
            return
        rows, values = p.grad._indices(), p.grad._values()
        new = rows[0] >= first
        p.grad = torch.sparse_coo_tensor(
            rows[:, new], values[new], p.shape, is_coalesced=p.grad.is_coalesced(), check_invariants=False
        )

    return hook
