"""Preference: which engine a module's requests go to, and which one where that is busy, by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def preferred(module: str, engines: Sequence[str]) -> list[str]:
    """Engines by their ids, the one that a module prefers first.

    Every engine has a place of its own in each module's order (rendezvous hashing, Thaler and Ravishankar 1998): one
    that comes or goes moves the modules that it gets or had, and no others.
    """
    return sorted(engines, key=lambda engine: hashlib.sha256(f"{module}\n{engine}".encode()).digest())
