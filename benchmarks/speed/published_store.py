"""A store of many modules of a published base: seconds to open it, to tell its status and to route, and bytes.

Takes a store with some learned modules and links copies of them, under other names, into a new one until it has so
many; files, manifests and evidence are what `learn` makes. What is derived from all modules is made by the first call
and read by the second.

python -m benchmarks.speed.published_store --store STORE --out many/ --modules 1024
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.common import interleaved, show
from growlm import Engine, Store
from growlm.router import load_router
from growlm.store import MANIFEST


def fill(store: Store, to: Path, count: int) -> None:
    """Copies of the modules of a store, in turns, under names of their own."""
    to.mkdir(parents=True)
    told = json.loads((store.path / "store.json").read_text())
    (to / "store.json").write_text(json.dumps({**told, "base": str((store.path / told["base"]).resolve())}))
    (to / "modules").mkdir()
    for name in ("general", "general-samples"):
        shutil.copytree(store.path / "router" / name, to / "router" / name)
    modules = list(store.modules.values())
    for number in range(count):
        module = modules[number % len(modules)]
        folder = to / "modules" / f"{module.name}-{number // len(modules):04}" / "1"
        folder.mkdir(parents=True)
        manifest = json.loads((module.folder / MANIFEST).read_text())
        for file in manifest["files"]:
            os.link(module.folder / file, folder / file)
        (folder / MANIFEST).write_text(json.dumps(manifest | {"name": folder.parent.name, "version": 1}))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return round(time.perf_counter() - start, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="with modules to take copies of")
    parser.add_argument("--out", type=Path, required=True, help="where the large store is made, on the same disk")
    parser.add_argument("--modules", type=int, default=1024)
    a = parser.parse_args()
    if not (a.out / "store.json").exists():
        fill(Store.open(a.store), a.out, a.modules)
    store = Store.open(a.out)
    for derived in ("gaussian", "gaussian-fitted", "lexicon", "product-key"):
        shutil.rmtree(a.out / "router" / derived, ignore_errors=True)
    status = [sys.executable, "-m", "growlm", "status", str(a.out), "--json"]
    found: dict[str, Any] = {
        "modules": len(store.modules),
        "open_and_list": seconds(lambda: len(Store.open(a.out).modules)),
        "status": seconds(lambda: subprocess.run(status, check=True, capture_output=True)),
        "router_fitted": seconds(lambda: load_router(store)),
        "router_opened_again": seconds(lambda: load_router(store)),
    }
    with Engine(store) as engine:
        router = engine.router
        lexicon = getattr(getattr(router, "gaussian", router), "lexicon", None)
        found["router_bytes"] = router.num_bytes()
        found["of_these_words"] = 0 if lexicon is None else lexicon.num_bytes()
        found["base_bytes"] = engine.base.num_bytes()
        ids = list(range(1000, 1064))
        states = router.states(engine.base, [ids])
        sides = {
            "base_reads_64_tokens": lambda: router.states(engine.base, [ids]),
            "router_chooses": lambda: router.route(*states, [ids]),
        }
        found |= {name: round(value, 5) for name, value in interleaved(sides, rounds=20).items()}
    show("published_store", found)


if __name__ == "__main__":
    main()
