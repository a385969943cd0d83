"""Slabs: low-rank differences of several owners side by side, so that two products make those of all.

Of a matrix W, each owner's A (r, in) and B (out, r) are copied into one A (s r, in) and one B (out, s r) with a slot
for each of s owners. `A x` is computed for every token and every slot, what is not of the token's own owner is set to
zero, and one product with B adds the rest to W x. For the few tokens of a step of many texts that is far cheaper than
two small products an owner: what they cost is mostly that they are many (Punica, Chen et al. 2023, gathers them for the
same reason). The copies are made when they are first used, and take memory that may be taken back at any time. Knows
matrices and owners' names; not what they are for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from growlm.layers.thin import add_thin, best_rows, made_up

# t tokens, s slots, r columns of a slot

MOST_TOKENS = 64  # of a pass: with more of them the products of others' slots cost more than they save
MOST_OWNERS = 16

# Differences of a matrix (out, in) that add up: of each A (r, in), B (out, r), and what their product counts.
LowRank = Sequence[tuple[Tensor, Tensor, float]]


@dataclass
class _Slab:
    """Of one matrix.

    Attributes:
        a: (s, r, in).
        b: (out, s, r), each owner's times what it counts.
        holds: by slot, whose they are.
    """

    a: Tensor
    b: Tensor
    holds: list[str | None]

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass
class _Now:
    """The pass that runs: each owner's slot, the place behind its last token, and of which slots each token is not."""

    slots: tuple[int, ...] = ()
    owners: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    others: dict[tuple[int, int, tuple[bool, ...]], Tensor] = field(default_factory=dict)


