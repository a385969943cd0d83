"""Manifests: the JSON files that say what a store and its folders hold. An unknown key or a newer format is refused.

Knows keys and their types; opens one file at a time and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from growlm import __version__
from growlm.errors import IntegrityError, StoreError

FORMAT = 1
_M = TypeVar("_M", bound="Manifest")


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreManifest(Manifest):
    """store.json."""

    format: int = FORMAT
    growlm: str = __version__
    created: str
    base: str  # a hub id, or a folder: relative to the store where possible
    base_revision: str | None = None  # of a hub id: the commit that the store was made for
    base_fingerprint: str
    tokenizer_fingerprint: str
    dtype: str  # in which the base is held and run, and modules are saved
    router: str = "gaussian"  # the kind that chooses
    keep_samples: int = 0  # bytes of every domain's text, as token ids, that are kept for the router


class ModuleManifest(Manifest):
    """module.json of one version of one module."""

    format: int = FORMAT
    growlm: str = __version__
    created: str
    name: str
    version: int
    kind: str
    config: dict[str, Any]
    fork: int  # first base layer whose output it changes
    base_fingerprint: str
    tokenizer_fingerprint: str
    dtype: str
    files: dict[str, str]  # sha256 of every file beside this one
    bytes: int
    parameters: int
    training: dict[str, Any]


class RouterManifest(Manifest):
    """router.json beside tensors that the router keeps."""

    format: int = FORMAT
    growlm: str = __version__
    created: str
    files: dict[str, str]
    config: dict[str, Any] = {}  # of a router that is trained: its shape
    modules: dict[str, tuple[int, int]] = {}  # which it knows: version and fork
    training: dict[str, Any] = {}


def read_manifest(path: Path, kind: type[_M]) -> _M:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise IntegrityError(f"{path}: file is missing; restore it") from None
    except (ValueError, OSError, RecursionError) as error:
        raise IntegrityError(f"{path}: not readable JSON ({error}); restore it") from None
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, float | str):
        raise StoreError(f"{path}: format {found!r}, this growlm reads up to {FORMAT}; install a newer growlm")
    if isinstance(found, int) and found > FORMAT:
        raise StoreError(f"{path}: format {found}, this growlm reads up to {FORMAT}; install a newer growlm")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path}: {first_error(error)}; restore it or use the growlm that wrote it") from None


def first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}"
    return f"{where}: {first['msg']}"
