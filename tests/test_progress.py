"""Progress: lines in a log, at most one in ten seconds; bars on a terminal; nothing where it was not wanted."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest

from growlm import progress
from growlm.cli import main
from growlm.progress import phase, reporting, say, track
from growlm.training.config import LearnConfig
from growlm.training.learn import learn
from stores import store_with_texts
from tiny import save_base

LOG_SECONDS, FIRST_SECONDS = progress._LOG_SECONDS, progress._FIRST_SECONDS


@pytest.fixture(autouse=True)
def _listening(monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", LOG_SECONDS)
    monkeypatch.setattr(progress, "_FIRST_SECONDS", FIRST_SECONDS)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress, "monotonic", found)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch) -> Terminal:
    """Called within a test: pytest puts its own stderr in place after fixtures are made."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    return found


def wait_for(found):
    """What another thread will bring about."""
    until = time.monotonic() + 10
    while not found():
        assert time.monotonic() < until
        time.sleep(0.01)


# In a log


def test_a_log_gets_a_line_every_ten_seconds_with_how_far_and_how_long_still(clock, capsys):
    with reporting("law"), phase("scoring held-out text", 3500, "passages") as scoring:
        for _ in range(34):
            clock.now += 1
            scoring.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "law: scoring held-out text: 28% (1,000 of 3,500 passages), 10 s, about 25 s left",
        "law: scoring held-out text: 57% (2,000 of 3,500 passages), 20 s, about 15 s left",
        "law: scoring held-out text: 85% (3,000 of 3,500 passages), 30 s, about 5 s left",
        "law: scoring held-out text: 3,400 passages in 34 s",
    ]


def test_what_takes_minutes_is_heard_after_a_second_and_then_every_ten(clock, capsys):
    with reporting("law", long=True), phase("training", 60, "steps") as training:
        for _ in range(22):
            clock.now += 1
            training.advance()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[1] for line in told[:3]] == [" 1 s", " 11 s", " 21 s"]


def test_what_takes_less_than_ten_seconds_is_silent(clock, capsys):
    with reporting("law"):
        for _ in track(range(9), "reading", "files"):
            clock.now += 1
    assert capsys.readouterr() == ("", "")


def test_many_short_phases_are_not_silent(clock, capsys):
    """Ten seconds of silence are too long, whatever they are made of."""
    with reporting("law"):
        for title in ("one", "two", "three"):
            with phase(title):
                clock.now += 6
    assert capsys.readouterr().err == "law: two: done in 6 s\n"


def test_of_phases_that_take_less_than_a_second_nothing_is_said(clock, capsys):
    """But that the verb goes on."""
    with reporting("law", long=True):
        clock.now += 1.5
        with phase("tokenizing", 100, "tokens") as tokenizing:
            clock.now += 0.9
            tokenizing.advance(50)
        with phase("training", 100, "steps") as training:
            for _ in range(3):
                clock.now += 0.6
                training.advance(10)
        for _ in range(30):
            with phase("hashing"):
                clock.now += 0.5
    told = capsys.readouterr().err
    assert "tokenizing:" not in told
    assert "hashing:" not in told
    assert told == (
        "law: training: 20% (20 of 100 steps), 1 s, about 5 s left\n"
        "law: training: 30 steps in 2 s\n"
        "law: 16 s so far, now hashing\n"
    )


def test_a_phase_that_tells_nothing_is_heard_nonetheless(monkeypatch, capsys):
    """And so is what no phase was made of."""
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_LEAST_SECONDS", 0.0)
    heard = ""

    def hears(line):
        nonlocal heard
        heard += capsys.readouterr().err
        return re.search(line, heard)

    with reporting("law"):
        wait_for(lambda: hears(r"law: starting: \d s\n"))
        with phase("loading the base", note="540 MB"):
            wait_for(lambda: hears(r"law: loading the base: 540 MB, \d s\n"))
        wait_for(lambda: hears(r"law: \d s so far, after loading the base\n"))
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # it ends with the verb


