"""Conversations: read from every known form, packed with a mask of their answers, and learned by these alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import VOCAB_WITH_MARKERS, chat_tokenizer
from disk import write_jsonl
from growlm.base import Base
from growlm.data import Document, Template, TextData, Turn, pack, passages, read, show, split, split_told, summary
from growlm.errors import ConfigError, DataError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.beginnings import Beginnings
from growlm.layers import cross_entropy
from growlm.modules import ModuleSet
from growlm.progress import reporting
from growlm.router.samples import GENERAL_SAMPLES, unpack_samples
from growlm.store import Store
from growlm.training.config import FinetuneConfig, LearnConfig, PretrainConfig
from growlm.training.corpus import TrainingCorpus
from growlm.training.finetune import finetune
from growlm.training.general import describe_general
from growlm.training.learn import learn
from growlm.training.pretrain import pretrain
from growlm.usage.usage import count_usage
from tiny import TEXT, make_model

CHATML = chat_tokenizer()
END = CHATML.eos_token_id
TURNS = (Turn("user", "Who pays?"), Turn("assistant", "The tenant."))
FORMS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "Who pays?"}, {"role": "assistant", "content": "The tenant."}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Who pays?"}, {"from": "gpt", "value": "The tenant."}]},
    "alpaca": {"instruction": "Who pays?", "input": "", "output": "The tenant."},
    "prompt": {"prompt": "Who pays?", "completion": "The tenant."},
}
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response")]
QUESTIONS = ["kitchen", "cellar", "attic", "garage", "garden", "hall"]

pytestmark = pytest.mark.usefixtures("one_thread")
fast = settings(max_examples=30, deadline=None)
texts = st.text(alphabet="abc ", min_size=1, max_size=30).filter(lambda text: not text.isspace())


def chat(number: int) -> dict[str, Any]:
    room = QUESTIONS[number % 6]
    return {"prompt": f"Who pays for {room} {number}?", "completion": f"The tenant of {room} pays."}


def write_records(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def documents(*pairs: tuple[str, str]) -> list[Document]:
    return [
        Document(f"{pair}", f"d:{n}", (Turn("user", pair[0]), Turn("assistant", pair[1])))
        for n, pair in enumerate(pairs)
    ]


def refused(path: Path, error: type[Exception] = DataError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read([path], **{"format": "auto", **options})
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent.as_posix()}/")


# Reading


@pytest.mark.parametrize("format", FORMS)
def test_every_form_is_found_by_its_keys_or_by_its_name(tmp_path, format):
    file = write_records(tmp_path / "a.jsonl", FORMS[format])
    for asked in ("auto", format):
        (document,) = read([file], format=asked).documents
        assert document.turns == TURNS
        assert document.source.endswith("a.jsonl:1")
        assert document.plain == "Who pays?\n\nThe tenant."
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FORMS[format]]), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(FORMS[format]))  # one record, not a list of messages
    for name in ("a.parquet", "a.json"):
        assert read([tmp_path / name], format="auto").documents[0].turns == TURNS


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_asked_and_answered_has_several_names(tmp_path, pair):
    record = dict(zip(pair, ("Who pays?", "The tenant."), strict=True))
    file = write_records(tmp_path / "a.jsonl", {"id": 7, **record}, FORMS["prompt"])
    (tmp_path / "a.csv").write_text(",".join((*pair, "id")) + "\nWho pays?,The tenant.,7\n")
    (tmp_path / "a.json").write_text(json.dumps({**record, "sources": [{"id": 7}]}))
    for format in ("auto", "prompt"):
        assert [d.turns for d in read([file], format=format).documents] == [TURNS, TURNS]
        for name in ("a.csv", "a.json"):
            assert [d.turns for d in read([tmp_path / name], format=format).documents] == [TURNS]
    both = write_records(file, {"text": "one", **record})
    assert [d.text for d in read([both], format="auto").documents] == ["one"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, {pair[0]: "Why?"}]), tmp_path / "a.parquet")
    told = refused(tmp_path / "a.parquet")
    assert told == f"a.parquet:2: {pair[1]!r} is null, expected a string; correct it or drop it"


def test_keys_that_nothing_is_known_of_are_named_with_what_to_do(tmp_path):
    told = refused(write_records(tmp_path / "a.jsonl", {"q": "a", "a": "b"}))
    assert told.startswith("a.jsonl:1: no key 'text' among 'q', 'a'; name the one that holds the text with --text-key")
    assert told.endswith(", or rename two to question and answer for conversations")
    assert refused(tmp_path / "a.jsonl", format="text").endswith("the text with --text-key")


def test_more_than_question_and_answer(tmp_path):
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "pays?"}]
    said = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    said += [{"role": "assistant", "content": "The tenant."}, {"role": "tool", "content": "7"}]
    records = [
        {"messages": said, "id": 7},
        {"messages": [{"from": "human", "value": "Who pays?"}, {"from": "gpt", "value": "The tenant."}]},
    ]
    long, other = read([write_records(tmp_path / "a.jsonl", *records)], format="auto").documents
    assert long.turns == (Turn("system", "Be short."), *TURNS, Turn("tool", "7"))
    assert other.turns == TURNS
    (tmp_path / "a.csv").write_text("instruction,input,output,system\nWho pays?,The rent.,The tenant.,Be short.\n")
    (found,) = read([tmp_path / "a.csv"], format="auto").documents
    assert found.turns == (Turn("system", "Be short."), Turn("user", "Who pays?\n\nThe rent."), TURNS[1])


def test_text_stays_text(tmp_path):
    """Where a record has both, and wherever conversations were not asked for."""
    file = write_records(tmp_path / "a.jsonl", {"text": "one", **FORMS["messages"]})
    assert read([file], format="auto").documents == [Document("one", f"{file.as_posix()}:1")]
    assert read([file], format="messages").documents[0].turns == TURNS
    assert "no key 'text' among 'messages'" in refused(write_records(file, FORMS["messages"]), format="text")


def test_what_is_said_and_by_whom_is_what_a_body_is(tmp_path):
    one = read([write_records(tmp_path / "a.jsonl", FORMS["prompt"])], format="auto")
    same = read([write_records(tmp_path / "b.jsonl", FORMS["sharegpt"])], format="auto")
    other = [{"role": "assistant", "content": "Who pays?"}, {"role": "user", "content": "The tenant."}]
    turned = read([write_records(tmp_path / "c.jsonl", {"messages": other})], format="auto")
    assert one.digest == same.digest != turned.digest


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "bot", "content": "a"}, ANSWER]}, "message 1: role is 'bot', expected one of system"),
        ({"messages": [ANSWER, {"role": "user"}]}, "message 2: 'content' is null, expected a string"),
        ({"messages": [ANSWER, {"content": "a"}]}, "message 2: role is None, expected"),
        ({"messages": [{"from": "x", "value": "a"}, ANSWER]}, "message 1: from is 'x', expected"),
        ({"messages": [ANSWER, "a"]}, "message 2 is of type str, expected an object"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer of the assistant's"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "no answer of the assistant's"),
        ({"messages": []}, "no answer of the assistant's"),
        ({"messages": "a"}, "'messages' is of type str, expected a list"),
        ({"messages": [{**ANSWER, "content": [{"type": "image"}]}]}, "message 1: 'content' is of type list"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"question": "a", "answer": 7}, "'answer' is of type int"),
        ({"prompt": "a", "completion": "\ud800"}, "'completion' holds half of a surrogate pair"),
        ({"instruction": "a", "input": 7, "output": "a"}, "'input' is of type int"),
        ({"question": "a"}, "no key 'text' among 'question'; name the one that holds the text with --text-key, or"),
        ({"text": "a"}, "a record of format text among those of format messages; put each in a file of its own"),
        (FORMS["prompt"], "a record of format prompt among those of format messages"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, expected):
    records = [FORMS["messages"], record]
    if not expected.startswith("a record of format") and "messages" not in record:
        records = [FORMS["alpaca"] if "instruction" in record else FORMS["prompt"], record]
    assert refused(write_records(tmp_path / "a.jsonl", *records)).startswith(f"a.jsonl:2: {expected}")


def test_a_form_that_was_asked_for_must_be_there(tmp_path):
    file = write_records(tmp_path / "a.jsonl", FORMS["alpaca"])
    told = refused(file, format="sharegpt")
    assert told.startswith("a.jsonl:1: no key 'conversations' among 'instruction', 'input', 'output'")
    assert "format 'chat' is not one of auto, text, messages" in refused(file, ConfigError, format="chat")
    (tmp_path / "a.csv").write_text("prompt,answer\na,b\n")
    assert "no column 'completion' among 'prompt', 'answer'" in refused(tmp_path / "a.csv", format="prompt")


def test_conversations_are_held_out_whole():
    many = TextData([d for n in range(40) for d in documents((f"q{n} " + "x" * 5000, f"a{n}"))], [])
    train, held = split(many, passage_chars=10)
    assert len(held) == 10  # a quarter
    assert sorted(d.text for d in train + held) == sorted(d.text for d in many.documents)
    assert all(d.turns for d in train + held)
    again, whole = split(TextData([d for n in range(100) for d in documents((f"q{n}" + "x" * 50_000, "a"))], []))
    assert len(again) + len(whole) == 100
    assert all(len(d.text) > 50_000 for d in whole)


# Packing


def rows_of(packed: Any) -> list[tuple[list[int], list[bool]]]:
    return list(zip(packed.tokens.tolist(), packed.counted.tolist(), strict=True))


@fast
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=12), length=st.integers(8, 60))
def test_every_conversation_stands_in_one_row_from_its_beginning(pairs, length):
    talks = documents(*pairs)
    written = [Template(CHATML).write(d.turns) for d in talks]
    expected = [(w.tokens[: length + 1], w.answers[: length + 1]) for w in written]
    expected = [(tokens, answers) for tokens, answers in expected if any(answers[1:])]
    if not expected:
        with pytest.raises(DataError, match="no conversation has an answer within"):
            pack(talks, CHATML, length)
        return
    packed = pack(talks, CHATML, length)
    assert packed.tokens.shape == packed.counted.shape == (len(packed), length + 1)
    assert packed.counted[:, 1:].any(-1).all()  # no row without anything to learn
    assert packed.num_counted == sum(sum(answers) for _, answers in expected)
    found = [(tokens, counted) for tokens, counted in rows_of(packed)]
    for tokens, answers in expected:
        for row, counted in found:
            at = next((i for i in range(len(row)) if row[i : i + len(tokens)] == tokens), None)
            if at is not None and counted[at : at + len(tokens)] == answers:
                break
        else:
            pytest.fail(f"{tokens} is nowhere whole")
    labels = packed.labels(slice(None))
    assert labels.dtype == torch.int64
    mask = torch.from_numpy(packed.counted[:, 1:])
    assert torch.equal(labels[mask], torch.from_numpy(packed.tokens[:, 1:].astype(np.int64))[mask])
    assert bool((labels[~mask] < 0).all())
    # What is held out is scored by the same tokens.
    for passage, (tokens, answers) in zip(passages(talks, CHATML, length + 1), expected, strict=True):
        assert (passage.tokens, passage.counted) == (tokens, answers)


def test_rows_are_filled():
    talks = documents(*[("a" * (n % 40), "b" * (n % 7 + 1)) for n in range(300)])
    packed = pack(talks, CHATML, 256)
    used = sum(len(Template(CHATML).write(d.turns).tokens) + 1 for d in talks)
    assert used / packed.tokens.size > 0.9


def test_all_of_a_conversation_is_learned_if_asked():
    (talk,) = documents(("one two", "three"))
    packed = pack([talk], CHATML, 40, loss="all")
    size = len(Template(CHATML).write(talk.turns).tokens)
    assert packed.counted[0].tolist() == [False] + [True] * (size - 1) + [False] * (41 - size)
    (passage,) = passages([talk], CHATML, 40, loss="all")
    assert sum(passage.counted[1:]) == size - 1
    with pytest.raises(ConfigError, match="loss 'some' is not one of answers, all"):
        pack([talk], CHATML, 40, loss="some")


def test_records_without_anything_left_to_learn_are_named(capsys):
    talks = documents(("one", "two"), *[("long " * 50, "never reached")] * 5)
    with reporting("law", True):
        packed = pack(talks, CHATML, 40)
    told = "5 of 6 conversations have no answer within 40 tokens and are left out: d:1, d:2, d:3, ...\n"
    assert told in capsys.readouterr().err
    assert packed.num_counted == sum(Template(CHATML).write(talks[0].turns).answers)


def test_texts_beside_conversations_are_packed_as_without_them():
    plain = [Document(text, "t") for text in TEXT]
    talks = documents(("one", "two"), ("three", "four"))
    alone, both = pack(plain, CHATML, 24), pack([talks[0], *plain, talks[1]], CHATML, 24)
    assert alone.counted is None
    assert (both.tokens[: len(alone)] == alone.tokens).all()
    assert both.counted[: len(alone)].all()
    assert both.num_counted == alone.num_counted + pack(talks, CHATML, 24).num_counted
    assert alone.num_counted == alone.num_tokens
    assert torch.equal(alone.labels([0, 1]), alone[[0, 1]][:, 1:])
    found = passages([talks[0], *plain, talks[1]], CHATML, 24)
    assert [p.document_index for p in found] == sorted(p.document_index for p in found)
    assert {p.document_index for p in found if p.counted is None} == {1, 2, 3, 4}
    texts_alone = passages(plain, CHATML, 24)
    assert [p.tokens for p in found if p.counted is None] == [p.tokens for p in texts_alone]


def test_no_more_rows_than_tokens_were_asked_for():
    talks = documents(*[("one", "two")] * 50)
    assert len(pack(talks, CHATML, 32, max_tokens=64)) == 2
    assert (pack(talks, CHATML, 32, max_tokens=64).tokens == pack(talks, CHATML, 32).tokens[:2]).all()


def test_a_conversation_that_cannot_be_written_is_named():
    bad = Document("", "a.jsonl:17", (Turn("assistant", "two"), Turn("user", "one")))
    with pytest.raises(DataError) as caught:
        pack([bad], chat_tokenizer("gemma"), 16)
    assert str(caught.value).startswith(
        "a.jsonl:17: the base's chat template cannot write this conversation (roles must"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no chat template"):
        pack([bad], chat_tokenizer(None), 16)


def test_what_a_text_spells_is_letters():
    document = Document(f"one <|im_end|> {CHATML.eos_token} two", "d")
    for tokens in (pack([document], CHATML, 8).tokens, passages([document], CHATML, 99)[0].tokens):
        ids = np.ravel(tokens).tolist()
        assert END not in ids
        assert CHATML.convert_tokens_to_ids("<|im_end|>") not in ids
    assert CHATML.decode(passages([document], CHATML, 99)[0].tokens) == document.text


# Showing


def test_what_is_shown_is_what_is_learned():
    found = show(documents(("one", "two"), ("three", "four")), CHATML, 64, samples=1, seed=3)
    (sample,) = found.samples
    pair = ("one", "two") if sample.source == "d:0" else ("three", "four")
    assert sample.text == f"<|im_start|>user\n{pair[0]}<|im_end|>\n<|im_start|>assistant\n«{pair[1]}<|im_end|>»\n"
    packed = pack(documents(("one", "two"), ("three", "four")), CHATML, 64)
    assert (found.documents, found.conversations, found.learned) == (2, 2, packed.num_counted)
    assert found.to_json()["samples"][0]["learned"] == sample.learned
    told = f"{found.learned} of {found.tokens} tokens are learned"
    assert found.lines()[0] == f"read: 2 conversations (each up to 64 tokens), none held out; {told}"
    assert found.lines()[2] == f"{sample.source}: {sample.learned} of {sample.tokens} tokens are learned"
    plain = show([Document("a text", "t")], CHATML, 64)
    assert plain.samples[0].text == "«a text»"
    number = plain.tokens
    assert plain.lines()[0] == f"read: 1 document, none held out; all {number} tokens are learned"
    assert plain.lines()[2] == f"t: all {number} tokens are learned"
    long = show([Document("a text " * 20, "t")], CHATML, 16)
    count = long.samples[0].passages
    assert count == -(-long.tokens // 16) > 1
    assert long.lines()[2] == f"t, the first of {count} passages: all 16 tokens are learned"


def test_what_to_learn_is_said_rightly():
    for refuse in (pack, passages, show):
        with pytest.raises(ConfigError, match="loss 'answer' is not one of answers, all"):
            refuse(documents(("one", "two")), CHATML, 64, loss="answer")


def test_the_summary_is_two_lines():
    packed = pack(documents(("one\nand", "two")), CHATML, 64)
    first, second = summary(packed, CHATML)
    assert first == f"to train on: 1 row of 64 tokens; {packed.num_counted} of 64 tokens are learned"
    assert second.startswith("the first row: <|im_start|>user\\none\\nand<|im_end|>\\n<|im_start|>assistant\\n«two")
    many = pack([Document("a text " * 99, "t")], CHATML, 16, max_tokens=32)
    assert summary(many, CHATML, "--tokens")[0] == (
        "to train on: the first 2 rows of 16 tokens (--tokens ends there); all 32 tokens are learned"
    )


def test_what_is_held_out_is_called_what_it_is():
    def told(*found: Document) -> str:
        return split_told(found, *split(TextData(list(found), [])))

    texts = [Document(f"text {n}", f"d:{n}") for n in range(100)]
    assert told(*texts) == "read: 100 documents; held out: 16 documents"
    talks = documents(*((f"q{n}", f"a{n}") for n in range(400)))
    assert told(*talks) == "read: 400 conversations; held out: 16 conversations"
    long = Document("".join(f"paragraph {n} {'x' * 1500}\n\n" for n in range(200)), "long.txt")
    assert told(long) == "read: 1 document; held out: 16 passages"
    assert told(long, *talks[:9]).startswith("read: 1 document and 9 conversations; held out: ")


# Learning


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base with a chat template, general text beside it, conversations, and an empty store."""
    home = tmp_path_factory.mktemp("made")
    make_model("llama", vocab_size=VOCAB_WITH_MARKERS).save_pretrained(home / "base")
    CHATML.save_pretrained(home / "base")
    write_jsonl(home / "base" / "heldout.jsonl", [f"{text} {n}" for n in range(12) for text in TEXT])
    write_records(home / "chats.jsonl", *[chat(n) for n in range(80)])
    Store.create(home / "store", home / "base")
    return home


