"""The engine's loop: 16 streams of one module and of eight, against its floor, transformers and one request at a time.

Modules are made of random numbers: what they say does not matter here. The floor of a step is its matrix products at
the rows that it has, each matrix read from memory, in the faster of both orders, and the attention over its keys and
values; nothing else. Of several modules' adapters it is each one's own products, or one over all of them side by side,
whichever is faster. All sides run in turn in one process, medians of `--rounds`.

    one       16 streams of one module of kind lora; transformers' `generate` and `generate_batch` of the checkpoint
              that base and module make, the engine asked one prompt after another, and with --llama a server of
              llama.cpp that runs the base as a float32 GGUF file with 16 slots of 256 tokens and as many threads
    eight     16 streams of eight modules, Poisson arrivals, of kind lora and of kind blocks
    mixed     16 prompts for eight modules of kind lora that are all there at once, and PEFT's mixed batch of the same
              adapters (`adapter_names`)
    long      the first token of short prompts while a prompt of 4,000 tokens is read, and without it

python -m benchmarks.speed.serve --base CHECKPOINT --out serve/
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import growlm
from benchmarks.lib.common import machine
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.engine.request import Request, State
from growlm.layers.thin import thin_rows
from growlm.modules import kind_of
from growlm.router import files_of, gather_evidence, write_general
from growlm.store import Store
from growlm.units import parse_count

STREAMS, PROMPT, NEW, MODULES = 16, 128, 64, 8
KINDS: dict[str, dict[str, Any]] = {"lora": {"r": 16}, "blocks": {"num_layers": 4, "placement": "top"}}


def make_store(folder: Path, base: Path) -> Store:
    """Eight modules of each kind."""
    if (folder / "store.json").exists():
        return Store.open(folder)
    store = Store.create(folder, base)
    frozen = store.load_base()
    draw = np.random.default_rng(0)
    texts = draw.integers(1, frozen.vocab_size, size=(16, 64)).tolist()
    write_general(store, frozen, [(texts[:8], texts[8:])])
    known = files_of(gather_evidence(frozen, texts[:8], texts[8:], layer=store.manifest.routing_layer))
    for name, settings in KINDS.items():
        for number in range(MODULES):
            torch.manual_seed(number)
            module = kind_of(name).create(frozen, kind_of(name).Config(**settings, vocabulary="none"))
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(torch.randn_like(p) * 0.002)
            store.commit(f"{name}-{number}", module, {}, known)
    return store


class Steps:
    """Steps of an engine: milliseconds of those at which so many streams wrote."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.times, self.writing = engine, [], []

    def run(self, arrivals: Sequence[tuple[int, list[int], str | None]], new: int) -> tuple[float, list[Request]]:
        """Seconds until all that arrive, each at a step, have their answers."""
        left, asked, number = list(arrivals), [], 0
        start = time.perf_counter()
        while True:
            while left and left[0][0] <= number:
                _, prompt, name = left.pop(0)
                asked.append(self.engine.submit(prompt, module=name, max_new_tokens=new))
            waiting = [r for r in asked if r.state is State.WAITING]
            here = [r for r in asked if r.state not in (State.FINISHED, State.WAITING)]
            begun = time.perf_counter()
            busy = self.engine.step()
            self.times.append(1000 * (time.perf_counter() - begun))
            reads = any(r.state is not State.WAITING for r in waiting) or any(len(r.answer.tokens) < 2 for r in here)
            self.writing.append(0 if reads else len(here))
            number += 1
            if not busy and not left:
                return time.perf_counter() - start, asked

    def median(self, streams: int) -> float:
        """Milliseconds of a step at which so many streams wrote, and no prompt was read."""
        return statistics.median(t for t, writing in zip(self.times, self.writing, strict=True) if writing == streams)


