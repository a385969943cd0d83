"""The engine's loop: whoever loads, fails, hangs, leaves or comes, the others' answers are what each alone gets."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from disk import flip
from drills import WholePasses, changing, nothing_is_left
from growlm.engine import AUTO, Engine, Generation, fetching
from growlm.engine.answers import Answer
from growlm.engine.request import State
from growlm.engine.runner import Runner
from growlm.engine.scheduler import PATIENCE
from growlm.engine.second_look import AT_A_TIME
from growlm.engine.workspace import row_bytes
from growlm.errors import ClosedError, GrowlmError, IntegrityError, UnknownModuleError
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.store import Store
from stores import Watch, add_module, domain_text, greedy, make_store, with_texts

SHAPES = {
    "letters": {"kind": "lora", "r": 4},
    "digits": {"placement": "interleaved", "vocabulary": "both"},
    "signs": {"kind": "lora+recall", "r": 4},
}
PROMPTS = ["abc de", domain_text("digits", 7), "x", domain_text("letters", 3, words=30), "<= >> def add("]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, "llama", SHAPES)
    return home


@pytest.fixture
def engine(made):
    with Engine(Store.open(made / "store")) as opened:
        yield opened


def expected(engine: Engine, name: str | None, prompt: str, tokens: int) -> list[int]:
    modules = [] if name is None else [engine.store.load(name, engine.base)]
    return greedy(engine.base, modules, engine.tokenizer.encode(prompt), tokens)


class Gate:
    """Holds up the reading of one module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.opened, self.waiting = threading.Event(), threading.Event()
        load = Store.load

        def held_up(store: Store, wanted: str, *arguments, **options) -> KnowledgeModule:
            if wanted == name:
                self.waiting.set()
                assert self.opened.wait(60)
            return load(store, wanted, *arguments, **options)

        monkeypatch.setattr(Store, "load", held_up)


# Loading


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_module_that_is_removed_while_it_is_read_is_unknown_and_not_damaged(home, monkeypatch, comes_back):
    store = Store.open(home / "store")

    def removed(*arguments: object, **named: object) -> None:
        store.remove("signs")
        if comes_back:
            add_module(store, base, "signs", 9, **SHAPES["signs"])
        raise IntegrityError("a file is missing")

    base = store.load_base()
    with Engine(store) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "load", removed)
            with pytest.raises(UnknownModuleError, match="'signs' was removed while it was read"):
                engine.generate("abc", module="signs", max_new_tokens=1)
        if comes_back:
            assert engine.generate("abc", module="signs", max_new_tokens=1).module == "signs"


def test_a_module_that_is_read_holds_up_nobody(engine, monkeypatch):
    wanted = {name: expected(engine, name, PROMPTS[0], 20) for name in ("letters", "digits")}
    engine.generate("x", module="letters", max_new_tokens=1)
    gate = Gate(monkeypatch, "digits")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(engine.generate, PROMPTS[0], module="digits", max_new_tokens=20)
        assert gate.waiting.wait(60)
        for _ in range(3):
            assert engine.generate(PROMPTS[0], module="letters", max_new_tokens=20).tokens == wanted["letters"]
        assert not slow.done()
        gate.opened.set()
        assert slow.result(60).tokens == wanted["digits"]
    nothing_is_left(engine)


def test_the_base_reads_the_prompt_while_the_module_is_read(tmp_path, monkeypatch):
    """Up to where the module branches off; nothing of it is done again."""
    store = make_store(tmp_path, "llama", {"digits": {"placement": "top"}})
    with Engine(store) as engine:
        wanted = expected(engine, "digits", PROMPTS[3], 4)
        gate, read = Gate(monkeypatch, "digits"), []
        run = Runner.run

        def watched(self, works):
            read.extend((len(work.ids), work.enters, work.leaves) for work in works)
            run(self, works)
            if read[-1][2] is not None:
                gate.opened.set()

        monkeypatch.setattr(Runner, "run", watched)
        assert engine.generate(PROMPTS[3], module="digits", max_new_tokens=4).tokens == wanted
        tokens, depth = len(engine.tokenizer.encode(PROMPTS[3])), engine.base.num_layers
        assert read == [(tokens, 0, depth), (tokens, depth, None), *[(1, 0, None)] * 3]


