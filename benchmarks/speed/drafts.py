"""What it saves to try an answer as the module's text goes on: one stream with and without drafts, in turns, of prompts
that begin as a document of the text does, of held-out text of the domain, and of text outside it; and what a pass over
more tokens of one text costs.

python -m benchmarks.speed.drafts --store STORE --module NAME --text FILE --heldout FILE --chat FILE

STORE has a module that recalls; each line of the files, or each paragraph, is a prompt; nothing is written.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.common import interleaved, show
from growlm import Engine, Store
from growlm.base.rooms import Rooms
from growlm.engine.drafting import Drafter
from growlm.engine.runner import Runner, Work
from growlm.modules import ModuleSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a store on a published base")
    parser.add_argument("--module", required=True, help="one of its modules, which recalls")
    parser.add_argument("--text", type=Path, required=True, help="what the module recalls")
    parser.add_argument("--heldout", type=Path, required=True, help="text of the domain that it has not seen")
    parser.add_argument("--chat", type=Path, required=True, help="text of another kind")
    parser.add_argument("--prompts", type=int, default=6, help="of each")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are written")
    given = parser.parse_args()
    store = Store.open(given.store)
    with Engine(store, prefix_bytes=0) as drafting, Engine(store, prefix_bytes=0, drafts=False) as plain:
        numbers: dict[str, Any] = {"passes_ms": passes(drafting, given.module)}
        for name in ("text", "heldout", "chat"):
            prompts = prompts_of(drafting, getattr(given, name), given)
            numbers[name] = streams({"drafts": drafting, "plain": plain}, prompts, given)
    show("drafts", numbers)


def prompts_of(engine: Engine, path: Path, given: argparse.Namespace) -> list[list[int]]:
    """Beginnings of the file's paragraphs that are long enough, evenly over it."""
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    found = []
    for text in paragraphs[:: max(len(paragraphs) // (8 * given.prompts), 1)]:
        ids = engine.tokenizer(text)["input_ids"]
        if len(ids) > given.length:
            found.append(ids[: given.length])
    return found[: given.prompts]


def streams(engines: dict[str, Engine], prompts: list[list[int]], given: argparse.Namespace) -> dict[str, Any]:
    tried: list[tuple[int, int]] = []
    learn = Drafter.learn
    Drafter.learn = lambda self, *found: tried.append(found) or learn(self, *found)  # type: ignore[method-assign]
    for engine in engines.values():
        engine._loop.writer.end_tokens = set()
        engine.generate(prompts[0], module=given.module, max_new_tokens=4)
    tried.clear()
    ratios, rates = [], []
    for number, prompt in enumerate(prompts):
        seconds, tokens = {}, {}
        for name in list(engines) if number % 2 else reversed(engines):
            start = time.perf_counter()
            answer = engines[name].generate(prompt, module=given.module, max_new_tokens=given.new)
            seconds[name], tokens[name] = time.perf_counter() - start, answer.tokens
        assert tokens["drafts"] == tokens["plain"], "an answer changed with drafts"
        ratios.append(seconds["plain"] / seconds["drafts"])
        rates.append(given.new / seconds["plain"])
    Drafter.learn = learn  # type: ignore[method-assign]
    many, right = sum(n for n, _ in tried), sum(n for _, n in tried)
    return {
        "times_as_fast": [round(ratio, 3) for ratio in ratios],
        "median": round(statistics.median(ratios), 3),
        "plain_tokens_a_second": round(statistics.median(rates), 1),
        "drafts": many,
        "right": right,
    }


@torch.inference_mode()
def passes(engine: Engine, name: str) -> dict[str, float]:
    """Milliseconds of a pass over so many tokens of one text."""
    with engine.modules.using([name]) as held:
        modules = ModuleSet(engine.base, list(held.values()))
        runner = Runner(engine.base)

        def run(tokens: int) -> None:
            cache = Rooms().new()
            for past, many in ((0, 64), (64, tokens)):
                works = [Work(modules, torch.zeros(many, dtype=torch.long), past, cache)]
                start = time.perf_counter()
                runner.run(works)
                runner.logits([(modules, works[0].hidden[0], torch.full((many, 32), -1))])  # type: ignore[index]
            times.setdefault(tokens, []).append(time.perf_counter() - start)

        times: dict[int, list[float]] = {}
        interleaved({str(n): lambda n=n: run(n) for n in (1, 2, 3, 5, 9, 17)}, 5)
        runner.forget()
        return {str(n): round(1e3 * statistics.median(seconds[2:]), 1) for n, seconds in times.items()}


if __name__ == "__main__":
    main()
