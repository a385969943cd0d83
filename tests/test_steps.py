"""Steps that do not fit into memory at once: in parts, or with layers computed twice, a module learns the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disk import write_jsonl
from growlm.base.placement import out_of_memory
from growlm.data import PackedTokens
from growlm.errors import ConfigError
from growlm.modules import kind_of
from growlm.training import memory
from growlm.training.config import FinetuneConfig, LearnConfig, PretrainConfig
from growlm.training.finetune import finetune
from growlm.training.module_training import ModuleTraining
from growlm.training.pretrain import pretrain
from tiny import TEXT, make_base, random_ids

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "blocks": {"num_layers": 2, "vocabulary": "both"},
    "experts": {"load_concentration": 0.1, "routing_regularisation": 0.1},
    "peer": {"num_experts": 36, "num_heads": 2, "top_k": 4},  # whose queries have statistics of the batch
    "peer, imitating": {"num_experts": 36, "num_heads": 2, "top_k": 4, "replace_feed_forward": True},
}
ROWS = random_ids(16, 17)

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(kind: str, folder, **changes: Any) -> tuple[dict[str, torch.Tensor], int]:
    """A module after some steps, and the most bytes of tensors that a step's backward pass was kept for."""
    settings = {"tokens": 16 * 16 * 2, "sequence_length": 16, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu"}
    name, *_ = kind.split(",")
    config = LearnConfig(name, **{**settings, "precision": "float32", **KINDS[kind], **changes})
    run = ModuleTraining(make_base(), kind_of(name), config, PackedTokens(ROWS.int().numpy()), folder)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    most = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in run._losses(len(run._steps) - 1):
            most = max(most, sum(kept))
            kept.clear()
    torch.manual_seed(0)
    run.run()
    return run.module.state_dict(), most


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_computed_twice_give_the_same_bits_for_less_memory(kind, tmp_path):
    plain, kept = trained(kind, tmp_path / "plain")
    twice, kept_then = trained(kind, tmp_path / "twice", activation_checkpointing=True)
    assert all(torch.equal(twice[key], tensor) for key, tensor in plain.items())
    assert kept_then < kept / 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("peer")])
def test_a_step_in_parts_is_the_step_but_for_rounding(kind, tmp_path):
    # What uses experts evenly or not is told of each part by itself.
    of_batches = {"load_concentration": 0.0, "routing_regularisation": 0.0} if kind == "experts" else {}
    whole, kept = trained(kind, tmp_path / "whole", **of_batches)
    parts, kept_then = trained(kind, tmp_path / "parts", gradient_accumulation_steps=4, **of_batches)
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=1e-3, atol=1e-4)
    assert kept_then < kept / 2


def test_parts_of_unequal_weight_and_of_none_add_up(tmp_path):
    """Of conversations, whose rows teach as many tokens as their answers have; and there are fewer rows than parts."""
    counted = torch.zeros(4, 17, dtype=torch.bool)
    counted[0, 3:5], counted[1, 2:16], counted[3, 16] = True, True, True  # nothing of row 2
    text = PackedTokens(random_ids(4, 17).int().numpy(), counted.numpy())

    def step(parts: int) -> list[torch.Tensor]:
        config = LearnConfig(
            "lora", r=4, batch_size=4, tokens=64, sequence_length=16, precision="float32", learning_rate=1e-2,
            gradient_accumulation_steps=parts,
        )  # fmt: skip
        run = ModuleTraining(make_base(), kind_of("lora"), config, text, tmp_path / str(parts))
        for loss in run._losses(0):
            loss.backward()
        return [p.grad for p in run.module.parameters() if p.grad is not None]

    whole = step(1)
    for parts in (2, 4, 7):
        for one, other in zip(whole, step(parts), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "molm-tiny"])
def test_a_whole_model_in_parts_or_with_layers_computed_twice(tmp_path, family):
    write_jsonl(tmp_path / "text.jsonl", [f"{text} {n}" for n in range(20) for text in TEXT])
    preset = {"preset": "tiny" if family == "llama" else family, "vocab_size": 300}
    settings: dict[str, Any] = {"tokens": 512, "sequence_length": 16, "batch_size": 4, "precision": "float32"}
    found = {}
    for name, changes in {
        "plain": {},
        "twice": {"activation_checkpointing": True},
        "parts": {"gradient_accumulation_steps": 2},
    }.items():
        out = tmp_path / name
        pretrain(out, [tmp_path / "text.jsonl"], PretrainConfig(**preset, **settings, **changes), progress=False)
        found[name] = load_file(out / "model.safetensors")
    for key, tensor in found["plain"].items():
        torch.testing.assert_close(found["twice"][key], tensor, rtol=1e-4, atol=1e-5)
        if family == "llama":  # routers' losses on how even experts are used are of a part
            torch.testing.assert_close(found["parts"][key], tensor, rtol=1e-2, atol=1e-3)
    finetune(
        tmp_path / "plain", tmp_path / "tuned", [tmp_path / "text.jsonl"],
        FinetuneConfig(**settings, activation_checkpointing=True, admit_anyway=True), progress=False,
    )  # fmt: skip
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_a_full_memory_says_what_is_resident_and_what_would_fit(tmp_path, monkeypatch):
    config = LearnConfig(
        "lora", r=4, tokens=256, sequence_length=16, batch_size=8, learning_rate=1e-2, precision="float32"
    )
    run = ModuleTraining(make_base(), kind_of("lora"), config, PackedTokens(ROWS.int().numpy()), tmp_path)
    computed = run._loss_of

    def of_few(given, labels):
        if len(given) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return computed(given, labels)

    def told() -> str:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run.run()
        run._validation = None
        return out_of_memory(caught.value) or ""

    monkeypatch.setattr(run, "_loss_of", of_few)
    line = told()
    resident = r"resident are the base \([\d.]+ kB\) and the module with its optimiser \([\d.]+ kB\)"
    assert re.search(rf"{resident}; give a larger --gradient-accumulation-steps", line)

    def measured(device, compute):
        compute()  # one row fits
        return 300_000_000, 1_000_000_000

    monkeypatch.setattr(memory, "added_on_device", measured)
    assert re.search(
        rf"{resident}; a row of 16 tokens needs 300.0 MB of the 1.0 GB that are left, so that 3 of 8 fit: give "
        "--gradient-accumulation-steps 3, ",
        told(),
    )
    monkeypatch.setattr(memory, "added_on_device", lambda device, compute: (1000, 1_000_000))
    assert "--gradient-accumulation-steps" not in told()  # all rows would fit: something else is too much
    monkeypatch.setattr(memory, "added_on_device", lambda device, compute: (None, 1000))
    assert "a row of 16 tokens alone does not fit beside them" in told()


def test_what_was_not_said_is_not_recorded_and_no_parts_are_refused():
    plain = LearnConfig("lora").to_json()
    assert "activation_checkpointing" not in plain
    assert "gradient_accumulation_steps" not in plain
    assert LearnConfig("lora", gradient_accumulation_steps=2).to_json()["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 0; it must be at least 1"):
        LearnConfig("lora", gradient_accumulation_steps=0)
    with pytest.raises(ConfigError, match="activation_checkpointing is of no effect"):
        LearnConfig("recall", activation_checkpointing=True)
