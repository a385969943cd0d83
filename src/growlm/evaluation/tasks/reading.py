"""Reading: where a task's rows come from, a folder of JSONL files or the hub. Knows no task and no harness.

With the environment variable `GROWLM_TASK_DATA` the data of every task is `$GROWLM_TASK_DATA/FOLDER/SPLIT.jsonl` and
nothing is asked of the network; without it, the hub is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from growlm.errors import DataError

VARIABLE = "GROWLM_TASK_DATA"
# What a file may be called, best first, for a split of the hub.
_VALIDATION = ("validation", "valid", "val")
_SPELLINGS = {"test": ("test", *_VALIDATION), "train": ("train", "dev"), "dev": ("dev", "train")}

Located = tuple[str, Mapping[str, Any]]  # where the row stands, and the row


def read_rows(folder: str, hub: str, config: str | None, split: str) -> tuple[str, Iterator[Located]]:
    """Rows of one split, and where they are from.

    Args:
        folder: of the task, in the user's folder of data.
        hub: name of the data set on the hub, such as "cais/mmlu".
        config: its configuration; all of them, in the order of their names, if None.
        split: as the hub calls it.

    Raises:
        DataError: where there is no such folder, file or data set, or a line is no JSON object.
    """
    if root := os.environ.get(VARIABLE):
        path = local_file(Path(root), folder, split)
        return str(path), _local_rows(path)
    return f"hub:{hub}", _hub_rows(hub, config, split)


def local_file(root: Path, folder: str, split: str) -> Path:
    """The file of a split under the user's folder of data; raises `DataError` if there is none."""
    wanted = root / folder
    names = [f"{name}.jsonl" for name in _spellings(split)]
    if not wanted.is_dir():
        found = f"no folder {folder!r} in it" if root.is_dir() else "no such folder"
        advice = f"make {wanted} with {names[0]}, or unset {VARIABLE} to read the hub"
        raise DataError(f"{VARIABLE}={root}: {found}; {advice}")
    for name in names:
        if (wanted / name).is_file():
            return wanted / name
    raise DataError(f"{wanted}: no {' or '.join(names)} in it; add one, or unset {VARIABLE} to read the hub")


def documents(rows: Iterable[Located], convert: Callable[[Mapping[str, Any]], Any]) -> list[dict[str, Any]]:
    """Every row converted; an error of `convert` gets the place of the row in front."""
    found = []
    for where, row in rows:
        try:
            found.append(dict(convert(row)))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return found


def _spellings(split: str) -> tuple[str, ...]:
    return _SPELLINGS.get(split, (*_VALIDATION, "test"))


def _local_rows(path: Path) -> Iterator[Located]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"{path}: cannot be read ({reason}); correct the file or its permissions") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); every line must be one JSON object") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: of type {type(row).__name__}; every line must be one JSON object")
        yield f"{path}:{number}", row


def _hub_rows(hub: str, config: str | None, split: str) -> Iterator[Located]:
    import datasets

    try:
        for name in [config] if config else sorted(datasets.get_dataset_config_names(hub)):
            for number, row in enumerate(datasets.load_dataset(hub, name, split=split), 1):
                yield f"hub:{hub}:{name}:{split}:{number}", with_subject(row, name)
    except Exception as error:  # no common class: hub, network, cache and format errors all end here
        reason = " ".join(str(error).split())[:200]
        advice = f"check your network, or give local files with {VARIABLE}=DIR"
        raise DataError(f"hub:{hub}: split {split!r} cannot be loaded ({reason}); {advice}") from error


def with_subject(row: Mapping[str, Any], config: str) -> Mapping[str, Any]:
    """A data set with a configuration a subject says it nowhere else: C-Eval."""
    if row.get("subject") or row.get("type"):
        return row
    return {**row, "subject": config}