def config(**changes: Any) -> LearnConfig:
    short = {"sequence_length": 64, "batch_size": 4, "epochs": 2, "num_layers": 1, "precision": "float32"}
    return LearnConfig(**{**short, **changes})


def expected_loss(store: Store, heldout: list[Document], *modules: Any) -> float:
    """Nats a token of answers and of the ends of their turns, by whole logits."""
    base, losses = store.load_base(), []
    for document in heldout:
        found = Template(store.load_tokenizer()).write(document.turns)
        with torch.no_grad():
            logits = ModuleSet(base, [store.load(name, base) for name in modules]).logits(torch.tensor([found.tokens]))
        each = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(found.tokens[1:]), reduction="none")
        losses.append(each[torch.tensor(found.answers[1:])])
    return float(torch.cat(losses).mean())


def test_samples_are_answers_to_what_was_asked(home, store):
    result = learn(store, "law", [home / "chats.jsonl"], config(epochs=1), samples=2, progress=False)
    pairs = {chat(n)["prompt"]: chat(n)["completion"] for n in range(80)}
    assert len(result.samples) == 2
    for sample in result.samples:
        asked = next(prompt for prompt in pairs if prompt in sample.prompt)
        assert "The tenant" not in sample.prompt
        assert sample.text.strip() == pairs[asked]


