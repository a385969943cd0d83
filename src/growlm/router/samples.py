"""Samples: text of a domain that is kept, as token ids, for a router that is trained on all domains at once.

Bounded in bytes and hashed like every file of a module. Knows token ids and where they lie; trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.disk.tensors import read_tensors
from growlm.errors import IntegrityError
from growlm.store.stored_module import SAMPLES

if TYPE_CHECKING:
    from growlm.store import StoredModule

GENERAL_SAMPLES = "general-samples"  # under router/: of text that is none of the modules'


def pack_samples(passages: Sequence[Sequence[int]], limit: int) -> dict[str, Tensor]:
    """The first passages that fit in `limit` bytes, as one array of token ids and their lengths (4 bytes each).

    Of a text that does not fit, give passages in random order: the first ones of a corpus are seldom like the rest.
    """
    largest = max((max(p, default=0) for p in passages), default=0)
    dtype = torch.uint16 if largest < 1 << 16 else torch.int32
    kept: list[int] = []
    lengths: list[int] = []
    for passage in passages:
        room = (limit - 4 * (len(lengths) + 1)) // dtype.itemsize - len(kept)
        if room < 1:
            break
        kept += passage[:room]
        lengths.append(min(len(passage), room))
    return {
        "tokens": torch.tensor(kept, dtype=torch.int64).to(dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def unpack_samples(tensors: dict[str, Tensor], where: str | Path = "kept text") -> list[list[int]]:
    """The passages that `pack_samples` kept.

    Raises:
        IntegrityError: it has kept something else.
    """
    kinds = {name: (t.dtype, t.ndim) for name, t in tensors.items()}
    tokens, lengths = kinds.get("tokens"), kinds.get("lengths")
    if len(kinds) != 2 or tokens not in ((torch.uint16, 1), (torch.int32, 1)) or lengths != (torch.int32, 1):
        raise IntegrityError(f"{where}: holds no passages of token ids; restore the file")
    if int(tensors["lengths"].sum()) != len(tensors["tokens"]) or bool((tensors["lengths"] < 0).any()):
        raise IntegrityError(f"{where}: its lengths are not those of its {len(tensors['tokens'])} tokens; restore it")
    return [part.tolist() for part in tensors["tokens"].to(torch.int64).split(tensors["lengths"].tolist())]


def read_samples(module: StoredModule) -> list[list[int]]:
    """Passages kept of a module's text; empty where none were.

    Raises:
        IntegrityError: the file is not what the manifest says.
    """
    digest = module.manifest.files.get(SAMPLES)
    if digest is None:
        return []
    with module.reading():
        return unpack_samples(read_tensors(module.folder / SAMPLES, sha256=digest), module.folder / SAMPLES)
