"""Runs: where a training keeps what it needs to go on, one process at a time. Knows folders; not what is trained."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growlm.base.placement import Placement
from growlm.disk.files import bytes_in, locked, write_atomic
from growlm.errors import ConfigError, IntegrityError, NotBetterError, StoreError, TrainingError
from growlm.progress import say
from growlm.store import REFUSED, Store
from growlm.training.checkpoints import saved_step
from growlm.training.config import ModuleTrainConfig
from growlm.training.parallel import ALONE, Ranks
from growlm.units import format_size

_ROWS = "text.sha256"


@contextmanager
def run_folder(folder: Path, busy: str, *, restart: bool) -> Iterator[Path]:
    """`folder`, for the checkpoints of one run, which goes when the run has ended; an interrupted one stays.

    Args:
        busy: what to say if another process is at the same run.
        restart: forget what an earlier process of the same run has done.

    Raises:
        StoreError: another process is at the same run.
    """
    with locked(folder.with_name(f"{folder.name}.lock"), wait=False, keep=False) as mine:
        if not mine:
            raise StoreError(f"{busy}; wait for it")
        _drop_refused(folder)
        if restart:
            empty(folder)
        if done := saved_step(folder):
            say(f"going on after step {done} of an earlier run (--restart begins anew)")
        elif not restart:
            _tell_others(folder)
        try:
            yield folder
        except TrainingError:
            shutil.rmtree(folder, ignore_errors=True)  # the same run would end the same
            raise
        except NotBetterError:
            if folder.exists():  # what trains nothing leaves nothing
                # --admit-anyway goes on from here; the next run under the name takes it away.
                (folder / REFUSED).touch()
                say(
                    f"{format_size(bytes_in(folder))} are kept, with which the same command and --admit-anyway saves it"
                )
            raise
        shutil.rmtree(folder, ignore_errors=True)


def require_same_rows(folder: Path, rows: np.ndarray, begin: Sequence[int]) -> None:
    """What a run began with it goes on with: rows are cut as this version of growlm cuts them.

    Args:
        rows: (N, T + 1) that are trained on.
        begin: what each begins with; before there was a record of them, rows without any were the same.

    Raises:
        ConfigError: a stopped run in the folder has read others.
    """
    record, ends = folder / _ROWS, rows[:, [0, -1]]  # which other cuts would change, and a start token alone would not
    found = hashlib.sha256(f"{rows.shape} ".encode() + ends.tobytes()).hexdigest()
    if not saved_step(folder):
        write_atomic(record, found.encode())
        return
    same = record.read_text() == found if record.exists() else not begin
    if not same:
        raise ConfigError(
            f"{folder}: this run was begun by another version of growlm, which cuts the text into other rows; use "
            "--restart to begin anew"
        )


def _drop_refused(folder: Path) -> None:
    """Takes away what other runs under the same name have left that were not admitted."""
    for other in _others(folder):
        if (other / REFUSED).is_file():
            with locked(other.with_name(f"{other.name}.lock"), wait=False, keep=False) as mine:
                if mine:  # else it is being admitted after all
                    shutil.rmtree(other, ignore_errors=True)


def _tell_others(folder: Path) -> None:
    """Says which other runs under the same name there are, that this one does not go on from."""
    for other in _others(folder):
        with suppress(IntegrityError, OSError):  # what others have left, or take away meanwhile
            if done := saved_step(other):
                say(
                    f"begins anew: another run of this name, which has come to step {done}, has other settings, data, "
                    f"threads or devices, or begins from another version; {other} ({format_size(bytes_in(other))}) is "
                    "of use to that one alone"
                )


def _others(folder: Path) -> list[Path]:
    """Folders of other runs under the same name."""
    name, dash, _ = folder.name.rpartition("-")
    found = sorted(folder.parent.glob(f"{glob.escape(name)}-*")) if dash else []
    return [each for each in found if each != folder and each.is_dir() and each.name.rpartition("-")[0] == name]


def empty(folder: Path) -> None:
    """Forgets what a run keeps to go on. The folder itself stays where there is one: it says that the run has not
    ended."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def folder_of(store: Store, name: str, run: str) -> Path:
    """Where the training of a module keeps what it needs."""
    return store.work / f"{name}-{run[:16]}"


def module_run(
    store: Store, what: Sequence[Any], config: ModuleTrainConfig, placement: Placement, ranks: Ranks = ALONE
) -> str:
    """Tells a module's training from every other: what decides its result, and nothing else.

    Args:
        what: begins from which state, on which text.
        placement: what the config's device and precision have come to.
        ranks: that train it together; how many decides in which order gradients are summed.
    """
    settings = config.to_json()
    for key in ("checkpoint_seconds", "feature_cache", "keep_samples", "precision", "admit_anyway"):
        settings.pop(key)
    where: list[Any] = [placement.device.type, str(placement.dtype), torch.get_num_threads()]
    where += [ranks.size] if ranks.size > 1 else []
    parts = [*what, settings, store.manifest.base_fingerprint, *where]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
