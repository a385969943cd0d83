"""Runs: where a training keeps what it needs to go on, one process at a time. Knows folders; not what is trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from growlm.errors import StoreError, TrainingError
from growlm.files import locked
from growlm.store import Store
from growlm.training.loop import saved_step
from growlm.training.progress import say


@contextmanager
def run_folder(store: Store, name: str, run: str, *, restart: bool, progress: bool | None) -> Iterator[Path]:
    """A folder for the checkpoints of one run, which goes when the run has ended; an interrupted one stays.

    Args:
        name: what is trained, for people.
        run: tells the run from every other.
        restart: forget what an earlier process of the same run has done.

    Raises:
        StoreError: another process is at the same run.
    """
    folder = store.path / "work" / f"{name}-{run[:16]}"
    with locked(folder.with_name(f"{folder.name}.lock"), wait=False, keep=False) as mine:
        if not mine:
            raise StoreError(f"{store.path}: the same learning of {name!r} is running already; wait for it")
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        if done := saved_step(folder):
            say(f"{name}: going on after step {done} of an earlier run (--restart begins anew)", progress)
        try:
            yield folder
        except TrainingError:
            shutil.rmtree(folder, ignore_errors=True)  # the same run would end the same
            raise
        shutil.rmtree(folder, ignore_errors=True)
