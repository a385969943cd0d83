"""Rows in training: documents kept apart, and segments that read the history of those before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from growlm.base import Base
from growlm.errors import ConfigError
from growlm.model import GrowlmConfig, GrowlmForCausalLM
from growlm.training.segments import check_segments, document_ids, final_states
from tiny import make_model

END = 0


def base_of(**changes: Any) -> Base:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "num_experts": 4, "router_size": 8, "history_length": 64,
    }  # fmt: skip
    return Base(GrowlmForCausalLM(GrowlmConfig(**{**sizes, **changes})), "the model", freeze=False)


def row(tokens: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 61, (2, tokens), generator=torch.Generator().manual_seed(seed))


def test_an_end_of_text_belongs_to_the_document_that_it_ends():
    ids = torch.tensor([[5, 6, END, 7, END, END, 8]])
    assert document_ids(ids, END).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize("attention", ["stickbreaking", "softmax"])
def test_documents_of_a_row_do_not_see_each_other(attention):
    base = base_of(attention=attention)
    ids = row()
    ids[:, 9] = END
    apart, _ = final_states(base, ids, documents=document_ids(ids, END))
    torch.testing.assert_close(apart[:, 10:], final_states(base, ids[:, 10:])[0], rtol=1e-4, atol=1e-5)
    together, _ = final_states(base, ids)
    assert not torch.allclose(apart[:, 10:], together[:, 10:])


@pytest.mark.parametrize("segment", [5, 8, 23])
def test_segments_of_one_layer_read_what_a_whole_row_does(segment):
    base, ids = base_of(num_hidden_layers=1), row()
    whole, _ = final_states(base, ids)
    torch.testing.assert_close(final_states(base, ids, segment_length=segment)[0], whole, rtol=1e-4, atol=1e-5)


def test_a_history_reaches_back_no_further_than_the_config_says():
    base, ids = base_of(num_hidden_layers=1, history_length=4), row()
    other = ids.clone()
    other[:, :8] = row(seed=1)[:, :8]  # farther back than four tokens from the segment at 12
    at = [final_states(base, x, segment_length=12)[0][:, 12:] for x in (ids, other)]
    assert torch.equal(*at)
    other[:, 8:12] = row(seed=1)[:, 8:12]
    assert not torch.equal(at[0], final_states(base, other, segment_length=12)[0][:, 12:])


def test_no_gradient_flows_into_the_segment_before():
    base, ids = base_of(), row()
    ids[:, :12] = ids[:, :12] % 30 + 1
    ids[:, 12:] = ids[:, 12:] % 30 + 31
    states, _ = final_states(base, ids, segment_length=12)
    states[:, 12:].square().sum().backward()
    rows = base.embedding.weight.grad.abs().sum(-1).nonzero().flatten()
    assert rows.min() >= 31


def test_segments_keep_documents_apart():
    base, ids = base_of(), row()
    ids[:, 9] = END
    documents = document_ids(ids, END)
    other = ids.clone()
    other[:, :9] = row(seed=1)[:, :9]
    kept = [final_states(base, x, documents=documents, segment_length=7)[0][:, 10:] for x in (ids, other)]
    assert torch.equal(*kept)


def test_the_auxiliary_loss_is_the_segments_mean_by_length():
    base, ids = base_of(num_hidden_layers=1), row(24)
    _, found = final_states(base, ids, segment_length=18)
    # One layer's router sees the same inputs whether a row is cut or not.
    out = base.decoder(ids, output_routings=True, use_cache=False)
    (routing,) = out.routings
    parts = []
    for keep in (slice(0, 18), slice(18, 24)):
        counted = torch.zeros(2, 24)
        counted[:, keep] = 1
        parts.append(base.model.auxiliary_loss((routing,), counted.flatten()))
    assert found is not None
    torch.testing.assert_close(found, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"segment_length": 32}, "segment_length is 32; it must be less than sequence_length, 32"),
        ({"history_length": 0}, {"segment_length": 8}, "the model: history_length is 0"),
        ({"attention": ["softmax", "stickbreaking"]}, {"segment_length": 8}, "stick-breaking attention in all layers"),
    ],
)
def test_segments_that_cannot_be_are_refused(changes, options, message):
    with pytest.raises(ConfigError, match=message):
        check_segments(base_of(**changes), 32, separate_documents=False, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"separate_documents": True, "segment_length": None}, "separate_documents"),
        ({"separate_documents": False, "segment_length": 8}, "segment_length"),
    ],
)
def test_other_families_are_refused_by_name(options, name):
    with pytest.raises(ConfigError, match=f"{name} is for growlm models.* a llama"):
        check_segments(Base(make_model("llama"), "the base"), 32, **options)


def test_gradient_checkpointing_would_drop_the_history_and_is_refused():
    base = base_of()
    enable = getattr(base.model, "activation_checkpointing_enable", None) or base.model.gradient_checkpointing_enable
    enable()
    base.model.train()
    with pytest.raises(ConfigError, match="which gradient checkpointing drops"):
        final_states(base, row(), segment_length=12)
