"""The benchmark of questions: what is asked stands in the text and is fairly beset, and scores are what they say."""

from __future__ import annotations

import json
import random
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from growlm.base import Base
from growlm.base.checkpoint import load_model
from growlm.disk.tensors import write_tensors
from growlm.modules import ModuleSet
from growlm.modules.lora import Lora
from growlm.modules.recall import Recall
from growlm.modules.scoring import continuation_scores
from growlm.modules.shapes import LoraConfig, RecallConfig
from growlm.recall.text import RecalledText
from stores import save_lively_base
from tiny import make_base, make_tokenizer, perturb, random_ids

sys.path.insert(0, str(Path(__file__).parents[1]))
facts = import_module("benchmarks.lib.facts")
retrieval = import_module("benchmarks.lib.retrieval")
answering = import_module("benchmarks.lib.answering")
benchmark = import_module("benchmarks.quality.questions")
pytestmark = pytest.mark.usefixtures("one_thread")

TOWNS = [a + b for a in ("Ald", "Brem", "Cor", "Dun", "Esk", "Fal") for b in ("wick", "ford", "by", "ton", "mere")]
TRADES = ["weavers", "potters", "tanners", "coopers", "masons", "millers", "brewers", "bakers", "glovers", "dyers"]


def town(number: int) -> str:
    draw = random.Random(number)
    return (
        f"There is more to say about place {number} of this list.\n"
        f"Of place {number} we know that the mill at {draw.choice(TOWNS)} was built in {draw.randint(1100, 1999)}. "
        f"Most of those who live there today are still {draw.choice(TRADES)} and their families."
    )


DOCUMENTS = [town(number) for number in range(40)]
ILLS = ["Rust", "Mildew", "Canker", "Blight", "Scab", "Wilt"]
CAUSES = ["a fungus of the leaves", "too much rain in spring", "beetles under its bark", "salt in dry ground",
          "a tiny worm in roots", "frost after warm weeks"]  # fmt: skip
ASKED = [
    f"Question: What is the cause of {ill}?\nAnswer: {ill} is caused by {cause}. It can be treated.\n"
    f"Question: Can {ill} be cured?\nAnswer: It depends on many things, of which {cause} is one."
    for ill, cause in zip(ILLS, CAUSES, strict=True)
]


def test_what_is_asked_of_running_text_stands_there_and_its_answer_is_determined_and_not_repeated():
    text = "\n\n".join(DOCUMENTS)
    found = facts.questions(DOCUMENTS, [], 40, 0)
    assert {q.kind for q in found} == {"number", "name"}  # trades are not rare
    assert len(found) == 40
    for q in found:
        assert q.context + q.choices[0] in text
        before, _, sentence = q.context.partition("\n")
        assert before.startswith("There is more")
        assert len({c.lower() for c in q.choices}) == len(q.choices) == 4
        assert not any(c.strip() in q.context.split() for c in q.choices)
        assert text.count(q.context[-40:] + q.choices[0]) == text.count(q.context[-40:])
        assert q.reworded.startswith(f"Fill in the blank: {sentence} ____")
        assert not any(c.strip() in q.reworded.split() for c in q.choices)
        assert q.times == text.count(" ".join(q.context.split(" ")[-3:]) + q.choices[0])
        assert q.answers == text.count(q.choices[0].strip()) >= 1
        if q.kind == "number":
            assert {len(c) for c in q.choices} == {len(q.choices[0])}
        else:
            assert all(c.strip() in TOWNS for c in q.choices)
    assert facts.questions(DOCUMENTS, [], 40, 0) == found != facts.questions(DOCUMENTS, [], 60, 1)


def test_a_sentence_that_the_text_ends_in_two_ways_is_not_asked():
    # The eight words before the town's name are the same everywhere: nothing near it says which town it is.
    twice = [d.replace("we know", "we know from a very old book of the land") for d in DOCUMENTS]
    assert {q.kind for q in facts.questions(DOCUMENTS, [], 40, 0)} >= {"name"}
    assert {q.kind for q in facts.questions(twice, [], 60, 0)} == {"number"}


def test_an_answer_that_stands_beside_its_place_too_is_not_asked():
    def again(document: str) -> str:
        at = document.split("mill at ")[1].split(" ")[0]
        return document.replace(". Most", f" for those of {at} and around. Most")

    assert {q.kind for q in facts.questions([again(d) for d in DOCUMENTS], [], 40, 0)} == {"number"}


