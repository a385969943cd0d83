"""Several modules active for one request, through the engine: equal to the set itself, whatever the order, the batch
and the budget; and what is taken out leaves the rest as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from growlm import router
from growlm.engine import Engine, SamplingConfig
from growlm.engine.chat import Chat
from growlm.engine.kv import BLOCK
from growlm.engine.request import Request
from growlm.engine.runner import Runner
from growlm.errors import BudgetError, ConfigError, UnknownModuleError
from growlm.modules import ModuleSet
from growlm.store import Store
from stores import Watch, add_experts, add_module, domain_ids, greedy, save_lively_base, with_texts
from tiny import random_ids

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["abc de", "01 02 23 34 41 02", "x", "<= >> def add("]
BOTH = ("digits", "letters")
TOKENS = 10
SHAPES: dict[str, dict[str, Any]] = {
    "letters": {"vocabulary": "head", "first_layer": 1},
    "digits": {"vocabulary": "none", "first_layer": 2},
    "signs": {"vocabulary": "both"},
}


@pytest.fixture(scope="module", params=["llama", "growlm"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three modules of experts and one of blocks."""
    home = tmp_path_factory.mktemp("made")
    store = Store.create(home / "store", save_lively_base(home / "base", request.param))
    base = store.load_base()
    for seed, (name, config) in enumerate(SHAPES.items(), start=1):
        add_experts(store, base, name, seed, **config)
    if request.param == "llama":
        add_module(store, base, "other", 9)
    texts = domain_ids(store.load_tokenizer(), "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    return home


@pytest.fixture
def engine(made: Path):
    with Engine(Store.open(made / "store")) as engine:
        yield engine


def expected(engine: Engine, names: tuple[str, ...], prompt: str, tokens: int = TOKENS) -> list[int]:
    modules = [engine.store.load(name, engine.base) for name in names]
    return greedy(engine.base, modules, engine.tokenizer.encode(prompt), tokens)


def sizes(store: Store) -> dict[str, int]:
    return {name: module.bytes for name, module in store.modules.items()}


@pytest.mark.slow
def test_an_answer_is_that_of_the_set(engine: Engine) -> None:
    answers = set()
    for names in [BOTH, ("letters", "signs"), ("digits", "letters", "signs")]:
        for prompt in PROMPTS:
            found = engine.generate(prompt, module=names, max_new_tokens=TOKENS)
            assert found.tokens == expected(engine, names, prompt)
            assert (found.module, found.modules) == ("+".join(names), list(names))
            answers.add(tuple(found.tokens))
    alone = {tuple(engine.generate(p, module=n, max_new_tokens=TOKENS).tokens) for n in SHAPES for p in PROMPTS}
    assert len(answers - alone) > 2  # they are not those of one module


def test_the_order_and_the_number_of_times_do_not_matter(engine: Engine) -> None:
    ids = random_ids(2, 9)
    wanted = engine.logits(ids, BOTH)
    for names in [["letters", "digits"], ["digits", "letters", "digits"]]:
        assert torch.equal(engine.logits(ids, names), wanted)
        assert engine.generate("abc", module=names, max_new_tokens=2).modules == list(BOTH)
    loaded = [engine.store.load(name, engine.base) for name in BOTH]
    assert torch.equal(ModuleSet(engine.base, loaded).logits(ids), wanted)
    assert torch.equal(ModuleSet(engine.base, loaded[::-1]).logits(ids), wanted)
    assert torch.equal(engine.logits(ids, ["letters"]), engine.logits(ids, "letters"))


def test_many_prompts_under_mixed_sets_are_answered_as_each_alone(engine: Engine) -> None:
    wanted = [BOTH, "letters", None, ["letters", "digits"], ("letters", "signs"), "auto", ["digits", "signs"], "digits"]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(wanted))]
    alone = [engine.generate(p, module=m, max_new_tokens=TOKENS) for p, m in zip(prompts, wanted, strict=True)]
    together = engine.generate_many(prompts, modules=wanted, max_new_tokens=TOKENS)
    assert [(g.text, g.modules) for g in together] == [(g.text, g.modules) for g in alone]
    assert together[0].modules == together[3].modules == list(BOTH)


def test_a_stream_is_the_answer(engine: Engine) -> None:
    *pieces, last = engine.stream("abc de", module=["letters", "digits"], max_new_tokens=TOKENS)
    assert "".join(pieces) == last.text
    assert last.modules == list(BOTH)


def test_one_that_is_removed_leaves_the_rest_bit_for_bit(home: Path) -> None:
    store = Store.open(home / "store")
    ids = random_ids(2, 11)
    kept = [None, "letters", "signs", ("letters", "signs")]
    with Engine(store) as engine:
        before = [engine.logits(ids, m) for m in kept]
        three = engine.logits(ids, ("digits", "letters", "signs"))
        assert not torch.equal(three, before[-1])
        assert all(torch.equal(engine.logits(ids, m), b) for m, b in zip(kept, before, strict=True))
    store.remove("digits")
    with Engine(store) as engine:
        assert all(torch.equal(engine.logits(ids, m), b) for m, b in zip(kept, before, strict=True))
        with pytest.raises(UnknownModuleError, match="no module 'digits'"):
            engine.generate("abc", module=("digits", "letters"))


# Memory


