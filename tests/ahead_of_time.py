"""Compiles the kernels of stick-breaking attention for capability 9.0, without a GPU: a line of JSON for each.

`python tests/ahead_of_time.py float32 64`, without TRITON_INTERPRET: launches are caught, and what they were given says
what is to be compiled. `shared` and `cubin` are bytes; `spilled`, bytes of registers that are kept in memory, is null
where no assembler tells.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from growlm.layers.kernels import stickbreaking

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def compiled(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """As a launch would: numbers that are 1, or divisible by 16, are told to the compiler where they may be."""
    options = {k: v for k, v in constants.items() if k not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        k: v for k, v in constants.items() if k in kernel.arg_names
    }
    signature, known, facts = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[name], known[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], facts[number,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if free and value % 16 == 0:
                facts[number,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=facts)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


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


def report(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    made = compiled(kernel, arguments, constants | {"enable_fp_fusion": True})
    told = {"kernel": kernel.__name__, "cubin": len(made.asm["cubin"]), "shared": made.metadata.shared}
    print(json.dumps(told | {"spilled": spilled(made.asm["ptx"])}), flush=True)


if __name__ == "__main__":
    dtype, width = getattr(torch, sys.argv[1]), int(sys.argv[2])
    stickbreaking.launch = report
    query = torch.empty(1, 4, 512, width, dtype=dtype)
    key, value = torch.empty(2, 1, 2, 512, width, dtype=dtype)
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    documents = torch.zeros(1, 512, dtype=torch.int64)
    stickbreaking.forward(query, key, value, 1.0, mask, documents)
    stickbreaking.backward(query, query.float(), query, key, value, 1.0, mask, documents)
    stickbreaking.decode(query[:, :, :1], key, value, 1.0, mask[:, :, :1], documents)
