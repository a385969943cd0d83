"""Engine: answers equal whole forward passes, whatever shares the batch; the budget holds; caches never mix."""

from __future__ import annotations

import re
import shutil
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from disk import edit, flip
from growlm import router
from growlm.base import Base
from growlm.base.rooms import Rooms
from growlm.engine import AUTO, Engine, Generation
from growlm.engine.fetching import Fetcher
from growlm.engine.kv import BLOCK
from growlm.engine.module_cache import ModuleCache
from growlm.engine.resident import Found, Resident
from growlm.engine.runner import Runner, Work
from growlm.engine.workspace import Watch as Allocations
from growlm.engine.workspace import workspace_bytes
from growlm.errors import BudgetError, ConfigError, DataError, GrowlmError, IntegrityError, UnknownModuleError
from growlm.modules import ModuleSet
from growlm.modules.peer import Peer, PeerConfig
from growlm.router import GaussianRouter, ProductKeyRouter, Route
from growlm.store import Store
from growlm.surgery.export import export
from growlm.training.config import GrowConfig
from growlm.training.grow import grow, take_back
from stores import Watch, add_module, domain_ids, domain_text, greedy, make_store, with_pass, with_texts
from tiny import perturb, random_ids

FAMILIES = ["llama", "gemma2", "gpt2"]
SHAPES = {
    "letters": {"placement": "top", "vocabulary": "head"},
    "digits": {"placement": "interleaved", "vocabulary": "head", "num_layers": 2},
    "signs": {"placement": "top", "vocabulary": "both"},
}
RECALLING = {
    "letters": {"kind": "recall"},
    "digits": {"kind": "lora+recall", "r": 4},
    "signs": {"kind": "blocks+recall", "vocabulary": "both"},
}
NAMES = [*SHAPES, None]
PROMPTS = ["abc de", domain_text("digits", 7), "x", domain_text("letters", 3, words=6), "<= >> def add("]
TOKENS = 12

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    plain = {family: make_store(tmp_path_factory.mktemp(family), family, SHAPES) for family in FAMILIES}
    return {**plain, "recalling": make_store(tmp_path_factory.mktemp("recalling"), "qwen3", RECALLING)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store whose three modules are of one size."""
    home = tmp_path_factory.mktemp("made")
    make_store(home)
    return home


@pytest.fixture(params=[*FAMILIES, "recalling"])
def engine(request, stores):
    with Engine(stores[request.param]) as made:
        yield made


@pytest.fixture
def llama(stores):
    with Engine(stores["llama"]) as made:
        yield made


def loaded(engine: Engine, name: str | None) -> list:
    return [] if name is None else [engine.store.load(name, engine.base)]


def expected(engine: Engine, name: str | None, prompt: str, tokens: int = TOKENS) -> list[int]:
    return greedy(engine.base, loaded(engine, name), engine.tokenizer.encode(prompt), tokens)


def room_for_one(home: Path) -> tuple[Store, int]:
    """A store, and the budget in which its base, its router and one of its modules just fit."""
    store = Store.open(home / "store")
    with Engine(store) as engine:
        return store, engine.fixed_bytes + store.module("digits").bytes


# What an answer is


@pytest.mark.versions
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_module_set(engine, name):
    ids = random_ids(2, 20)
    with torch.inference_mode():
        wanted = ModuleSet(engine.base, loaded(engine, name)).logits(ids)
    assert torch.equal(engine.logits(ids, module=name), wanted)
    others = [engine.logits(ids, module=n) for n in NAMES if n != name]
    assert not any(torch.equal(wanted, other) for other in others)


@pytest.mark.versions
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1]])
def test_a_greedy_answer_equals_whole_forward_passes(engine, name, prompt):
    answer = engine.generate(prompt, module=name, max_new_tokens=TOKENS)
    assert answer.tokens == expected(engine, name, prompt)
    assert answer.module == name
    assert answer.text == engine.tokenizer.decode(answer.tokens)
    assert answer.prompt_tokens == len(engine.tokenizer.encode(prompt))
    assert answer.finish_reason == ("length" if len(answer.tokens) == TOKENS else "stop")
    assert answer.scores == {}


def test_the_answers_compared_here_differ_by_prompt_and_module(engine):
    """Else the comparisons of this file would show little."""
    answers = {tuple(engine.generate(p, module=n, max_new_tokens=TOKENS).tokens) for p in PROMPTS for n in NAMES}
    assert len(answers) > len(PROMPTS) * len(NAMES) // 2
    assert len({token for answer in answers for token in answer}) > 20


@pytest.mark.versions
@pytest.mark.parametrize("name", list(SHAPES))
def test_an_answer_equals_that_of_the_exported_checkpoint(stores, tmp_path, name):
    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(export(stores[family], tmp_path / family, name))
        with Engine(stores[family]) as engine:
            ids = torch.tensor([engine.tokenizer.encode(PROMPTS[1])])
            answer = engine.generate(PROMPTS[1], module=name, max_new_tokens=TOKENS)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        assert answer.tokens == whole[0, ids.shape[1] :].tolist(), family


@pytest.mark.versions
def test_many_prompts_under_mixed_modules_are_answered_as_each_alone(engine):
    prompts = [p for p in PROMPTS for _ in NAMES]
    modules = [n for _ in PROMPTS for n in NAMES]
    answers = engine.generate_many(prompts, modules=modules, max_new_tokens=TOKENS)
    assert [a.module for a in answers] == modules
    for prompt, name, answer in zip(prompts, modules, answers, strict=True):
        alone = engine.generate(prompt, module=name, max_new_tokens=TOKENS)
        assert (answer.tokens, answer.text, answer.prompt_tokens) == (alone.tokens, alone.text, alone.prompt_tokens)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_answers_keep_the_order_of_the_prompts_in_batches_of_any_size(stores, llama, max_batch):
    modules = ["letters", None, "signs", "digits", "letters"]
    with Engine(stores["llama"], max_batch=max_batch) as engine:
        answers = engine.generate_many(PROMPTS, modules=modules, max_new_tokens=5)
    assert [a.module for a in answers] == modules
    assert [a.tokens for a in answers] == [expected(llama, m, p, 5) for p, m in zip(PROMPTS, modules, strict=True)]


def test_one_module_for_all_or_one_a_prompt(llama):
    assert llama.generate_many([], modules=None) == []
    assert [a.module for a in llama.generate_many(PROMPTS, modules="signs", max_new_tokens=1)] == ["signs"] * 5
    assert [a.module for a in llama.generate_many(PROMPTS, modules=None, max_new_tokens=1)] == [None] * 5
    with pytest.raises(ConfigError, match="5 prompts but 2 modules"):
        llama.generate_many(PROMPTS, modules=["signs", None])


@pytest.mark.parametrize("names", [NAMES, ["letters", None], ["letters"], ["digits"], [None]], ids=str)
@pytest.mark.parametrize("lengths", [[1, 3, 12, 2, 7], [12, 1, 1, 1, 1], [2, 9, 2, 9, 2]], ids=str)
def test_answers_that_end_leave_the_others_as_they_are(engine, names, lengths):
    """Streams of any length at once: what ends leaves the pass, and others come in its place."""
    asked = [(prompt, names[row % len(names)], lengths[row]) for row, prompt in enumerate(PROMPTS)]
    streams = [engine.stream(prompt, module=name, max_new_tokens=length) for prompt, name, length in asked]
    found: dict[int, Generation] = {}
    while len(found) < len(streams):
        for row, stream in enumerate(streams):
            if row not in found and isinstance(piece := next(stream), Generation):
                found[row] = piece
    for row, (prompt, name, length) in enumerate(asked):
        assert found[row].tokens == expected(engine, name, prompt, length), row


# Names: guarantee 8


@pytest.mark.parametrize("name", ["nobody", "Letters", "../letters", "none", "base", ""])
def test_an_unknown_name_is_an_error_never_the_base(llama, name):
    calls = [
        lambda: llama.generate("abc", module=name),
        lambda: llama.generate_many(["abc", "abc"], modules=["letters", name]),
        lambda: llama.logits(random_ids(1, 4), module=name),
        lambda: list(llama.stream("abc", module=name)),
    ]
    for call in calls:
        with pytest.raises(GrowlmError) as caught:
            call()
        assert "\n" not in str(caught.value)
        if name in ("nobody", "base", "none"):
            assert isinstance(caught.value, UnknownModuleError)
        assert ("for the base alone give None" in str(caught.value)) == (name in ("base", "none"))


@pytest.mark.versions
@pytest.mark.parametrize("domain", [*SHAPES, "general"])
def test_the_router_chooses_the_module_or_says_none(llama, domain):
    wanted = domain if domain in SHAPES else None
    prompt = domain_text(domain, 1234)
    route = llama.route(prompt)
    answer = llama.generate(prompt, max_new_tokens=6)
    assert route.module == answer.module == wanted
    assert answer.tokens == expected(llama, wanted, prompt, 6)
    assert route.scores == pytest.approx(answer.scores)
    assert next(iter(route.scores)) == (wanted or "none")
    assert sum(route.scores.values()) == pytest.approx(1)
    assert set(route.scores) == {*SHAPES, "none"}


@pytest.mark.versions
def test_routed_and_named_requests_share_a_batch(llama):
    prompts = [domain_text(d, 55, words=n) for d, n in (("digits", 5), ("general", 12), ("letters", 8), ("signs", 9))]
    answers = llama.generate_many(prompts, modules=[AUTO, AUTO, None, AUTO], max_new_tokens=6)
    assert [a.module for a in answers] == ["digits", None, None, "signs"]
    assert [bool(a.scores) for a in answers] == [True, True, False, True]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(llama, answer.module, prompt, 6)


def test_a_store_without_modules_answers_with_none_of_them(tmp_path):
    store = make_store(tmp_path, modules={})
    with Engine(store) as engine:
        assert engine.route("abc").module is None
        answer = engine.generate("abc", max_new_tokens=3)
        assert (answer.module, answer.scores, answer.loaded) == (None, {"none": 1.0}, [])


# Streaming


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 3.0, "seed": 8}], ids=str)
def test_pieces_of_a_stream_make_the_text(engine, sampling):
    """Hot samples of a byte-level vocabulary are full of broken characters."""
    for prompt in PROMPTS[:2]:
        *pieces, result = engine.stream(prompt, module="digits", max_new_tokens=40, **sampling)
        assert isinstance(result, Generation)
        assert all(isinstance(p, str) and p for p in pieces)
        assert "".join(pieces) == result.text
        assert result.text == engine.generate(prompt, module="digits", max_new_tokens=40, **sampling).text


def scripted(engine: Engine, text: str, monkeypatch) -> None:
    """The engine's next answer spells `text`, byte by byte."""
    pieces = re.split(r"(<\|endoftext\|>|)", text)
    at = iter([i for piece in pieces for i in engine.tokenizer.encode(piece)])

    def sample(logits, config, generators):
        return torch.full((len(logits),), next(at))

    monkeypatch.setattr("growlm.engine.sampling.sample", sample)


def test_a_character_of_several_bytes_is_never_cut(llama, monkeypatch):
    text = "naïve 日本 🙂 e"
    scripted(llama, text, monkeypatch)
    *pieces, result = llama.stream("abc", module=None, max_new_tokens=len(text.encode()))
    assert result.text == "".join(pieces) == text
    assert not any("\ufffd" in p for p in pieces)
    assert [p for p in pieces if len(p.encode()) > 1] == ["ï", "日", "本", "🙂"]


def test_a_stop_text_ends_the_answer_and_no_part_of_it_is_streamed(llama, monkeypatch):
    text = "one END two ENDED three"
    for stop, wanted in [
        (("ENDE",), "one END two "),
        (("END",), "one "),
        (("ENDE", " two"), "one END"),
        ("ED", "one END two END"),
        (("zzz",), text),
    ]:
        scripted(llama, text, monkeypatch)
        *pieces, result = llama.stream("abc", module=None, max_new_tokens=len(text), stop=stop)
        assert "".join(pieces) == result.text == wanted
        assert result.finish_reason == ("length" if wanted == text else "stop")


def test_what_looked_like_a_stop_text_is_still_given(llama, monkeypatch):
    scripted(llama, "ab EN", monkeypatch)
    *pieces, result = llama.stream("abc", module=None, max_new_tokens=5, stop="END")
    assert "".join(pieces) == result.text == "ab EN"


def test_a_stream_that_is_closed_early_is_written_no_further(llama):
    """Nobody reads on: the rest of 200 tokens is not written, and the engine is free for the next."""
    written = []
    finish = ModuleSet.finish

    def counted(self, *arguments):
        written.append(1)
        return finish(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleSet, "finish", counted)
        stream = llama.stream("abc", module=None, max_new_tokens=200)
        next(stream)
        stream.close()
    assert len(written) < 10
    assert llama._loop.scheduler.idle
    assert llama.generate("abc", module=None, max_new_tokens=3).tokens == expected(llama, None, "abc", 3)


def test_an_error_in_a_stream_reaches_its_reader(llama):
    with pytest.raises(DataError, match="empty"):
        list(llama.stream("", module=None))


# Sampling and ends


def test_a_draw_depends_on_its_seed_and_not_on_its_batch(llama):
    hot = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": TOKENS}
    alone = [llama.generate(p, module="letters", seed=5, **hot).tokens for p in PROMPTS]
    assert [llama.generate(p, module="letters", seed=5, **hot).tokens for p in PROMPTS] == alone
    assert [a.tokens for a in llama.generate_many(PROMPTS, modules="letters", seed=5, **hot)] == alone
    assert [a.tokens for a in llama.generate_many(PROMPTS[::-1], modules="letters", seed=5, **hot)] == alone[::-1]
    assert [llama.generate(p, module="letters", seed=6, **hot).tokens for p in PROMPTS] != alone


def test_top_k_of_one_and_a_small_top_p_are_greedy(llama):
    greedily = llama.generate("abc", module="digits", max_new_tokens=TOKENS).tokens
    for bound in ({"top_k": 1}, {"top_p": 1e-6}):
        assert (
            llama.generate("abc", module="digits", max_new_tokens=TOKENS, temperature=2.0, **bound).tokens == greedily
        )
    assert llama.generate("abc", module="digits", max_new_tokens=TOKENS, temperature=2.0).tokens != greedily


@pytest.mark.parametrize(
    "option", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 2}, {"top_k": -1}, {"colour": 1}]
)
def test_impossible_sampling_is_refused(llama, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        llama.generate("abc", module=None, **option)


def test_an_end_of_text_ends_the_answer(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        whole = engine.generate("abc de", module="digits", max_new_tokens=TOKENS).tokens
    end = whole[4]
    (home / "base" / "generation_config.json").write_text(f'{{"eos_token_id": [0, {end}]}}')
    with Engine(store) as engine:
        answer = engine.generate("abc de", module="digits", max_new_tokens=TOKENS)
        assert answer.tokens == whole[: whole.index(end)]
        assert answer.finish_reason == "stop"
        many = engine.generate_many(["abc de", "x", "abc de"], modules=["digits", None, "digits"], max_new_tokens=5)
        assert many[0].tokens == many[2].tokens == answer.tokens


@pytest.mark.parametrize(("prompt", "error"), [("", DataError), ("@" * 250, ConfigError)])
def test_a_prompt_that_cannot_be_answered_is_refused(stores, prompt, error):
    """gpt2 has learned positions, 256 of them."""
    with Engine(stores["gpt2"]) as engine:
        with pytest.raises(error):
            engine.generate(prompt, module=None, max_new_tokens=7)
        with pytest.raises(error):
            engine.generate_many(["abc", prompt], modules=None, max_new_tokens=7)
        assert engine.generate("@" * 249, module=None, max_new_tokens=7).prompt_tokens == 249


# Guarantee 5: the budget


def test_one_module_after_another_never_pass_the_budget(home, monkeypatch):
    store, budget = room_for_one(home)
    seen: list[int] = []
    with Engine(store, memory=with_texts(store, budget)) as engine:
        watch = Watch(monkeypatch)
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                seen.append(engine.resident_bytes)
                time.sleep(0.0005)

        looker = threading.Thread(target=look)
        looker.start()
        try:
            for name in ["letters", "digits", "signs"] * 6:
                answer = engine.generate("abc", module=name, max_new_tokens=2)
                assert answer.resident_bytes == budget
                assert answer.loaded == [name]
        finally:
            done.set()
            looker.join()
        assert len(watch.loads) == 18
        assert max(seen) <= budget
        assert engine.fixed_bytes + watch.most <= budget


def test_a_batch_that_swaps_modules_never_passes_the_budget(home, monkeypatch):
    """Its waves hold one module each: the first is gone before the second is read."""
    store, budget = room_for_one(home)
    with Engine(store) as free:
        wanted = [expected(free, n, p, 4) for n, p in zip(["letters", "digits", "signs", None], PROMPTS, strict=False)]
    with Engine(store, memory=with_texts(store, budget)) as engine:
        watch = Watch(monkeypatch)
        for _ in range(3):
            answers = engine.generate_many(PROMPTS[:4], modules=["letters", "digits", "signs", None], max_new_tokens=4)
            assert [a.tokens for a in answers] == wanted
            assert max(a.resident_bytes for a in answers) <= budget
        assert engine.fixed_bytes + watch.most <= budget


def test_logits_never_pass_the_budget(home, monkeypatch):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_pass(store, budget)) as engine:
        watch = Watch(monkeypatch)
        for name in ["letters", "digits", "signs"] * 2:
            engine.logits(random_ids(1, 4), module=name)
        assert engine.fixed_bytes + watch.most <= budget


def test_the_budget_counts_what_is_really_in_memory(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        model = engine.base.model
        assert engine.base_bytes == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        before = engine.resident_bytes
        assert before == engine.fixed_bytes
        engine.generate("abc", module="digits", max_new_tokens=1)
        module = store.load("digits", engine.base)
        real = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        assert engine.resident_bytes - before == real == store.module("digits").bytes


def test_a_module_that_does_not_fit_is_refused_with_the_numbers(home):
    store, budget = room_for_one(home)
    together = (
        r"digits \S+ kB, keys and values of this text \S+ kB do not fit together: \S+ kB are left.*--memory by at "
    )
    with Engine(store, memory=with_texts(store, budget) - 1) as engine:
        with pytest.raises(BudgetError, match=together + r"least 1 B.*max_new_tokens"):
            engine.generate("abc", module="digits", max_new_tokens=2)
        with pytest.raises(BudgetError, match=together):
            engine.generate_many(["abc"], modules=["digits"], max_new_tokens=2)
        with pytest.raises(BudgetError, match="digits"):
            engine.generate(domain_text("digits", 9), max_new_tokens=2)
        assert engine.resident_bytes == engine.fixed_bytes
        assert engine.generate("abc", module=None, max_new_tokens=2).module is None
    with (
        Engine(store, memory=with_pass(store, budget) - 1) as engine,
        pytest.raises(BudgetError, match=r"digits \S+ kB does not fit:"),
    ):
        engine.logits(random_ids(1, 3), module="digits")


@pytest.mark.filterwarnings("ignore:.*positions that the base was made for")
def test_a_text_that_does_not_fit_is_refused_with_the_numbers_and_others_go_on(home):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        for name in (None, "letters", AUTO):
            with pytest.raises(BudgetError, match=r"keys and values of this text \S+ [kM]B do(es)? not fit.*max_new"):
                engine.generate("abc", module=name, max_new_tokens=4000)
        long = engine.submit("@" * 4000, module="letters", max_new_tokens=2)
        assert engine.generate("abc", module="letters", max_new_tokens=2).module == "letters"
        assert isinstance(long.error, BudgetError)


def test_keys_and_values_count_against_the_budget(home):
    """As many texts at a time as there is room for; with what is kept of them, never more than the budget."""
    store, budget = room_for_one(home)
    memory = with_texts(store, budget, texts=2)
    prompts = [domain_text("letters", seed, words=15) for seed in range(6)]
    with Engine(store) as free:
        wanted = [answer.tokens for answer in free.generate_many(prompts, modules="letters", max_new_tokens=4)]
    with Engine(store, memory=memory) as engine:
        requests = [engine.submit(prompt, module="letters", max_new_tokens=4) for prompt in prompts]
        most, together = 0, 0
        while engine.step():
            most = max(most, engine.used_bytes)
            together = max(together, len(engine._loop.scheduler.active))
        assert [request.result.tokens for request in requests] == wanted
        assert together == 2
        assert engine.fixed_bytes < most <= memory
        assert engine._prefixes.num_bytes() > 0
        engine.generate("abc", module="digits", max_new_tokens=2)  # which needs the room of what was kept
        assert engine.used_bytes <= memory


def test_a_base_that_does_not_fit_is_refused_with_the_numbers(home):
    store, _ = room_for_one(home)
    with Engine(store) as engine:
        fixed = engine.fixed_bytes
    with pytest.raises(BudgetError, match=r"--memory \S+ kB is too small: base \S+ kB and router"):
        Engine(store, memory=fixed - 1)
    with Engine(store, memory=with_texts(store, fixed)) as engine:
        assert engine.generate("abc", module=None, max_new_tokens=1).resident_bytes == fixed


def test_a_pass_counts_against_the_budget(home):
    store = Store.open(home / "store")
    with Engine(store, memory="10MB") as engine:
        fixed, workspace = engine.fixed_bytes, engine.workspace_bytes
        assert workspace > 512 * engine.base.hidden_size * 4
    with pytest.raises(BudgetError, match=r"base \S+ kB and router \S+ kB, and a pass \S+ [kM]B, need"):
        Engine(store, memory=fixed + workspace - 1)
    assert Engine(store).workspace_bytes == 0


@pytest.mark.parametrize("tokens", [64, 200, 512])
def test_what_a_pass_takes_is_foreseen_from_smaller_ones(home, tokens):
    base = Store.open(home / "store").load_base()
    foreseen, rooms = workspace_bytes(base, tokens, 0), Rooms()
    with Allocations() as watch:
        Runner(base).run([Work(ModuleSet(base), torch.zeros(tokens, dtype=torch.long), 0, rooms.new())])
    assert watch.peak - rooms.num_bytes() == pytest.approx(foreseen, rel=0.1)


def test_a_module_that_is_pinned_stays_and_answers(home):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        engine.pin("digits")
        engine.generate("abc", module=None, max_new_tokens=2)
        assert engine.generate("abc", module="digits", max_new_tokens=2).loaded == []
        engine.unpin("digits")
        assert engine.generate("abc", module="letters", max_new_tokens=2).loaded == ["letters"]
        with pytest.raises(UnknownModuleError):
            engine.pin("nothing")
        engine.pin("digits")
        with pytest.raises(BudgetError, match=r"less what is pinned \(digits\); raise --memory"):
            engine.generate("abc", module="letters", max_new_tokens=2)
        assert engine.generate("abc", module="digits", max_new_tokens=2).module == "digits"


def test_modules_that_are_idle_are_let_go_of(home):
    with Engine(Store.open(home / "store"), idle=0) as engine:
        engine.generate("abc", module="digits", max_new_tokens=2)
        engine.generate("abc", module=None, max_new_tokens=1)
        assert engine.modules.resident == []
    for idle in (-1, "x"):
        with pytest.raises(ConfigError, match="idle is"):
            Engine(Store.open(home / "store"), idle=idle)


def test_a_module_is_reported_as_loaded_once(home):
    with Engine(Store.open(home / "store")) as engine:
        assert engine.generate("abc", module="digits", max_new_tokens=1).loaded == ["digits"]
        assert engine.generate("abc", module="digits", max_new_tokens=1).loaded == []
        answers = engine.generate_many(["abc", "de", "x"], modules=["digits", "signs", None], max_new_tokens=1)
        assert [a.loaded for a in answers] == [[], ["signs"], []]


def test_the_least_recently_used_module_goes_first(home):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget + store.module("digits").bytes)) as engine:
        for name in ("letters", "digits", "letters", "signs"):
            engine.generate("abc", module=name, max_new_tokens=1)
        assert engine.modules.resident == ["letters", "signs"]
        assert engine.modules.counts.evictions == 1


