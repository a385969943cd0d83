"""Tensor files: safetensors in one read, or mapped. Knows tensors and paths; nothing here ever unpickles."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from growlm.disk.files import raise_if_full, sha256_file, sha256_open, sync
from growlm.errors import IntegrityError
from growlm.progress import phase
from growlm.units import format_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TWO_THREADS = 16 << 20  # bytes from which a second reader pays for its thread
_HASHED = 16 << 20  # bytes that are hashed at a time
_MAX_HEADER = 100_000_000  # the format's own limit


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file, waits for the disk, returns the file's sha256.

    Raises:
        StoreError: no room on the disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    num_bytes = sum(t.nbytes for t in tensors.values())
    try:
        with open(path, "ab") as f:
            plain = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        with phase(f"writing {path.name}", note=format_size(num_bytes)):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
            os.chmod(path, plain)  # safetensors replaces the file by one that its owner alone can read
            sync(path)
    except (OSError, SafetensorError) as error:
        raise_if_full(error, path, num_bytes)
        raise
    return sha256_file(path)


def outline(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: names, shapes and dtypes. Reads the header only.

    Raises:
        IntegrityError: the file is missing, truncated or malformed.
    """
    import torch

    with _opened(path) as (handle, size):
        prefix, described = _header(path, handle, size)
    entries = _checked(path, described, size - len(prefix))
    return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}


def map_tensors(path: Path, mapped: Callable[[str], bool], *, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file but for the tensors that `mapped` says: those are views of the file, of which what is
    used is read when it is used. The file must not be changed in place as long as they are: a copy that takes its name
    is no harm.

    Raises:
        IntegrityError: as `read_tensors`.
    """
    import torch

    with _opened(path) as (handle, size):
        if sha256 is not None:
            with os.fdopen(os.dup(handle), "rb") as whole:
                _compare(path, sha256_open(whole, path.name), sha256)
        prefix, described = _header(path, handle, size)
        entries = _checked(path, described, size - len(prefix))
        if len(prefix) % 8:
            raise IntegrityError(f"{path}: malformed safetensors header (tensors begin at {len(prefix)})")
        # A private mapping: torch wants memory that could be written to; nothing ever writes.
        pages = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            pages.madvise(mmap.MADV_RANDOM)
        data = torch.frombuffer(pages, dtype=torch.uint8)[len(prefix) :]
    return {name: e.view(data) if mapped(name) else e.view(data).clone() for name, e in entries.items()}


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file with one copy: from the page cache into one buffer, of which the tensors are views.

    Args:
        sha256: what the file's hash must be; None where it was checked before.

    Raises:
        IntegrityError: the file is missing, truncated, malformed, or its hash differs.
    """
    import torch

    from growlm.layers.tables import new_table

    with _opened(path) as (handle, size):
        prefix, described = _header(path, handle, size)
        # On huge pages: a fault per 4 KB costs more than the copy.
        data = new_table(1, size - len(prefix), device="cpu", dtype=torch.uint8)[0]
        view = as_bytes(data)
        with phase(f"reading {path.name}", note=format_size(size)):
            whole = _read_into(view, handle, len(prefix))
        if not whole:
            raise IntegrityError(f"{path}: truncated while it was read")
    if sha256 is not None:
        digest = hashlib.sha256(prefix)
        with phase(f"hashing {path.name}", len(view), "bytes") as hashing:
            for at in range(0, len(view), _HASHED):
                digest.update(view[at : at + _HASHED])
                hashing.advance(min(_HASHED, len(view) - at))
        _compare(path, digest.hexdigest(), sha256)
    return {name: entry.view(data) for name, entry in _checked(path, described, len(data)).items()}


def require_kinds(
    where: str | Path, tensors: Mapping[str, Tensor], kinds: Mapping[str, tuple[torch.dtype, int]]
) -> None:
    """Checks that tensors are those that a file is to hold.

    Args:
        where: what to call the file in the message.
        kinds: by name, dtype and number of dimensions; none of them is empty.

    Raises:
        IntegrityError: others.
    """
    for name in sorted(kinds.keys() ^ tensors.keys()):
        what = "missing" if name in kinds else "unexpected"
        raise IntegrityError(f"{where}: tensor {name!r} is {what}; restore the file")
    for name, (dtype, ndim) in kinds.items():
        tensor = tensors[name]
        if (tensor.dtype, tensor.ndim) != (dtype, ndim) or not tensor.numel():
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise IntegrityError(
                f"{where}: tensor {name!r} is {found}, expected {dtype} of {ndim} dimensions; restore it"
            )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """A file's handle and size."""
    try:
        with open(path, "rb", buffering=0) as f:
            yield f.fileno(), os.fstat(f.fileno()).st_size
    except FileNotFoundError:
        raise IntegrityError(f"{path}: file is missing; restore it or learn the module again") from None
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror}); restore it") from None


def _header(path: Path, handle: int, size: int) -> tuple[bytes, bytes]:
    """All bytes before the tensors', and of these what describes them."""
    prefix = os.pread(handle, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
        raise IntegrityError(f"{path}: truncated or not a safetensors file ({size} bytes)")
    described = os.pread(handle, length, 8)
    if len(described) < length:
        raise IntegrityError(f"{path}: truncated while it was read")
    return prefix + described, described


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise IntegrityError(
            f"{path}: sha256 {found[:12]}..., manifest says {expected[:12]}...; "
            "restore the file or learn the module again"
        )


def _read_into(view: memoryview, handle: int, offset: int) -> bool:
    """Fills `view` from a file, a long one from two threads; False where the file ends before."""
    if len(view) >= _TWO_THREADS:
        half = len(view) // 2
        with ThreadPoolExecutor(1) as other:
            first = other.submit(_read_stretch, view[:half], handle, offset)
            return _read_stretch(view[half:], handle, offset + half) and first.result()
    return _read_stretch(view, handle, offset)


def _read_stretch(view: memoryview, handle: int, offset: int) -> bool:
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            return False
        done += count
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, not copied."""
    import torch

    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _checked(path: Path, described: bytes, num_bytes: int) -> dict[str, _Entry]:
    """What the header says of every tensor, of which there are `num_bytes`."""
    try:
        entries = json.loads(described)
        entries.pop("__metadata__", None)
        return {name: _Entry.of(entry, num_bytes) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: malformed safetensors header ({error})") from None


class _Entry(NamedTuple):
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, entry: dict[str, Any], num_bytes: int) -> _Entry:
        """
        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        import torch

        dtypes = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "I64": torch.int64,
            "I32": torch.int32,
            "I16": torch.int16,
            "I8": torch.int8,
            "U8": torch.uint8,
            "U16": torch.uint16,
            "BOOL": torch.bool,
        }
        start, stop = entry["data_offsets"]
        if any(type(number) is not int for number in (start, stop, *entry["shape"])):
            raise TypeError(f"shape {entry['shape']}, offsets {start}..{stop}")
        if not 0 <= start <= stop <= num_bytes:
            raise ValueError(f"offsets {start}..{stop} outside {num_bytes} bytes")
        dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {entry['shape']}")
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"shape {entry['shape']} of {entry['dtype']} in {stop - start} bytes")
        if start % dtype.itemsize:
            raise ValueError(f"{entry['dtype']} at {start}")
        return cls(start, stop, dtype, shape)

    def view(self, data: Tensor) -> Tensor:
        return data[self.start : self.stop].view(self.dtype).view(self.shape)
