"""A domain of several forms among nine of one: paragraphs of reports, tables of numbers, and questions about them.

The nine of `benchmarks.quality.routing` and a tenth, made of the data sets that statsmodels describes
(`benchmarks/lib/mixed.py`). Every third data set is kept back whole, and of the others a third of the texts of each
form. Which module are those given? Beside the router as it is stand those that have several means of it, or of each
domain.

    pip install statsmodels
    python -m benchmarks.quality.mixed_forms --data DIR --base CHECKPOINT --out mixed/
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.common import machine
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.mixed import FORMS, documents
from benchmarks.lib.prompts import LONGEST, Prompts
from benchmarks.quality.routing import Choose, Routing, read_arguments, shares
from growlm.disk.files import write_atomic
from growlm.progress import reporting

REPORTS = "reports"
LENGTHS = (32, LONGEST)
_ROUNDS = 20
_SEEN, _UNSEEN = " of data sets that are known", " of others"


def laid_out(data: Path, out: Path, seed: int) -> tuple[Path, dict[str, list[str]]]:
    """A folder with the nine domains and the tenth's training text, and its texts that are kept back, by form."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in data.iterdir():
        if not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry.resolve())
    train: list[str] = []
    kept: dict[str, list[str]] = {f"{form}{which}": [] for form in FORMS for which in (_SEEN, _UNSEEN)}
    for number, of_forms in enumerate(documents(seed).values()):
        for form, texts in of_forms.items():
            cut = 0 if number % 3 == 2 else 2 * len(texts) // 3
            train += texts[:cut]
            kept[f"{form}{_SEEN if cut else _UNSEEN}"] += texts[cut:]
    for texts in (train, *kept.values()):
        random.Random(seed).shuffle(texts)
    (folder / REPORTS).mkdir(exist_ok=True)
    write_atomic(folder / REPORTS / "train.txt", "\n\n".join(train).encode())
    return folder, kept


def clusters(vectors: Tensor, many: int, seed: int) -> Tensor:
    """The part that each vector is of, by k-means."""
    draw = torch.Generator().manual_seed(seed)
    means = vectors[torch.randperm(len(vectors), generator=draw)[:many]]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(vectors, means).argmin(-1)
        means = torch.stack([vectors[nearest == i].mean(0) if (nearest == i).any() else means[i] for i in range(many)])
    return torch.cdist(vectors, means).argmin(-1)


def several(domain: str, whole: dict[str, Tensor], *, many: int, only: str | None) -> list[dict[str, Tensor]]:
    """A domain's vectors in parts, each with the held-out ones that are nearest to it."""
    if only is not None and domain != only:
        return [whole]
    vectors, heldout = whole["vectors"].float(), whole["heldout"].float()
    own = clusters(vectors, many, 0)
    means = torch.stack([vectors[own == i].mean(0) for i in range(many) if (own == i).any()])
    theirs = torch.cdist(heldout, means).argmin(-1)
    parts = []
    for i, mean in enumerate(means):
        near = torch.cdist(vectors, means).argmin(-1) == i
        held = heldout[theirs == i] if (theirs == i).any() else mean[None]
        parts.append({"vectors": whole["vectors"][near], "heldout": held.to(whole["heldout"].dtype)})
    return [part for part in parts if len(part["vectors"])]


def given(prompts: Prompts, choose: Choose, length: int) -> dict[str, int]:
    """How many prompts each module is given."""
    return dict(Counter(name or "none" for name in choose(prompts, length)).most_common())


def main() -> None:
    a = read_arguments(str(__doc__), prompts=40, text=100_000)
    a.data, kept = laid_out(a.data, a.out, a.seed)
    with reporting("mixed_forms", True):
        routing = Routing(a)
        asked = {
            form: Prompts("passage", f"{REPORTS}-{form}", REPORTS, routing.tokenizer(texts[: a.prompts])["input_ids"])
            for form, texts in kept.items()
        }
        routing.domains = list(DOMAINS)
        ways: dict[str, Choose] = {"without the domain": routing.gaussian()}
        routing.domains = [*DOMAINS, REPORTS]
        ways["one mean"] = routing.gaussian()
        ways["one mean, no words"] = routing.gaussian(words=False)
        for many in (2, 4):
            ways[f"{many} means of it"] = routing.gaussian(split=partial(several, many=many, only=REPORTS))
            ways[f"{many} means of each"] = routing.gaussian(split=partial(several, many=many, only=None))
        found: dict[str, dict[str, dict[str, int]]] = {}
        others = {
            way: shares([p for p in routing.prompts if p.wanted != REPORTS], choose) for way, choose in ways.items()
        }
        for way, choose in ways.items():
            found[way] = {f"{form}, {n}": given(p, choose, n) for form, p in asked.items() for n in LENGTHS}
    print("| way | " + " | ".join(next(iter(found.values()))) + " |\n|---|" + "---:|" * len(asked) * len(LENGTHS))
    for way, forms in found.items():
        cells = [f"{some.get(REPORTS, 0) / sum(some.values()):.0%}" for some in forms.values()]
        print(f"| {way} | " + " | ".join(cells) + " |")
    for form, some in found["one mean"].items():
        print(f"{form}: {some}")
    print("| prompts | " + " | ".join(ways) + " |\n|---|" + "---:|" * len(ways))
    for name in next(iter(others.values())):
        print(f"| {name} | " + " | ".join(f"{others[way][name]:.0%}" for way in ways) + " |")
    told = {"machine": machine(), "base": a.base.name, "given": found, "others": others}
    write_atomic(a.out / "mixed_forms.json", json.dumps(told, indent=1).encode())


if __name__ == "__main__":
    main()