class Slabs:
    """Those of one base's matrices. What an owner who is gone had in them stays until it is overwritten, cleared or in
    the way of something else.

    Args:
        room: bytes that they may take now; None for no bound.
    """

    def __init__(self, room: Callable[[], int | None] = lambda: None) -> None:
        self._room = room
        self._slabs: dict[nn.Module, _Slab] = {}
        self._slots: OrderedDict[str, int] = OrderedDict()  # of owners, the least recently used first
        self._unfit: set[tuple[nn.Module, str]] = set()  # numbers that are none would spoil what is beside them
        self._now: _Now | None = None
        self._limit: int | None = None  # what there was room for when it was looked at last
        self._looks = 0
        # Room is never asked for with it held: who asks for room may hold what tells how much there is.
        self._lock = threading.RLock()

    def num_bytes(self) -> int:
        return sum(slab.num_bytes for slab in list(self._slabs.values()))

    def clear(self) -> None:
        with self._lock:
            self._slabs.clear()
            self._slots.clear()
            self._unfit.clear()
            self._now = None

    def look(self) -> None:
        """Sees how much room there is, for what is added until the next look."""
        looks = self._looks
        room = self._room()
        with self._lock:
            if looks == self._looks:  # else others have taken some meanwhile
                self._limit = room

    def shrink(self) -> None:
        """Lets go of all where there is no room for them any more. By any thread, in the middle of a pass too."""
        room = self._room()
        with self._lock:
            self._limit, self._looks = room, self._looks + 1
            if room is not None and self.num_bytes() > room:
                self.clear()

    def begin(self, owners: Sequence[str], ends: Sequence[int]) -> None:
        """The tokens of a pass belong to these owners, who are told apart by what their differences are.

        Args:
            ends: the place behind each owner's last token.
        """
        with self._lock:
            now = self._now
            if now is None or now.owners != tuple(owners) or now.ends != tuple(ends):
                self._begin(owners, ends)

    def _begin(self, owners: Sequence[str], ends: Sequence[int]) -> None:
        self._now = None
        if len(owners) < 2 or len(owners) > MOST_OWNERS or ends[-1] > MOST_TOKENS:
            return
        for owner in owners:
            if owner in self._slots:
                self._slots.move_to_end(owner)
        for owner in owners:
            if owner not in self._slots:
                taken = set(self._slots.values())
                free = next((slot for slot in range(MOST_OWNERS) if slot not in taken), None)
                self._slots[owner] = self._slots.popitem(last=False)[1] if free is None else free
        self._now = _Now(tuple(self._slots[owner] for owner in owners), tuple(owners), tuple(ends))

    @torch.inference_mode()
    def added(self, matrix: nn.Module, hidden: Tensor, plain: Tensor, each: Sequence[LowRank | None]) -> Tensor | None:
        """What each owner's difference, if it has one, makes of `plain` (..., t, out) for its tokens `hidden`
        (..., t, in); None where that is better computed one by one."""
        with self._lock:
            return self._added(matrix, hidden, plain, each)

    def _added(self, matrix: nn.Module, hidden: Tensor, plain: Tensor, each: Sequence[LowRank | None]) -> Tensor | None:
        now = self._now
        if now is None or sum(one is not None for one in each) < 2 or plain.shape[:-1].numel() != now.ends[-1]:
            return None
        slab = self._filled(matrix, each, now)
        if slab is None:
            return None
        slots, width, num_in = slab.a.shape
        given, a, b = plain.flatten(0, -2), slab.a.view(slots * width, num_in), slab.b.view(-1, slots * width)
        few = torch.mm(a, made_up(hidden.flatten(0, -2)).t())
        few.masked_fill_(self._others(slab, tuple(one is not None for one in each), now), 0)
        return add_thin(given, b, few).view(plain.shape)

    def _filled(self, matrix: nn.Module, each: Sequence[LowRank | None], now: _Now) -> _Slab | None:
        """The slab with what each owner has of this matrix in its slot."""
        slab = self._slabs.get(matrix)
        mine = [each for each in zip(now.slots, now.owners, each, strict=True) if each[2] is not None]
        new = [own for own in mine if slab is None or own[0] >= len(slab.holds) or slab.holds[own[0]] != own[1]]
        if slab is not None and not new:
            return slab
        if any((matrix, owner) in self._unfit for _, owner, _ in new):
            return None
        slots = max(slot for slot, _, _ in mine) + 1
        width = max(sum(len(a) for a, _, _ in one or ()) for _, _, one in mine)
        if slab is None or slots > len(slab.holds) or width > slab.a.shape[1]:
            if slab is not None:
                slots, width = max(slots, len(slab.holds)), max(width, slab.a.shape[1])
                del self._slabs[matrix]
                slab = None  # before there is another
            slab, new = self._made(mine[0][2], slots, width), mine
            if slab is None:
                return None
            self._slabs[matrix] = slab
        for slot, owner, one in new:
            assert one is not None
            scaled = [(a, b * counts) for a, b, counts in one]
            if not all(_fits(part, slab.a) for parts in scaled for part in parts):
                self._unfit.add((matrix, owner))
                return None
            slab.holds[slot] = None
            slab.a[slot], slab.b[:, slot], end = 0, 0, 0
            for a, b in scaled:
                part = slice(end, end := end + len(a))
                slab.a[slot, part] = a
                slab.b[:, slot, part] = b
            slab.holds[slot] = owner
        return slab

    def _made(self, like: LowRank | None, slots: int, width: int) -> _Slab | None:
        """An empty one, if there is room for it."""
        assert like is not None
        a, b, _ = like[0]
        room = self._limit
        if room is not None and self.num_bytes() + slots * width * (a.shape[1] + len(b)) * a.itemsize > room:
            return None
        return _Slab(a.new_zeros(slots, width, a.shape[1]), b.new_zeros(len(b), slots, width), [None] * slots)

    def _others(self, slab: _Slab, has: tuple[bool, ...], now: _Now) -> Tensor:
        """(s r, t) of which slots a token is not, nor what stands behind the last one."""
        slots, width, _ = slab.a.shape
        key = slots, width, has
        if key not in now.others:
            mask = torch.ones(slots, width, best_rows(now.ends[-1]), dtype=torch.bool, device=slab.a.device)
            start = 0
            for end, slot, one in zip(now.ends, now.slots, has, strict=True):
                if one:
                    mask[slot, :, start:end] = False
                start = end
            now.others[key] = mask.flatten(0, 1)
        return now.others[key]


def _fits(part: Tensor, like: Tensor) -> bool:
    return part.dtype == like.dtype and bool(part.isfinite().all())
