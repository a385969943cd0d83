"""Answers on a published base: cold in a new process and warm in an engine, routed and named, with transformers' own on
the base alone beside it; and routing after a third of the base's layers, and after the last as in older stores.

python -m benchmarks.speed.published_generate --store STORE --module NAME --prompt FILE

STORE is any store whose router knows NAME; nothing is written to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.lib.common import interleaved, show
from growlm import Engine, Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a store on a published base")
    parser.add_argument("--module", required=True, help="one of its modules, which the router chooses for the prompt")
    parser.add_argument("--prompt", type=Path, required=True, help="a file of text, of which the beginning is asked")
    parser.add_argument("--length", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        older = Path(work, "older")
        copy_older(given.store, older)
        with Engine(Store.open(given.store), prefix_bytes=0) as engine:
            prompt = prompt_of(engine, given)
            if (chosen := engine.route(prompt).module) != given.module:
                raise SystemExit(f"{given.prompt}: the router chooses {chosen or 'none'} for it, not {given.module}")
            numbers = warm(engine, prompt, given, older)
        numbers |= cold(prompt, given)
    show("published_generate", numbers)


def copy_older(store: Path, to: Path) -> None:
    """A copy of a store without a routing layer, as stores were before there was one. What its modules keep for the
    router was read after that layer, which takes no time; what it chooses means nothing."""
    shutil.copytree(store, to, ignore=shutil.ignore_patterns("work", "lock", "scratch"))
    for path in [to / "store.json", *to.glob("modules/*/*/module.json")]:
        told = json.loads(path.read_text())
        if "base" in told and (store / told["base"]).exists():  # else a model's name
            told["base"] = str((store / told["base"]).resolve())
        path.write_text(json.dumps({**told, "routing_layer": None}))


def prompt_of(engine: Engine, given: argparse.Namespace) -> str:
    ids = engine.tokenizer(given.prompt.read_text(encoding="utf-8")[: 20 * given.length])["input_ids"]
    return engine.tokenizer.decode(ids[: given.length], skip_special_tokens=True)


def warm(engine: Engine, prompt: str, given: argparse.Namespace, older: Path) -> dict[str, Any]:
    other = Engine(Store.open(older), prefix_bytes=0)
    engine._loop.writer.end_tokens = set()  # as many tokens on both sides
    model = AutoModelForCausalLM.from_pretrained(engine.store.base_folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = engine.tokenizer(prompt, return_tensors="pt")

    @torch.inference_mode()
    def theirs(count: int) -> None:
        model.generate(**ids, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    routing = {"after a third": lambda: engine.route(prompt), "after the last": lambda: other.route(prompt)}
    numbers: dict[str, Any] = {
        "prompt_tokens": ids["input_ids"].shape[1],
        "warm_route_ms": _ms(interleaved(routing, given.rounds)),
    }
    for count in (1, given.new):
        measured = {
            "routed": partial(engine.generate, prompt, max_new_tokens=count),
            "named": partial(engine.generate, prompt, max_new_tokens=count, module=given.module),
            "transformers, base alone": partial(theirs, count),
        }
        numbers[f"warm_{count}_new_ms"] = _ms(interleaved(measured, given.rounds))
    other.close()
    return numbers


def cold(prompt: str, given: argparse.Namespace) -> dict[str, Any]:
    """Whole processes of `growlm generate`, files in the page cache; an answer may end before `--new` tokens."""
    command = [sys.executable, "-m", "growlm", "generate", str(given.store), prompt, "--max-new-tokens", str(given.new)]
    run = partial(subprocess.run, check=True, capture_output=True)
    told = json.loads(run([*command, "--json"]).stdout)
    assert told["finish_reason"] == "length", "the answer ended early: choose another prompt"
    measured = {"routed": partial(run, command), "named": partial(run, [*command, "--module", given.module])}
    return {f"cold_{given.new}_new_ms": _ms(interleaved(measured, given.rounds, warmup=1))}


def _ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value * 1e3, 1) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
