"""Prompts and texts that a base cannot read are refused in one clear error, before they meet its weights."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from disk import write_jsonl
from growlm import cli
from growlm.base import Base
from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.errors import ClosedError, ConfigError, DataError, GrowlmError, GrowlmWarning
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.harness import HarnessModel
from growlm.modules import ModuleSet
from growlm.store import Store
from growlm.training.config import FinetuneConfig, GrowConfig, LearnConfig, RouterConfig
from growlm.training.finetune import finetune
from growlm.training.general import describe_general
from growlm.training.grow import grow
from growlm.training.learn import learn
from growlm.training.router import train_router
from growlm.usage.usage import count_usage, open_modules
from stores import add_experts, add_module, make_store
from tiny import TEXT, VOCAB, make_base, random_ids, save_base

EXTRA = "<|extra|>"  # its tokenizer has a token of this name, and the base no row for it

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two bases, one of which has a tokenizer that knows more than the base; and text with such a token."""
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules={"letters": {}})
    base = save_base(home / "wide")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([EXTRA])
    tokenizer.save_pretrained(base)
    write_jsonl(base / "heldout.jsonl", [f"{text} {n}" for n in range(6) for text in TEXT])
    with pytest.warns(GrowlmWarning):
        Store.create(home / "wide-store", base)
    write_jsonl(home / "plain.jsonl", [f"{text} {n}" for n in range(20) for text in TEXT])
    write_jsonl(home / "extra.jsonl", [f"{text} {EXTRA} {n}" for n in range(20) for text in TEXT])
    return home


@pytest.fixture(scope="module")
def engine(made):
    with Engine(Store.open(made / "store")) as engine:
        yield engine


@pytest.fixture(scope="module")
def wide(made):
    with Engine(Store.open(made / "wide-store")) as engine:
        yield engine


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Token ids


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([5, VOCAB], str(VOCAB)),
        ([-1, 5], "-1"),
        ([5, 2**70], str(2**70)),
        ([5, True], "True"),
        ([5, 6.0], "6.0"),
        ([5, None], "None"),
        (["a", "b"], "'a'"),
        ([[5, 6]], r"\[5, 6\]"),
        ({"input_ids": [5]}, "input_ids"),
        ([], "empty"),
        (b"abc", "b'abc'"),
        (None, "None"),
        (7, "7"),
        (np.array([5.0]), "5.0"),
        (torch.tensor([True]), "True"),
        (torch.tensor(5), "5"),
    ],
)
def test_a_prompt_of_what_is_no_token_is_refused_everywhere(engine, ids, named):
    for ask in (
        lambda: engine.generate(ids, max_new_tokens=2),
        lambda: engine.generate(ids, module="letters", max_new_tokens=2),
        lambda: engine.generate_many(["abc", ids], max_new_tokens=2),
        lambda: list(engine.stream(ids, max_new_tokens=2)),
        lambda: engine.route(ids),
    ):
        with pytest.raises(DataError, match=named) as caught:
            ask()
        one_line(caught)


def test_what_a_prompt_spells_like_a_special_token_is_letters(engine):
    prompt = "abc <|endoftext|> de"
    ids = engine._prompts.encode(prompt)
    assert engine.tokenizer.eos_token_id not in ids
    assert engine.tokenizer.decode(ids) == prompt
    assert engine._prompts.encode_all([prompt, "abc"], 1)[0] == ids
    assert engine._prompts.encode("abc") == engine.tokenizer.encode("abc", add_special_tokens=False)


def test_an_error_names_the_id_the_vocabulary_and_the_prompt(engine):
    with pytest.raises(DataError) as caught:
        engine.generate_many(["abc", [1, 999]])
    assert one_line(caught).startswith("prompt 2: token id 999 is not in the vocabulary of ")
    assert "0 to 319" in str(caught.value)
    with pytest.raises(ConfigError, match="list"):
        engine.generate_many("abc")


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda ids: [np.int64(i) for i in ids]])
def test_token_ids_may_come_from_any_sequence_of_whole_numbers(engine, make):
    ids = [0, 5, VOCAB - 1]
    assert engine.generate(make(ids), max_new_tokens=4).tokens == engine.generate(ids, max_new_tokens=4).tokens


