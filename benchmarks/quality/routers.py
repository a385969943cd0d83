"""All kinds of router on the same modules: accuracy, retained gain, time for a prompt, and growth in domains.

`real` learns the domains of the ten-domain benchmark into one store that keeps samples, trains the transformer router,
and evaluates all kinds. `growth` makes up domains (each writes its own share of the vocabulary more often) and asks
how accuracy and the cost of one more domain change from 2 to 1,000.

python -m benchmarks.quality.routers real --data DIR --out routers/ --base checkpoint/
python -m benchmarks.quality.routers growth --out routers/ --base checkpoint/ --domains 2 10 100 1000
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import growlm
from benchmarks.lib.common import interleaved, machine
from benchmarks.lib.domains import DOMAINS, GENERAL, LENGTH, ROUTE, Bench
from growlm import router
from growlm.base import Base
from growlm.evaluation import EvalConfig, evaluate
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.router import load_router
from growlm.router.states import base_states
from growlm.store import ROUTERS, Store
from growlm.training.config import LearnConfig, RouterConfig
from growlm.training.router import train_router
from growlm.units import parse_count

KEEP = "400kB"
PROMPT = 200  # tokens of a prompt that is timed


def seconds_to_route(store: Store) -> dict[str, float]:
    """Median seconds of each kind for the states of one prompt, and of the base's own pass over it."""
    base = store.load_base()
    text = [list(range(5, 5 + PROMPT))]
    sides: dict[str, Any] = {"base": lambda: base_states(base, text, None)}
    for kind in ROUTERS:
        bound = load_router(store, kind=kind).bind(base)
        states = bound.states(base, text)
        sides[kind] = lambda bound=bound, states=states: bound.route(*states)
    return interleaved(sides, rounds=30, warmup=5)


