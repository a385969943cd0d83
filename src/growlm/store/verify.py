"""Verify: every file of a store is read and compared with what the manifests say. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.base import checkpoint, tensor_bytes
from growlm.disk.files import bytes_in, entries_in, folders_in, sha256_file, size_of
from growlm.disk.tensors import outline
from growlm.errors import GrowlmError
from growlm.progress import phase
from growlm.store.manifests import RouterManifest, read_manifest
from growlm.store.router_files import GENERAL
from growlm.store.stored_module import MANIFEST, WEIGHTS, StoredModule
from growlm.store.versions import ROUTER_MANIFEST

if TYPE_CHECKING:
    from growlm.store.store import Store


def verify(store: Store) -> list[str]:
    """Names each file that is missing, changed or not named in a manifest, a line each; empty when all is well."""
    with phase("verifying", _bytes_on_disk(store), "bytes"):
        return _problems(store)


def _bytes_on_disk(store: Store) -> int:
    """Bytes of the files of base, router and modules, as far as there are any."""
    base = []
    with suppress(GrowlmError):
        base = checkpoint.weight_files(store.base_folder)
    return sum(size_of(file) or 0 for file in base) + bytes_in(store.router_path) + bytes_in(store.path / "modules")


def _problems(store: Store) -> list[str]:
    problems: list[str] = []
    config: Any = None
    try:
        problems += _check_gguf(store)
        folder = store.base_folder
        if checkpoint.fingerprint(folder, sha256_file) != store.manifest.base_fingerprint:
            problems.append(f"{folder}: not the base that this store was made for")
        if checkpoint.tokenizer_fingerprint(folder) != store.manifest.tokenizer_fingerprint:
            problems.append(f"{folder}: not the tokenizer that this store was made for")
        checkpoint.check(folder)
        config = checkpoint.read_config(folder)
    except GrowlmError as error:
        problems.append(str(error))
    for folder in [version for named in folders_in(store.router_path) for version in entries_in(named)]:
        problems += _unless_gone(folder, _check_router)
    if store.modules and not store.router_files(GENERAL).versions():
        problems.append(f"{store.router_path / GENERAL}: is missing; restore it, or make the store again")
    complete = {store.path / "modules" / name / str(version) for name, found in store.versions() for version in found}
    for folder in [version for named in folders_in(store.path / "modules") for version in folders_in(named)]:
        if folder in complete:
            problems += _unless_gone(folder, partial(_check_module, store, config))
        else:
            problems += _unless_gone(folder, _check_incomplete)
    return problems


def _unless_gone(folder: Path, check: Callable[[Path], list[str]]) -> list[str]:
    """What is wrong with a version; nothing if it was removed meanwhile, with all its files."""
    try:
        problems = check(folder)
    except GrowlmError as error:
        problems = [str(error)]
    except FileNotFoundError:
        problems = []
        if os.path.lexists(folder):
            raise
    return problems if os.path.lexists(folder) else []


def _check_router(folder: Path) -> list[str]:
    return _check_files(folder, read_manifest(folder / ROUTER_MANIFEST, RouterManifest).files)


def _check_incomplete(folder: Path) -> list[str]:
    # A folder appears with all its files and goes with all of them: one without a manifest has lost it.
    return [] if (folder / MANIFEST).exists() else [f"{folder / MANIFEST}: file is missing"]


def _check_module(store: Store, config: Any, folder: Path) -> list[str]:
    """
    Args:
        config: of the base; None where it cannot be read.

    Raises:
        GrowlmError: its manifest cannot be read.
    """
    stored = StoredModule(folder.parent.name, int(folder.name), folder)
    manifest = stored.manifest
    problems = _check_files(folder, manifest.files) or _check_contents(stored, config)
    for field in ("base_fingerprint", "tokenizer_fingerprint", "dtype", "routing_layer"):
        if getattr(manifest, field) != getattr(store.manifest, field):
            problems.append(f"{folder / MANIFEST}: {field} is not the store's")
    known = {MANIFEST, *manifest.files}
    return problems + [
        f"{file}: not named in the manifest" for file in sorted(folder.iterdir()) if file.name not in known
    ]


def _check_gguf(store: Store) -> list[str]:
    """Of a base that is a GGUF file, which may be gone once a checkpoint was made of it."""
    file, digest = store.path / store.manifest.base, store.manifest.base_gguf
    if digest is None or not file.is_file() or sha256_file(file) == digest:
        return []
    return [f"{file}: not the file that this store was made for"]


def _check_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():  # a folder, a pipe
            problems.append(f"{path}: file is missing")
            continue
        try:
            found = sha256_file(path)
        except FileNotFoundError:
            problems.append(f"{path}: file is missing")
            continue
        if found != digest:
            problems.append(f"{path}: sha256 {found[:12]}..., manifest says {digest[:12]}...")
    return problems


def _check_contents(stored: StoredModule, config: Any) -> list[str]:
    """What a manifest says of weights that are as they were saved, and the numbers of a text that is.

    Args:
        config: of the base; None where it cannot be read.
    """
    from growlm.recall.text import RecalledText

    path = stored.folder / MANIFEST
    try:
        stored.shape()
        if config is not None:
            stored.fork_on(config.num_hidden_layers)
            RecalledText.open(stored.folder, stored.text_files, config.vocab_size, verify=True)
        weights = outline(stored.folder / WEIGHTS).values()
    except GrowlmError as error:
        return [str(error)]
    if (found := tensor_bytes(weights)) != stored.manifest.bytes:
        return [f"{path}: bytes is {stored.manifest.bytes}, the weights take {found}"]
    if (found := sum(t.numel() for t in weights)) < stored.manifest.parameters:
        return [f"{path}: parameters is {stored.manifest.parameters}, the weights have {found} numbers"]
    return []
