"""Store: the base's identity and the modules on disk. Versions, hashes, and the promise that a kill loses nothing.

A module is a folder that appears by one rename, its manifest written last. Nothing here trains, routes or runs.
"""

from __future__ import annotations

import difflib
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from growlm.base import checkpoint, tensor_bytes
from growlm.base.gguf import is_gguf
from growlm.disk.files import (
    HashMemo,
    clear_scratch,
    locked,
    make_folders,
    new_folder,
    remove_folder,
    undone_on_failure,
    write_atomic,
)
from growlm.disk.tensors import map_tensors, read_tensors, write_tensors
from growlm.errors import (
    BaseModelError,
    ConfigError,
    GrowlmWarning,
    IntegrityError,
    StoreError,
    UnknownModuleError,
)
from growlm.store.manifests import ModuleManifest, StoreManifest, read_manifest
from growlm.store.router_files import (
    ROUTER_DERIVED,
    ROUTER_TRAINED,
    ROUTERS,
    layer_to_read,
)
from growlm.store.status import status
from growlm.store.store_base import HASHES, StoreBase, write_base, written_base
from growlm.store.stored_module import MANIFEST, WEIGHTS, StoredModule, check_name, is_name
from growlm.store.verify import verify
from growlm.store.versions import TensorVersions, complete_versions, now
from growlm.units import parse_size

if TYPE_CHECKING:
    from torch import Tensor

    from growlm.base import Base
    from growlm.modules import KnowledgeModule
    from growlm.modules.contract import Arriving

    Tensors = dict[str, Tensor]
    # Of a file's hash, what reads it in main memory, and `KnowledgeModule.stage_of`, the tensors elsewhere.
    Bring = Callable[[str, Callable[[], Tensors], Callable[[str], int | None]], tuple[Tensors, Arriving | None]]

_Found = TypeVar("_Found")
_FEW = 64  # names that are looked up one by one
_LISTED = 20  # names in a message
_KEPT = "2MB"  # of every domain's text, where a router is trained on it
_COMPARED = 1000  # names with which an unknown one is compared: of many more it would take seconds
MIN_SAMPLE_BYTES = 8  # bytes that a single token of text takes, with its length: fewer keep nothing


