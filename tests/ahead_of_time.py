"""Compiles the kernels of stick-breaking attention for capability 9.0, without a GPU: a line of JSON for each.

`python tests/ahead_of_time.py float32 64`, without TRITON_INTERPRET. `shared` and `cubin` are in bytes, and `spilled`
too: registers that are kept in memory, null where no assembler tells.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from compiling import compiled
from growlm.layers.kernels import stickbreaking


def spilled(ptx: str) -> int | None:
    """By the assemblers that come with Triton, one of which takes what it writes."""
    for assembler in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            done = subprocess.run(
                [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"], capture_output=True, text=True
            )
        found = re.search(r"(\d+) bytes spill stores", done.stderr)
        if done.returncode == 0 and found:
            return int(found[1])
    return None


if __name__ == "__main__":
    dtype, width = getattr(torch, sys.argv[1]), int(sys.argv[2])
    query = torch.empty(1, 4, 512, width, dtype=dtype)
    key, value = torch.empty(2, 1, 2, 512, width, dtype=dtype)
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    documents = torch.zeros(1, 512, dtype=torch.int64)
    with compiled() as launched:
        stickbreaking.forward(query, key, value, 1.0, mask, documents)
        stickbreaking.backward(query, query.float(), query, key, value, 1.0, mask, documents)
        stickbreaking.decode(query[:, :, :1], key, value, 1.0, mask[:, :, :1], documents)
    for name, kernels in launched.items():
        for made in kernels:
            told = {"kernel": name, "cubin": len(made.asm["cubin"]), "shared": made.metadata.shared}
            print(json.dumps(told | {"spilled": spilled(made.asm["ptx"])}), flush=True)
