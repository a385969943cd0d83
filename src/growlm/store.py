"""Store: the base's identity and the modules on disk. Versions, hashes, and the promise that a kill loses nothing.

A module is a folder that appears by one rename, its manifest written last. Nothing here trains, routes or runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from growlm.base import checkpoint
from growlm.disk.files import (
    HashMemo,
    clear_scratch,
    locked,
    make_folders,
    new_folder,
    remove_folder,
    sha256_file,
    write_atomic,
)
from growlm.disk.tensors import map_tensors, outline, read_tensors, write_tensors
from growlm.errors import BaseModelError, ConfigError, GrowlmError, IntegrityError, StoreError, UnknownModuleError
from growlm.manifests import ModuleManifest, RouterManifest, StoreManifest, first_error, read_manifest
from growlm.units import parse_size
from growlm.versions import ROUTER_MANIFEST, TensorVersions, complete_versions, now

if TYPE_CHECKING:
    from torch import Tensor

    from growlm.base import Base
    from growlm.modules import KnowledgeModule

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = ("auto", "base", "general", "none")
WEIGHTS = "module.safetensors"
MANIFEST = "module.json"
# Under router/: what it was shown as none of the modules, and what is derived from the modules' own files.
GENERAL, ROUTER_SUMS, ROUTER_FITTED = "general", "gaussian", "gaussian-fitted"
ROUTER_INDEX = "product-key"
ROUTER_DERIVED = (ROUTER_SUMS, ROUTER_FITTED, ROUTER_INDEX)
ROUTER_TRAINED = "transformer"
ROUTERS = ("gaussian", "product-key", "transformer")
_FEW = 64  # names that are looked up one by one
_KEPT = "2MB"  # of every domain's text, where a router is trained on it
LEAST_SAMPLES = 8  # bytes that a single token of text takes, with its length: fewer keep nothing


@dataclass(frozen=True)
class StoredModule:
    """One version of a module on disk. Its manifest is read when first asked for."""

    name: str
    version: int
    folder: Path

    @cached_property
    def manifest(self) -> ModuleManifest:
        """
        Raises:
            IntegrityError: the manifest is missing, malformed, has unknown keys, or belongs elsewhere.
            StoreError: a newer format.
        """
        manifest = read_manifest(self.folder / MANIFEST, ModuleManifest)
        if (manifest.name, manifest.version) != (self.name, self.version):
            raise IntegrityError(
                f"{self.folder / MANIFEST}: says {manifest.name}/{manifest.version}; folders were moved by hand"
            )
        return manifest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def bytes(self) -> int:
        """Bytes of its weights once loaded."""
        return self.manifest.bytes

    def bytes_with(self, row_cache: int | None) -> int:
        """Bytes that it takes in memory when it is loaded with such a `row_cache`.

        Raises:
            ConfigError: `row_cache` is too small for what one token reads.
        """
        if row_cache is None:
            return self.bytes
        kind, config = self.shape()
        return kind.bytes_from_disk(config, outline(self.folder / WEIGHTS), row_cache)

    def shape(self) -> tuple[type[KnowledgeModule], Any]:
        """Its kind, and the kind's config as it was saved.

        Raises:
            IntegrityError: the config is not one of the kind.
        """
        from growlm.modules import kind_of

        kind = kind_of(self.manifest.kind)
        try:
            return kind, kind.Config.model_validate(self.manifest.config)
        except ValidationError as error:
            raise IntegrityError(f"{self.folder / MANIFEST}: config: {first_error(error)}") from None

    def about(self) -> str:
        """What its shape says in a few words; empty where it cannot be understood."""
        try:
            return self.shape()[1].about()
        except (ConfigError, IntegrityError):
            return ""

    @property
    def parameters(self) -> int:
        return self.manifest.parameters


class Store:
    """A folder with a base's identity and its knowledge modules. Made by `create` or `open`.

    Attributes:
        path: the folder.
        manifest: what store.json says.
    """

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path = path
        self.manifest = manifest

    # Creating and opening

    @classmethod
    def create(
        cls,
        path: str | Path,
        base: str | Path,
        *,
        dtype: str = "auto",
        router: str = ROUTERS[0],
        keep_samples: str | int | None = None,
    ) -> Store:
        """Makes a new store for a base: a local checkpoint folder or a hub id.

        Args:
            dtype: in which the base is held and run: float32, bfloat16, float16, or auto for the checkpoint's own.
            router: the kind that chooses: gaussian, product-key or transformer.
            keep_samples: how much of every domain's text is kept, e.g. "2MB"; by default 2 MB where the router is
                trained on it, else nothing.

        Raises:
            StoreError: the folder exists and is not empty.
            ConfigError: no such router, or one that needs samples without any.
            BaseModelError: no such base, or a family that is not supported.
        """
        path = Path(path).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "is a store already" if (path / "store.json").exists() else "exists already"
            raise StoreError(f"{path}: {what}; choose another folder")
        if dtype not in ("auto", *checkpoint.DTYPES):
            raise StoreError(f"dtype {dtype!r} is not one of auto, {', '.join(checkpoint.DTYPES)}")
        kept = _samples_for(router, keep_samples)
        folder = checkpoint.resolve(base)
        checkpoint.check(folder)
        local = Path(base).expanduser().is_dir()
        manifest = StoreManifest(
            created=now(),
            base=os.path.relpath(folder.resolve(), path.resolve()) if local else str(base),
            base_revision=None if local else checkpoint.hub_revision(folder),
            base_fingerprint=checkpoint.fingerprint(folder),
            tokenizer_fingerprint=checkpoint.tokenizer_fingerprint(folder),
            dtype=checkpoint.stored_dtype(folder) if dtype == "auto" else dtype,
            router=router,
            keep_samples=kept,
        )
        make_folders(path / "modules")
        write_atomic(path / "store.json", manifest.model_dump_json(indent=2).encode())
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Opens a store. Reads its manifest only: the cost does not depend on how many modules it holds.

        Raises:
            StoreError: not a store, or a newer format.
        """
        path = Path(path).expanduser()
        if not (path / "store.json").is_file():
            raise StoreError(f'{path}: not a store (no store.json); make one with "growlm new {path} --base BASE"')
        return cls(path, read_manifest(path / "store.json", StoreManifest))

    def beside(self, path: Path) -> Store:
        """Makes an empty store for the same base in the same dtype, with the same kind of router.

        Raises:
            BaseModelError: the base is not there.
        """
        base = self.manifest.base
        if (self.path / base).is_dir():
            base = os.path.relpath(self.base_folder.resolve(), path.resolve())
        manifest = self.manifest.model_copy(update={"created": now(), "base": base})
        make_folders(path / "modules")
        write_atomic(path / "store.json", manifest.model_dump_json(indent=2).encode())
        return Store(path, manifest)

    # The modules

    @property
    def modules(self) -> dict[str, StoredModule]:
        """The current version of every module, by name, in the names' order. Lists folders, opens no file."""
        return {name: self._current(name, versions) for name, versions in self._versions()}

    def find(self, name: str) -> StoredModule | None:
        """The current version of `name`, None if there is none; in time that does not depend on how many there are."""
        check_name(name)
        versions = complete_versions(self.path / "modules" / name, MANIFEST)
        return self._current(name, versions) if versions else None

    def missing(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that the store holds nothing of. Few are looked up; for many, one folder is listed."""
        wanted = set(names)
        if len(wanted) <= _FEW:
            return {name for name in wanted if not os.path.lexists(self.path / "modules" / name)}
        try:
            with os.scandir(self.path / "modules") as entries:
                return wanted - {entry.name for entry in entries}
        except FileNotFoundError:
            return wanted

    def module(self, name: str, version: int | None = None) -> StoredModule:
        """One module, the current version unless told.

        Raises:
            UnknownModuleError: the store does not hold it.
        """
        # A name that no module can have is not looked for on the disk.
        versions = complete_versions(self.path / "modules" / name, MANIFEST) if _allowed(name) else []
        if not versions:
            known = ", ".join(list(self.modules)[:20]) or "none yet"
            raise UnknownModuleError(f"{self.path}: no module {name!r}; modules are: {known}")
        if version is not None and version not in versions:
            raise UnknownModuleError(f"{self.path}: module {name!r} has no version {version}; versions are {versions}")
        chosen = versions[-1] if version is None else version
        return StoredModule(name, chosen, self.path / "modules" / name / str(chosen))

    def commit(
        self,
        name: str,
        module: KnowledgeModule,
        training: dict[str, Any],
        files: Mapping[str, Mapping[str, Tensor]] | None = None,
        made_from: int | None = None,
    ) -> StoredModule:
        """Saves a module as the next version of `name`, in the store's dtype. It is there wholly or not at all.

        Args:
            training: how it was made, for the manifest.
            files: more tensors to keep beside the weights, by file name.
            made_from: the version that it was made from, which must still be the current one.

        Raises:
            ConfigError: a part of the module is on the disk.
            StoreError: the disk is full, or `made_from` is not the current version any more; nothing was changed.
        """
        import torch

        check_name(name)
        module.require_whole()
        dtype = getattr(torch, self.manifest.dtype)
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
        clear_scratch(self.scratch)
        with self.lock():
            versions = complete_versions(self.path / "modules" / name, MANIFEST)
            if made_from is not None and versions[-1:] != [made_from]:
                now_there = f"version {versions[-1]} is" if versions else "none is left"
                raise StoreError(
                    f"{self.path}: version {made_from} of {name!r} is not the current one any more ({now_there}); run "
                    "the command again"
                )
            version = versions[-1] + 1 if versions else 1
            final = self.path / "modules" / name / str(version)
            if final.exists():  # a folder without its manifest: not a version, whatever it is
                remove_folder(final, self.scratch)
            with new_folder(final, self.scratch, MANIFEST) as folder:
                hashes = {WEIGHTS: write_tensors(folder / WEIGHTS, weights)}
                for file, tensors in (files or {}).items():
                    hashes[file] = write_tensors(folder / file, tensors)
                manifest = ModuleManifest(
                    created=now(),
                    name=name,
                    version=version,
                    kind=module.kind,
                    config=module.config.model_dump(mode="json"),
                    fork=module.fork,
                    base_fingerprint=self.manifest.base_fingerprint,
                    tokenizer_fingerprint=self.manifest.tokenizer_fingerprint,
                    dtype=self.manifest.dtype,
                    files=hashes,
                    bytes=sum(t.numel() * t.element_size() for t in weights.values()),
                    parameters=module.num_parameters(),
                    training=training,
                )
                (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        return StoredModule(name, version, final)

    def remove(self, name: str, version: int | None = None) -> None:
        """Withdraws a module, all its versions or one of them. Everything else keeps its bytes.

        Raises:
            UnknownModuleError: the store does not hold it.
        """
        with self.lock():
            self.module(name, version)
            if version is not None and len(complete_versions(self.path / "modules" / name, MANIFEST)) == 1:
                version = None  # the last one: nothing is left
            # What was derived from all modules still has this one's share: it goes first, and is made anew when needed.
            for derived in ROUTER_DERIVED:
                self.router_files(derived).drop()
            folder = self.path / "modules" / name
            remove_folder(folder if version is None else folder / str(version), self.scratch)

    def load(
        self,
        name: str,
        base: Base,
        *,
        version: int | None = None,
        verify: bool = True,
        row_cache: int | None = None,
    ) -> KnowledgeModule:
        """A module, ready to run on `base`.

        Args:
            verify: compare the weights' hash with the manifest's; once a file was checked, it need not be again.
            row_cache: leave tables on the disk and keep rows of them in so many bytes; None reads them whole. (Kinds
                without tables are read whole.)

        Raises:
            UnknownModuleError: the store does not hold it.
            IntegrityError: its files are not what its manifest says.
            BaseModelError: it was made for another base, tokenizer or dtype.
            ConfigError: `row_cache` is too small for what one token reads.
        """
        stored = self.module(name, version)
        manifest = stored.manifest
        where = str(stored.folder / WEIGHTS)
        self._check_base(manifest, base)
        kind, config = stored.shape()
        if WEIGHTS not in manifest.files:
            raise IntegrityError(f"{stored.folder / MANIFEST}: names no {WEIGHTS}; learn {name!r} again")
        digest = manifest.files[WEIGHTS]
        expected = digest if verify else None
        on_disk = kind.is_table if row_cache is not None else _no_table
        if row_cache is None:
            tensors = read_tensors(Path(where), sha256=expected)
        else:
            tensors = map_tensors(Path(where), kind.is_table, sha256=expected)
        if base.device.type != "cpu":
            tensors = {k: v if on_disk(k) else v.to(base.device) for k, v in tensors.items()}
        module = kind.restore(base, config, tensors, where)
        if row_cache is not None:
            module.keep_rows(row_cache)
        module.identity = f"{name}@{stored.version}:{digest}"
        return module

    # The base

    @property
    def base_folder(self) -> Path:
        """Where the base's files are.

        Raises:
            BaseModelError: it is not there any more.
        """
        recorded = self.manifest.base
        local = self.path / recorded
        if local.is_dir() or recorded.startswith((".", "/")):
            if not local.is_dir():
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

    def load_base(self, *, device: str = "cpu") -> Base:
        """The frozen base, checked.

        Raises:
            BaseModelError: it is missing, has changed, or cannot be loaded.
        """
        from growlm.base import Base

        folder = self.check_base()
        model = checkpoint.load_model(folder, self.manifest.dtype)
        base = Base(model.to(device), str(folder))
        base.fingerprint = self.manifest.base_fingerprint
        return base

    def load_tokenizer(self) -> Any:
        return checkpoint.load_tokenizer(self.base_folder)

    # The router's files

    def set_router(self, kind: str, keep_samples: str | int | None = None) -> None:
        """Records which kind of router chooses, and how much text is kept for it from now on.

        Raises:
            ConfigError: as `create`.
        """
        if keep_samples is None and self.manifest.keep_samples:
            keep_samples = self.manifest.keep_samples
        kept = _samples_for(kind, keep_samples)
        with self.lock():
            # Others may have changed it since this store was opened.
            manifest = read_manifest(self.path / "store.json", StoreManifest)
            self.manifest = manifest.model_copy(update={"router": kind, "keep_samples": kept})
            write_atomic(self.path / "store.json", self.manifest.model_dump_json(indent=2).encode())

    @property
    def router_path(self) -> Path:
        return self.path / "router"

    def remove_router_version(self, version: int) -> None:
        """Takes a trained router away; the newest that is left is current.

        Raises:
            StoreError: no such version.
        """
        with self.lock():
            files = self.router_files(ROUTER_TRAINED)
            if version not in files.versions():
                known = ", ".join(map(str, files.versions())) or "none"
                raise StoreError(f"{self.path}: no trained router of version {version}; versions are: {known}")
            files.remove(version)

    def router_files(self, name: str) -> TensorVersions:
        """Tensors that the router keeps under `name`."""
        return TensorVersions(self.router_path / name, self.scratch)

    # The store itself

    @property
    def scratch(self) -> Path:
        """For what is being written; nothing in it counts."""
        return self.path / "scratch"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while folders appear or go, by one process at a time."""
        with locked(self.path / "lock"):
            yield

    def status(self) -> dict[str, Any]:
        """What the store holds: base, modules, parameters in all, and at most active for a prompt."""
        base = checkpoint.num_parameters(self.base_folder)
        modules = [
            {
                "name": m.name,
                "version": m.version,
                "kind": m.kind,
                "bytes": m.bytes,
                "parameters": m.parameters,
                "about": m.about(),
            }
            for m in self.modules.values()
        ]
        sizes = [m.parameters for m in self.modules.values()]
        return {
            "base": self.manifest.base,
            "base_parameters": base,
            "modules": modules,
            "total_parameters": base + sum(sizes),
            "active_parameters": base + max(sizes, default=0),
        }

    def verify(self) -> list[str]:
        """Reads every file and names each that is not what its manifest says, a line each; empty when all is well."""
        problems: list[str] = []
        try:
            folder = self.base_folder
            if checkpoint.fingerprint(folder, sha256_file) != self.manifest.base_fingerprint:
                problems.append(f"{folder}: not the base that this store was made for")
            if checkpoint.tokenizer_fingerprint(folder) != self.manifest.tokenizer_fingerprint:
                problems.append(f"{folder}: not the tokenizer that this store was made for")
            checkpoint.check(folder)
        except GrowlmError as error:
            problems.append(str(error))
        for folder in sorted(self.router_path.glob("*/*")):
            try:
                problems += _check_files(folder, read_manifest(folder / ROUTER_MANIFEST, RouterManifest).files)
            except GrowlmError as error:
                problems.append(str(error))
        if self.modules and not self.router_files(GENERAL).versions():
            problems.append(f"{self.router_path / GENERAL}: is missing; restore it, or make the store again")
        for name, versions in self._versions():
            for version in versions:
                folder = self.path / "modules" / name / str(version)
                try:
                    manifest = StoredModule(name, version, folder).manifest
                except GrowlmError as error:
                    problems.append(str(error))
                    continue
                problems += _check_files(folder, manifest.files)
                for field in ("base_fingerprint", "tokenizer_fingerprint", "dtype"):
                    if getattr(manifest, field) != getattr(self.manifest, field):
                        problems.append(f"{folder / MANIFEST}: {field} is not the store's")
                known = {MANIFEST, *manifest.files}
                problems += [
                    f"{file}: not named in the manifest" for file in sorted(folder.iterdir()) if file.name not in known
                ]
        return problems

    def _check_base(self, manifest: ModuleManifest, base: Base) -> None:
        wanted = (manifest.base_fingerprint, manifest.tokenizer_fingerprint, manifest.dtype)
        mine = (self.manifest.base_fingerprint, self.manifest.tokenizer_fingerprint, self.manifest.dtype)
        where = f"{self.path}/modules/{manifest.name}/{manifest.version}"
        if wanted != mine:
            raise BaseModelError(f"{where}: made for another base, tokenizer or dtype than this store's; learn it here")
        if base.fingerprint != manifest.base_fingerprint:
            raise BaseModelError(f"{where}: made for another base than {base.where}; load the store's own base")
        if str(base.dtype).removeprefix("torch.") != manifest.dtype:
            raise BaseModelError(f"{where}: made for {manifest.dtype}, the base is held in {base.dtype}")

    def _versions(self) -> Iterator[tuple[str, list[int]]]:
        folder = self.path / "modules"
        for name in sorted(e.name for e in os.scandir(folder) if e.is_dir()) if folder.is_dir() else ():
            if _NAME.fullmatch(name) and (versions := complete_versions(folder / name, MANIFEST)):
                yield name, versions

    def _current(self, name: str, versions: list[int]) -> StoredModule:
        return StoredModule(name, versions[-1], self.path / "modules" / name / str(versions[-1]))


def check_name(name: str) -> None:
    """
    Raises:
        StoreError: not a name that a module can have.
    """
    if name in _RESERVED:
        raise StoreError(f"module name {name!r} is not allowed: it means something else to the engine; choose another")
    if not _allowed(name):
        raise StoreError(
            f"module name {name!r} is not allowed: use 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or "
            "digit, without '..'"
        )


def _no_table(name: str) -> bool:
    return False


def _samples_for(router: str, keep_samples: str | int | None) -> int:
    """Bytes of text to keep of every domain for a kind of router."""
    if router not in ROUTERS:
        raise ConfigError(f"router {router!r} is not one of {', '.join(ROUTERS)}")
    trained = router == "transformer"
    if keep_samples is None:
        keep_samples = _KEPT if trained else 0
    size = parse_size(keep_samples)
    if trained and size < LEAST_SAMPLES:
        raise ConfigError(
            f"--keep-samples {size}: a transformer router is trained on kept text of every domain; keep some, or use "
            "--router gaussian"
        )
    return size


def _allowed(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and ".." not in name and name not in _RESERVED


def _check_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    problems = []
    for name, digest in files.items():
        path = folder / name
        if Path(name).name != name:
            problems.append(f"{folder}: manifest names a file outside its folder: {name!r}")
        elif not path.is_file():
            problems.append(f"{path}: file is missing")
        elif (found := sha256_file(path)) != digest:
            problems.append(f"{path}: sha256 {found[:12]}..., manifest says {digest[:12]}...")
    return problems
