"""Planning for a base of 70 B parameters, a million modules and a thousand machines: bytes, hit rates by tier, seconds,
cost, and what of today's design stops first.

Bytes, seconds and cost are formulas (`benchmarks.lib.planning`). Who is in memory is simulated by `fleet`, with the
engine's scheduler and module cache: a request goes to the machine that a hash of its module prefers and that has not
too much to do. Below an engine's devices there are the host's memory, a disk and object storage, the first two as
caches that let go of the least recently used: they are what an operator would put there, growlm itself has no tiers.
A thousand machines that hold hundreds of modules each take very many requests to fill, so that the simulation has fewer
machines and in the same proportion fewer modules, in two sizes, and all begin with what is wanted most; and all
machines, each cut to a part of its room, batch and modules. A formula for such caches is told beside each, and for what
is planned. What stops is read off the lines of `bookkeeping`.

python -m benchmarks.speed.bookkeeping --out bookkeeping/
python -m benchmarks.speed.scale --measured bookkeeping/bookkeeping.json --out scale/
python -m benchmarks.speed.scale --measured bookkeeping/bookkeeping.json --out scale/ --modules 100k --hour 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine
from benchmarks.lib.planning import BASES, Machine, Plan, copies, hit_rate, separation, shares, taken_for_one
from benchmarks.speed import fleet
from growlm.disk.files import write_atomic
from growlm.engine.resident import Found, Resident
from growlm.router import load_router
from growlm.router.cells import squared_distances
from growlm.router.gaussian import GaussianRouter
from growlm.store import Store
from growlm.units import parse_count

TIERS = ("host", "disk", "objects")
STEPS = 64  # that an answer is made of in the simulation
SPILL, ROUNDS = 0.1, 4  # of a machine's requests, that go on by chance; for what caches begin with alone
WATCH = 2.0  # seconds between two looks of a server at its store
SCRAPE = 10.0  # seconds after which Prometheus gives up, by default
PATIENCE = 10.0  # seconds that a page or a person waits for a list
CHOICE = 0.05  # seconds for which a prompt may wait for the router
WORDS = 4096  # modules of which a router counts words, and of which a server keeps what manifests say


class Tiered(fleet.Node):
    """An engine above the caches of its machine, which begin with what would be there after a long time.

    Args:
        seconds: of a read, by tier.
        holds: modules, of host and disk.
        begins: modules that are asked of this machine, the most wanted first.
    """

    def __init__(
        self, a: argparse.Namespace, seconds: dict[str, float], holds: dict[str, int], begins: list[str]
    ) -> None:
        super().__init__(a)
        self.seconds, self.holds = seconds, holds
        self.tiers = {tier: OrderedDict.fromkeys(reversed(begins[:many])) for tier, many in holds.items()}
        self.begin_to_count()
        for name in reversed(begins[: a.room]):
            there: Future[Any] = Future()
            there.set_result(name)
            self.there[name] = 0.0
            # As if it had been read: to have the cache read so many takes longer than all that is simulated.
            self.modules._resident[name] = Resident(Found(None, 1, there.result), there)  # type: ignore[arg-type]

    def begin_to_count(self) -> None:
        self.reads: Counter[str] = Counter()
        self.steps = self.rows = self.different = 0

    def seconds_to_read(self, name: str) -> float:
        found = next((tier for tier in self.tiers if name in self.tiers[tier]), TIERS[-1])
        for tier, held in self.tiers.items():
            held[name] = None
            held.move_to_end(name)
            if len(held) > self.holds[tier]:
                held.popitem(last=False)
        self.reads[found] += 1
        return self.seconds[found]

    def step(self, now: float, first: Callable[[Any, float], None]) -> float | None:
        self.steps += 1
        self.rows += len(self.scheduler.active)
        self.different += len({request.names for request in self.scheduler.active})
        return super().step(now, first)


def simulate(
    plan: Plan, machines: int, cut: int, requests: int, share: float, seed: int, blind: bool
) -> dict[str, Any]:
    """Hit rates by tier and waits, of so many machines and their part of the modules.

    Args:
        cut: each machine has this part of its room, its batch and its modules, and reads one as much more slowly.
        share: of what machines can answer, that is asked.
        blind: a request goes to the one of two machines that has less to do, whatever its module: each is asked for all
            modules, so that these are not fewer for fewer machines.
    """
    m = plan.machine
    modules = (plan.modules if blind else plan.modules * machines // plan.machines) // cut
    busy = plan.batch / plan.requests_a_second(plan.batch, plan.batch)  # of a request in a full batch, its prompt too
    a = argparse.Namespace(
        modules=modules, engines=machines, requests=requests, warm=requests // 3, exponent=plan.exponent, load=0.0,
        room=plan.room() // cut, batch=plan.batch // cut, tokens=STEPS, step=busy / STEPS, share=share, seed=seed,
    )  # fmt: skip
    held = {"host": m.devices * m.host_share * m.host_memory, "disk": m.devices * m.disk}
    holds = {tier: int(size / plan.module_bytes / cut) for tier, size in held.items()}
    seconds = {tier: cut * plan.read_from(tier) for tier in TIERS}
    wanted = [f"m{module}" for module in range(max(a.room, *holds.values()))][:modules]
    begins = [wanted] * machines if blind else first_there(modules, machines, plan.exponent)
    nodes = [Tiered(a, seconds, holds, of_one) for of_one in begins]
    told = f"{machines} machines, cut by {cut}{', blind' * blind}"
    found = fleet.simulate(a, of_two(seed) if blind else fleet.bounded, told, list(nodes))
    reads = sum((node.reads for node in nodes), Counter[str]())
    missed, total = 1 - found["hit rate"], max(sum(reads.values()), 1)
    steps = sum(node.steps for node in nodes)
    return {
        "machines": machines,
        "modules": modules,
        "cut": cut,
        "room of a machine": a.room,
        "requests": requests,
        "hit rate of devices": found["hit rate"],
        **{f"from {tier}": round(missed * reads[tier] / total, 5) for tier in TIERS},
        "hit rate by the formula": None if blind else round(hit_rate(modules, machines, a.room, plan.exponent), 3),
        "first token, s, p50 and p99": found["first token, s, p50 and p99"],
        "of which a step of the simulation": round(a.step, 3),
        "busiest machine over the mean": found["busiest engine over the mean"],
        "requests in a step": round(sum(node.rows for node in nodes) / steps, 1),
        "modules in a step": round(sum(node.different for node in nodes) / steps, 1),
    }


def first_there(modules: int, machines: int, exponent: float) -> list[list[str]]:
    """By machine the modules that are asked of it, the most wanted first, as requests come to flow: a machine takes of
    what is asked of it what the bound lets it, of every module the same share, and the rest goes on to the next."""
    most = fleet.BOUND / machines
    takes = np.ones(machines)
    for _ in range(ROUNDS):
        asked = np.zeros(machines)
        begins: list[list[tuple[float, str]]] = [[] for _ in range(machines)]
        takes = np.minimum(takes, 1 - SPILL)
        for module, share in enumerate(shares(modules, exponent).tolist()):
            left = share
            for number in fleet.preferred(module, machines).tolist():
                asked[number] += left
                here = min(left * takes[number], most)
                begins[number].append((here, f"m{module}"))
                left -= here
                if left < SPILL**2 * share:
                    break
        takes = most / np.maximum(asked, most)
    return [[name for _, name in sorted(one, reverse=True)] for one in begins]


def of_two(seed: int) -> fleet.Rule:
    """As a balancer that knows nothing of modules."""
    draw = np.random.default_rng(seed)

    def rule(nodes: list[fleet.Node], module: int) -> fleet.Node:
        one, other = (nodes[number] for number in draw.integers(len(nodes), size=2))
        return other if other.to_do < one.to_do else one

    return rule


def bytes_of(plan: Plan) -> dict[str, float]:
    evidence = plan.evidence_bytes
    each = {
        "base, once": plan.base.bytes,
        "a module's weights": plan.module_bytes,
        "of it parameters": plan.base.lora_parameters(plan.r),
        "blocks of 4 layers instead": 2 * plan.base.block_parameters(4),
        "its text, sorted": plan.text_bytes,
        "its held-out states": evidence["heldout"],
        "its states": evidence["vectors"],
    }
    of_all = {
        "all weights": plan.module_bytes,
        "all text": plan.text_bytes,
        "all held-out states": evidence["heldout"],
        "all states": evidence["vectors"],
    }
    router = {f"router, {part}, in every engine": size for part, size in plan.router_bytes().items()}
    held = {
        "keys and values of a token": plan.base.token_bytes,
        "modules that a machine holds": max(plan.room(), 0),
        "parameters of a base that one device holds": (plan.machine.usable * plan.machine.memory - plan.workspace) / 2,
        "machines on which the most wanted module is used": int(copies(plan.modules, plan.machines, plan.exponent)[0]),
    }
    return each | {what: size * plan.modules for what, size in of_all.items()} | router | held


def stops(plan: Plan, measured: dict[str, Any], between: float) -> list[dict[str, Any]]:
    """At how many modules each part of today's design is too slow or too large, the least first, and what it comes to
    at the plan's.

    Args:
        measured: as `bookkeeping` writes it.
        between: seconds between two modules that are learned, anywhere.
    """
    lines, largest = measured["line over modules"], max(measured["by modules"], key=int)
    width, square = plan.base.width, plan.base.width**2

    def line(key: str) -> tuple[float, float]:
        return max(lines[key][0], 0.0), lines[key][1]

    def by_width(key: str) -> tuple[float, float]:
        """As of two widths, and of others in proportion to what the wider one takes more."""
        (narrow, (start, few)), (wide, (_, many)) = ((int(w), lines[f"{key}, width {w}"]) for w in measured["routed"])
        return max(start, 0.0), few + (many - few) * (width - narrow) / (wide - narrow)

    fit = measured["line over width squared"]["fit, each domain, s"][1] * square
    rate = measured["hash, bytes a second"]
    beyond_memo = 0.0, measured["by modules"][largest]["list of models, again, s"] / int(largest)
    memory = measured["fit, bytes of memory a domain and number of a state"] * width
    host = plan.machine.devices * plan.machine.host_memory
    means = 4 * width
    parts = [
        ("words count, and a server remembers manifests", "modules", (0.0, 1.0), WORDS),
        ("a server's look at its store, every 2 s", "s", line("look for changes, s"), WATCH),
        ("listing models, or one model's card", "s", beyond_memo, PATIENCE),
        ("status", "s", line("status, s"), PATIENCE),
        ("fitting after a learning, one thread", "s", (0.0, fit), between),
        ("memory of a fit", "bytes", (0.0, memory), host / 2),
        ("router that compares all, a prompt", "s", by_width("router that compares all, s"), CHOICE),
        ("the same, whether all are still there", "s", line("gone of all, s"), CHOICE),
        ("router with an index, a prompt", "s", by_width("router with an index, s"), CHOICE),
        ("reading and hashing the fitted router", "s", (0.0, means * (1 / rate + 1 / 10e9)), 60.0),
        ("a scrape of one engine that has served all", "s", line("scrape, s"), SCRAPE),
    ]
    told = [
        {
            "what": what,
            "unit": unit,
            "limit": limit,
            "stops at, modules": max(int((limit - start) / each), 0),
            "at the plan's": float(f"{start + each * plan.modules:.3g}"),
        }
        for what, unit, (start, each), limit in parts
    ]
    return sorted(told, key=lambda one: one["stops at, modules"])


def of_writers(plan: Plan, measured: dict[str, Any]) -> dict[str, float]:
    """How many modules a store can take in a day: what is done with its lock held, of one after another."""
    rate = measured["hash, bytes a second"]
    start, each = measured["line over width squared"]["one more domain, s"]
    sums = start + each * plan.base.width**2
    written = sum(plan.evidence_bytes.values()) + plan.module_bytes + plan.text_bytes
    locked = sums + written / rate + written / (plan.machine.devices * plan.machine.disk_bandwidth)
    learned = 4 * plan.base.parameters * 40_000 / (plan.machine.devices * plan.machine.flops * plan.machine.computing)
    return {
        "locked, s a module": round(locked, 2),
        "of it the router's sums, s": round(sums, 2),
        "modules a day": round(86_400 / locked),
        "days for all": round(plan.modules * locked / 86_400, 1),
        "steps of 40,000 tokens on one machine, s": round(learned, 1),
        "machines that keep the lock busy": round(learned / locked, 1),
    }


def of_a_shared_disk(plan: Plan, measured: dict[str, Any], answered: float) -> dict[str, float]:
    """What looking for changes asks of one file system that all machines share.

    Args:
        answered: calls a second that it answers; an assumption.
    """
    each = measured["line over modules"]["calls to the disk of a look"][1]
    return {
        "calls a look, by module": round(each, 2),
        "calls a second": float(f"{each * plan.modules * plan.machines / WATCH:.3g}"),
        "modules times machines at which it answers no more": float(f"{answered * WATCH / each:.3g}"),
    }


def costs(plan: Plan, calls: float) -> list[dict[str, Any]]:
    """Of a million written tokens, by batch, by how often a module is on the devices, and by where it else comes from.
    Every request of a batch has a module of its own.

    Args:
        calls: to the disk before each read, in which the engine stands; 0 for one that does not.
    """
    rows: list[dict[str, Any]] = []
    for batch in (1, 8, 64, 256):
        row: dict[str, Any] = {"batch": batch}
        if plan.room(batch) < batch:
            rows.append(row | {"does not fit": f"room for {plan.room(batch)} modules"})
            continue
        whole = plan.requests_a_second(batch, batch)
        row |= {"a step, s": round(plan.step(batch, batch), 5), "tokens a second": round(whole * plan.answer, 1)}
        row["cost, all there"] = round(plan.cost(whole), 2)
        for tier in ("disk", "objects"):
            for hits in (0.99, 0.9, 0.5):
                there = 1 - hits, plan.read_from(tier)
                rate = plan.requests_a_second(batch, batch, *there, calls * plan.latency(tier))
                row[f"{hits:.0%} there, else {tier}"] = round(plan.cost(rate), 2)
        rows.append(row)
    return rows


def told_apart(store: Store) -> dict[str, Any]:
    """How far domains of a real store are from general text and from each other, in units of a text's own noise."""
    router = load_router(store, kind="gaussian")
    assert isinstance(router, GaussianRouter)
    from_general = squared_distances(router.means, router.general).min(-1).values.sqrt()
    between = squared_distances(router.means, router.means).fill_diagonal_(torch.inf).min(-1).values.sqrt()
    return {
        "domains": len(router.names),
        "to general text, least and median": [round(float(x), 1) for x in (from_general.min(), from_general.median())],
        "to the next domain, least and median": [round(float(x), 1) for x in (between.min(), between.median())],
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="what bookkeeping has written")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept, those of other bases too")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["70B", "8B"])
    parser.add_argument("--modules", type=parse_count, default=1_000_000)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--devices", type=int, help="of a machine; by default as few, of 1 and 8, as hold the base")
    parser.add_argument("--hour", type=float, default=Machine.hour, help="price of a device and hour; an assumption")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--simulated", nargs="*", type=int, default=[16, 64], help="machines of the simulation")
    parser.add_argument("--cut", type=int, default=4, help="of each where all machines are simulated; 0: they are not")
    parser.add_argument("--requests", type=int, default=160, help="of a machine, in the simulation")
    parser.add_argument("--share", type=float, default=0.7, help="arrivals, as a share of what all machines can answer")
    parser.add_argument("--between", type=float, default=60.0, help="seconds between two modules that are learned")
    parser.add_argument("--calls", type=float, default=1e5, help="a second that a file server answers; an assumption")
    parser.add_argument("--like", type=Store.open, metavar="STORE", help="tell how far its domains are apart")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(given)
    a.out.mkdir(parents=True, exist_ok=True)
    measured = json.loads(a.measured.read_text())
    kept = a.out / "scale.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}  # of other bases
    found["machine"] = machine()
    if a.like is not None:
        found["told apart"] = told_apart(a.like)
    counts = [10**i for i in range(3, 7)]
    found["distance that keeps 99 of 100 general texts out"] = {n: round(separation(n), 2) for n in counts}
    found["general texts taken at the distance for 1,000"] = {
        n: round(taken_for_one(n, separation(1000)), 3) for n in counts
    }
    for name in a.bases:
        devices = a.devices or (1 if BASES[name].bytes < 0.5 * Machine.memory else 8)
        plan = Plan(BASES[name], Machine(devices, hour=a.hour), a.modules, a.machines, exponent=a.exponent)
        one: dict[str, Any] = {"settings": dataclasses.asdict(plan)}
        one["bytes"] = bytes_of(plan)
        one["read, s"] = {tier: round(plan.read_from(tier), 4) for tier in TIERS}
        one["prompt, s"], one["step, s"] = round(plan.prefill(), 4), round(plan.step(plan.batch, plan.batch), 5)
        one["refill, s"] = {k: round(v, 1) for k, v in plan.refill(measured["hash, bytes a second"]).items()}
        one["stops"] = stops(plan, measured, a.between)
        one["writers"] = of_writers(plan, measured)
        one["a shared disk"] = of_a_shared_disk(plan, measured, a.calls)
        one["costs"] = costs(plan, measured["line over modules"]["calls to the disk before a read"][0])
        one["costs, calls that do not stand in the way"] = costs(plan, 0)
        whole = hit_rate(plan.modules, plan.machines, plan.room(), plan.exponent)
        one["hit rate by the formula, all machines"] = round(whole, 3)
        sizes = [(machines, 1, False) for machines in a.simulated]
        sizes += [(plan.machines, a.cut, False)] * bool(a.cut) + [(machines, 1, True) for machines in a.simulated[:1]]
        one["simulated"] = []
        for machines, cut, blind in sizes:
            many = a.requests * machines // cut
            one["simulated"].append(simulate(plan, machines, cut, many, a.share, a.seed, blind))
            print(f"{name}: {json.dumps(one['simulated'][-1])}", flush=True)
        found[name] = one
        write_atomic(kept, json.dumps(found, indent=1).encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
