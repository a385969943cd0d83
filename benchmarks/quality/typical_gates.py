"""Gates that suit a text nobody has tried yet: fitted on texts of many domains and sizes at once.

A module that recalls has 32 numbers that say how much its text counts. A small body of text has too few held-out tokens
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

import numpy as np
import torch

from benchmarks.lib.common import machine, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.published import OnPublished
from growlm.modules import ModuleSet
from growlm.recall.memory import Memory
from growlm.recall.text import RecalledText, contexts_of
from growlm.training.recalling import Sample, best, fit, token_documents, typical_gates
from growlm.units import parse_count

SIZES, QUOTED = (3_000, 20_000, 400_000), 64  # tokens: of a text, and of a quote from it


class Samples(OnPublished):
    def of(self, domain: str) -> tuple[dict[int, Sample], dict[int, Sample]]:
        """What the base and texts of each size say of held-out tokens, and of quotes from the text itself."""
        path = self.a.out / f"{slug(domain)}.pt"
        if not path.exists():
            print(f"{domain} ...", flush=True)
            found = list(token_documents(self.documents(domain, "train"), self.tokenizer))
            memories, quotes, draw = {}, {}, np.random.default_rng(0)
            for size in SIZES:
                chosen, left = [], size
                for source, ids in found:
                    chosen.append((source, ids[:left]))
                    left -= len(chosen[-1][1])
                    if left <= 0:
                        break
                memories[size] = Memory()
                memories[size].text = RecalledText.of(chosen, self.base.vocab_size)
                every = np.concatenate([ids for _, ids in chosen])
                places = draw.integers(0, len(every) - QUOTED, self.a.quotes)
                quotes[size] = [every[place : place + QUOTED].tolist() for place in places]
            held_out = [p.tokens for p in self.passages(domain, "valid", self.a.tokens)]
            told = self._told(held_out, memories)
            quoted = {size: self._told(quotes[size], {size: memory})[size] for size, memory in memories.items()}
            torch.save([{size: vars(sample) for size, sample in each.items()} for each in (told, quoted)], path)
        told, quoted = ({size: Sample(**one) for size, one in each.items()} for each in torch.load(path))
        return told, quoted

    @torch.no_grad()
    def _told(self, texts: list[list[int]], memories: dict[int, Memory]) -> dict[int, Sample]:
        alone = ModuleSet(self.base)
        parts: dict[int, list[Sample]] = {size: [] for size in memories}
        for number, text in enumerate(texts):
            ids = torch.tensor([text])
            hidden, labels = alone.hidden(ids[:, :-1])[0], ids[0, 1:]
            contexts = contexts_of(ids[:, :-1], len(labels))[0]
            own = alone.project(hidden).float().log_softmax(-1)
            rows = torch.full_like(labels, number)
            for size, memory in memories.items():
                parts[size].append(Sample.told(own, memory.recalled(own, contexts), labels, rows))
        return {size: Sample.joined(each) for size, each in parts.items()}


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