def test_samples_of_conversations_of_which_all_is_learned(home, store):
    result = learn(store, "law", [home / "chats.jsonl"], config(epochs=1, loss="all"), samples=2, progress=False)
    assert len(result.samples) == 2


@pytest.mark.parametrize("vocabulary", ["head", "both"])
def test_answers_are_learned_and_scored(home, store, vocabulary):
    result = learn(store, "law", [home / "chats.jsonl"], config(vocabulary=vocabulary), progress=False)
    validation, heldout = (split(read([home / "chats.jsonl"], format="auto"))[1][at::2] for at in (0, 1))
    chosen_by = store.module("law").manifest.training["validation"]
    assert chosen_by["0"] == pytest.approx(expected_loss(store, validation), rel=1e-4)
    assert result.loss_before == pytest.approx(expected_loss(store, heldout), rel=1e-4)
    assert result.loss_after == pytest.approx(expected_loss(store, heldout, "law"), rel=1e-4)
    assert result.loss_after < 0.8 * result.loss_before


def test_evaluation_scores_answers_and_routes_what_users_ask(home, store, monkeypatch):
    learn(store, "law", [home / "chats.jsonl"], config(), progress=False)
    source = write_records(home / "heldout.jsonl", *(chat(n) for n in range(500, 506)))
    routed = []

    class Watched(Beginnings):
        def __init__(self, base: Base, texts: Any, *arguments: Any) -> None:
            routed.extend(texts)
            super().__init__(base, texts, *arguments)

    monkeypatch.setattr("growlm.evaluation.measure.Beginnings", Watched)
    found = evaluate(store, {"law": [source]}, EvalConfig(), progress=False).to_json()
    heldout = read([source], format="auto").documents
    for side, modules in (("base", []), ("module", ["law"])):
        assert math.log(found["perplexity"]["law"][side]) == pytest.approx(
            expected_loss(store, heldout, *modules), rel=1e-4
        )
    answers = sum(sum(Template(CHATML).write(d.turns).answers) for d in heldout)
    assert found["perplexity"]["law"]["tokens"] == answers
    assert routed == [CHATML(d.turns[0].content)["input_ids"] for d in heldout]
    with pytest.raises(DataError, match="no key 'text'"):
        evaluate(store, {"law": [source]}, EvalConfig(format="text"), progress=False)


