"""Tests whose rows stand in what a module has learned: found, named and refused."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

import growlm.evaluation.harness  # noqa: F401  makes the model known
from growlm import LearnConfig, Store, learn
from growlm.errors import ConfigError, DataError
from growlm.evaluation.contamination import Windows, strings
from growlm.recall.text import RecalledText
from stores import store_with_texts

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
VOCAB = 50
RULES = [
    f"Whoever sells bread of {n} grains below its weight pays {n * 7 % 90} crowns to the town before market day."
    for n in range(60)
]


def text_of(*documents: list[int]) -> RecalledText:
    return RecalledText.of([("a", np.array(ids, dtype=np.int32)) for ids in documents], VOCAB)


def windows(*texts: list[int], width: int = 4) -> Windows:
    """Of texts whose tokens have so many characters each."""
    return Windows.of(texts, [width * len(text) for text in texts])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(26, 60), st.integers(0, 40))
def test_a_run_of_a_text_is_found_wherever_it_stands_and_whatever_is_around_it(seed, size, before):
    draw = np.random.default_rng(seed)
    document = draw.integers(0, VOCAB, 150).tolist()
    run = document[before : before + size]
    other = draw.integers(0, VOCAB, 90).tolist()
    item = [*other[:before], *run, *other[before:]]
    text = text_of(draw.integers(0, VOCAB, 100).tolist(), document)
    assert windows(other, item, []).standing(text) == [1]
    ends = document[-size:]  # at the very end of what was learned
    assert windows([*other[:before], *ends, *other[before:]]).standing(text) == [0]


def test_a_run_is_as_long_as_its_characters_whatever_the_tokenizer_makes_of_them():
    """A language that is written in a token a character, or in one a word."""
    draw = np.random.default_rng(0)
    document, other = draw.integers(0, VOCAB, 300).tolist(), draw.integers(0, VOCAB, 300).tolist()
    text = text_of(document)
    short, long = ([*other[:50], *document[40 : 40 + size], *other[50:]] for size in (40, 100))
    assert windows(short, long, width=1).standing(text) == [1]
    assert windows(short, long, width=4).standing(text) == [0, 1]


def test_a_short_text_must_stand_there_as_a_whole():
    document = np.random.default_rng(0).integers(0, VOCAB, 100).tolist()
    text, question = text_of(document), document[20:36]
    changed = [*question[:6], (question[6] + 1) % VOCAB, *question[7:]]
    edges = [(question[0] + 1) % VOCAB, *question[1:-1], (question[-1] + 1) % VOCAB]
    assert windows(question, changed, edges, document[20:32]).standing(text) == [0, 2]
    assert windows(document).standing(RecalledText([])) == []
    assert windows().standing(text) == []


def test_every_text_of_a_row_is_looked_for():
    assert list(strings({"q": "one", "choices": ["two", {"text": ["three"]}], "answer": 1, "raw": b"four"})) == [
        "one",
        "two",
        "three",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    store = store_with_texts(home, "llama")
    (home / "rules.jsonl").write_text("".join(json.dumps({"text": rule}) + "\n" for rule in RULES))
    settings = LearnConfig(kind="recall", sequence_length=64, admit_anyway=True)
    learn(store, "rules", [home / "rules.jsonl"], settings, progress=False)
    learn(store, "drugs", [home / "drugs.jsonl"], settings, progress=False)
    return home


def evaluated(home: Path, monkeypatch, rows: list[str], **arguments: str) -> dict:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
    path = home / "rows.jsonl"
    lines = [{"question": row, "choices": ["yes", "no"], "answer": 0} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "local_rules",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    given = ",".join(f"{key}={value}" for key, value in {"store": home / "store", **arguments}.items())
    found = lm_eval.simple_evaluate(
        model="growlm", model_args=given, tasks=[task], task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    assert found is not None
    return found["results"]


def test_a_task_of_learned_text_is_refused_by_name_unless_it_is_allowed(made, monkeypatch, caplog):
    others = ["Is it true that a ship which leaves the harbour at night must carry two lamps?"]
    learned = [f"It is a rule: {RULES[7]} True?", RULES[30]]
    told = (
        r"^local_rules: 2 of 3 rows stand in the text that 'rules' has learned, 'It is a rule: .*\.\.\.' "
        r"for one: .* allow it with allow_contaminated=true$"
    )
    for module in ("auto", "rules"):
        with pytest.raises(DataError, match=told):
            evaluated(made, monkeypatch, [*others, *learned], module=module)
    for arguments in ({"module": "base"}, {"module": "drugs"}, {"allow_contaminated": "true"}):
        assert "acc,none" in evaluated(made, monkeypatch, [*others, *learned], **arguments)["local_rules"]
    assert "acc,none" in evaluated(made, monkeypatch, others)["local_rules"]
    many = [f"Does ship number {n} that leaves at night carry {n + 2} lamps, and who lights them?" for n in range(100)]
    assert "acc,none" in evaluated(made, monkeypatch, [*many, learned[0]])["local_rules"]  # one of 101
    assert "local_rules: 1 of 101 rows stand in the text that 'rules' has learned" in caplog.text
    with pytest.raises(ConfigError, match="allow_contaminated is 'maybe'; give true or false"):
        evaluated(made, monkeypatch, others, allow_contaminated="maybe")


def test_a_text_that_was_removed_is_not_looked_for(made, monkeypatch):
    store = Store.open(made / "store")
    store.remove("rules")
    assert "acc,none" in evaluated(made, monkeypatch, RULES[:2])["local_rules"]
