"""What a module of each kind costs while it answers: bytes, and a step of one text and of 16, against the base alone.

Each module learns a little of TEXT, enough for its sizes; what it says does not matter here. Steps of all kinds run in
turns; the time of one is the median of those at which every text wrote. Modules that recall are tried without drafts,
which would hide what a token costs.

python -m benchmarks.speed.kinds --base CHECKPOINT --text FILE --out kinds/
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import show
from benchmarks.speed.serve import NEW, PROMPT, STREAMS, Steps
from growlm import Engine, LearnConfig, Store, learn
from growlm.units import parse_count

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "recall": {},
    "lora+recall": {},
    "blocks, top": {"placement": "top"},
    "blocks, interleaved": {"placement": "interleaved"},
    "peer": {"num_experts": 16_384},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint of a published model")
    parser.add_argument("--text", type=Path, required=True, help="documents with a blank line between them")
    parser.add_argument("--out", type=Path, required=True, help="where the store is kept")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", type=parse_count, default=4_096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, STREAMS], help="texts that are written together")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of each")
    given = parser.parse_args()
    folder = given.out / "store"
    store = Store.open(folder) if (folder / "store.json").exists() else Store.create(folder, given.base)
    names = {kind: kind.replace(", ", "-").replace("+", "-") for kind in given.kinds}
    for kind, name in names.items():
        if name not in store.modules:
            trained: dict[str, Any] = {"tokens": given.tokens, "learning_rate": 1e-3, **KINDS[kind]}
            config = LearnConfig(
                kind=kind.split(",")[0],
                separator="\n\n",
                admit_anyway=True,
                **({} if kind == "recall" else trained),
            )
            learn(store, name, [given.text], config)
    draw = np.random.default_rng(0)
    numbers: dict[str, Any] = {"base": {"bytes": 0}}
    with Engine(store, max_batch=STREAMS, prefix_bytes=0, drafts=False) as engine:
        engine._loop.writer.end_tokens = set()
        prompts = draw.integers(1, len(engine.tokenizer), size=(STREAMS, PROMPT)).tolist()
        sides: dict[str, str | None] = {"base": None, **names}
        for kind, name in names.items():
            numbers[kind] = {"bytes": store.module(name).bytes}
        for streams in given.streams:
            steps = {kind: Steps(engine) for kind in sides}
            for turn in range(given.rounds + 1):
                for kind, name in sides.items():
                    steps[kind].run([(0, prompt, name) for prompt in prompts[:streams]], given.new)
                    if not turn:
                        steps[kind].times, steps[kind].writing = [], []
            plain = steps["base"].median(streams)
            for kind in sides:
                taken = steps[kind].median(streams)
                numbers[kind] |= {f"{streams}, ms": round(taken, 1), f"{streams}, over base": round(taken / plain, 3)}
    show("kinds", {"rounds": given.rounds, "steps": numbers})


if __name__ == "__main__":
    main()
