"""Arrival: weights that come piece by piece are waited for before they are read, whatever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import elsewhere
from elsewhere import Late, copied_late, pretended
from growlm.base.rooms import Rooms
from growlm.engine import Engine, host_tier
from growlm.engine.arrival import Arrival, pieces_of
from growlm.engine.host_tier import HostTier
from growlm.engine.runner import Runner, Work
from growlm.modules import ModuleSet
from growlm.store import Store
from stores import make_store

CPU = torch.device("cpu")
MODULES: dict[str, dict[str, Any]] = {
    "blocks": {"num_layers": 2, "placement": "interleaved", "vocabulary": "both"},
    "lora": {"kind": "lora", "r": 4, "use_dora": True},
    "other-lora": {"kind": "lora", "r": 4},
    "third-lora": {"kind": "lora", "r": 4},
    "recall": {"kind": "lora+recall", "r": 4},
    "peer": {"kind": "peer", "num_experts": 64},
    "experts": {"kind": "experts", "num_experts": 3, "num_attention_experts": 0, "expert_size": 16},
}


@pytest.fixture
def late(monkeypatch) -> list[Late]:
    """The marks of all copies, whose bytes are numbers that are none until they are waited for."""
    marks: list[Late] = []
    monkeypatch.setattr(host_tier, "copied_beside", partial(copied_late, marks=marks))
    monkeypatch.setattr("growlm.engine.arrival._PIECE", 1)
    return marks


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("arrival")
    make_store(folder, "llama", {name: {**config, "domain": "letters"} for name, config in MODULES.items()})
    return Store.open(folder / "store")


def bring(store: Store, base: Any, names: Sequence[str], tier: HostTier | None = None) -> ModuleSet:
    """Modules from the store: by a tier, or whole."""
    return ModuleSet(base, [store.load(name, base, bring=None if tier is None else tier.bring) for name in names])


def run(base: Any, sets: Sequence[ModuleSet], tokens: int = 5, enters: int = 0) -> list[Tensor]:
    """What a text of each comes to, all in one pass."""
    rooms, random = Rooms(), torch.Generator().manual_seed(1)
    works = []
    for modules in sets:
        ids = torch.randint(20, base.vocab_size, (tokens,), generator=random)
        hidden = torch.randn(1, tokens, base.hidden_size, generator=random) if enters else None
        works.append(Work(modules, ids, 0, rooms.new(), enters=enters, hidden=hidden))
    Runner(base).run(works)
    assert all(work.hidden is not None for work in works)
    return [work.hidden for work in works if work.hidden is not None]


@pytest.mark.parametrize("names", [[name] for name in MODULES] + [["lora", "other-lora", "third-lora"], list(MODULES)])
def test_a_pass_waits_for_what_it_reads(store, late, names):
    base = store.load_base()
    wanted = run(base, [bring(store, base, [name]) for name in names])
    sets = [bring(store, base, [name], HostTier(CPU, 0)) for name in names]
    assert sum(not mark.query() for mark in late) >= len(names)  # nothing was waited for while they were read
    for own, found in zip(wanted, run(base, sets), strict=True):
        assert torch.equal(found, own)
    assert all(mark.query() for mark in late)
    run(base, sets)
    assert all(module.arriving is None for modules in sets for module in modules.modules)


def test_a_pass_waits_for_no_more_than_it_reads(store, late):
    base = store.load_base()
    modules = bring(store, base, ["lora"], HostTier(CPU, 0))
    ids = torch.arange(20, 25)
    Runner(base).run([Work(modules, ids, 0, Rooms().new(), leaves=1)])
    assert 0 < sum(not mark.query() for mark in late) < len(late) - 1


def test_a_text_that_enters_later_waits_for_what_comes_before_too(store, late):
    base = store.load_base()
    (wanted,) = run(base, [bring(store, base, ["lora"])], enters=1)
    (found,) = run(base, [bring(store, base, ["lora"], HostTier(CPU, 0))], enters=1)
    assert torch.equal(found, wanted)


def test_whoever_runs_a_module_by_himself_waits_for_all_of_it(store, late):
    base, ids = store.load_base(), torch.arange(20, 40)[None]
    for name in ("blocks", "lora", "peer", "experts"):
        wanted = bring(store, base, [name]).logits(ids)
        assert torch.equal(bring(store, base, [name], HostTier(CPU, 0)).logits(ids), wanted)


def test_an_engine_answers_at_once_from_what_has_just_begun_to_come(store):
    def answers(engine: Engine) -> dict[str, list[int]]:
        return {
            name: engine.generate(f"abc {number}", module=name, temperature=0, max_new_tokens=6).tokens
            for number, name in enumerate(MODULES)
        }

    with Engine(store) as engine:
        wanted = answers(engine)
    with pretended(), Engine(store, device="cuda") as engine:
        assert answers(engine) == wanted


def test_texts_that_are_being_answered_wait_for_no_weights_of_another(store, monkeypatch):
    passes, marks = [], []
    monkeypatch.setattr(elsewhere, "copied_late", partial(copied_late, marks=marks))
    with pretended(), Engine(store, device="cuda") as engine:
        run = engine._loop.runner.run
        monkeypatch.setattr(engine._loop.runner, "run", lambda works: passes.append(len(works)) or run(works))
        first = engine.stream("abc", module=None, temperature=0, max_new_tokens=8)
        next(first)
        other = engine.submit("abc", module="lora", temperature=0, max_new_tokens=2)
        for _ in first:
            assert not any(mark.query() for mark in marks[1:])
        while engine.step():
            pass
    assert max(passes) == 1
    with Engine(store) as engine:
        assert engine.generate("abc", module="lora", temperature=0, max_new_tokens=2).tokens == other.answer.tokens


def test_each_device_waits_by_a_stream_of_its_own():
    asked: list[object] = []

    class Mark:
        def query(self) -> bool:
            return False

        def wait(self, stream: object) -> None:
            asked.append(stream)

    marks = [Mark(), Mark()]
    assert not Arrival([(0, marks[0]), (2, marks[1])], lambda: "of the second device").wait(1)
    assert asked == ["of the second device"]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 3)), max_size=12),
    st.sampled_from([1, 60, 1 << 20]),
)
def test_pieces_are_all_bytes_in_the_order_in_which_they_are_read(drawn, least):
    buffer, tensors, stages, at = torch.zeros(2000, dtype=torch.uint8), {}, {}, 0
    for number, (size, stage) in enumerate(drawn):
        tensors[str(number)], stages[str(number)] = buffer[at : at + size], stage
        at += size + number % 3 * 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("growlm.engine.arrival._PIECE", least)
        pieces = pieces_of(tensors, buffer.data_ptr(), stages.__getitem__)
    assert pieces[0].stage is None
    begins = [piece.stage for piece in pieces[1:]]
    assert begins == sorted(set(begins))
    for name, tensor in tensors.items():
        start = tensor.data_ptr() - buffer.data_ptr()
        within = [p for p in pieces if any(a <= start and start + tensor.numel() <= b for a, b in p.places)]
        if tensor.numel():
            stage = stages[name]
            assert any(p.stage is None or (stage is not None and p.stage <= stage) for p in within)
