"""Files: hashes, safetensors in one read, folders that appear complete or not at all.

Knows bytes and paths. Does not know what a store or a module is. Nothing here ever unpickles.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growlm.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20
_HUGE_PAGE = 2 << 20
_TWO_THREADS = 16 << 20  # bytes from which a second reader pays for its thread
_MAX_HEADER = 100_000_000  # the format's own limit
_LOCK = ".lock"


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class HashMemo:
    """Hashes of large files, remembered by size, inode and time of change, so that an unchanged file is read once.

    Kept in a JSON file that may be deleted at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key, mark = str(path.resolve()), [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        known = self._known.get(key)
        if not isinstance(known, list) or len(known) != 4 or known[:3] != mark:
            known = [*mark, sha256_file(path)]
            self._known[key] = known
            # A store on a read-only disk still opens; the next reader hashes again.
            with suppress(OSError, StoreError):
                write_atomic(self._path, json.dumps(self._known).encode())
        return known[3]


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces a file in one step: after a crash it holds the old bytes or the new ones."""
    make_folders(path.parent)
    new = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with open(new, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except BaseException as error:
        with suppress(OSError):
            new.unlink()
        raise_if_full(error, path, len(content))
        raise
    sync(path.parent)


def make_folders(folder: Path) -> None:
    """Makes a folder and those above it that are missing, and waits until the name of each is on the disk."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync(made.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def raise_if_full(error: BaseException, path: Path, num_bytes: int) -> None:
    """Turns a failed write for want of room into an error that says how much was asked for.

    Raises:
        StoreError: `error` says that the disk, a quota or a size limit is exhausted.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = str(error)
    if full or "No space left" in text or "os error 28" in text or "os error 27" in text:
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
        raise StoreError(
            f"{path}: no room to write {num_bytes:,} bytes ({free:,} free on this disk); "
            "nothing was changed; free some space and run the command again"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file, waits for the disk, returns the file's sha256.

    Raises:
        StoreError: no room on the disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    num_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        with open(path, "ab") as f:
            plain = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
        os.chmod(path, plain)  # safetensors replaces the file by one that its owner alone can read
        sync(path)
    except (OSError, SafetensorError) as error:
        raise_if_full(error, path, num_bytes)
        raise
    return sha256_file(path)


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file with one copy: from the page cache into one buffer, of which the tensors are views.

    Args:
        sha256: what the file's hash must be; None where it was checked before.

    Raises:
        IntegrityError: the file is missing, truncated, malformed, or its hash differs.
    """
    try:
        with open(path, "rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            header_size = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 0 < header_size <= min(size - 8, _MAX_HEADER):
                raise IntegrityError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = f.read(header_size)
            data = _buffer(size - 8 - header_size)
            view = as_bytes(data)
            full = _read_into(view, f.fileno(), 8 + header_size)
            if not full:
                raise IntegrityError(f"{path}: truncated while it was read")
    except FileNotFoundError:
        raise IntegrityError(f"{path}: file is missing; restore it or learn the module again") from None
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    if sha256 is not None:
        digest = hashlib.sha256(prefix)
        digest.update(header)
        digest.update(view)
        if digest.hexdigest() != sha256:
            raise IntegrityError(
                f"{path}: sha256 {digest.hexdigest()[:12]}..., manifest says {sha256[:12]}...; "
                "restore the file or learn the module again"
            )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _view(data, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise IntegrityError(f"{path}: malformed safetensors header ({error})") from None
    return tensors


def _buffer(num_bytes: int) -> Tensor:
    """Uninitialised bytes, on huge pages where the system has them: a fault per 4 KB costs more than the copy."""
    import torch

    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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


def _view(data: Tensor, entry: dict[str, Any]) -> Tensor:
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
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"offsets {start}..{stop} outside {len(data)} bytes")
    dtype = dtypes[entry["dtype"]]
    if any(size < 0 for size in entry["shape"]):
        raise ValueError(f"shape {entry['shape']}")
    return data[start:stop].view(dtype).view(entry["shape"])


@contextmanager
def new_folder(final: Path, scratch: Path, manifest: str) -> Iterator[Path]:
    """A folder that appears at `final` complete or not at all.

    Yields a scratch folder to write into. Its files are synced, `manifest` must be among them and is written last by
    the caller; then the folder is renamed to `final`.

    Raises:
        StoreError: `final` exists, or the disk is full.
    """
    try:
        with _work_folder(scratch) as work:
            yield work
            assert (work / manifest).exists()
            for file in work.iterdir():
                sync(file)
            sync(work)
            make_folders(final.parent)
            if final.exists():
                raise StoreError(f"{final}: exists already; run the command again")
            os.rename(work, final)
            sync(final.parent)
    except BaseException as error:
        raise_if_full(error, final, 0)
        raise


@contextmanager
def checkpoint_folder(out: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder for a user, which appears at `out` complete or not at all.

    Yields a hidden folder beside it to write into; it is synced and renamed in the end, or removed on an error.

    Args:
        num_bytes: about to be written, for the message where the disk is full.

    Raises:
        StoreError: `out` exists and is not empty, or the disk is full.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield work
        for file in work.iterdir():
            sync(file)
        work.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        work.rename(out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        raise_if_full(error, out, num_bytes)
        raise


def refuse_existing(out: Path) -> None:
    """
    Raises:
        StoreError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists already; choose another folder, or remove it")


def remove_folder(folder: Path, scratch: Path) -> None:
    """Deletes a folder so that no one ever sees half of it: renamed away first."""
    with _work_folder(scratch) as work:
        os.rename(folder, work / "gone")
        sync(folder.parent)


@contextmanager
def _work_folder(scratch: Path) -> Iterator[Path]:
    """A folder of one's own in `scratch`, gone in the end. The lock beside it says that it is in use, on any machine
    that shares the disk; it is there before the folder and goes after it."""
    work = scratch / secrets.token_hex(8)
    with locked(scratch / (work.name + _LOCK), keep=False):
        try:
            work.mkdir()
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def clear_scratch(scratch: Path) -> None:
    """Removes what killed processes left in a scratch folder: what no one holds the lock of."""
    found = list(scratch.iterdir()) if scratch.exists() else []
    for name in {p.name.removesuffix(_LOCK) for p in found if p.name.endswith(_LOCK) or p.is_dir()}:
        with suppress(OSError), locked(scratch / (name + _LOCK), wait=False, keep=False) as left:
            if left:
                shutil.rmtree(scratch / name, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True, keep: bool = True) -> Iterator[bool]:
    """Holds an advisory lock that dies with the process. Yields False if `wait` is false and another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                if os.fstat(f.fileno()).st_ino != os.stat(path).st_ino:
                    continue  # the one before took it away
            except FileNotFoundError:
                continue
            try:
                yield True
            finally:
                if not keep:
                    path.unlink(missing_ok=True)
                fcntl.flock(f, fcntl.LOCK_UN)
            return
