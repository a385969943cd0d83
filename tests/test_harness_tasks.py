"""The task files of the harness: what they read, what they ask, and how they judge; on small made-up data."""

from __future__ import annotations

import functools
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from growlm.errors import ConfigError, DataError
from growlm.evaluation.harness import HarnessModel, main
from growlm.evaluation.tasks import FOLDER
from growlm.evaluation.tasks.answers import boxed, exact, majority, number, plain_latex, vote_on_boxes, vote_on_numbers
from growlm.evaluation.tasks.reading import VARIABLE, documents, read_rows, with_subject
from growlm.evaluation.tasks.rows import choice_row, maths_row, number_row
from growlm.evaluation.tasks.task import in_turn, mean_of_subjects
from stores import make_store

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# Data


def mmlu(subject: str, split: str, number_of: int) -> list[dict]:
    return [
        {
            "subject": subject,
            "question": f"{subject} {split} {i}?",
            "choices": [f"{i}{x}" for x in "wxyz"],
            "answer": i % 4,
        }
        for i in range(number_of)
    ]


def ceval(subject: str, number_of: int) -> list[dict]:
    rows = [{"id": i, "question": f"{subject}第{i}题", **{x: f"{x}{i}" for x in "ABCD"}} for i in range(number_of)]
    return [{**row, "answer": "ABCD"[i % 4], "subject": subject, "explanation": ""} for i, row in enumerate(rows)]


def sums(split: str, number_of: int) -> list[dict]:
    answer = "It is {0}+{0}=<<{0}+{0}={1}>>{1}.\n#### {1}"
    return [{"question": f"{split}: twice {i}?", "answer": answer.format(i, 2 * i)} for i in range(number_of)]


def problems(split: str, number_of: int) -> list[dict]:
    rows = [(subject, i) for subject in ("Algebra", "Geometry", "Numbers") for i in range(number_of)]
    solution = "So \\boxed{{\\frac{{{0}}}{{2}}}}."
    return [
        {"problem": f"{split} {s} {i}", "type": s, "level": "1", "solution": solution.format(2 * i + 1)}
        for s, i in rows
    ]


def options(number_of: int) -> list[dict]:
    return [{"question": f"q{i}", "choices": ["left", "right one"], "answer": i % 2} for i in range(number_of)]


DATA = {
    "mmlu/test": [*mmlu("old_maps", "test", 1), *mmlu("law", "test", 3)],
    "mmlu/dev": [*mmlu("law", "dev", 6), *mmlu("old_maps", "dev", 5)],
    "ceval/val": [*ceval("history", 1), *ceval("law", 2)],
    "ceval/dev": [*ceval("law", 5), *ceval("history", 5)],
    "gsm8k/test": sums("test", 3),
    "gsm8k/train": sums("train", 9),
    "math/test": problems("test", 1),
    "math/train": problems("train", 2),
    "arc_easy/test": options(3),
    "arc_easy/train": options(2),
    "piqa/valid": options(3),
}


def write(folder: Path, rows: dict[str, list[dict]]) -> None:
    for name, some in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules={"letters": {}}, max_position_embeddings=1024)
    return home


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data"
    write(folder, DATA)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@functools.cache
def manager() -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(FOLDER))


def evaluated(made: Path, task: str, max_length: int = 1024, **settings):
    found = lm_eval.simple_evaluate(
        model="growlm", model_args=f"store={made}/store,max_length={max_length}", tasks=[task], task_manager=manager(),
        bootstrap_iters=0, log_samples=True, verbosity="ERROR", **settings,
    )  # fmt: skip
    assert found is not None
    return found["results"][task], found["samples"][task]


def prompt(sample: dict) -> str:
    return sample["arguments"][0][0]


# Tasks from end to end


