"""Drafting: an answer that is tried as a text goes on is the answer that it would have been, in fewer passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.engine import Engine
from growlm.engine.drafting import MOST, Drafter
from growlm.recall.contexts import Contexts
from growlm.recall.memory import Memory
from growlm.recall.suffixes import LONGEST
from growlm.recall.text import RecalledText
from growlm.store import Store
from stores import domain_text, make_store

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {
    "letters": {"kind": "recall"},
    "digits": {"kind": "lora+recall", "r": 4},
    "signs": {"kind": "blocks+recall", "placement": "top", "num_layers": 1},
}


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "growlm"])
def made(request, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, request.param, SHAPES)
    return home


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, int]]:
    """Drafts of each pass, and how many were right."""
    seen: list[tuple[int, int]] = []
    learn = Drafter.learn
    monkeypatch.setattr(Drafter, "learn", lambda self, *found: seen.append(found) or learn(self, *found))
    return seen


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.2, "logprobs": 2}, {"stop": (" ",)}],
    ids=str,
)
def test_an_answer_is_what_it_is_without_drafts(made, name, sampling, counted, monkeypatch):
    monkeypatch.setattr("growlm.engine.drafting._LEAST", 1)  # to try much, and to be wrong often
    prompts = [domain_text(name, seed, words=4) for seed in range(4)]
    with Engine(Store.open(made / "store"), drafts=False) as plain:
        wanted = [plain.generate(p, module=name, max_new_tokens=40, **sampling) for p in prompts]
        assert not any(tried for tried, _ in counted)
    with Engine(Store.open(made / "store")) as engine:
        found = [engine.generate(p, module=name, max_new_tokens=40, **sampling) for p in prompts]
        together = engine.generate_many(prompts, modules=name, max_new_tokens=40, **sampling)
        assert engine._loop.rooms.num_bytes() == 0
    for answers in (found, together):
        assert [a.text for a in answers] == [a.text for a in wanted]
        assert [a.tokens for a in answers] == [a.tokens for a in wanted]
        for answer, other in zip(answers, wanted, strict=True):
            assert [one.logprob for one in answer.logprobs or ()] == pytest.approx(
                [one.logprob for one in other.logprobs or ()], abs=1e-4
            )
    assert "stop" in sampling or sum(tried for tried, _ in counted) > 20
    assert all(0 <= right <= tried <= MOST for tried, right in counted)


def test_a_text_that_is_recalled_takes_fewer_passes(made, counted, monkeypatch):
    """By a module that says nothing but what its text does."""

    def says_it(memory: Memory, logits: torch.Tensor, contexts: Contexts) -> torch.Tensor:
        found = memory.text.find(contexts.tokens.numpy(), 1).tokens[:, 0]
        return torch.nn.functional.one_hot(torch.from_numpy(found).clamp(min=0), logits.shape[-1]).float()

    monkeypatch.setattr(Memory, "mix", says_it)
    store = Store.open(made / "store")
    document = next(iter(store.load("letters", store.load_base()).memory.text.parts[0].documents()))[1].tolist()
    with Engine(store) as engine:
        answer = engine.generate(document[:8], module="letters", max_new_tokens=len(document) - 9)
    assert answer.tokens == document[8:-1]
    assert len(counted) < len(answer.tokens) / 2
    assert sum(right for _, right in counted) + len(counted) == len(answer.tokens)


def test_a_chat_goes_on_from_what_was_read_with_drafts(made, monkeypatch):
    monkeypatch.setattr("growlm.engine.drafting._LEAST", 1)
    with Engine(Store.open(made / "store")) as engine, Engine(engine.store, drafts=False, prefix_bytes=0) as fresh:
        text = domain_text("digits", 1, words=8)
        for _ in range(3):
            answer = engine.generate(text, module="digits", max_new_tokens=30)
            assert answer.tokens == fresh.generate(text, module="digits", max_new_tokens=30).tokens
            text += answer.text + " 12 "


# The drafts by themselves


def memory_of(*documents: list[int]) -> Memory:
    memory = Memory()
    memory.text = RecalledText.of([(str(n), np.array(ids)) for n, ids in enumerate(documents)], 100)
    return memory


def test_what_follows_the_longest_match_is_proposed_up_to_the_end_of_its_document():
    one = memory_of([1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 9, 2, 3, 4, 5, 50, 51, 52])
    assert Drafter().propose([one], [0, 1, 2, 3, 4, 5], 10) == [6, 7, 8, 9]
    assert Drafter().propose([one], [9, 9, 2, 3, 4, 5], 2) == [50, 51]
    assert Drafter().propose([one], [7, 7, 7, 7, 4, 5], 10) == []  # two tokens agree by chance
    assert Drafter().propose([memory_of([3, 4, 5, 6, 70, 71]), one], [1, 2, 3, 4, 5, 6], 10) == [7, 8, 9]


def test_drafts_that_are_wrong_become_rare_and_come_back_when_right():
    memory, text, drafter = memory_of([*range(1, 90)]), [1, 2, 3, 4, 5, 6, 7, 8], Drafter()
    tries = []
    for _ in range(100):
        drafts = drafter.propose([memory], text, 10)
        tries.append(bool(drafts))
        drafter.learn(len(drafts), 0)
    assert sum(tries) < 10
    sizes = []
    while len(sizes) < 6:
        if drafts := drafter.propose([memory], [*range(1, 40)], 20):
            sizes.append(len(drafts))
            drafter.learn(len(drafts), len(drafts))
    assert sizes == [1, 2, 4, 8, 16, 16]


@given(
    documents=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=30), min_size=1, max_size=5),
    context=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    most=st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_what_follows_stands_there(documents, context, most):
    text = RecalledText.of([(str(n), np.array(ids)) for n, ids in enumerate(documents)], 3)
    newest = np.full((1, LONGEST), -1)
    newest[0, : len(context)] = context[::-1]
    length, after = text.following(newest, most)
    whole = [*context[len(context) - length :], *after]
    assert len(after) <= most
    assert any(whole == ids[at : at + len(whole)] for ids in documents for at in range(len(ids))) or not length
    ends = any(ids[-len(whole) :] == whole for ids in documents)
    assert len(after) == most or ends or not length