@pytest.mark.parametrize(
    ("input_ids", "named"),
    [
        (torch.tensor([[5, VOCAB]]), str(VOCAB)),
        (torch.tensor([[-1, 5]]), "-1"),
        (torch.tensor([[5.0]]), "float32"),
        (torch.tensor([[True]]), "bool"),
        (torch.tensor([5]), r"\(1,\)"),
        (torch.tensor([[[5]]]), r"\(1, 1, 1\)"),
        (torch.zeros(0, 3, dtype=torch.long), r"\(0, 3\)"),
        (torch.zeros(3, 0, dtype=torch.long), r"\(3, 0\)"),
        ([[5]], r"\[\[5\]\]"),
        ("abc", "abc"),
    ],
)
def test_logits_are_of_a_batch_of_the_bases_ids(engine, input_ids, named):
    with pytest.raises(DataError, match=named) as caught:
        engine.logits(input_ids)
    one_line(caught)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint16])
def test_logits_take_ids_of_any_whole_number(engine, dtype):
    ids = random_ids(2, 5)
    assert torch.equal(engine.logits(ids.to(dtype)), engine.logits(ids))


def test_ids_are_compared_with_the_rows_of_the_base():
    base = make_base()
    for ids in ([0, VOCAB - 1], np.array([[0, VOCAB - 1]]), torch.tensor([0, VOCAB - 1])):
        base.require_rows(ids, "text")
    for ids in ([0, VOCAB], np.array([[-1, 5]]), torch.tensor([VOCAB])):
        with pytest.raises(DataError, match="text: token id"):
            base.require_rows(ids, "text")


# A tokenizer that knows more than the base


def test_a_tokenizer_that_knows_more_than_its_base_is_told_of_once(made, tmp_path, capsys):
    with pytest.warns(GrowlmWarning) as told:
        Store.create(tmp_path / "store", made / "wide")
    (line,) = {str(w.message) for w in told}
    assert "321 tokens" in line
    assert "rows for 320" in line
    with pytest.raises(SystemExit) as ended:
        cli.main(["new", str(tmp_path / "other"), "--base", str(made / "wide")])
    assert not ended.value.code
    assert capsys.readouterr().err == f"growlm: {line}\n"


def test_text_without_such_a_token_is_answered_and_text_with_it_refused(wide):
    assert wide.generate("abc", max_new_tokens=2).tokens
    for ask in (
        wide.generate,
        wide.route,
        lambda text: list(wide.stream(text)),
        lambda text: wide.generate_many([text]),
    ):
        with pytest.raises(DataError, match=r"token id 320 \('<\|extra\|>'\)"):
            ask(f"abc {EXTRA}")
    chat = Chat(wide, None, max_new_tokens=2)
    with pytest.raises(DataError, match="320"):
        list(chat.say(EXTRA))


LEARN = {"sequence_length": 16, "batch_size": 4, "precision": "float32", "admit_anyway": True, "learning_rate": 3e-3}


def test_no_verb_reads_text_with_a_token_that_the_base_has_no_row_for(made, home, monkeypatch):
    """Each says so before anything of the base has run on it."""
    store = Store.open(home / "wide-store")
    plain, extra = home / "plain.jsonl", home / "extra.jsonl"
    base, tokenizer = store.load_base(), store.load_tokenizer()
    add_module(store, base, "letters", 1)
    add_experts(store, base, "routed", 2, domain="digits")
    modules, _ = open_modules(store.path, ["routed"])
    settings = LearnConfig(num_layers=1, **LEARN)
    learn(store, "law", [plain], settings, progress=False)
    pools = LearnConfig(kind="peer", num_experts=16, num_heads=1, top_k=2, **LEARN)
    learn(store, "pools", [plain], pools, progress=False)
    ran: list[int] = []
    begin = Base.begin
    monkeypatch.setattr(Base, "begin", lambda base, ids, **o: (ran.append(int(ids.max())), begin(base, ids, **o))[1])
    verbs = [
        lambda: learn(store, "more", [extra], settings, progress=False),
        lambda: learn(store, "more", [plain], LearnConfig(num_layers=1, replay=str(extra), **LEARN), progress=False),
        lambda: grow(store, "pools", 4, [extra], GrowConfig(**LEARN), progress=False),
        lambda: describe_general(store, base, tokenizer, [extra]),
        lambda: evaluate(store, {"letters": [extra]}, EvalConfig(), progress=False),
        lambda: count_usage(modules, tokenizer, {"text": [extra]}),
        lambda: finetune(
            home / "wide",
            home / "out",
            [extra],
            FinetuneConfig(sequence_length=16, batch_size=4, precision="float32"),
            progress=False,
        ),
    ]
    for verb in verbs:
        with pytest.raises(DataError, match=r"token id 320 \('<\|extra\|>'\)") as caught:
            verb()
        one_line(caught)
    assert max(ran, default=0) < VOCAB
    assert not (home / "out").exists()
    assert "more" not in store.modules


