"""Learning on a GPU: every kind of module, as on the processor; stopped and gone on with; the same bits again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from growlm.errors import Interrupted
from growlm.modules import ModuleSet
from growlm.store import Store
from growlm.training.config import GrowConfig, LearnConfig, TrainConfig
from growlm.training.grow import grow
from growlm.training.learn import learn
from growlm.training.loop import train
from interruptions import at_step, interrupt
from stores import store_with_texts
from tiny import random_ids

pytestmark = pytest.mark.gpu

QUICK: dict[str, Any] = {
    "sequence_length": 32,
    "batch_size": 8,
    "router_samples": 16,
    "epochs": 2,
    "admit_anyway": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "blocks": {"num_layers": 1, "vocabulary": "both"},
    "experts": {"num_experts": 3, "router_size": 8, "expert_size": 16},
    "peer": {"num_experts": 100, "num_heads": 2, "top_k": 4},
    "lora": {"r": 4, "use_dora": True},
    "lora+recall": {"r": 4},
    "peer, instead": {"kind": "peer", "num_experts": 100, "num_heads": 2, "top_k": 4, "replace_feed_forward": True},
}


def config(kind: str, **changes: Any) -> LearnConfig:
    return LearnConfig(**{"kind": kind, **QUICK, "precision": "float32", **KINDS[kind], **changes})


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    """By family, a folder with a store and text to learn."""
    found = {family: tmp_path_factory.mktemp(family) for family in ("llama", "growlm")}
    for family, home in found.items():
        store_with_texts(home, family)
    return found


def fresh(homes: dict[str, Path], family: str, tmp_path: Path, name: str = "home") -> Store:
    return Store.open(shutil.copytree(homes[family], tmp_path / name) / "store")


def run(store: Store, kind: str, name: str = "law", **changes: Any):
    return learn(store, name, [store.path.parent / "law.jsonl"], config(kind, **changes), progress=False)


def tensors(store: Store, name: str = "law") -> dict[str, torch.Tensor]:
    return dict(store.load(name, store.load_base()).state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "growlm"])
def test_it_learns_what_the_processor_learns(device, near, tell, homes, tmp_path, without_gpu, family, kind):
    found = fresh(homes, family, tmp_path, "there")
    result = run(found, kind)
    with without_gpu():
        wanted = fresh(homes, family, tmp_path, "here")
        reference = run(wanted, kind)
    assert result.loss_before == pytest.approx(reference.loss_before, rel=1e-4)
    assert result.loss_after < 0.99 * result.loss_before
    assert result.loss_after == pytest.approx(reference.loss_after, rel=5e-3)
    tell(f"learn {family} {kind}: loss {result.loss_before:.4f} -> {result.loss_after:.4f}, on the processor "
         f"{reference.loss_after:.4f}; {result.tokens_per_second:,.0f} tokens a second")  # fmt: skip
    # What was learned on the device runs on the processor, and the other way round.
    ids = random_ids(2, 20)
    here, there = found.load_base(), found.load_base(device=device)
    near("learn: a module of the device on the processor", ModuleSet(here, [found.load("law", here)]).logits(ids),
         ModuleSet(there, [found.load("law", there)]).logits(ids.to(device)))  # fmt: skip
    near("learn: a module of the processor on the device",
         ModuleSet(there, [wanted.load("law", there)]).logits(ids.to(device)),
         ModuleSet(here, [wanted.load("law", here)]).logits(ids))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_in_the_devices_own_precision(device, homes, tmp_path, tell, kind, dtype):
    """auto: bfloat16 on a GPU. The base is held in either dtype."""
    home = shutil.copytree(homes["llama"], tmp_path / "home")
    store = Store.create(home / "other", home / "base", dtype=dtype)
    result = run(store, kind, precision="auto" if device == "cuda" else "bfloat16", epochs=3)
    assert result.loss_after < 0.99 * result.loss_before
    tell(f"learn {kind}, base in {dtype}: loss {result.loss_before:.4f} -> {result.loss_after:.4f}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits_stopped_or_not(device, homes, tmp_path, kind, precision):
    whole = fresh(homes, "growlm", tmp_path, "whole")
    run(whole, kind, precision=precision)
    stopped = fresh(homes, "growlm", tmp_path, "stopped")
    with at_step(5, interrupt), pytest.raises(Interrupted):
        run(stopped, kind, precision=precision)
    run(stopped, kind, precision=precision)
    one, other = tensors(whole), tensors(stopped)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_longer_rows_with_softmax_attention(device, homes, tmp_path, tell):
    """Fused attention adds up the gradients of long rows in any order: whether bits are the same is told, not asked."""
    results = []
    for number in range(2):
        store = fresh(homes, "llama", tmp_path, f"home{number}")
        run(store, "blocks", sequence_length=240, batch_size=4, epochs=4, placement="interleaved", precision="auto")
        results.append(tensors(store))
    same = all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    tell(f"learn, rows of 240 tokens in softmax attention: two runs are {'' if same else 'NOT '}bit-equal")


def test_a_module_grows(device, homes, tmp_path):
    store = fresh(homes, "llama", tmp_path)
    run(store, "peer")
    before = tensors(store)
    text = [store.path.parent / "drugs.jsonl"]
    result = grow(store, "law", "+20", text, GrowConfig(**QUICK, precision="float32"), progress=False)
    assert result.experts == result.experts_open == 120
    assert result.loss_after < result.loss_before
    after = tensors(store)
    for part in ("up", "down"):
        assert torch.equal(after[f"pools.0.{part}"][:100], before[f"pools.0.{part}"])


class _Random:
    """Steps that draw on the device and on the processor."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.ones(8, device=device))

    def loss(self, step: int) -> torch.Tensor:
        here = torch.rand(8).to(self.weight.device)
        there = torch.rand(8, device=self.weight.device)
        return (self.weight * (here + there - 1)).sum() + self.weight.square().sum()

    def train(self, folder: Path) -> None:
        settings = TrainConfig(checkpoint_seconds=0)
        train({"weight": self.weight}, self.loss, 6, lambda step: 1, settings, 0.1, folder=folder, resume_hint="again")


def test_random_numbers_go_on_where_a_run_was_stopped(device, tmp_path):
    whole = _Random(device)
    whole.train(tmp_path / "whole")
    with at_step(3, interrupt), pytest.raises(Interrupted):
        _Random(device).train(tmp_path / "stopped")
    torch.rand(5), torch.rand(5, device=device)  # another program's
    again = _Random(device)
    again.train(tmp_path / "stopped")
    assert torch.equal(again.weight, whole.weight)
    assert not torch.equal(whole.weight, torch.ones_like(whole.weight))
