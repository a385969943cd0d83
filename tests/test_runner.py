"""Runner: in one pass over many texts each gets what its module set computes of it alone, wherever it enters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from growlm.base import Base
from growlm.base.rooms import Rooms
from growlm.engine.runner import Runner, Work
from growlm.layers import thin
from growlm.layers.around import Together
from growlm.layers.thin import allow_thin_products
from growlm.modules import ModuleSet
from stores import make_module
from tiny import FAMILIES, make_base, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

SETS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "blocks on top": [{"kind": "blocks", "placement": "top"}],
    "blocks between": [{"kind": "blocks", "placement": "interleaved", "num_layers": 2, "vocabulary": "both"}],
    "experts": [{"kind": "experts", "num_experts": 3, "num_attention_experts": 2, "router_size": 8}],
    "other experts": [{"kind": "experts", "num_experts": 3, "num_attention_experts": 2, "router_size": 8}],
    "pools": [{"kind": "peer", "num_experts": 30, "num_heads": 2, "top_k": 3, "layers": (0, 2)}],
    "pools instead": [{"kind": "peer", "num_experts": 16, "num_heads": 1, "top_k": 4, "replace_feed_forward": True}],
    "lora": [{"kind": "lora", "r": 3}],
    "another lora": [{"kind": "lora", "r": 2, "layers": (1, 2), "vocabulary": "both"}],
    "dora": [{"kind": "lora", "r": 4, "use_dora": True}],
    "two loras": [{"kind": "lora", "r": 2}, {"kind": "lora", "r": 3, "layers": (0,)}],
}
Case = tuple[Base, dict[str, ModuleSet]]
CASES: dict[str, Case] = {}
ROOMS: dict[Base, Rooms] = defaultdict(Rooms)  # a base's texts lie side by side, whatever their modules


def case_of(family: str) -> Case:
    if family not in CASES:
        base = make_base(family)
        sets = {}
        for number, (name, shapes) in enumerate(SETS.items()):
            modules = [
                make_module(base, 10 * number + place, **{"vocabulary": "head", **shape})
                for place, shape in enumerate(shapes)
            ]
            sets[name] = ModuleSet(base, modules)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thin, "_LARGE", 0)
            allow_thin_products(nn.ModuleList([base.model, *(m for one in sets.values() for m in one.modules)]))
        CASES[family] = base, sets
    return CASES[family]


class Text:
    """A text that is read piece by piece under one module set."""

    def __init__(self, modules: ModuleSet, tokens: int, seed: int) -> None:
        self.modules, self.read = modules, 0
        self.ids = random_ids(1, tokens, seed=seed)[0]
        self.cache = ROOMS[modules.base].new()
        self.states: list[torch.Tensor] = []

    def next(self, tokens: int) -> Work:
        work = Work(self.modules, self.ids[self.read : self.read + tokens], self.read, self.cache)
        self.read += len(work.ids)
        return work

    def take(self, work: Work) -> None:
        assert work.hidden is not None
        self.states.append(work.hidden)

    def check(self, runner: Runner) -> None:
        """What it came to, against a pass of its own."""
        states = torch.cat(self.states, dim=1)[0]
        (logits,) = runner.logits([(self.modules, states, None)])
        expected = self.modules.logits(self.ids[None, : self.read])[0]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def read_together(runner: Runner, texts: list[Text], pieces: list[list[int]]) -> None:
    for turn in range(max(map(len, pieces))):
        now = [(text, text.next(sizes[turn])) for text, sizes in zip(texts, pieces, strict=True) if turn < len(sizes)]
        runner.run([work for _, work in now])
        for text, work in now:
            text.take(work)


@pytest.mark.parametrize("thin_rows", [range(0), range(2, 1000)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_texts_of_all_module_sets_in_one_pass_are_read_as_each_alone(family, thin_rows, monkeypatch):
    monkeypatch.setattr(thin, "thin_rows", lambda dtype: thin_rows)
    base, sets = case_of(family)
    runner = Runner(base)
    texts = [Text(modules, 20, seed) for seed, modules in enumerate([*sets.values(), sets["lora"]])]
    # Windows of 12: some texts are within it, some pass it.
    pieces = [[5 + n % 3, 1, 1, 2 + n % 4, 1, 4] for n in range(len(texts))]
    read_together(runner, texts, pieces)
    for text in texts:
        text.check(runner)


@pytest.mark.parametrize("family", ["llama", "gpt2", "growlm"])
@given(
    texts=st.lists(
        st.tuples(st.sampled_from(list(SETS)), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_any_texts_in_any_pieces_are_read_as_each_alone(family, texts):
    base, sets = case_of(family)
    runner = Runner(base)
    made = [Text(sets[name], sum(sizes), seed) for seed, (name, sizes) in enumerate(texts)]
    read_together(runner, made, [sizes for _, sizes in texts])
    for text in made:
        text.check(runner)


@pytest.mark.parametrize("family", ["llama", "gpt2", "growlm"])
@torch.no_grad()
def test_a_text_may_leave_for_the_router_and_enter_again_where_its_modules_branch_off(family):
    base, sets = case_of(family)
    runner, read_at = Runner(base), 1
    other = Text(sets["lora"], 9, 99)
    for name, modules in sets.items():
        ids, cache = random_ids(1, 11, seed=3)[0], ROOMS[base].new()
        below = {at for at in (modules.fork,) if at < read_at}
        kept: dict[int, list[torch.Tensor]] = {at: [] for at in {*below, read_at}}
        for start in (0, 6):  # by the base alone, in two pieces, as far as the router reads
            work = Work(ModuleSet(base), ids[start : start + 6], start, cache, leaves=read_at, keeps=below)
            companion = other.next(1)
            runner.run([companion, work])
            other.take(companion)
            assert work.hidden is not None
            kept[read_at].append(work.hidden)
            for at in below:
                kept[at].append(work.kept[at])
        enters = modules.fork if modules.fork < read_at else read_at
        cache.cut(enters)
        hidden = torch.cat(kept[enters], dim=1) if enters or modules.fork != 0 else None
        work = Work(modules, ids, 0, cache, enters=enters, hidden=hidden)
        runner.run([work])
        assert work.hidden is not None
        (logits,) = runner.logits([(modules, work.hidden[0], None)])
        torch.testing.assert_close(logits, modules.logits(ids[None])[0], rtol=1e-3, atol=1e-4, msg=name)
        other = Text(sets["lora"], 9, 99)


@torch.no_grad()
def test_a_base_layer_runs_once_for_all_module_sets(monkeypatch):
    base, sets = case_of("llama")
    texts = [Text(sets[name], 3, n) for n, name in enumerate(["base", "lora", "dora", "pools", "blocks between"])]
    ran: list[tuple[int, ...]] = []
    matrices = [part for layer in base.layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    hooks = [part.register_forward_hook(lambda part, given, _: ran.append(tuple(given[0].shape))) for part in matrices]
    try:
        Runner(base).run([text.next(3) for text in texts])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(ran) == len(matrices)
    assert {shape[1] for shape in ran} == {3 * len(texts)}


@torch.no_grad()
def test_low_rank_differences_of_what_reads_tokens_one_by_one_are_those_of_their_own_texts():
    """Queries of product keys see tokens (t, d), without a batch."""
    base = make_base("growlm", feed_forward=["peer", "memory", "dense", "dense"], num_experts=0, peer_num_experts=64)
    sets = [ModuleSet(base, [make_module(base, n, kind="lora", r=3, vocabulary="none")]) for n in range(2)]
    runner, texts = Runner(base), [Text(modules, 9, n) for n, modules in enumerate([*sets, ModuleSet(base)])]
    read_together(runner, texts, [[4, 1, 4], [6, 2], [3, 1, 1]])
    for text in texts:
        text.check(runner)


@torch.no_grad()
def test_nothing_is_held_of_module_sets_that_are_gone():
    base, sets = case_of("llama")
    runner = Runner(base)
    runner.run([Text(sets[name], 3, 0).next(3) for name in ("lora", "dora")])
    assert any(isinstance(part, Together) for layer in runner._joined.values() if layer for part in layer.modules())
    runner.run([Text(sets[name], 3, 0).next(3) for name in ("lora", "base")])
    assert {digests for _, digests in runner._joined} == {tuple(sorted(sets[n].digest for n in ("lora", "base")))}
    runner.forget()
    assert not runner._joined