def test_others_are_read_while_one_module_hangs_and_a_closed_engine_does_not_wait_for_it(made, monkeypatch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    monkeypatch.setattr(fetching, "_CLOSING", 0.1)
    gate = Gate(monkeypatch, "digits")
    engine = Engine(Store.open(made / "store"))
    hangs = engine.submit("abc", module="digits", max_new_tokens=2)
    engine.step()
    assert gate.waiting.wait(60)
    wanted = expected(engine, "letters", PROMPTS[1], 5)
    assert engine.generate(PROMPTS[1], module="letters", max_new_tokens=5).tokens == wanted
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 30
    assert isinstance(hangs.error, ClosedError)
    gate.opened.set()


def test_those_whose_module_hangs_keep_no_place_and_are_answered_in_the_end(made, monkeypatch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    gate = Gate(monkeypatch, "digits")
    with Engine(Store.open(made / "store"), max_batch=2) as engine, ThreadPoolExecutor() as threads:
        wanted = {name: expected(engine, name, PROMPTS[1], 5) for name in (None, "letters")}
        held_up = [engine.submit(PROMPTS[1], module="digits", max_new_tokens=5) for _ in range(3)]
        logits = threads.submit(engine.logits, torch.tensor([[5, 6]]), "digits")
        for _ in range(PATIENCE):  # as many as one that waits lets pass
            for name, tokens in wanted.items():
                assert engine.generate(PROMPTS[1], module=name, max_new_tokens=5).tokens == tokens
        assert engine.logits(torch.tensor([[5, 6]]), "letters").shape[:2] == (1, 2)
        assert not logits.done()
        assert all(request.state is State.WAITING for request in held_up)
        gate.opened.set()
        assert logits.result(60).shape[:2] == (1, 2)
        while engine.step():
            pass
        tokens = expected(engine, "digits", PROMPTS[1], 5)
        assert [request.result.tokens for request in held_up] == [tokens] * 3
        nothing_is_left(engine)


def test_an_error_after_a_module_has_hung_ends_its_requests(engine, monkeypatch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    reads: list[str] = []

    def fails(store: Store, name: str, *arguments, **options) -> KnowledgeModule:
        reads.append(name)
        time.sleep(0.5)
        raise IntegrityError("the disk is gone")

    monkeypatch.setattr(Store, "load", fails)
    asked = [engine.submit("abc", module="digits", max_new_tokens=2) for _ in range(2)]
    while engine.step():
        pass
    assert [str(request.error) for request in asked] == ["the disk is gone"] * 2
    assert reads == ["digits"]
    nothing_is_left(engine)


def test_a_module_that_is_read_slowly_is_read_once_however_short_modules_may_be_idle(made, monkeypatch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    gate = Gate(monkeypatch, "signs")
    threading.Timer(0.5, gate.opened.set).start()
    with Engine(Store.open(made / "store"), idle=0) as engine:
        asked = engine.submit("abc", module=["letters", "signs"], max_new_tokens=3)
        while engine.step():
            pass
        assert asked.error is None
        assert engine.modules.counts.loads == 2
        nothing_is_left(engine)


@pytest.mark.parametrize("max_batch", [1, 2])
def test_prompts_that_are_routed_to_a_module_that_hangs_hold_up_no_others(made, monkeypatch, max_batch):
    monkeypatch.setattr(fetching, "HANGS", 0.05)
    gate = Gate(monkeypatch, "digits")
    store = Store.open(made / "store")
    wanted = greedy(store.load_base(), [], store.load_tokenizer().encode("abc"), 20)
    with Engine(store) as opened:
        fixed = opened.fixed_bytes
    memory = with_texts(store, fixed + max(one.bytes for one in store.modules.values()), texts=1, tokens=256)
    with Engine(store, memory=memory, max_batch=max_batch) as engine:
        held_up = [engine.submit("abc", module="digits", max_new_tokens=3)]
        while not engine.modules.hanging():
            engine.step()
        held_up += [engine.submit(domain_text("digits", 990 + n), max_new_tokens=3) for n in range(3)]
        answer = engine.generate("abc", module=None, max_new_tokens=20)
        assert answer.tokens == wanted
        for _ in range(50):
            engine.step()
        assert [request.names for request in held_up] == [("digits",)] * 4
        assert {request.state for request in held_up} == {State.WAITING}
        assert engine._account.held_bytes == 0
        gate.opened.set()
        while engine.step():
            pass
        assert [len(request.result.tokens) for request in held_up] == [3] * 4
        nothing_is_left(engine)


def test_whoever_is_interrupted_while_one_answer_goes_on_ends_what_was_read_with_it(engine, monkeypatch):
    asked = [engine.submit(prompt, module=None, max_new_tokens=8) for prompt in PROMPTS[:3]]
    while not all(request.answer.tokens for request in asked):
        engine.step()
    add, calls = Answer.add, []

    def interrupted(self: Answer, token: int) -> bool:
        calls.append(token)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(self, token)

    monkeypatch.setattr(Answer, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while engine.step():
        pass
    assert [request.state for request in asked] == [State.FINISHED] * 3
    assert [request.error is None for request in asked] == [True, False, False]
    nothing_is_left(engine)


def test_a_request_whose_module_hangs_can_leave(engine, monkeypatch):
    gate = Gate(monkeypatch, "digits")
    stream = engine.stream("abc", module="digits", max_new_tokens=5)
    ended: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except ClosedError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert gate.waiting.wait(60)
    answer = engine.generate("abc", module=None, max_new_tokens=5)
    assert answer.tokens == expected(engine, None, "abc", 5)
    gate_opens = threading.Timer(0.2, gate.opened.set)
    gate_opens.start()
    engine.close()
    reader.join(60)
    assert len(ended) == 1


def test_a_module_that_cannot_be_read_fails_its_own_requests_alone(home):
    store = Store.open(home / "store")
    path = store.module("digits").folder / "module.safetensors"
    content = path.read_bytes()
    with Engine(store) as engine:
        wanted = expected(engine, "letters", PROMPTS[1], 12)
        flip(path)
        stream = engine.stream(PROMPTS[1], module="letters", max_new_tokens=12)
        pieces = [next(stream)]
        for ask in (
            lambda: engine.generate("abc", module="digits"),
            lambda: list(engine.stream("abc", module="digits")),
            lambda: engine.generate_many(["abc", "de"], modules=["signs", "digits"], max_new_tokens=2),
        ):
            with pytest.raises(IntegrityError, match="digits"):
                ask()
        *_, last = [*pieces, *stream]
        assert isinstance(last, Generation)
        assert last.tokens == wanted
        path.write_bytes(content)
        assert engine.generate("abc", module="digits", max_new_tokens=3).tokens == expected(engine, "digits", "abc", 3)
        nothing_is_left(engine)


@pytest.mark.parametrize("more", [None, 0, 20_000, 10**8])
def test_adapters_side_by_side_take_no_more_than_there_is(tmp_path, more):
    """Several modules of kind lora in one pass: they are copied where there is room, and answer as each alone."""
    store, names = make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 2}}), ["letters", "b", "c", "d"]
    for number, name in enumerate(names[1:]):
        add_module(store, store.load_base(), name, number, domain="digits", kind="lora", r=3 + number)
    with Engine(store) as engine:
        weights = engine.fixed_bytes + sum(stored.bytes for stored in store.modules.values())
    memory = None if more is None else with_texts(store, weights, texts=8) + more
    with Engine(store, memory=memory, prefix_bytes=0) as engine:
        asked = [(name, prompt) for name in names for prompt in PROMPTS[:2]]
        requests = [engine.submit(prompt, module=name, max_new_tokens=9) for name, prompt in asked]
        most = 0
        while engine.step():
            assert memory is None or engine.used_bytes <= memory
            most = max(most, engine._slabs.num_bytes())
        assert most or more == 0
        assert engine._slabs.num_bytes() == 0
        for (name, prompt), request in zip(asked, requests, strict=True):
            assert request.result.tokens == expected(engine, name, prompt, 9)


def test_a_pass_that_fails_fails_what_was_in_it_and_the_next_one_runs(engine, monkeypatch):
    run = Runner.run

    def broken(self, works):
        if len(works) == 2:
            raise RuntimeError("out of memory")
        run(self, works)

    monkeypatch.setattr(Runner, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate_many(["abc", "de"], modules=None, max_new_tokens=3)
    assert engine.generate("abc", module=None, max_new_tokens=3).tokens == expected(engine, None, "abc", 3)
    nothing_is_left(engine)


def test_an_answer_that_cannot_be_drawn_fails_alone(engine, monkeypatch):
    finish = ModuleSet.finish

    def broken(self, plain, normed, contexts=None):
        logits = finish(self, plain, normed, contexts)
        return logits if self.modules else logits * torch.nan

    wanted = expected(engine, "letters", "abc", 4)
    monkeypatch.setattr(ModuleSet, "finish", broken)
    good = engine.submit("abc", module="letters", max_new_tokens=4)
    bad = engine.submit("abc", module=None, max_new_tokens=4, temperature=1.0)
    while engine.step():
        pass
    assert isinstance(bad.error, RuntimeError)
    assert good.result is not None
    assert good.result.tokens == wanted
    nothing_is_left(engine)


def test_whoever_leaves_in_the_middle_of_a_step_does_not_wait_for_it(engine, monkeypatch):
    """As when a stream that nobody holds is collected while its own thread makes a step."""
    other = engine.submit("abc", module="letters", max_new_tokens=50)
    run = Runner.run

    def leaving(self, works):
        run(self, works)
        engine.cancel(other)

    monkeypatch.setattr(Runner, "run", leaving)
    answer = engine.generate("abc", module=None, max_new_tokens=3)
    assert answer.tokens == expected(engine, None, "abc", 3)
    assert other.result is None
    nothing_is_left(engine)


# Coming and going


def test_a_short_prompt_is_through_while_a_long_one_is_read(tmp_path):
    store = make_store(tmp_path, "llama", SHAPES, max_position_embeddings=4096)
    with Engine(store) as engine:
        engine.generate("abc", module="signs", max_new_tokens=1)
        long = [5 + n % 200 for n in range(4000)]
        begun = engine.stream(long, module="letters", max_new_tokens=1)
        done: list[str] = []
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(lambda: [list(begun), done.append("long")])
            while not engine._loop.scheduler.active:
                time.sleep(0.001)
            for _ in range(3):
                engine.generate("abc", module="signs", max_new_tokens=2)
                done.append("short")
            slow.result(60)
        assert done == ["short", "short", "short", "long"]


def test_an_engine_that_is_closed_ends_its_answers_and_refuses_others(made):
    engine = Engine(Store.open(made / "store"))
    wanted = expected(engine, "letters", PROMPTS[1], 30)
    stream = engine.stream(PROMPTS[0], module="digits", max_new_tokens=30)
    next(stream)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(engine.generate, PROMPTS[1], module="letters", max_new_tokens=30)
        while not any(r.answer.tokens for r in engine._loop.scheduler.active if r.names == ("letters",)):
            time.sleep(0.001)
        engine.close()
        assert asked.result(60).tokens == wanted
    with pytest.raises(ClosedError):
        next(stream)
    with pytest.raises(ClosedError):
        engine.generate("abc")


def test_logits_and_routes_are_there_while_a_stream_is_read(engine):
    stream = engine.stream(PROMPTS[0], module="digits", max_new_tokens=12)
    first = next(stream)
    ids = torch.tensor([engine.tokenizer.encode("abc de")])
    logits = engine.logits(ids, module="letters")
    torch.testing.assert_close(
        logits, ModuleSet(engine.base, [engine.store.load("letters", engine.base)]).logits(ids), rtol=1e-4, atol=1e-5
    )
    assert engine.route(domain_text("digits", 990)).module == "digits"
    *_, last = [first, *stream]
    assert last.tokens == expected(engine, "digits", PROMPTS[0], 12)


# The drill


@pytest.mark.parametrize("second_look", [False, True])
def test_whatever_comes_goes_or_changes_every_answer_is_that_of_a_request_alone(home, monkeypatch, second_look):
    """Requests of four threads, some of which leave early, while modules are updated and removed."""
    requests = int(os.environ.get("GROWLM_DRILL", "150"))
    store = Store.open(home / "store")
    base = store.load_base()
    sizes = [stored.bytes for stored in store.modules.values()]
    with Engine(store) as engine:
        weights = engine.fixed_bytes + max(sizes) + sorted(sizes)[-2]
    memory = with_texts(store, weights, texts=3, tokens=256) + 2 * AT_A_TIME * row_bytes(base)
    answers: list[tuple[str, Generation]] = []
    refused: list[GrowlmError] = []
    with Engine(store, memory=memory, max_batch=6, second_look=second_look) as engine:
        engine._loop.writer.end_tokens = set()
        watch, most = Watch(monkeypatch), 0

        def ask(number: int) -> None:
            draw = random.Random(number)
            prompt, tokens = draw.choice(PROMPTS), draw.randint(1, 12)
            name = draw.choice([*SHAPES, None, AUTO])
            try:
                if draw.random() < 0.3:
                    stream = engine.stream(prompt, module=name, max_new_tokens=tokens)
                    for _ in range(draw.randint(0, 3)):
                        next(stream, None)
                    stream.close()
                else:
                    answers.append((prompt, engine.generate(prompt, module=name, max_new_tokens=tokens)))
            except (UnknownModuleError, IntegrityError) as error:
                refused.append(error)

        with changing(store, base, engine, SHAPES, requests) as versions, ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(ask, number) for number in range(requests)]:
                done.result(300)
                most = max(most, engine.used_bytes)
        nothing_is_left(engine)
        assert most <= memory
        assert watch.loads
    assert len(answers) > requests // 3
    passes = {name: [WholePasses(base, [module]) for module in each] for name, each in versions.items()}
    ties, alone = 0, [WholePasses(base, [])]
    for prompt, answer in answers:
        ids = engine.tokenizer.encode(prompt)
        tried = alone if answer.module is None else passes[answer.module]
        found = [one.apart(ids, answer.tokens) for one in tried]
        assert any(one is not None for one in found), (prompt, answer)
        ties += 0 not in found
    print(
        f"{len(answers)} answers, {ties} that differ at a tie, {len(refused)} refused, at most {most} of {memory} bytes"
    )
    assert ties <= max(len(answers) // 50, 1)
