"""Versions: numbered folders that appear complete or not at all; the largest complete one is current.

Knows folders, tensors, and the manifest of what the router keeps, router.json, which it writes and reads. Does not know
what the tensors mean, and nothing of modules but that their versions are folders too.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.disk.files import new_folder, remove_folder, size_of
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import IntegrityError
from growlm.store.manifests import RouterManifest, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ROUTER_MANIFEST = "router.json"
_TENSORS = "router.safetensors"


def listed_versions(folder: Path) -> list[int]:
    """Versions that have a folder, complete or not, ascending."""
    try:
        with os.scandir(folder) as entries:
            return sorted(int(e.name) for e in entries if re.fullmatch("[1-9][0-9]*", e.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def complete_versions(folder: Path, manifest: str) -> list[int]:
    """Versions whose manifest, which is written last, is there."""
    return [v for v in listed_versions(folder) if os.path.exists(os.path.join(folder, str(v), manifest))]


class TensorVersions:
    """Tensors that the router keeps under one name, version by version, a `router.json` with each.

    Args:
        folder: holds a folder a version.
        scratch: where new ones are written before they appear.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self._scratch = scratch

    def versions(self) -> list[int]:
        return complete_versions(self.folder, ROUTER_MANIFEST)

    def read(self, version: int | None = None) -> dict[str, Tensor] | None:
        """Tensors of the current version or of one, their hash checked; None if there are none.

        Raises:
            IntegrityError: the file is not what its manifest says.
        """
        while (folder := self._current(version)) is not None:
            try:
                manifest = read_manifest(folder / ROUTER_MANIFEST, RouterManifest)
                if set(manifest.files) != {_TENSORS}:
                    where = f"{folder / ROUTER_MANIFEST}: does not name {_TENSORS}"
                    raise IntegrityError(f"{where}; delete {folder.parent}")
                return read_tensors(folder / _TENSORS, sha256=manifest.files[_TENSORS])
            except IntegrityError:
                if self._current(version) == folder:
                    raise
        return None

    def manifest(self, version: int | None = None) -> RouterManifest | None:
        """What is said of the current version or of one; None if there is none.

        Raises:
            IntegrityError: the manifest is damaged.
        """
        while (folder := self._current(version)) is not None:
            try:
                return read_manifest(folder / ROUTER_MANIFEST, RouterManifest)
            except IntegrityError:
                if self._current(version) == folder:
                    raise
        return None

    def num_bytes(self, version: int) -> int:
        """Of the tensors' file of a version, 0 where it is gone."""
        return size_of(self.folder / str(version) / _TENSORS) or 0

    def digest(self) -> str | None:
        """The hash of the current tensors; None if there are none.

        Raises:
            IntegrityError: the manifest is damaged.
        """
        while (folder := self._current()) is not None:
            try:
                return read_manifest(folder / ROUTER_MANIFEST, RouterManifest).files[_TENSORS]
            except (IntegrityError, KeyError):
                if self._current() == folder:
                    damaged = f"{folder / ROUTER_MANIFEST}: is damaged; delete {folder.parent}"
                    raise IntegrityError(damaged) from None
        return None

    def write(self, tensors: Mapping[str, Tensor], *, keep: bool = False, **facts: Any) -> int:
        """Adds the next version, which is current from then on, and returns its number. The caller holds the lock.

        Args:
            keep: leave all older versions; else only the one before, for those who are reading it.
            facts: more fields of its manifest.
        """
        before = self.versions()
        version = before[-1] + 1 if before else 1
        final = self.folder / str(version)
        if final.exists():  # a folder without its manifest: not a version, whatever it is
            remove_folder(final, self._scratch)
        with new_folder(final, self._scratch, ROUTER_MANIFEST) as folder:
            hashes = {_TENSORS: write_tensors(folder / _TENSORS, tensors)}
            manifest = RouterManifest(created=now(), files=hashes, **facts)
            (folder / ROUTER_MANIFEST).write_text(manifest.model_dump_json(indent=2))
        for older in [] if keep else before[:-1]:
            remove_folder(self.folder / str(older), self._scratch)
        return version

    def remove(self, version: int) -> None:
        remove_folder(self.folder / str(version), self._scratch)

    def drop(self) -> None:
        """Forgets all versions, where there are any."""
        if self.folder.is_dir():
            remove_folder(self.folder, self._scratch)

    def _current(self, version: int | None = None) -> Path | None:
        while True:
            listed = listed_versions(self.folder)
            versions = self.versions()
            if version is not None:
                return self.folder / str(version) if version in versions else None
            # Versions that were replaced between the listing and the look into them are not none at all.
            if versions or listed == listed_versions(self.folder):
                return self.folder / str(versions[-1]) if versions else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
