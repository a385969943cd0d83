"""Grow a store from Python: learn two folders of text, then ask.

python examples/grow.py base/ medicine=pubmed.jsonl law=statutes/
"""

from __future__ import annotations

import sys

import growlm


def main(base: str, *domains: str) -> None:
    store = growlm.Store.create("brain", base=base)
    for domain in domains:
        name, path = domain.split("=", 1)
        result = growlm.learn(store, name, data=[path])
        print(f"{name}: held-out loss {result.loss_before:.2f} -> {result.loss_after:.2f}")
    with growlm.Engine(store, memory="2GB") as engine:
        answer = engine.generate("What does aspirin inhibit?", max_new_tokens=64)
        print(answer.module, answer.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
