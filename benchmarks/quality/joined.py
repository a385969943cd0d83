"""Several domains in one text: documents made of the beginnings of two, scored by each way of choosing modules.

Ways: the base; the module routed from the first half's beginning, kept; routed again every N tokens; the K best modules
mixed by Bayes' rule, with and without a share that returns to the prior; and, as a bound, each half by its own module.

python -m benchmarks.quality.joined brain --data medicine=test.txt law=test2.txt [--mix 2 3] [--reroute 32] [--half 128]
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import show
from growlm import data as text_data
from growlm.engine import Engine
from growlm.engine.loop import WINDOW
from growlm.engine.mixing import SHARE, UNIFORM_PRIOR_SHARE, mixture_losses
from growlm.evaluation.statistics import Bootstrap
from growlm.modules import ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.router import NONE
from growlm.store import Store


def losses_of(engine: Engine, name: str, texts: Sequence[Sequence[int]]) -> Tensor:
    """Log-loss of every token but the first of texts of one length, (texts, tokens - 1)."""
    found: list[Tensor] = []
    with engine.modules.using([] if name == NONE else [name]) as held:
        modules = ModuleSet(engine.base, list(held.values()))
        passage_losses(modules, texts, per_token=lambda _, losses: found.append(losses.cpu().double()))
        del modules
    return torch.cat(found).view(len(texts), -1)


def rerouted(engine: Engine, states: Tensor, texts: Sequence[Sequence[int]], start: int, every: int) -> list[list[str]]:
    """Of each stretch of `every` tokens after `start`, the module of each text, by the newest tokens before it."""
    chosen, length = [], len(texts[0])
    for at in range(start, length, every):
        begin = max(0, at - WINDOW)
        routes = engine.router.route(states[:, begin:at], None, [text[begin:at] for text in texts])
        chosen.append([route.module or NONE for route in routes])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PATH")
    parser.add_argument("--mix", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--reroute", type=int, nargs="+", default=[32])
    parser.add_argument("--half", type=int, default=128, help="tokens of each half")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with Engine(Store.open(a.store)) as engine:
        halves: dict[str, list[list[int]]] = {}
        for item in a.data:
            name, _, path = item.partition("=")
            documents = text_data.read([path], separator="\n\n").documents
            found = text_data.passages(documents, engine.tokenizer, a.half)
            halves[name] = [p.tokens for p in found if len(p.tokens) == a.half]
        draw = np.random.default_rng(a.seed)
        pairs = list(itertools.permutations(halves, 2))
        texts, owners = [], []
        for number in range(a.texts):
            first, second = pairs[number % len(pairs)]
            texts.append([*halves[first][draw.integers(len(halves[first]))],
                          *halves[second][draw.integers(len(halves[second]))]])  # fmt: skip
            owners.append((first, second))
        states, _ = engine.router.states(engine.base, texts)
        start = a.half // 2  # the prompt, so to say
        routes = engine.router.route(states[:, :start], None, [text[:start] for text in texts])
        later = {every: rerouted(engine, states, texts, start, every) for every in a.reroute}
        wanted: dict[str, set[int]] = defaultdict(set)
        for i, route in enumerate(routes):
            mixed = list(route.scores)[: max(a.mix)]
            for name in {NONE, *owners[i], *mixed, *(row[i] for rows in later.values() for row in rows)}:
                wanted[name].add(i)
        each: dict[tuple[str, int], Tensor] = {}
        for name, places in wanted.items():
            some = sorted(places)
            each |= zip(((name, i) for i in some), losses_of(engine, name, [texts[i] for i in some]), strict=True)
        labels, many = len(texts[0]) - 1, range(len(texts))
        ways: dict[str, Tensor] = {"base": torch.stack([each[NONE, i].sum() for i in many])}
        ways["routed_once"] = torch.stack([each[r.module or NONE, i].sum() for i, r in enumerate(routes)])
        for every, stretches in later.items():
            total = torch.stack([each[r.module or NONE, i][: start - 1].sum() for i, r in enumerate(routes)])
            for number, chosen in enumerate(stretches):
                at = start + number * every
                total += torch.stack([each[c, i][at - 1 : at - 1 + every].sum() for i, c in enumerate(chosen)])
            ways[f"rerouted_every_{every}"] = total
        for count in a.mix:
            for share in (0.0, SHARE):
                total_of = []
                for i, route in enumerate(routes):
                    best = list(route.scores)[:count]
                    scores = torch.tensor([route.scores[n] for n in best])
                    prior = (1 - UNIFORM_PRIOR_SHARE) * scores / scores.sum() + UNIFORM_PRIOR_SHARE / len(best)
                    total_of.append(mixture_losses(torch.stack([each[n, i] for n in best]), prior, share).sum())
                ways[f"mix_{count}_{'bayes' if share == 0 else 'shared'}"] = torch.stack(total_of)
        half = a.half - 1
        own = [each[first, i][:half].sum() + each[second, i][half:].sum() for i, (first, second) in enumerate(owners)]
        ways["own_modules"] = torch.stack(own)
        draws = Bootstrap([len(texts)])
        numbers: dict[str, object] = {}
        for way, losses in ways.items():
            interval = draws.interval(draws.sums(0, losses) / len(texts) / labels)
            numbers[way] = {
                "nats_a_token": round(float(losses.mean()) / labels, 4),
                "interval": [round(x, 4) for x in interval or []],
            }
        show("joined", {"texts": len(texts), "domains": list(halves), "half": a.half, **numbers})


if __name__ == "__main__":
    main()
