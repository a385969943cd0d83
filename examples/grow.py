"""Grow a store from Python: learn two folders of text, then ask.

python examples/grow.py base/ medicine=pubmed.jsonl law=statutes/ "What does aspirin inhibit?"
"""

from __future__ import annotations

import sys

import growlm


def main(base: str, *arguments: str) -> None:
    store = growlm.Store.create("brain", base=base)
    for domain in (a for a in arguments if "=" in a):
        name, path = domain.split("=", 1)
        result = growlm.learn(store, name, data=[path])
        print(f"{name}: held-out loss {result.loss_before:.2f} -> {result.loss_after:.2f}")
    with growlm.Engine(store, memory="2GB") as engine:
        for question in (a for a in arguments if "=" not in a):
            answer = engine.generate(question, max_new_tokens=64)
            print(f"[{answer.module or 'base'}] {answer.text}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except growlm.GrowlmError as error:  # says what, where, and what to do
        sys.exit(f"{error}")