def test_half_is_asked_of_rows_that_were_trained_on():
    rows = [d[10:] for d in DOCUMENTS[:10]]
    found = facts.questions(DOCUMENTS, rows, 20, 0)
    assert [q.trained for q in found] == [True] * 10 + [False] * 10
    assert all(any(q.context.split("\n")[1] + q.choices[0] in row for row in rows) is q.trained for q in found)
    assert sum(q.trained for q in facts.questions(DOCUMENTS, rows[:1], 20, 0)) < 10  # as many as there are


def test_the_texts_own_questions_are_asked_with_answers_about_the_same_thing():
    found = facts.questions(ASKED, ASKED[:3], 6, 0, asked=True)
    assert len(found) == 6
    assert {q.kind for q in found} == {"What is the cause of"}  # the other answers are too much alike
    for q in found:
        ill = q.context.removeprefix("Question: What is the cause of ").removesuffix("?\nAnswer:")
        assert ill in ILLS
        assert all(c.startswith(f" {ill} is caused by ") for c in q.choices)
        assert q.choices[0].endswith(CAUSES[ILLS.index(ill)] + ".")
        assert q.reworded == f"This is about {ill}. What is the cause of it?\nReply:"
        assert len(set(q.choices)) == 4
        assert q.trained is (ILLS.index(ill) < 3)


def test_an_answer_is_chosen_by_what_a_byte_costs_and_by_the_sum():
    answer = benchmark.Answer([-4.0, -3.0], [8, 4], None, None, 0.1)
    assert answer.right
    assert not answer.right_in_sum
    assert not benchmark.Answer([-4.0, -4.0], [4, 4], None, None, 0.1).right  # nothing is won by a tie


def test_shares_have_the_interval_of_their_mean_and_differences_are_paired():
    assert benchmark.percent([1, 0, 1, 1]) == "75.0 ± 33.5"
    wrong, right = ([benchmark.Answer([-x, -2.0], [1, 1], None, None, 0.1)] for x in (3.0, 1.0))
    asked = facts.Question("name", "a b", "b", "b?", (" c", " d"), True, 1, 3)
    first = benchmark.Cell([asked] * 3, [*wrong, *wrong, *right], {}, 0.0)
    second = benchmark.Cell([asked] * 3, [*right, *right, *right], {}, 0.0)
    assert second.against(first) == "+66.7 ± 51.8"
    table = benchmark.report({("d", "base"): first, ("d", "lora"): second})
    assert "| d | lora | 100.0 ± 33.5 of 3 |  |  |  | 100.0 ± 33.5 of 3 |  |" in table


@pytest.mark.parametrize("kind", ["base", "lora", "recall"])
def test_answers_to_one_question_are_scored_as_each_by_itself(kind):
    base = make_base()
    modules = []
    if kind == "lora":
        modules = [perturb(Lora.create(base, LoraConfig(r=4)), 1)]
    if kind == "recall":
        modules = [Recall.create(base, RecallConfig())]
        modules[0].memory.text = RecalledText.of([("a", random_ids(1, 400)[0].numpy() % 20)], base.vocab_size)
        modules[0].memory.gates.data.zero_()
    context = (random_ids(1, 30, seed=2)[0] % 20).tolist()
    answers = [(random_ids(1, n, seed=n)[0] % 20).tolist() for n in (1, 5, 3)]
    active = ModuleSet(base, modules)
    answers.append(active.logits(torch.tensor([context]))[0, -1:].argmax(-1).tolist())
    found = answering.answered(active, context, answers)
    expected = continuation_scores(active, [(context, answer) for answer in answers])
    assert found.scores == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert found.written == [written for _, written in expected]
    assert found.written[-1]


