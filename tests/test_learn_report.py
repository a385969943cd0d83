"""What a learner sees: the loss of every step, base and module side by side, and the page about a module."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from disk import all_files, write_jsonl
from growlm import Engine, LearnConfig, Store, learn
from growlm.cli import main
from growlm.data import Passage
from growlm.errors import Interrupted
from growlm.evaluation.learning import write_learning_report
from growlm.training.history import History, read, shortened
from growlm.training.learn import LearnResult
from growlm.training.samples import Sample, side_by_side
from interruptions import at_step, interrupt
from stores import store_with_texts
from tiny import TEXT, save_base

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"sequence_length": 64, "batch_size": 2, "epochs": 2, "num_layers": 1, "precision": "float32"}


def config(**changes: Any) -> LearnConfig:
    given = {**SHORT, "max_rows": 50, "router_samples": 8, "learning_rate": 3e-3, "admit_anyway": True, **changes}
    return LearnConfig(**given)


def rooms(home: Path) -> Path:
    said = [" ".join(f"The tenant of room {n + i} pays {n * 7 % 90} crowns." for i in range(9)) for n in range(60)]
    return write_jsonl(home / "rooms.jsonl", said)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Store, LearnResult]:
    store = store_with_texts(tmp_path_factory.mktemp("made"), "llama")
    return store, learn(store, "law", [rooms(store.path.parent)], config(), samples=3, progress=False)


# The loss of every step


def test_the_history_has_every_step(made):
    store, result = made
    training = store.module("law").manifest.training
    assert [line["step"] for line in result.history] == list(range(1, result.steps + 1))
    assert result.history[-1]["tokens"] == result.tokens
    assert [line["tokens"] for line in result.history] == sorted({line["tokens"] for line in result.history})
    assert max(line["learning_rate"] for line in result.history) == pytest.approx(result.learning_rate)
    heldout = {str(line["step"]): line["heldout"] for line in result.history if "heldout" in line}
    assert heldout == {step: loss for step, loss in result.validation.items() if step != "0"}
    assert result.validation == training["validation"]
    assert len(heldout) >= 3
    # Its first loss is that of a module that changes nothing yet; later ones are of what was learned.
    assert result.history[0]["loss"] == pytest.approx(result.validation["0"], rel=0.1)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert training["losses"] == shortened(result.history)


def test_a_long_history_is_shortened_to_means():
    history = [{"step": n, "loss": float(n)} for n in range(1, 1001)]
    points = shortened(history)
    assert len(points) == 200
    assert points[0] == [5, 3.0]
    assert points[-1] == [1000, 998.0]
    assert shortened([]) == []


def test_a_run_that_was_stopped_has_the_history_of_one_that_was_not(tmp_path, made):
    store = store_with_texts(tmp_path, "llama")
    source = rooms(tmp_path)
    with at_step(5, interrupt), pytest.raises(Interrupted):
        learn(store, "law", [source], config(), progress=False)
    (work,) = store.path.glob("work/law-*/")
    assert [line["step"] for line in read(work)] == list(range(1, 7))
    assert learn(store, "law", [source], config(), progress=False).history == made[1].history


def test_lines_after_the_checkpoint_and_damaged_ones_go(tmp_path):
    history = History(tmp_path, 0)
    for step in range(1, 6):
        history.add(step, 10 * step, 1 / step, 1e-3, 2.0 if step == 2 else None)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"step": 3, "tokens": 1, "loss": NaN, "learning_rate": 1}\n{"step": 6, "lo')
    again = History(tmp_path, 3)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    again.add(4, 40, 0.5, 1e-3, None)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 2, "tokens": 20, "loss": 0.5, "learning_rate": 1e-3, "heldout": 2.0}
    assert lines[3] == {"step": 4, "tokens": 40, "loss": 0.5, "learning_rate": 1e-3}
    assert len(lines) == 4
    History(tmp_path, 0)
    assert read(tmp_path) == []
    # A run goes on where nothing can be written.
    (tmp_path / "file").write_text("x")
    History(tmp_path / "file" / "below", 0).add(1, 10, 0.5, 1e-3, None)
    assert read(tmp_path / "nowhere") == []


# Base and module side by side


def test_samples_are_what_base_and_module_write(made):
    store, result = made
    assert len(result.samples) == 3
    assert len({sample.prompt for sample in result.samples}) == 3
    texts = [json.loads(line)["text"] for line in (store.path.parent / "rooms.jsonl").read_text().splitlines()]
    with Engine(store, device="cpu") as engine:
        for sample in result.samples:
            assert any(sample.prompt + sample.text in text for text in texts)
            for name, written in ((None, sample.base), ("law", sample.module)):
                answer = engine.generate(sample.prompt, module=name, max_new_tokens=40, temperature=0)
                assert written == answer.text
    assert any(sample.base != sample.module for sample in result.samples)


def test_a_store_keeps_no_sample(made):
    store, result = made
    everything = b"".join(all_files(store.path).values())
    for sample in result.samples:
        for text in (sample.prompt, sample.text, sample.module):
            assert text[:24].encode() not in everything


def test_samples_are_written_as_the_engine_writes(tmp_path):
    """They end where it ends, and heed none of the base's own settings for generation."""
    store = store_with_texts(tmp_path, "llama")
    base = store.load_base()
    often = base.end_tokens(store.load_tokenizer()) | {
        Engine(store, device="cpu").generate("The tenant of room 8 pays", module=None, max_new_tokens=2).tokens[1]
    }
    settings = {"eos_token_id": sorted(often), "repetition_penalty": 5.0, "do_sample": True}
    (store.base_folder / "generation_config.json").write_text(json.dumps(settings))
    result = learn(store, "law", [rooms(tmp_path)], config(), samples=5, progress=False)
    assert len(result.samples) == 5
    with Engine(store, device="cpu") as engine:
        for sample in result.samples:
            for name, written in ((None, sample.base), ("law", sample.module)):
                answer = engine.generate(sample.prompt, module=name, max_new_tokens=40, temperature=0)
                assert written == answer.text
    assert any(len(sample.base) < 20 for sample in result.samples)


