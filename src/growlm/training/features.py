"""Features: what the base's lower layers say of every training row, computed once and kept on disk.

Rows have the dtype of the run's matrix products, as they were computed: training does not depend on where one is from.
Knows rows by number; does not know what a row is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growlm.disk.tensors import as_bytes


class FeatureCache:
    """Rows (t, d) on disk, bounded in bytes: the first rows that fit are kept, others are computed each time.

    Made anew by every process: what a killed one left is not trusted.

    Args:
        limit: bytes that it may take.
        reserve: bytes of the disk that it leaves free for what matters more.
    """

    def __init__(
        self, path: Path, num_rows: int, shape: tuple[int, int], dtype: torch.dtype, *, limit: int, reserve: int
    ) -> None:
        self._shape, self._dtype, self._reserve = shape, dtype, reserve
        self._row_bytes = dtype.itemsize * shape[0] * shape[1]
        self._kept = np.zeros(num_rows, dtype=bool)
        self._room = min(num_rows, limit // self._row_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    @property
    def room(self) -> int:
        """How many rows there is room for, the first ones."""
        return self._room

    @property
    def num_bytes(self) -> int:
        """What it takes of the disk once those are kept."""
        return self._room * self._row_bytes

    def get(self, rows: np.ndarray, compute: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Rows by number, (b, t, d) in main memory; `compute` gives those that are not on disk."""
        kept = self._kept[rows]
        out = torch.empty(len(rows), *self._shape, dtype=self._dtype)
        if not kept.all():
            missing = rows[~kept]
            # A row at a time: matrix products of other shapes may end in other bits, and a resumed run batches anew.
            fresh = torch.cat([compute(missing[i : i + 1]) for i in range(len(missing))]).to("cpu", self._dtype)
            out[torch.from_numpy(~kept)] = fresh
            for row, value in zip(missing.tolist(), fresh, strict=True):
                self._keep(row, value)
        for at in np.flatnonzero(kept).tolist():
            buffer = as_bytes(out[at])
            count = os.preadv(self._file, [buffer], int(rows[at]) * self._row_bytes)
            assert count == self._row_bytes
        return out

    def forget(self, rows: np.ndarray) -> None:
        """Rows by number, to be computed anew."""
        self._kept[rows] = False

    def _keep(self, row: int, value: Tensor) -> None:
        if row >= self._room:
            return
        try:
            if shutil.disk_usage(self._path.parent).free - self._row_bytes < self._reserve:
                self._room = 0  # too little room costs speed, not the run, whose checkpoints are still to come
                return
            count = os.pwrite(self._file, as_bytes(value.contiguous()), row * self._row_bytes)
        except OSError:
            self._room = 0
            return
        self._kept[row] = count == self._row_bytes

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)
