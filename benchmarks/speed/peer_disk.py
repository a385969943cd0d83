"""A PEER whose tables stay on the disk against one in memory: forward passes in turns within one run.

The file is in the page cache (warm). `row cache` holds a share of all rows; in `rows read before` the same tokens come
again, in `other rows` every pass has new ones.

python -m benchmarks.speed.peer_disk --out FOLDER
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from benchmarks.lib.common import interleaved, show
from growlm.disk.tensors import map_tensors, write_tensors
from growlm.layers import PEER
from growlm.layers.row_cache import CachedPool

BATCHES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the file, which is removed")
    parser.add_argument("--sub-keys", type=int, default=1024, help="square root of N")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    a = parser.parse_args()
    torch.manual_seed(0)
    n, d = a.sub_keys**2, a.hidden_size
    whole = PEER(d, n, key_size=128).eval()
    path = a.out / "tables.safetensors"
    a.out.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"up": whole.up.data, "down": whole.down.data})
    batches = [torch.randn(1, a.tokens, d) for _ in range(BATCHES)]

    def on_disk(share: float) -> CachedPool:
        tables = map_tensors(path, lambda name: True)
        pool = PEER(d, n, key_size=128, device="meta").eval()
        state = {**whole.state_dict(), **tables}
        pool.load_state_dict(state, assign=True)
        return CachedPool(pool, int(share * (n * 2 * d * 4)) + 16 * n)

    try:
        for share in (0.02, 0.1, 1.0):
            pools = {"memory": whole, "disk": on_disk(share)}
            with torch.no_grad():
                torch.testing.assert_close(pools["disk"](batches[0]), whole(batches[0]), rtol=1e-4, atol=1e-5)
                for reused in (True, False):
                    turns = {name: itertools.cycle(batches[:1] if reused else batches) for name in pools}
                    sides = {name: lambda pool=pool, turn=turns[name]: pool(next(turn)) for name, pool in pools.items()}
                    cache = pools["disk"].cache
                    cache.reads = 0
                    times = interleaved(sides, rounds=a.rounds)
                    show("tables on the disk", {
                        "N": n, "row cache": share, "row cache MB": cache.num_bytes() / 1e6,
                        "tokens": "rows read before" if reused else "other rows",
                        **{f"{name} ms": seconds * 1e3 for name, seconds in times.items()},
                        "disk / memory": times["disk"] / times["memory"],
                        "rows read of the disk a pass": cache.reads / (a.rounds + 2),
                    })  # fmt: skip
    finally:
        path.unlink()


if __name__ == "__main__":
    main()
