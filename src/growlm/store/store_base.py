"""The base of a store: where it is, that it is still the one that the store was made for, and how it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.base import checkpoint
from growlm.disk.files import HashMemo
from growlm.errors import BaseModelError
from growlm.store.manifests import StoreManifest

if TYPE_CHECKING:
    import torch

    from growlm.base import Base


class StoreBase:
    """What a store knows of its base.

    Attributes:
        path: the store's folder.
        manifest: what store.json says.
    """

    path: Path
    manifest: StoreManifest

    @property
    def base_folder(self) -> Path:
        """Where the base's files are.

        Raises:
            BaseModelError: it is not there any more.
        """
        recorded = self.manifest.base
        local = self.path / recorded
        there = os.path.isdir(local)  # False for what can be no path too
        if there or recorded.startswith((".", "/")):
            if not there:
                raise BaseModelError(
                    f'{local}: the base of {self.path} is not there; put it back, or change "base" in '
                    f"{self.path / 'store.json'}"
                )
            return checkpoint.resolve(local)
        return checkpoint.resolve(recorded, revision=self.manifest.base_revision)

    def check_base(self) -> Path:
        """The base's folder, once its config, weights and tokenizer are known to be those of this store.

        Raises:
            BaseModelError: it is missing or has changed.
        """
        folder = self.base_folder
        memo = HashMemo(self.path / "cache" / "hashes.json")
        found = checkpoint.fingerprint(folder, memo.sha256)
        if found != self.manifest.base_fingerprint:
            raise BaseModelError(
                f"{folder}: not the base that {self.path} was made for (fingerprint {found[:12]}..., the store "
                f"says {self.manifest.base_fingerprint[:12]}...); restore it, or make a new store"
            )
        if checkpoint.tokenizer_fingerprint(folder) != self.manifest.tokenizer_fingerprint:
            raise BaseModelError(
                f"{folder}: its tokenizer has changed since {self.path} was made; restore it, or make a new store"
            )
        return folder

    def base_bytes(self) -> int:
        """Bytes that the base takes once loaded, from its files' headers."""
        return checkpoint.loaded_bytes(self.base_folder, self.manifest.dtype)

    def load_base(self, *, device: str | torch.device = "cpu") -> Base:
        """The frozen base, checked.

        Args:
            device: where its weights go, as `Engine` takes it.

        Raises:
            BaseModelError: it is missing, has changed, or cannot be loaded.
            ConfigError: no such device.
        """
        from growlm.base import Base
        from growlm.base.placement import find_device

        found = find_device(device)
        folder = self.check_base()
        model = checkpoint.load_model(folder, self.manifest.dtype)
        base = Base(model.to(found), str(folder))
        base.fingerprint = self.manifest.base_fingerprint
        return base

    def load_tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.base_folder)
