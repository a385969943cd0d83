"""Runner: one pass over new tokens of many texts under many module sets, a base layer once for all of them.

Texts enter and leave at any of the base's layers: a prompt that the router is to read leaves where it reads, one whose
module branches off at layer 20 enters there. So the texts of a pass form a staircase. At each stage those that are on
it run the base's layer together, with what modules have around parts of it for their own tokens alone; before it each
module set's own layers run for its tokens (`growlm.modules.module_set.Stage`). Computes what it is told; never knows
why.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from growlm.base import Base, LayerToRun, Pass
from growlm.base.rooms import Rooms, TextCache
from growlm.base.segments import Segment
from growlm.layers.around import Shares, together
from growlm.layers.slabs import Slabs
from growlm.layers.thin import thin_products
from growlm.modules import ModuleSet
from growlm.recall.contexts import Contexts

# n new tokens of a text, t those of all texts that are on a stage, d hidden size, v vocabulary


@dataclass(eq=False)
class Work:
    """What one text does in a pass.

    Attributes:
        modules: under which it runs.
        ids: (n,) its new tokens.
        past: how many of its tokens come before them.
        cache: its keys and values, which grow in the layers that it runs.
        enters: the base layer before which it enters, with `hidden`, or at 0 with its embedded tokens.
        leaves: the base layer before which it leaves; None: behind all layers.
        keeps: base layers, from `enters` to `leaves`, of which the input is wanted.
        hidden: (1, n, d) what it enters with; then what it leaves with.
        kept: (1, n, d) the inputs that were wanted, by layer.
    """

    modules: ModuleSet
    ids: Tensor
    past: int
    cache: TextCache
    enters: int = 0
    leaves: int | None = None
    keeps: Collection[int] = ()
    hidden: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def is_on(self, stage: int) -> bool:
        return self.enters <= stage and (self.leaves is None or stage < self.leaves)


class _Staircase:
    """The texts that are on a stage: their hidden states in one row, those of one module set beside each other."""

    def __init__(self, base: Base, works: Sequence[Work]) -> None:
        self.works = works
        self.hidden = torch.cat([come_to(work) for work in works], dim=1)
        self.sizes = [len(work.ids) for work in works]
        self.groups: list[tuple[ModuleSet, list[Work]]] = []
        for work in works:
            if not self.groups or self.groups[-1][0].digest != work.modules.digest:
                self.groups.append((work.modules, []))
            self.groups[-1][1].append(work)
        self.ends, end = [], 0
        for _, own in self.groups:
            end += sum(len(work.ids) for work in own)
            self.ends.append(end)
        self._base = base
        self._passes: dict[int | None, Pass] = {}

    def shared(self, group: int | None) -> Pass:
        """The pass of all texts, or of a group's alone."""
        if group not in self._passes:
            works = self.works if group is None else self.groups[group][1]
            hidden = self.hidden if group is None else self.of(group)
            segments = [Segment(len(work.ids), work.past, work.cache) for work in works]
            self._passes[group] = self._base.pass_of_segments(hidden, segments)
        return self._passes[group]

    def of(self, group: int) -> Tensor:
        return self.hidden[:, self.ends[group - 1] if group else 0 : self.ends[group]]

    def run(self, group: int, layers: Sequence[LayerToRun]) -> Tensor:
        """A group's tokens (1, t, d) after layers that it runs alone."""
        return self._base.run(self.of(group), layers, self.shared(None if len(self.groups) == 1 else group))

    def leave(self) -> None:
        """Gives every text what it has come to."""
        for work, hidden in zip(self.works, self.hidden.split(self.sizes, dim=1), strict=True):
            work.hidden = hidden


