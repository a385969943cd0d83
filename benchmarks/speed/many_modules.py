"""Many modules and room for few: requests arrive at random (Poisson), their modules after Zipf's law. Told are the time
to the first token, how often a module was in memory, loads a request, and the longest wait of a request for the rarest
modules; with requests that wait for room overtaken by those that need none, up to the engine's bound, and without.

Then a load of twice what the engine can do: the budget and the process's memory from minute to minute, and whether
every request ended.

python -m benchmarks.speed.many_modules --base CHECKPOINT --out many/ [--overload 600]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import growlm.engine.scheduler
from benchmarks.lib.common import machine
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.engine.request import Request, State
from growlm.modules import kind_of
from growlm.progress import track
from growlm.router import files_of, gather_evidence, write_general
from growlm.store import Store
from growlm.units import format_size

PROMPT, NEW, STREAMS = 64, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint of a published model")
    parser.add_argument("--out", type=Path, required=True, help="where the store and the results are kept")
    parser.add_argument("--modules", type=int, default=200)
    parser.add_argument("--room", type=int, default=8, help="modules that fit")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--load", type=float, default=0.8, help="arrivals, as a share of what was answered at once")
    parser.add_argument("--overload", type=float, default=0, help="seconds of a load of twice the capacity")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    store = make_store(a.out / "store", a.base, a.modules)
    print(machine())
    found: dict[str, Any] = {"capacity, requests a second": capacity(store, a)}
    rate = a.load * found["capacity, requests a second"]
    for name, patience in (("overtaking", growlm.engine.scheduler.PATIENCE), ("in order", 0)):
        growlm.engine.scheduler.PATIENCE = patience
        found[name] = trace(store, a, rate)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    growlm.engine.scheduler.PATIENCE = 64
    if a.overload:
        found["overload"] = overload(store, a, 2 * found["capacity, requests a second"])
        print(f"overload: {json.dumps(found['overload'])}", flush=True)
    write_atomic(a.out / "many_modules.json", json.dumps(found, indent=1).encode())


def make_store(folder: Path, base: Path, count: int) -> Store:
    store = Store.open(folder) if (folder / "store.json").exists() else Store.create(folder, base)
    missing = [n for n in range(count) if f"m{n}" not in store.modules]
    if not missing:
        return store
    frozen = store.load_base()
    texts = np.random.default_rng(0).integers(1, frozen.vocab_size, size=(16, 64)).tolist()
    write_general(store, frozen, [(texts[:8], texts[8:])])
    known = files_of(gather_evidence(frozen, texts[:8], texts[8:], layer=store.manifest.routing_layer))
    module = kind_of("lora").create(frozen, kind_of("lora").Config(r=4, vocabulary="none"))
    for number in track(missing, "making modules", "modules", total=len(missing)):
        torch.manual_seed(number)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * 0.01)
        store.commit(f"m{number}", module, {}, known)
    return store


def engine_of(store: Store, a: argparse.Namespace) -> Engine:
    """One in which so many modules fit, and as many texts."""
    with Engine(store, memory="100GB", max_batch=STREAMS) as engine:
        texts = STREAMS * sum(engine._account._slot_bytes) * 128 * 5 // 4
        memory = engine.fixed_bytes + engine.workspace_bytes + texts + a.room * store.module("m0").bytes
    engine = Engine(store, memory=memory, max_batch=STREAMS, prefix_bytes=0)
    engine._loop.writer.end_tokens = set()
    return engine


def requests_of(store: Store, a: argparse.Namespace, count: int, seed: int) -> list[tuple[list[int], str]]:
    draw = np.random.default_rng(seed)
    shares = 1 / np.arange(1, a.modules + 1)
    names = draw.choice(a.modules, count, p=shares / shares.sum())
    prompts = draw.integers(1, len(store.load_tokenizer()), size=(count, PROMPT)).tolist()
    return [(prompt, f"m{number}") for prompt, number in zip(prompts, names, strict=True)]


def capacity(store: Store, a: argparse.Namespace) -> float:
    """Requests a second where all are there at once."""
    with engine_of(store, a) as engine:
        asked = requests_of(store, a, 40, 1)
        start = time.perf_counter()
        engine.generate_many([p for p, _ in asked], modules=[n for _, n in asked], max_new_tokens=NEW)
        return len(asked) / (time.perf_counter() - start)


def trace(store: Store, a: argparse.Namespace, rate: float) -> dict[str, Any]:
    asked = requests_of(store, a, a.requests, 2)
    arrivals = np.cumsum(np.random.default_rng(3).exponential(1 / rate, a.requests))
    firsts: dict[Request, float] = {}
    requests: list[tuple[Request, float, str]] = []
    overtaken = 0
    with engine_of(store, a) as engine:
        start = time.perf_counter()
        while len(requests) < a.requests or any(r.state is not State.FINISHED for r, _, _ in requests):
            now = time.perf_counter() - start
            while len(requests) < a.requests and arrivals[len(requests)] <= now:
                prompt, name = asked[len(requests)]
                request = engine.submit(prompt, module=name, max_new_tokens=NEW)
                requests.append((request, arrivals[len(requests)], name))
            if not engine.step():
                time.sleep(0.001)
            now = time.perf_counter() - start
            for request, _, _ in requests:
                if request not in firsts and (request.answer.tokens or request.state is State.FINISHED):
                    firsts[request] = now
                    overtaken = max(overtaken, request.overtaken)
        counts = engine.modules.counts
    waits = np.array([firsts[request] - arrival for request, arrival, _ in requests])
    rare = np.array([int(name[1:]) >= a.modules // 2 for _, _, name in requests])
    assert all(request.error is None for request, _, _ in requests)
    return {
        "first token, seconds, p50 and p99": [round(float(np.quantile(waits, q)), 3) for q in (0.5, 0.99)],
        "hit rate": round(counts.hits / (counts.hits + counts.loads), 3),
        "loads a request": round(counts.loads / a.requests, 3),
        "longest wait of the rarer half, seconds": round(float(waits[rare].max()), 3) if rare.any() else None,
        "overtaken at most": overtaken,
    }


def overload(store: Store, a: argparse.Namespace, rate: float) -> dict[str, Any]:
    """More than can be answered; a queue of 64 refuses what it cannot hold, as a server would."""
    asked = requests_of(store, a, int(rate * a.overload) + 1, 4)
    with engine_of(store, a) as engine:
        waiting: list[Request] = []
        minutes: list[dict[str, str]] = []
        answered = refused = number = 0
        most = 0
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < a.overload or waiting:
            while number < len(asked) and number / rate <= now < a.overload:
                prompt, name = asked[number]
                number += 1
                if len(waiting) >= 64:
                    refused += 1
                else:
                    waiting.append(engine.submit(prompt, module=name, max_new_tokens=NEW))
            engine.step()
            most = max(most, engine.used_bytes)
            answered += sum(request.result is not None for request in waiting)
            waiting = [request for request in waiting if request.state is not State.FINISHED]
            if now // 60 >= len(minutes):
                minutes.append({"used": format_size(engine.used_bytes), "process": format_size(_resident())})
        assert most <= (engine.memory or most)
        left = engine._loop.num_bytes()
    return {
        "asked": number,
        "answered": answered,
        "refused": refused,
        "without an answer": number - answered - refused,
        "budget": format_size(engine.memory or 0),
        "used at most": format_size(most),
        "keys and values left": left,
        "each minute": minutes,
    }


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
