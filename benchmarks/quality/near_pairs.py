"""Domains that lie near each other, two at a time: programming languages, titles of one country's statutes, speakers of
one author's plays, books, speeches.

Of each source the largest parts of `benchmarks.quality.many_domains`; for every two of them a router that knows these
two and general text, asked about other passages of the same documents. A third answer, none, counts as wrong. Beside it
the same two by a sentence encoder, with `--encoder`.

python -m benchmarks.quality.near_pairs --data DIR --base CHECKPOINT --out near/
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.common import kept, machine, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.retrieval import Encoder
from benchmarks.quality.many_domains import LENGTHS, Choose, ManyDomains, Piece
from growlm.base.checkpoint import fingerprint
from growlm.disk.files import write_atomic
from growlm.progress import reporting, track


def near_pieces(bench: ManyDomains, most: int) -> dict[str, list[Piece]]:
    """By source, its largest parts, of which there are two at least."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for piece in bench.pieces(most * len(bench.a.sources)):
        if len(found[piece.source]) < most:
            found[piece.source].append(piece)
    return {source: pieces for source, pieces in found.items() if len(pieces) > 1}


def right(choose: Choose, pair: Sequence[Piece], length: int) -> tuple[float, float]:
    """Of two domains' passages, the shares that go to their own, and to none."""
    asked = [(number, text[:length]) for number, piece in enumerate(pair) for text in piece.asked]
    chosen = choose([text for _, text in asked])
    own = sum(c == number for c, (number, _) in zip(chosen, asked, strict=True))
    return own / len(asked), sum(c is None for c in chosen) / len(asked)


def measured(bench: ManyDomains, pieces: Sequence[Piece], encoder: Encoder | None) -> list[dict[str, Any]]:
    """Of every two parts of a source."""
    found = []
    for pair in itertools.combinations(pieces, 2):
        ways: dict[str, Choose] = {"gaussian": partial(bench.routed, bench.router(pair), True)}
        if encoder is not None:
            ways |= bench.encoded(pair, encoder)
        shares = {way: {str(n): right(choose, pair, n) for n in reversed(LENGTHS)} for way, choose in ways.items()}
        found.append({"pair": [piece.name for piece in pair], "shares": shares})
    return found


def row(source: str, way: str, found: Sequence[dict[str, Any]]) -> str:
    """Means over the pairs, and the worst pair."""
    means = [sum(one["shares"][way][str(n)][0] for one in found) / len(found) for n in LENGTHS]
    worst = min(found, key=lambda one: one["shares"][way][str(LENGTHS[-1])][0])
    none = sum(one["shares"][way][str(LENGTHS[-1])][1] for one in found) / len(found)
    last = f"{worst['shares'][way][str(LENGTHS[-1])][0]:.0%} ({', '.join(worst['pair'])})"
    cells = [f"{mean:.1%}" for mean in means] + [f"{none:.1%}", last]
    return f"| {source} | {len(found)} | {way} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--base", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, metavar="CHECKPOINT", help="a sentence encoder, beside the router")
    parser.add_argument("--sources", nargs="+", default=list(DOMAINS), metavar="DOMAIN")
    parser.add_argument("--parts", type=int, default=4, help="of each source, the largest")
    parser.add_argument("--asked", type=int, default=24, help="passages of each part")
    parser.add_argument("--shown", type=int, default=48, help="passages that the router is shown of each part")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with reporting("near_pairs", True):
        bench = ManyDomains(a)
        encoder = None if a.encoder is None else Encoder(a.encoder)
        pieces = near_pieces(bench, a.parts)
        found = {}
        for source in track(pieces, "sources", "sources"):
            settings = [fingerprint(a.base)[:12], a.parts, a.asked, a.shown, a.seed, a.encoder is not None]
            found[source] = kept(a.out, slug(source, *settings), partial(measured, bench, pieces[source], encoder))
    lengths = " | ".join(f"{n} tokens" for n in LENGTHS)
    print(f"| parts of | pairs | way | {lengths} | none, {LENGTHS[-1]} | worst pair, {LENGTHS[-1]} |")
    print("|---|---:|---|" + "---:|" * (len(LENGTHS) + 2))
    for source, pairs in found.items():
        for way in pairs[0]["shares"]:
            print(row(source, way, pairs))
    told = {"machine": machine(), "base": a.base.name, "sources": found}
    write_atomic(a.out / "near_pairs.json", json.dumps(told, indent=1).encode())


if __name__ == "__main__":
    main()
