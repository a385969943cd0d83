"""The from-scratch model against the published formulation: states, auxiliary loss and all gradients."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import growlm
from growlm.model import GrowlmConfig, GrowlmForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
formulation = import_module("benchmarks.lib.formulation")
TINY = json.loads((Path(growlm.__file__).parent / "model" / "presets" / "molm-tiny.json").read_text())
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 16}


@pytest.mark.parametrize("changes", [{}, {"num_attention_experts": 0}, {"auxiliary_loss": "none"}], ids=str)
def test_a_small_molm_computes_what_was_published(changes):
    torch.manual_seed(0)
    model = GrowlmForCausalLM(GrowlmConfig(**{**TINY, **SIZES, **changes})).train()
    ids = torch.randint(0, 61, (2, 40))
    weigh = torch.randn(2, 40, 24)
    parameters = {n: p for n, p in model.named_parameters() if n != "lm_head.weight"}

    def found(hidden: torch.Tensor, auxiliary: torch.Tensor) -> list[torch.Tensor]:
        loss = (hidden * weigh).sum() + 100 * auxiliary
        return [hidden, auxiliary, *torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)]

    out = model.model(ids, use_cache=False, output_routings=True)
    ours = found(out.last_hidden_state, model.auxiliary_loss(out.routings))
    theirs = found(*formulation.states(model, ids))
    for name, a, b in zip(["states", "auxiliary loss", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
