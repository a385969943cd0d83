"""What grows with the number of modules, and with the width of the base, beside the modules themselves.

Stores of linked copies of one tiny module with a manifest as long as those that `learn` writes: listing, a server's
look at whether the store has changed, `status`, the list of models, the card of one, the start of an engine; then what
the router's choice, a scrape of the metrics, the module cache and hashing take. By width: the seconds of one more
domain in the router's sums, and of each domain in a fit, with the memory that a fit takes. Seconds are the processor's,
with all files in the page cache. To each a line is fitted: over the modules, or over the square of the width.
`benchmarks.speed.scale` reads the result.

python -m benchmarks.speed.bookkeeping --out bookkeeping/
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine, qwen2, save_base
from benchmarks.speed.router_scale import scatter, simulate
from benchmarks.speed.store_scale import fill
from growlm import router
from growlm.disk.files import sha256_file, write_atomic
from growlm.engine import Engine
from growlm.engine.module_cache import ModuleCache
from growlm.engine.resident import Found
from growlm.modules.lora import Lora
from growlm.modules.shapes import LoraConfig
from growlm.router import ProductKeyRouter
from growlm.router.cells import Cells
from growlm.router.fitting import fit, gram_of
from growlm.router.gaussian import GaussianRouter
from growlm.server.metrics import Metrics
from growlm.server.names import Names
from growlm.store import Store
from growlm.units import parse_count

VECTORS, HELDOUT = (
    480,
    144,
)  # `learn` keeps of a domain at the most: of 96 passages in 4 lengths and 96 questions; 32, 16
ROUTED = 256, 1024  # widths of the states of which a router chooses
HELD = 10  # modules for each that a cache holds, which takes them in one by one
FILE = 1 << 26  # bytes that are hashed
LOSSES = 40  # in a manifest: as many as make it as long as that of a learned module, but for spaces


def seconds(action: Callable[[], object], times: int = 1) -> float:
    """Of the processor, in the median: what others do on the machine does not count, and neither does a slow disk."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """What there is at 0, and what each one adds: least squares of relative errors."""
    x, y = np.array(sizes, dtype=float), np.array(values, dtype=float)
    fitted = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0]
    return float(fitted[0]), float(fitted[1])


def make_store(folder: Path, width: int) -> tuple[Store, Lora]:
    base_folder = save_base(folder / "base", qwen2(vocab_size=256, hidden_size=width, num_hidden_layers=2))
    store = Store.create(folder / "brain", base=base_folder)
    base = store.load_base()
    texts = torch.randint(1, 256, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    router.write_general(store, base, [(texts, texts)])
    torch.manual_seed(0)
    return store, Lora.create(base, LoraConfig(r=1, vocabulary="none"))


def of_modules(count: int) -> dict[str, float]:
    """What a store of `count` modules takes, seconds and bytes."""
    with tempfile.TemporaryDirectory() as name:
        store, module = make_store(Path(name), 64)
        losses = [[step, 3.0 + 1 / (step + 1)] for step in range(LOSSES)]
        digest = "0" * 64
        training = {
            "sources": [{"path": "text.txt", "sha256": digest, "bytes": 1 << 20, "documents": 300}],
            "tokens": 40_000, "documents": 300, "loss_before": 3.4, "loss_after": 3.1, "seconds": 300.0, "run": digest,
            "settings": {f"setting_{i}": 0.1 * i for i in range(30)}, "losses": losses, "validation": losses[:10],
        }  # fmt: skip
        stored = store.commit("seed", module, training)
        fill(store, count - 1)
        found: dict[str, float] = {
            "manifest, bytes": (stored.folder / "module.json").stat().st_size,
            "list, s": seconds(lambda: len(Store.open(store.path).modules), 3),
            "status, s": seconds(store.status),
            "gone of all, s": seconds(lambda: store.missing([f"m{i:05d}" for i in range(count - 1)]), 3),
            "find one, s": seconds(lambda: store.find("seed"), 5),
        }
        start = time.process_time()
        with Engine(store, device="cpu", memory="2GB") as engine:
            found["engine starts, s"] = time.process_time() - start
            found["look for changes, s"] = seconds(lambda: engine.outdated, 3)
            found["calls to the disk of a look"] = disk_calls(lambda: engine.outdated)
            names = Names(engine)
            names.cards()
            found["list of models, again, s"] = seconds(names.cards)
            found["list of models, bytes"] = len(json.dumps(names.cards()))
            found["card of one, s"] = seconds(lambda: names.card("seed"))
            engine.modules.begin(["m00000"])  # what is imported at first is no call of the next one
            found["calls to the disk before a read"] = disk_calls(lambda: engine.modules.begin(["m00001"]))
    for width in ROUTED:
        found |= {f"{what}, width {width}": value for what, value in of_router(count, width).items()}
    return found | of_metrics(count) | of_cache(count // HELD)


def of_router(count: int, width: int) -> dict[str, float]:
    """Choosing among so many modules, in a world like text (`router_scale`)."""
    draw = torch.Generator().manual_seed(0)
    means = simulate("text", count, scatter(width), draw)
    points, limits = means[:-1], torch.full((count,), 2.4 * width)
    names = [f"m{i:05d}" for i in range(count)]
    every = GaussianRouter(names, points, means[-1:], torch.eye(width), limits, dict.fromkeys(names, 2))
    best = ProductKeyRouter(every, Cells.build(points, limits))
    queries = iter(points[torch.randint(count, (1000,), generator=draw)] + torch.randn(1000, width, generator=draw))
    return {
        "router that compares all, s": seconds(lambda: every.route_pooled(next(queries)[None]), 25),
        "router with an index, s": seconds(lambda: best.route_pooled(next(queries)[None]), 25),
    }


def of_metrics(count: int) -> dict[str, float]:
    """A scrape where so many modules have answered and been read once."""
    engine: Any = SimpleNamespace(
        resident_bytes=0, used_bytes=0, memory=None, modules=SimpleNamespace(resident=[]),
    )  # fmt: skip
    metrics = Metrics(engine, lambda: (0, 0))
    for number in range(count):
        name = f"m{number:05d}"
        answer: Any = SimpleNamespace(prompt_tokens=1, tokens=[1], finish_reason="stop", module=name, loaded=[name])
        metrics.ended(answer, 1.0)
    return {"scrape, s": seconds(metrics.text, 3), "scrape, bytes": len(metrics.text())}


def of_cache(count: int) -> dict[str, float]:
    """Of a cache that is full with so many modules, by module that it holds: one that is there, and one that is not."""
    cache = ModuleCache(count, lambda name: Found(None, 1, lambda: name))  # type: ignore[arg-type,return-value]
    try:
        for number in range(count):
            cache.release(cache.acquire([f"m{number}"]).values())

        def ask(name: str) -> None:
            begun = cache.begin([name])
            assert begun is not None
            for one in begun[0].values():
                one.module()
            cache.release(begun[0].values())

        fresh = iter(range(count, 1 << 60))
        return {
            "cache, one that is there, s a module held": seconds(lambda: ask(f"m{count - 1}"), 25) / count,
            "cache, one that is not, s a module held": seconds(lambda: ask(f"m{next(fresh)}"), 25) / count,
        }
    finally:
        cache.close()


def disk_calls(action: Callable[[], object]) -> float:
    """Opened files, listed folders and looks at files of one call, in its own thread: each is a round trip where the
    disk is a network's."""
    calls, listening, stat, me = 0, True, os.stat, threading.get_ident()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += listening and threading.get_ident() == me and event in ("open", "os.scandir", "os.listdir")

    def looked(*arguments: Any, **more: Any) -> os.stat_result:
        nonlocal calls
        calls += threading.get_ident() == me
        return stat(*arguments, **more)

    sys.addaudithook(heard)  # stays, and hears nothing once this has ended
    os.stat = looked
    try:
        action()
    finally:
        os.stat, listening = stat, False
    return calls


