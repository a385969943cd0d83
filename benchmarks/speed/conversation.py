"""A conversation whose module changes with every turn: what is saved of reading it again, by the layer at which its
modules branch off, in layers times tokens and in seconds; and whether every answer is the one of an engine that keeps
nothing.

Two LoRA modules of random numbers a fork. Both engines answer each turn, in turns which first.

python -m benchmarks.speed.conversation --base CHECKPOINT --out conversation/
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.engine.runner import Runner
from growlm.modules import kind_of
from growlm.router import files_of, gather_evidence, write_general
from growlm.store import Store

NEAR = 1e-4  # two logits that are as close may change places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint of a published model")
    parser.add_argument("--out", type=Path, required=True, help="where the store and the result are kept")
    parser.add_argument("--forks", nargs="+", type=int, help="by default at 0, 1/3, 2/3 of the layers, and the last")
    parser.add_argument("--tokens", type=int, default=2000, help="of the conversation")
    parser.add_argument("--turns", type=int, default=8)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    store = Store.open(a.out / "store") if (a.out / "store" / "store.json").exists() else None
    store = store or Store.create(a.out / "store", a.base)
    base = store.load_base()
    depth = base.num_layers
    forks = a.forks or [0, depth // 3, 2 * depth // 3, depth - 1]
    names = make_modules(store, forks)
    text = np.random.default_rng(0).integers(1, len(store.load_tokenizer()), size=a.tokens).tolist()
    print(machine())
    found = {}
    for fork in forks:
        found[f"fork {fork} of {depth}"] = talk(store, names[fork], text, a.turns)
        print(f"fork {fork}: {json.dumps(found[f'fork {fork} of {depth}'])}", flush=True)
    write_atomic(a.out / "conversation.json", json.dumps(found, indent=1).encode())


def make_modules(store: Store, forks: list[int]) -> dict[int, list[str]]:
    base = store.load_base()
    texts = np.random.default_rng(0).integers(1, base.vocab_size, size=(16, 64)).tolist()
    known = None
    names: dict[int, list[str]] = {}
    for fork in forks:
        names[fork] = [f"{name}-{fork}" for name in ("one", "other")]
        for number, name in enumerate(names[fork]):
            if name in store.modules:
                continue
            if known is None:
                write_general(store, base, [(texts[:8], texts[8:])])
                known = files_of(gather_evidence(base, texts[:8], texts[8:], layer=store.manifest.routing_layer))
            torch.manual_seed(number)
            config = kind_of("lora").Config(r=16, layers=list(range(fork, base.num_layers)), vocabulary="none")
            module = kind_of("lora").create(base, config)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(torch.randn_like(p) * 0.002)
            store.commit(name, module, {}, known)
    return names


@contextmanager
def counted() -> Iterator[list[int]]:
    """Layers times tokens that passes run."""
    seen: list[int] = []
    run = Runner.run

    def counting(self: Runner, works: Any) -> None:
        depth = self._base.num_layers
        seen.extend(len(w.ids) * ((depth if w.leaves is None else w.leaves) - w.enters) for w in works)
        run(self, works)

    Runner.run = counting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Runner.run = run  # type: ignore[method-assign]


def talk(store: Store, names: list[str], text: list[int], turns: int) -> dict[str, Any]:
    """Each turn is longer by as many tokens, and asks the other module."""
    seconds: dict[str, list[float]] = {"kept": [], "cold": []}
    work = {"kept": 0, "cold": 0}
    differ, ties = 0, 0
    with Engine(store, prefix_bytes="1GB") as keeps, Engine(store, prefix_bytes=0) as cold:
        engines = {"kept": keeps, "cold": cold}
        for engine in engines.values():
            engine._loop.writer.end_tokens = set()
            for name in names:
                engine.generate([1, 2, 3], module=name, max_new_tokens=1)
        for turn in range(1, turns + 1):
            prompt, name = text[: len(text) * turn // turns], names[turn % 2]
            answers = {}
            for side in engines if turn % 2 else reversed(engines):
                with counted() as seen:
                    start = time.perf_counter()
                    answers[side] = engines[side].generate(prompt, module=name, max_new_tokens=1, logprobs=2)
                    seconds[side].append(time.perf_counter() - start)
                work[side] += sum(seen)
            if answers["kept"].tokens != answers["cold"].tokens:
                (first, second) = (value for _, value in answers["cold"].logprobs[0].top)
                ties, differ = ties + (first - second < NEAR), differ + (first - second >= NEAR)
    later = {side: sum(times[1:]) for side, times in seconds.items()}
    return {
        "layers times tokens saved": round(1 - work["kept"] / work["cold"], 3),
        "seconds of later turns, kept and cold": [round(later["kept"], 2), round(later["cold"], 2)],
        "seconds saved": round(1 - later["kept"] / later["cold"], 3),
        "answers that differ": differ,
        "and ties": ties,
    }


if __name__ == "__main__":
    main()
