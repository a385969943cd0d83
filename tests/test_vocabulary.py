"""Vocabulary rows: a module's own rows of head and embedding, against plain loops, and which tokens get them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growlm.base import Base
from growlm.errors import IntegrityError
from growlm.modules.vocabulary import HeadRows, InputRows, VocabularyRows, choose_rows
from tiny import VOCAB, make_base, make_model, random_ids

# b batch, t tokens, d hidden size, v vocabulary, r rows held
B, T, D, V = 2, 9, 8, 12
SOME = [0, 1, 4, 7, 11]  # the first and the last token among them
IDS = [[3], [0], [V - 1], SOME, list(range(V))]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> Tensor:
    """Every token at least once."""
    order = torch.randperm(B * T, generator=torch.Generator().manual_seed(0))
    return (order % V).view(B, T)


def head_by_loop(logits: Tensor, hidden: Tensor, ids: list[int], rows: Tensor) -> Tensor:
    out = [[[logits[b, t, v] for v in range(V)] for t in range(T)] for b in range(B)]
    for b in range(B):
        for t in range(T):
            for r, token in enumerate(ids):
                out[b][t][token] = out[b][t][token] + (hidden[b, t] * rows[r]).sum()
    return torch.stack([torch.stack([torch.stack(row) for row in text]) for text in out])


def input_by_loop(hidden: Tensor, input_ids: Tensor, ids: list[int], rows: Tensor, scale: float) -> Tensor:
    out = [[hidden[b, t] for t in range(T)] for b in range(B)]
    for b in range(B):
        for t in range(T):
            for r, token in enumerate(ids):
                if int(input_ids[b, t]) == token:
                    out[b][t] = out[b][t] + scale * rows[r]
    return torch.stack([torch.stack(text) for text in out])


def assert_gradients_match(out: Tensor, reference: Tensor, of: list[Tensor]) -> None:
    upstream = normal(*out.shape, seed=99)
    found = torch.autograd.grad(out, of, upstream)
    wanted = torch.autograd.grad(reference, of, upstream)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_head_rows_match_a_loop(ids):
    logits, hidden = normal(B, T, V, seed=0).requires_grad_(), normal(B, T, D, seed=1).requires_grad_()
    own = HeadRows(torch.tensor(ids), normal(len(ids), D, seed=2))
    out = own.add_to(logits, hidden)
    reference = head_by_loop(logits, hidden, ids, own.rows)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    assert_gradients_match(out, reference, [logits, hidden, own.rows])


@pytest.mark.parametrize("scale", [1.0, math.sqrt(D)])
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_input_rows_match_a_loop(ids, scale):
    hidden, input_ids = normal(B, T, D, seed=0).requires_grad_(), tokens()
    own = InputRows(torch.tensor(ids), normal(len(ids), D, seed=2))
    out = own.add_to(hidden, input_ids, scale)
    reference = input_by_loop(hidden, input_ids, ids, own.rows, scale)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    assert_gradients_match(out, reference, [hidden, own.rows])


def test_input_rows_are_quiet_about_a_part_of_a_text():
    """Training reads all but the last token of packed rows: ids that are not contiguous."""
    own = InputRows(torch.tensor(SOME), normal(len(SOME), D, seed=2))
    hidden, input_ids = normal(B, T, D, seed=0), tokens()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            part = own.add_to(hidden[:, :-1], input_ids[:, :-1], 1.0)
    finally:
        torch.set_warn_always(always)
    assert torch.equal(part, own.add_to(hidden, input_ids, 1.0)[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_rows_of_zero_change_nothing_bitwise(ids, dtype):
    zeros = torch.zeros(len(ids), D, dtype=dtype)
    logits, hidden = normal(B, T, V, seed=0).to(dtype), normal(B, T, D, seed=1).to(dtype)
    assert torch.equal(HeadRows(torch.tensor(ids), zeros).add_to(logits, hidden), logits)
    assert torch.equal(InputRows(torch.tensor(ids), zeros).add_to(hidden, tokens(), math.sqrt(D)), hidden)


@pytest.mark.parametrize("kind", [HeadRows, InputRows])
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_merged_weight_has_the_rows_in_it(kind, ids):
    weight, rows = normal(V, D, seed=3), normal(len(ids), D, seed=4)
    before = weight.clone()
    merged = kind(torch.tensor(ids), rows).merged(weight)
    assert torch.equal(weight, before)
    assert merged.data_ptr() != weight.data_ptr()
    for token in range(V):
        wanted = weight[token] + rows[ids.index(token)] if token in ids else weight[token]
        assert torch.equal(merged[token], wanted), token


def test_merged_weight_is_in_the_rows_dtype():
    """Small differences would be lost in the base's bfloat16."""
    weight, rows = normal(V, D, seed=3).to(torch.bfloat16), 1e-4 * normal(len(SOME), D, seed=4)
    merged = HeadRows(torch.tensor(SOME), rows).merged(weight)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged[SOME] - weight[SOME].float(), rows, atol=1e-6, rtol=0)


# With a base


def rows_for(base: Base, vocabulary: str, ids: Tensor, *, seed: int | None = 5) -> VocabularyRows:
    rows = VocabularyRows.create(base, vocabulary, ids)
    if seed is not None:
        with torch.no_grad():
            for i, p in enumerate(rows.parameters()):
                p.add_(0.2 * normal(*p.shape, seed=seed + i))
    return rows


def run(base: Base, rows: VocabularyRows, input_ids: Tensor) -> Tensor:
    hidden, shared = base.begin(input_ids)
    hidden = base.embed_positions(rows.embed(base, hidden, input_ids), shared.positions)
    return rows.logits(base, base.norm(base.run(hidden, base.layers_to_run(), shared)))


