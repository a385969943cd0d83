"""A store that changes on the disk while an engine serves it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from growlm.engine import AUTO, Engine
from growlm.engine.reloading import Changes
from growlm.errors import BudgetError, ConfigError, UnknownModuleError
from growlm.router import NONE, load_router
from growlm.store import Store
from stores import add_module, domain_text, greedy, make_store, with_pass, with_texts

SHAPES = {"letters": {"kind": "lora", "r": 4}, "digits": {"placement": "interleaved", "vocabulary": "both"}}
SIGNS = {"kind": "lora+recall", "r": 4}
TEXT = domain_text("signs", 77)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path) -> Store:
    make_store(tmp_path, "llama", SHAPES)
    return Store.open(tmp_path / "store")


def unending(store: Store, **options: Any) -> Engine:
    """An engine whose answers are as long as they may be."""
    engine = Engine(store, **options)
    engine._loop.writer.end_tokens = set()
    return engine


def learn(store: Store, engine: Engine, name: str, seed: int) -> None:
    shape = SHAPES.get(name, SIGNS)
    add_module(store, engine.base, name, seed, domain=name, **shape)


def grow(store: Store, engine: Engine, many: int) -> None:
    """Each module makes the router larger."""
    for number in range(many):
        add_module(store, engine.base, f"more{number}", number, domain="signs", kind="lora", r=4)


def alone(engine: Engine, name: str, prompt: str, tokens: int) -> list[int]:
    return greedy(engine.base, [engine.store.load(name, engine.base)], engine.tokenizer.encode(prompt), tokens)


def test_modules_that_come_change_and_go_are_served_as_they_are(store):
    with Engine(store) as engine:
        assert (engine.outdated, engine.reload()) == (False, Changes())
        learn(store, engine, "signs", 5)
        assert engine.outdated
        assert engine.generate(TEXT, max_new_tokens=1).module != "signs"
        assert engine.reload() == Changes(added=["signs"])
        assert not engine.outdated
        answer = engine.generate(TEXT, max_new_tokens=6)
        assert (answer.module, answer.tokens) == ("signs", alone(engine, "signs", TEXT, 6))
        learn(store, engine, "signs", 6)
        assert engine.generate(TEXT, module="signs", max_new_tokens=6).tokens == answer.tokens  # as it is in memory
        assert engine.reload() == Changes(updated=["signs"])
        now = engine.generate(TEXT, max_new_tokens=6)
        assert now.tokens == alone(engine, "signs", TEXT, 6) != answer.tokens
        store.remove("signs")
        assert engine.reload() == Changes(removed=["signs"])
        assert "signs" not in engine.modules.resident
        assert "signs" not in engine.generate(TEXT, max_new_tokens=1).scores


def test_a_module_that_was_removed_and_learned_anew_is_another_though_its_version_is_the_same(store):
    with Engine(store) as engine:
        before = engine.generate(TEXT, module="letters", max_new_tokens=6).tokens
        store.remove("letters")
        learn(store, engine, "letters", 99)
        assert store.module("letters").version == 1
        assert engine.reload() == Changes(updated=["letters"])
        assert engine.generate(TEXT, module="letters", max_new_tokens=6).tokens != before


def test_what_is_being_answered_ends_on_the_version_that_it_began_with(store):
    with unending(store) as engine:
        before = alone(engine, "letters", TEXT, 40)
        stream = engine.stream(TEXT, module="letters", max_new_tokens=40)
        next(stream)
        learn(store, engine, "letters", 9)
        engine.reload()
        both = engine.modules.resident_bytes
        now = engine.generate(TEXT, module="letters", max_new_tokens=8)
        assert engine.modules.resident_bytes == both + store.module("letters").bytes
        assert now.tokens == alone(engine, "letters", TEXT, 8) != before[:8]
        *_, ended = stream
        assert ended.tokens == before
        assert engine.modules.resident_bytes == store.module("letters").bytes


def test_where_there_is_room_for_one_version_the_next_waits_until_the_old_one_is_let_go_of(store):
    with Engine(store) as engine:
        weights = engine.fixed_bytes + store.module("digits").bytes
    memory = with_texts(store, weights, texts=2, tokens=128) + 4096
    with unending(store, memory=memory) as engine:
        before, most = alone(engine, "digits", TEXT, 12), 0
        stream = engine.stream(TEXT, module="digits", max_new_tokens=12)
        next(stream)
        learn(store, engine, "digits", 9)
        engine.reload()
        second = engine.submit(TEXT, module="digits", max_new_tokens=12)
        while second.result is None:
            engine.step()
            assert second.error is None
            most = max(most, engine.used_bytes)
        *_, ended = stream
        assert most <= memory
        assert ended.tokens == before
        assert second.result.tokens == alone(engine, "digits", TEXT, 12) != before


def test_what_is_pinned_stays_pinned_in_the_version_that_is_current(store):
    with Engine(store, idle=0) as engine:
        engine.pin("letters")
        learn(store, engine, "letters", 9)
        engine.reload()
        engine.generate(TEXT, module="letters", max_new_tokens=1)
        for _ in range(3):
            engine.step()
        assert (engine.modules.resident, engine.modules.kept) == (["letters"], ["letters"])
        assert engine.modules.resident_version("letters").version == 2


def test_a_router_that_has_grown_counts_and_evicts_what_is_not_in_use(store):
    with Engine(store) as engine:
        weights = engine.fixed_bytes + sum(stored.bytes for stored in store.modules.values())
    memory = with_texts(store, weights)
    with Engine(store, memory=memory, prefix_bytes=0) as engine:
        for name in SHAPES:
            engine.generate(TEXT, module=name, max_new_tokens=1)
        assert set(engine.modules.resident) == set(SHAPES)
        fixed = engine.fixed_bytes
        grow(store, engine, 40)
        engine.reload()
        assert engine.fixed_bytes > fixed
        assert engine.used_bytes <= memory
        assert len(engine.router.names) == 42
        for name in (*SHAPES, AUTO):
            engine.generate(TEXT, module=name, max_new_tokens=1)
            assert engine.used_bytes <= memory


def test_a_router_for_which_there_is_no_room_is_told_and_the_old_one_goes_on(store):
    with Engine(store) as engine:
        weights = engine.fixed_bytes + sum(stored.bytes for stored in store.modules.values())
    with Engine(store, memory=with_pass(store, weights) + 1024, prefix_bytes=0) as engine:
        for name in SHAPES:
            engine.pin(name)
        grow(store, engine, 60)
        with pytest.raises(BudgetError, match=r"its router takes .*: raise --memory by at least"):
            engine.reload()
        assert len(engine.router.names) == 2
        assert engine.used_bytes <= engine.memory
        assert engine.outdated
        engine.unpin("digits")
        engine.reload()
        assert len(engine.router.names) == 62
        assert engine.used_bytes <= engine.memory


def test_a_router_for_which_there_is_room_once_an_answer_has_ended_waits_for_it(store, monkeypatch):
    with Engine(store) as engine:
        weights = engine.fixed_bytes + store.module("letters").bytes
        length = len(engine.tokenizer.encode(TEXT)) + 30
    memory = with_texts(store, weights, tokens=length) + 1024
    with unending(store, memory=memory, prefix_bytes=0) as engine:
        engine.pin("letters")
        stream = engine.stream(TEXT, module="letters", max_new_tokens=30)
        next(stream)
        grow(store, engine, 160)
        thread = threading.Thread(target=engine.reload)
        used: list[int] = []
        step = engine._loop._step

        def noting() -> None:
            step()  # with all that the answer may come to
            used.append(engine.resident_bytes + engine.workspace_bytes + engine._account.held_bytes)

        monkeypatch.setattr(engine._loop, "_step", noting)
        thread.start()
        while not (engine._loop._attempts or len(engine.router.names) > 2):  # till the router has been read
            time.sleep(0.001)
        *_, ended = stream
        thread.join(60)
        assert len(ended.tokens) == 30
        assert max(used) <= memory
        assert len(engine.router.names) == 162
        assert engine.used_bytes <= memory


def test_a_router_chooses_among_modules_as_if_there_were_no_others(store):
    with Engine(store) as engine:
        learn(store, engine, "signs", 5)
        engine.reload()
        text, among = domain_text("digits", 3), ["letters", "signs"]
        assert engine.route(text).module == "digits"
        found = engine.route(text, among=among)
        assert set(found.scores) == {"letters", "signs", NONE}
        other = load_router(store, frozenset(among)).bind(engine.base)
        hidden, visible = other.states(engine.base, [engine.tokenizer.encode(text)])
        (expected,) = other.route(hidden, visible, [engine.tokenizer.encode(text)])
        assert found.module == expected.module
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)
        answer = engine.generate(text, among=["digits"], max_new_tokens=2)
        assert (answer.module, set(answer.scores)) == ("digits", {"digits", NONE})
        assert engine.generate(text, among=[], max_new_tokens=2).module is None
        fixed = engine.fixed_bytes
        engine.generate(text, among=[*among, "digits"], max_new_tokens=2)
        assert engine.fixed_bytes > fixed
        store.remove("signs")
        engine.reload()  # those of modules that are gone as well
        assert set(engine.route(text, among=["letters"]).scores) == {"letters", NONE}
        assert len(engine._routing.among) == 6
        engine.reload()
        assert len(engine._routing.among) == 2  # those that nobody has asked for in between are let go of
        for wrong, error, told in (
            (["nosuch"], UnknownModuleError, "no module 'nosuch'"),
            ("letters", ConfigError, "give a list of modules"),
        ):
            with pytest.raises(error, match=told):
                engine.route(text, among=wrong)


def test_a_router_is_read_once_for_many_threads(store, monkeypatch):
    with Engine(store) as engine:
        read: list[int] = []
        loaded = engine._routing.loaded

        def noting(among):
            read.append(1)
            time.sleep(0.05)
            return loaded(among)

        monkeypatch.setattr(engine._routing, "loaded", noting)
        threads = [threading.Thread(target=lambda: engine.route(TEXT, among=["letters"])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(read) == 1


def test_a_store_that_is_gone_is_told(store, tmp_path: Path):
    with Engine(store) as engine:
        assert engine.generate(TEXT, module="letters", max_new_tokens=1)
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        with pytest.raises(UnknownModuleError, match="no module 'letters'"):
            engine.generate(TEXT, module="letters", max_new_tokens=1)
        (tmp_path / "elsewhere").rename(tmp_path / "store")


def test_a_reload_under_load_waits_for_nobody_where_nothing_has_grown(store):
    """Those that wait for their module, with what the base has read for them, can read it again."""
    with Engine(store) as engine:
        weights = engine.fixed_bytes + store.module("letters").bytes
    memory = with_texts(store, weights, texts=3, tokens=200)
    with unending(store, memory=memory, max_batch=4, prefix_bytes=0) as engine:
        first = engine.stream(TEXT, module="letters", max_new_tokens=100)
        next(first)
        waiting = [engine.submit(domain_text("digits", n), max_new_tokens=100) for n in range(4)]
        for _ in range(3):
            engine.step()
        written = len(first.gi_frame.f_locals["request"].answer.tokens)
        assert engine.reload() == Changes()
        assert len(first.gi_frame.f_locals["request"].answer.tokens) <= written + 2
        *_, ended = first
        assert len(ended.tokens) == 100
        while not all(request.result or request.error for request in waiting):
            engine.step()
            assert engine.used_bytes <= memory
        assert not any(request.error for request in waiting)


def test_a_module_that_goes_while_others_wait_for_it_keeps_nobody_from_reloading(store):
    with Engine(store) as engine:
        weights = engine.fixed_bytes + store.module("letters").bytes
    memory = with_texts(store, weights, texts=1, tokens=200)
    with unending(store, memory=memory, prefix_bytes=0) as engine:
        first = engine.stream(TEXT, module="letters", max_new_tokens=100)
        next(first)
        waits = engine.submit(TEXT, module="digits", max_new_tokens=4)
        engine.step()
        store.remove("digits")
        assert engine.reload() == Changes(removed=["digits"])
        assert engine.router.names == ["letters"]
        *_, ended = first
        assert len(ended.tokens) == 100
        while waits.error is None:
            engine.step()
        assert isinstance(waits.error, UnknownModuleError)


def test_a_router_that_cannot_be_read_leaves_all_as_it_was(store, monkeypatch):
    with Engine(store) as engine:
        learn(store, engine, "signs", 5)
        before = engine.router
        monkeypatch.setattr(engine.modules, "set_budget", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.reload()
        assert engine.router is before
        assert engine.outdated
        monkeypatch.undo()
        assert engine.reload() == Changes(added=["signs"])


def test_choices_of_one_request_have_one_version(store):
    with unending(store, max_batch=1) as engine:
        first, second = engine.submit_several(TEXT, 2, module="letters", max_new_tokens=10)
        while not first.answer.tokens:
            engine.step()
        learn(store, engine, "letters", 9)
        engine.reload()
        while not (first.result and second.result):
            engine.step()
        assert first.result.tokens == second.result.tokens
        assert engine.modules.resident_bytes == 0  # nobody has asked for the next version
        assert engine.generate(TEXT, module="letters", max_new_tokens=10).tokens != first.result.tokens


def test_what_is_pinned_is_read_anew_and_what_is_gone_is_pinned_no_more(store):
    with Engine(store) as engine:
        for name in SHAPES:
            engine.pin(name)
        learn(store, engine, "letters", 9)
        store.remove("digits")
        engine.reload()
        assert engine.modules.kept == ["letters"]
        assert engine.modules.resident_version("letters").version == 2
        assert "digits" not in engine.modules.resident
        learn(store, engine, "digits", 3)
        engine.reload()
        assert engine.modules.kept == ["letters"]
