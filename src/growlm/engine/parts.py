"""Parts: what the steps of one engine share."""

from __future__ import annotations

from dataclasses import dataclass, field

from growlm.base import Base
from growlm.base.rooms import Rooms
from growlm.engine.account import Account
from growlm.engine.kv import PrefixCache
from growlm.engine.module_cache import ModuleCache
from growlm.engine.routing import Routing
from growlm.layers.slabs import Slabs


@dataclass(frozen=True)
class Parts:
    """Of one engine.

    Attributes:
        modules: which are in memory.
        prefixes: what is kept of texts, for those that begin like them.
        account: what requests hold of the budget.
        slabs: copies of adapters, side by side.
        rooms: keys and values of what is being answered.
    """

    base: Base
    modules: ModuleCache
    routing: Routing
    prefixes: PrefixCache
    account: Account
    slabs: Slabs
    rooms: Rooms = field(default_factory=Rooms)
