"""Files: tensors are read back exactly or refused, and what is written is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from disk import largest_file
from growlm.disk import files
from growlm.disk.files import (
    HashMemo,
    bytes_in,
    clear_scratch,
    locked,
    new_folder,
    raise_if_full,
    remove_folder,
    sha256_file,
    write_atomic,
)
from growlm.disk.tensors import write_tensors
from growlm.errors import StoreError
from interruptions import fresh


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.exists()
    }


# Writing


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "deep" / "f.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert contents(tmp_path) == {"deep": None, "deep/f.json": b"new"}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_what_is_written_has_the_permissions_of_a_plain_file(tmp_path, monkeypatch, mask):
    """The mask belongs to the whole process: other threads must not see it changed."""
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            break_call(patch, "umask", AssertionError("the mask was changed"))
            write_atomic(tmp_path / "a", b"x")
            write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)})
            make_folder(tmp_path / "folder", tmp_path / "scratch")
        (tmp_path / "plain").write_bytes(b"x")
        (tmp_path / "plain-folder").mkdir()
    finally:
        os.umask(before)

    def mode(name: str) -> str:
        return oct((tmp_path / name).stat().st_mode)

    assert mode("a") == mode("t.safetensors") == mode("folder/data") == mode("plain")
    assert mode("folder") == mode("plain-folder")


def break_call(monkeypatch, name: str, error: BaseException) -> None:
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, name, broken)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=repr)
def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch, call, error):
    write_atomic(tmp_path / "f", b"old")
    with monkeypatch.context() as patch:
        break_call(patch, call, error)
        with pytest.raises(type(error)):
            write_atomic(tmp_path / "f", b"new")
    assert contents(tmp_path) == {"f": b"old"}


def test_write_atomic_never_shows_a_part(tmp_path, monkeypatch):
    """Whenever the operating system is asked for something, the file holds the old bytes or the new ones."""
    path, seen = tmp_path / "f", set()
    write_atomic(path, b"old")
    for call in ("fsync", "replace"):
        original = getattr(os, call)

        def watched(*args, original=original):
            seen.add(path.read_bytes())
            result = original(*args)
            seen.add(path.read_bytes())
            return result

        monkeypatch.setattr(os, call, watched)
    os.link(path, tmp_path / "old")
    write_atomic(path, b"new" * 1000)
    assert seen == {b"old", b"new" * 1000}
    assert (tmp_path / "old").read_bytes() == b"old"  # the old file was not written to


def test_write_atomic_on_a_full_disk_says_how_much_was_asked_for(tmp_path):
    write_atomic(tmp_path / "f", b"old")
    with largest_file(1000), pytest.raises(StoreError, match="no room to write 5,000 bytes"):
        write_atomic(tmp_path / "f", bytes(5000))
    assert contents(tmp_path) == {"f": b"old"}


def test_write_tensors_on_a_full_disk_says_how_much_was_asked_for(tmp_path):
    with largest_file(10_000), pytest.raises(StoreError, match="no room to write 400,000 bytes") as caught:
        write_tensors(tmp_path / "t.safetensors", {"w": torch.zeros(100_000)})
    assert "free" in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_told_apart_from_other_errors(tmp_path, number):
    with pytest.raises(StoreError, match=r"1,234 bytes .* nothing was changed"):
        raise_if_full(OSError(number, "full"), tmp_path / "f", 1234)
    raise_if_full(OSError(errno.EIO, "broken"), tmp_path / "f", 1234)
    raise_if_full(ValueError("other"), tmp_path / "f", 1234)


# Folders


def make_folder(final: Path, scratch: Path) -> None:
    with new_folder(final, scratch, "m.json") as folder:
        (folder / "data").write_bytes(b"data")
        assert not final.exists()
        (folder / "m.json").write_bytes(b"{}")


def test_new_folder_appears_complete(tmp_path):
    make_folder(tmp_path / "deep" / "final", tmp_path / "scratch")
    assert contents(tmp_path) == {
        "deep": None,
        "deep/final": None,
        "deep/final/data": b"data",
        "deep/final/m.json": b"{}",
        "scratch": None,
    }


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_new_folder_leaves_nothing_after_an_exception(tmp_path, error):
    def fail() -> None:
        with new_folder(tmp_path / "final", tmp_path / "scratch", "m.json") as folder:
            (folder / "m.json").write_bytes(b"{}")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert contents(tmp_path) == {"scratch": None}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_new_folder_leaves_nothing_when_the_disk_fails(tmp_path, monkeypatch, call):
    break_call(monkeypatch, call, OSError(errno.EIO, "input/output error"))
    with pytest.raises(OSError, match="input/output"):
        make_folder(tmp_path / "final", tmp_path / "scratch")
    assert contents(tmp_path) == {"scratch": None}


def test_new_folder_without_its_manifest_does_not_appear(tmp_path):
    with pytest.raises(AssertionError), new_folder(tmp_path / "final", tmp_path / "scratch", "m.json") as folder:
        (folder / "data").write_bytes(b"data")
    assert contents(tmp_path) == {"scratch": None}


def test_new_folder_does_not_replace_another(tmp_path):
    make_folder(tmp_path / "final", tmp_path / "scratch")
    before = contents(tmp_path)
    with (
        pytest.raises(StoreError, match="exists already"),
        new_folder(tmp_path / "final", tmp_path / "scratch", "m.json") as folder,
    ):
        (folder / "m.json").write_bytes(b"other")
    assert contents(tmp_path) == before


def test_new_folder_on_a_full_disk(tmp_path):
    with (
        largest_file(1000),
        pytest.raises(StoreError, match="no room"),
        new_folder(tmp_path / "final", tmp_path / "scratch", "m.json") as folder,
    ):
        (folder / "m.json").write_bytes(bytes(5000))
    assert contents(tmp_path) == {"scratch": None}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and the folder are synced before the rename, and the folder that holds the new name after it."""
    events: list[tuple[str, object]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(handle):
        events.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def watched_rename(source, target):
        inodes = {p.stat().st_ino for p in [Path(source), *Path(source).iterdir()]}
        rename(source, target)
        events.append(("rename", inodes))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    make_folder(tmp_path / "deep" / "final", tmp_path / "scratch")
    (at,) = [i for i, (kind, _) in enumerate(events) if kind == "rename"]
    assert len(events[at][1]) == 3
    assert events[at][1] <= {inode for _, inode in events[:at]}
    assert ("sync", (tmp_path / "deep").stat().st_ino) in events[at + 1 :]


def synced(monkeypatch) -> set[Path]:
    """The files and folders that were waited for until they were on the disk."""
    seen: set[Path] = set()
    fsync = os.fsync

    def watched(handle):
        seen.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


def test_the_name_of_every_new_folder_is_on_the_disk(tmp_path, monkeypatch):
    seen = synced(monkeypatch)
    make_folder(tmp_path / "modules" / "law" / "1", tmp_path / "scratch")
    assert {tmp_path / "modules" / "law", tmp_path / "modules", tmp_path} <= seen
    seen.clear()
    write_atomic(tmp_path / "new" / "deep" / "f", b"x")
    assert {tmp_path / "new" / "deep", tmp_path / "new", tmp_path} <= seen


def test_remove_folder_leaves_nothing(tmp_path):
    make_folder(tmp_path / "final", tmp_path / "scratch")
    remove_folder(tmp_path / "final", tmp_path / "scratch")
    assert contents(tmp_path) == {"scratch": None}


def die_while(doing: str, home: Path) -> None:
    """Kills this process while it writes or removes a folder."""
    if doing == "remove":
        make_folder(home / "final", home / "scratch")
        files.shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        remove_folder(home / "final", home / "scratch")
    with new_folder(home / "final", home / "scratch", "m.json") as folder:
        (folder / "data").write_bytes(b"data")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("doing", ["write", "remove"])
def test_clear_scratch_takes_what_dead_processes_left(tmp_path, doing):
    process = fresh.Process(target=die_while, args=(doing, tmp_path))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert any((tmp_path / "scratch").iterdir())
    clear_scratch(tmp_path / "scratch")
    assert contents(tmp_path) == {"scratch": None}


def test_clear_scratch_does_not_believe_process_ids(tmp_path, monkeypatch):
    """Containers and machines that share a disk have the same ones, for other processes."""
    scratch = tmp_path / "scratch"
    (scratch / f"{os.getpid()}-left").mkdir(parents=True)
    (scratch / "left.lock").write_bytes(b"")
    ended = fresh.Process(target=int)
    ended.start()
    ended.join()
    monkeypatch.setattr(os, "getpid", lambda: ended.pid)
    with new_folder(tmp_path / "final", scratch, "m.json") as folder:
        (folder / "m.json").write_bytes(b"{}")
        clear_scratch(scratch)
        assert contents(scratch) == {
            folder.name: None,
            f"{folder.name}/m.json": b"{}",
            f"{folder.name}.lock": b"",
        }
    assert contents(tmp_path) == {"final": None, "final/m.json": b"{}", "scratch": None}


def test_clear_scratch_leaves_files_alone_and_needs_no_folder(tmp_path):
    clear_scratch(tmp_path / "absent")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    clear_scratch(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def write_many(home: Path, name: str) -> None:
    for i in range(30):
        clear_scratch(home / "scratch")
        make_folder(home / "done" / f"{name}-{i}", home / "scratch")


def test_processes_that_write_and_clear_at_once_do_not_disturb_each_other(tmp_path):
    processes = [fresh.Process(target=write_many, args=(tmp_path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "done").glob("*/m.json"))) == 90
    assert contents(tmp_path / "scratch") == {}


# Locks


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "deep" / "lock"
    with locked(path) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=False) as third:
        assert third


def test_a_lock_waits_for_its_holder(tmp_path):
    order, held = [], threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            held.set()
            threading.Event().wait(0.2)
            order.append("holder done")

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    with locked(tmp_path / "lock"):
        order.append("waiter")
    holder.join()
    assert order == ["holder done", "waiter"]


def test_a_lock_is_free_after_an_exception(tmp_path):
    with pytest.raises(ValueError, match="x"), locked(tmp_path / "lock"):
        raise ValueError("x")
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def hold_and_die(path: Path) -> None:
    with locked(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_dies_with_its_process(tmp_path):
    process = fresh.Process(target=hold_and_die, args=(tmp_path / "lock",))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


# Hashes that are remembered


@pytest.fixture
def counted(monkeypatch) -> list[Path]:
    """Files that were hashed in full."""
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(files, "sha256_file", counting)
    return read


def test_hash_memo_reads_an_unchanged_file_once(tmp_path, counted):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    memo = HashMemo(tmp_path / "memo.json")
    assert [memo.sha256(path), memo.sha256(path)] == [digest, digest]
    assert HashMemo(tmp_path / "memo.json").sha256(path) == digest
    assert counted == [path]


def test_hash_memo_notices_a_changed_file(tmp_path, counted):
    path = tmp_path / "weights"
    memo = HashMemo(tmp_path / "memo.json")
    path.write_bytes(b"one")
    memo.sha256(path)

    path.write_bytes(b"two")  # of the same size, in place
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert memo.sha256(path) == hashlib.sha256(b"two").hexdigest()

    stamp = path.stat()
    (tmp_path / "other").write_bytes(b"six")  # of the same size and time, another file
    os.utime(tmp_path / "other", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (tmp_path / "other").rename(path)
    assert HashMemo(tmp_path / "memo.json").sha256(path) == hashlib.sha256(b"six").hexdigest()

    path.write_bytes(b"three")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same time, another size
    assert HashMemo(tmp_path / "memo.json").sha256(path) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "{}"])
def test_hash_memo_survives_a_spoilt_memory(tmp_path, content):
    (tmp_path / "memo.json").write_text(content)
    (tmp_path / "weights").write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    assert HashMemo(tmp_path / "memo.json").sha256(tmp_path / "weights") == digest


def test_hash_memo_survives_a_spoilt_entry(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digest = HashMemo(tmp_path / "memo.json").sha256(path)
    good = json.loads((tmp_path / "memo.json").read_text())
    for entry in ([], None, "x", next(iter(good.values()))[:3]):
        (tmp_path / "memo.json").write_text(json.dumps(dict.fromkeys(good, entry)))
        assert HashMemo(tmp_path / "memo.json").sha256(path) == digest


def test_hash_memo_works_where_nothing_can_be_written(tmp_path):
    (tmp_path / "weights").write_bytes(b"one")
    (tmp_path / "file").write_bytes(b"")
    memo = HashMemo(tmp_path / "file" / "memo.json")
    assert memo.sha256(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()


def test_files_that_go_while_they_are_counted_count_nothing(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"4567")
    assert bytes_in(tmp_path) == 7
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert bytes_in(tmp_path) == 7
    assert bytes_in(tmp_path / "nowhere") == 0
