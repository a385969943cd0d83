"""engine.generate against transformers' generate on the exported checkpoint, and routing against the base's prefill.

python -m benchmarks.speed.generate
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import growlm
from benchmarks.lib.common import interleaved, qwen2, save_base, show
from growlm.base.rooms import Rooms
from growlm.engine.runner import Runner, Work
from growlm.modules import ModuleSet
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.router import GaussianRouter, files_of, gather_evidence, write_general
from growlm.store import Store

PROMPT, NEW = 64, 64


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store.create(folder / "brain", base=save_base(folder / "base", qwen2()))
        base = store.load_base()
        module = Blocks.create(base, BlocksConfig(), torch.arange(8192))
        rng = np.random.default_rng(0)
        texts = rng.integers(1, 32_000, size=(16, PROMPT)).tolist()
        known = gather_evidence(base, texts[:8], texts[8:], layer=store.manifest.routing_layer)
        write_general(store, base, [(texts[:8], texts[8:])])
        store.commit("medicine", module, {}, files_of(known))
        growlm.export(store, folder / "out", "medicine")
        model = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
        model.generation_config.eos_token_id = None
        engine = growlm.Engine(store, prefix_bytes=0)
        engine._loop.writer.end_tokens = set()  # random weights: write all tokens on both sides
        ids = torch.tensor(texts)

        def ours(count: int) -> None:
            engine.generate_many(texts[:count], modules="medicine", max_new_tokens=NEW)

        @torch.inference_mode()
        def theirs(count: int) -> None:
            mask = torch.ones_like(ids[:count])
            model.generate(ids[:count], attention_mask=mask, max_new_tokens=NEW, do_sample=False)

        numbers: dict[str, object] = {}
        for count, rounds in ((1, 7), (16, 5)):
            seconds = interleaved({"growlm": lambda: ours(count), "transformers": lambda: theirs(count)}, rounds)  # noqa: B023
            weights = sum(p.numel() * 4 for p in model.parameters())
            numbers[f"batch_{count}"] = {
                "tokens_per_second": {k: round(count * NEW / v, 1) for k, v in seconds.items()},
                "ratio": round(seconds["growlm"] / seconds["transformers"], 3),
                "weight_gigabytes_per_second": round(weights * NEW / seconds["growlm"] / 1e9, 1),
            }

        long = rng.integers(1, 32_000, size=512).tolist()
        domains, width = 1000, base.hidden_size
        torch.manual_seed(0)
        engine._routing.router = GaussianRouter(
            names := [f"d{i}" for i in range(domains)],
            torch.randn(domains, width),
            torch.randn(1, width),
            torch.randn(width, width) / width**0.5,
            torch.full((domains,), 1e9),
            dict.fromkeys(names, base.num_layers),
        )
        runner, alone = Runner(base), ModuleSet(base)

        def prefill() -> None:
            runner.run([Work(alone, torch.tensor(long), 0, Rooms().new(), leaves=base.num_layers)])

        times = interleaved({"prefill": prefill, "route": lambda: engine.route(long)}, 15)
        numbers["routing_512_tokens_1000_domains"] = {
            "milliseconds": {k: round(v * 1e3, 2) for k, v in times.items()},
            "share_of_prefill": round(times["route"] / times["prefill"] - 1, 4),
        }
        show("generate", numbers)
        engine.close()


if __name__ == "__main__":
    main()
