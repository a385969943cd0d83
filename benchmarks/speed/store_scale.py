"""A store with 10,000 tiny modules: opening it, and the bookkeeping of one more, against a store with ten.

python -m benchmarks.speed.store_scale [--modules 10000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.lib.common import qwen2, save_base, show
from growlm import router
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.store import MANIFEST, Store

WIDTH = 512


def fill(store: Store, count: int) -> None:
    """Registers `count` modules by copying the first: the folders are what `commit` makes."""
    first = store.module("seed")
    manifest = json.loads((first.folder / MANIFEST).read_text())
    for i in range(count):
        folder = store.path / "modules" / f"m{i:05d}" / "1"
        folder.mkdir(parents=True)
        for file in manifest["files"]:
            os.link(first.folder / file, folder / file)
        (folder / MANIFEST).write_text(json.dumps(manifest | {"name": f"m{i:05d}", "version": 1}))


def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = qwen2(vocab_size=256, hidden_size=WIDTH, num_hidden_layers=2)
        store = Store.create(folder / "brain", base=save_base(folder / "base", config))
        base = store.load_base()
        torch.manual_seed(0)
        module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))
        texts = torch.randint(1, 256, (8, 32)).tolist()
        router.write_general(store, base, [(texts, texts)])
        # As many vectors as `learn` keeps of a domain.
        known = {k: (torch.randn(n, WIDTH) * 1024).short() for k, n in (("vectors", 2048), ("heldout", 256))}
        store.commit("seed", module, {}, router.files_of(known))
        fill(store, count)

        def seconds(action: Callable[[], object], times: int = 1) -> float:
            taken = []
            for _ in range(times):
                start = time.perf_counter()
                action()
                taken.append(time.perf_counter() - start)
            return round(statistics.median(taken), 4)

        numbers = itertools.count()

        def learn() -> None:
            name = f"new{next(numbers)}"
            assert store.find(name) is None
            router.add_domain(store, store.commit(name, module, {}, router.files_of(known)), None)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {
            "open_and_list": seconds(lambda: len(Store.open(store.path).modules), 5),
            "router_with_sums_made_anew": seconds(lambda: router.load_router(store)),
            "bookkeeping_of_one_more": seconds(learn, 9),
            "router_after_learning": seconds(lambda: router.load_router(store)),
            "router_opened_again": seconds(lambda: router.load_router(store), 5),
        }
        found["router_peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=10_000)
    count = parser.parse_args().modules
    show("store_scale", {"10": measure(10), str(count): measure(count)})


if __name__ == "__main__":
    main()