def test_mmlu_has_five_shots_of_the_questions_own_subject(made, data):
    results, samples = evaluated(made, "growlm_mmlu")
    assert len(samples) == 4
    for sample in samples:
        subject = sample["doc"]["subject"]
        head, *asked = prompt(sample).split("Question: ")
        assert head.strip().endswith(f"on {subject.replace('_', ' ')} have one correct option each.")
        assert [q.split("?")[0] for q in asked[:-1]] == [f"{subject} dev {i}" for i in range(5)]
        assert [q.strip()[-1] for q in asked[:-1]] == list("ABCDA")
        assert asked[-1].startswith(sample["doc"]["question"] + "\nA) ")
        assert asked[-1].endswith("\nAnswer:")
        assert [arguments[1] for arguments in sample["arguments"]] == [" A", " B", " C", " D"]
        scores = [float(response[0]) for (response,) in sample["resps"]]
        assert sample["acc"] == float(scores.index(max(scores)) == sample["doc"]["answer"])
    right = [sample["acc"] for sample in samples]
    assert results["acc,none"] == pytest.approx(sum(right) / 4)
    assert results["acc_macro,none"] == pytest.approx((right[0] + sum(right[1:]) / 3) / 2)


def test_ceval_is_asked_in_chinese_with_five_shots_of_its_subject(made, data):
    results, samples = evaluated(made, "growlm_ceval")
    for sample in samples:
        head, *asked = prompt(sample).split("题目：")
        assert head
        assert [q.split("\n")[0] for q in asked[:-1]] == [f"{sample['doc']['subject']}第{i}题" for i in range(5)]
        assert asked[1].endswith("A：A1\nB：B1\nC：C1\nD：D1\n答案：B\n\n")
        assert asked[-1].endswith("答案：")
        assert [arguments[1] for arguments in sample["arguments"]] == list("ABCD")
    assert 0 <= results["acc_macro,none"] <= 1


def test_gsm8k_asks_eight_times_after_eight_shots(made, data):
    results, samples = evaluated(made, "growlm_gsm8k", gen_kwargs={"max_gen_toks": 6})
    assert len(samples) == 3
    for sample in samples:
        *shots, asked = prompt(sample).split("\n\n")
        assert shots == [f"Question: train: twice {i}?\nAnswer: It is {i}+{i}={2 * i}.\n#### {2 * i}" for i in range(8)]
        assert asked == f"Question: {sample['doc']['question']}\nAnswer:"
        assert len(sample["resps"][0]) == 8
        assert len(set(sample["resps"][0])) > 1
        settings = sample["arguments"][0][1]
        assert (settings["temperature"], settings["do_sample"], settings["until"]) == (0.7, True, ["\nQuestion:"])
    assert 0 <= results["exact_match,maj@8"] <= 1


def test_math_asks_four_times_after_four_shots_of_the_subjects_in_turn(made, data):
    results, samples = evaluated(made, "growlm_math", gen_kwargs={"max_gen_toks": 6})
    for sample in samples:
        _, *asked = prompt(sample).split("Problem: ")
        assert [q.split("\n")[0] for q in asked] == [
            "train Algebra 0", "train Geometry 0", "train Numbers 0", "train Algebra 1", sample["doc"]["question"],
        ]  # fmt: skip
        assert asked[0].endswith("\nSolution: So \\boxed{\\frac{1}{2}}.\n\n")
        assert asked[-1].endswith("\nSolution:")
        assert len(sample["resps"][0]) == 4
    assert 0 <= results["exact_match,maj@4"] <= 1


@pytest.mark.parametrize(
    ("task", "draws", "wanted"),
    [
        ("growlm_gsm8k", ["#### 9", "#### 0", "so 0.", "none", "none", "none", "#### 0.0", "9"], [1, 0, 0]),
        ("growlm_math", ["\\boxed{9}", "\\boxed{.5}", "\\boxed{3", "so \\boxed{\\dfrac12}"], [1, 1, 1]),
    ],
)
def test_the_majority_of_the_draws_is_what_counts(made, data, monkeypatch, task, draws, wanted):
    def generate(model, requests, disable_tqdm=False):
        assert len(requests) == len(draws) * 3
        return draws * 3

    monkeypatch.setattr(HarnessModel, "generate_until", generate)
    results, samples = evaluated(made, task)
    assert [sample["exact_match"] for sample in samples] == wanted
    assert results[f"exact_match,maj@{len(draws)}"] == pytest.approx(sum(wanted) / 3)


@pytest.mark.parametrize("task", ["growlm_arc_easy", "growlm_piqa"])
def test_zero_shot_scores_the_text_of_each_option(made, data, task):
    results, samples = evaluated(made, task)
    for sample in samples:
        assert prompt(sample).count("\n") == 1
        assert sample["doc"]["question"] in prompt(sample)
        assert [arguments[1] for arguments in sample["arguments"]] == [" left", " right one"]
    assert {"acc,none", "acc_norm,none"} <= results.keys()
    assert "acc_macro,none" not in results


