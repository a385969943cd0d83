"""What drills compare answers with, and what must be left of them: nothing."""

from __future__ import annotations

import torch

from growlm.base import Base
from growlm.engine import Engine
from growlm.modules import KnowledgeModule, ModuleSet

NEAR = 1e-4  # guarantee 12: as close as this, the best two tokens may change places


class WholePasses:
    """What one module set, or the base, makes of texts without any cache."""

    def __init__(self, base: Base, modules: list[KnowledgeModule]) -> None:
        self.modules = ModuleSet(base, modules)
        self.seen: dict[tuple[int, ...], tuple[int, int, float]] = {}  # the best two tokens, and how far apart they are

    def apart(self, prompt: list[int], tokens: list[int]) -> float | None:
        """How far the best two tokens lie apart where a greedy answer leaves that of whole passes: 0 if it never does,
        None where they are too far for it to be one."""
        ids = tuple(prompt)
        for token in tokens:
            if ids not in self.seen:
                with torch.no_grad():
                    values, best = self.modules.logits(torch.tensor([ids]))[0, -1].topk(2)
                self.seen[ids] = int(best[0]), int(best[1]), float(values[0] - values[1])
            first, second, apart = self.seen[ids]
            if token != first:
                return apart if token == second and apart <= NEAR else None
            ids = (*ids, token)
        return 0


def nothing_is_left(engine: Engine) -> None:
    assert engine._loop.scheduler.idle
    assert not any(engine.modules._pins.values())
    assert not engine._loop.runner._joined
    assert not engine._loop.sets
    assert engine._loop.rooms.num_bytes() == 0
    assert not engine._account._held
