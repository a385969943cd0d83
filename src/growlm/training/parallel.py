"""Parallel: ranks, processes that train one thing together, each on its share of every step's rows.

Gradients are summed over ranks before anything is made of them, so that all ranks make the same step from the same
weights. Rank 0 decides (rates, validation, the end) and writes; the others read the same text and the same store. Knows
torch.distributed and gradients; not what is trained.

torchrun, or `growlm learn --devices N`, starts the ranks and says in the environment who is who.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import growlm
from growlm.base.placement import out_of_memory, use_own_gpu
from growlm.errors import ConfigError, RankError, setting
from growlm.training.optim import rows_of

T = TypeVar("T")

_PATIENCE = timedelta(days=2)  # of those that wait while rank 0 alone works; a rank that dies is noticed at once
_BACKENDS = "cpu:gloo,cuda:nccl"
_NONE, _DENSE, _ROWS = 0, 1, 2  # kinds of gradient
_ENOUGH = -1  # no number that is called


class Calls:
    """What rank 0 asks of the others while it computes alone and they wait for its word.

    Attributes:
        answered: what answers a call of a number, where anything does.
    """

    def __init__(self) -> None:
        self.answered: Callable[[int], None] | None = None
        self.jointly = False  # all compute the same: nobody is called

    def call(self, number: int) -> None:
        """Of rank 0: the others answer a number now, unless all do so by themselves."""
        if not self.jointly:
            with peers():
                dist.broadcast(torch.tensor([number]), 0)

    def end(self, rank: int) -> None:
        """Rank 0 calls no more for now; the others answer until it does not."""
        if self.answered is None:
            return None
        if rank == 0:
            return self.call(_ENOUGH)
        number = torch.zeros(1, dtype=torch.int64)
        while True:
            with peers():
                dist.broadcast(number, 0)
            if int(number) == _ENOUGH:
                return None
            self.answered(int(number))


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: which this one is, from 0.
        size: how many there are.
        calls: what the others do for the first while they wait for it.
    """

    rank: int = 0
    size: int = 1
    calls: Calls = field(default_factory=Calls, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def parts_of(
        self, rows: np.ndarray, labels: Callable[[np.ndarray], Tensor], parts: int = 1
    ) -> Iterator[tuple[np.ndarray, float]]:
        """This rank's share of a step's rows, in parts to be computed one after another, each with how much of what all
        rows teach is in it: the weight of its mean loss.

        Args:
            labels: of rows, below 0 where they do not count.
            parts: how many there are; a part that would teach nothing is left out, but where layers of the base are
                gathered from all ranks: all of these run them equally often.
        """
        if self.size == 1 and parts == 1:
            yield rows, 1.0
            return
        counted = int((labels(rows) >= 0).sum())
        for own in np.array_split(self.share(rows), parts):
            share = int((labels(own) >= 0).sum()) / counted if len(own) else 0.0
            if share or self.calls.answered:
                yield (own if len(own) else rows[:1]), share

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This rank's part of a step's rows; empty where there are fewer rows than ranks."""
        return rows if self.size == 1 else np.array_split(rows, self.size)[self.rank]

    def first_says(self, value: T) -> T:
        """What rank 0 gives, as JSON has it; what others give is passed over."""
        return value if self.size == 1 else self.of_all(value)[0]

    def require_same(self, told: Mapping[str, object]) -> None:
        """
        Args:
            told: what has to be the same on all ranks besides versions, by what a user calls it.

        Raises:
            ConfigError: a rank has something else.
        """
        if self.size == 1:
            return
        told = {"growlm": growlm.__version__, "torch": torch.__version__, **told}
        of_all = self.of_all({"host": socket.gethostname(), **told})
        for rank, theirs in enumerate(of_all):
            different = [what for what in told if theirs[what] != of_all[0][what]]
            if different:
                told_there = "; ".join(f"{what}: {of_all[0][what]} there, {theirs[what]} here" for what in different)
                hosts = f"rank {rank} on {theirs['host']} has not what rank 0 on {of_all[0]['host']} has"
                raise ConfigError(f"{hosts} ({told_there}); start all ranks with one command, of one version of growlm")

    def require_shared(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: not all ranks see the same files there.
        """
        if self.size == 1:
            return
        name = self.first_says(f".seen-{uuid.uuid4().hex[:12]}")
        if self.first:
            (folder / name).touch()
        try:
            self.of_all(None)  # it is there by now
            seen = self.of_all({"host": socket.gethostname(), "sees": (folder / name).exists()})
        finally:
            if self.first:
                (folder / name).unlink(missing_ok=True)
        if blind := [f"rank {rank} on {one['host']}" for rank, one in enumerate(seen) if not one["sees"]]:
            raise ConfigError(
                f"{', '.join(blind)} does not see the files of rank 0 on {seen[0]['host']}: {folder} has to lie where "
                "all hosts see the same files, as on a network file system"
            )

    @contextmanager
    def jointly(self) -> Iterator[None]:
        """Within it all ranks compute the same, each on its share; outside of it rank 0 computes alone."""
        self.calls.jointly = True
        try:
            yield
        finally:
            self.calls.jointly = False

    @torch.no_grad()
    def begin_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives all ranks the numbers of rank 0, but for tensors of which each has a part of its own."""
        if self.size > 1:
            self.calls.end(self.rank)
            with peers():
                for tensor in tensors.values():
                    if not isinstance(tensor, DTensor):
                        dist.broadcast(tensor, 0)

    @torch.no_grad()
    def add_up(self, parameters: Sequence[nn.Parameter], loss: float, stop: bool) -> tuple[float, bool]:
        """Sums gradients over ranks, in place, and losses; whether any rank has been told to stop.

        Of a parameter that only some ranks have a gradient of, the others count as zeros; gradients of tables are
        joined by rows. Gradients in parts are sums already.
        """
        if self.size == 1:
            return loss, stop
        device = parameters[0].device
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        kinds = [_NONE if p.grad is None else _ROWS if p.grad.is_sparse else _DENSE for p in parameters]
        said = torch.tensor([stop, *kinds], dtype=torch.int32)
        total = torch.tensor([loss], dtype=torch.float64)
        with peers():
            dist.all_reduce(said, dist.ReduceOp.MAX)
            dist.all_reduce(total)
            kinds = said[1:].tolist()
            dense = [p for p, kind in zip(parameters, kinds, strict=True) if kind == _DENSE]
            for p in dense:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            for dtype in {p.dtype for p in dense}:
                some = [p.grad for p in dense if p.dtype == dtype and p.grad is not None]
                flat = torch.cat([g.flatten() for g in some])
                dist.all_reduce(flat)
                for g, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
                    g.copy_(part.view_as(g))
            for p in (p for p, kind in zip(parameters, kinds, strict=True) if kind == _ROWS):
                p.grad = self._joined_rows(p, device)
        return float(total), bool(said[0])

    def total(self, own: Tensor) -> Tensor:
        """The sum of what each rank has, in place."""
        if self.size > 1:
            with peers():
                dist.all_reduce(own)
        return own

    def _joined_rows(self, p: nn.Parameter, device: torch.device) -> Tensor:
        """The gradient of a table, of all ranks' rows."""
        if p.grad is None:
            rows = torch.empty(0, dtype=torch.int64, device=device)
            values = torch.empty(0, *p.shape[1:], dtype=p.dtype, device=device)
        else:
            rows, values = rows_of(p.grad)
        counts = self.of_all(len(rows))
        most = max(counts)
        if most == 0:
            return torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=False)
        padded_rows = torch.zeros(most, dtype=torch.int64, device=device)
        padded_rows[: len(rows)] = rows
        padded = torch.zeros(most, *p.shape[1:], dtype=p.dtype, device=device)
        padded[: len(rows)] = values
        of_rows = [torch.empty_like(padded_rows) for _ in counts]
        of_values = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(of_rows, padded_rows)
        dist.all_gather(of_values, padded)
        every = torch.cat([r[:n] for r, n in zip(of_rows, counts, strict=True)])
        both = torch.cat([v[:n] for v, n in zip(of_values, counts, strict=True)])
        return torch.sparse_coo_tensor(every[None], both, p.shape, check_invariants=False).coalesce()

    def of_all(self, value: object) -> list[Any]:
        """What every rank gives, as JSON has it."""
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        self.calls.end(self.rank)
        with peers():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(mine)]))
            most = max(int(size) for size in sizes)
            padded = torch.zeros(most, dtype=torch.uint8)
            padded[: len(mine)] = mine
            texts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(texts, padded)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def require_several(self, option: str) -> None:
        """
        Raises:
            ConfigError: there is nobody to share layers with, as an option says.
        """
        if self.size == 1:
            raise ConfigError(f"{option} is for several devices, and there is one; give --devices 2 or more as well")

    def require_divisor(self, batch: int) -> None:
        """
        Raises:
            ConfigError: a step's rows cannot be shared out.
        """
        if batch % self.size:
            raise ConfigError(
                f"{setting('batch_size')} is {batch}, for {self.size} devices; give a multiple of {self.size}"
            )


ALONE = Ranks()


def in_parts(tensors: Iterable[Tensor]) -> bool:
    """Whether of some of them this rank has a part, and others the rest."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into those of the same names, of which this rank may have parts. Each rank calls it with the
    same."""
    for name, tensor in tensors.items():
        full = whole[name]
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(full)


def launched() -> bool:
    """Whether this process is one of several ranks, as whoever started it says."""
    known = os.environ
    return int(known.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= known.keys()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run, once all of them are there; this process alone where nobody started others.

    Raises:
        RankError: the others cannot be reached.
    """
    if not launched() or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    on_gpus = use_own_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    with peers():
        dist.init_process_group(_BACKENDS if on_gpus else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def peers() -> Iterator[None]:
    """What torch says of ranks that are gone, in a line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error) is not None:
            raise
        raise RankError(
            "another rank has ended or cannot be reached; what it said tells why; the same command goes on from the "
            f"last checkpoint ({str(error).splitlines()[0][:200]})"
        ) from error
