"""Choosing: which experts stay, by how often a text chose them (ModuleFormer, section 5.3 and appendix D.2).

Knows counts and sizes; not where experts lie, nor how they are taken out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from growlm.errors import ConfigError

NORMALISATIONS = ("max", "sum")


@dataclass(frozen=True)
class Candidates:
    """One router, as pruning sees it.

    Attributes:
        counts: (e,) how often it chose each of its experts.
        first: experts from this one on may go; those before are another's and stay.
        size: parameters that one expert takes.
        min_kept: so many stay of those that may go, however little they are used.
    """

    counts: Tensor
    first: int
    size: int
    min_kept: int

    @property
    def num_removable(self) -> int:
        return len(self.counts) - self.first


def check_share(keep: float, normalise: str) -> None:
    """
    Raises:
        ConfigError: a share that is none, or a normalisation that does not exist.
    """
    if normalise not in NORMALISATIONS:
        raise ConfigError(f"normalise is {normalise!r}, expected {' or '.join(NORMALISATIONS)}")
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; it is a share of all parameters, above 0 and at most 1")


def choose(routers: Sequence[Candidates], *, total: int, keep: float, normalise: str) -> list[list[int]]:
    """Of each router's experts that may go, those that stay, ascending and counted from the first of them.

    Every expert's count is divided by the largest of its router (`max`) or by their sum (`sum`), those of experts that
    may not go included; the experts of all routers are then taken in that order until the share `keep` of `total`
    parameters is reached.

    Raises:
        ConfigError: more parameters than that stay whatever goes; says how many.
    """
    ranked: list[tuple[float, int, int]] = []
    kept: list[set[int]] = []
    left = total
    for index, router in enumerate(routers):
        counts = router.counts.double()
        scores = (counts / (counts.max() if normalise == "max" else counts.sum()).clamp_min(1))[router.first :]
        order = scores.argsort(descending=True, stable=True).tolist()
        kept.append(set(order[: router.min_kept]))
        ranked += [(float(scores[e]), index, e) for e in order[router.min_kept :]]
        left -= router.size * (router.num_removable - len(kept[index]))
    if left > keep * total:
        share = math.ceil(100 * left / total) / 100  # rounded down it could not be reached either
        raise ConfigError(
            f"keep is {keep}; with as many experts in every layer as it needs, {share:.2f} of the parameters stay; "
            "give at least that"
        )
    for _, index, expert in sorted(ranked, key=lambda r: (-r[0], r[1], r[2])):
        if left + routers[index].size > keep * total:
            break
        kept[index].add(expert)
        left += routers[index].size
    return [sorted(k) for k in kept]