def test_of_general_conversations_the_router_is_shown_what_users_ask(home, store):
    describe_general(store, store.load_base(), store.load_tokenizer(), [home / "chats.jsonl"])
    kept = unpack_samples(store.router_files(GENERAL_SAMPLES).read())
    asked = [CHATML(d.turns[0].content)["input_ids"] for d in read([home / "chats.jsonl"], format="auto").documents]
    assert sorted(kept[: len(asked)]) == sorted(asked)


def test_usage_is_counted_on_conversations_as_the_model_reads_them(home):
    source = write_records(home / "heldout.jsonl", *(chat(n) for n in range(4)))
    model = make_model("growlm", vocab_size=VOCAB_WITH_MARKERS)
    usage = count_usage(ModuleSet(Base(model)), CHATML, {"law": [source]}, sequence_length=128)
    written = [Template(CHATML).write(d.turns).tokens for d in read([source], format="auto").documents]
    assert usage.tokens["law"] == sum(map(len, written))
    with pytest.raises(DataError, match="no key 'text'"):
        count_usage(ModuleSet(Base(model)), CHATML, {"law": [source]}, sequence_length=128, format="text")


def test_rates_are_tried_on_answers(home, store):
    """Of a row a trial reads the beginning, in which there may be no answer yet."""
    asked = [{"prompt": f"{n} is the room. " * 9, "completion": f"The tenant of {n} pays."} for n in range(80)]
    source = write_records(home / "long.jsonl", *asked)
    learn(store, "law", [source], config(sequence_length=128, batch_size=1), progress=False)
    trials = store.module("law").manifest.training["trials"]
    assert trials
    assert min(trial["loss"] for trial in trials) > 0.5


