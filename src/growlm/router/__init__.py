"""Router: hidden states of the base -> ranked modules, or none of them.

Knows what the base's last layer says about a text and what was kept of each domain; never loads a module's weights.
"""

from growlm.router.gaussian import (
    EVIDENCE,
    VECTORS,
    GaussianRouter,
    add_domain,
    evidence,
    files_of,
    has_general,
    load_router,
    write_general,
)
from growlm.router.interface import NONE, Route, Router, names_of
from growlm.router.states import base_states, pad_left, pool

__all__ = [
    "EVIDENCE",
    "NONE",
    "VECTORS",
    "GaussianRouter",
    "Route",
    "Router",
    "add_domain",
    "base_states",
    "evidence",
    "files_of",
    "has_general",
    "load_router",
    "names_of",
    "pad_left",
    "pool",
    "write_general",
]
