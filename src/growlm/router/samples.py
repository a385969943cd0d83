"""Samples: text of a domain that is kept, as token ids, for a router that is trained on all domains at once.

Bounded in bytes and hashed like every file of a module. Knows token ids and where they lie; trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growlm.disk.tensors import read_tensors

if TYPE_CHECKING:
    from growlm.store import StoredModule

SAMPLES = "samples.safetensors"  # beside a module's weights
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


def unpack_samples(tensors: dict[str, Tensor]) -> list[list[int]]:
    """The passages that `pack_samples` kept."""
    return [part.tolist() for part in tensors["tokens"].to(torch.int64).split(tensors["lengths"].tolist())]


def read_samples(module: StoredModule) -> list[list[int]]:
    """Passages kept of a module's text; empty where none were.

    Raises:
        IntegrityError: the file is not what the manifest says.
    """
    digest = module.manifest.files.get(SAMPLES)
    return [] if digest is None else unpack_samples(read_tensors(module.folder / SAMPLES, sha256=digest))
