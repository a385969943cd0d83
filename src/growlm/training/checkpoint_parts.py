"""Checkpoint parts: tensors of which each rank writes its own part, by `torch.distributed.checkpoint`.

Knows tensors, ranks and a folder that all of them see; not what is trained. What that library writes is read by pickle,
so that nothing is read before its bytes are known to be those that were written.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from growlm.disk.files import raise_if_full, sha256_file
from growlm.errors import IntegrityError
from growlm.training.parallel import Ranks, peers


def write_parts(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> str:
    """Writes tensors to a new folder, each rank its parts, and returns a digest of all files.

    Raises:
        StoreError: no room for them.
        RankError: another rank has ended.
    """
    ranks.of_all(None)  # the first has made room
    try:
        with peers():
            dcp.save({name: t.detach() for name, t in tensors.items()}, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise _cause(error, folder, sum(_own(t).nbytes for t in tensors.values())) from error
    return _digest(folder, ranks)


def read_parts(
    folder: Path, like: Mapping[str, Tensor], wanted: Callable[[str], bool], ranks: Ranks, *, sha256: str
) -> dict[str, Tensor]:
    """The tensors that `write_parts` wrote, in the parts that the ranks have of those that they are like.

    Args:
        like: by the end of a name, after its first point: what a tensor of the same shape has its parts as.
        wanted: the names that this rank reads.
        sha256: the digest that was returned.

    Raises:
        IntegrityError: they are not as they were written.
    """
    if _digest(folder, ranks) != sha256:
        raise IntegrityError(f"{folder}: this checkpoint is not as it was written")
    found: dict[str, Tensor] = {}
    for name, told in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if not wanted(name):
            continue
        assert isinstance(told, TensorStorageMetadata)
        model = like.get(name.partition(".")[2])
        if isinstance(model, DTensor) and model.shape == told.size:
            found[name] = torch.empty_like(model, dtype=told.properties.dtype)
        else:
            found[name] = torch.empty(told.size, dtype=told.properties.dtype)
    try:
        with peers():
            dcp.load(found, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise _cause(error, folder, 0) from error
    return found


def _digest(folder: Path, ranks: Ranks) -> str:
    """Of what every rank has written, each hashing its own files; what is missing changes it."""
    names = [f"__{ranks.rank}_*.distcp", *([".metadata"] if ranks.first else [])]
    files = sorted(path for name in names for path in folder.glob(name))
    told = ranks.of_all([[path.name, sha256_file(path)] for path in files])
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _cause(error: dcp.CheckpointException, folder: Path, num_bytes: int) -> BaseException:
    """What failed on a rank, as it would have been said there."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    for cause in causes:
        if not isinstance(cause, Exception):
            return cause  # Ctrl-C
        full = OSError(errno.ENOSPC, str(cause))  # torch's writer says "unexpected pos", and not why
        written_short = isinstance(cause, RuntimeError) and _full(folder, num_bytes)
        raise_if_full(full if written_short else cause, folder, num_bytes)
    return next(iter(causes), error)


def _full(folder: Path, num_bytes: int) -> bool:
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free < num_bytes


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