@pytest.mark.parametrize("num_rows", [1, 50, VOCAB])
@pytest.mark.parametrize("vocabulary", ["head", "both"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@torch.no_grad()
def test_merged_weights_give_the_same_logits(family, vocabulary, num_rows):
    """A model whose embedding and head are the merged ones computes what the rows beside the base compute."""
    base = make_base(family)
    # The text's own tokens among the rows, so that the input's rows are read.
    input_ids = random_ids(2, 15)
    others = [i for i in range(VOCAB) if i not in set(input_ids.flatten().tolist())]
    ids = torch.tensor([*input_ids.flatten().unique().tolist(), *others][:num_rows])
    rows = rows_for(base, vocabulary, ids)
    logits = run(base, rows, input_ids)
    assert (logits - base.logits(input_ids)).abs().max() > 1e-2

    model = make_model(family)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = torch.nn.Parameter(rows.head.merged(base.head_weight))
    if rows.input is not None:
        embedding.weight = torch.nn.Parameter(rows.input.merged(base.embedding.weight))
    torch.testing.assert_close(logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", ["none", "head", "both"])
@torch.no_grad()
def test_new_rows_are_those_asked_for_and_zero(vocabulary):
    base = make_base("llama")
    rows = VocabularyRows.create(base, vocabulary, torch.tensor([7, 300, 2]))
    assert (rows.head is not None) == (vocabulary != "none")
    assert (rows.input is not None) == (vocabulary == "both")
    for part in (rows.head, rows.input):
        if part is not None:
            assert part.ids.tolist() == [2, 7, 300]
            assert part.rows.shape == (3, base.hidden_size)
            assert not part.rows.any()
            assert part.rows.requires_grad
    input_ids = random_ids(1, 9)
    assert torch.equal(run(base, rows, input_ids), base.logits(input_ids))


@pytest.mark.parametrize("ids", [None, torch.zeros(0, dtype=torch.long)], ids=["none", "empty"])
def test_no_ids_means_no_rows(ids):
    base = make_base("llama")
    rows = VocabularyRows.create(base, "both", ids)
    assert rows.head is None
    assert rows.input is None


def test_rows_restore_from_their_state_without_a_copy():
    base = make_base("llama")
    rows = rows_for(base, "both", torch.arange(0, VOCAB, 7))
    tensors = dict(rows.state_dict())
    restored = VocabularyRows.restore(dict(tensors), base, "law/1")
    state = restored.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())


@pytest.mark.parametrize("part", ["head", "input"])
@pytest.mark.parametrize(
    "change",
    [
        {"ids": None},
        {"rows": None},
        {"ids": torch.tensor([1, 2, VOCAB])},
        {"ids": torch.tensor([-1, 2, 3])},
        {"ids": torch.tensor([1, 2])},
        {"rows": torch.zeros(3, 31)},
        {"rows": torch.zeros(4, 32)},
        {"rows": torch.zeros(3)},
    ],
    ids=["no ids", "no rows", "beyond", "negative", "fewer ids", "narrow", "more rows", "flat"],
)
def test_rows_that_do_not_fit_are_refused(part, change):
    base = make_base("llama")
    tensors = dict(rows_for(base, "both", torch.tensor([1, 2, 3])).state_dict())
    for name, tensor in change.items():
        if tensor is None:
            del tensors[f"{part}.{name}"]
        else:
            tensors[f"{part}.{name}"] = tensor
    with pytest.raises(IntegrityError, match=rf"law/1: .*{part} rows"):
        VocabularyRows.restore(tensors, base, "law/1")


# Which tokens get rows


@st.composite
def samples(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Whole nats, so that a difference in loss is always worth more than any count."""
    v = draw(st.integers(1, 40))
    losses = draw(st.lists(st.integers(0, 60) | st.just(0), min_size=v, max_size=v))
    counts = draw(st.lists(st.integers(0, 500) | st.just(0), min_size=v, max_size=v))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(counts), draw(st.integers(0, 50))


@settings(max_examples=300, deadline=None)
@given(samples())
def test_chosen_rows(sample):
    losses, counts, max_rows = sample
    chosen = choose_rows(losses, counts, max_rows)
    used = set(counts.nonzero()[:, 0].tolist())
    ids = chosen.tolist()
    assert chosen.dtype == torch.int64
    assert ids == sorted(set(ids))
    assert set(ids) <= used
    # The whole budget is spent, as far as there are tokens to spend it on.
    assert len(ids) == min(max_rows, len(used))
    left = used - set(ids)
    if ids and left:
        least, most = float(losses[ids].min()), float(losses[list(left)].max())
        assert most <= least
        if losses.any():
            # Where the loss says nothing, the more frequent.
            tied = [i for i in ids if losses[i] == most]
            beaten = [i for i in left if losses[i] == least]
            if most == least:
                assert int(counts[tied].min()) >= int(counts[beaten].max())


def test_rows_go_to_the_tokens_that_cost_most():
    losses = torch.tensor([0.5, 90.0, 3.0, 0.0, 0.0, 40.0, 0.0])
    counts = torch.tensor([1000, 4, 0, 7, 9, 2, 0])
    # 2 costs but is not in the text; 3 and 4 are not in the sample.
    assert choose_rows(losses, counts, 1).tolist() == [1]
    assert choose_rows(losses, counts, 2).tolist() == [1, 5]
    assert choose_rows(losses, counts, 4).tolist() == [0, 1, 4, 5]
    assert choose_rows(losses, counts, 99).tolist() == [0, 1, 3, 4, 5]
