"""Store: the base's identity, the modules on disk, and what is kept for the router. See `store.py`."""

from growlm.store.router_files import (
    GENERAL,
    ROUTER_DERIVED,
    ROUTER_FITTED,
    ROUTER_INDEX,
    ROUTER_LEXICON,
    ROUTER_SUMS,
    ROUTER_TRAINED,
    ROUTERS,
)
from growlm.store.status import REFUSED
from growlm.store.store import MIN_SAMPLE_BYTES, Store
from growlm.store.stored_module import MANIFEST, WEIGHTS, StoredModule, check_name

__all__ = [
    "GENERAL", "MANIFEST", "MIN_SAMPLE_BYTES", "REFUSED", "ROUTERS", "ROUTER_DERIVED", "ROUTER_FITTED", "ROUTER_INDEX",
    "ROUTER_LEXICON", "ROUTER_SUMS", "ROUTER_TRAINED", "WEIGHTS", "Store", "StoredModule", "check_name",
]  # fmt: skip
