"""How well the gaussian router chooses, by how much of a domain it was shown: passages, their length, and the layer.

    python -m benchmarks.quality.evidence --data DIR --base PATH --out evidence/

DIR holds a folder a domain with train.txt and test.txt, and one of general text. Each domain's states are computed once
and kept in OUT, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.common import machine
from benchmarks.lib.domains import DOMAINS, GENERAL
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import load_model, load_tokenizer
from growlm.base.padding import pad_right
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.progress import reporting, track
from growlm.router.evidence import EVIDENCE, SCALE, files_of
from growlm.router.fitting import fit, gram_of
from growlm.router.gaussian import routes_of
from growlm.router.states import mean_pool

LENGTHS = (8, 16, 32, 64, 128)  # tokens from the beginning of a passage
HELDOUT = 32  # passages beside those that are learned from
ASKED = (16, 32, 64)  # tokens of the prompts


@torch.no_grad()
def states_of(base: Base, texts: list[list[int]], layers: list[int], title: str) -> Tensor:
    """Pooled beginnings (n, layers, lengths, d), in float32; a text that is shorter is pooled whole."""
    run, pooled = base.layers_to_run(), []
    for at in track(range(0, len(texts), 8), title, "batches"):
        ids, real = pad_right(texts[at : at + 8], base.device)
        hidden, shared = base.begin(ids)
        hidden, done, found = base.embed_positions(hidden, shared.positions), 0, []
        for layer in layers:
            hidden = base.run(hidden, run[done:layer], shared)
            done = layer
            seen = base.norm(hidden) if layer == base.num_layers else hidden
            ends = [real & (torch.arange(ids.shape[1]) < length) for length in LENGTHS]
            found.append(torch.stack([mean_pool(seen, end) for end in ends], 1))
        pooled.append(torch.stack(found, 1))
    return torch.cat(pooled)


def passages(path: Path, tokenizer: object, count: int) -> list[list[int]]:
    documents = text_data.read([path], separator="\n\n").documents
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    some = [documents[i] for i in order[: 8 * count]]
    found = [p.tokens for p in text_data.passages(some, tokenizer, LENGTHS[-1])]
    # One of each document first, so that a long one does not fill the sample.
    return sorted(found, key=len, reverse=True)[: 4 * count][::4] if len(found) >= 4 * count else found[:count]


def whole(vectors: Tensor) -> Tensor:
    return (vectors * SCALE).round().clamp(-32768, 32767).to(torch.int16)


def accuracy(
    states: dict[str, dict[str, Tensor]], layer: int, count: int, lengths: list[int]
) -> dict[str, dict[int, float]]:
    """Share of prompts that are given their own domain, or none for general text, by the prompts' length."""
    names = [name for name in states if name != GENERAL]
    places = [LENGTHS.index(n) for n in lengths]

    def shown(name: str, part: str, most: int) -> Tensor:
        return whole(states[name][part][:most, layer][:, places].flatten(0, 1))

    general = {"vectors": shown(GENERAL, "train", count), "heldout": shown(GENERAL, "heldout", HELDOUT)}
    general["forms"] = torch.tensor([len(general["vectors"])])
    evidence = {
        name: {"vectors": shown(name, "train", count), "heldout": shown(name, "heldout", HELDOUT)} for name in names
    }
    gram = sum(gram_of(kept["vectors"]) for kept in [general, *evidence.values()])
    summaries = [partial(files_of(kept).__getitem__, EVIDENCE) for kept in evidence.values()]
    fitted = fit(summaries, general, gram)
    right: dict[str, dict[int, float]] = {"domains": {}, "none": {}}
    for length in ASKED:
        hits = {}
        for name in states:
            vectors = states[name]["test"][:, layer, LENGTHS.index(length)]
            whitened = vectors @ fitted.whiten
            away, from_general = (torch.cdist(whitened, m).square() for m in (fitted.means, fitted.general))
            chosen = [route.module for route in routes_of(names, away, fitted.limits, from_general)]
            hits[name] = sum(c == (None if name == GENERAL else name) for c in chosen) / len(chosen)
        right["domains"][length] = sum(hits[n] for n in names) / len(names)
        right["none"][length] = hits[GENERAL]
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--passages", type=int, default=64, help="of each domain that are learned from, at most")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(a.base)
    base = Base(load_model(a.base, "float32"), str(a.base))
    layers = sorted({max(round(base.num_layers * share), 1) for share in (0.2, 1 / 3, 0.5, 2 / 3, 0.8, 1.0)})
    states: dict[str, dict[str, Tensor]] = {}
    with reporting("evidence", True):
        for name in [*a.domains, GENERAL]:
            file = a.out / f"{name}.safetensors"
            if not file.exists():
                train = passages(a.data / name / "train.txt", tokenizer, a.passages + HELDOUT)
                test = passages(a.data / name / "test.txt", tokenizer, 40)
                found = states_of(base, train, layers, f"{name}, to learn from")
                parts = {"train": found[HELDOUT:], "heldout": found[:HELDOUT]}
                parts["test"] = states_of(base, test, layers, f"{name}, to ask")
                write_tensors(file, {k: v.half().contiguous() for k, v in parts.items()})
            states[name] = {k: v.float() for k, v in read_tensors(file).items()}
    rows = []
    for place, layer in enumerate(layers):
        for count in [n for n in (8, 16, 32, 64, 128) if n <= a.passages]:
            for longest in (32, 64, 128):
                right = accuracy(states, place, count, [n for n in LENGTHS if n <= longest])
                rows.append({"layer": layer, "passages": count, "longest": longest, **right})
                told = "  ".join(f"{n}: {right['domains'][n]:.3f} {right['none'][n]:.2f}" for n in ASKED)
                print(f"layer {layer:3} passages {count:4} of {longest:4} tokens   {told}", flush=True)
    write_atomic(a.out / "evidence.json", json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