def test_a_note_a_size_and_an_unknown_total_are_told(clock, capsys):
    with reporting("law"):
        with phase("training", 900, "steps", done=600) as training:
            clock.now += 20
            training.advance(100, note="loss 3.500")
        with phase("hashing", 4_000_000_000, "bytes") as hashing:
            clock.now += 90
            hashing.advance(1_000_000_000)
        with phase("reading", unit="documents") as reading:
            clock.now += 7200
            reading.advance(1234)
    assert capsys.readouterr().err.splitlines() == [
        "law: training: 77% (700 of 900 steps), loss 3.500, 20 s, about 40 s left",  # 100 of 300 were done here
        "law: training: 700 steps in 20 s, loss 3.500",
        "law: hashing: 25% (1.0 GB of 4.0 GB), 1 min 30 s, about 4 min 30 s left",
        "law: hashing: 1.0 GB in 1 min 30 s",
        "law: reading: 1,234 documents, 2 h 0 min",
        "law: reading: 1,234 documents in 2 h 0 min",
    ]


def test_the_time_left_goes_by_while_a_step_is_under_way(clock, capsys):
    with reporting("law"), phase("scoring", 30, "passages") as scoring:
        clock.now += 40
        scoring.advance(10)
        for _ in range(4):
            clock.now += 15
            with phase("waiting"):
                pass
    told = [line.split("; ")[0] for line in capsys.readouterr().err.splitlines() if "%" in line]
    assert [line.rpartition(", ")[2] for line in told] == [
        "about 1 min 20 s left", "about 1 min 5 s left", "about 50 s left", "about 40 s left", "about 40 s left",
    ]  # fmt: skip


def test_phases_inside_phases_are_told_together(clock, capsys):
    with reporting("law"), phase("training", 10, "steps") as training:
        training.advance()
        with phase("hashing", 1000, "bytes") as hashing:
            clock.now += 12
            hashing.advance(500)
        training.advance()
    assert capsys.readouterr().err.splitlines() == [
        "law: training: 10% (1 of 10 steps), 12 s; hashing: 50% (500 B of 1.0 kB), 12 s, about 12 s left",
        "law: hashing: 500 B in 12 s",
        "law: training: 2 steps in 12 s",
    ]


def test_a_phase_inside_one_of_the_same_unit_is_a_part_of_it(clock, capsys):
    with reporting("brain"), phase("verifying", 300, "bytes"):
        for _ in range(3):
            clock.now += 12
            with phase("hashing", 100, "bytes") as hashing:
                hashing.advance(100)
    found = capsys.readouterr().err.splitlines()
    assert found[1] == "brain: verifying: 66% (200 B of 300 B), 24 s, about 12 s left"
    assert not [line for line in found if "hashing" in line]


def test_a_phase_that_fails_or_is_left_is_not_told_as_done(clock, capsys):
    with reporting("law"):
        with pytest.raises(OSError), phase("hashing", 2, "files") as hashing:  # noqa: PT011, PT012
            clock.now += 12
            hashing.advance()
            raise OSError
        for file in track(range(9), "reading", "files"):
            clock.now += 12
            if file:
                break
        with phase("tokenizing"):
            clock.now += 12
    assert capsys.readouterr().err.splitlines() == [
        "law: hashing: 50% (1 of 2 files), 12 s, about 12 s left",
        "law: reading: 11% (1 of 9 files), 12 s, about 1 min 36 s left",
        "law: tokenizing: done in 12 s",
    ]


def test_a_verb_inside_a_verb_has_its_own_subject_in_the_same_log(clock, capsys):
    with reporting("law"):
        clock.now += 8
        with reporting("router"), phase("training"):
            clock.now += 2
            say("version 3 stays")
        say("is saved already")
    assert capsys.readouterr().err == "router: version 3 stays\nlaw: is saved already\n"


# Where nothing is wanted


@pytest.mark.parametrize("inside", [None, False])
def test_silence_is_silence_all_the_way_down(clock, capsys, inside):
    with reporting("law", False), reporting("router", inside), phase("training", 9, "steps") as training:
        clock.now += 100
        training.advance()
        say("something")
    assert capsys.readouterr() == ("", "")
    with reporting("law"), reporting("router", False), phase("training", 9, "steps") as training:
        clock.now += 100
        training.advance()
        say("something")
    assert capsys.readouterr() == ("", "")


def test_a_verb_that_was_asked_to_show_itself_does_so_inside_a_silent_one(clock, capsys):
    with reporting("law", False), reporting("router", True):
        say("something")
    assert capsys.readouterr().err == "router: something\n"