def test_passages_are_found_by_their_words():
    index = retrieval.Bm25(DOCUMENTS)
    assert index.best("what is known of place 17", 2)[0] == 17
    assert index.num_bytes > 0
    assert [p.tolist() for p in retrieval.cut([np.arange(5), np.arange(2)], 2)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_passages_are_found_by_a_sentence_encoder_in_any_company(tmp_path):
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=256, **settings)).save_pretrained(tmp_path / "encoder")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "encoder")
    encoder = retrieval.Encoder(tmp_path / "encoder")
    together = encoder.encode(DOCUMENTS[:5])
    torch.testing.assert_close(together[3], encoder.encode(DOCUMENTS[3:4])[0])
    index = retrieval.Embedding(DOCUMENTS[:5], encoder, tmp_path / "index" / "vectors.safetensors")
    assert index.best(DOCUMENTS[3], 2)[0] == 3
    again = retrieval.Embedding(["other text"] * 5, encoder, tmp_path / "index" / "vectors.safetensors")
    assert again.best(DOCUMENTS[3], 2)[0] == 3  # what was kept


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    save_lively_base(tmp_path / "base", max_position_embeddings=1024)
    base = Base(load_model(tmp_path / "base", "float32"))
    folder = tmp_path / "trained" / "adapters" / "towns-0-auto"
    folder.mkdir(parents=True)
    module = perturb(Lora.create(base, LoraConfig(r=2)), 1)
    write_tensors(folder / "module.safetensors", dict(module.state_dict()))
    written = {"rows": [0, 3, 4, 5, 9], "config": module.config.model_dump(mode="json"), "seconds": 7.0}
    (folder / "training.json").write_text(json.dumps(written))
    (tmp_path / "data" / "towns").mkdir(parents=True)
    (tmp_path / "data" / "towns" / "train.txt").write_text("\n\n".join(DOCUMENTS))
    (tmp_path / "data" / "towns" / "valid.txt").write_text("\n\n".join(town(n) for n in range(100, 110)))

    def call(*extra: str) -> str:
        arguments = f"--data {tmp_path}/data --out {tmp_path}/out --base {tmp_path}/base --adapters {tmp_path}/trained"
        monkeypatch.setattr(sys, "argv", ["questions.py", *arguments.split(), "--domains", "towns", *extra])
        benchmark.main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_ways_are_compared_and_a_run_that_was_stopped_goes_on(run, tmp_path):
    ways = ["base", "lora", "recall", "lora+recall-rows", "recall+bm25-1", "embedding-1"]
    table = run("--questions", "6", "--ways", *ways)
    assert [f"| towns | {way} | 6 |" in table for way in ways] == [True] * 5 + [False]  # no encoder is given
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out" / "results").glob("*.json")}
    assert found["towns-base"]["bytes"] == {"module": 0, "text": 0, "index": 0}
    assert found["towns-lora"]["bytes"]["module"] > 0 == found["towns-lora"]["bytes"]["text"]
    assert found["towns-lora"]["made"] == {"adapter": 7.0}
    assert found["towns-lora+recall-rows"]["made"].keys() == {"adapter", "memory", "fit"}
    both, alone = found["towns-recall"]["bytes"], found["towns-lora+recall-rows"]["bytes"]
    assert both["text"] > alone["text"] > 0 < alone["index"]
    assert any(answer["found"] for answer in found["towns-recall+bm25-1"]["answers"])
    scores = {name: [a["scores"] for a in f["answers"]] for name, f in found.items() if name != "towns-questions"}
    assert scores["towns-base"] != scores["towns-lora"]
    kept = (tmp_path / "out" / "results" / "towns-base.json").stat().st_mtime_ns
    (tmp_path / "out" / "results" / "towns-lora.json").unlink()
    again = run("--questions", "6", "--ways", *ways)
    assert json.loads((tmp_path / "out" / "results" / "towns-lora.json").read_text())["answers"][0]["scores"] == (
        pytest.approx(scores["towns-lora"][0])
    )
    assert (tmp_path / "out" / "results" / "towns-base.json").stat().st_mtime_ns == kept
    assert "| towns | base | 6 |" in again
    assert "reworded; in percent" in run("--questions", "6", "--ways", "base", "--reworded")
    other = json.loads((tmp_path / "out" / "results" / "towns-base-reworded.json").read_text())["answers"]
    assert [a["scores"] for a in other] != scores["towns-base"]
    with pytest.raises(SystemExit, match="holds results with another questions"):
        run("--questions", "8")


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(SystemExit, match="--ways: memory is not known"):
        run("--questions", "2", "--ways", "memory")
    with pytest.raises(SystemExit, match=r"--ways: bm25-many is not known"):
        run("--questions", "2", "--ways", "bm25-many")
    (tmp_path / "trained" / "adapters" / "towns-0-auto" / "training.json").unlink()
    with pytest.raises(SystemExit, match=r"towns-0-auto: holds no adapter; train it"):
        run("--questions", "2", "--ways", "base")