def test_the_harness_reads_no_such_text(made):
    model = HarnessModel(str(made / "wide-store"), max_length=100)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("abc", f" {EXTRA}"), idx=0)
    with pytest.raises(DataError, match="320"):
        model.loglikelihood([request], disable_tqdm=True)


def test_kept_text_of_another_vocabulary_trains_no_router(home):
    store = make_store(home / "kept", modules={}, keep_samples=1000)
    base = store.load_base()
    add_module(store, base, "letters", 1)
    describe_general(store, base, store.load_tokenizer(), [home / "plain.jsonl"])
    base.vocab_size = 50  # stands for samples of a larger vocabulary
    with pytest.raises(DataError, match="kept text"):
        train_router(store, RouterConfig(), base=base, progress=False)


# Positions


LONG = {"max_position_embeddings": 40}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Store:
    """A base of rotary positions that was made for 40 of them."""
    return make_store(tmp_path_factory.mktemp("short"), modules={"letters": {}}, **LONG)


def test_a_prompt_beyond_the_trained_positions_is_answered_with_a_warning(short):
    with Engine(short) as engine:
        asked = [
            lambda: engine.generate([5] * 33, module=None, max_new_tokens=8),
            lambda: list(engine.stream([5] * 33, module=None, max_new_tokens=8)),
            lambda: engine.generate_many(["a", [5] * 33, [5] * 32], modules=None, max_new_tokens=8),
            lambda: engine.route([5] * 41),
            lambda: engine.logits(torch.full((1, 41), 5)),
        ]
        for ask in asked:
            with pytest.warns(GrowlmWarning) as told:
                assert ask() is not None
            (line,) = [str(w.message) for w in told]
            assert "41 prompt tokens" in line or "33 prompt tokens and 8 new ones" in line
            assert "the 40 positions" in line
        assert len(engine.generate([5] * 32, module=None, max_new_tokens=8).tokens) <= 8  # just fits: no warning
        engine.route([5] * 40)
        engine.logits(torch.full((1, 40), 5))


def test_a_strict_engine_refuses_what_the_base_was_not_made_for(short):
    with Engine(short, strict=True) as engine:
        for ask in (
            lambda: engine.generate([5] * 33, max_new_tokens=8),
            lambda: engine.stream([5] * 33, max_new_tokens=8),
            lambda: engine.generate_many(["a", [5] * 33], max_new_tokens=8),
            lambda: engine.route([5] * 41),
            lambda: engine.logits(torch.full((1, 41), 5)),
        ):
            with pytest.raises(ConfigError, match="40 positions that the base was made for") as caught:
                ask()
            one_line(caught)
        assert engine.generate([5] * 32, max_new_tokens=8).prompt_tokens == 32
        assert engine.route([5] * 40).scores


def test_learned_positions_end_for_logits_and_routes_too(tmp_path):
    with Engine(make_store(tmp_path, "gpt2", modules={}, n_positions=100)) as engine:
        for ask in (lambda: engine.route([5] * 101), lambda: engine.logits(torch.full((1, 101), 5))):
            with pytest.raises(ConfigError, match="101 prompt tokens exceed the base's 100 positions; shorten"):
                ask()
        assert engine.route([5] * 100).module is None
        assert engine.logits(torch.full((1, 100), 5)).shape == (1, 100, VOCAB)


