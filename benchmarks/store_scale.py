"""A store with 10,000 tiny modules: opening it, and the bookkeeping of one more, against a store with ten.

python benchmarks/store_scale.py [--modules 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from common import qwen2, save_base, show
from growlm import router
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.store import MANIFEST, Store


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
        config = qwen2(vocab_size=256, hidden_size=64, num_hidden_layers=2)
        store = Store.create(folder / "brain", base=save_base(folder / "base", config))
        base = store.load_base()
        torch.manual_seed(0)
        module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))
        texts = torch.randint(1, 256, (8, 32)).tolist()
        router.write_general(store, base, texts, texts)
        known = router.evidence(base, texts, texts)
        store.commit("seed", module, {}, {router.EVIDENCE: known})
        fill(store, count)
        start = time.perf_counter()
        router.load_router(store)
        routed = time.perf_counter() - start
        opened = []
        for _ in range(5):
            start = time.perf_counter()
            assert len(Store.open(store.path).modules) == count + 1
            opened.append(time.perf_counter() - start)
        learned = []
        for i in range(9):
            start = time.perf_counter()
            assert store.find(f"new{i}") is None
            stored = store.commit(f"new{i}", module, {}, {router.EVIDENCE: known})
            router.add_domain(store, stored, None)
            learned.append(time.perf_counter() - start)
        return {
            "open_seconds": round(statistics.median(opened), 4),
            "bookkeeping_milliseconds": round(1e3 * statistics.median(learned), 2),
            "first_router_seconds": round(routed, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=10_000)
    count = parser.parse_args().modules
    show("store_scale", {"10": measure(10), str(count): measure(count)})


if __name__ == "__main__":
    main()