@pytest.mark.parametrize("wanted", [["letters", "digits"], ["digits", "letters"]])
def test_a_batch_begins_with_what_is_in_memory(home, monkeypatch, wanted):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        engine.generate("abc", module="letters", max_new_tokens=1)
        watch = Watch(monkeypatch)
        answers = engine.generate_many(["abc", "de"], modules=wanted, max_new_tokens=1)
        assert watch.loads == ["digits"]
        assert [a.loaded for a in answers] == [["digits"] if name == "digits" else [] for name in wanted]


# The module cache by itself


class Named(str):
    """What stands for a module."""

    __slots__ = ()

    def arrive(self) -> None:
        pass


def cache_of(budget: int | None, sizes: dict[str, int], loads: list[str] | None = None) -> ModuleCache:
    def load(name: str):
        if loads is not None:
            loads.append(name)
        return Named(name)

    def find(name: str) -> Found:
        if sizes[name] < 0:
            raise IntegrityError(f"{name} is damaged")
        return Found(None, sizes[name], lambda: load(name))  # type: ignore[arg-type]

    return ModuleCache(budget, find, " in all")


def begun(cache: ModuleCache, name: str) -> bool:
    """Whether it is read now, or has been: by whom is not interested in it any more."""
    found = cache.begin([name])
    if found is not None:
        cache.release(found[0].values())
    return found is not None


def read(held: dict[str, Any]) -> dict[str, Any]:
    return {name: resident.module() for name, resident in held.items()}


def test_a_module_that_is_kept_stays_until_it_is_let_go():
    cache = cache_of(10, {"a": 6, "b": 4, "c": 5})
    for _ in range(2):
        cache.keep("a")
    assert cache.kept == ["a"]
    for name in ("b", "b"):
        cache.release(cache.acquire([name]).values())
    for ask in (lambda: cache.acquire(["c"]), lambda: cache.keep("c")):
        with pytest.raises(BudgetError, match=r"c 5 B does not fit: 10 B are left .* less what is pinned \(a\)"):
            ask()
    for _ in range(2):
        cache.let_go("a")
    assert not cache.kept
    cache.acquire(["c"])
    assert "a" not in cache.resident
    cache.close()


def test_modules_that_nobody_uses_go_after_their_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("growlm.engine.module_cache.time.monotonic", lambda: now[0])
    cache = ModuleCache(10, lambda name: Found(None, 3, lambda: name), idle=60)  # type: ignore[arg-type]
    cache.keep("b")
    held = {name: cache.acquire([name])[name] for name in ("a", "c")}
    cache.release([held["a"]])
    for passed, resident in ((59, ["b", "a", "c"]), (1, ["b", "c"]), (600, ["b", "c"])):
        now[0] += passed
        cache.tend()
        assert cache.resident == resident
    cache.release([held["c"]])
    cache.let_go("b")
    now[0] += 60
    cache.tend()
    assert cache.resident == []
    cache.close()


def test_pinned_modules_stay_and_what_does_not_fit_beside_them_is_refused():
    cache = cache_of(10, {"a": 6, "b": 4, "c": 5})
    held = cache.acquire(["a", "b"])
    assert read(held) == {"a": "a", "b": "b"}
    with pytest.raises(BudgetError, match=r"in use are: (a, b|b, a)"):
        cache.acquire(["c"])
    assert not begun(cache, "c")
    cache.drop("a")
    assert cache.resident == ["a", "b"]
    cache.release([held["b"]])
    with pytest.raises(BudgetError):
        cache.acquire(["c"])
    assert "a" in cache.resident
    cache.release([held["a"]])
    assert read(cache.acquire(["c"])) == {"c": "c"}
    assert cache.resident_bytes <= 10
    cache.close()


@pytest.mark.parametrize("verb", ["acquire", "begin"])
def test_room_is_made_before_a_module_is_read(verb, monkeypatch):
    """Reads at once what the cache would read in the background: so at the earliest moment that there can be."""
    seen: list[int] = []
    cache = cache_of(10, {"a": 6, "b": 7})

    def submit(fetcher: Fetcher, load):
        seen.append(cache.resident_bytes)
        future: Future = Future()
        future.set_result(load())
        return future

    monkeypatch.setattr(Fetcher, "submit", submit)
    for name in "abab":
        if verb == "begin":
            assert begun(cache, name)
        else:
            cache.release(cache.acquire([name]).values())
    assert seen == [6, 7, 6, 7]


def test_a_module_in_memory_counts_as_it_is_there():
    sizes = {"a": 6, "b": 4}
    loads: list[str] = []
    cache = cache_of(10, sizes, loads)
    with cache.using(["a"]):
        pass
    for on_the_disk in (11, 1, -1):
        sizes["a"] = on_the_disk
        assert cache.found("a").bytes == 6
        with cache.using(["a", "b"]):
            assert loads == ["a", "b"]
    assert cache.counts.evictions == 0
    cache.close()


def test_a_version_in_memory_gives_way_to_a_smaller_one_only_where_that_is_needed():
    sizes = {"a": 3, "b": 4, "c": 3, "d": 1}
    loads: list[str] = []
    cache = cache_of(10, sizes, loads)
    with cache.using(["a", "b", "c"]):
        pass
    sizes |= {"a": 2, "b": 1, "c": 5}
    with cache.using(["a", "b", "c"]):
        assert cache.counts.evictions == 0
        with pytest.raises(BudgetError):  # all are in use
            cache.make_fit(["a", "b", "c", "d"])
    sizes["d"] = 5
    with pytest.raises(BudgetError, match=r"raise --memory by at least 1 B$"):
        cache.make_fit(["a", "b", "c", "d"])
    assert cache.resident == ["a", "b", "c"]
    sizes["d"] = 2
    cache.acquire(["a", "b", "c", "d"])
    assert loads == ["a", "b", "c", "b", "d"]  # of the two that are smaller, the one that saves more
    assert cache.resident_bytes == 9
    cache.close()


def test_beginning_waits_for_no_version_that_is_to_go_and_is_still_being_read():
    gate, sizes = threading.Event(), {"a": 9, "b": 4}

    def find(name: str) -> Found:
        return Found(None, sizes[name], lambda: gate.wait(60) and name)  # type: ignore[arg-type, return-value]

    cache = ModuleCache(10, find)
    assert begun(cache, "a")
    sizes["a"] = 5
    assert cache.begin(["a", "b"]) is None
    gate.set()
    assert set(cache.acquire(["a", "b"])) == {"a", "b"}
    assert cache.resident_bytes == 9
    cache.close()


def test_who_holds_a_version_that_is_retired_goes_on_with_it_and_who_comes_reads_the_next():
    sizes, loads = {"a": 4, "b": 7}, list[str]()
    cache = cache_of(10, sizes, loads)
    old = cache.acquire(["a"])
    sizes["a"] = 5
    cache.retire("a")
    assert (cache.resident, cache.resident_bytes) == ([], 4)
    new = cache.acquire(["a"])
    assert (new["a"] is not old["a"], loads, cache.resident_bytes) == (True, ["a", "a"], 9)
    assert not begun(cache, "b")  # both are in use
    cache.release(old.values())
    assert (cache.resident, cache.resident_bytes) == (["a"], 5)
    cache.release(new.values())
    cache.retire("a")  # nobody holds it
    assert (cache.resident, cache.resident_bytes) == ([], 0)
    assert begun(cache, "a")
    cache.drop("a")  # it may still be being read, which counts
    assert cache.resident_bytes in (0, 5)
    cache.retire("a")
    cache.keep("a")
    assert cache.resident_bytes == 5
    cache.retire("a")
    assert (cache.kept, cache.resident) == (["a"], [])
    with cache.using(["a"]):  # and from now on it stays again
        pass
    with pytest.raises(BudgetError):
        cache.acquire(["b"])
    cache.close()


def test_what_is_damaged_on_the_disk_takes_nothing_from_memory():
    sizes = {"a": 6, "b": 5}
    cache = cache_of(10, sizes)
    with cache.using(["a"]):
        sizes["a"] = -1
    with pytest.raises(BudgetError):
        cache.make_fit(["a", "b"])
    assert cache.resident == ["a"]
    with cache.using(["a"]) as held:
        assert held == {"a": "a"}
    cache.close()


def test_room_is_made_of_what_cannot_be_read_while_another_waits_for_its_turn():
    """The reader says that the first failed before it begins the second; the thread that waits for both must let it."""
    reads, go = threading.Event(), threading.Event()

    def load(name: str) -> str:
        if name == "a":
            reads.set()
            assert go.wait(60)
            raise IntegrityError("a is damaged")
        return name

    cache = ModuleCache(10, lambda name: Found(None, 5 if name < "c" else 10, lambda: load(name)))  # type: ignore
    assert begun(cache, "a")
    assert begun(cache, "b")
    assert reads.wait(60)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(read(cache.acquire(["c"]))), daemon=True)
    waiting.start()
    time.sleep(0.05)
    go.set()
    waiting.join(60)
    assert found == [{"c": "c"}]
    assert cache.resident == ["c"]
    cache.close()


def test_what_comes_at_the_very_moment_when_room_is_looked_for_makes_room(monkeypatch):
    go = threading.Event()

    def load(name: str) -> str:
        assert name == "a" or go.wait(60)
        return name

    cache = ModuleCache(9, lambda name: Found(None, {"a": 1, "b": 9}[name], lambda: load(name)))  # type: ignore
    assert begun(cache, "b")
    looks: list[bool] = []

    def looked(resident: Resident) -> bool:
        looks.append(resident.future.done())
        go.set()  # it was on its way when it was looked at, and is there a moment later
        wait([resident.future], 60)
        return looks[-1]

    monkeypatch.setattr(Resident, "read", property(looked))
    held = cache.acquire(["a"])
    assert looks[0] is False
    assert read(held) == {"a": "a"}
    assert cache.resident == ["a"]
    cache.close()


@pytest.mark.parametrize("wanted", ["a", "b"])
def test_a_version_that_is_retired_while_it_is_read_makes_room_once_it_is_there(wanted):
    go = threading.Event()

    def load(name: str) -> str:
        assert go.wait(60)
        return name

    cache = ModuleCache(9, lambda name: Found(None, 5, lambda: load(name)))  # type: ignore
    assert begun(cache, "a")
    cache.retire("a")
    assert (cache.resident, cache.resident_bytes) == ([], 5)
    later = threading.Timer(0.05, go.set)
    later.start()
    held = cache.acquire([wanted])
    assert read(held) == {wanted: wanted}
    assert (cache.resident, cache.resident_bytes) == ([wanted], 5)
    later.join()
    cache.close()


def test_modules_that_are_begun_to_be_read_are_read_once_and_counted_at_once():
    loads: list[str] = []
    cache = cache_of(10, {"a": 6, "b": 6}, loads)
    assert begun(cache, "a")
    assert cache.resident_bytes == 6
    held = cache.acquire(["a"])
    assert read(held) == {"a": "a"}
    assert loads == ["a"]
    cache.release(held.values())
    assert begun(cache, "b")
    assert cache.resident == ["b"]
    assert cache.resident_bytes == 6
    cache.close()


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1),
    st.integers(9, 20),
    st.lists(st.tuples(st.sampled_from(["acquire", "begin", "drop", "retire"]), st.sampled_from("abcdef"))),
)
@settings(deadline=None, max_examples=60)
def test_no_order_of_requests_passes_the_budget(sizes, budget, requests):
    alive: dict[str, int] = {}
    cache = cache_of(budget, sizes)
    for verb, name in requests:
        if name not in sizes:
            continue
        if verb == "acquire":
            held = cache.acquire([name])
            assert name in cache.resident
            cache.release(held.values())
        elif verb == "begin":
            begun(cache, name)
        elif verb == "retire":
            cache.retire(name)
        else:
            cache.drop(name)
        alive = {n: sizes[n] for n in cache.resident}
        assert sum(alive.values()) <= cache.resident_bytes <= budget
    cache.close()


# Files that change while the engine runs


def test_a_changed_file_is_refused_and_the_others_go_on(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        engine.generate("abc", module="letters", max_new_tokens=1)
        flip(store.path / "modules" / "digits" / "1" / "module.safetensors")
        for _ in range(2):
            with pytest.raises(IntegrityError, match="sha256"):
                engine.generate("abc", module="digits", max_new_tokens=1)
        assert engine.generate("abc", module="letters", max_new_tokens=1).module == "letters"
        assert engine.generate("abc", module="signs", max_new_tokens=1).module == "signs"


def test_a_file_that_changed_after_it_was_checked_is_checked_again(home):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        engine.generate("abc", module="digits", max_new_tokens=1)
        engine.generate("abc", module="letters", max_new_tokens=1)
        flip(store.path / "modules" / "digits" / "1" / "module.safetensors")
        with pytest.raises(IntegrityError, match="sha256"):
            engine.generate("abc", module="digits", max_new_tokens=1)


def test_a_refused_module_takes_no_room_and_answers_once_its_file_is_restored(home):
    store, budget = room_for_one(home)
    path = store.path / "modules" / "digits" / "1" / "module.safetensors"
    content = flip(path)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        with pytest.raises(IntegrityError):
            engine.generate("abc", module="digits", max_new_tokens=1)
        assert engine.resident_bytes == engine.fixed_bytes
        path.write_bytes(content)
        assert engine.generate("abc", module="digits", max_new_tokens=3).tokens == expected(engine, "digits", "abc", 3)


@pytest.mark.parametrize("placement", ["top", "interleaved"])
def test_a_module_that_is_updated_while_the_engine_runs_answers_as_one_of_its_versions(home, placement):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        old = engine.generate("abc", module="digits", max_new_tokens=8)
        add_module(store, store.load_base(), "digits", 77, placement=placement, vocabulary="both")
        new = greedy(engine.base, loaded(engine, "digits"), engine.tokenizer.encode("abc"), 8)
        assert engine.generate("abc", module="digits", max_new_tokens=8).tokens in (old.tokens, new)


def test_a_module_that_is_removed_while_the_engine_runs_is_unknown(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        engine.generate("abc", module="digits", max_new_tokens=1)
        store.remove("digits")
        with pytest.raises(UnknownModuleError):
            engine.generate("abc", module="digits")


def test_a_removed_module_is_no_longer_chosen_and_others_are(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        prompts = [domain_text(d, 990) for d in ("letters", "digits", "signs")]
        assert [engine.generate(p, max_new_tokens=2).module for p in prompts] == ["letters", "digits", "signs"]
        store.remove("digits")
        found = [engine.generate(p, max_new_tokens=2).module for p in prompts]
        assert (found[0], found[2]) == ("letters", "signs")
        assert found[1] != "digits"
        assert engine.route(prompts[1]).module != "digits"


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine, prompt: engine.route(prompt),
        lambda engine, prompt: engine.generate(prompt, max_new_tokens=2),
        lambda engine, prompt: engine.generate_many([prompt, "abc"], max_new_tokens=2)[0],
        lambda engine, prompt: engine.generate(prompt, max_new_tokens=8, reroute=4),
        lambda engine, prompt: engine.generate(prompt, max_new_tokens=2, mix=3),
    ],
    ids=["route", "generate", "many", "reroute", "mix"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_removed_module_is_in_no_answer(home, ask, rank):
    """Whatever is asked first after the removal, and whether the best module went or the second best."""
    store = Store.open(home / "store")
    with Engine(store) as engine:
        prompt = domain_text("letters", 990)
        gone = [name for name in engine.route(prompt).scores if name != "none"][rank]
        store.remove(gone)
        answer = ask(engine, prompt)
        assert gone not in answer.scores
        assert answer.module != gone
        assert gone not in (getattr(answer, "mixture", None) or {})


def test_modules_that_are_gone_are_taken_from_the_router_at_once(home, monkeypatch):
    """Also those that its answer did not list: a smaller router of very many modules takes a while to make."""
    store = Store.open(home / "store")
    taken: list[set[str]] = []
    without = ProductKeyRouter.without
    monkeypatch.setattr(
        ProductKeyRouter, "without", lambda router, names: (taken.append(set(names)), without(router, names))[1]
    )
    with Engine(store, router="product-key") as engine:
        assert isinstance(engine.router, ProductKeyRouter)
        engine.router.top_k = 1
        prompt = domain_text("letters", 990)
        assert [name for name in engine.route(prompt).scores if name != "none"] == ["letters"]
        for name in ("letters", "digits"):
            store.remove(name)
        assert [name for name in engine.route(prompt).scores if name != "none"] == ["signs"]
        assert taken == [{"letters", "digits"}]
        assert engine.router.names == ["signs"]


def test_a_module_that_is_removed_between_two_choices_is_not_chosen_again(home, monkeypatch):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        engine._loop.writer.end_tokens = set()
        original = GaussianRouter.route
        calls = []

        def route(router: GaussianRouter, *arguments: Any) -> list[Route]:
            calls.append(router.names)
            if len(calls) == 2:  # every four tokens
                store.remove("digits")
            return original(router, *arguments)

        monkeypatch.setattr(GaussianRouter, "route", route)
        answer = engine.generate(domain_text("digits", 990, words=30), reroute=4, max_new_tokens=12)
        assert answer.changes[:2] == [(0, "digits"), (4, answer.changes[1][1])]
        assert "digits" not in [name for _, name in answer.changes[1:]]
        assert len(answer.tokens) == 12


def test_the_version_that_was_counted_is_the_one_that_is_read(home, monkeypatch):
    """An update to a larger version between counting and reading."""
    store = Store.open(home / "store")
    with Engine(store) as engine:
        make_room = engine.modules._make_room

        def updated(size: int, keep: set[str]) -> None:
            add_module(store, engine.base, "digits", 77, num_layers=3)
            make_room(size, keep)

        monkeypatch.setattr(engine.modules, "_make_room", updated)
        with engine.modules.using(["digits"]) as held:
            assert held["digits"].num_bytes() == engine.modules.resident_bytes


def add_pools(store: Store, base: Base, name: str, seed: int, num_experts: int) -> None:
    """Commits a module of kind peer."""
    module = Peer.create(base, PeerConfig(num_experts=num_experts, num_heads=2, top_k=4))
    module.enable_new_experts()
    with torch.no_grad():
        perturb(module, seed, strength=0.3)
    texts = domain_ids(store.load_tokenizer(), name)
    store.commit(
        name,
        module,
        {},
        router.files_of(router.gather_evidence(base, texts[:8], texts[8:12], layer=store.manifest.routing_layer)),
    )


@pytest.fixture(scope="module")
def with_pools(tmp_path_factory) -> Path:
    """A store with two modules of kind peer, of one size."""
    folder = tmp_path_factory.mktemp("pools")
    store = make_store(folder, modules={})
    base = store.load_base()
    for seed, name in enumerate(("letters", "digits")):
        add_pools(store, base, name, seed, 100)
    return folder


@pytest.fixture
def pools(with_pools: Path, tmp_path: Path) -> Store:
    shutil.copytree(with_pools, tmp_path / "pools")
    return Store.open(tmp_path / "pools" / "store")


PLACES = pytest.mark.parametrize("place", [{}, {"experts_on": "disk", "row_cache": 10_000}], ids=["memory", "disk"])
IDS = random_ids(2, 11)


def room_for(store: Store, *names: str, place: dict[str, Any]) -> int:
    """The budget in which base, router and some modules just fit."""
    with Engine(store, **place) as engine, engine.modules.using(names):
        return engine.resident_bytes


def grown(store: Store) -> None:
    grow(store, "letters", "+50", [], GrowConfig(router_samples=8), progress=False)


@PLACES
def test_a_module_in_memory_answers_on_when_it_grows_on_the_disk(pools, place):
    with Engine(pools, memory=with_texts(pools, room_for(pools, "letters", place=place)), **place) as engine:
        wanted = engine.logits(IDS, "letters")
        grown(pools)
        assert torch.equal(engine.logits(IDS, "letters"), wanted)
        answers = [engine.generate("abc", module="letters", max_new_tokens=3)]
        answers += engine.generate_many(["abc", "x"], modules=["letters", None], max_new_tokens=3)
        assert answers[0].tokens == answers[1].tokens
        assert [a.loaded for a in answers] == [[], [], []]
        engine.modules.drop("letters")
        with pytest.raises(BudgetError, match="letters"):  # what it would read now does not fit
            engine.generate("abc", module="letters", max_new_tokens=3)


@pytest.mark.slow
@PLACES
@pytest.mark.parametrize("ask", ["logits", "generate", "many", "mix"])
def test_a_version_in_memory_gives_way_where_the_smaller_one_on_the_disk_fits_beside_others(
    pools, place, ask, monkeypatch
):
    weights = room_for(pools, "letters", "digits", place=place)
    if ask == "logits":
        memory = with_pass(pools, weights)
    else:
        memory = with_texts(pools, weights, copies=2 if ask == "mix" else 1, tokens=131)
    grown(pools)
    assert room_for(pools, "letters", "digits", place=place) > weights
    both = ["letters", "digits"]
    scores = {"letters": 0.6, "digits": 0.4, "none": 0.0}
    monkeypatch.setattr(GaussianRouter, "route", lambda *arguments: [Route("letters", scores)])
    with Engine(pools, memory=memory, **place) as engine:
        old = engine.logits(IDS, "letters")
        take_back(pools, "letters")
        assert torch.equal(engine.logits(IDS, "letters"), old)
        assert engine.modules.counts.evictions == 0
        if ask != "logits":
            found = {
                "generate": lambda: engine.generate("abc", module=both),
                "many": lambda: engine.generate_many(["abc"], modules=[both])[0],
                "mix": lambda: engine.generate("abc", mix=2),
            }[ask]()
            assert sorted(found.mixture or found.modules) == sorted(both)
            assert sorted(found.loaded) == sorted(both)
            assert found.resident_bytes == weights
        answer = engine.logits(IDS, both)
        assert engine.resident_bytes == weights
    with Engine(pools, memory=memory, **place) as fresh:
        assert torch.equal(answer, fresh.logits(IDS, both))


@PLACES
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("file", ["module.safetensors", "module.json"])
def test_a_damaged_newer_version_does_not_stop_the_one_in_memory(pools, place, file, bounded):
    both = ["letters", "digits"]
    memory = with_texts(pools, room_for(pools, *both, place=place)) if bounded else None
    with Engine(pools, memory=memory, **place) as engine:
        wanted = [engine.logits(IDS, "letters"), engine.logits(IDS, both)]
        before = [engine.generate("abc", module=names, max_new_tokens=3).tokens for names in ("letters", both)]
        grown(pools)
        (pools.module("letters").folder / file).write_bytes(b"x")
        assert torch.equal(engine.logits(IDS, "letters"), wanted[0])
        assert torch.equal(engine.logits(IDS, both), wanted[1])
        assert [engine.generate("abc", module=n, max_new_tokens=3).tokens for n in ("letters", both)] == before
        many = engine.generate_many(["abc"] * 3, modules=["letters", "digits", both], max_new_tokens=3)
        assert [many[0].tokens, many[2].tokens] == before
    with pytest.raises(IntegrityError), Engine(pools, **place) as engine:
        engine.logits(IDS, "letters")


def test_weights_of_other_bytes_than_the_manifest_says_are_refused(home):
    store = Store.open(home / "store")
    stored = store.module("digits")
    edit(stored.folder / "module.json", bytes=stored.bytes + 7)
    with Engine(store) as engine, pytest.raises(IntegrityError, match=f"says {stored.bytes + 7:,} bytes"):
        engine.generate("abc", module="digits", max_new_tokens=1)


def test_an_automatic_prompt_opens_the_manifest_of_its_own_module_only(home, monkeypatch):
    with Engine(Store.open(home / "store")) as engine:
        opened: set[str] = set()
        module = Store.module
        monkeypatch.setattr(Store, "module", lambda self, name, *a: (opened.add(name), module(self, name, *a))[1])
        assert engine.generate(domain_text("digits", 990), max_new_tokens=2).module == "digits"
        assert opened == {"digits"}


# Guarantee 4: no mixing


TURNS = ["abc de 01", " and then", " <= >>", " tell me more", " {x}"]


@pytest.mark.parametrize(
    "modules",
    [["letters", "digits"], ["letters", "signs"], ["letters", None], ["letters", "letters", "digits"], [None, "signs"]],
    ids=str,
)
def test_a_conversation_that_changes_its_module_equals_fresh_engines(engine, modules):
    text = ""
    for turn in range(8):
        text += TURNS[turn % len(TURNS)]
        name = modules[turn % len(modules)]
        answer = engine.generate(text, module=name, max_new_tokens=6)
        assert answer.tokens == expected(engine, name, text, 6), turn
        text += answer.text
    with Engine(engine.store) as fresh:
        assert fresh.generate(text, module=modules[0], max_new_tokens=6).tokens == expected(engine, modules[0], text, 6)


def test_two_conversations_with_the_same_words_under_two_modules_stay_apart(home):
    """The same text is kept under one digest and continued under another."""
    with Engine(Store.open(home / "store")) as engine:
        first = engine.generate("abc de", module="letters", max_new_tokens=6)
        text = "abc de" + first.text
        for name in ("digits", "signs", None, "letters"):
            engine.generate("abc de", module="letters", max_new_tokens=6)
            answer = engine.generate(text + " more", module=name, max_new_tokens=6)
            assert answer.tokens == expected(engine, name, text + " more", 6), name


def test_an_updated_module_does_not_continue_what_its_last_version_wrote(home):
    store = Store.open(home / "store")
    text = "abc de" + "?@#" * 7
    with Engine(store) as engine:
        with pytest.MonkeyPatch.context() as patch:
            scripted(engine, "?@#" * 7, patch)  # a character is a token: read again, the answer has the same ids
            engine.generate("abc de", module="letters", max_new_tokens=21)
        add_module(store, store.load_base(), "letters", 77)
        engine.modules.drop("letters")
        answer = engine.generate(text + "&", module="letters", max_new_tokens=6)
        assert answer.tokens == expected(engine, "letters", text + "&", 6)


@pytest.mark.versions
@pytest.mark.parametrize("name", ["letters", "digits", "signs", None])
@pytest.mark.parametrize(
    "said", ["?@#" * 14, "?@#" * 13 + "!", "?@#" * 13 + "<|endoftext|>"], ids=["length", "stop", "end"]
)
def test_a_conversation_is_continued_and_not_computed_anew(home, monkeypatch, said, name):
    """Whatever ended the turn before. Each character is a token, so that the answer read again has the same ids."""
    widths: list[int] = []
    with Engine(Store.open(home / "store")) as engine:
        run = engine.base.run

        def watched(hidden, *arguments, **options):
            widths.append(hidden.shape[1])
            return run(hidden, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            scripted(engine, said, patch)
            engine.generate("abc de", module=name, max_new_tokens=42, stop="!")
        text = "abc de" + said.removesuffix("<|endoftext|>") + "&"
        monkeypatch.setattr(engine.base, "run", watched)
        for salt, widest in (("", len(text) - 1 - BLOCK), ("", len(text) - 1 - BLOCK), ("other", len(text) - 1)):
            widths.clear()
            engine.generate(text, module=name, max_new_tokens=2, salt=salt)
            assert widest <= max(widths) <= widest + 1, salt


@pytest.mark.parametrize("words", [30, 31, 32, 33])
def test_a_module_that_branches_off_earlier_than_the_router_knew_answers_as_ever(home, words):
    """It was learned anew while the engine ran: nothing below its fork was kept where it needs it."""
    store = Store.open(home / "store")
    prompt = domain_text("digits", 5, words=words)
    with Engine(store) as engine:
        assert engine.generate(prompt, max_new_tokens=4).module == "digits"
        add_module(store, store.load_base(), "digits", 7, placement="interleaved", num_layers=2)
        engine.modules.drop("digits")
        wanted = expected(engine, "digits", prompt, 6)
        for _ in range(3):
            assert engine.generate(prompt, max_new_tokens=6).tokens == wanted
            assert engine.generate(prompt, module="digits", max_new_tokens=6).tokens == wanted
        for name in ("letters", None):
            assert engine.generate(prompt, module=name, max_new_tokens=6).tokens == expected(engine, name, prompt, 6)


@pytest.mark.parametrize("salt", [None, 3, b"x"])
def test_a_salt_that_is_no_text_is_refused(engine, salt):
    with pytest.raises(ConfigError, match="salt is"):
        engine.generate("abc", module=None, salt=salt)


def test_the_router_sees_the_same_whether_or_not_a_prefix_is_kept(home):
    text = domain_text("letters", 990)
    with Engine(Store.open(home / "store")) as engine, Engine(engine.store) as fresh:
        for domain in ("letters", "digits", "digits", "signs"):
            kept = engine.generate(text, max_new_tokens=4)
            alone = fresh.generate(text, max_new_tokens=4)
            assert (kept.module, kept.scores, kept.tokens) == (alone.module, alone.scores, alone.tokens)
            text += kept.text + " " + domain_text(domain, 991)


# Concurrency


def test_two_threads_with_two_modules_get_what_each_alone_gets(home):
    store, budget = room_for_one(home)
    with Engine(store, memory=with_texts(store, budget)) as engine:
        wanted = {n: [expected(engine, n, p, 5) for p in PROMPTS] for n in ("letters", "digits")}
        found: dict[str, list[list[int]]] = {}

        def work(name: str) -> None:
            found[name] = [engine.generate(p, module=name, max_new_tokens=5).tokens for p in PROMPTS]

        threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert found == wanted
