"""Arrival: a module's weights on their way to a GPU, in the order in which a pass reads them.

They are copied in pieces, on a stream beside that of the engine's passes. A pass waits for those that its next layer
reads, and it waits on the GPU: what runs before runs while they are copied, the first prompt's own layers among it. A
pass that others share would hold these up: who shares one joins it once all are there. Knows bytes and stages; nothing
of modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# The first stage of a pass that reads a tensor of this name; None: it is read at any time.
StageOf = Callable[[str], int | None]
_PIECE = 8 << 20  # bytes from which a copy takes much longer than to begin it
_NEAR = 64  # bytes between two tensors, as alignment leaves them, that are rather copied than left out


class Mark(Protocol):
    """A place in a stream of work, as `torch.cuda.Event` has it."""

    def query(self) -> bool: ...

    def wait(self, stream: Any) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Bytes that are copied together.

    Attributes:
        stage: the first that reads any of them; None: they are read at any time.
        places: where they begin and end.
    """

    stage: int | None
    places: list[tuple[int, int]]

    @property
    def num_bytes(self) -> int:
        return sum(end - start for start, end in self.places)


class Arrival:
    """What is left to come.

    Args:
        marks: of each piece, in the order in which they come: the first stage that reads of it, and the place behind
            its copy.
        stream: gives the one that computes with them: of their device, which need not be the thread's.
    """

    def __init__(self, marks: Sequence[tuple[int, Mark]], stream: Callable[[], Any]) -> None:
        self._left, self._stream = list(marks), stream

    def there(self) -> bool:
        """Whether all have come."""
        self._left = [(first, mark) for first, mark in self._left if not mark.query()]
        return not self._left

    def wait(self, stage: int | None) -> bool:
        """What is computed from now on begins once the pieces are there that are read up to a stage; by default, all.
        Returns whether all are there by now."""
        if self.there():
            return True
        wanted = [mark for first, mark in self._left if stage is None or first <= stage]
        if wanted:
            wanted[-1].wait(self._stream())  # those before it are there by then
        return False


def pieces_of(tensors: Mapping[str, Tensor], start: int, stage_of: StageOf) -> list[Piece]:
    """The bytes of tensors that lie in one buffer, in the order in which they are to be copied: first those that are
    read at any time.

    Args:
        start: where the buffer begins in memory.
    """
    by_stage: dict[int | None, list[tuple[int, int]]] = {None: []}
    for name, tensor in tensors.items():
        if tensor.numel():
            at = tensor.data_ptr() - start
            by_stage.setdefault(stage_of(name), []).append((at, at + tensor.nbytes))
    pieces = [Piece(None, _merged(by_stage.pop(None)))]
    for stage in sorted(stage for stage in by_stage if stage is not None):
        last = pieces[-1]
        if last.stage is not None and last.num_bytes < _PIECE:
            pieces[-1] = Piece(last.stage, _merged([*last.places, *by_stage[stage]]))
        else:
            pieces.append(Piece(stage, _merged(by_stage[stage])))
    return pieces


def copied_beside(buffer: Tensor, pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Arrival]:
    """A copy of a buffer on a GPU, of which the first piece is there, made beside what its own stream computes."""
    with torch.cuda.device(device):
        stream, marks = _stream(device), []
        with torch.cuda.stream(stream):
            there = torch.empty_like(buffer, device=device)
            for piece in pieces:
                for start, end in piece.places:
                    there[start:end].copy_(buffer[start:end], non_blocking=True)
                marks.append(stream.record_event())
        # It is let go of while passes that read it may still be to come: its memory is not given away before these.
        there.record_stream(torch.cuda.default_stream(device))
        marks[0].synchronize()  # of the thread that reads modules alone
    rest = zip(pieces[1:], marks[1:], strict=True)
    left = [(piece.stage, mark) for piece, mark in rest if piece.stage is not None]
    return there, Arrival(left, functools.partial(torch.cuda.current_stream, device))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: memory of one stream is never given to another, and what a module leaves is for the next one."""
    return torch.cuda.Stream(device)


def _merged(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places that touch, or nearly so, as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(places):
        if found and start - found[-1][1] < _NEAR:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
