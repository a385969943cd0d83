"""Load: a module of a gigabyte from the disk to its first use, against the bare copy of its file: disk, pinned memory,
device. And a swap: two such modules in turn where there is room for one.

From the disk, a module goes the way of an engine that keeps nothing in main memory; `kept` is one that the engine's
tier of page-locked memory holds, and `first of the tier` one that is put there on its way.

`bare` reads the file by several threads into pinned memory that was there before, then copies it; `bare, overlapped`
copies each piece while the next is read. Cold means that the system was told to forget the file's pages, which some
containers do not do: then cold is as fast as warm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages.bases import add_modules, prompts_of, store_of
from benchmarks.stages.bench import Bench, Side, ms, nothing, ratio
from benchmarks.stages.machine import drop_pages, host_buffer, read, read_piece
from growlm.base import Base
from growlm.base.rooms import Rooms
from growlm.engine import Engine
from growlm.engine.host_tier import HostTier
from growlm.engine.runner import Runner, Work, come_to
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.store import WEIGHTS, Store

NAMES = ["large-0", "large-1"]
LAYERS = 10  # of 103 MB each
PROMPT = 16
_PIECE = 64 << 20
ASKED = 1.2


def run(bench: Bench) -> None:
    store = store_of(bench)
    base = store.load_base(device=bench.device)
    add_modules(store, base, "blocks", NAMES, {"num_layers": _layers(bench)})
    bench.tidy()
    _load(bench, store, base)
    del base
    bench.tidy()
    for host_memory in ("0", "4GB") if bench.cuda else ("0",):
        if not bench.over(f"swap, host memory {host_memory}"):
            _swap(bench, store, host_memory)


def _layers(bench: Bench) -> int:
    return 8 if bench.tiny else LAYERS


def _load(bench: Bench, store: Store, base: Base) -> None:
    path = store.module(NAMES[0]).folder / WEIGHTS
    size = path.stat().st_size
    host, there = host_buffer(bench, size), torch.empty(size, dtype=torch.uint8, device=bench.device)
    ids = torch.tensor(prompts_of(base.vocab_size, 1, PROMPT), device=bench.device)

    def bare() -> None:
        read(path, host)
        there.copy_(host)

    def load(tier: HostTier | None, verify: bool = False) -> KnowledgeModule:
        return store.load(NAMES[0], base, verify=verify, bring=None if tier is None else tier.bring)

    @torch.inference_mode()
    def used(tier: HostTier | None, verify: bool = False) -> None:
        modules = ModuleSet(base, [load(tier, verify)])
        work = Work(modules, ids[0], 0, Rooms().new())  # by an engine's pass, which waits layer by layer
        Runner(base).run([work])
        modules.project(come_to(work)[:, -1])

    passing, keeping = (HostTier(bench.device, room) if bench.cuda else None for room in (0, 2 * size))
    sides: dict[str, Side] = {
        "bare": bare,
        "bare, overlapped": lambda: _overlapped(path, host, there),
        "load": lambda: load(passing),
        "load, first use": lambda: used(passing),
    }
    warm: dict[str, Side] = {"load with its hash, first use": lambda: used(passing, verify=True)}
    if bench.cuda:
        warm["load, first of the tier"] = lambda: load(HostTier(bench.device, 2 * size))
        warm["load, kept"] = lambda: load(keeping)
        warm["load, kept, first use"] = lambda: used(keeping)
        warm["bare, kept"] = lambda: there.copy_(host)
    whole: dict[str, tuple[dict[str, Side], Callable[[], None]]] = {
        "warm": (sides | warm, nothing),
        "cold": (sides, partial(drop_pages, path)),
    }
    for name, (here, before) in whole.items():
        if bench.over(name):
            break
        taken = bench.turns(name, here, seconds=bench.left() / 3, rounds=5, warmup=1, before=before)
        tier = bench.floors.get("cached" if name == "warm" else "disk")  # a slow disk may have had no time to show
        floor = size / tier + size / bench.floors["host"] if tier else None
        for side, seconds in taken.items():
            bench.tell(f"{name}, {side}", {
                "ms": ms(seconds), "MB": size / 1e6, "GB/s": size / seconds / 1e9, "floor ms": floor and ms(floor),
                "times the bare copy": ratio(seconds, taken.get("bare")),
            })  # fmt: skip
        for side in ("load", "load, first use"):
            against = ratio(taken.get(side), taken.get("bare"))
            bench.ask(f"load, {name}: {side}, over the bare copy", ASKED, against)
        if "load, kept" in here:
            for side in ("load, kept", "load, kept, first use"):
                over = ratio(taken.get(side), taken.get("bare, kept"))
                bench.ask(f"{side}: from main memory, over the bare copy from there", ASKED, over)


def _overlapped(path: Path, host: torch.Tensor, there: torch.Tensor) -> None:
    view = memoryview(host.numpy()).cast("B")
    with open(path, "rb", buffering=0) as f:
        for at in range(0, len(view), _PIECE):
            read_piece(f.fileno(), view[at : at + _PIECE], at)
            there[at : at + _PIECE].copy_(host[at : at + _PIECE], non_blocking=True)


def _swap(bench: Bench, store: Store, host_memory: str) -> None:
    """A token of an answer whose module must be read first, in place of the other; and of one whose module is there."""
    kept = "kept in main memory" if host_memory != "0" else "from the disk"
    with Engine(store, memory="900GB", max_batch=1, prefix_bytes=0, device=bench.device) as engine:
        slots = engine.base.num_layers + _layers(bench)
        texts = 2 * Rooms.bytes_for([(PROMPT + 1, slots)], engine._account._slot_bytes)
        memory = engine.fixed_bytes + engine.workspace_bytes + texts + store.module(NAMES[0]).bytes * 5 // 4
    bench.tidy()
    path = store.module(NAMES[0]).folder / WEIGHTS
    options: dict[str, Any] = {"prefix_bytes": 0, "host_memory": host_memory, "device": bench.device}
    with Engine(store, memory=memory, max_batch=1, **options) as engine:
        (prompt,) = prompts_of(engine.base.vocab_size, 1, PROMPT)
        host, there = host_buffer(bench, path.stat().st_size), torch.empty(path.stat().st_size, dtype=torch.uint8)
        there = there.to(bench.device)

        def ask(other: bool) -> None:
            resident = engine.modules.resident
            name = next(name for name in NAMES if (name in resident) != other)
            engine.generate(prompt, module=name, max_new_tokens=1)

        def bare() -> None:
            if host_memory == "0":
                read(path, host)
            there.copy_(host)

        for name in NAMES:  # whose hash is compared when they are read first
            engine.generate(prompt, module=name, max_new_tokens=1)
        loads = engine.modules.counts.loads
        sides = {"swap": partial(ask, True), "no swap": partial(ask, False), "bare": bare}
        taken = bench.turns(kept, sides, seconds=bench.left() / 2, rounds=7)
        counts = {
            "loads": engine.modules.counts.loads - loads, "budget GB": memory / 1e9, "host GB": engine.host_bytes / 1e9,
        }  # fmt: skip
    for side, seconds in taken.items():
        bench.tell(
            f"{kept}, {side}", {"ms": ms(seconds), "times the bare copy": ratio(seconds, taken.get("bare")), **counts}
        )
    if len(taken) == len(sides):
        more = taken["swap"] - taken["no swap"]
        bench.ask(f"swap, {kept}: what it adds to an answer, over the bare copy", ASKED, ratio(more, taken["bare"]))
