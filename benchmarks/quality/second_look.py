"""Whether the module that a router chose reads a prompt better than the base does, and what it would change to ask.

Of prompts of every form, those that are given a module are read by it and by the base. A second look gives a prompt to
none where the module predicts it no better, nats a token; or only where the router was in doubt, `--doubt` nats between
the module and none. Told are the share that is given what it should be, and what prompts of none lose by their module.
Each set of prompts is a file in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.second_look STORE --data DIR --out look/ [--prompts 100] [--without math_gsm8k code_mbxp]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.common import kept, machine, same_settings, slug
from benchmarks.lib.prompts import LONGEST, Prompts, all_prompts
from growlm import data as text_data
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.modules import ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.progress import reporting, track
from growlm.router import NONE, Router, load_router
from growlm.store import Store

Looked = dict[str, Any]  # of one prompt: wanted, chosen, doubt, gain


def looked(engine: Engine, router: Router, without: Sequence[str], prompts: Prompts) -> list[Looked]:
    """Of each prompt what the router chose, by how many nats before none, and what the module gains, nats a token."""
    start = text_data.start_tokens(engine.tokenizer)
    texts = [[*start, *text[:LONGEST]] for text in prompts.texts]
    texts = [text for text in texts if len(text) > 1]
    routes = []
    for text in texts:
        states, _ = router.states(engine.base, [text])
        routes += router.route(states, None, [text])
    gains: dict[int, float] = {}
    base = ModuleSet(engine.base)
    for name in sorted({route.module for route in routes if route.module is not None}):
        numbers = [number for number, route in enumerate(routes) if route.module == name]
        some = [texts[number] for number in numbers]
        with engine.modules.using([name]) as held:
            modules = ModuleSet(engine.base, [held[name]])
            saved = passage_losses(base, some) - passage_losses(modules, some)
            del modules
        gains |= {number: float(nats) / (len(texts[number]) - 1) for number, nats in zip(numbers, saved, strict=True)}
    wanted = None if prompts.wanted in without else prompts.wanted
    return [
        {
            "wanted": wanted,
            "chosen": route.module,
            "doubt": None if route.module is None else _nats(route.scores[route.module], route.scores[NONE]),
            "gain": gains.get(number),
        }
        for number, route in enumerate(routes)
    ]


def _nats(chosen: float, none: float) -> float:
    return math.log(max(chosen, 1e-300)) - math.log(max(none, 1e-300))


def stays(doubt: float, row: Looked) -> bool:
    """Whether the module stays, where one looks at choices that are no more than so many nats before none."""
    return row["doubt"] > doubt or row["gain"] > 0


def told(found: Sequence[tuple[Prompts, list[Looked]]], rule: Callable[[Looked], bool]) -> dict[str, dict[str, float]]:
    """By form, the share that is given what it should be, mean of the domains (of none, of the origins), and how many
    nats a token the prompts lose to which a module is given though none should be, mean of all of that form."""
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    losses: dict[str, list[float]] = defaultdict(list)
    for prompts, rows in found:
        given = [row["chosen"] if row["chosen"] is None or rule(row) else None for row in rows]
        right = [module == row["wanted"] for module, row in zip(given, rows, strict=True)]
        wanted = rows[0]["wanted"]
        form = prompts.form if wanted or not prompts.wanted else f"{prompts.form} of what was not learned"
        shares[form][wanted or prompts.origin].append(sum(right) / len(right))
        if wanted is None:
            losses[form] += [0.0 if module is None else -row["gain"] for module, row in zip(given, rows, strict=True)]
    return {
        form: {"right": sum(sum(each) / len(each) for each in of.values()) / len(of)}
        | ({"lost": sum(losses[form]) / len(losses[form])} if losses[form] else {})
        for form, of in shares.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="of modules that have the names of the domains in DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100, help="of each form and origin, at most")
    parser.add_argument("--without", nargs="*", default=[], metavar="MODULE", help="as if these had not been learned")
    parser.add_argument("--forms", nargs="*", metavar="FORM", help="of prompts; by default all")
    parser.add_argument("--doubt", type=float, nargs="*", default=[4.0, 12.0], metavar="NATS")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    store = Store.open(a.store)
    if unknown := sorted(set(a.without) - store.modules.keys()):
        raise SystemExit(f"--without {' '.join(unknown)}: {a.store} holds {', '.join(store.modules)}")
    settings = {name: getattr(a, name) for name in ("prompts", "without", "seed")}
    same_settings(a.out, {"base": store.manifest.base_fingerprint, **settings})
    rules: dict[str, Callable[[Looked], bool]] = {"router": lambda row: True}
    for nats in sorted(a.doubt):
        rules[f"looks where in doubt, {nats:g} nats"] = partial(stays, nats)
    rules["looks at all"] = partial(stays, math.inf)
    with reporting("second look", True), Engine(store) as engine:
        sets = [p for p in all_prompts(a.data, engine.tokenizer, a.prompts, a.seed) if p.form in (a.forms or [p.form])]
        known = [name for name in store.modules if name not in a.without]
        router = load_router(store, known).bind(engine.base) if a.without else engine.router
        make = partial(looked, engine, router, a.without)
        found = [(each, kept(a.out, slug(each.name), partial(make, each))) for each in track(sets, "sets", "sets")]
    ways = {way: told(found, rule) for way, rule in rules.items()}
    print("| prompts | " + " | ".join(ways) + " |\n|---|" + "---:|" * len(ways))
    for form, of in ways["router"].items():
        print(f"| {form} | " + " | ".join(f"{ways[way][form]['right']:.1%}" for way in ways) + " |")
        if "lost" in of:
            lost = " | ".join(f"{ways[way][form]['lost']:.3f}" for way in ways)
            print(f"| {form}: nats a token lost | {lost} |")
    chosen = [row["doubt"] for _, rows in found for row in rows if row["chosen"] is not None]
    looks = {f"{nats:g}": sum(doubt <= nats for doubt in chosen) / len(chosen) for nats in a.doubt}
    print("\nof prompts that are given a module, in doubt: " + ", ".join(f"{n} nats {s:.1%}" for n, s in looks.items()))
    result = {"machine": machine(), "base": store.manifest.base, "settings": settings, "ways": ways, "in_doubt": looks}
    write_atomic(a.out / "second_look.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
