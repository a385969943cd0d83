"""Gates that suit a text nobody has tried yet: fitted on texts of many domains and sizes at once.

A module that recalls has 40 numbers that say how much its text counts. A small body of text has too few held-out tokens
to fit them, so they begin as other texts want them, and stay there as far as nothing speaks against it. Told are, for
each domain and size of text, nats a token of its `valid.txt` without the text, with gates fitted on all other domains,
and as `learn` fits them, on parts that are left out in turn; the same of quotes from the text itself, of which the fit
sees some as well; and at last the gates of all domains together. What base and texts say of the tokens is kept in OUT,
so that a run that was stopped goes on.

python -m benchmarks.quality.typical_gates --data DIR --base CHECKPOINT --out gates/
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.published import OnPublished
from growlm.data import Passage
from growlm.modules import ModuleSet
from growlm.recall.memory import Memory
from growlm.recall.text import RecalledText
from growlm.training.recalling import Sample, best, fit, token_documents, typical_gates
from growlm.units import parse_count

SIZES, QUOTED = (3_000, 20_000, 400_000), 64  # tokens: of a text, and of a quote from it


class Samples(OnPublished):
    def of(self, domain: str) -> tuple[dict[int, Sample], dict[int, Sample]]:
        """What the base and texts of each size say of held-out tokens, and of quotes from the text itself."""
        path = self.a.out / f"{slug(domain)}.pt"
        if not path.exists():
            print(f"{domain} ...", flush=True)
            documents = list(token_documents(self.documents(domain, "train"), self.tokenizer))
            held_out = self.passages(domain, "valid", self.a.tokens)
            alone, draw = ModuleSet(self.base), np.random.default_rng(0)
            both: tuple[dict[int, Any], dict[int, Any]] = {}, {}
            for size in SIZES:
                chosen, left = [], size
                for source, ids in documents:
                    chosen.append((source, ids[:left]))
                    left -= len(chosen[-1][1])
                    if left <= 0:
                        break
                memory, every = Memory(), np.concatenate([ids for _, ids in chosen])
                memory.text = RecalledText.of(chosen, self.base.vocab_size)
                places = draw.integers(0, len(every) - QUOTED, self.a.quotes)
                quotes = [Passage(every[place : place + QUOTED].tolist(), 0) for place in places]
                for found, passages in zip(both, (held_out, quotes), strict=True):
                    parts = [Sample.of(alone, memory, [passage], at) for at, passage in enumerate(passages)]
                    found[size] = vars(Sample.joined(parts))
            torch.save(both, path)
        told, quoted = ({size: Sample(**one) for size, one in each.items()} for each in torch.load(path))
        return told, quoted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train and valid.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--tokens", type=parse_count, default=4_000, help="of valid.txt")
    parser.add_argument("--quotes", type=int, default=6, help="of each text: who asks of a text often quotes it")
    parser.add_argument("--penalty", type=float, default=1e-4)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    samples = Samples(a)
    every = {domain: samples.of(domain) for domain in a.domains}
    flat = torch.zeros_like(typical_gates())
    flat[:, 0] = -2.0  # each level for an eighth
    torch.set_printoptions(precision=2, sci_mode=False, linewidth=120)
    print(f"{machine()}\n\n| domain | text | without | others' gates | fitted | quotes: without | others' gates |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for domain, (own, quotes) in every.items():
        others = [one for name, both in every.items() if name != domain for each in both for one in each.values()]
        gates = fit(Sample.joined(others), a.penalty, flat)
        for size, sample in own.items():
            losses = [sample.losses.mean(), sample.mixture(gates).mean(), best(sample)[0].after]
            losses += [quotes[size].losses.mean(), quotes[size].mixture(gates).mean()]
            print(f"| {domain} | {size:,} | " + " | ".join(f"{float(loss):.3f}" for loss in losses) + " |", flush=True)
    print(
        fit(Sample.joined([one for both in every.values() for each in both for one in each.values()]), a.penalty, flat)
    )


if __name__ == "__main__":
    main()
