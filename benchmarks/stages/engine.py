"""Engine: tokens a second of the engine with one module of kind lora and with eight, and without any, against
transformers' `generate` of the base alone in one batch.

All requests are there at once, with prompts of 128 tokens. The floor is the prompts' matrix products at the rate of a
large one, and for each token after the first the weights that a step must read, at the bandwidth of a copy: the base's,
and each module's once.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.stages.bases import add_modules, prompts_of, store_of
from benchmarks.stages.bench import Bench, Side, ms, ratio
from growlm.engine import Engine

MODULES = 8
NAMES = [f"lora-{number}" for number in range(MODULES)]
THEIRS = "transformers generate"


def run(bench: Bench) -> None:
    store = store_of(bench)
    counts, prompt, new = ((2, 4), 8, 4) if bench.tiny else ((16, 64), 128, 32)
    with Engine(store, max_batch=max(counts), prefix_bytes=0, device=bench.device) as engine:
        add_modules(store, engine.base, "lora", NAMES, {"r": 16})
    bench.tidy()
    with Engine(store, max_batch=max(counts), prefix_bytes=0, device=bench.device) as engine:
        engine._loop.writer.end_tokens = set()  # random weights: all tokens are written on both sides
        model = AutoModelForCausalLM.from_pretrained(store.base_folder, dtype=engine.base.dtype).to(bench.device).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        for share, count in enumerate(counts):
            if not bench.over(f"{count} requests"):
                _at(bench, engine, model, count, prompt, new, bench.left() / (len(counts) - share))
        module_bytes = store.module(NAMES[0]).bytes
        bench.tell("sizes", {"base GB": engine.base.num_bytes() / 1e9, "a module MB": module_bytes / 1e6})


def _at(
    bench: Bench, engine: Engine, model: torch.nn.Module, count: int, prompt: int, new: int, seconds: float
) -> None:
    prompts = prompts_of(engine.base.vocab_size, count, prompt)
    ids = torch.tensor(prompts, device=bench.device)
    wanted = {
        "base alone": [None] * count,
        "1 module": [NAMES[0]] * count,
        f"{MODULES} modules": [NAMES[number % MODULES] for number in range(count)],
    }

    def ours(modules: list[str | None]) -> None:
        found = engine.generate_many(prompts, modules=modules, max_new_tokens=new)
        short = [len(each.tokens) for each in found if len(each.tokens) != new]
        if short:
            raise ValueError(f"{len(short)} answers of {short[0]} tokens, expected {new}")

    @torch.inference_mode()
    def theirs() -> None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        if out.shape[1] != prompt + new:
            raise ValueError(f"{out.shape[1] - prompt} new tokens, expected {new}")

    sides: dict[str, Side] = {THEIRS: theirs}
    sides |= {name: lambda modules=modules: ours(modules) for name, modules in wanted.items()}
    taken = bench.turns(f"{count} requests", sides, seconds=seconds, rounds=5)
    weights = engine.base.num_bytes()
    for name, took in taken.items():
        read = {module for module in wanted.get(name, ()) if module is not None}
        step = bench.moving(weights + sum(engine.modules.found(module).bytes for module in read))
        floor = bench.multiplying(2.0 * engine.base.num_parameters() * count * prompt) + new * step
        bench.tell(f"{count} requests, {name}", {
            "tokens/s": count * new / took, "ms a step, prompts included": ms(took / new), "floor ms a step": ms(step),
            "times its floor": took / floor, f"over {THEIRS}": ratio(taken.get(THEIRS), took),
            "over 1 module": ratio(taken.get("1 module"), took),
        })  # fmt: skip