def real(a: argparse.Namespace) -> None:
    bench = Bench(a.out, a.general, a.real_domains, a.data, a.tokens, a.test_tokens, a.base.resolve(), a.seed)
    folder = a.out / "stores" / "kept"
    store = Store.open(folder) if folder.exists() else Store.create(folder, bench.base, keep_samples=KEEP)
    for name in bench.domains:
        if store.find(name) is None:
            config = LearnConfig(
                admit_anyway=True, tokens=a.tokens, sequence_length=LENGTH, learning_rate=3e-3, seed=a.seed
            )
            growlm.learn(store, name, [bench.training_text(name)], config)
    if not store.router_files("transformer").versions():
        trained = train_router(store, RouterConfig(passages=a.passages, seed=a.seed))
        print(f"trained in {trained.seconds:.0f} s on {trained.tokens:,} tokens, held-out {trained.accuracy:.1%}")
    data = {n: [bench.test_text(n)] for n in bench.domains} | {"none": [bench.test_text(bench.general)]}
    times = seconds_to_route(store)
    print(f"{machine()}; {len(bench.domains)} domains\n")
    print("| router | tokens seen | accuracy | retained gain | none, general | none, domains | bytes | ms a prompt |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for tokens in (16, 64, ROUTE):
        for kind in ROUTERS:
            config = EvalConfig(
                sequence_length=LENGTH, max_documents=0, route_tokens=tokens, router=kind, matrix=False
            )  # fmt: skip
            found = evaluate(store, data, config).to_json()
            routing = found["routing"]
            none = list(routing["none"].values())
            print(
                f"| {kind} | {tokens} | {routing['accuracy']:.1%} | {routing['retained_gain']:.1%} | {none[0]:.1%} "
                f"| {none[1]:.1%} | {found['memory']['router_bytes']:,} | {times[kind] * 1e3:.2f} |"
            )
    print(f"\nthe base's own pass over the prompt of {PROMPT} tokens: {times['base'] * 1e3:.1f} ms")


def simulated(domain: int, seed: int, vocab: int, *, tokens: int = 128) -> list[int]:
    """A text of a made-up domain: half of its tokens from 64 that the domain prefers, half from all alike."""
    own = torch.randperm(vocab, generator=torch.Generator().manual_seed(domain))[:64]
    draw = torch.Generator().manual_seed(domain * 100_003 + seed + 1)
    preferred = own[torch.randint(64, (tokens,), generator=draw)]
    common = torch.randint(vocab, (tokens,), generator=draw)
    return torch.where(torch.rand(tokens, generator=draw) < 0.5, preferred, common).tolist()


def add(store: Store, base: Base, module: Blocks, domain: int, samples: int) -> None:
    texts = [simulated(domain, i, base.vocab_size) for i in range(samples)]
    train, heldout = texts[: samples * 3 // 4], texts[samples * 3 // 4 :]
    seen = router.gather_evidence(base, train, heldout, layer=store.manifest.routing_layer)
    files = router.files_of(seen)
    files[router.SAMPLES] = router.pack_samples(texts, 1 << 20)
    router.add_domain(store, store.commit(f"domain-{domain:04}", module, {}, files), None)


def growth(a: argparse.Namespace) -> None:
    print(f"{machine()}; {a.samples} texts of 128 tokens a domain, 2 test texts each")
    print(f"the transformer reads {a.router_tokens:,} tokens, whatever the number of domains\n")
    print("| domains | gaussian accuracy | fitted anew, s | ms a prompt | bytes | transformer accuracy | trained, s "
          "| ms a prompt | bytes |")  # fmt: skip
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    folder = a.out / "simulated"
    store = Store.open(folder) if folder.exists() else Store.create(folder, a.base.resolve(), keep_samples=KEEP)
    base = store.load_base()
    general = [simulated(10**6 + i, i, base.vocab_size) for i in range(256)]
    if not router.has_general(store):
        router.write_general(store, base, [(general[:192], general[192:])])
        with store.lock():
            store.router_files("general-samples").write(router.pack_samples(general, 1 << 20))
    module = Blocks.create(base, BlocksConfig(num_layers=1, vocabulary="none"))
    for count in a.domains:
        for domain in range(len(store.modules), count):
            add(store, base, module, domain, a.samples)
        tests = [(d, simulated(d, 10_000 + i, base.vocab_size)) for d in range(count) for i in range(2)]
        config = RouterConfig(
            passages=max(a.router_tokens // (128 * (count + 1)), 1), tokens=a.router_tokens, sequence_length=128
        )  # fmt: skip
        shutil.rmtree(store.router_path / "gaussian-fitted", ignore_errors=True)  # what an earlier run left
        start = time.perf_counter()
        load_router(store, kind="gaussian")
        fitted = time.perf_counter() - start
        trained = train_router(store, config, base=base).seconds
        cells = []
        times = seconds_to_route(store)
        for kind, made in (("gaussian", fitted), ("transformer", trained)):
            bound = load_router(store, kind=kind).bind(base)
            right = 0
            for at in range(0, len(tests), 16):
                some = tests[at : at + 16]
                routes = bound.route(*bound.states(base, [text for _, text in some]))
                right += sum(r.module == f"domain-{d:04}" for (d, _), r in zip(some, routes, strict=True))
            share = right / len(tests)
            cells += [f"{share:.1%}", f"{made:.1f}", f"{times[kind] * 1e3:.2f}", f"{bound.num_bytes():,}"]
        print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "growth"])
    parser.add_argument("--data", type=Path, help="a folder a domain (real)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--general", default=GENERAL)
    parser.add_argument("--real-domains", nargs="+", default=DOMAINS)
    parser.add_argument("--tokens", type=parse_count, default=120_000, help="of each domain (real)")
    parser.add_argument("--test-tokens", type=parse_count, default=20_000)
    parser.add_argument("--passages", type=int, default=256, help="of each domain that the transformer reads (real)")
    parser.add_argument("--domains", nargs="+", type=int, default=[2, 10, 100, 1000], help="how many (growth)")
    parser.add_argument("--samples", type=int, default=128, help="texts of each made-up domain (growth)")
    parser.add_argument("--router-tokens", type=parse_count, default=200_000, help="the transformer reads (growth)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.what == "real" and a.data is None:
        parser.error("real needs --data")
    (real if a.what == "real" else growth)(a)


if __name__ == "__main__":
    main()
