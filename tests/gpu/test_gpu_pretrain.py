"""Pretraining on a GPU: a llama and growlm models with all kinds of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from disk import write_jsonl
from growlm.errors import Interrupted
from growlm.training.config import FinetuneConfig, PretrainConfig
from growlm.training.finetune import finetune
from growlm.training.pretrain import pretrain
from interruptions import at_step, interrupt
from stores import domain_text
from test_pretrain import PEER
from tiny import SETTINGS

pytestmark = pytest.mark.gpu

QUICK: dict[str, Any] = {"sequence_length": 32, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "growlm": {"auxiliary_loss": "mutual_information"},
    "ModuleFormer": {
        "attention": "stickbreaking", "feed_forward": "experts", "num_attention_experts": 4, "num_experts": 4,
        "history_length": 32, "tie_word_embeddings": True,
    },
    "PEER": {**PEER, "peer_dropout": 0.0, "peer_query_dropout": 0.0},
    # All that is drawn at random.
    "ModuleFormer, random": {
        "attention": "stickbreaking", "feed_forward": "experts", "num_attention_experts": 4, "num_experts": 4,
        "dropout": 0.1, "router_dropout": 0.1, "num_sampled_experts": 1, "auxiliary_loss": "st_moe",
    },
    "PEER, random": {**PEER, "dropout": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_jsonl(home / "text.jsonl", [domain_text("letters", n) for n in range(150)])
    for name, changes in MODELS.items():
        family = "llama" if name == "llama" else "growlm"
        AutoConfig.for_model(family, **{**SETTINGS[family], **changes}).save_pretrained(home / name)
    return home


def run(home: Path, model: str, out: Path, **changes: Any):
    config = PretrainConfig(**{**QUICK, "config": str(home / model / "config.json"), **changes})
    return pretrain(out, [home / "text.jsonl"], config, progress=False)


@pytest.mark.parametrize("model", [name for name in MODELS if "random" not in name])
def test_the_loss_is_that_of_the_processor(device, tell, home, tmp_path, without_gpu, model):
    result = run(home, model, tmp_path / "there")
    with without_gpu():
        reference = run(home, model, tmp_path / "here")
    assert result.loss_before == pytest.approx(reference.loss_before, rel=1e-4)
    assert result.loss_after < 0.9 * result.loss_before
    assert result.loss_after == pytest.approx(reference.loss_after, rel=1e-2)
    tell(f"pretrain {model}: loss {result.loss_before:.4f} -> {result.loss_after:.4f}, on the processor "
         f"{reference.loss_after:.4f}; {result.tokens_per_second:,.0f} tokens a second")  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_in_the_devices_own_precision_and_the_checkpoint_loads(device, home, tmp_path, model):
    result = run(home, model, tmp_path / "out", precision="auto" if device == "cuda" else "bfloat16")
    assert result.loss_after < 0.95 * result.loss_before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.to(device)
    ids = torch.arange(1, 12, device=device)[None]
    out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 15


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits_stopped_or_not(device, home, tmp_path, model, precision):
    run(home, model, tmp_path / "whole", precision=precision)
    with at_step(4, interrupt), pytest.raises(Interrupted):
        run(home, model, tmp_path / "stopped", precision=precision)
    run(home, model, tmp_path / "stopped", precision=precision)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_segments_and_documents(device, home, tmp_path, without_gpu):
    changes = {"separate_documents": True, "segment_length": 16}
    result = run(home, "ModuleFormer", tmp_path / "there", **changes)
    with without_gpu():
        reference = run(home, "ModuleFormer", tmp_path / "here", **changes)
    assert result.loss_after == pytest.approx(reference.loss_after, rel=1e-2)


def test_finetuning_towards_fewer_experts(device, home, tmp_path):
    run(home, "ModuleFormer", tmp_path / "base")
    config = FinetuneConfig(**{**QUICK, "load_concentration": 0.01, "learning_rate": 1e-3})
    result = finetune(tmp_path / "base", tmp_path / "tuned", [home / "text.jsonl"], config, progress=False)
    assert result.loss_after < 1.05 * result.loss_before
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["model_type"] == "growlm"
