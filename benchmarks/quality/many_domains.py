"""The router among very many domains: texts that are cut into languages, titles of statutes, speakers, chapters,
speeches and articles, each a domain with a module of its own.

Of each domain some passages are shown to the router, without the questions about them that `growlm learn` shows
besides, its words are counted, and other passages of the same documents are asked about. A module here is the text
itself (`recall`), which nothing needs to be trained for, with the gates that every such module begins with: so that
beside the share that is chosen right stands the share of the right modules' gain that is kept. A wrong choice among
chapters of one book keeps most of it. With `--encoder`, a sentence encoder chooses from the same passages, by the
nearest centroid or the nearest neighbours. Each number of domains is a file in OUT.

python -m benchmarks.quality.many_domains --data DIR --base CHECKPOINT --out many/ --domains 4 30 128 1024
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.common import interleaved, kept, machine, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.published import OnPublished
from benchmarks.lib.retrieval import Encoder
from growlm.base.checkpoint import fingerprint
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.modules.scoring import num_labels, paired_losses
from growlm.progress import reporting, track
from growlm.recall.text import RecalledText
from growlm.router import EVIDENCE, GaussianRouter, files_of, frames_of, gather_evidence, mean_pool
from growlm.router.fitting import fit, gram_of
from growlm.router.lexicon import Lexicon
from growlm.router.states import base_states
from growlm.training.general import framed_texts, shipped_forms
from growlm.training.recalling import typical_gates

LENGTH, LENGTHS = 72, (16, 32, 64)  # tokens of a passage, and of what is asked: their beginnings
SHOWN = {4: 96, 30: 48, 128: 24, 1024: 8}  # passages of each domain, and a third as many held out
NEIGHBOURS = 5
_GENERAL = 96  # texts of each form of general text
_COARSE = 128  # domains, at the most, that are cut from titles of statutes as a whole
_LEARNED = 50_000  # tokens of a domain's text, at the most
_LANGUAGES = {  # what tells them in the texts of programs
    "c++": r"#include", "php": r"<\?php", "java": r"\bimport java", "c#": r"\busing System", "kotlin": r"\bfun \w+\(",
    "ruby": r"\bdef \w+[^:]*$", "python": r"\bdef \w+\(.*:$", "javascript": r"\bfunction ",
}  # fmt: skip
Choose = Callable[[Sequence[Sequence[int]]], list[int | None]]  # the number of each text's domain


@dataclass(frozen=True)
class Piece:
    """One domain: its source, its name in it, and passages of token ids: learned, shown, held out, and asked."""

    source: str
    name: str
    learned: list[list[int]]
    shown: list[list[int]]
    heldout: list[list[int]]
    asked: list[list[int]]

    @property
    def label(self) -> str:
        return f"{self.source}: {self.name}"


def part_of(source: str, text: str, number: int, fine: bool) -> str | None:
    """The domain within a source that a document belongs to; None where nothing tells."""
    if source == "code_mbxp":
        return next((name for name, sign in _LANGUAGES.items() if re.search(sign, text, re.MULTILINE)), None)
    if source == "law_dc_code":
        found = re.match(r"§ (\d+)[-:](\d+)", text)
        return found and (f"title {found[1]}, {int(found[2]) // 100} hundred" if fine else f"title {found[1]}")
    if source == "shakespeare":
        return text.partition(":")[0]
    return "all" if source == "math_gsm8k" else f"document {number}"


class ManyDomains(OnPublished):
    """Pieces of one base's sources, and what chooses among them."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(a)
        self._pools: dict[tuple[int, ...], Tensor] = {}  # by text

    def pieces(self, count: int) -> list[Piece]:
        """So many domains, of every source in turn, the largest first."""
        shown = self.a.shown or next((n for most, n in SHOWN.items() if count <= most), min(SHOWN.values()))
        needed = shown + max(shown // 3, 2) + self.a.asked
        by_source = []
        for source in track(self.a.sources, "cutting sources", "sources"):
            found: dict[str, list[str]] = defaultdict(list)
            for number, document in enumerate(self.documents(source, "train")):
                if (part := part_of(source, document.text, number, count > _COARSE)) is not None:
                    found[part].append(document.text)
            largest = sorted(found.items(), key=lambda item: (-sum(map(len, item[1])), item[0]))
            by_source.append(iter([(source, part, texts) for part, texts in largest]))
        pieces: list[Piece] = []
        while by_source and len(pieces) < count:
            for some in list(by_source):
                piece = next((p for item in some if (p := self._piece(*item, shown, needed))), None)
                if piece is None:
                    by_source.remove(some)
                elif len(pieces) < count:
                    pieces.append(piece)
        return pieces

    def _piece(self, source: str, name: str, texts: Sequence[str], shown: int, needed: int) -> Piece | None:
        """None where there is too little text."""
        text = "\n\n".join(texts)[: 8 * _LEARNED]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:_LEARNED]
        passages = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
        if len(passages) < needed:
            return None
        random.Random(self.a.seed).shuffle(passages)
        asked, rest = passages[: self.a.asked], passages[self.a.asked :]
        return Piece(source, name, rest, rest[:shown], rest[shown : shown + max(shown // 3, 2)], asked)

    # Ways to choose

    def router(self, pieces: Sequence[Piece]) -> GaussianRouter:
        """Modules are named by their numbers."""
        gather = partial(gather_evidence, self.base, layer=self.layer, seed=self.a.seed)
        begun = self.begun
        evidence = [
            gather(list(map(begun, p.shown)), list(map(begun, p.heldout)))
            for p in track(pieces, "showing domains", "domains")
        ]
        gram = torch.stack([gram_of(k["vectors"]) for k in [*evidence, self.general]]).sum(0)
        fitted = fit([partial(files_of(k).__getitem__, EVIDENCE) for k in evidence], self.general, gram)
        names = [str(number) for number in range(len(pieces))]
        lexicon = self._lexicon(pieces)
        return GaussianRouter(names, *fitted, dict.fromkeys(names, 0), layer=self.layer, lexicon=lexicon)

    @cached_property
    def general(self) -> dict[str, Tensor]:
        forms = [
            gather_evidence(self.base, train[:_GENERAL], heldout[: _GENERAL // 3], layer=self.layer)
            for train, heldout in shipped_forms(self.base, self.tokenizer).values()
        ]
        found = {key: torch.cat([form[key] for form in forms]) for key in ("vectors", "heldout")}
        found["forms"] = torch.tensor([len(form["vectors"]) for form in forms])
        return found | frames_of(self.base, framed_texts(self.base, self.tokenizer), self.layer)

    @property
    def layer(self) -> int:
        return max(round(self.base.num_layers / 3), 1)

    def routed(self, router: GaussianRouter, words: bool, texts: Sequence[Sequence[int]]) -> list[int | None]:
        pools = torch.cat([self._pooled(tuple(text)) for text in texts])
        routes = router.route_pooled(pools, texts if words else None)
        return [None if r.module is None else int(r.module) for r in routes]

    @torch.no_grad()
    def _pooled(self, text: tuple[int, ...]) -> Tensor:
        """(1, d); a passage is read once for all its beginnings, which are asked the longest first."""
        if text not in self._pools:
            hidden, _ = base_states(self.base, [self.begun(text)], self.layer)
            begin = hidden.shape[1] - len(text)
            for n in {len(text), *LENGTHS}:
                self._pools[text[:n]] = mean_pool(hidden[:, : begin + n])
        return self._pools[text]

    def forget(self, text: Sequence[int]) -> None:
        """It is read again when it is asked next."""
        self._pools.pop(tuple(text), None)

    def _lexicon(self, pieces: Sequence[Piece]) -> Lexicon:
        def count(texts: Sequence[Sequence[int]]) -> np.ndarray:
            return np.bincount(np.concatenate([np.asarray(t) for t in texts]), minlength=self.base.vocab_size)

        forms = [form for name, form in shipped_forms(self.base, self.tokenizer).items() if name != "asked"]
        general = count([text for train, heldout in forms for text in (*train, *heldout)])
        found = Lexicon.of((count(piece.learned) for piece in pieces), general, self.general["silent"].tolist())
        assert found is not None
        return found

    def encoded(self, pieces: Sequence[Piece], encoder: Encoder) -> dict[str, Choose]:
        """By the nearest centroid, and by most of the nearest texts."""
        decode = self.tokenizer.decode
        known = [
            encoder.encode([decode(text[: LENGTHS[-1]]) for text in piece.shown])
            for piece in track(pieces, "encoding domains", "domains")
        ]
        means = torch.nn.functional.normalize(torch.stack([k.mean(0) for k in known]), dim=-1)
        label = torch.repeat_interleave(torch.arange(len(known)), torch.tensor([len(k) for k in known]))
        every = torch.cat(known)

        def centroid(texts: Sequence[Sequence[int]]) -> list[int | None]:
            return [int(i) for i in (encoder.encode([decode(text) for text in texts]) @ means.T).argmax(-1)]

        def near(texts: Sequence[Sequence[int]]) -> list[int | None]:
            found = label[(encoder.encode([decode(text) for text in texts]) @ every.T).topk(NEIGHBOURS).indices]
            return [int(torch.bincount(row, minlength=len(known)).argmax()) for row in found]

        return {"encoder, centroid": centroid, f"encoder, {NEIGHBOURS} neighbours": near}

    # What a choice is worth

    def losses(self, pieces: Sequence[Piece], passage: Sequence[int]) -> list[float]:
        """Nats of a passage under the base alone, then with the text of each of some domains."""
        sets = [ModuleSet(self.base), *(ModuleSet(self.base, [self._module(piece)]) for piece in pieces)]
        return paired_losses(sets, [passage])[:, 0].tolist()

    def _module(self, piece: Piece) -> KnowledgeModule:
        recall = kind_of("recall")
        module = recall.create(self.base, recall.Config(recall=True)).float()
        assert module.memory is not None
        module.memory.gates.data.copy_(typical_gates())
        documents = [("", np.array(text, dtype=np.int32)) for text in piece.learned]
        module.memory.text = RecalledText.of(documents, self.base.vocab_size)
        return module


def measured(bench: ManyDomains, count: int, encoder: Encoder | None) -> dict[str, Any]:
    """Of every way: shares of right domains and sources by length, share of the gain kept, milliseconds."""
    pieces = bench.pieces(count)
    texts = [(number, text) for number, piece in enumerate(pieces) for text in piece.asked]
    router = bench.router(pieces)
    ways: dict[str, Choose] = {
        "gaussian": partial(bench.routed, router, True),
        "no words": partial(bench.routed, router, False),
    }
    if encoder is not None:
        ways |= bench.encoded(pieces, encoder)
    passages = [text for _, text in texts]
    chosen = {
        way: {n: choose([text[:n] for text in passages]) for n in reversed(LENGTHS)}
        for way, choose in track(ways.items(), "choosing", "ways", total=len(ways))
    }
    base: list[float] = []
    known: dict[tuple[int, int], float] = {}  # by domain and number of the passage
    for at, (owner, passage) in enumerate(track(texts, "scoring", "passages")):
        wanted = sorted({owner, *(found[LENGTHS[-1]][at] for found in chosen.values())} - {None})
        first, *others = bench.losses([pieces[i] for i in wanted], passage)
        base.append(first)
        known |= {(i, at): loss for i, loss in zip(wanted, others, strict=True)}

    def loss(piece: int | None, at: int) -> float:
        return base[at] if piece is None else known[piece, at]

    oracle = sum(base[at] - loss(owner, at) for at, (owner, _) in enumerate(texts))
    source = [piece.source for piece in pieces]
    result: dict[str, Any] = {
        "domains": len(pieces),
        "shown": len(pieces[0].shown),
        "asked": len(texts),
        "oracle_gain": oracle / num_labels(passages),
        "ways": {},
    }
    one = passages[0][: LENGTHS[-1]]

    def alone(choose: Choose) -> None:
        bench.forget(one)
        choose([one])

    times = interleaved({way: partial(alone, choose) for way, choose in ways.items()}, rounds=10)
    for way, by_length in chosen.items():
        longest = by_length[LENGTHS[-1]]
        shares = {
            str(n): {
                "domain": sum(c == owner for c, (owner, _) in zip(found, texts, strict=True)) / len(texts),
                "source": sum(
                    c is not None and source[c] == source[owner] for c, (owner, _) in zip(found, texts, strict=True)
                )
                / len(texts),
                "none": sum(c is None for c in found) / len(texts),
            }
            for n, found in sorted(by_length.items())
        }
        gain = sum(base[at] - loss(c, at) for at, c in enumerate(longest))
        mistaken = [(pieces[texts[at][0]].label, pieces[c].label) for at, c in enumerate(longest)
                    if c is not None and c != texts[at][0]]  # fmt: skip
        result["ways"][way] = {
            "right": shares, "retained_gain": gain / oracle, "milliseconds": 1e3 * times[way],
            "mistaken": sorted({f"{a} -> {b}" for a, b in mistaken})[:40],
        }  # fmt: skip
    return result


def table(found: dict[int, dict[str, Any]]) -> list[str]:
    lengths = " | ".join(f"{n} tokens" for n in LENGTHS)
    lines = [
        f"| domains | way | {lengths} | right source, 64 | none, 64 | retained gain | ms |",
        "|---:|---|" + "---:|" * (len(LENGTHS) + 4),
    ]
    for result in found.values():
        count = result["domains"]
        for way, told in result["ways"].items():
            right, last = told["right"], told["right"][str(LENGTHS[-1])]
            shares = " | ".join(f"{right[str(n)]['domain']:.1%}" for n in LENGTHS)
            lines.append(
                f"| {count} | {way} | {shares} | {last['source']:.1%} | {last['none']:.1%} | "
                f"{told['retained_gain']:.1%} | {told['milliseconds']:.1f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a source, with train.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="a folder with a sentence encoder, to compare with")
    parser.add_argument("--domains", nargs="+", type=int, default=[4, 30, 128, 1024])
    parser.add_argument("--sources", nargs="+", default=DOMAINS, help="folders")
    parser.add_argument("--shown", type=int, help=f"passages of each domain; by default by their number: {SHOWN}")
    parser.add_argument("--asked", type=int, default=2, help="passages of each domain")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    bench = ManyDomains(a)
    encoder = Encoder(a.encoder) if a.encoder else None
    print(machine())
    found = {}
    with reporting("many domains", True):
        for count in a.domains:
            made = partial(measured, bench, count, encoder)
            settings = [a.asked, a.shown, a.sources, a.encoder is not None, fingerprint(a.base)]
            name = sha256(json.dumps(settings).encode()).hexdigest()[:12]
            found[count] = kept(a.out, slug("domains", count, a.seed, name), made)
    print("\n".join(table(found)))
    (a.out / "many_domains.json").write_text(json.dumps({"machine": machine(), "counts": found}, indent=1))


if __name__ == "__main__":
    main()