class Runner:
    """Runs passes over one base. Between two passes it holds what was joined of the last one's module sets: `forget`
    lets go of them.

    Args:
        slabs: what low-rank differences of several module sets are copied into.
    """

    def __init__(self, base: Base, slabs: Slabs | None = None) -> None:
        self._base = base
        self._shares = Shares(Slabs() if slabs is None else slabs)
        self._joined: dict[tuple[int, tuple[str, ...]], nn.Module | None] = {}

    def forget(self) -> None:
        """Holds no module any more."""
        self._joined.clear()

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> None:
        """Runs every text from where it enters to where it leaves."""
        for work in works:
            work.cache.reserve(work.past + len(work.ids))
        self._shares.slabs.look()
        with thin_products():
            self._run(works)

    def _run(self, works: Sequence[Work]) -> None:
        base, ordered = self._base, sorted(works, key=lambda work: work.modules.digest)
        self._embed([work for work in ordered if work.hidden is None])
        used: set[tuple[int, tuple[str, ...]]] = set()
        stairs: _Staircase | None = None
        for stage in range(base.num_layers + 1):
            on = [work for work in ordered if work.is_on(stage)]
            keeping = [work for work in ordered if stage in work.keeps]
            if stairs is not None and (stairs.works != on or keeping):
                stairs.leave()
                stairs = stairs if stairs.works == on else None
            for work in keeping:
                work.kept[stage] = come_to(work).clone()  # and not the whole pass with it
            if not on:
                continue
            stairs = stairs or _Staircase(base, on)
            for modules, _ in stairs.groups:
                modules.arrive(stage)
            self._beside(stairs, stage)
            if stage < base.num_layers:
                used.add(self._layer(stairs, stage))
        if stairs is not None:
            stairs.leave()
        self._joined = {key: layer for key, layer in self._joined.items() if key in used}

    @torch.inference_mode()
    def logits(self, rows: Sequence[tuple[ModuleSet, Tensor, Contexts | None]]) -> list[Tensor]:
        """Logits (n, v) of texts, each with its module set, states (n, d) behind its last layer, and what
        `ModuleSet.project` needs of the tokens before them. The base's norm and head run once for all."""
        if not rows:
            return []
        normed = self._base.norm(torch.cat([hidden for _, hidden, _ in rows]))
        with thin_products():
            plain = self._base.head(normed)
        sizes = [len(hidden) for _, hidden, _ in rows]
        parts = zip(rows, plain.split(sizes), normed.split(sizes), strict=True)
        return [modules.finish(logits, states, contexts) for (modules, _, contexts), logits, states in parts]

    def _embed(self, works: Sequence[Work]) -> None:
        if not works:
            return
        base, sizes = self._base, [len(work.ids) for work in works]
        parts = base.embedding(torch.cat([work.ids for work in works]))[None].split(sizes, dim=1)
        for work, part in zip(works, parts, strict=True):
            places = torch.arange(work.past, work.past + len(work.ids), device=part.device)[None]
            work.hidden = base.embed_positions(work.modules.embed(part, work.ids[None]), places)

    def _beside(self, stairs: _Staircase, stage: int) -> None:
        """The module sets' own layers of a stage."""
        own = [modules.stages[stage].beside for modules, _ in stairs.groups]
        if any(own):
            parts = [stairs.run(n, layers) if layers else stairs.of(n) for n, layers in enumerate(own)]
            stairs.hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _layer(self, stairs: _Staircase, stage: int) -> tuple[int, tuple[str, ...]]:
        """The base's layer of a stage; returns under what it is kept if it is one that was joined."""
        variants: list[LayerToRun] = []
        for modules, _ in stairs.groups:
            run = modules.stages[stage].base
            assert run is not None
            variants.append(run)
        key = stage, tuple(modules.digest for modules, _ in stairs.groups)
        layer: nn.Module | None = variants[0].layer
        if any(run.layer is not layer for run in variants):
            if key not in self._joined:
                self._joined[key] = together([run.layer for run in variants], self._shares)
            layer = self._joined[key]
        if layer is None:  # they differ in more than in what stands around parts of it
            stairs.hidden = torch.cat([stairs.run(n, [run]) for n, run in enumerate(variants)], dim=1)
        else:
            self._shares.begin(key[1], stairs.ends)
            stairs.hidden = self._base.run(stairs.hidden, [variants[0]._replace(layer=layer)], stairs.shared(None))
        return key


def slot_bytes(base: Base) -> list[int]:
    """Bytes of one token's keys and values in each of the base's slots, as a token that it reads shows."""
    rooms = Rooms()
    cache = rooms.new()
    Runner(base).run([Work(ModuleSet(base), torch.zeros(1, dtype=torch.long, device=base.device), 0, cache)])
    room = cache.room
    assert room is not None
    return [(room.keys[slot].nbytes + room.values[slot].nbytes) // room.size for slot in range(base.num_layers)]


def come_to(work: Work) -> Tensor:
    """What a text enters with, or has left with: (1, n, d)."""
    assert work.hidden is not None
    return work.hidden
