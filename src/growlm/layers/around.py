"""Around: what stands around a frozen module and changes its result, so that rows of several owners can share it.

Where the tokens of a batch belong to different owners, the frozen module reads all of them at once, and what each owner
adds is computed for its own tokens alone (as S-LoRA does for low-rank differences, Sheng et al. 2023). Knows modules
that map tokens (..., t, d) to tokens; not what they are for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from growlm.layers.slabs import LowRank, Slabs

# t tokens of all owners


class Around(nn.Module, ABC):
    """A module (..., d) -> (..., e) of which `inner` is the frozen part."""

    @property
    @abstractmethod
    def frozen(self) -> nn.Module:
        """The module around which this one stands."""

    @property
    def reads_frozen(self) -> bool:
        """Whether the frozen module's result counts."""
        return True

    @abstractmethod
    def finish(self, hidden: Tensor, plain: Tensor | None) -> Tensor:
        """The result for `hidden`, of which the frozen module makes `plain`; None where that is not read."""

    def low_rank(self) -> LowRank | None:
        """What it adds to a matrix's result, where that is all it does and made of products of two thin matrices."""
        return None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.finish(hidden, result(self.frozen(hidden)) if self.reads_frozen else None)


def result(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a module made of hidden states: routed experts give their routing as well."""
    return given[0] if isinstance(given, tuple) else given


class Shares:
    """Which of a batch's tokens are whose: `ends` (owners,), the places behind each owner's last token.

    Args:
        slabs: what low-rank differences of several owners are copied into.
    """

    def __init__(self, slabs: Slabs) -> None:
        self.ends: tuple[int, ...] = ()
        self.slabs = slabs

    def begin(self, owners: Sequence[str], ends: Sequence[int]) -> None:
        """A pass over tokens of these owners, who are told apart by what they have around modules."""
        self.ends = tuple(ends)
        self.slabs.begin(owners, ends)


class Together(nn.Module):
    """A frozen module with what several owners have around it, each for its own tokens.

    Args:
        around: of each owner; None where it runs the frozen module as it is.
    """

    def __init__(self, frozen: nn.Module, around: Sequence[Around | None], shares: Shares) -> None:
        super().__init__()
        self._frozen, self._around, self._shares = (frozen,), tuple(around), shares
        low_rank = [None if one is None else one.low_rank() for one in around]
        others = any(one is not None and low is None for one, low in zip(around, low_rank, strict=True))
        self._low_rank = None if others else low_rank

    def forward(self, hidden: Tensor) -> Tensor:
        ends = self._shares.ends
        sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        plain: Sequence[Tensor | None] = [None] * len(ends)
        if any(one is None or one.reads_frozen for one in self._around):
            of_all = result(self._frozen[0](hidden))
            if self._low_rank is not None:
                added = self._shares.slabs.added(self._frozen[0], hidden, of_all, self._low_rank)
                if added is not None:
                    return added
            plain = of_all.split(sizes, dim=-2)
        parts = []
        for one, own, made in zip(self._around, hidden.split(sizes, dim=-2), plain, strict=True):
            if one is not None:
                made = one.finish(own, made if one.reads_frozen else None)
            assert made is not None
            parts.append(made)
        return torch.cat(parts, dim=-2)


def together(variants: Sequence[nn.Module], shares: Shares) -> nn.Module | None:
    """One module that runs each owner's variant of the same module on its own tokens, and what all share on all of
    them; None where the variants differ in more than in what stands around parts of it."""
    first = variants[0]
    if all(each is first for each in variants):
        return first
    around = [each if isinstance(each, Around) else None for each in variants]
    if any(one is not None for one in around):
        inner = together([v.frozen if isinstance(v, Around) else v for v in variants], shares)
        return None if inner is None else Together(inner, around, shares)
    if any(type(each) is not type(first) or not _alike(each, first) for each in variants):
        return None
    joined: dict[str, nn.Module | None] = {}
    for name, part in first._modules.items():
        parts = [each._modules[name] for each in variants]
        if part is None or any(p is None for p in parts):
            if any(p is not part for p in parts):
                return None
            joined[name] = part
            continue
        made = together([p for p in parts if p is not None], shares)
        if made is None:
            return None
        joined[name] = made
    return variant(first, joined)


def variant(module: nn.Module, parts: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module that is as another one but for some of its parts, and shares all else with it: parameters, hooks, other
    parts. Not by `copy.copy`, which asks the class: one whose parameters lie on several devices (FSDP2) makes a new
    module instead."""
    made = object.__new__(type(module))
    made.__dict__ = {**module.__dict__, "_modules": {**module._modules, **parts}}
    return made


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are the same but for their parts: shallow copies of one, which hold the same objects."""
    if one._modules.keys() != other._modules.keys():
        return False
    mine, theirs = (_held(module) for module in (one, other))
    return mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


def _held(module: nn.Module) -> dict[str, object]:
    """All that a module holds besides its parts, and notes of who made a variant of it."""
    return {name: value for name, value in vars(module).items() if name != "_modules" and "_growlm_" not in name}
