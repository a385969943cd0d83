"""A text that is recalled: bytes a token, seconds to sort, milliseconds to find a context, by size; what a token of an
answer costs with it.

Texts of every size are windows drawn from the training text of all domains; contexts are of their test text, one at
a time, as decoding asks. `cold`: after the system was told to forget the file. With STORE, which has a module of kind
lora and one of lora+recall, 32 tokens are generated with both in turn. Of very large texts, which are sorted in parts,
only so many parts are sorted (`--sort`); the others are copies of them, and their seconds counted as theirs.

python -m benchmarks.speed.recall --data DIR --base CHECKPOINT --out texts/ [--sizes 100k 10M 1000M] \
    [--store STORE --modules law law_text]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import machine
from benchmarks.lib.domains import DOMAINS
from growlm import data as text_data
from growlm.base.checkpoint import load_tokenizer, read_config
from growlm.disk.files import write_atomic
from growlm.disk.tensors import write_tensors
from growlm.engine import Engine
from growlm.recall import FILE
from growlm.recall.suffixes import LONGEST
from growlm.recall.text import _PART, Part, RecalledText
from growlm.store import Store
from growlm.units import format_count, parse_count

WINDOW = 512  # tokens of a document
CONTEXTS = 500


def tokens_of(a: argparse.Namespace, split: str) -> np.ndarray:
    """All domains' tokens, kept in a file."""
    path = a.out / f"{split}.npy"
    if not path.exists():
        tokenizer = load_tokenizer(a.base)
        parts = []
        for domain in DOMAINS:
            documents = text_data.read([a.data / domain / f"{split}.txt"], separator="\n\n").documents
            parts += list(text_data.whole(documents, tokenizer))
        np.save(path, np.concatenate(parts))
    return np.load(path)


def documents(tokens: np.ndarray, size: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    for number in range(-(-size // WINDOW)):
        start = int(draw.integers(len(tokens) - WINDOW))
        yield f"document {number}", tokens[start : start + WINDOW]


def build(a: argparse.Namespace, tokens: np.ndarray, size: int) -> tuple[Path, float]:
    """The folder of a sorted text, and the seconds that sorting took."""
    folder, vocab = a.out / str(size), read_config(a.base).vocab_size
    done = folder / "seconds.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        for number, at in enumerate(range(0, size, _PART)):
            file = folder / FILE.format(number)
            if number >= a.sort and size - at >= _PART:  # other bytes on the disk, all the same
                shutil.copyfile(folder / FILE.format(number % a.sort), file)
                seconds += seconds / number
                continue
            some = list(documents(tokens, min(_PART, size - at), number))
            start = time.monotonic()
            part = Part.of(some, vocab)
            seconds += time.monotonic() - start
            write_tensors(file, part.tensors())
            print(f"    part {number}: {seconds:.0f} s in all", flush=True)
        write_atomic(done, json.dumps(seconds).encode())
    return folder, json.loads(done.read_text())


def asked(text: RecalledText, contexts: np.ndarray) -> list[float]:
    """Milliseconds of each context, alone."""
    found = []
    for row in range(len(contexts)):
        start = time.perf_counter()
        text.find(contexts[row : row + 1])
        found.append(1000 * (time.perf_counter() - start))
    return found


def measure(a: argparse.Namespace, tokens: np.ndarray, contexts: np.ndarray, size: int) -> dict[str, Any]:
    folder, seconds = build(a, tokens, size)
    files = sorted(folder.glob("text-*.safetensors"))
    vocab = read_config(a.base).vocab_size
    for file in files:
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    text = RecalledText.open(folder, {file.name: "" for file in files}, vocab, verify=False)
    cold = asked(text, contexts[:100])
    asked(text, contexts)
    warm = asked(text, contexts)
    batch = time.perf_counter()
    text.find(contexts)
    batch = 1000 * (time.perf_counter() - batch) / len(contexts)
    return {
        "tokens": size,
        "parts": len(files),
        "bytes a token": sum(file.stat().st_size for file in files) / size,
        "sorting, s": seconds,
        "cold, ms": statistics.median(cold),
        "cold, ms, 95th of 100": sorted(cold)[94],
        "warm, ms": statistics.median(warm),
        "in a batch, ms": batch,
    }


def generation(a: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a generated token with either module, in turn."""
    found: dict[str, list[float]] = {name: [] for name in a.modules}
    prompt = a.prompt.read_text()[:400] if a.prompt else "The patient was given"
    with Engine(Store.open(a.store), prefix_bytes=0, drafts=False) as engine:
        engine._loop.writer.end_tokens = set()
        for turn in range(a.turns + 1):
            for name in a.modules:
                times = {}
                for new in (1, 33):
                    start = time.perf_counter()
                    engine.generate(prompt, module=name, max_new_tokens=new)
                    times[new] = time.perf_counter() - start
                if turn:
                    found[name].append(1000 * (times[33] - times[1]) / 32)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train and test.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where texts are kept")
    parser.add_argument("--sizes", type=parse_count, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--sort", type=int, default=3, help="parts that are sorted; others are copies")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--modules", nargs=2, metavar=("LORA", "LORA_RECALL"))
    parser.add_argument("--prompt", type=Path, help="a file that begins with the prompt")
    parser.add_argument("--turns", type=int, default=7)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    tokens, test = tokens_of(a, "train"), tokens_of(a, "test")
    ends = np.random.default_rng(0).integers(LONGEST, len(test), CONTEXTS)
    contexts = test[ends[:, None] - np.arange(LONGEST)].astype(np.int64)
    for size in a.sizes:
        found = measure(a, tokens, contexts, size)
        write_atomic(a.out / f"{size}.json", json.dumps(found, indent=1).encode())
        print(f"{format_count(size)} tokens: " + ", ".join(f"{k} {v:,.3g}" for k, v in found.items()), flush=True)
    if a.store:
        found = generation(a)
        write_atomic(a.out / "generation.json", json.dumps(found, indent=1).encode())
        one, other = found.values()
        print(f"ms a generated token: {found}, {other / one:.3f} x", flush=True)


if __name__ == "__main__":
    main()
