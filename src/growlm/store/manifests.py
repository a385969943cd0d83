"""Manifests: the JSON files that say what a store and its folders hold. An unknown key or a newer format is refused,
and so is a value that cannot be what its key means.

Knows keys, their types and bounds; opens one file at a time and nothing else.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from growlm import __version__
from growlm.disk.files import read_json
from growlm.errors import IntegrityError, StoreError, first_error, shortened

FORMAT = 1
_M = TypeVar("_M", bound="Manifest")
_MOST = 2**53 - 1  # the largest whole number that every reader of JSON holds exactly


def _date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _inside(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError("names a file outside its folder")
    return name


Count = Annotated[int, Field(ge=0, le=_MOST)]
Version = Annotated[int, Field(ge=1, le=_MOST)]
Fork = Annotated[int, Field(ge=0, le=65_536)]  # a base of so many layers is none; `Base` knows how many there are
Layer = Annotated[int, Field(ge=1, le=65_536)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Date = Annotated[str, StringConstraints(max_length=64), AfterValidator(_date)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_inside)]
Place = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=255)]
DType = Annotated[str, StringConstraints(pattern="^(float32|bfloat16|float16)$")]
RouterKind = Annotated[str, StringConstraints(pattern="^(gaussian|product-key|transformer)$")]


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreManifest(Manifest):
    """store.json."""

    format: int = Field(default=FORMAT, ge=1)
    growlm: Name = __version__
    created: Date
    base: Place  # a hub id, or a folder or GGUF file: relative to the store where possible
    base_revision: Revision | None = None  # of a hub id: the commit that the store was made for
    base_gguf: Digest | None = None  # of a base that is a GGUF file: that file's sha256
    base_fingerprint: Digest
    tokenizer_fingerprint: Digest
    dtype: DType  # in which the base is held and run, and modules are saved
    router: RouterKind = "gaussian"  # the kind that chooses
    keep_samples: Size = 0  # bytes of every domain's text, as token ids, that are kept for the router
    routing_layer: Layer | None = None  # after how many layers the router reads; None: after the last and the norm


class _Record(BaseModel):
    """What a manifest says of a training, for those who read it on. Of other keys nothing is asked."""

    model_config = ConfigDict(extra="allow", strict=True)


class _GrowthStep(_Record):
    experts: Annotated[list[Count], Field(min_length=2, max_length=2)]
    seed: Seed = 0
    tokens: Count = 0
    evidence: dict[str, Count] = {}
    run: Digest | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: Seconds = 0


class _ModuleTraining(_Record):
    sources: list[dict[str, Any]] = []
    replayed: list[dict[str, Any]] = []
    documents: Count = 0
    tokens: Count = 0
    seed: Seed = 0
    settings: dict[str, Any] = {}
    run: Digest | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: Seconds = 0
    growth: list[_GrowthStep] = []
    pruned: list[dict[str, Any]] = []
    probe: dict[str, Any] = {}


class _RouterTraining(_Record):
    samples: dict[Name, Digest] = {}
    settings: dict[str, Any] = {}
    tokens: Count = 0
    heldout: Count = 0
    seconds: Seconds = 0
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None


class ModuleManifest(Manifest):
    """module.json of one version of one module."""

    format: int = Field(default=FORMAT, ge=1)
    growlm: Name = __version__
    created: Date
    name: Name
    version: Version
    kind: Name
    config: dict[str, Any]
    fork: Fork  # first base layer whose output it changes
    base_fingerprint: Digest
    tokenizer_fingerprint: Digest
    dtype: DType
    files: dict[FileName, Digest]  # sha256 of every file beside this one
    bytes: Count
    parameters: Count
    routing_layer: Layer | None = None  # of the states that the router keeps of its text, as in store.json
    training: dict[str, Any]

    @model_validator(mode="after")
    def _agrees(self) -> ModuleManifest:
        _require_record(_ModuleTraining, self.training)
        if self.parameters > self.bytes:
            raise ValueError(f"parameters is {self.parameters}, more than its bytes, {self.bytes}")
        return self


class RouterManifest(Manifest):
    """router.json beside tensors that the router keeps."""

    format: int = Field(default=FORMAT, ge=1)
    growlm: Name = __version__
    created: Date
    files: dict[FileName, Digest]
    config: dict[str, Any] = {}  # of a router that is trained: its shape
    modules: dict[Name, tuple[Version, Fork]] = {}  # which it knows: version and fork
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _agrees(self) -> RouterManifest:
        _require_record(_RouterTraining, self.training)
        return self


def _require_record(kind: type[_Record], training: dict[str, Any]) -> None:
    try:
        kind.model_validate(training)
    except ValidationError as error:
        raise ValueError(f"training: {first_error(error)}") from None


def read_manifest(path: Path, kind: type[_M]) -> _M:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: file is missing; restore it") from None
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{path}: not readable JSON ({error}); restore it") from None
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, float | str):
        raise StoreError(f"{path}: format {shortened(found)}, this growlm reads up to {FORMAT}; install a newer growlm")
    if isinstance(found, int) and found > FORMAT:
        raise StoreError(f"{path}: format {shortened(found)}, this growlm reads up to {FORMAT}; install a newer growlm")
    try:
        return as_written(kind, content)
    except ValidationError as error:
        raise IntegrityError(f"{path}: {first_error(error)}; restore it or use the growlm that wrote it") from None


_B = TypeVar("_B", bound=BaseModel)


def as_written(kind: type[_B], content: Any) -> _B:
    """What JSON says, of exactly the types that were written: no text for a number, no number for yes or no.

    Raises:
        ValidationError: it says something else.
    """
    return kind.model_validate_json(json.dumps(content), strict=True)
