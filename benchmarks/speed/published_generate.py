"""Answers on a published base: cold in a new process and warm in an engine, routed and named, with the router reading
after a third of the base's layers and after the last; transformers alone beside it.

python -m benchmarks.speed.published_generate --store STORE --module NAME --prompt FILE

STORE is any store whose router knows NAME; it is copied, nothing is written to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.lib.common import interleaved, show
from growlm import Engine, Store

LAYERS = ("after a third", "after the last")


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
        stores = {name: Path(work, name.replace(" ", "-")) for name in LAYERS}
        for name, path in stores.items():
            copy(given.store, path, keep_layer=name == LAYERS[0])
        numbers = warm(stores, given) | cold(stores, given)
    show("published_generate", numbers)


def copy(store: Path, to: Path, *, keep_layer: bool) -> None:
    """A copy of a store, of the files that it may share. Without its routing layer it is as stores were before there
    was one; what its modules keep for the router was read after that layer, which costs nothing and takes no time."""
    shutil.copytree(store, to, ignore=shutil.ignore_patterns("work", "lock", "scratch"), copy_function=_link)
    for path in [to / "store.json", *to.glob("modules/*/*/module.json")]:
        told = json.loads(path.read_text())
        if "base" in told:
            told["base"] = str((store / told["base"]).resolve())
        if not keep_layer:
            told["routing_layer"] = None
        path.write_text(json.dumps(told))


def _link(source: str, to: str) -> None:
    if source.endswith(".json"):
        shutil.copyfile(source, to)
    else:
        shutil.copy(source, to)


def prompt_of(engine: Engine, given: argparse.Namespace) -> str:
    ids = engine.tokenizer(given.prompt.read_text(encoding="utf-8")[: 20 * given.length])["input_ids"]
    return engine.tokenizer.decode(ids[: given.length], skip_special_tokens=True)


def warm(stores: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    engines = {name: Engine(Store.open(path)) for name, path in stores.items()}
    one = engines[LAYERS[0]]
    prompt = prompt_of(one, given)
    length = len(one.tokenizer(prompt)["input_ids"])
    for engine in engines.values():
        engine._end_tokens = set()  # as many tokens on all sides
    model = AutoModelForCausalLM.from_pretrained(one.store.base_folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = one.tokenizer(prompt, return_tensors="pt")

    @torch.inference_mode()
    def theirs(count: int) -> None:
        model.generate(**ids, min_new_tokens=count, max_new_tokens=count, do_sample=False)

    def sides(do: Callable[[Engine], object]) -> dict[str, Callable[[], object]]:
        return {name: lambda e=engine: do(e) for name, engine in engines.items()}  # type: ignore[misc]

    ask = {"routed": {}, "named": {"module": given.module}}
    numbers: dict[str, Any] = {
        "prompt_tokens": length,
        "chosen": {name: engine.route(prompt).module for name, engine in engines.items()},
        "warm_route_ms": _ms(interleaved(sides(lambda e: e.route(prompt)), given.rounds)),
    }
    for count in (1, given.new):
        for way, options in ask.items():
            measured = sides(lambda e, o=options, n=count: e.generate(prompt, max_new_tokens=n, **o))  # type: ignore[misc]
            measured["transformers, base alone"] = lambda n=count: theirs(n)  # type: ignore[misc]
            numbers[f"warm_{way}_{count}_new_ms"] = _ms(interleaved(measured, given.rounds))
    for engine in engines.values():
        engine.close()
    return numbers


def cold(stores: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Whole processes, files in the page cache."""
    prompt = given.prompt.read_text(encoding="utf-8")[: 4 * given.length]

    def process(path: Path, *options: str) -> Callable[[], object]:
        command = [sys.executable, "-m", "growlm", "generate", str(path), prompt, "--max-new-tokens", str(given.new)]
        return lambda: subprocess.run([*command, *options], check=True, capture_output=True)

    numbers = {}
    for way, options in (("routed", ()), ("named", ("--module", given.module))):
        measured = {name: process(path, *options) for name, path in stores.items()}
        numbers[f"cold_{way}_{given.new}_new_ms"] = _ms(interleaved(measured, given.rounds, warmup=1))
    return numbers


def _ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value * 1e3, 1) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
