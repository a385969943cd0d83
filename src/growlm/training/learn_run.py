"""Learn run: what has to be right before a module is learned, the same for the run itself and for its estimate.

Reads the text and asks the store; changes nothing. Knows runs of `learn` by their ids; not how a module is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.base import Base, checkpoint
from growlm.base.placement import Placement
from growlm.errors import StoreError
from growlm.store import ROUTER_TRAINED, Store, StoredModule
from growlm.training.config import AUTO, LearnConfig
from growlm.training.corpus import Tokens, TrainingCorpus, bytes_to_keep, require_positions
from growlm.training.parallel import ALONE, Ranks
from growlm.training.router import require_samples
from growlm.training.runs import folder_of, module_run

if TYPE_CHECKING:
    import torch

_LOOKED_AT = 1000  # modules of a store


@dataclass(frozen=True)
class LearnRun:
    """A run that can begin, or goes on.

    Attributes:
        old: the version that is there before it.
        keep: bytes of the text that will stay in the store.
        id: tells it from every other run.
        saved: the module, where an earlier process of this run has saved it: only the router is left to be trained.
        shared_by: ranks that have a part of the base each, instead of all of it.
    """

    store: Store
    name: str
    config: LearnConfig
    placement: Placement
    old: StoredModule | None
    keep: int
    body: TrainingCorpus
    id: str
    saved: StoredModule | None
    shared_by: Ranks | None = None

    @classmethod
    def prepare(
        cls,
        store: Store,
        name: str,
        data: Sequence[str | Path],
        config: LearnConfig,
        *,
        update: bool,
        ranks: Ranks = ALONE,
        shard_base: bool = False,
    ) -> LearnRun:
        """
        Args:
            ranks: that train it together.
            shard_base: each has a part of the base.

        Raises:
            StoreError: `name` is not allowed or is taken.
            DataError: data that is missing or malformed.
            ConfigError: there is no such device.
        """
        placement = Placement.of(config.device, config.precision)
        old = store.find(name)
        if config.kind == AUTO:
            config = config.on(checkpoint.num_parameters(store.base_folder), _kind_of(old))
        unfinished = _unfinished(store, old)
        if unfinished is None and not update:
            require_free(store, old)
        keep = kept_bytes(store, name, config)
        body = TrainingCorpus.read(data, config)

        def run_after(version: int) -> str:
            return module_run(store, [name, version, body.digest], config, placement, ranks)

        run, saved = run_after(old.version if old else 0), None
        if old is not None and unfinished is not None:
            # Whichever version was current when it began.
            if unfinished in map(run_after, range(old.version)):
                run, saved = unfinished, old
            elif not update:
                require_free(store, old)
        shared_by = ranks if shard_base else None
        return cls(store, name, config, placement, old, keep, body, run, saved, shared_by)

    def require_agreed(self, ranks: Ranks) -> None:
        """
        Raises:
            ConfigError: ranks have other text, settings or versions, or do not see the same files.
        """
        if ranks.size == 1:
            return
        settings = json.dumps(self.config.to_json(), sort_keys=True)
        ranks.require_same(
            {
                "store": str(self.store.path.resolve()),
                "text": self.body.digest[:12],
                "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
                "run": self.id[:12],
                "parts of the base": self.shared_by is not None,
            }
        )
        self.store.work.mkdir(parents=True, exist_ok=True)
        ranks.require_shared(self.store.work)

    @property
    def folder(self) -> Path:
        """Where its checkpoints lie."""
        return folder_of(self.store, self.name, self.id)

    def of_same_files(self) -> str | None:
        """Another module that was learned from the same files, to the byte; of a large store only the first modules are
        looked at."""
        own = {source.sha256 for source in self.body.text.sources}
        for module in islice(self.store.modules.values(), _LOOKED_AT):
            with suppress(StoreError):  # a damaged one says so when it is used
                sources = module.manifest.training.get("sources") or []
                if module.name != self.name and {s.get("sha256") for s in sources} == own:
                    return module.name
        return None

    def tokenized(self) -> tuple[Tokens, Any]:
        """The text in ids of the base's tokenizer, and the tokenizer.

        Raises:
            DataError, ConfigError: as `TrainingCorpus.tokenized`.
        """
        tokenizer = self.store.load_tokenizer()
        return self.body.tokenized(tokenizer, self.config), tokenizer

    def load_base(self, *, remember: bool = True, dtype: torch.dtype | None = None) -> Base:
        """As `Store.load_base`, on the run's device; in parts on the ranks' devices where these share it.

        Args:
            dtype: of the weights, where they share it; by default the store's. A base of one's own is rounded later.
        """
        if self.shared_by is None:
            return self.store.load_base(device=self.placement.device, remember=remember)
        from growlm.training.sharding import parallelize

        base = self.store.load_base(remember=remember)
        parallelize(base, replace(self.placement, dtype=dtype or base.dtype), self.shared_by)
        return base

    @property
    def rounds_base(self) -> bool:
        """Whether training changes the base's dtype, so that it has to be loaded again for what is served."""
        return str(self.placement.dtype) != f"torch.{self.store.manifest.dtype}"

    @property
    def whole_base(self) -> Callable[[], Base] | None:
        """Gives the base in main memory, where ranks share the other."""
        return None if self.shared_by is None else self.store.load_base

    def require_fit(self, base: Base, tokens: Tokens, tokenizer: Any) -> None:
        """
        Raises:
            ConfigError: rows are longer than the base was made for.
            DataError: a token that it has no row for.
        """
        require_positions(base, self.config)
        tokens.require_rows(base, self.body.where, tokenizer)


def _kind_of(old: StoredModule | None) -> str | None:
    """Of the version that is there; a choice that was made for it, as not to hold text, holds for the next one."""
    try:
        return None if old is None else old.kind
    except StoreError:  # damaged; to learn the name again is the cure
        return None


def kept_bytes(store: Store, name: str, config: LearnConfig) -> int:
    """How much of a text stays in the store with its module.

    Raises:
        StoreError: nothing, and the store's router is trained on it, or has too little of other modules.
    """
    keep = bytes_to_keep(store, name, config)
    if store.manifest.router == ROUTER_TRAINED:
        require_samples(store, [m for m in store.modules.values() if m.name != name])
    return keep


def require_free(store: Store, current: StoredModule | None) -> None:
    """
    Raises:
        StoreError: the name is taken.
    """
    if current is not None:
        raise StoreError(
            f"{store.path}: module {current.name!r} exists (version {current.version}); use --update to make its next "
            "version"
        )


def _unfinished(store: Store, current: StoredModule | None) -> str | None:
    """Of the run that made a module, the id, if that run has not ended: its folder goes last."""
    if current is None:
        return None
    try:
        run = current.manifest.training.get("run")
    except StoreError:  # damaged; to learn the name again is the cure
        return None
    return run if isinstance(run, str) and folder_of(store, current.name, run).is_dir() else None
