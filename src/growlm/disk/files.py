"""Files: hashes, writing that is there wholly or not at all, folders that appear complete, locks.

Knows bytes and paths. Does not know what a store, a module or a tensor is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from growlm.errors import StoreError
from growlm.progress import phase

_BLOCK = 1 << 20
_LOCK = ".lock"


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in blocks."""
    with open(path, "rb") as f:
        return sha256_open(f, path.name)


def sha256_open(file: BinaryIO, name: str) -> str:
    """Hash of what is left of an open file, read in blocks."""
    digest = hashlib.sha256()
    with phase(f"hashing {name}", os.fstat(file.fileno()).st_size, "bytes") as hashing:
        while block := file.read(_BLOCK):
            digest.update(block)
            hashing.advance(len(block))
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value that a JSON file holds. Stricter than Python's reader, which takes what other readers of the same file
    refuse or understand otherwise.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON in UTF-8, or holds a key twice, a number that is none, or half a character.
    """
    text = path.read_bytes().decode()
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = repr(next(k for k in keys if keys.count(k) > 1))
        raise ValueError(f"it has the key {twice if len(twice) <= 60 else twice[:60] + '...'} twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is no number that JSON can hold")
    return value


class HashMemo:
    """Hashes of large files, remembered by size, inode and time of change, so that an unchanged file is read once.

    Kept in a JSON file that may be deleted at any time.

    Args:
        write: False leaves the file as it is.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self._path, self._write = path, write
        try:
            known = read_json(path)
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        stat = path.stat()
        key, mark = str(path.resolve()), [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        known = self._known.get(key)
        if not isinstance(known, list) or known[:3] != mark or not _is_hash(known[3:]):
            known = [*mark, sha256_file(path)]
            self._known[key] = known
            # A store on a read-only disk still opens; the next reader hashes again.
            with suppress(OSError, StoreError):
                if self._write:
                    write_atomic(self._path, json.dumps(self._known).encode())
        return known[3]


def _is_hash(rest: list[Any]) -> bool:
    return len(rest) == 1 and isinstance(rest[0], str) and re.fullmatch("[0-9a-f]{64}", rest[0]) is not None


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


@contextmanager
def new_folder(final: Path, scratch: Path, manifest: str) -> Iterator[Path]:
    """A folder that appears at `final` complete or not at all.

    Yields a scratch folder to write into. Its files are synced, `manifest` must be among them and is written last by
    the caller; then the folder is renamed to `final`.

    Raises:
        StoreError: `final` exists, or the disk is full.
    """
    try:
        with work_folder(scratch) as work:
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


@contextmanager
def undone_on_failure(folder: Path) -> Iterator[None]:
    """If what follows fails, takes away what it has put into a folder that was empty or not there. One that holds
    something when it begins is left alone."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    ours = bool(made) or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    except BaseException:
        if ours:
            with suppress(OSError):
                for path in list(folder.iterdir()):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
            with suppress(OSError):
                for path in made:
                    path.rmdir()
        raise


def refuse_existing(out: Path) -> None:
    """
    Raises:
        StoreError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists already; choose another folder, or remove it")


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or none any more."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries_in(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where it is not there, or not any more."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, as `entries_in`."""
    return [path for path in entries_in(folder) if path.is_dir()]


def bytes_in(folder: Path) -> int:
    """Of all files in a folder, in which some may appear and go meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def remove_folder(folder: Path, scratch: Path) -> None:
    """Deletes a folder so that no one ever sees half of it: renamed away first."""
    with work_folder(scratch) as work:
        os.rename(folder, work / "gone")
        sync(folder.parent)


@contextmanager
def work_folder(scratch: Path) -> Iterator[Path]:
    """A locked temporary folder in `scratch`, deleted on exit. The lock beside it says that it is in use, on any
    machine that shares the disk; it is there before the folder and goes after it."""
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
