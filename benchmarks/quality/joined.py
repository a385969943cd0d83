"""Several domains in one text: documents made of the beginnings of two, scored by each way of choosing modules.

Ways: the base; the module routed from the first half's beginning, kept; routed again every N tokens; the K best modules
mixed by Bayes' rule, with and without a share that returns to the prior; and, as a bound, each half by its own module.

python -m benchmarks.quality.joined brain --data medicine=test.txt law=test2.txt [--mix 2 3] [--reroute 32] [--half 128]
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import torch

from benchmarks.lib.common import show
from growlm import data as text_data
from growlm.engine import Engine
from growlm.engine.loop import WINDOW
from growlm.engine.mixing import SHARE, mixture_losses
from growlm.evaluation.statistics import Bootstrap
from growlm.layers.cross_entropy import token_losses
from growlm.modules import ModuleSet
from growlm.router import NONE
from growlm.store import Store


@torch.no_grad()
def losses_of(engine: Engine, name: str, texts: torch.Tensor) -> torch.Tensor:
    """Log-loss of every token but the first, (texts, tokens - 1)."""
    with engine.modules.using([] if name == NONE else [name]) as held:
        modules = ModuleSet(engine.base, list(held.values()))
        own = modules.rows.head
        rows, ids = (None, None) if own is None else (own.rows, own.ids)
        hidden = engine.base.norm(modules.hidden(texts[:, :-1]))
        labels = texts[:, 1:].flatten()
        found = token_losses(
            hidden.flatten(0, 1), engine.base.head_weight, labels, rows=rows, ids=ids, softcap=engine.base.softcap
        )
    return found.view(len(texts), -1)


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
        ids = torch.tensor(texts)
        names = [NONE, *engine.router.names]
        each = {name: losses_of(engine, name, ids).double() for name in names}
        states, _ = engine.router.states(engine.base, texts)
        routes = engine.router.route(states[:, : a.half // 2])
        labels = ids.shape[1] - 1
        ways: dict[str, torch.Tensor] = {"base": each[NONE].sum(1)}
        ways["routed_once"] = torch.stack([each[r.module or NONE][i].sum() for i, r in enumerate(routes)])
        for every in a.reroute:
            total = torch.zeros(len(texts), dtype=torch.float64)
            at = a.half // 2  # the prompt, so to say
            chosen = [r.module or NONE for r in routes]
            total += torch.stack([each[c][i, : at - 1].sum() for i, c in enumerate(chosen)])
            while at <= labels:
                chosen = [r.module or NONE for r in engine.router.route(states[:, max(0, at - WINDOW) : at])]
                total += torch.stack([each[c][i, at - 1 : at - 1 + every].sum() for i, c in enumerate(chosen)])
                at += every
            ways[f"rerouted_every_{every}"] = total
        for count in a.mix:
            for share in (0.0, SHARE):
                total = []
                for i, route in enumerate(routes):
                    best = list(route.scores)[:count]
                    scores = torch.tensor([route.scores[n] for n in best])
                    prior = 0.9 * scores / scores.sum() + 0.1 / len(best)
                    total.append(mixture_losses(torch.stack([each[n][i] for n in best]), prior, share).sum())
                ways[f"mix_{count}_{'bayes' if share == 0 else 'shared'}"] = torch.stack(total)
        half = a.half - 1
        own = [each[first][i, :half].sum() + each[second][i, half:].sum() for i, (first, second) in enumerate(owners)]
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
