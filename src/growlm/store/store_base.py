"""The base of a store: where it is, that it is still the one that the store was made for, and how it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.base import checkpoint, gguf
from growlm.disk.files import HashMemo, checkpoint_folder, locked, remove_folder
from growlm.errors import BaseModelError, IntegrityError
from growlm.store.manifests import StoreManifest

if TYPE_CHECKING:
    import torch

    from growlm.base import Base

HASHES = Path("cache", "hashes.json")  # of a store: remembered hashes of its base's files


def written_base(store: Path) -> Path:
    """Where a store keeps the checkpoint that was made of a GGUF file; may be deleted while the file is there."""
    return store / "cache" / "base"


def write_base(file: Path, store: Path) -> Path:
    """Makes a checkpoint of a GGUF file in a store's folder, unless another process has just done so.

    Raises:
        BaseModelError: the file cannot be read.
        StoreError: the disk is full.
    """
    folder = written_base(store)
    with locked(folder.with_suffix(".lock"), keep=False):
        if not folder.exists():
            with checkpoint_folder(folder) as work:
                gguf.write_checkpoint(file, work)
    return folder


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
        if self.manifest.base_gguf is not None:
            folder = written_base(self.path)
            if not all((folder / name).is_file() for name in gguf.FILES):
                self._write_again()
            return folder
        local = self.path / recorded
        there = os.path.isdir(local)  # False for what can be no path too
        if there or recorded.startswith((".", "/")):
            if not there:
                raise BaseModelError(
                    f'{local.resolve()}: the base of {self.path} is not there; put it back, or change "base" in '
                    f"{self.path / 'store.json'}"
                )
            return checkpoint.resolve(local)
        return checkpoint.resolve(recorded, revision=self.manifest.base_revision)

    def check_base(self, *, remember: bool = True) -> Path:
        """The base's folder, once its config, weights and tokenizer are known to be those of this store.

        Args:
            remember: write down which files were hashed, so that the next check is quick.

        Raises:
            BaseModelError: it is missing or has changed.
        """
        memo = HashMemo(self.path / HASHES, write=remember)
        if self.manifest.base_gguf is not None:
            self._check_file(memo)
        folder = self.base_folder
        where, found = folder.resolve(), checkpoint.fingerprint(folder, memo.sha256)
        if found != self.manifest.base_fingerprint:
            raise BaseModelError(
                f"{where}: not the base that {self.path} was made for (fingerprint {found[:12]}..., the store "
                f"says {self.manifest.base_fingerprint[:12]}...); restore it, or make a new store"
            )
        if checkpoint.tokenizer_fingerprint(folder) != self.manifest.tokenizer_fingerprint:
            raise BaseModelError(
                f"{where}: its tokenizer has changed since {self.path} was made; restore it, or make a new store"
            )
        return folder

    def _check_file(self, memo: HashMemo) -> None:
        """Compares the GGUF file, where it still is, and repairs what was written of it.

        Raises:
            BaseModelError: the file has changed.
        """
        file = self.path / self.manifest.base
        if not file.is_file():
            return  # what was written of it is all that is needed
        if (found := memo.sha256(file)) != self.manifest.base_gguf:
            raise BaseModelError(
                f"{file.resolve()}: not the file that {self.path} was made for (sha256 {found[:12]}..., the store says "
                f"{str(self.manifest.base_gguf)[:12]}...); restore it, or make a new store"
            )
        folder = self.base_folder
        try:
            found = checkpoint.fingerprint(folder, memo.sha256)
            whole = (found, checkpoint.tokenizer_fingerprint(folder)) == (
                self.manifest.base_fingerprint, self.manifest.tokenizer_fingerprint,
            )  # fmt: skip
        except BaseModelError:
            whole = False
        if not whole:
            self._write_again()

    def _write_again(self) -> None:
        file, folder = self.path / self.manifest.base, written_base(self.path)
        if not file.is_file():
            raise BaseModelError(
                f'{file.resolve()}: the base of {self.path} is not there; put it back, or change "base" in '
                f"{self.path / 'store.json'}"
            )
        if folder.exists():
            remove_folder(folder, self.path / "scratch")
        write_base(file, self.path)

    def base_bytes(self) -> int:
        """Bytes that the base takes once loaded, from its files' headers."""
        return checkpoint.loaded_bytes(self.base_folder, self.manifest.dtype)

    def load_base(self, *, device: str | torch.device = "cpu", remember: bool = True) -> Base:
        """The frozen base, checked.

        Args:
            device: where its weights go, as `Engine` takes it.
            remember: as in `check_base`.

        Raises:
            BaseModelError: it is missing, has changed, or cannot be loaded.
            IntegrityError: the store's manifest is of a base with more layers.
            ConfigError: no such device.
        """
        from growlm.base import Base
        from growlm.base.placement import find_device

        found = find_device(device)
        folder = self.check_base(remember=remember)
        model = checkpoint.load_model(folder, self.manifest.dtype)
        base = Base(model.to(found), str(folder))
        if (layer := self.manifest.routing_layer) is not None and layer > base.num_layers:
            where = self.path / "store.json"
            raise IntegrityError(
                f"{where}: routing_layer is {layer}, the base has {base.num_layers} layers; restore it"
            )
        base.fingerprint = self.manifest.base_fingerprint
        return base

    def load_tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.base_folder)
