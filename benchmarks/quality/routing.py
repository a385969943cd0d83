"""Which module a router chooses for prompts of every form: passages, sentences, questions, and what belongs to none.

Nine domains are shown to the router as `growlm learn` shows them, with general text as it is shipped. No module is
trained: which is chosen is not a matter of its weights. Beside it stand the same router without parts of what it is
shown, and, with `--encoder`, a sentence encoder with the nearest centroid or the nearest neighbours of the same texts.
States are files in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.routing --data DIR --base CHECKPOINT --out routing/ --encoder MINILM
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import interleaved, machine, same_settings
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.prompts import LENGTHS, LONGEST, Prompts, all_prompts
from benchmarks.lib.published import LENGTH, OnPublished
from benchmarks.lib.retrieval import Encoder
from growlm import data as text_data
from growlm.base.checkpoint import fingerprint
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.progress import reporting, track
from growlm.router import EVIDENCE, NONE, GaussianRouter, files_of, frames_of, gather_evidence, mean_pool
from growlm.router.fitting import fit, gram_of
from growlm.router.lexicon import Lexicon
from growlm.router.states import base_states
from growlm.training.config import LearnConfig
from growlm.training.corpus import TrainingCorpus
from growlm.training.general import framed_texts, shipped_forms
from growlm.units import parse_count

NEIGHBOURS = 15
_SHOWN = 96  # texts of a form of general text, and a third as many held-out ones
WORDS = 65_536  # tokens of a domain's text that are counted
Split = Callable[[str, dict[str, Tensor]], Sequence[dict[str, Tensor]]]
Choose = Callable[[Prompts, int], list[str | None]]  # the modules that prompts cut to so many tokens are given


class Routing(OnPublished):
    """What routers are shown, and what they make of prompts."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(a)
        self.domains = list(DOMAINS)
        self.layer = max(round(self.base.num_layers / 3), 1)
        self.prompts = list(all_prompts(a.data, self.tokenizer, a.prompts, a.seed))
        self.shown: dict[str, list[list[int]]] = {}  # of domains and forms of general text, for an encoder

    def states(self, name: str, make: Callable[[], dict[str, Tensor]], of: object = None) -> dict[str, Tensor]:
        """States that are made once of the same texts."""
        if of is not None:
            name += f", {sha256(json.dumps(of).encode()).hexdigest()[:8]}"
        path = self.a.out / "states" / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path.with_suffix(".part"), {k: t.contiguous() for k, t in make().items()})
            path.with_suffix(".part").replace(path)
        return read_tensors(path)

    # What a router is shown

    def evidence(self, domain: str) -> dict[str, dict[str, Tensor]]:
        """Of a domain's passages, and of questions about it."""
        config = LearnConfig("lora", tokens=self.a.tokens, separator="\n\n", seed=self.a.seed)
        corpus = TrainingCorpus.read([self.a.data / domain / "train.txt"], config)
        tokens = corpus.tokenized(self.tokenizer, config)
        shown, heldout = replace(tokens, questions=([], [])).shown(self.base, config)
        self.shown[domain] = shown
        gather = partial(gather_evidence, self.base, layer=self.layer, seed=self.a.seed)
        return {
            "passages": self.states(f"{domain}, passages", lambda: gather(shown, heldout)),
            "questions": self.states(f"{domain}, questions", lambda: gather(*tokens.questions)),
        }

    def general(self) -> dict[str, dict[str, Tensor]]:
        forms = {}
        for name, (train, heldout) in shipped_forms(self.base, self.tokenizer).items():
            some = train[:_SHOWN], heldout[: _SHOWN // 3]
            self.shown[f"{NONE}, {name}"] = some[0]
            make = partial(gather_evidence, self.base, *some, layer=self.layer)
            forms[name] = self.states(f"{NONE}, {name}", make, of=some)
        return forms

    # Ways to choose

    def frames(self) -> dict[str, Tensor]:
        texts = framed_texts(self.base, self.tokenizer)
        return self.states("frames", lambda: frames_of(self.base, texts, self.layer), of=texts)

    def gaussian(
        self, *, questions: bool = True, forms: Sequence[str] | None = None, words: bool = True, frames: bool = True,
        split: Split | None = None,
    ) -> Choose:  # fmt: skip
        """The router of growlm.

        Args:
            split: parts of a domain's vectors, each of which is given a mean of its own.
        """
        known = {d: self.evidence(d) for d in self.domains}
        of_general = [g for name, g in self.general().items() if forms is None or name in forms]
        kept, names = [], []
        for domain, seen in known.items():
            parts = [seen["passages"], seen["questions"]] if questions else [seen["passages"]]
            whole = {key: torch.cat([part[key] for part in parts]) for key in ("vectors", "heldout")}
            for some in [whole] if split is None else split(domain, whole):
                kept.append(some)
                names.append(domain)
        general = {key: torch.cat([g[key] for g in of_general]) for key in ("vectors", "heldout")}
        general["forms"] = torch.tensor([len(g["vectors"]) for g in of_general])
        silent = self.frames()["silent"].tolist() if frames else []
        general["frames"] = self.frames()["frames"][: None if frames else 0]
        gram = torch.stack([gram_of(k["vectors"]) for k in [*kept, general]]).sum(0)
        fitted = fit([partial(files_of(k).__getitem__, EVIDENCE) for k in kept], general, gram)
        lexicon = self.lexicon(names, silent) if words else None
        router = GaussianRouter(names, *fitted, dict.fromkeys(names, 0), layer=self.layer, lexicon=lexicon)

        def choose(prompts: Prompts, length: int) -> list[str | None]:
            texts = [text[:length] for text in prompts.texts]
            return [r.module for r in router.route_pooled(self.pooled(prompts, length), texts)]

        return choose

    def lexicon(self, domains: Sequence[str], silent: Sequence[int]) -> Lexicon:
        """Of the words of so much of each domain's text as a module that recalls has by default."""

        def count(ids: np.ndarray) -> np.ndarray:
            step = max(ids.size // WORDS, 1)
            return np.bincount(ids.reshape(-1)[::step], minlength=self.base.vocab_size)

        counts: dict[str, np.ndarray] = {}
        for domain in dict.fromkeys(domains):
            packed = text_data.pack(self.documents(domain, "train"), self.tokenizer, LENGTH, max_tokens=self.a.text)
            counts[domain] = count(packed.tokens[:, :-1])
        forms = [form for name, form in shipped_forms(self.base, self.tokenizer).items() if name != "asked"]
        general = [token for train, heldout in forms for text in (*train, *heldout) for token in text]
        return Lexicon.of([counts[domain] for domain in domains], count(np.array(general)), silent)

    def pooled(self, prompts: Prompts, length: int) -> Tensor:
        """The base's states of prompts, pooled, (n, d)."""

        def make() -> dict[str, Tensor]:
            found: dict[int, list[Tensor]] = {n: [] for n in _lengths(prompts)}
            begin = len(self.begun([]))
            with torch.no_grad():
                for text in track(prompts.texts, prompts.name, "prompts"):
                    hidden, _ = base_states(self.base, [self.begun(text)], self.layer)
                    for n, pools in found.items():
                        pools.append(mean_pool(hidden[:, : begin + n]))
            return {str(n): torch.cat(pools) for n, pools in found.items()}

        return self.states(prompts.name, make, of=prompts.texts)[str(length)]

    def encoded(self, encoder: Encoder, neighbours: int | None) -> Choose:
        """The class of the nearest mean, or of most of the nearest texts; forms of general text are classes."""
        decode = self.tokenizer.decode

        def of(name: str, texts: Sequence[Sequence[int]]) -> Tensor:
            def make() -> dict[str, Tensor]:
                return {"vectors": encoder.encode([decode(text) for text in texts])}

            return self.states(f"encoder, {name}", make, of=list(texts))["vectors"]

        names = list(self.shown)
        known = [of(name, [t[:LONGEST] for t in texts]) for name, texts in self.shown.items()]
        means = torch.nn.functional.normalize(torch.stack([k.mean(0) for k in known]), dim=-1)
        label = torch.repeat_interleave(torch.arange(len(known)), torch.tensor([len(k) for k in known]))

        def choose(prompts: Prompts, length: int) -> list[str | None]:
            vectors = of(f"{prompts.name}, {length}", [t[:length] for t in prompts.texts])
            if neighbours is None:
                best = (vectors @ means.T).argmax(-1)
            else:
                near = label[(vectors @ torch.cat(known).T).topk(neighbours).indices]
                best = torch.stack([torch.bincount(row, minlength=len(known)).argmax() for row in near])
            return [None if names[i].startswith(NONE) else names[i] for i in best.tolist()]

        return choose

    def milliseconds(self, encoder: Encoder | None) -> dict[str, float]:
        """Of a prompt of 64 tokens: what its states, or its encoding, take."""
        text = next(p for p in self.prompts if p.form == "passage").texts[0][:LONGEST]
        sides: dict[str, Callable[[], object]] = {"base": lambda: base_states(self.base, [text], self.layer)}
        if encoder is not None:
            words = self.tokenizer.decode(text)
            sides["encoder"] = lambda: encoder.encode([words])
        with torch.no_grad():
            return {name: 1e3 * seconds for name, seconds in interleaved(sides, rounds=20).items()}


def _lengths(prompts: Prompts) -> tuple[int, ...]:
    return LENGTHS if prompts.form == "passage" else (LONGEST,)


def shares(prompts: Sequence[Prompts], choose: Choose) -> dict[str, float]:
    """Of each set of prompts, the share that is given what it should be."""
    found = {}
    for some in prompts:
        for length in _lengths(some):
            chosen = choose(some, length)
            name = some.name if some.form != "passage" else f"passage of {length}, {some.origin}"
            found[name] = sum(c == some.wanted for c in chosen) / len(chosen)
    return found


def means(found: dict[str, float], prompts: Sequence[Prompts]) -> dict[str, float]:
    """The mean over domains of each form; questions of one domain count once, whatever their origin."""
    forms: dict[str, dict[str, list[float]]] = {}
    for some in prompts:
        for length in _lengths(some):
            form = some.form if some.form != "passage" else f"passage of {length}"
            of = forms.setdefault(form, {})
            of.setdefault(some.wanted or some.origin, []).append(found[f"{form}, {some.origin}"])
    return {f: sum(sum(v) / len(v) for v in of.values()) / len(of) for f, of in forms.items()}


def read_arguments(told: str, *, prompts: int, text: int, encoder: bool = False) -> argparse.Namespace:
    """What the command line asks of a benchmark of routers, in a folder where no other was asked for.

    Args:
        told: what the benchmark says of itself.
        prompts, text: by default.
        encoder: whether it compares with one.
    """
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folders of domains and tasks")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True)
    if encoder:
        parser.add_argument("--encoder", type=Path, help="a folder with a sentence encoder, to compare with")
    parser.add_argument("--prompts", type=int, default=prompts, help="of each form and domain, at most")
    parser.add_argument("--tokens", type=parse_count, default=40_000, help="of each domain that are learned")
    parser.add_argument("--text", type=parse_count, default=text, help="of each domain that it carries")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    settings = {name: getattr(a, name) for name in ("prompts", "tokens", "text", "seed")}
    same_settings(a.out, {"base": fingerprint(a.base), **settings})
    return a


def main() -> None:
    a = read_arguments(str(__doc__), prompts=100, text=400_000, encoder=True)
    with reporting("routing", True):
        routing = Routing(a)
        ways: dict[str, Choose] = {
            "gaussian": routing.gaussian(),
            "no frames": routing.gaussian(frames=False),
            "no words": routing.gaussian(words=False),
            "no words, no questions": routing.gaussian(questions=False, words=False),
            "no words, talk alone": routing.gaussian(forms=["talk"], words=False),
            "none of these": routing.gaussian(questions=False, forms=["talk"], words=False, frames=False),
        }
        encoder = Encoder(a.encoder) if a.encoder else None
        if encoder is not None:
            ways["encoder, centroid"] = routing.encoded(encoder, None)
            ways[f"encoder, {NEIGHBOURS} neighbours"] = routing.encoded(encoder, NEIGHBOURS)
        found = {way: shares(routing.prompts, choose) for way, choose in ways.items()}
    print("| prompts | " + " | ".join(ways) + " |\n|---|" + "---:|" * len(ways))
    for name in next(iter(found.values())):
        print(f"| {name} | " + " | ".join(f"{found[way][name]:.1%}" for way in ways) + " |")
    mean = {way: means(found[way], routing.prompts) for way in ways}
    for form in next(iter(mean.values())):
        print(f"| **{form}**, mean of domains | " + " | ".join(f"{mean[way][form]:.1%}" for way in ways) + " |")
    times = routing.milliseconds(encoder)
    print("\nms to read a prompt of 64 tokens: " + ", ".join(f"{side} {ms:.1f}" for side, ms in times.items()))
    told = {"machine": machine(), "base": a.base.name, "shares": found, "means": mean, "milliseconds": times}
    write_atomic(a.out / "routing.json", json.dumps(told, indent=1).encode())


if __name__ == "__main__":
    main()
