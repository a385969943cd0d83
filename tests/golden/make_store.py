"""Makes `tests/golden/store-1`: a base, a store with a module of every kind and both routers, and their answers.

The folder holds what one release wrote, for all later ones to open; it is made again, under the next number, only when
a release writes something that older ones did not. `python tests/golden/make_store.py FOLDER` (one minute).
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import torch

from growlm import Engine, Store, grow, learn, pretrain
from growlm.training.config import GrowConfig, LearnConfig, PretrainConfig, RouterConfig
from growlm.training.router import train_router

SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
# Words of letters of its own for each domain, so that a tiny base tells them apart.
DOMAINS = {"law": "abcde", "drugs": "01234", "signs": "+-*/=<>", "tales": "vwxyz", "general": "KLMNO"}
KINDS = {
    "law": {"kind": "blocks", "num_layers": 1},
    "drugs": {"kind": "blocks", "num_layers": 1, "placement": "interleaved", "vocabulary": "both"},
    "signs": {"kind": "experts", "num_experts": 2, "num_attention_experts": 2, "router_size": 8},
    "tales": {"kind": "peer", "num_experts": 64, "num_heads": 2, "top_k": 4, "layers": (1,)},
}
COMMON = {
    "tokens": 6400,
    "sequence_length": 32,
    "batch_size": 8,
    "precision": "float32",
    "router_samples": 16,
    "admit_anyway": True,
    "learning_rate": 3e-3,
}


def text(domain: str, seed: int, words: int = 24) -> str:
    draw = random.Random(f"{domain}/{seed}")
    return " ".join("".join(draw.choices(DOMAINS[domain], k=draw.randint(2, 5))) for _ in range(words))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    work = folder / "texts"
    work.mkdir(parents=True)
    for domain in DOMAINS:
        lines = [json.dumps({"text": text(domain, seed)}) for seed in range(150)]
        (work / f"{domain}.jsonl").write_text("\n".join(lines))
    (work / "config.json").write_text(json.dumps(SHAPE))
    everything = [work / f"{domain}.jsonl" for domain in DOMAINS]
    shape = PretrainConfig(
        config=str(work / "config.json"), vocab_size=288, tokens=200_000, sequence_length=64, precision="float32",
        learning_rate=5e-3,
    )  # fmt: skip
    pretrain(folder / "base", everything, shape)
    store = Store.create(folder / "store", folder / "base", keep_samples="2kB")
    from growlm.router import write_general

    tokenizer = store.load_tokenizer()
    texts = [tokenizer.encode(text("general", seed)) for seed in range(40)]
    write_general(store, store.load_base(), [(texts[:30], texts[30:])])
    for name, settings in KINDS.items():
        learn(store, name, [work / f"{name}.jsonl"], LearnConfig(**COMMON, **settings))
    grow(store, "tales", 64, [work / "tales.jsonl"], GrowConfig(**COMMON))
    train_router(store, RouterConfig(tokens=20_000, sequence_length=32))
    (folder / "answers.json").write_text(json.dumps(answers(store), indent=1))
    shutil.rmtree(work)
    for path in (folder / "store" / "cache", folder / "store" / "work", folder / "store" / "scratch"):
        shutil.rmtree(path, ignore_errors=True)


def answers(store: Store) -> dict[str, object]:
    """Logits and greedy tokens of every module and the base, and the choices of both routers."""
    found: dict[str, object] = {}
    for router in ("gaussian", "product-key", "transformer"):
        with Engine(store, router=router, device="cpu") as engine:
            routes = {domain: engine.route(text(domain, 1000)) for domain in DOMAINS}
            found[router] = {d: {"module": r.module, "scores": r.scores} for d, r in routes.items()}
            if router != "gaussian":
                continue
            tokens = {name: engine.tokenizer.encode(text(name, 2000))[:24] for name in KINDS}
            for name, prompt in tokens.items():
                for module in (name, None):
                    logits = engine.logits(torch.tensor([prompt]), module)[0, -1]
                    answer = engine.generate(prompt, module=module, max_new_tokens=12)
                    key = f"{name} by {module or 'base'}"
                    found[key] = {"prompt": prompt, "tokens": answer.tokens, "logits": logits[::8].tolist()}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
