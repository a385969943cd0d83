"""Second look: whether the module that a router chose reads the beginning of a text better than the base alone.

A router tells what a text looks like, not whether its module helps: examination questions of a neighbouring subject
look like the domain's, and the module has nothing to say to them. Knows module sets and token ids; chooses no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from growlm.modules import ModuleSet
from growlm.modules.scoring import paired_losses

if TYPE_CHECKING:
    from growlm.engine.engine import Engine

LONGEST = 64  # tokens of a text that are read


@torch.inference_mode()
def reads_better(modules: ModuleSet, texts: Sequence[Sequence[int]]) -> list[bool]:
    """Whether the modules give the first tokens of each text, `LONGEST` at most, a higher probability than the base
    alone does. Of a single token nothing can be said, and they keep it."""
    several = [number for number, text in enumerate(texts) if len(text) > 1]
    better = [True] * len(texts)
    if several:
        modules.arrive()
        some = [list(texts[number][:LONGEST]) for number in several]
        alone, with_modules = paired_losses([ModuleSet(modules.base), modules], some)
        for number, gain in zip(several, (alone - with_modules).tolist(), strict=True):
            better[number] = gain > 0
    return better


def looked_again(engine: Engine, names: Sequence[str | None], texts: Sequence[Sequence[int]]) -> list[str | None]:
    """The modules that a router chose for texts, without those that read theirs no better than the base.

    Raises:
        As `ModuleCache.using`.
    """
    found = list(names)
    for name in sorted({name for name in names if name is not None}):
        numbers = [number for number, chosen in enumerate(names) if chosen == name]
        with engine.modules.using([name]) as held:
            modules = ModuleSet(engine.base, [held[name]])
            better = reads_better(modules, [texts[number] for number in numbers])
            del modules
        for number, stays in zip(numbers, better, strict=True):
            found[number] = name if stays else None
    return found
