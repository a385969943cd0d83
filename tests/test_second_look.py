"""A second look at the router's choice: the module answers only what it reads better than the base does."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disk import write_jsonl
from drills import nothing_is_left
from growlm.cli import main
from growlm.engine import Engine
from growlm.engine.second_look import AT_A_TIME, LONGEST, newest, reads_better
from growlm.engine.workspace import Watch, row_bytes
from growlm.errors import ConfigError
from growlm.evaluation import EvalConfig, evaluate, measure
from growlm.evaluation.harness import HarnessModel
from growlm.evaluation.replay import routers
from growlm.modules import ModuleSet
from growlm.router import Router
from growlm.store import Store
from servers import serving
from stores import domain_ids, domain_text, greedy, make_store, with_texts

# Those that have learned read their domain better than the base, the others, whose weights are drawn, worse.
SHAPES: dict[str, dict[str, Any]] = {
    "digits": {"steps": 40},
    "signs": {"steps": 40, "kind": "lora+recall", "r": 4},
    "letters": {},
    "other": {"kind": "lora", "r": 4, "strength": 0.5},
}
HELPS = {"digits": True, "signs": True, "letters": False, "other": False}
PROMPTS = {name: [domain_text(name, 700 + n) for n in range(4)] for name in HELPS}
TOKENS = 10

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules=SHAPES)
    return home / "store"


@pytest.fixture
def engine(made) -> Iterator[Engine]:
    with Engine(Store.open(made), second_look=True) as opened:
        yield opened
        nothing_is_left(opened)


def answer(engine: Engine, name: str, prompt: str) -> list[int]:
    """What the module writes, or the base where the module reads the prompt no better."""
    modules = [engine.store.load(name, engine.base)] if HELPS[name] else []
    return greedy(engine.base, modules, engine.tokenizer.encode(prompt), TOKENS)


def nats(modules: ModuleSet, ids: list[int]) -> float:
    """Of all tokens but the first, by whole logits."""
    with torch.no_grad():
        logits = modules.logits(torch.tensor([ids]))[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


@given(st.data())
def test_a_module_reads_better_where_the_text_is_likelier_under_it(made, data):
    store = Store.open(made)
    base = store.load_base()
    name = data.draw(st.sampled_from(sorted(HELPS)))
    modules = ModuleSet(base, [store.load(name, base)])
    rows = st.lists(st.integers(0, base.vocab_size - 1), min_size=1, max_size=LONGEST + 20)
    texts = [*data.draw(st.lists(rows, min_size=1, max_size=4)), domain_ids(store.load_tokenizer(), name, 1)[0]]
    wanted = []
    for text in texts:
        seen = text[-LONGEST:]
        gain = nats(ModuleSet(base), seen) - nats(modules, seen) if len(seen) > 1 else 1.0
        wanted.append(None if abs(gain) < 1e-3 else gain > 0)
    found = [reads_better(modules, text) for text in texts]
    assert [better for better, sure in zip(found, wanted, strict=True) if sure is not None] == [
        sure for sure in wanted if sure is not None
    ]


def test_of_a_long_text_the_newest_tokens_are_read_behind_those_that_begin_every_text():
    assert newest(range(LONGEST), 1) == list(range(LONGEST))
    assert newest(range(500), 0) == list(range(500 - LONGEST, 500))
    assert newest(range(500), 1) == [0, *range(501 - LONGEST, 500)]


@pytest.mark.parametrize("name", HELPS)
def test_a_route_is_none_where_the_module_reads_the_prompt_no_better(made, engine, name):
    with Engine(Store.open(made)) as plain:
        for prompt in PROMPTS[name]:
            chosen, looked = plain.route(prompt), engine.route(prompt)
            assert chosen.module == name
            assert looked.module == (name if HELPS[name] else None)
            assert looked.scores == pytest.approx(chosen.scores)


def test_answers_are_the_modules_or_the_bases_own(engine):
    asked = [(name, prompt) for name, prompts in PROMPTS.items() for prompt in prompts]
    engine._loop.writer.end_tokens = set()
    together = engine.generate_many([prompt for _, prompt in asked], max_new_tokens=TOKENS)
    for (name, prompt), found in zip(asked, together, strict=True):
        assert found.module == (name if HELPS[name] else None)
        assert found.tokens == answer(engine, name, prompt)
        assert engine.generate(prompt, max_new_tokens=TOKENS).tokens == found.tokens
        *_, streamed = engine.stream(prompt, max_new_tokens=TOKENS)
        assert (streamed.tokens, streamed.module) == (found.tokens, found.module)


@pytest.mark.parametrize("name", HELPS)
def test_several_answers_to_one_prompt_are_looked_at_once(engine, monkeypatch, name):
    from growlm.engine import loop

    looks = []
    monkeypatch.setattr(loop, "reads_better", lambda *given: looks.append(given) or reads_better(*given))
    found = engine.choices(PROMPTS[name][0], 3, max_new_tokens=TOKENS)
    assert {one.module for one in found} == {name if HELPS[name] else None}
    assert len(looks) == 1
    looks.clear()
    assert engine.generate(PROMPTS[name][0], module=name, max_new_tokens=1).module == name  # it was named
    assert engine.generate("a", max_new_tokens=1, mix=2).tokens
    assert engine.generate(PROMPTS[name][0], max_new_tokens=9, reroute=4).changes[0] == (0, name)
    assert looks == []


@pytest.mark.parametrize("steps", range(5))
def test_those_that_follow_one_who_leaves_are_looked_at_all_the_same(engine, steps):
    requests = engine.submit_several(PROMPTS["letters"][0], 3, max_new_tokens=TOKENS)
    for _ in range(steps):
        engine.step()
    engine.cancel(requests[0])
    while engine.step():
        pass
    assert [request.names for request in requests[1:]] == [(), ()]
    wanted = answer(engine, "letters", PROMPTS["letters"][0])
    assert [request.result.tokens for request in requests[1:] if request.config.temperature == 0] == [wanted] * 2


def test_a_route_takes_room_for_no_more_than_the_module(made):
    """What the text comes to under the module is not asked for."""
    store, prompt = Store.open(made), domain_text("letters", 5, words=60)
    with Engine(store) as engine:
        fixed = engine.fixed_bytes + store.module("letters").bytes
        tokens = len(engine.tokenizer.encode(prompt))
    memory = with_texts(store, fixed, texts=1, tokens=tokens, slots=store.manifest.routing_layer or 3)
    for second_look in (False, True):
        with Engine(store, memory=memory, second_look=second_look) as engine:
            assert engine.route(prompt).module == (None if second_look else "letters")
            assert engine.used_bytes <= memory


def test_many_threads_in_a_budget_get_what_each_alone_gets(made):
    store = Store.open(made)
    sizes = [stored.bytes for stored in store.modules.values()]
    with Engine(store, second_look=True) as engine:
        weights = engine.fixed_bytes + 2 * max(sizes)
    memory = with_texts(store, weights, texts=2, tokens=256) + 2 * AT_A_TIME * row_bytes(store.load_base())
    with Engine(store, memory=memory, max_batch=4, second_look=True) as engine, ThreadPoolExecutor(4) as pool:
        engine._loop.writer.end_tokens = set()
        asked = [(name, prompt) for name, prompts in PROMPTS.items() for prompt in prompts] * 2
        found = pool.map(lambda one: engine.generate(one[1], max_new_tokens=TOKENS), asked)
        for (name, prompt), given in zip(asked, found, strict=True):
            assert given.tokens == answer(engine, name, prompt)
            assert engine.used_bytes <= memory
        nothing_is_left(engine)


def test_over_http_too(made):
    with serving(made, engine={"second_look": True}) as served:
        for name, helps in HELPS.items():
            body = {"prompt": PROMPTS[name][0], "max_tokens": 4, "temperature": 0}
            told = served.post("/v1/completions", model="auto", **body).json()["growlm"]
            assert told["module"] == (name if helps else None)
            assert told.get("refused") == (None if helps else name)
            assert served.post("/v1/completions", model=name, **body).json()["growlm"]["module"] == name


def test_what_a_chat_has_looked_at_is_counted(made):
    with serving(made, engine={"second_look": True}) as served:
        for name, helps in HELPS.items():
            chat = {"messages": [{"role": "user", "content": PROMPTS[name][0]}], "max_tokens": 4}
            told = served.post("/v1/chat/completions", **chat).json()["growlm"]
            assert (told["module"], told.get("refused")) == ((name, None) if helps else (None, name))
            assert f'growlm_module_loads_total{{module="{name}"}} 1.0' in served.http.get("/metrics").text


def test_commands_take_it(made, capsys, monkeypatch):
    def said(*command: str, status: int = 0) -> Any:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--second-look"])
        assert ended.value.code == status
        out, err = capsys.readouterr()
        return err if status else tuple(json.loads(out)[key] for key in ("module", "refused"))

    for name, helps in HELPS.items():
        wanted = (name, None) if helps else (None, name)
        assert said("route", str(made), PROMPTS[name][0], "--json") == wanted
        assert said("generate", str(made), PROMPTS[name][0], "--json", "--max-new-tokens", "2") == wanted
    main_said = "the router chose letters, which reads the prompt no better than the base"
    for command in (["route"], ["generate", "--max-new-tokens", "2"]):
        with pytest.raises(SystemExit):
            main([command[0], str(made), PROMPTS["letters"][0], "--second-look", *command[1:]])
        assert main_said in "".join(capsys.readouterr())
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS["letters"][0]))
    with pytest.raises(SystemExit):
        main(["chat", str(made), "--second-look", "--max-new-tokens", "2"])
    assert f"[base: {main_said}]" in capsys.readouterr().err
    assert "--second-look: with --ray" in said("serve", str(made), "--ray", "local", status=1)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "abc", "--mix", "2"],
        ["generate", "abc", "--reroute", "4"],
        ["generate", "abc", "--module", "signs"],
        ["chat", "--module", "base"],
    ],
    ids=" ".join,
)
def test_where_it_would_do_nothing_it_is_refused(made, capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command[0], str(made), *command[1:], "--second-look"])
    assert ended.value.code == 1
    assert f"--second-look: of no effect with {command[-2]}, " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="second_look is of no effect where module is given"):
        HarnessModel(str(made), module="signs", second_look="true")


def test_evaluation_measures_what_it_does(made, tmp_path):
    data = {name: [str(write_jsonl(tmp_path / f"{name}.jsonl", PROMPTS[name]))] for name in HELPS}
    plain, looked = (evaluate(Store.open(made), data, EvalConfig(second_look=on)).to_json() for on in (False, True))
    for name, helps in HELPS.items():
        assert plain["routing"]["confusion"][name][name] == 4
        assert looked["routing"]["confusion"][name][name if helps else "none"] == 4
        row = looked["perplexity"][name]
        assert row["routed"] == pytest.approx(min(row["base"], row["module"]))
    assert looked["routing"]["retained_gain"] >= 1
    assert [found["settings"]["second_look"] for found in (plain, looked)] == [False, True]
    assert looked["settings"]["router"] == "gaussian"
    assert looked["routing"]["calibration"] == plain["routing"]["calibration"]  # the router's own


@pytest.mark.parametrize("room", ["one", "all"])
def test_evaluation_fits_where_it_fits_without(made, tmp_path, monkeypatch, room):
    """A router of the replay and modules that it chose never stand side by side."""
    store = Store.open(made)
    data = {name: [str(write_jsonl(tmp_path / f"{name}.jsonl", PROMPTS[name]))] for name in HELPS}
    sizes = [stored.bytes for stored in store.modules.values()]
    with Engine(store, memory="1GB") as engine:
        fixed = engine.fixed_bytes + engine.workspace_bytes
    memory, stages = fixed + (max(sizes) if room == "one" else sum(sizes)) + 100, []

    def watched(engine: Engine, of: Any) -> Iterator[Router]:
        for router in routers(engine, of):
            stages.append(engine.resident_bytes + engine.workspace_bytes + router.num_bytes())
            yield router

    monkeypatch.setattr(measure, "routers", watched)
    assert evaluate(store, data, EvalConfig(second_look=True), memory=memory).to_json()["matrix"]
    assert len(stages) == 3
    assert max(stages) <= memory


def test_the_harness_takes_it(made):
    texts = [prompts[0] for prompts in PROMPTS.values()]
    model = HarnessModel(str(made), max_length=200, second_look="true")
    found = model._modules_of([model.tok_encode(text) for text in texts])
    assert found == [name if helps else None for name, helps in HELPS.items()]


@pytest.mark.parametrize("name", ["digits", "other", "signs"])
def test_a_look_takes_no_more_than_what_is_set_aside_for_a_pass(made, name):
    store = Store.open(made)
    with Engine(store, memory="1GB", max_batch=1, second_look=True) as engine:
        modules = ModuleSet(engine.base, [store.load(name, engine.base)])
        with Watch() as watch:
            reads_better(modules, list(range(100, 100 + 2 * LONGEST)))
        assert 0 < watch.peak <= engine.workspace_bytes
