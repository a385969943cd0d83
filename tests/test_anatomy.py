"""Every family's anatomy: the base, run part by part, computes what transformers' own forward computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from growlm.base import Base, anatomy
from growlm.errors import BaseModelError
from tiny import FAMILIES, SETTINGS, WINDOW, make_base, make_model, random_ids

# Settings within a family that change how its layers are masked, rotated or wired.
VARIANTS = [
    ("llama", {"tie_word_embeddings": True, "attention_bias": False}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("mistral", {"sliding_window": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"layer_types": ["full_attention"] * 4}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 4, "final_logit_softcapping": 5.0}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("phi3", {"sliding_window": None}),
    ("gpt2", {"scale_attn_weights": False}),
]
# gemma2 caps its attention scores, which transformers does in eager attention only.
IMPLEMENTATIONS = [(f, i) for f in FAMILIES for i in ("sdpa", "eager") if (f, i) != ("gemma2", "sdpa")]
# Below, at and above the sliding window, where masks begin to differ.
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request) -> Base:
    return make_base(request.param)


@torch.no_grad()
def in_two_halves(base: Base, input_ids: torch.Tensor, k: int) -> torch.Tensor:
    hidden, shared = base.begin(input_ids)
    hidden = base.embed_positions(hidden, shared.positions)
    hidden = base.run(hidden, base.layers_to_run(0, k), shared)
    hidden = base.run(hidden, base.layers_to_run(k), shared)
    return base.cap(base.head(base.norm(hidden)))


@torch.no_grad()
def with_cache(base: Base, input_ids: torch.Tensor, chunks: list[int], visible: torch.Tensor | None) -> torch.Tensor:
    """Logits of `input_ids`, read in pieces with all keys and values kept."""
    cache, past, parts = DynamicCache(), 0, []
    for part in input_ids.split(chunks, dim=1):
        upto = past + part.shape[1]
        seen = None if visible is None else visible[:, :upto]
        hidden, shared = base.begin(part, past=past, visible=seen, cache=cache)
        hidden = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)
        parts.append(base.cap(base.head(base.norm(hidden))))
        past = upto
    return torch.cat(parts, dim=1)


def left_padded(input_ids: torch.Tensor, lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.zeros(len(lengths), width, dtype=torch.long)
    visible = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        padded[row, width - n :] = input_ids[row, :n]
        visible[row, width - n :] = True
    return padded, visible


@pytest.mark.parametrize("tokens", LENGTHS)
@torch.no_grad()
def test_logits_equal_transformers_bitwise(base, tokens):
    input_ids = random_ids(2, tokens)
    assert torch.equal(base.logits(input_ids), base.model(input_ids).logits)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@torch.no_grad()
def test_logits_of_variants_equal_transformers_bitwise(family, changes):
    base = make_base(family, **changes)
    for tokens in LENGTHS:
        input_ids = random_ids(2, tokens)
        assert torch.equal(base.logits(input_ids), base.model(input_ids).logits), tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_bitwise_with_eager_attention(family):
    base = make_base(family, attn_implementation="eager")
    for tokens in LENGTHS:
        input_ids = random_ids(2, tokens)
        # Keys copied into a cache have other strides, for which gpt2's matrix products round otherwise.
        assert torch.equal(base.logits(input_ids), base.model(input_ids, use_cache=False).logits), tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_bitwise_in_bfloat16(family):
    base = Base(make_model(family).to(torch.bfloat16))
    for tokens in LENGTHS:
        input_ids = random_ids(2, tokens)
        logits = base.logits(input_ids)
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, base.model(input_ids).logits), tokens


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
@torch.no_grad()
def test_tokens_beyond_the_window_are_not_seen(family):
    """Else the lengths above would test nothing."""
    narrow, wide = make_base(family), make_base(family, sliding_window=200)
    assert "sliding_attention" in {step.attention for step in narrow.layers_to_run()}
    within, beyond = random_ids(2, WINDOW), random_ids(2, WINDOW + 1)
    torch.testing.assert_close(narrow.logits(within), wide.logits(within), atol=1e-5, rtol=1e-4)
    assert (narrow.logits(beyond) - wide.logits(beyond))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_left_padding_changes_nothing(family, implementation):
    base = make_base(family, attn_implementation=implementation)
    for lengths in ([5, 9], [WINDOW - 2, WINDOW + 3], [2 * WINDOW, 3 * WINDOW]):
        input_ids = random_ids(2, max(lengths))
        padded, visible = left_padded(input_ids, lengths, max(lengths) + 2)
        logits = base.logits(padded, visible=visible)
        assert logits.isfinite().all()
        for row, n in enumerate(lengths):
            alone = base.logits(input_ids[row : row + 1, :n])[0]
            torch.testing.assert_close(logits[row, -n:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_sees_itself(family):
    """A softmax over nothing is undefined on some devices, and would reach the text through the values."""
    base = make_base(family)
    padded, visible = left_padded(random_ids(2, 2 * WINDOW), [3, 2 * WINDOW], 2 * WINDOW)
    _, shared = base.begin(padded, visible=visible)
    for mask in shared.masks.values():
        assert mask.shape == (2, 1, 2 * WINDOW, 2 * WINDOW)
        assert mask.any(-1).all()


@pytest.mark.parametrize("tokens", [WINDOW - 3, 2 * WINDOW])
def test_two_halves_equal_the_whole_bitwise(base, tokens):
    input_ids = random_ids(2, tokens)
    with torch.no_grad():
        whole = base.model(input_ids).logits
    for k in range(base.num_layers + 1):
        assert torch.equal(in_two_halves(base, input_ids, k), whole), k


@pytest.mark.parametrize("tokens", [WINDOW - 3, 2 * WINDOW])
@torch.no_grad()
def test_hidden_states_kept_at_a_layer_go_on_bitwise(base, tokens):
    """What learning does with cached features: a new pass for hidden states that already exist."""
    input_ids = random_ids(2, tokens)
    hidden, shared = base.begin(input_ids)
    kept = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(0, 2), shared)
    again = base.pass_for(kept, torch.arange(tokens)[None])
    assert torch.equal(
        base.cap(base.head(base.norm(base.run(kept, base.layers_to_run(2), again)))), base.logits(input_ids)
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [[1] * 30, [7, 1, 1, 1, 20], [WINDOW, WINDOW, 6], [30]],
    ids=["token by token", "uneven", "windows", "at once"],
)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(base, chunks, padded):
    tokens = sum(chunks)
    input_ids, visible = random_ids(2, tokens), None
    if padded:
        input_ids, visible = left_padded(input_ids, [tokens, tokens - 3], tokens)
    with torch.no_grad():
        whole = base.logits(input_ids, visible=visible)
    pieces = with_cache(base, input_ids, chunks, visible)
    seen = torch.ones_like(input_ids, dtype=torch.bool) if visible is None else visible
    torch.testing.assert_close(pieces[seen], whole[seen], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_either_attention_reads_in_pieces(family, implementation):
    base = make_base(family, attn_implementation=implementation)
    input_ids, visible = left_padded(random_ids(2, 30), [30, 27], 30)
    with torch.no_grad():
        whole = base.logits(input_ids, visible=visible)
    for chunks in ([9, 1, 20], [WINDOW + 2, 1, 1, 14]):
        pieces = with_cache(base, input_ids, chunks, visible)
        torch.testing.assert_close(pieces[visible], whole[visible], atol=1e-5, rtol=1e-4)


def test_steps_are_the_models_own_layers(base):
    layers = list(getattr(base.decoder, base.anatomy.layers))
    assert len(base.layers_to_run()) == base.num_layers == base.config.num_hidden_layers
    assert all(step.layer is layer for step, layer in zip(base.layers_to_run(), layers, strict=True))
    assert base.layers_to_run(0, 1) + base.layers_to_run(1, 2) + base.layers_to_run(2) == base.layers_to_run()


def test_named_parts_exist_in_every_layer(base):
    for layer in base.layers:
        assert hasattr(layer, base.anatomy.feed_forward)
        assert isinstance(getattr(layer, base.anatomy.attention).layer_idx, int)
        names = dict(layer.named_parameters())
        # Biases are optional; of each pair of writes into the residual stream the weights are not.
        assert len([n for n, _ in base.anatomy.zeroed if n in names and n.endswith("weight")]) == 2


def test_embedding_scale_is_what_the_embedding_applies(base):
    input_ids = random_ids(1, 6)
    rows = base.embedding.weight[input_ids]
    torch.testing.assert_close(base.embedding(input_ids), rows * base.embedding_scale)


def test_sizes(base):
    assert base.head_weight.shape == (base.vocab_size, base.hidden_size)
    distinct = {id(p): p for p in base.model.parameters()}.values()
    assert base.num_parameters() == sum(p.numel() for p in distinct)
    assert base.num_bytes() >= 4 * base.num_parameters()
    assert base.max_positions == (256 if base.config.model_type == "gpt2" else None)


def test_a_base_is_frozen_and_in_evaluation_mode():
    model = make_model("llama", attention_dropout=0.5).train()
    base = Base(model)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_families_are_those_of_the_table():
    assert list(anatomy.FAMILIES) == FAMILIES == list(SETTINGS)


def test_unknown_family_names_the_ten():
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BaseModelError, match="bloom") as caught:
        Base(model, "models/mine")
    message = str(caught.value)
    assert "models/mine" in message
    for family in FAMILIES:
        assert family in message
    assert "\n" not in message


def test_weights_tied_to_a_layers_position_are_refused():
    with pytest.raises(BaseModelError, match="scale_attn_by_inverse_layer_idx"):
        make_base("gpt2", scale_attn_by_inverse_layer_idx=True)


def test_attention_that_looks_ahead_is_refused():
    with pytest.raises(BaseModelError, match="looks ahead"):
        make_base("gemma3_text", use_bidirectional_attention=True)


def test_each_attention_pattern_turns_by_its_own_frequencies():
    """Else the logits above would be equal where both were the same."""
    base = make_base("gemma3_text")
    _, shared = base.begin(random_ids(1, 5))
    (cos, _), (other, _) = shared.rotary["sliding_attention"], shared.rotary["full_attention"]
    assert not torch.equal(cos, other)


def test_cross_attention_is_refused():
    with pytest.raises(BaseModelError, match=r"cross-attention"):
        make_base("gpt2", add_cross_attention=True)