class Store(StoreBase):
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
        """Makes a new store for a base: a local checkpoint folder, a GGUF file or a hub id.

        Args:
            dtype: in which the base is held and run: float32, bfloat16, float16, or auto for the checkpoint's own.
            router: the kind that chooses: gaussian, product-key or transformer.
            keep_samples: how much of every domain's text is kept, e.g. "2MB"; by default 2 MB where the router is
                trained on it, else nothing.

        Raises:
            StoreError: the folder exists and is not empty.
            ConfigError: no such router, or one that needs samples without any.
            BaseModelError: no such base, or a family that is not supported; a GGUF file that cannot be read.
        """
        path = Path(path).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "is a store already" if (path / "store.json").exists() else "exists already"
            raise StoreError(f"{path}: {what}; choose another folder")
        if dtype not in ("auto", *checkpoint.DTYPES):
            raise StoreError(f"dtype {dtype!r} is not one of auto, {', '.join(checkpoint.DTYPES)}")
        kept = _samples_for(router, keep_samples)
        given = Path(base).expanduser()
        with undone_on_failure(path):
            digest, memo = None, HashMemo(path / HASHES)
            if is_gguf(given):
                folder, digest = write_base(given, path), memo.sha256(given)
            else:
                folder = checkpoint.resolve(base)
            for remark in checkpoint.check(folder):
                warnings.warn(remark, GrowlmWarning, stacklevel=2)
            local = digest is not None or given.is_dir()
            manifest = StoreManifest(
                created=now(),
                base=os.path.relpath(given.resolve(), path.resolve()) if local else str(base),
                base_revision=None if local else checkpoint.hub_revision(folder),
                base_gguf=digest,
                base_fingerprint=checkpoint.fingerprint(folder, memo.sha256),
                tokenizer_fingerprint=checkpoint.tokenizer_fingerprint(folder),
                dtype=checkpoint.stored_dtype(folder) if dtype == "auto" else dtype,
                router=router,
                keep_samples=kept,
                routing_layer=layer_to_read(checkpoint.read_config(folder).num_hidden_layers),
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
            raise StoreError(f"{path}: not a store (no store.json); {_how_to_make(path)}")
        return cls(path, read_manifest(path / "store.json", StoreManifest))

    def beside(self, path: Path) -> Store:
        """Makes an empty store for the same base in the same dtype, with the same kind of router.

        Raises:
            BaseModelError: the base is not there.
        """
        base, folder = self.manifest.base, self.base_folder
        if self.manifest.base_gguf is not None or (self.path / base).is_dir():
            base = os.path.relpath((self.path / base).resolve(), path.resolve())
        manifest = self.manifest.model_copy(update={"created": now(), "base": base})
        make_folders(path / "modules")
        if self.manifest.base_gguf is not None:  # the file need not be there, nor read again
            shutil.copytree(folder, written_base(path), copy_function=_link_or_copy)
        write_atomic(path / "store.json", manifest.model_dump_json(indent=2).encode())
        return Store(path, manifest)

    # The modules

    @property
    def modules(self) -> dict[str, StoredModule]:
        """The current version of every module, by name, in the names' order. Lists folders, opens no file."""
        return {name: self._current(name, versions) for name, versions in self.versions()}

    def read_each(
        self, read: Callable[[StoredModule], _Found], modules: Iterable[StoredModule] | None = None
    ) -> Iterator[tuple[StoredModule, _Found]]:
        """Each module, of all unless told, with what `read` finds in it. Of one that is removed meanwhile the version
        that is current then, if any is left."""
        for module in self.modules.values() if modules is None else modules:
            current: StoredModule | None = module
            while current is not None:
                try:
                    found = read(current)
                except UnknownModuleError:
                    if current.folder.exists():
                        raise  # another that it needs is unknown
                    current = self.find(module.name)
                else:
                    yield current, found
                    break

    def versions(self) -> Iterator[tuple[str, list[int]]]:
        """Every module's name and complete versions, in the names' order."""
        folder = self.path / "modules"
        for name in sorted(e.name for e in os.scandir(folder) if e.is_dir()) if folder.is_dir() else ():
            if is_name(name) and (versions := complete_versions(folder / name, MANIFEST)):
                yield name, versions

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
        versions = complete_versions(self.path / "modules" / name, MANIFEST) if is_name(name) else []
        if not versions:
            raise UnknownModuleError(f"{self.path}: no module {name!r}; {self._instead_of(name)}")
        if version is not None and version not in versions:
            raise UnknownModuleError(f"{self.path}: module {name!r} has no version {version}; versions are {versions}")
        chosen = versions[-1] if version is None else version
        return StoredModule(name, chosen, self.path / "modules" / name / str(chosen))

    def _instead_of(self, name: str) -> str:
        """What to say of a name that no module has: the nearest that one has, or some of them all."""
        known, wanted = [existing for existing, _ in self.versions() if existing != name], str(name).lower()
        beginnings = [existing for existing in known if wanted and existing.startswith(wanted)]
        alike = known if len(known) <= _COMPARED else [e for e in known if e[:2] == wanted[:2]][:_COMPARED]
        if close := difflib.get_close_matches(wanted, alike, n=1) or beginnings:
            return f"did you mean {close[0]}?"
        more = f" and {len(known) - _LISTED:,} more (growlm status)" if len(known) > _LISTED else ""
        return f"modules are: {', '.join(known[:_LISTED]) or 'none yet'}{more}"

    def commit(
        self,
        name: str,
        module: KnowledgeModule,
        training: dict[str, Any],
        files: Mapping[str, Mapping[str, Tensor]] | None = None,
        made_from: int | None = None,
        evidence_of: StoredModule | None = None,
    ) -> StoredModule:
        """Saves a module as the next version of `name`, in the store's dtype. It is there wholly or not at all.

        Args:
            training: how it was made, for the manifest.
            files: more tensors to keep beside the weights, by file name.
            made_from: the version that it was made from, which must still be the current one.
            evidence_of: the version whose evidence for the router is among `files`; else it is of this store's router.

        Raises:
            ConfigError: a part of the module is on the disk.
            StoreError: the disk is full, or `made_from` is not the current version any more; nothing was changed.
        """
        import torch

        check_name(name)
        module.require_whole()
        files = {**(files or {}), **(module.memory.text.files() if module.memory and module.memory.text else {})}
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
                for file, tensors in files.items():
                    hashes[file] = write_tensors(folder / file, tensors)
                manifest = ModuleManifest(
                    created=now(),
                    name=name,
                    version=version,
                    kind=module.kind,
                    config=module.config.recorded_as(),
                    fork=module.fork,
                    base_fingerprint=self.manifest.base_fingerprint,
                    tokenizer_fingerprint=self.manifest.tokenizer_fingerprint,
                    dtype=self.manifest.dtype,
                    files=hashes,
                    bytes=tensor_bytes(weights.values()),
                    parameters=module.num_parameters(),
                    routing_layer=(evidence_of or self).manifest.routing_layer,
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
        bring: Bring | None = None,
    ) -> KnowledgeModule:
        """A module, ready to run on `base`.

        Args:
            verify: compare the weights' hash with the manifest's; once a file was checked, it need not be again.
            row_cache: leave tables on the disk and keep rows of them in so many bytes; None reads them whole. (Kinds
                without tables are read whole.)
            bring: gives tensors on the base's device, of a file with this hash that the function reads; by default they
                are read and moved. Those of a stage (`KnowledgeModule.stage_of`) may be on their way still.

        Raises:
            UnknownModuleError: the store does not hold it.
            IntegrityError: its files are not what its manifest says.
            BaseModelError: it was made for another base, tokenizer or dtype.
            ConfigError: `row_cache` is too small for what one token reads.
        """
        stored = self.module(name, version)
        with stored.reading():
            return self._load(stored, base, verify, row_cache, bring)

    def _load(
        self, stored: StoredModule, base: Base, verify: bool, row_cache: int | None, bring: Bring | None
    ) -> KnowledgeModule:
        name, manifest = stored.name, stored.manifest
        where = str(stored.folder / WEIGHTS)
        self._check_base(manifest, base)
        kind, config = stored.shape()
        if WEIGHTS not in manifest.files:
            raise IntegrityError(f"{stored.folder / MANIFEST}: names no {WEIGHTS}; learn {name!r} again")
        digest = manifest.files[WEIGHTS]
        expected = digest if verify else None
        on_disk = kind.is_table if row_cache is not None else _no_table
        arriving: Arriving | None = None
        if row_cache is None and bring is not None:
            stage_of = functools.partial(kind.stage_of, base, config)
            tensors, arriving = bring(digest, lambda: read_tensors(Path(where), sha256=expected), stage_of)
        elif row_cache is None:
            tensors = read_tensors(Path(where), sha256=expected)
        else:
            tensors = map_tensors(Path(where), kind.is_table, sha256=expected)
        if base.device.type != "cpu":
            tensors = {k: v if on_disk(k) else v.to(base.device) for k, v in tensors.items()}
        module = kind.restore(base, config, tensors, where)
        if (fork := stored.fork_on(base.num_layers)) != module.fork:
            raise IntegrityError(
                f"{stored.folder / MANIFEST}: fork is {fork}, its config says {module.fork}; restore it or learn "
                f"{name!r} again"
            )
        if row_cache is not None:
            module.keep_rows(row_cache)
        if module.memory is not None:
            from growlm.recall.text import RecalledText

            module.memory.require_numbers(where)
            module.memory.text = RecalledText.open(stored.folder, stored.text_files, base.vocab_size, verify=verify)
            digest = sha256("\n".join([digest, *stored.text_files.values()]).encode()).hexdigest()
        module.identity, module.arriving = f"{name}@{stored.version}:{digest}", arriving
        return module

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
    def work(self) -> Path:
        """Where trainings keep what they need to go on, a folder each; with a file REFUSED in it, one that ended and
        was not admitted."""
        return self.path / "work"

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
        """What the store holds: base, modules, parameters in all, and at most active for a prompt; and what trainings
        that are under way, were stopped or did not do better keep there to go on."""
        return status(self)

    def verify(self) -> list[str]:
        """Reads every file and names each that is not what its manifest says, a line each; empty when all is well."""
        return verify(self)

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

    def _current(self, name: str, versions: list[int]) -> StoredModule:
        return StoredModule(name, versions[-1], self.path / "modules" / name / str(versions[-1]))


def _how_to_make(path: Path) -> str:
    """What to do about a folder that is no store."""
    if (path / "config.json").exists():
        return f'it is a checkpoint: make a store beside it with "growlm new STORE --base {path}"'
    return f'make one with "growlm new {path} --base BASE"'


def _link_or_copy(source: str, copy: str) -> None:
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)


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
    if trained and size < MIN_SAMPLE_BYTES:
        raise ConfigError(
            f"--keep-samples {size}: a transformer router is trained on kept text of every domain; keep some, or use "
            "--router gaussian"
        )
    return size