def matrices_of(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [part.weight for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


def side_by_side(each: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The A (r, in) and B (out, r) of several adapters, in turn, those of one matrix joined."""
    return [torch.cat(parts, dim=number % 2) for number, parts in enumerate(zip(*each, strict=True))]


def floor(engine: Engine, rows: Sequence[tuple[nn.Module | None, int]], tokens: int) -> Callable[[], float]:
    """What measures a step's floor once, in milliseconds.

    Args:
        rows: a module's own layers, if any, and the streams that run it.
        tokens: that each stream has so far.
    """
    base, total = engine.base, sum(count for _, count in rows)
    products = [(w, total) for w in [*matrices_of(base.layers), base.head_weight]]
    own = [(w, count) for module, count in rows if module is not None for w in matrices_of([module])]
    ways = [own]
    if len(rows) > 1 and all(module is not None and module.kind == "lora" for module, _ in rows):
        ways.append([(w, total) for w in side_by_side([matrices_of([module]) for module, _ in rows])])
    config = base.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = [torch.randn(2, total, groups, tokens, width) for _ in base.layers]
    query = torch.randn(total, groups, heads // groups, width)
    inputs = {(w.shape[1], n): torch.randn(n, w.shape[1]) for way in (products, *ways) for w, n in way}
    turned = {key: x.t().contiguous() for key, x in inputs.items()}

    def run(products: Sequence[tuple[torch.Tensor, int]]) -> float:
        start = time.perf_counter()
        for weight, count in products:
            key = weight.shape[1], count
            if count in thin_rows(weight.dtype) and weight.numel() >= 1 << 16:
                torch.mm(weight, turned[key])
            else:
                F.linear(inputs[key], weight)
        return 1000 * (time.perf_counter() - start)

    @torch.inference_mode()
    def measure() -> float:
        least = run(products) + min(run(way) for way in ways)
        start = time.perf_counter()
        for keys, values in kept:
            F.scaled_dot_product_attention(query, keys, values)
        return least + 1000 * (time.perf_counter() - start)

    return measure


def one(store: Store, a: argparse.Namespace) -> dict[str, Any]:
    """16 streams of one module."""
    prompts = prompts_of(store, STREAMS, PROMPT)
    name = "lora-0"
    exported = a.out / "exported"
    if not exported.exists():
        growlm.export(store, exported, name)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    with Engine(store, max_batch=STREAMS, prefix_bytes=0) as engine:
        engine._loop.writer.end_tokens = set()
        steps = Steps(engine)
        with engine.modules.using([name]) as held:
            measure = floor(engine, [(held[name], STREAMS)], PROMPT + NEW // 2)

        @torch.inference_mode()
        def theirs() -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)

        @torch.inference_mode()
        def continuous() -> None:
            found = model.generate_batch(prompts, max_new_tokens=NEW, do_sample=False, progress_bar=False)
            assert all(len(one.generated_tokens) == NEW for one in found.values())

        def alone() -> None:
            for prompt in prompts[:4]:  # a quarter of them
                engine.generate(prompt, module=name, max_new_tokens=NEW)

        def llama(at_once: int, prompts: Sequence[list[int]] = prompts) -> None:
            with ThreadPoolExecutor(at_once) as threads:
                list(threads.map(lambda prompt: completed(a.llama, prompt, NEW), prompts))

        sides: dict[str, tuple[Callable[[], Any], float]] = {
            "engine": (lambda: steps.run([(0, prompt, name) for prompt in prompts], NEW), 1.0),
            "engine, one by one": (alone, 4.0),
            "transformers generate": (theirs, 1.0),
            "transformers generate_batch": (continuous, 1.0),
        }
        if a.llama:
            sides["llama.cpp"] = lambda: llama(STREAMS), 1.0
            sides["llama.cpp, one by one"] = lambda: llama(1, prompts[:4]), 4.0
        seconds, floors = {side: [] for side in sides}, []
        for turn in range(a.rounds + 1):
            if turn == 1:
                steps.times, steps.writing = [], []
            for side, (run, times) in list(sides.items()):
                start = time.perf_counter()
                try:
                    run()
                except Exception as error:
                    print(f"{side}: {type(error).__name__}: {error}"[:200], flush=True)
                    del sides[side], seconds[side]
                    continue
                if turn:
                    seconds[side].append((time.perf_counter() - start) * times)
            if turn:
                floors.append(statistics.median(measure() for _ in range(3)))
        step, least = steps.median(STREAMS), statistics.median(floors)
    rate = {side: STREAMS * NEW / statistics.median(found) for side, found in seconds.items()}
    return {"step, ms": step, "floor, ms": least, "step over floor": step / least, "tokens a second": rate}


def completed(url: str, prompt: list[int], new: int) -> None:
    """Asks a server of llama.cpp for so many tokens."""
    asked = {"prompt": prompt, "n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["tokens_predicted"] == new


def eight(store: Store, a: argparse.Namespace, kind: str) -> dict[str, Any]:
    """16 streams of eight modules, Poisson arrivals, and of one of them."""
    count = 3 * STREAMS
    prompts = prompts_of(store, count, PROMPT)
    draw = np.random.default_rng(1)
    when = np.cumsum(draw.exponential(NEW / STREAMS, count)).astype(int)
    names = [f"{kind}-{number}" for number in range(MODULES)]
    found: dict[str, Any] = {}
    with Engine(store, max_batch=STREAMS, prefix_bytes=0) as engine:
        engine._loop.writer.end_tokens = set()
        with engine.modules.using(names) as held:
            modules = [held[name] for name in names]
            measures = {
                "one": floor(engine, [(modules[0], STREAMS)], PROMPT + NEW // 2),
                "eight": floor(engine, [(m, STREAMS // MODULES) for m in modules], PROMPT + NEW // 2),
            }
            del modules
        wanted = {"one": [names[0]] * count, "eight": [str(n) for n in draw.choice(names, count)]}
        steps = {side: Steps(engine) for side in wanted}
        seconds: dict[str, list[float]] = {side: [] for side in wanted}
        floors: dict[str, list[float]] = {side: [] for side in wanted}
        for turn in range(a.rounds + 1):
            for side, modules_of in wanted.items():
                arrivals = [(int(at), prompt, name) for at, prompt, name in zip(when, prompts, modules_of, strict=True)]
                taken, _ = steps[side].run(arrivals, NEW)
                if turn:
                    seconds[side].append(taken)
                    floors[side].append(statistics.median(measures[side]() for _ in range(3)))
                else:
                    steps[side].times, steps[side].writing = [], []
        for side in wanted:
            full = [t for t, w in zip(steps[side].times, steps[side].writing, strict=True) if w >= STREAMS - 2]
            step, least = statistics.median(full), statistics.median(floors[side])
            rate = count * NEW / statistics.median(seconds[side])
            found[side] = {"step, ms": step, "floor, ms": least, "step over floor": step / least, "tokens/s": rate}
    found["eight over one, tokens/s"] = found["eight"]["tokens/s"] / found["one"]["tokens/s"]
    return found


def mixed(store: Store, a: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of 16 prompts for eight modules, two each."""
    from peft import PeftModel

    names = [f"lora-{number % MODULES}" for number in range(STREAMS)]
    prompts = prompts_of(store, STREAMS, PROMPT)
    plain, model = AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.float32), None
    for name in names[:MODULES]:
        if not (folder := a.out / "adapters" / name).exists():
            growlm.export(store, folder, name, form="peft")
        if model is None:
            model = PeftModel.from_pretrained(plain, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model = model.eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)
    with Engine(store, max_batch=STREAMS, prefix_bytes=0) as engine:
        engine._loop.writer.end_tokens = set()

        def ours() -> list[list[int]]:
            return [g.tokens for g in engine.generate_many(prompts, modules=names, max_new_tokens=NEW)]

        @torch.inference_mode()
        def theirs() -> list[list[int]]:
            options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "adapter_names": names}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()

        sides = {"engine": ours, "PEFT adapter_names": theirs}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        answers: dict[str, list[list[int]]] = {}
        for turn in range(a.rounds + 1):
            for side, run in sides.items():
                start = time.perf_counter()
                answers[side] = run()
                if turn:
                    seconds[side].append(time.perf_counter() - start)
    same = sum(one == other for one, other in zip(*answers.values(), strict=True))
    rates = {side: STREAMS * NEW / statistics.median(taken) for side, taken in seconds.items()}
    return {"tokens a second": rates, "answers that are the same": same}


def long(store: Store, a: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token of short prompts, while a long one is read and without it."""
    short = prompts_of(store, 12, 32)
    (reading,) = prompts_of(store, 1, 4000)
    found: dict[str, Any] = {}
    with Engine(store, max_batch=STREAMS, prefix_bytes=0) as engine:
        engine._loop.writer.end_tokens = set()
        engine.generate(short[0], module="lora-0", max_new_tokens=2)
        for side in ("without", "beside"):
            times = []
            for prompt in short:
                held = engine.submit(reading, module="lora-0", max_new_tokens=1) if side == "beside" else None
                for _ in range(3 if held else 0):
                    engine.step()
                start = time.perf_counter()
                asked = engine.submit(prompt, module="lora-1", max_new_tokens=1)
                while asked.state is not State.FINISHED:
                    engine.step()
                times.append(1000 * (time.perf_counter() - start))
                if held:
                    engine.cancel(held)
            found[side] = {"median, ms": statistics.median(times), "95th, ms": sorted(times)[math.ceil(0.95 * 12) - 1]}
    found["95th, beside over without"] = found["beside"]["95th, ms"] / found["without"]["95th, ms"]
    return found


def prompts_of(store: Store, count: int, tokens: int) -> list[list[int]]:
    vocabulary = len(store.load_tokenizer())
    return np.random.default_rng(tokens).integers(1, vocabulary, size=(count, tokens)).tolist()


STAGES: dict[str, Callable[[Store, argparse.Namespace], dict[str, Any]]] = {
    "one": one,
    "eight lora": lambda store, a: eight(store, a, "lora"),
    "eight blocks": lambda store, a: eight(store, a, "blocks"),
    "mixed": mixed,
    "long": long,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint of a published model")
    parser.add_argument("--out", type=Path, required=True, help="where the store and results are kept")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rounds", type=parse_count, default=3)
    parser.add_argument("--llama", help="where a server of llama.cpp listens, such as http://127.0.0.1:8080")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    store = make_store(a.out / "store", a.base)
    print(machine())
    for stage in a.stages:
        found = STAGES[stage](store, a)
        write_atomic(a.out / f"{stage.replace(' ', '-')}.json", json.dumps(found, indent=1).encode())
        print(f"{stage}: {json.dumps(found, indent=1)}", flush=True)


if __name__ == "__main__":
    main()
