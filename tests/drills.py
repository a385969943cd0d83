"""What drills compare answers with, and what must be left of them: nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from growlm.base import Base
from growlm.engine import Engine
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.store import Store
from stores import add_module

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
    assert not any(one.pins for one in engine.modules._resident.values())
    assert not engine.modules._retired
    assert not engine._loop.runner._joined
    assert not engine._loop.sets
    assert engine._loop.rooms.num_bytes() == 0
    assert not engine._account._held


@contextmanager
def changing(
    store: Store, base: Base, engine: Engine, shapes: Mapping[str, Any], requests: int
) -> Iterator[dict[str, list[KnowledgeModule]]]:
    """Meanwhile an update, then a removal and the module's return, over and over: about as many for any number of
    requests. Yields all versions that there were of each module."""
    draws, over = random.Random(0), threading.Event()
    versions = {name: [store.load(name, base)] for name in shapes}

    def change() -> None:
        seed = 100
        while not over.wait(0.05 * max(requests / 300, 1)):
            seed += 1
            name = draws.choice(["letters", "digits"])
            add_module(store, base, name, seed, **shapes[name])
            versions[name].append(store.load(name, base))
            if draws.random() < 0.5:
                engine.reload()
            else:
                engine.modules.drop(name)
            if draws.random() < 0.3:
                store.remove("signs")
                add_module(store, base, "signs", seed, **shapes["signs"])
                versions["signs"].append(store.load("signs", base))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield versions
    finally:
        over.set()
        thread.join()