def of_width(width: int, domains: int = 24) -> dict[str, float]:
    """One more domain in the router's sums, and each domain of a fit, at so many numbers a state."""
    draw = torch.Generator().manual_seed(0)

    def states(rows: int) -> torch.Tensor:
        return (torch.randn(rows, width, generator=draw) * 1024).short()

    with tempfile.TemporaryDirectory() as name:
        store, module = make_store(Path(name), width)
        known = {"vectors": states(VECTORS), "heldout": states(HELDOUT)}
        old = store.commit("first", module, {}, router.files_of(known))
        router.add_domain(store, old, None)
        router.load_router(store)  # makes the sums
        stored = [store.commit(f"next{i}", module, {}, router.files_of(known)) for i in range(3)]
        added = statistics.median(seconds(partial(router.add_domain, store, one, None)) for one in stored)

    general = {"vectors": states(VECTORS), "heldout": states(HELDOUT), "frames": states(0)}
    general["forms"] = torch.tensor([VECTORS])
    kept = {"heldout": states(HELDOUT), "sum": states(1)[0].long(), "count": torch.tensor([VECTORS])}
    gram = gram_of(general["vectors"]) * (domains + 1)
    few, many = (seconds(partial(fit, [lambda: kept] * n, general, gram), 3) for n in (2, 2 + domains))
    return {"one more domain, s": added, "fit, each domain, s": (many - few) / domains}