def test_shots_are_as_many_as_asked_for(made, data):
    _, samples = evaluated(made, "growlm_arc_easy", num_fewshot=2, limit=1)
    assert (
        prompt(samples[0]) == "Question: q0\nAnswer: left\n\nQuestion: q1\nAnswer: right one\n\nQuestion: q0\nAnswer:"
    )
    (data / "mmlu" / "dev.jsonl").unlink()
    _, samples = evaluated(made, "growlm_mmlu", num_fewshot=0, limit=1)
    assert prompt(samples[0]).count("Question: ") == 1


# The command line


@pytest.fixture
def command(made, monkeypatch):
    """The command, without the harness's own tasks, whose index takes long to build."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["growlm-lm-eval", "run", "--model", "growlm", *words])
        main()

    return functools.partial(run, "--model_args", f"store={made}/store")


def test_the_command_knows_the_tasks_beside_those_of_an_include_path(command, data, tmp_path, capsys):
    other = tmp_path / "other" / "mine.yaml"
    other.parent.mkdir()
    source = (FOLDER / "growlm_piqa.yaml").read_text().replace("growlm_piqa", "mine")
    other.write_text(source)
    command("--tasks", "growlm_arc_easy,mine", "--include_path", str(other.parent))
    told = capsys.readouterr().out
    assert "growlm_arc_easy" in told
    assert "|mine" in told
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"include_path: {other.parent}\ndevice: cpu\n")
    command("--tasks", "growlm_piqa,mine", "--config", str(settings))
    assert "|mine" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_in_one_line(command, data, capsys):
    (data / "arc_easy" / "test.jsonl").write_text('{"question": "why?"}\n')
    with pytest.raises(SystemExit) as stopped:
        command("--tasks", "growlm_arc_easy")
    assert stopped.value.code == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("growlm: ")]
    assert "arc_easy/test.jsonl:1: no column" in line


def test_the_command_refuses_a_device_that_is_not_there(command, data, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command("--tasks", "growlm_arc_easy", "--device", "cuda")
    assert stopped.value.code == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("growlm: ")]
    assert "device cuda: " in line


# What goes wrong


def test_missing_data_is_named(made, data, monkeypatch):
    (data / "gsm8k" / "test.jsonl").rename(data / "gsm8k" / "tests.jsonl")
    with pytest.raises(DataError, match=r"gsm8k: no test.jsonl or validation.jsonl .* in it; add one, or unset GROWLM"):
        evaluated(made, "growlm_gsm8k")
    monkeypatch.setenv(VARIABLE, str(data / "law"))
    with pytest.raises(DataError, match=r"GROWLM_TASK_DATA=.*law: no such folder; make .*math with test.jsonl"):
        evaluated(made, "growlm_math")
    monkeypatch.setenv(VARIABLE, str(data / "gsm8k"))
    with pytest.raises(DataError, match=r"no folder 'math' in it; make .*math with test.jsonl"):
        evaluated(made, "growlm_math")
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(DataError, match=r"hub:openai/gsm8k: split 'test' cannot be loaded .*GROWLM_TASK_DATA=DIR"):
        evaluated(made, "growlm_gsm8k")


def test_too_few_shots_are_named(made, data):
    write(data, {"mmlu/dev": [*mmlu("law", "dev", 5), *mmlu("old_maps", "dev", 3)]})
    with pytest.raises(DataError, match=r"dev.jsonl: 3 rows of subject 'old_maps', 5 shots wanted; .*--num_fewshot 3"):
        evaluated(made, "growlm_mmlu")
    (data / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"gsm8k: no train.jsonl or dev.jsonl in it"):
        evaluated(made, "growlm_gsm8k")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"{", "gsm8k/test.jsonl:3: not JSON"),
        (b"[1]", "gsm8k/test.jsonl:3: of type list; every line must be one JSON object"),
        (b'{"question": "q"}', "gsm8k/test.jsonl:3: no column 'answer' among 'question'; a row has question"),
        (b'{"question": "q", "answer": "many"}', "gsm8k/test.jsonl:3: 'answer' holds no number: 'many'"),
        (b'{"question": "\xff", "answer": "1"}', "gsm8k/test.jsonl: cannot be read \\(not UTF-8\\)"),
        (b'{"question": "\\ud800", "answer": "1"}', "gsm8k/test.jsonl:3: 'question' holds half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(data, line, wanted):
    (data / "gsm8k" / "test.jsonl").write_bytes(b'{"question": "q", "answer": "1"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=wanted) as raised:
        documents(read_rows("gsm8k", "openai/gsm8k", "main", "test")[1], number_row)
    assert "\n" not in str(raised.value)


def test_an_empty_file_is_no_test(made, data):
    (data / "piqa" / "valid.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"piqa/valid.jsonl: no rows"):
        evaluated(made, "growlm_piqa")


def test_more_tokens_than_the_model_reads_are_refused_and_cut_prompts_are_told(made, data, caplog):
    with pytest.raises(ConfigError, match=r"writes up to 2000 tokens, but a text has 1024 .*max_gen_toks=256"):
        evaluated(made, "growlm_gsm8k", limit=1, gen_kwargs={"max_gen_toks": 2000})
    evaluated(made, "growlm_gsm8k", limit=1, gen_kwargs={"max_gen_toks": 6})
    assert "cut off" not in caplog.text
    evaluated(made, "growlm_gsm8k", max_length=100, limit=1, gen_kwargs={"max_gen_toks": 6})
    assert "8 of 8 texts are longer than the 100 tokens" in caplog.text
    evaluated(made, "growlm_mmlu", max_length=100, limit=1)
    assert "4 of 4 texts are longer than the 100 tokens" in caplog.text


# Rows


def test_columns_of_files_and_of_the_hub_are_the_same_question():
    wanted = {"subject": "", "question": "Where?", "choices": ["here", "there"], "answer": 1}
    here = {"question": "Where?", "choices": ["here", "there"]}
    for row in [
        {**here, "answer": 1},
        {**here, "answer": "B", "subject": ""},
        {**here, "label": 1},
        {**here, "label": " 1 "},
        {
            "question": " Where? ",
            "choices": {"text": ["here", "there"], "label": ["A", "B"]},
            "answerKey": "B",
            "id": 1,
        },
        {"question": "Where?", "choices": {"text": ["here", "there"], "label": ["1", "2"]}, "answerKey": "2"},
        {"goal": "Where?", "sol1": "here", "sol2": "there", "label": 1},
        {"id": 0, "question": "Where?", "A": "here", "B": "there", "C": None, "D": None, "answer": "B"},
    ]:
        assert choice_row(row) == wanted, row
    assert choice_row({**here, "answer": 0, "subject": "law"})["subject"] == "law"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"question": " "}, "'question' is ' ', expected a text"),
        ({"choices": ["one"]}, "'choices' is .*, expected a list of 2 to 10"),
        ({"choices": ["one", 2]}, "'choices' is 2, expected a text"),
        ({"choices": {"text": "one", "label": ["A"]}}, "'text' of 'choices' is 'one', expected a list"),
        ({"answer": 2}, "'answer' is 2, expected 0 to 1 or one of A, B"),
        ({"answer": -1}, "'answer' is -1, .*a split without answers cannot be evaluated"),
        ({"answer": True}, "'answer' is True"),
        ({"answer": ""}, "'answer' is ''"),
        ({"answer": None}, "'answer' is null"),
        ({"answer": "2"}, "'answer' is 2, expected 0 to 1"),
        ({"answer": "1" * 5000}, "'answer' is '111"),
        ({"answer": "0", "choices": {"text": ["a", "b"], "label": ["1", "2"]}}, "'answer' is '0', .* one of 1, 2"),
    ],
)
def test_a_bad_choice_is_refused(change, wanted):
    with pytest.raises(DataError, match=wanted):
        choice_row({"question": "q", "choices": ["a", "b"], "answer": 0, **change})


@pytest.mark.parametrize("missing", ["question", "choices", "answer"])
def test_a_missing_column_is_named(missing):
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}
    del row[missing]
    with pytest.raises(DataError, match=rf"no column .*'{missing}'.* among '.*; a row has question, choices"):
        choice_row(row)


def test_worked_rows():
    row = number_row({"question": "q", "answer": "So 2*600=<<2*600=1200>>1200.\n#### 1,200"})
    assert (row["solution"], row["answer"]) == ("So 2*600=1200.\n#### 1,200", "1200")
    assert number_row({"question": "q", "answer": 7})["solution"].endswith("#### 7")
    hub = {"problem": "p", "level": "Level 1", "type": "Algebra", "solution": "Thus \\boxed{x^{2}}."}
    assert maths_row(hub) == {
        "subject": "Algebra",
        "question": "p",
        "solution": "Thus \\boxed{x^{2}}.",
        "answer": "x^{2}",
    }
    selected = {"problem": "p", "subject": "Algebra", "solution": "s \\boxed{1}", "answer": "\\frac{2}{4}", "level": 1}
    assert maths_row(selected)["answer"] == "1/2"
    assert boxed(maths_row({"question": "p", "answer": "3"})["solution"]) == "3"
    with pytest.raises(DataError, match="no column 'solution' among 'problem'; a row has problem"):
        maths_row({"problem": "p"})
    with pytest.raises(DataError, match="no complete"):
        maths_row({"problem": "p", "solution": "\\boxed{1"})


def test_a_configuration_is_a_subject_where_rows_say_none():
    assert with_subject({"question": "q"}, "law")["subject"] == "law"
    assert with_subject({"subject": "tax"}, "law")["subject"] == "tax"
    assert "subject" not in with_subject({"type": "Algebra"}, "algebra")


def test_the_hub_is_read_configuration_by_configuration(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda hub: ["law", "art"])
    monkeypatch.setattr("datasets.load_dataset", lambda hub, name, split: ceval("", 1) if hub == "o/e" else None)
    source, rows = read_rows("ceval", "o/e", None, "val")
    assert source == "hub:o/e"
    assert [(where, row["subject"]) for where, row in rows] == [
        ("hub:o/e:art:val:1", "art"),
        ("hub:o/e:law:val:1", "law"),
    ]


def test_subjects_in_turn_and_their_mean():
    docs = [{"subject": s, "n": n} for s, n in [("a", 0), ("a", 1), ("a", 2), ("b", 3), ("c", 4), ("c", 5)]]
    assert [doc["n"] for doc in in_turn(docs)] == [0, 3, 4, 1, 5, 2]
    assert mean_of_subjects([("a", 1.0), ("a", 0.0), ("a", 0.0), ("a", 0.0), ("b", 1.0)]) == 0.625


# Answers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("#### 72", "72"), ("so 3.\n#### 1,234,500.\n", "1234500"), ("#### $18 for 3 people", "18"), ("#### -5", "-5"),
        ("#### 4\n\n#### 9", "4"), ("#### none, but 7", "7"), ("####\nit is 8", "8"), ("It costs $1,250.50.", "1250.5"),
        ("She has 3, 4, then 5.", "5"), ("16-3-4", "4"), ("from 3 to -2", "-2"), ("-$4", "-4"), ("$-4", "-4"),
        ("x−7 is −7", "-7"), ("0.50", "0.5"), (".5", "0.5"), ("007", "7"), ("-0.0", "0"), ("12,", "12"),
        ("1,2345", "2345"), ("15%", "15"), ("5 apples.", "5"), ("no idea", ""), ("", ""), ("####", ""),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text, wanted):
    assert number(text) == wanted


@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc ,.$?!\n", max_size=20))
def test_any_number_is_found_however_it_is_written(value, before):
    for written in (f"{value}", f"{value:,}", f"${value:,}", f"{value}.00", f"{value:,}."):
        assert number(f"{before} 17 {before}\n#### {written}\nand 3") == str(value)
        assert number(f"17 {before} {written}") == str(value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so \\boxed{5}.", "5"), ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed 7", "7"),
        ("\\boxed{a\\}b}", "a\\}b"), ("\\boxed{\\{1,{2}\\}}", "\\{1,{2}\\}"), ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\text{(}}", "\\text{(}"), ("boxed{5}", ""), ("\\boxed{}", ""), ("\\boxed", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_box_of_an_answer(text, wanted):
    assert boxed(text) == wanted


def test_boxes_that_are_never_closed_are_read_in_time_that_grows_with_the_text():
    def seconds(text: str) -> float:
        started = time.process_time()
        assert boxed("\\boxed{7} " + text) == "7"
        return time.process_time() - started

    for piece in ("\\boxed{", "\\boxed  ", "{\\boxed{ "):
        seconds(piece * 500)  # the first call compiles the patterns
        assert seconds(piece * 20_000) < 2  # quadratic, it would be minutes


nested = st.recursive(
    st.text(alphabet="ab1+ ", max_size=4), lambda inner: st.tuples(inner, inner).map(lambda p: f"{p[0]}{{{p[1]}}}")
)


@given(nested, st.text(alphabet="xy{} \n", max_size=10), st.text(alphabet="xy{} \n", max_size=10))
def test_a_box_is_found_among_any_braces(inside, before, after):
    assert boxed(f"\\boxed{{0}} {before}\\boxed{{{inside}}}{after}") == inside.strip()


@pytest.mark.parametrize(
    "forms",
    [
        ["\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac12", "\\frac1{2}", "\\frac{1}2", "1/2", ".50", "$\\frac 12$", "2/4"],
        ["-\\frac{1}{2}", "\\frac{-1}{2}", "-1/2", "-0.5", "−0.5"],
        ["1234", "1,234", "1{,}234", "1,\\!234", "1234.", "1234.0", "\\$1,234", "x = 1234", "x=1234"],
        ["90", "90^\\circ", "90^{\\circ}", "90\\%", "90 \\text{ cm}", "90\\text{ cm}^2", "90~\\mathrm{m}", "{90}"],
        ["(1,2)", "\\left(1, 2\\right)", "( 1,\\ 2 )"],
        ["\\sqrt{3}", "\\sqrt3"],
        ["[0,1)", "x \\in [0, 1)"],
        ["(A)", "\\text{(A)}", "\\textbf{(A)}"],
        ["4\\pi", "4 \\pi", "4\\,\\pi"],
    ],
)  # fmt: skip
def test_forms_of_the_same_answer_are_equal(forms):
    assert {plain_latex(form) for form in forms} == {plain_latex(forms[0])}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "-1"), ("1/2", "1/3"), ("(1,2)", "[1,2]"), ("100,20", "10020"), ("\\sqrt{3}", "3"), ("x^2", "x^{3}"),
        ("\\leftarrow", "\\rightarrow"), ("1/0", "0"), ("\\infty", "-\\infty"), ("x+1", "x-1"), ("12", "1 or 3"),
    ],
)  # fmt: skip
def test_different_answers_are_different(one, other):
    assert plain_latex(one) != plain_latex(other)


@given(st.fractions(max_denominator=1000).filter(lambda x: abs(x) < 10**6))
def test_a_fraction_is_one_answer_however_it_is_written(value: Fraction):
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [
        f"{sign}\\frac{{{3 * top}}}{{{3 * bottom}}}",
        f"{sign}{top}/{bottom}",
        f"\\dfrac{{{sign}{top}}}{{{bottom}}}",
    ]
    assert {plain_latex(form) for form in forms} == {str(value)}


@given(st.text(max_size=40) | st.text(alphabet="\\{}frac123boxed/.,-$% ", max_size=30))
def test_whatever_a_model_writes_is_judged(text):
    for judged in (
        number(text),
        boxed(text),
        plain_latex(text),
        *vote_on_numbers([[text]], []),
        *vote_on_boxes([[text]], []),
    ):
        assert isinstance(judged, str)
    assert bool(plain_latex(text)) == bool(text.strip())


def test_votes():
    assert majority(["3", "5", "", "5", "3", "", ""]) == "3"
    assert majority(["", ""]) == ""
    assert majority([]) == ""
    draws = ["#### 5", "is 5.00", "#### 4", "#### 4", "it is $5", "who knows", "who knows", "who knows"]
    assert vote_on_numbers([draws, ["?"] * 8], []) == ["5", ""]
    assert vote_on_boxes([["\\boxed{0.5}", "\\boxed{2}", "\\boxed{\\frac12}", "2"]], []) == ["1/2"]
    assert exact({"answer": "5"}, ["5"]) == {"exact_match": 1.0}
    assert exact({"answer": "5"}, [""]) == {"exact_match": 0.0}
