"""Stored module: one version of a module on disk, and the names that modules can have.

Reads a manifest when it is first asked for; knows nothing of the store around it. Another process may remove the module
at any moment: that it is gone is never taken for damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from growlm.disk.files import size_of
from growlm.disk.tensors import outline
from growlm.errors import ConfigError, IntegrityError, StoreError, UnknownModuleError, first_error
from growlm.modules.shapes import RECALLING
from growlm.recall import is_text
from growlm.store.manifests import ModuleManifest, as_written, read_manifest

if TYPE_CHECKING:
    from growlm.modules import KnowledgeModule

WEIGHTS = "module.safetensors"
MANIFEST = "module.json"
SAMPLES = "samples.safetensors"  # text for a router that is trained on it, beside the weights
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = ("auto", "base", "general", "none")


@dataclass(frozen=True)
class StoredModule:
    """One version of a module on disk. Its manifest is read when first asked for. Whatever reads its files raises
    UnknownModuleError if it is removed meanwhile."""

    name: str
    version: int
    folder: Path

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads its files: one that is removed meanwhile is gone, not damaged. (A folder goes with all its
        files; one that has lost some is damaged. One that another takes the place of within that moment looks so too.)

        Raises:
            UnknownModuleError: it is not there any more.
        """
        try:
            yield
        except (IntegrityError, FileNotFoundError):
            if self.folder.exists():
                raise
            raise self.removed() from None

    def removed(self) -> UnknownModuleError:
        """What to say when it is."""
        told = f"{self.folder.parents[2]}: module {self.name!r} was removed while it was read; ask again"
        return UnknownModuleError(told)

    @cached_property
    def manifest(self) -> ModuleManifest:
        """
        Raises:
            IntegrityError: the manifest is missing, malformed, has unknown keys, or belongs elsewhere.
            StoreError: a newer format.
        """
        with self.reading():
            manifest = read_manifest(self.folder / MANIFEST, ModuleManifest)
        if (manifest.name, manifest.version) != (self.name, self.version):
            raise IntegrityError(
                f"{self.folder / MANIFEST}: says {manifest.name}/{manifest.version}; folders were moved by hand"
            )
        return manifest

    @property
    def kind(self) -> str:
        """As `learn` takes it, e.g. lora or lora+recall."""
        kind, recalls = self.manifest.kind, self.manifest.config.get("recall") is True
        return f"{kind}{RECALLING}" if recalls and kind != "recall" else kind

    @property
    def text_files(self) -> dict[str, str]:
        """The files that hold the domain's text to be recalled, and their sha256."""
        if self.manifest.config.get("recall") is not True:
            return {}
        return {file: digest for file, digest in self.manifest.files.items() if is_text(file)}

    @property
    def holds_text(self) -> bool:
        """Whether its domain's text can be read from it: what it recalls, or samples that a router is trained on."""
        return bool(self.text_files) or SAMPLES in self.manifest.files

    @property
    def text_bytes(self) -> int:
        """Bytes on the disk of the text that it recalls, sorted."""
        return sum(size_of(self.folder / file) or 0 for file in self.text_files)

    @property
    def bytes(self) -> int:
        """Bytes of its weights once loaded.

        Raises:
            IntegrityError: more than the file has.
        """
        size = size_of(self.folder / WEIGHTS)
        if size is not None and self.manifest.bytes > size:
            raise IntegrityError(
                f"{self.folder / MANIFEST}: bytes is {self.manifest.bytes}, {WEIGHTS} has {size} in all; restore it or "
                f"learn {self.name!r} again"
            )
        return self.manifest.bytes

    def fork_on(self, num_layers: int) -> int:
        """First layer whose output it changes, on a base of `num_layers`.

        Raises:
            IntegrityError: such a base has no such layer.
        """
        fork = self.manifest.fork
        if fork > num_layers:
            raise IntegrityError(
                f"{self.folder / MANIFEST}: fork is {fork}, on this base it is from 0 to {num_layers}; restore it or "
                f"learn {self.name!r} again"
            )
        return fork

    def bytes_with(self, row_cache: int | None) -> int:
        """Bytes that it takes in memory when it is loaded with such a `row_cache`.

        Raises:
            ConfigError: `row_cache` is too small for what one token reads.
        """
        if row_cache is None:
            return self.bytes
        kind, config = self.shape()
        with self.reading():
            return kind.bytes_from_disk(config, outline(self.folder / WEIGHTS), row_cache)

    def shape(self) -> tuple[type[KnowledgeModule], Any]:
        """Its kind, and the kind's config as it was saved.

        Raises:
            IntegrityError: there is no such kind, or the config is not one of it.
        """
        from growlm.modules import kind_of

        try:
            kind = kind_of(self.manifest.kind)
            return kind, as_written(kind.Config, self.manifest.config)
        except (ValidationError, ConfigError) as error:
            what = first_error(error) if isinstance(error, ValidationError) else str(error)
            raise IntegrityError(f"{self.folder / MANIFEST}: {what}; restore it or learn {self.name!r} again") from None

    def about(self) -> str:
        """What its shape says in a few words; empty where it cannot be understood."""
        try:
            return self.shape()[1].about()
        except IntegrityError:
            return ""

    @property
    def parameters(self) -> int:
        return self.manifest.parameters


def check_name(name: str) -> None:
    """
    Raises:
        StoreError: not a name that a module can have.
    """
    if name in _RESERVED:
        raise StoreError(f"module name {name!r} is not allowed: it means something else to the engine; choose another")
    if not is_name(name):
        raise StoreError(
            f"module name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or "
            "digit, without '..'"
        )


def is_name(name: str) -> bool:
    """Whether a module can have this name."""
    return _NAME.fullmatch(name) is not None and ".." not in name and name not in _RESERVED