def test_the_budget_counts_each_module_once_and_is_never_passed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(home / "store")
    size = sizes(store)
    with Engine(store) as engine:
        fixed = engine.fixed_bytes
    both = size["letters"] + size["signs"]
    watch = Watch(monkeypatch)
    with Engine(store, memory=with_texts(store, fixed + both)) as engine:
        for wanted in [("letters", "signs"), "digits", ["signs", "letters", "letters"], ["digits", "letters"]]:
            found = engine.generate("abc", module=wanted, max_new_tokens=3)
            assert engine.modules.resident_bytes >= sum(size[n] for n in found.modules)
            assert found.resident_bytes == engine.resident_bytes
            assert engine.used_bytes <= with_texts(store, fixed + both)
        # In one batch, what both groups need counts once.
        watch.loads.clear()
        engine.generate_many(["a", "b", "c"], modules=[("letters", "signs"), "signs", "letters"], max_new_tokens=2)
        assert len(watch.loads) <= 2
    assert watch.most <= with_texts(store, both)


def test_what_cannot_fit_together_is_refused_with_the_numbers(home: Path) -> None:
    store = Store.open(home / "store")
    size = sizes(store)
    with Engine(store) as engine:
        fixed = engine.fixed_bytes
    room = size["letters"]
    with Engine(store, memory=with_texts(store, fixed + room)) as engine:
        engine.generate("abc", module="letters", max_new_tokens=2)
        numbers = r"digits \S+ [kM]B, letters \S+ [kM]B, keys .* do not fit together: .* left .* raise --memory by"
        with pytest.raises(BudgetError, match=numbers):
            engine.generate("abc", module=BOTH, max_new_tokens=200)
        assert engine.modules.resident == ["letters"]  # nothing was read or evicted for it
        assert engine.generate("abc", module="letters", max_new_tokens=2).modules == ["letters"]


def test_modules_in_use_are_not_evicted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    run = Runner.run

    def dropping(*arguments: Any) -> None:
        for name in SHAPES:
            engine.modules.drop(name)
        seen.append(sorted(engine.modules.resident))
        run(*arguments)

    monkeypatch.setattr(Runner, "run", dropping)
    engine.generate("abc de", module="signs", max_new_tokens=1)
    engine.generate("abc de", module=BOTH, max_new_tokens=1)
    assert {tuple(names) for names in seen} == {("signs",), BOTH}


# Keys and values


def test_prefixes_are_those_of_the_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation under two modules continues what both read, and nothing of what either read alone."""
    sets: list[Any] = ["letters", "digits", BOTH, ("letters", "signs"), None]
    with Engine(Store.open(home / "store")) as engine:
        begun = (engine.tokenizer.encode("abc de 01 02") * BLOCK)[:BLOCK]
        said = [*begun, 40, 41, 42]
        with Engine(engine.store, prefix_bytes=0) as fresh:
            wanted = [fresh.generate(said, module=names, max_new_tokens=6).tokens for names in sets]
        for names in sets:
            engine.generate(begun, module=names, max_new_tokens=1)
        past: list[int] = []
        begin = Request.begin
        monkeypatch.setattr(Request, "begin", lambda *a: past.append(a[1]) or begin(*a))
        for names, tokens in zip(sets, wanted, strict=True):
            given = list(reversed(names)) if isinstance(names, tuple) else names
            assert engine.generate(said, module=given, max_new_tokens=6).tokens == tokens
    assert past == [BLOCK] * (len(sets) - 1) + [len(said) - 1]  # each had its own to continue
    assert len({tuple(tokens) for tokens in wanted}) > 2


def test_a_conversation_takes_several(engine: Engine) -> None:
    chat = Chat(engine, max_new_tokens=3)
    chat.choose(["letters", "digits"])
    *_, last = chat.say("abc")
    assert last.modules == list(BOTH)
    with pytest.raises(UnknownModuleError):
        chat.choose(["letters", "nobody"])
    *_, last = chat.say("abc")
    assert last.modules == list(BOTH)
    chat.choose(None)
    *_, last = chat.say("abc")
    assert (last.module, last.modules) == (None, [])


# Bad input


@pytest.mark.parametrize(
    ("wanted", "error", "word"),
    [
        (["letters", "nobody"], UnknownModuleError, "no module 'nobody'"),
        (["letters", "auto"], ConfigError, 'auto cannot be active together with others; leave out "auto"'),
        ([None, "letters"], ConfigError, "base cannot be active together with others; leave out base"),
        ([], ConfigError, "an empty list of modules"),
        (5, ConfigError, "module is 5; give a name, a list of names, None for the base"),
    ],
)
def test_what_cannot_be_active_together(engine: Engine, wanted: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        engine.generate("abc", module=wanted)
    with pytest.raises(error, match=word):
        engine.generate_many(["abc"], modules=wanted if isinstance(wanted, int) else [wanted])
    with pytest.raises(error, match=word):
        engine.logits(random_ids(1, 3), wanted)
    assert engine.modules.resident == []


@pytest.mark.parametrize("made", ["llama"], indirect=True)  # the one whose store has a module of blocks
def test_a_module_that_runs_alone_is_named(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"other is of kind blocks, .* name one module alone, or .* --kind experts"):
        engine.generate("abc", module=["letters", "other"])
    assert engine.modules.resident == []


def test_several_leave_no_choice_to_make(engine: Engine) -> None:
    for ways in ({"mix": 2}, {"reroute": 4}):
        with pytest.raises(ConfigError, match="leave out --module letters --module digits"):
            engine.generate("abc", module=["letters", "digits"], **ways)
    with pytest.raises(ConfigError, match="route"):
        engine.logits(random_ids(1, 3), "auto")


def test_sampling_is_as_ever(engine: Engine) -> None:
    options = vars(SamplingConfig(max_new_tokens=6, temperature=1.0, seed=3))
    one, two = (engine.generate("abc", module=m, **options).tokens for m in (BOTH, BOTH[::-1]))
    assert one == two
