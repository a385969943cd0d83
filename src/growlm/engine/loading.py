"""Loading: finds a store's modules for the cache and reads them, each file's hash compared once. Knows files and bytes;
not when a module is wanted."""

from __future__ import annotations

from pathlib import Path

from growlm.base import Base
from growlm.engine.host_tier import HostTier
from growlm.engine.resident import Found
from growlm.errors import IntegrityError, UnknownModuleError
from growlm.layers.thin import allow_thin_products
from growlm.modules import KnowledgeModule
from growlm.store import MANIFEST, WEIGHTS, Store, StoredModule


class Loader:
    """Reads modules of one store for one base.

    Args:
        row_cache: bytes of memory for rows of each module whose tables stay on the disk; None where they do not.
        tier: keeps in main memory what goes to a GPU.
    """

    def __init__(self, store: Store, base: Base, row_cache: int | None, tier: HostTier | None = None) -> None:
        self._store, self._base, self._row_cache, self._tier = store, base, row_cache, tier
        self._verified: set[tuple[str, int, int, int]] = set()

    def find(self, name: str) -> Found:
        """The current version of a module."""
        stored = self._store.module(name)
        mark = _mark(stored.folder / MANIFEST)
        return Found(stored, stored.bytes_with(self._row_cache), lambda: self._unless_other(stored, mark), mark)

    def _unless_other(self, stored: StoredModule, mark: tuple[str, int, int, int]) -> KnowledgeModule:
        """
        Raises:
            UnknownModuleError: it was removed since it was found, or is another by now, learned under the same name.
            IntegrityError: a file is damaged or missing, and nobody has removed it.
        """
        try:
            return self._load(stored)
        except (IntegrityError, UnknownModuleError):
            if _mark(stored.folder / MANIFEST) == mark:
                raise
            raise stored.removed() from None

    def _load(self, stored: StoredModule) -> KnowledgeModule:
        """Reads one version of a module; its hash is compared once for a file that does not change."""
        marks = {_mark(stored.folder / file) for file in (WEIGHTS, *stored.text_files)}
        module = self._store.load(
            stored.name,
            self._base,
            version=stored.version,
            verify=not marks <= self._verified,
            row_cache=self._row_cache,
            bring=None if self._tier is None else self._tier.bring,
        )
        counted = stored.bytes_with(self._row_cache)
        if module.num_bytes() != counted:
            raise IntegrityError(
                f"{stored.folder / MANIFEST}: says {counted:,} bytes, the weights take {module.num_bytes():,}; "
                f"learn {stored.name!r} again"
            )
        self._verified |= marks
        allow_thin_products(module)
        return module


def _mark(path: Path) -> tuple[str, int, int, int]:
    """Tells a file that was checked from one that has changed since."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return str(path), 0, 0, 0
    return str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns
