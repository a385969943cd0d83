"""Several modules in one text: mixtures and rerouted answers equal whole forward passes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlm.engine import Engine
from growlm.engine.mixing import Posterior, mixture_losses
from growlm.errors import BudgetError, ConfigError
from growlm.modules import ModuleSet
from growlm.router import NONE, GaussianRouter, ProductKeyRouter, Route
from growlm.store import Store
from stores import PLAIN, domain_text, greedy, make_store, with_texts

pytestmark = pytest.mark.usefixtures("one_thread")
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
PROMPT = domain_text("letters", 990, words=4)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    plain = {f: make_store(tmp_path_factory.mktemp(f), f, SHAPES) for f in ("llama", "gemma2", "gpt2")}
    return {**plain, "recalling": make_store(tmp_path_factory.mktemp("recalling"), modules=RECALLING)}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules=PLAIN)
    return home


@pytest.fixture(params=["llama", "gemma2", "gpt2", "recalling"])
def engine(request, stores):
    with Engine(stores[request.param]) as made:
        yield made


@pytest.fixture(scope="module")
def above(tmp_path_factory) -> Store:
    """Of modules above the base, two of which recall."""
    modules = {"letters": {"kind": "recall"}, "digits": {"kind": "blocks+recall"}, "signs": {}}
    return make_store(tmp_path_factory.mktemp("above"), modules=modules)


@pytest.fixture
def plain(home):
    with Engine(Store.open(home / "store")) as made:
        yield made


@pytest.fixture(params=["plain", "above"])
def top(request, above):
    """An engine of modules that answers can be rerouted between."""
    with Engine(above if request.param == "above" else request.getfixturevalue("store")) as made:
        yield made


# Weights


def test_weights_worked_out_by_hand():
    posterior = Posterior(torch.tensor([3.0, 1.0]), share=0.0)
    assert posterior.weights.tolist() == pytest.approx([0.75, 0.25])
    mixed = posterior.mix(torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()).exp()
    assert mixed.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 0.1, 0.75 * 0.5 + 0.25 * 0.9])
    said = posterior.update(torch.tensor([0.5, 0.9]).log())
    assert said == pytest.approx(math.log(0.75 * 0.5 + 0.25 * 0.9))
    assert posterior.weights.tolist() == pytest.approx([0.375 / 0.6, 0.225 / 0.6])


def test_a_share_of_the_weight_returns_to_the_prior():
    posterior = Posterior(torch.tensor([0.5, 0.5]), share=0.1)
    for _ in range(100):
        posterior.update(torch.tensor([0.0, -10.0]))
    # All but certain, and no further: one token of the other kind is enough to turn.
    assert posterior.weights.tolist() == pytest.approx([0.95, 0.05], abs=1e-4)
    posterior.update(torch.tensor([-10.0, 0.0]))
    assert posterior.weights[1] > 0.9


losses = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.floats(0, 30), min_size=k, max_size=k), min_size=1, max_size=30)
)


@given(losses=losses, share=st.sampled_from([0.0, 0.02, 0.5]))
def test_a_mixture_is_never_much_worse_than_its_best_module(losses, share):
    each = torch.tensor(losses, dtype=torch.float64).T
    count, tokens = each.shape
    total = float(mixture_losses(each, torch.ones(count), share).sum())
    assert total >= float(each.amin(0).sum()) - 1e-9
    assert total <= float(each.sum(1).min()) + math.log(count) - (tokens - 1) * math.log(1 - share) + 1e-9
    if share == 0.0:
        assert total == pytest.approx(-float(torch.logsumexp(-each.sum(1) - math.log(count), 0)), abs=1e-9)


def test_a_mixture_follows_a_text_that_changes_its_domain():
    one = torch.cat([torch.full((100,), 0.1), torch.full((100,), 3.0)])
    each = torch.stack([one, one.flip(0)])
    found = mixture_losses(each, torch.ones(2))
    assert float(found.sum()) < 0.3 * float(each.sum(1).min())
    assert float(mixture_losses(each, torch.ones(2), share=0.0).sum()) > 0.9 * float(each.sum(1).min())


# Mixed answers


def mixed_by_whole_passes(engine: Engine, names: list[str], prior: torch.Tensor, ids: list[int], tokens: int):
    """Greedy, without any cache."""
    sets = [ModuleSet(engine.base, [] if n == NONE else [engine.store.load(n, engine.base)]) for n in names]
    posterior, text = Posterior(prior), list(ids)
    for at in range(1, len(ids) + tokens):
        with torch.no_grad():
            each = torch.stack([s.logits(torch.tensor([text[:at]]))[0, -1].float().log_softmax(-1) for s in sets])
        if at >= len(ids):
            text.append(int(posterior.mix(each).argmax()))
            if len(text) == len(ids) + tokens:
                break
        posterior.update(each[:, text[at]])
    return text[len(ids) :], posterior.weights


@pytest.mark.parametrize("mix", [2, 3])
def test_a_mixed_answer_equals_whole_forward_passes(engine, mix):
    engine._loop.writer.end_tokens = set()
    answer = engine.generate(PROMPT, mix=mix, max_new_tokens=8)
    names = list(answer.mixture)
    assert names == list(answer.scores)[:mix]
    scores = torch.tensor([answer.scores[name] for name in names])
    prior = 0.9 * scores / scores.sum() + 0.1 / mix
    ids = engine.tokenizer.encode(PROMPT)
    wanted, weights = mixed_by_whole_passes(engine, names, prior, ids, 8)
    assert answer.tokens == wanted
    assert list(answer.mixture.values()) == pytest.approx(weights.tolist(), abs=1e-4)
    assert sum(answer.mixture.values()) == pytest.approx(1.0)
    best = max(answer.mixture, key=lambda n: answer.mixture[n])
    assert answer.module == (None if best == NONE else best)


def test_a_mixture_of_modules_keeps_to_its_budget_or_says_so(home):
    store = Store.open(home / "store")
    with Engine(store) as engine:
        sizes = sorted(m.bytes for m in store.modules.values())
        fixed = engine.fixed_bytes
        names = [n for n in list(engine.route(PROMPT).scores)[:2] if n != NONE]
    with Engine(store, memory=with_texts(store, fixed + sizes[-1] * len(names), copies=2)) as engine:
        answer = engine.generate(PROMPT, mix=2, max_new_tokens=2)
        assert answer.resident_bytes <= fixed + sizes[-1] * len(names)
        assert sorted(answer.loaded) == sorted(names)
    small = with_texts(store, fixed + sizes[0] * (len(names) - 1) + 1)
    with Engine(store, memory=small) as engine, pytest.raises(BudgetError, match="do not fit together"):
        engine.generate(PROMPT, mix=2, max_new_tokens=2)


def test_streamed_pieces_of_a_mixture_are_its_text(plain):
    *pieces, last = plain.stream(PROMPT, mix=2, max_new_tokens=6)
    assert "".join(pieces) == last.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 4}, "--mix 4: the router knows 3 modules"),
        ({"mix": 0}, "mix is 0"),
        ({"reroute": -1}, "reroute is -1"),
        ({"mix": 2, "module": "letters"}, "leave out --module letters"),
        ({"reroute": 2, "module": None}, "leave out --module"),
        ({"mix": 2, "reroute": 2}, "leave out --reroute"),
    ],
    ids=str,
)
def test_settings_at_odds_are_refused(plain, options, message):
    with pytest.raises(ConfigError, match=message):
        plain.generate(PROMPT, max_new_tokens=2, **options)


def test_no_more_is_mixed_than_the_router_lists(home):
    with Engine(Store.open(home / "store"), router="product-key") as engine:
        assert isinstance(engine.router, ProductKeyRouter)
        assert engine.router.num_listed == 3
        engine.router.top_k = 2
        with pytest.raises(ConfigError, match="--mix 3: the router lists the best 2 of 3 modules; mix at most"):
            engine.generate(PROMPT, mix=3, max_new_tokens=2)
        assert len(engine.generate(PROMPT, mix=2, max_new_tokens=2).mixture) == 2


# Rerouted answers


def scripted(monkeypatch, choices: list[str | None]) -> list[int]:
    """A router that gives these choices in turn; returns how many tokens it was shown each time."""
    shown: list[int] = []
    left = list(choices)

    def route(self, hidden, visible=None, texts=None):
        shown.append(hidden.shape[1])
        assert [len(text) for text in texts] == [hidden.shape[1]]  # of the same tokens
        name = left.pop(0) if len(left) > 1 else left[0]
        return [Route(name, {name or NONE: 1.0})]

    monkeypatch.setattr(GaussianRouter, "route", route)
    return shown


@pytest.mark.parametrize(
    "choices",
    [["letters", "digits", "signs"], ["letters", "letters", "digits"], [None, "signs", None], ["digits"]],
    ids=str,
)
def test_a_rerouted_answer_equals_whole_forward_passes(top, monkeypatch, choices):
    top._loop.writer.end_tokens = set()
    ids = top.tokenizer.encode(PROMPT)
    wanted, text = [], list(ids)
    for name in [*choices, choices[-1], choices[-1]][: max(3, len(choices))]:
        modules = [] if name is None else [top.store.load(name, top.base)]
        part = greedy(top.base, modules, text, 4, end=-1)
        wanted, text = wanted + part, text + part
    shown = scripted(monkeypatch, choices)
    widths = []
    run = type(top.base.layers[0]).forward

    def counted(layer, hidden, *arguments, **options):
        if layer is top.base.layers[0]:
            widths.append(hidden.shape[1])
        return run(layer, hidden, *arguments, **options)

    monkeypatch.setattr(type(top.base.layers[0]), "forward", counted)
    answer = top.generate(PROMPT, reroute=4, max_new_tokens=12)
    assert answer.tokens == wanted
    assert sum(widths) == len(ids) + 11  # every token once, the newest not at all
    assert shown == [len(ids), len(ids) + 4, len(ids) + 8]
    changes = [(0, choices[0])]
    for number, name in enumerate((*choices, choices[-1], choices[-1])[:3]):
        if name != changes[-1][1]:
            changes.append((4 * number, name))
    assert answer.changes == changes
    assert answer.module == changes[-1][1]


def test_rerouting_that_changes_nothing_is_the_plain_answer(top):
    for settings in ({}, {"temperature": 0.9, "top_k": 20, "seed": 5}):
        once = top.generate(PROMPT, module="letters", max_new_tokens=11, **settings)
        with pytest.MonkeyPatch.context() as patch:
            scripted(patch, ["letters"])
            again = top.generate(PROMPT, reroute=3, max_new_tokens=11, **settings)
        assert (again.text, again.tokens, again.finish_reason) == (once.text, once.tokens, once.finish_reason)
        assert again.changes == [(0, "letters")]


@pytest.mark.parametrize(
    "choices", [["digits", "letters", "digits", None, "signs"], ["digits"] * 5], ids=["five", "one"]
)
def test_a_rerouted_answer_of_any_modules_equals_whole_forward_passes(engine, monkeypatch, choices):
    """Modules that change the base's own layers: the base reads the answer for the router."""
    engine._loop.writer.end_tokens = set()
    ids = engine.tokenizer.encode(PROMPT)
    wanted, text = [], list(ids)
    for name in choices:
        modules = [] if name is None else [engine.store.load(name, engine.base)]
        part = greedy(engine.base, modules, text, 4, end=-1)
        wanted, text = wanted + part, text + part
    for _ in range(2):  # the second time with what is kept of the first
        shown = scripted(monkeypatch, choices)
        answer = engine.generate(PROMPT, reroute=4, max_new_tokens=20)
        assert answer.tokens == wanted
        assert shown == [len(ids) + 4 * number for number in range(5)]
        assert answer.changes == [(4 * n, c) for n, c in enumerate(choices) if n == 0 or choices[n - 1] != c]


def test_rerouted_answers_side_by_side_are_those_alone_in_the_memory_of_one_module(stores, monkeypatch):
    """Each gives its module back while the router chooses, and may meet it gone."""
    store = stores["recalling"]

    def route(self, hidden, visible=None, texts=None):
        name = ["digits", "letters", "signs", None][len(texts[0]) // 3 % 4]
        return [Route(name, {name or NONE: 1.0})]

    monkeypatch.setattr(GaussianRouter, "route", route)
    settings = {"reroute": 3, "max_new_tokens": 14, "temperature": 0.9}
    with Engine(store) as engine:
        engine._loop.writer.end_tokens = set()
        alone = [engine.generate(PROMPT, seed=seed, **settings) for seed in range(3)]
        weights = engine.fixed_bytes + max(m.bytes for m in store.modules.values())
    budget = with_texts(store, weights, texts=3)
    with Engine(store, memory=budget) as engine:
        engine._loop.writer.end_tokens = set()
        together = engine.choices(PROMPT, 3, seed=0, **settings)
        assert [a.tokens for a in together] == [a.tokens for a in alone]
        assert [a.changes for a in together] == [a.changes for a in alone]
        assert len({name for _, name in together[0].changes}) == 4
        assert max(a.resident_bytes for a in together) <= budget
        *pieces, last = engine.stream(PROMPT, seed=1, **settings)
        assert ("".join(pieces), last.tokens) == (alone[1].text, alone[1].tokens)
