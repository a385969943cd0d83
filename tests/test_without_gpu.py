"""The tests on a GPU, where there is none: found and skipped with the reason; and run on one that is pretended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elsewhere import pretended
from growlm.layers.experts import Dispatch

ROOT = Path(__file__).parents[1]
LAYERS = [f"tests/gpu/test_gpu_{name}.py" for name in ("stickbreaking", "experts", "product_keys", "losses", "optim")]
# Of what takes longer, one of a kind.
WHOLE = [
    "tests/gpu/test_gpu_contract.py::test_logits_and_gradients_are_those_of_the_processor[growlm-experts-everywhere-both]",
    "tests/gpu/test_gpu_contract.py::test_logits_and_gradients_are_those_of_the_processor[gemma2-peer-beside-both]",
    "tests/gpu/test_gpu_contract.py::test_reading_with_a_cache_equals_reading_at_once[gpt2-blocks-interleaved-both]",
    "tests/gpu/test_gpu_learn.py::test_it_learns_in_the_devices_own_precision[float32-peer]",
    "tests/gpu/test_gpu_learn.py::test_it_learns_in_the_devices_own_precision[bfloat16-blocks]",
    "tests/gpu/test_gpu_pretrain.py::test_in_the_devices_own_precision_and_the_checkpoint_loads[ModuleFormer, random]",
    "tests/gpu/test_gpu_surgery.py",
    "tests/gpu/test_gpu_engine.py::test_mixing[llama]",
    "tests/gpu/test_gpu_engine.py::test_a_stream_is_the_answer_in_pieces[llama]",
    "tests/gpu/test_gpu_engine.py::test_experts_on_the_disk[llama-64MB]",
]


def run(*arguments: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "GROWLM_TEST_DEVICE"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rs", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_test_is_found_and_skipped_with_the_reason():
    out = run("tests/gpu", CUDA_VISIBLE_DEVICES="")
    outcomes = [line for line in out.splitlines() if line.startswith("tests/gpu/test_gpu_")]
    assert all(" SKIPPED" in line for line in outcomes)
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")}
    assert {line.partition("::")[0] for line in outcomes} == found
    assert len(outcomes) > 300
    assert "no CUDA device here; docs/guides/gpu.md says" in out


@pytest.mark.slow
@pytest.mark.parametrize("tests", [LAYERS, WHOLE], ids=["layers", "whole"])
def test_nothing_mixes_devices(tests):
    out = run(*tests, GROWLM_TEST_DEVICE="pretended")
    assert out.count(" PASSED") >= len(tests)
    assert " SKIPPED" not in out


# What is pretended


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: there(3) + torch.ones(3),
        lambda: torch.mm(torch.ones(2, 3), there(3, 2)),
        lambda: torch.ones(3)[there(1).long()],
        lambda: torch.where(there(3) > 0, there(3), torch.zeros(3)),
        lambda: there(3).index_add_(0, torch.arange(3), there(3)),
        lambda: torch.nn.Linear(3, 2)(there(3)),
        lambda: there(3).numpy(),
        lambda: Dispatch(torch.arange(4), torch.arange(4), torch.zeros(1), 2).spread(there(2, 3)),
    ],
)
def test_a_pretended_gpu_refuses_what_mixes_it_with_the_processor(mixed: Callable[[], Any]):
    with pretended(), pytest.raises((RuntimeError, TypeError), match=r"on the processor|to numpy"):
        mixed()


def test_a_pretended_gpu_computes_and_says_where():
    with pretended():
        x = there(2, 3).requires_grad_()
        layer = torch.nn.Linear(3, 4).to("cuda")
        out = layer(x).sum() + torch.tensor(1.0)
        out.backward()
        places = [out, x.grad, layer.weight.grad, torch.zeros_like(x), x.new_ones(1), x.float(), x[torch.tensor([0])]]
        assert {t.device.type for t in places} == {"cuda"}
        assert {t.device.type for t in (torch.ones(3), x.detach().cpu(), torch.ones(3).copy_(there(3)))} == {"cpu"}
        wanted = layer.weight.detach().cpu().sum(0).expand(2, 3)
        assert torch.allclose(x.grad.cpu(), wanted)
    assert torch.ones(3).device.type == "cpu"