def test_stretched_positions_are_those_that_the_base_was_made_for():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    assert make_base(rope_parameters=rope).trained_positions == 1024
    assert make_base(rope_parameters=rope, max_position_embeddings=2048).trained_positions == 2048
    assert make_base().trained_positions == 256


@pytest.mark.parametrize("verb", ["generate", "route", "chat"])
def test_the_command_line_warns_in_one_line_and_refuses_with_strict(short, verb, capsys, monkeypatch):
    text = "xyz! " * 12
    prompts = {"chat": []}.get(verb, [text])
    for strict in ([], ["--strict"]):
        lines = iter([text])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines, None) or end())
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, str(short.path), *prompts, *strict])
        out, err = capsys.readouterr()
        told = [line for line in err.splitlines() if "positions that the base was made for" in line]
        assert told
        assert bool(out.strip()) != bool(strict)
        assert bool(ended.value.code) == bool(strict)
        if verb == "generate":
            assert len(told) == 1
            assert told[0].startswith("growlm: ")


def end() -> str:
    raise EOFError


# A closed engine


def test_a_closed_engine_says_so(made):
    engine = Engine(Store.open(made / "store"))
    engine.close()
    engine.close()
    for ask in (
        lambda: engine.generate("abc"),
        lambda: engine.stream("abc"),
        lambda: engine.generate_many(["abc"]),
        lambda: engine.generate_many([]),
        lambda: engine.route("abc"),
        lambda: engine.logits(torch.tensor([[5]])),
        engine.__enter__,
    ):
        with pytest.raises(ClosedError, match="closed; make a new one") as caught:
            ask()
        one_line(caught)
        assert isinstance(caught.value, GrowlmError)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_is_open_while_the_engine_closes_ends_with_an_error(made, begun):
    engine = Engine(Store.open(made / "store"))
    written: list[int] = []
    finish = ModuleSet.finish

    def slow(self, *arguments):
        written.append(1)
        time.sleep(0.005)
        return finish(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleSet, "finish", slow)
        engine._loop.writer.end_tokens = set()
        stream = engine.stream("abc", module=None, max_new_tokens=200)
        if begun:
            next(stream)
        engine.close()
        with pytest.raises(ClosedError):
            list(stream)
    assert len(written) < 100


def test_an_answer_that_is_being_written_is_finished_before_the_engine_closes(made, monkeypatch):
    engine = Engine(Store.open(made / "store"))
    wanted = engine.generate("abc", module="letters", max_new_tokens=20).tokens
    started, found = threading.Event(), []
    finish = ModuleSet.finish

    def slow(self, *arguments):
        started.set()
        time.sleep(0.002)
        return finish(self, *arguments)

    monkeypatch.setattr(ModuleSet, "finish", slow)
    answering = threading.Thread(
        target=lambda: found.append(engine.generate("abc", module="letters", max_new_tokens=20).tokens)
    )
    answering.start()
    assert started.wait(60)
    engine.close()
    answering.join()
    assert found == [wanted]


def test_what_waits_for_its_turn_is_told_that_the_engine_was_closed(made):
    engine = Engine(Store.open(made / "store"))
    caught: list[Exception] = []

    def ask() -> None:
        try:
            engine.generate("abc", module=None, max_new_tokens=2)
        except Exception as error:
            caught.append(error)

    with engine._loop.stepping:
        waiting = [threading.Thread(target=ask) for _ in range(3)]
        closing = threading.Thread(target=engine.close)
        for thread in waiting:
            thread.start()
        time.sleep(0.05)
        closing.start()
        while not engine._loop.closed:
            time.sleep(0.001)
    for thread in [*waiting, closing]:
        thread.join()
    assert [type(error) for error in caught] == [ClosedError] * 3


def test_nothing_is_warned_of_where_all_is_well(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate("abc", max_new_tokens=2)
        engine.route("abc")
