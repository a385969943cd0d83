"""The product-key router against comparing with every module: 100 to a million simulated modules.

Modules are simulated as fitted means in the whitened space of the gaussian router, where a text of a domain is the
domain's mean and noise of about one unit in every direction. Three worlds, from what was seen to the hardest:

- text: means about as far apart as files of code and prose were through a small trained base (124 files, width 128:
  scatter between files 12 in all, texts at a median squared distance of 64 from their own mean). The spectrum, a sixth
  of the scatter in one direction and then falling by a power law, is chosen to be like that; the topics of 50 modules,
  which share 60 % of it, are an assumption. Domains this alike cannot be told apart by the million, whatever searches
  them.
- apart: the same, 40 times the scatter, 90 % of it between topics: domains that a text tells apart.
- isotropic: independent means of one unit in every direction, without any structure to use.

A query is a module's mean and noise, 0.4 to 1.4 units as short and long texts have. `--like STORE` takes the scatter of
a store's own fitted means for the first world. One run measures all sides in turns; every answer is compared with brute
force.

python -m benchmarks.speed.router_scale
python -m benchmarks.speed.router_scale --modules 100 1000 10000 --width 512
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib.common import interleaved, machine
from growlm.router import ProductKeyRouter, load_router
from growlm.router.cells import Cells, squared_distances
from growlm.router.gaussian import GaussianRouter
from growlm.router.product_key import TOP_K
from growlm.store import Store
from growlm.units import parse_count

QUERIES = 12
ALONE = 0.01  # share of the modules that product keys alone propose
WORLDS = ("text", "apart", "isotropic")


def scatter(width: int) -> Tensor:
    """Variances of the means of files of text, by direction, (d,)."""
    falling = torch.arange(1, width + 1) ** -0.75
    return 12 * (width / 128) ** 0.5 * falling / falling.sum()


def simulate(world: str, count: int, variances: Tensor, draw: torch.Generator) -> Tensor:
    """Means of `count` modules and of general text, (count + 1, d) float32."""
    width = len(variances)
    means = torch.randn(count + 1, width, generator=draw)
    if world != "isotropic":
        variances, shared = (variances, 0.6) if world == "text" else (40 * variances, 0.9)
        topics = torch.randn(count // 50 + 1, width, generator=draw) * (shared * variances).sqrt()
        means *= ((1 - shared) * variances).sqrt()
        for part in means.split(65_536):
            part += topics[torch.randint(len(topics), (len(part),), generator=draw)]
    means[-1] = 0  # general text is in the middle
    return means


def bandwidth() -> float:
    """Bytes a second at which this process reads memory now."""
    block = torch.ones(1 << 26)
    return block.numel() * 4 / interleaved({"read": block.sum}, rounds=5)["read"]


def measure(world: str, count: int, variances: Tensor) -> list[str]:
    draw = torch.Generator().manual_seed(count)
    width = len(variances)
    means = simulate(world, count, variances, draw)
    limits = torch.full((count,), 2.4 * width)
    chosen = torch.randint(count, (QUERIES,), generator=draw)
    noise = torch.randn(QUERIES, width, generator=draw)
    queries = means[chosen] + noise * 0.4 * 3.5 ** torch.rand(QUERIES, 1, generator=draw)
    names = [f"domain-{i}" for i in range(count)]
    points, general = means[:-1], means[-1:]
    gaussian = GaussianRouter(names, points, general, torch.eye(width), limits, dict.fromkeys(names, 8))
    start = time.perf_counter()
    cells = Cells.build(points, limits)
    built = time.perf_counter() - start
    router = ProductKeyRouter(gaussian, cells)

    def scan(query: Tensor) -> Tensor:
        distances = squared_distances(query[None], points)[0]
        distances = distances.masked_fill(distances > limits, torch.inf)
        return distances.topk(min(TOP_K, count), largest=False).indices

    at = iter(range(10**9))

    def turns(side: Callable[[Tensor], object]) -> Callable[[], object]:
        return lambda: side(queries[next(at) % QUERIES])

    sides = {
        "cells": turns(lambda q: cells.nearest(q, points, TOP_K)),
        "scan": turns(scan),
        "router": turns(lambda q: router.route_pooled(q[None])),
    }
    times = interleaved(sides, rounds=QUERIES)
    # A dictionary of all modules, sorted: seconds for a million.
    whole = interleaved({"gaussian": turns(lambda q: gaussian.route_pooled(q[None]))}, rounds=3, warmup=0)
    visited = compared = agree = proposed = 0.0
    for query in queries:
        found = cells.nearest(query, points, TOP_K)
        distances = squared_distances(query[None], points)[0]
        best = distances.argsort(stable=True)
        best = best[distances[best] <= limits[best]][:TOP_K]
        agree += found.points.tolist() == best.tolist()
        visited += found.visited / QUERIES
        compared += found.compared / QUERIES
        alone = cells.by_keys_alone(query, max(round(ALONE * count), 1))
        proposed += bool((alone == best[0]).any()) / QUERIES
    read = sum(cells.tensors[name].numel() * 4 for name in ("sub_keys_a", "sub_keys_b"))
    read += count * (width * visited + 4 * width * compared)
    floor = read / bandwidth()
    return [
        world, f"{count:,}", f"{built:.2f}", f"{cells.num_bytes() / 1e6:,.1f}", f"{means.numel() * 4 / 1e6:,.1f}",
        f"{times['cells'] * 1e3:.2f}", f"{floor * 1e3:.2f}", f"{times['scan'] * 1e3:.2f}",
        f"{times['router'] * 1e3:.2f}", f"{whole['gaussian'] * 1e3:.2f}",
        f"{visited:.1%}", f"{compared:.2%}", f"{agree:.0f} of {QUERIES}", f"{proposed:.0%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", type=parse_count, default=[10**i for i in range(2, 7)])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--like", type=Store.open, metavar="STORE", help="its scatter for the first world")
    a = parser.parse_args()
    variances = scatter(a.width)
    if a.like is not None:
        found = load_router(a.like, kind="gaussian")
        assert isinstance(found, GaussianRouter)
        variances = torch.linalg.eigvalsh(found.means.T.cov()).flip(0).clamp(min=0)
    print(f"{machine()}; width {len(variances)}, the best {TOP_K} of all\n")
    columns = (
        "world", "modules", "build, s", "index, MB", "means, MB", "cells, ms", "floor, ms", "scan, ms",
        "product-key router, ms", "gaussian router, ms", "visited", "compared whole", "equal to brute force",
        "best among 1 % by keys alone",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |")
    print("|---|" + "---:|" * 13)
    for world in a.worlds:
        for count in a.modules:
            print(f"| {' | '.join(measure(world, count, variances))} |", flush=True)


if __name__ == "__main__":
    main()