def test_where_no_verb_reports_a_phase_does_nothing(clock, capsys):
    with phase("hashing", 3, "bytes") as hashing:
        clock.now += 100
        hashing.advance(3)
    assert list(track([1, 2], "reading", "files")) == [1, 2]
    say("something")
    assert capsys.readouterr() == ("", "")


def test_a_thread_says_nothing_of_its_own(clock, capsys):
    def work():
        with phase("hashing", 3, "bytes") as hashing:
            clock.now += 100
            hashing.advance(3)

    with reporting("law"):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        with phase("waiting"):
            pass
    assert "hashing" not in capsys.readouterr().err


def test_a_log_that_is_closed_stops_no_work(monkeypatch, clock):
    closed = io.StringIO()
    closed.close()
    with reporting("law"), phase("reading", 2, "files") as reading:
        monkeypatch.setattr("sys.stderr", closed)
        clock.now += 12
        reading.advance(2)
    monkeypatch.setattr("sys.stderr", None)
    with reporting("law"), phase("reading"):
        clock.now += 12


# On a terminal


def test_a_terminal_gets_bars(monkeypatch, capsys):
    terminal = at_terminal(monkeypatch)
    with reporting("law"), phase("training", 4000, "steps") as training:
        time.sleep(0.1)
        training.advance(10, note="loss 3.500")
        wait_for(lambda: "loss 3.500" in terminal.getvalue())
        with phase("hashing"):
            wait_for(lambda: "law: hashing" in terminal.getvalue())
    told = terminal.getvalue()
    assert "law: training" in told
    assert "0% (10 of 4,000 steps), loss 3.500, " in told
    assert " left" in told
    assert "━" in told
    assert capsys.readouterr().out == ""


def test_results_printed_while_there_is_a_bar_go_to_stdout(monkeypatch, capsys):
    terminal = at_terminal(monkeypatch)
    with reporting("law"), phase("training"):
        wait_for(lambda: "law: training" in terminal.getvalue())
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()


def test_short_phases_leave_no_trace_on_a_terminal_and_long_ones_a_line(monkeypatch, clock):
    terminal = at_terminal(monkeypatch)
    with reporting("law"):
        with phase("reading", 3, "files") as reading:
            reading.advance(3)
        assert terminal.getvalue() == ""
        with phase("training [x]", 3, "steps") as training:
            training.advance(3)
            clock.now += 12
        say("saved [y]")
    assert "law: training [x]: 3 steps in 12 s\n" in terminal.getvalue()
    assert terminal.getvalue().endswith("law: saved [y]\n")


def test_a_terminal_that_is_gone_stops_no_work(monkeypatch, clock):
    terminal = at_terminal(monkeypatch)
    with reporting("law"), phase("training", 3, "steps") as training:
        terminal.close()
        clock.now += 12
        training.advance()
        say("a remark")


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch, clock):
    terminal = at_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with reporting("law"), phase("training", 3, "steps") as training:
        clock.now += 12
        training.advance()
    assert terminal.getvalue().startswith("law: training: 33% (1 of 3 steps), 12 s, about 24 s left\n")


# What every verb says: work that is not named here any more has gone silent