def test_prompts_leave_room_in_the_base_s_positions(tmp_path):
    save_base(tmp_path / "base", "gpt2", n_positions=64)
    write_jsonl(tmp_path / "base" / "heldout.jsonl", [f"{text} {n}" for n in range(6) for text in TEXT])
    store = Store.create(tmp_path / "store", tmp_path / "base")
    result = learn(store, "law", [rooms(tmp_path)], config(epochs=1), samples=3, progress=False)
    assert result.samples == ()


def test_a_conversation_without_an_answer_left_is_no_sample(made):
    store, _ = made
    base, tokenizer = store.load_base(), store.load_tokenizer()
    module, ids = store.load("law", base), tokenizer.encode("The tenant of room 8 pays 51 crowns.")
    cut = Passage(ids, 0, [False] * len(ids))
    answered = Passage(ids, 1, [False] * 6 + [True] * (len(ids) - 6))
    assert side_by_side(base, module, tokenizer, [cut], 3) == ()
    assert len(side_by_side(base, module, tokenizer, [cut, answered], 3)) == 1


def test_stopped_at_the_samples_the_same_command_goes_on(tmp_path, monkeypatch, made):
    store, source = store_with_texts(tmp_path, "llama"), rooms(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("growlm.training.learn.side_by_side", _stopped)
        with pytest.raises(KeyboardInterrupt):
            learn(store, "law", [source], config(), samples=3, progress=False)
    assert store.find("law") is None
    result = learn(store, "law", [source], config(), samples=3, progress=False)
    assert result.samples == made[1].samples
    assert result.history == made[1].history


def _stopped(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", [0, 1])
def test_as_many_samples_as_are_asked_for(store_of_one, count):
    store, source = store_of_one
    result = learn(store, f"law{count}", [source], config(epochs=1), samples=count, progress=False)
    assert len(result.samples) == count


@pytest.fixture
def store_of_one(tmp_path) -> tuple[Store, Path]:
    return store_with_texts(tmp_path, "llama"), rooms(tmp_path)


# The table and the page


def result_of(**changes: Any) -> LearnResult:
    given = {
        "name": "law",
        "version": 2,
        "loss_before": 2.5,
        "loss_after": 2.25,
        "tokens": 40_000,
        "seconds": 20.0,
        "tokens_per_second": 2000.0,
        "gain": 0.25,
        "error": 0.1,
        "texts": 12,
        "learning_rate": 1e-3,
        "steps": 2,
        "best_step": 2,
        "validation": {"0": 2.6, "2": 2.3},
        "history": [
            {"step": 1, "tokens": 512, "loss": 2.61, "learning_rate": 1e-3},
            {"step": 2, "tokens": 1024, "loss": 2.4, "learning_rate": 5e-4, "heldout": 2.3},
        ],
        "samples": (Sample("a <b> prompt", "its text", "by the base", "by the & module"),),
    }
    return LearnResult(**{**given, **changes})


def test_the_table_has_both_losses_and_the_interval():
    lines = result_of().lines()
    assert lines[0].startswith(
        "law version 2: learned from 40,000 tokens, repeats included, in 20 s (2,000 tokens/s), measured by 12 held-"
    )
    assert [line.split("  ")[0] for line in lines[1:4]] == ["held-out text", "loss, nats a token", "perplexity"]
    assert "2.500  2.250    0.250 (0.030 to 0.470)" in lines[2]
    assert "12.18   9.49" in lines[3]
    assert lines[3].endswith("22.1%")
    assert lines[5:] == [
        "prompt: a <b> prompt",
        "  the text: its text",
        "  base: by the base",
        "  law: by the & module",
    ]
    # Of a single text nothing is known of the spread.
    assert result_of(error=None).table()[1][3] == "0.250"
    # Of few texts the interval is that of Student's t.
    assert result_of(texts=3).table()[1][3] == "0.250 (-0.180 to 0.680)"
    assert result_of(texts=100).table()[1][3] == "0.250 (0.052 to 0.448)"
    assert result_of(loss_before=2.25, loss_after=2.5).table()[2][3] == "-28.4%"
    assert result_of(loss_after=1e9).table()[2][2:] == ["∞", "no"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_table_figure_and_samples(tmp_path):
    result = result_of(name="law")
    page = write_learning_report(result, tmp_path / "report")
    assert [json.loads(line) for line in (tmp_path / "report" / "losses.jsonl").read_text().splitlines()] == (
        result.history
    )
    found = Page(page.read_text())
    assert found.tags.count("svg") == 1
    assert "b" not in found.tags[found.tags.index("article") :]  # the prompt's own markup is letters
    for text in ("a <b> prompt", "its text", "by the base", "by the & module", "0.250 (0.030 to 0.470)", "2.3000"):
        assert text in found.texts
    # Without history or samples, as of a run that had ended before.
    Page(write_learning_report(result_of(history=[], samples=()), tmp_path / "report").read_text())


def run(*line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(line)
    return ended.value.code


def test_the_command_prints_the_table_and_writes_the_page(store_of_one, tmp_path, capfd):
    store, source = store_of_one
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in SHORT.items()]
    report = tmp_path / "report"
    line = ["learn", str(store.path), "law", "--data", str(source), "--admit-anyway", "--learning-rate=3e-3", *settings]
    assert run(*line, "--report", str(report)) == 0
    out, err = capfd.readouterr()
    assert out.startswith("law version 1: learned from ")
    assert out.count("prompt: ") == out.count("  the text: ") == 3
    assert f"report: {report / 'index.html'}" in err
    links = re.findall(r'href="([^"#]+)"', (report / "index.html").read_text())
    assert links == ["losses.jsonl"]
    steps = store.module("law").manifest.training["steps"]
    assert len((report / "losses.jsonl").read_text().splitlines()) == steps
    # Another's folder is refused before anything is learned.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert run(*line, "--update", "--report", str(tmp_path / "mine")) == 1
    assert "holds something else than a report; choose another folder" in capfd.readouterr().err
    assert store.module("law").version == 1
    assert run(*line, "--update", "--json", "--samples", "1") == 0
    said = json.loads(capfd.readouterr().out)
    assert len(said["samples"]) == 1
    assert said["samples"][0].keys() == {"prompt", "text", "base", "module"}
    assert "history" not in said