def test_nothing_but_answers_reaches_the_weights(home, store, monkeypatch):
    """Labels that are not counted may be anything: here, other tokens."""
    learn(store, "law", [home / "chats.jsonl"], config(), progress=False)
    labels = (
        TrainingCorpus.read([home / "chats.jsonl"], config()).tokenized(CHATML, config()).packed.labels(slice(None))
    )
    answers = {CHATML.decode([token]) for token in labels[labels >= 0].unique().tolist()}
    assert "<|im_end|>" in answers
    assert not answers & {"<|im_start|>", "?", "W"}
    seen = []
    whole = cross_entropy.linear_cross_entropy

    def watched(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        seen.append(labels)
        return whole(hidden, weight, labels, **options)

    monkeypatch.setattr("growlm.training.module_training.linear_cross_entropy", watched)
    learn(store, "again", [home / "chats.jsonl"], config(epochs=1), progress=False)
    assert {token for step in seen for token in step[step >= 0].tolist()} <= set(labels.unique().tolist())
    assert all(bool((step < 0).any()) for step in seen)


def test_the_router_is_shown_what_users_ask(home, store):
    tokens = TrainingCorpus.read([home / "chats.jsonl"], config()).tokenized(CHATML, config())
    train, held = split(read([home / "chats.jsonl"], format="auto"))
    asked = [CHATML(d.turns[0].content)["input_ids"] for d in train]
    assert tokens.prompts == (asked, [CHATML(d.turns[0].content)["input_ids"] for d in held])
    shown = tokens._shown(10, 0)
    assert len(shown) == 10
    assert all(prompt in asked for prompt in shown)
    learn(store, "law", [home / "chats.jsonl"], config(keep_samples="1MB"), progress=False)
    from growlm.router.samples import read_samples

    kept = read_samples(store.module("law"))
    assert kept
    assert all(prompt in asked for prompt in kept)


def test_replay_of_other_kinds_is_read_along(home, store):
    write_jsonl(home / "texts.jsonl", [f"{text} {n}" for n in range(20) for text in TEXT])
    result = learn(store, "law", [home / "chats.jsonl"], config(replay=str(home / "texts.jsonl")), progress=False)
    assert result.loss_after < result.loss_before
    both = [home / "chats.jsonl", home / "texts.jsonl"]
    assert learn(store, "both", both, config(epochs=1), progress=False).loss_after > 0


def test_settings_of_conversations_are_recorded_only_where_they_were_given():
    for made_of in (LearnConfig, FinetuneConfig):
        assert not {"format", "loss"} & set(made_of().to_json())
        told = made_of(format="alpaca", loss="all").to_json()
        assert (told["format"], told["loss"]) == ("alpaca", "all")
        with pytest.raises(ConfigError, match="loss 'none' is not one of"):
            made_of(loss="none")
        with pytest.raises(ConfigError, match="format 'chat' is not one of"):
            made_of(format="chat")


def test_a_base_without_a_template_says_what_to_do(home):
    chat_tokenizer(None).save_pretrained(home / "base")
    (home / "base" / "chat_template.jinja").unlink(missing_ok=True)
    store = Store.create(home / "bare", home / "base")
    with pytest.raises(ConfigError, match="has no chat template"):
        learn(store, "law", [home / "chats.jsonl"], config(), progress=False)


def test_finetune_learns_answers_and_pretrain_reads_text(home):
    settings = FinetuneConfig(sequence_length=64, batch_size=4, epochs=2, precision="float32")
    result = finetune(home / "base", home / "tuned", [home / "chats.jsonl"], settings, progress=False)
    kept_out = split(read([home / "chats.jsonl"], format="auto"), at_most=256)[1]
    heldout = kept_out[1::2]  # the half that decides
    store = Store.create(home / "of-base", home / "base")
    assert result.loss_before == pytest.approx(expected_loss(store, heldout), rel=1e-4)
    tuned = Store.create(home / "of-tuned", home / "tuned")
    assert result.loss_after == pytest.approx(expected_loss(tuned, heldout), rel=1e-4)
    assert result.loss_after < 0.8 * result.loss_before
    kept = [json.loads(line)["text"] for line in (home / "tuned" / "heldout.jsonl").read_text().splitlines()]
    assert kept == [d.plain for d in kept_out]
    with pytest.raises(DataError, match="no key 'text' among 'prompt', 'completion'"):
        pretrain(home / "new", [home / "chats.jsonl"], PretrainConfig(preset="tiny"), progress=False)


def test_records_of_another_form_than_was_said_are_told_theirs(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Why?", "answer": "So."}) + "\n")
    with pytest.raises(DataError, match=r"no key 'messages'.*these are of --format prompt, which auto finds"):
        read([tmp_path / "a.jsonl"], format="messages")
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "Why?"}) + "\n")
    with pytest.raises(DataError, match=r"as --format messages has it; see --format"):
        read([tmp_path / "a.jsonl"], format="messages")