def peak_of_fit(domains: int, width: int) -> float:
    """Bytes of memory at the most while `domains` are fitted, above those before, without held-out texts."""
    draw = torch.Generator().manual_seed(0)
    general = {k: (torch.randn(8, width, generator=draw) * 1024).short() for k in ("vectors", "heldout")}
    general |= {"frames": general["vectors"][:0], "forms": torch.tensor([8])}
    gram = gram_of(general["vectors"]) + torch.eye(width, dtype=torch.int64) * (domains << 20)
    total = torch.ones(width, dtype=torch.int64)
    kept = {"heldout": general["heldout"][:1], "sum": total, "count": torch.tensor([VECTORS])}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before = _status("VmRSS")
    fit([lambda: kept] * domains, general, gram)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    (told,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(told.split()[1]) * 1024


def hash_rate() -> float:
    """Bytes a second of a file in the page cache."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "file"
        file.write_bytes(os.urandom(1 << 20) * (FILE >> 20))
        return FILE / seconds(lambda: sha256_file(file), 3)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the results are kept")
    parser.add_argument("--modules", nargs="+", type=parse_count, default=[1000, 4000, 16_000])
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--fitted", type=parse_count, default=20_000, help="domains of which a fit's memory is told")
    a = parser.parse_args(given)
    a.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "routed": ROUTED, "hash, bytes a second": hash_rate()}
    found["fit, bytes of memory a domain and number of a state"] = peak_of_fit(a.fitted, 512) / a.fitted / 512
    for what, sizes, measure in (("modules", a.modules, of_modules), ("width squared", a.widths, of_width)):
        rows: dict[int, dict[str, float]] = {}
        for size in sizes:
            rows[size] = measure(size)
            print(f"{what} {size}: {json.dumps(rows[size])}", flush=True)
        over = [size if what == "modules" else size**2 for size in sizes]
        found[f"by {what}"] = rows
        found[f"line over {what}"] = {key: line(over, [rows[size][key] for size in sizes]) for key in rows[sizes[0]]}
        write_atomic(a.out / "bookkeeping.json", json.dumps(_rounded(found), indent=1).encode())


def _rounded(value: Any) -> Any:
    """With four digits, as much as a repeat agrees on."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
