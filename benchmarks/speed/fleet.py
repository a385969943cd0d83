"""Very many modules on many engines: where requests should go. The scheduler and the module cache are the engine's own;
what a step and a load take is given, and time is counted, not spent.

Requests arrive at random (Poisson), their modules after Zipf's law, and go to an engine by one of these rules:

    hash          the engine that a hash of the module prefers (rendezvous hashing, Thaler and Ravishankar 1998)
    two choices   the first that it prefers, or the second where that one has less to do
    bounded       the first in the order of its preference that has no more than 1.25 times the mean of all to do
                  (Mirrokni et al. 2018)
    popularity    modules are dealt out beforehand by how often they will be asked for, the most wanted to several
                  engines; of these to the one that has the least to do
    least loaded  the engine that has the least to do, whatever the module

Told are the time to the first token, how often a module was in memory or being read, loads a request (what is left of
that to 1), requests of the busiest engine over the mean, and the longest wait for the rarer half of the modules. Where
the busiest engine is sent more than it can answer, as by `hash` where one module alone is more than that, waits grow
with `--requests`: they say that it does not work, and not how badly.

python -m benchmarks.speed.fleet --out fleet/
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import machine
from benchmarks.lib.planning import shares
from growlm.disk.files import write_atomic
from growlm.engine.account import Account, Footprint
from growlm.engine.answers import Answer
from growlm.engine.module_cache import ModuleCache
from growlm.engine.request import Request
from growlm.engine.resident import Found
from growlm.engine.sampling import SamplingConfig
from growlm.engine.scheduler import Scheduler
from growlm.progress import reporting, track
from growlm.units import parse_count

BOUND = 1.25  # times the mean that an engine may have to do before others are asked
CONFIG = SamplingConfig(max_new_tokens=1)


class Node:
    """One engine: its scheduler and its modules; what would be computed takes `step` seconds a step instead, and what
    would be read `load` seconds, one after another."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.modules = ModuleCache(a.room, lambda name: Found(None, 1, lambda: name))  # type: ignore[arg-type]
        account = Account(a.room, [0], 0, 0)
        self.scheduler = Scheduler(self.modules, account, lambda _: Footprint(1, 1), Request.give_up, a.batch)
        self.next = 0.0  # when its next step may begin
        self.waits = False  # for a module, with nothing else to do
        self.read = 0.0  # when its reader is free
        self.there: dict[str, float] = {}  # when what was read last of a module is there
        self.written: dict[Request, int] = {}  # tokens of those that run
        self.served = 0

    @property
    def to_do(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.active)

    def take(self, request: Request) -> None:
        self.scheduler.add(request)
        self.served += 1

    def step(self, now: float, first: Callable[[Request, float], None]) -> float | None:
        """One step that begins now; returns when the next one may, None where nothing is to be done."""
        for request in self.scheduler.admit(self._failed):
            assert request.loads is not None
            for name, load in request.loads.items():
                load.module()
                if name in request.loaded:
                    self.read = self.there[name] = max(self.read, now) + self.seconds_to_read(name)
        running = [r for r in self.scheduler.active if max(map(self.there.__getitem__, r.names or ())) <= now]
        self.waits = not running
        if not running:
            if self.scheduler.idle:
                return None
            return min(max(map(self.there.__getitem__, r.names or ())) for r in self.scheduler.active)
        end = now + self.a.step
        for request in running:
            self.written[request] = self.written.get(request, 0) + 1
            if self.written[request] == 1:
                first(request, end)
            if self.written[request] == self.a.tokens:
                del self.written[request]
                self.scheduler.remove(request)
                self.modules.release(request.let_go())
        return end

    def seconds_to_read(self, name: str) -> float:
        return self.a.load

    def begin_to_count(self) -> None:
        """Told once the requests are through of which nothing is told."""

    def _failed(self, request: Request, error: BaseException) -> None:
        raise error

    def close(self) -> None:
        self.modules.close()


Rule = Callable[[list[Node], int], Node]


@cache
def preferred(module: int, engines: int) -> np.ndarray:
    """All engines, the one that a hash of the module prefers first; in two bytes each, for very many modules."""
    return np.random.default_rng(module).permutation(engines).astype(np.int16)


def by_hash(nodes: list[Node], module: int) -> Node:
    return nodes[preferred(module, len(nodes))[0]]


def of_two(nodes: list[Node], module: int) -> Node:
    one, other = (nodes[number] for number in preferred(module, len(nodes))[:2])
    return other if other.to_do < one.to_do else one


def bounded(nodes: list[Node], module: int) -> Node:
    most = math.ceil(BOUND * (1 + sum(node.to_do for node in nodes)) / len(nodes))
    return next(node for n in preferred(module, len(nodes)) if (node := nodes[n]).to_do < most)


def least(nodes: list[Node], module: int) -> Node:
    return min(nodes, key=lambda node: node.to_do)


