"""Loading a module that is in the page cache, against `safetensors.torch.load_file` and one copy of the same bytes.

python -m benchmarks.speed.load
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.lib.common import interleaved, qwen2, save_base, show
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.store import WEIGHTS, Store


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store.create(folder / "brain", base=save_base(folder / "base", qwen2()))
        base = store.load_base()
        module = Blocks.create(base, BlocksConfig(), torch.arange(8192))
        stored = store.commit("medicine", module, {})
        path = stored.folder / WEIGHTS

        def peer() -> None:
            {k: v.clone() for k, v in load_file(path).items()}

        seconds = interleaved(
            {
                "load": lambda: store.load("medicine", base, verify=False),
                "load_file_and_copy": peer,
                "first_load_with_hash": lambda: store.load("medicine", base, verify=True),
            },
            15,
        )
        size = path.stat().st_size
        show(
            "load",
            {
                "megabytes": round(size / 1e6, 1),
                "milliseconds": {k: round(v * 1e3, 2) for k, v in seconds.items()},
                "gigabytes_per_second": round(size / seconds["load"] / 1e9, 2),
                "ratio": round(seconds["load"] / seconds["load_file_and_copy"], 2),
            },
        )


if __name__ == "__main__":
    main()
