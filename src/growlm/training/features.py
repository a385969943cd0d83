"""Features: what the base's lower layers say of every training row, computed once and kept on disk.

Rows are bfloat16 whether they come from the disk or were just computed, so that training does not depend on which.
Knows rows by number; does not know what a row is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growlm.files import as_bytes


class FeatureCache:
    """Rows (t, d) on disk, bounded in bytes: the first rows that fit are kept, others are computed each time.

    Made anew by every process: what a killed one left is not trusted.
    """

    def __init__(self, path: Path, num_rows: int, shape: tuple[int, int], limit: int) -> None:
        self._shape = shape
        self._row_bytes = 2 * shape[0] * shape[1]
        self._kept = np.zeros(num_rows, dtype=bool)
        self._room = min(num_rows, limit // self._row_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def get(self, rows: np.ndarray, compute: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Rows by number, (b, t, d) bfloat16; `compute` gives those that are not on disk."""
        kept = self._kept[rows]
        out = torch.empty(len(rows), *self._shape, dtype=torch.bfloat16)
        if not kept.all():
            missing = rows[~kept]
            # A row at a time: matrix products of other shapes may end in other bits, and a resumed run batches anew.
            fresh = torch.cat([compute(missing[i : i + 1]) for i in range(len(missing))]).to("cpu", torch.bfloat16)
            out[torch.from_numpy(~kept)] = fresh
            for row, value in zip(missing.tolist(), fresh, strict=True):
                self._keep(row, value)
        for at in np.flatnonzero(kept).tolist():
            buffer = as_bytes(out[at])
            count = os.preadv(self._file, [buffer], int(rows[at]) * self._row_bytes)
            assert count == self._row_bytes
        return out

    def _keep(self, row: int, value: Tensor) -> None:
        if row >= self._room:
            return
        content = as_bytes(value.contiguous())
        try:
            count = os.pwrite(self._file, content, row * self._row_bytes)
        except OSError:
            self._room = 0  # a full disk costs speed, not the run
            return
        self._kept[row] = count == self._row_bytes

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)