def by_popularity(wanted: np.ndarray, engines: int) -> Rule:
    """Modules dealt out, the most wanted first, each to the engines with the least to do so far: to as many as it takes
    for none to have more than half of what an engine has in the mean."""
    expected = [(0.0, number) for number in range(engines)]
    dealt: list[list[int]] = []
    for share in wanted:
        copies = min(max(math.ceil(share * engines / 0.5), 1), engines)
        taken = [heapq.heappop(expected) for _ in range(copies)]
        for load, number in taken:
            heapq.heappush(expected, (load + share / copies, number))
        dealt.append([number for _, number in taken])
    return lambda nodes, module: min((nodes[n] for n in dealt[module]), key=lambda node: node.to_do)


def simulate(a: argparse.Namespace, rule: Rule, name: str, nodes: list[Node] | None = None) -> dict[str, Any]:
    """What comes of so many requests. Of those before `a.warm` nothing is told.

    Args:
        nodes: the engines, where they are others than `Node` or have something in memory; closed in the end.
    """
    draw = np.random.default_rng(a.seed)
    wanted_by = shares(a.modules, a.exponent)
    capacity = a.engines * a.batch / (a.tokens * a.step)
    arrivals = np.cumsum(draw.exponential(1 / (a.share * capacity), a.requests))
    wanted = draw.choice(a.modules, a.requests, p=wanted_by)
    nodes = [Node(a) for _ in range(a.engines)] if nodes is None else nodes
    came: dict[Request, tuple[float, int]] = {}
    waits = np.full(a.requests, np.nan)

    def first(request: Request, now: float) -> None:
        arrival, number = came.pop(request)
        waits[number] = now - arrival

    events: list[tuple[float, int]] = []  # of engines: when their next step may begin
    busy: set[int] = set()

    def run_until(now: float) -> None:
        while events and events[0][0] <= now:
            at, number = heapq.heappop(events)
            node = nodes[number]
            if at != node.next:  # it was woken before
                continue
            then = node.step(at, first)
            if then is None:
                busy.discard(number)
            else:
                node.next = then
                heapq.heappush(events, (then, number))

    try:
        with reporting(name):
            for number in track(range(a.requests), "requests", "requests", total=a.requests):
                run_until(now := float(arrivals[number]))
                if number == a.warm:
                    for node in nodes:
                        node.begin_to_count()
                    before = [(node.modules.counts.hits, node.modules.counts.loads, node.served) for node in nodes]
                node = rule(nodes, int(wanted[number]))
                request = Request([1], (f"m{wanted[number]}",), CONFIG, Answer(None, ()))  # type: ignore[arg-type]
                came[request] = now, number
                node.take(request)
                if (place := nodes.index(node)) not in busy or node.waits:
                    busy.add(place)
                    node.next = max(now, node.next) if not node.waits else now
                    heapq.heappush(events, (node.next, place))
            run_until(math.inf)
        after = [(node.modules.counts.hits, node.modules.counts.loads, node.served) for node in nodes]
        of_each = np.array(after) - np.array(before)
        hits, loads, _ = of_each.sum(0).tolist()
        served = of_each[:, 2].tolist()
        assert not came
    finally:
        for node in nodes:
            node.close()
    waits, wanted = waits[a.warm :], wanted[a.warm :]
    rare = wanted >= a.modules // 2
    return {
        "first token, s, p50 and p99": [round(float(np.quantile(waits, q)), 3) for q in (0.5, 0.99)],
        "longest wait, s": round(float(waits.max()), 2),
        "longest wait of the rarer half, s": round(float(waits[rare].max()), 2) if rare.any() else None,
        "hit rate": round(hits / (hits + loads), 3),
        "loads a request": round(loads / len(waits), 3),
        "busiest engine over the mean": round(max(served) / (sum(served) / len(served)), 2),
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the results are kept")
    parser.add_argument("--modules", type=parse_count, default=100_000)
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--requests", type=parse_count, default=40_000)
    parser.add_argument("--room", type=int, default=64, help="modules that fit an engine")
    parser.add_argument("--batch", type=int, default=16, help="requests that an engine answers together")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--step", type=float, default=0.15, help="seconds of a step")
    parser.add_argument("--load", type=float, default=0.05, help="seconds to read a module")
    parser.add_argument("--share", type=float, default=0.7, help="arrivals, as a share of what all engines can answer")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--warm", type=parse_count, default=0, help="requests at first of which nothing is told")
    parser.add_argument("--rules", nargs="+", help="of those above; by default all")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(given)
    a.out.mkdir(parents=True, exist_ok=True)
    rules: dict[str, Rule] = {
        "hash": by_hash,
        "two choices": of_two,
        "bounded": bounded,
        "popularity": by_popularity(shares(a.modules, a.exponent), a.engines),
        "least loaded": least,
    }
    settings = {k: v for k, v in vars(a).items() if k not in ("out", "rules")}
    print(machine())
    print(json.dumps(settings), flush=True)
    found = {}
    for name in a.rules or rules:
        found[name] = simulate(a, rules[name], name)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        write_atomic(a.out / "fleet.json", json.dumps({"settings": settings, **found}, indent=1).encode())


if __name__ == "__main__":
    main()