TRAINING = ("--sequence-length", "16", "--batch-size", "8", "--precision", "float32", "--epochs", "1")
LAYERS = ("--num-layers", "1", "--router-samples", "8", "--admit-anyway", *TRAINING)
SETTINGS = {
    "sequence_length": 16, "batch_size": 8, "precision": "float32", "epochs": 1, "router_samples": 8,
    "keep_samples": "2kB", "admit_anyway": True,
}  # fmt: skip
POOL = {"kind": "peer", "num_experts": 64, "num_heads": 1, "top_k": 4}
EXPERTS = {
    "attention": "stickbreaking", "feed_forward": "experts", "num_experts": 4, "num_attention_experts": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
TEXT = ["reading law.jsonl", "holding text out", "tokenizing"]
LEARNED = [
    "training", "scoring held-out text by both",
    "showing the router the text", "writing module.safetensors", "hashing module.safetensors",
]  # fmt: skip
WHOLE = [
    "tokenizing", "scoring held-out text", "training", "scoring held-out text", "writing the checkpoint",
]  # fmt: skip
FITTED = ["reading the router's evidence", "fitting the router", "means", "limits"]
COUNTED = ["reading law.jsonl", "tokenizing", "counting use of experts in text"]
VERBS = {
    "new store2 --base base --general law.jsonl": (
        "store2",
        ["looking at the base", "hashing model.safetensors", "loading the base", *TEXT[::2], LEARNED[-3]],
    ),
    f"learn store more --data law.jsonl {' '.join(LAYERS)}": (
        "more",
        [TEXT[0], "loading the tokenizer", *TEXT[1:], "loading the base", "choosing vocabulary rows", *LEARNED],
    ),
    f"grow store drugs --experts +64 --data law.jsonl {' '.join(TRAINING)}": (
        "drugs",
        [*TEXT, "loading the base", "reading module.safetensors", "training", *LEARNED[2:]],
    ),
    "router store --kind transformer --router-layers 1 --passages 8 --epochs 1": (
        "router",
        ["loading the base", "training", "scoring held-out passages", "writing router.safetensors"],
    ),
    "router store --kind product-key": ("store", [*FITTED, "indexing the router", "sub-keys", "cells", "codes"]),
    "eval store --data law=law.jsonl drugs=drugs.jsonl --report report": (
        "store",
        [
            "reading drugs.jsonl", *FITTED, "loading the base", "tokenizing", "routing",
            "replaying the order of learning", "fitting the router", "scoring", "looking for forgetting",
            "drawing intervals", "reading manifests", "drawing the report",
        ],
    ),
    "usage store --module drugs --data text=law.jsonl --tokens 200": (
        "store", ["loading the base", "reading module.safetensors", *COUNTED],
    ),
    "prune store --module drugs --data law.jsonl --keep 0.8": ("store", [*COUNTED, "writing module.safetensors"]),
    "prune experts small --data law.jsonl --keep 0.8": (
        "experts", ["loading the base", *COUNTED, "writing the checkpoint"],
    ),
    f"finetune experts tuned --data law.jsonl {' '.join(TRAINING)}": (
        "tuned", ["hashing model.safetensors", *TEXT[:2], "loading the base", *WHOLE],
    ),
    f"pretrain made --data law.jsonl --config base/config.json --vocab-size 300 {' '.join(TRAINING)}": (
        "made", [*TEXT[:2], "training the tokenizer", *WHOLE],
    ),
    "convert experts published --to molm": (
        "experts", ["reading model.safetensors", "writing model.safetensors", "hashing model.safetensors"],
    ),
    "export store out --module law": (
        "law", ["loading the base", "reading module.safetensors", "writing the checkpoint"],
    ),
    "verify store": ("store", ["verifying"]),
    "status store": ("store", ["reading manifests"]),
    "route store abc": ("store", [*FITTED, "loading the base"]),
    "generate store abc --max-new-tokens 2": ("store", ["loading the base", "reading the prompt"]),
    "generate store abc --max-new-tokens 2 --json": ("store", ["loading the base", "answering"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with two modules, a base with experts, and text."""
    home = tmp_path_factory.mktemp("progress")
    store = store_with_texts(home, "llama")
    learn(store, "law", [home / "law.jsonl"], LearnConfig(num_layers=1, **SETTINGS), progress=False)
    learn(store, "drugs", [home / "drugs.jsonl"], LearnConfig(**POOL, **SETTINGS), progress=False)
    save_base(home / "experts", "growlm", **EXPERTS)
    return home


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("line", VERBS)
def test_every_phase_of_every_verb_is_heard(home, monkeypatch, capsys, line):
    monkeypatch.chdir(home)
    for pause in ("_LOG_SECONDS", "_FIRST_SECONDS", "_LEAST_SECONDS"):
        monkeypatch.setattr(progress, pause, 0.0)  # a line at every look
    monkeypatch.setattr("growlm.router.product_key._FEW", 0)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    told = capsys.readouterr().err
    assert ended.value.code == 0, told
    subject, expected = VERBS[line]
    said = [p.split(":")[0] for told_line in told.splitlines() for p in told_line.partition(": ")[2].split("; ")]
    found = [title for title, before in zip(said, ["", *said], strict=False) if title != before]
    for title in expected:
        assert title in found, (title, found)
        found = found[found.index(title) + 1 :]
    assert f"{subject}: {expected[-1]}: " in told or f"; {expected[-1]}: " in told
