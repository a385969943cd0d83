"""Command line: JSON in its promised shape, results on stdout alone, and every bad input one line and status 1."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pytest

from disk import all_files, edit, flip, write_jsonl
from growlm import __version__, cli
from growlm.cli.options import option as as_option
from growlm.cli.options import spread
from growlm.engine import Generation
from growlm.engine.sampling import SamplingConfig
from growlm.errors import ConfigError, settings_written
from growlm.evaluation import EvalConfig
from growlm.modules import KINDS, kind_of
from growlm.modules.shapes import SHAPES
from growlm.router import add_domain
from growlm.store import ROUTER_DERIVED, Store
from growlm.training.config import LearnConfig
from stores import ALPHABETS, add_module, domain_text, make_store

COMMANDS = ["pretrain", "new", "learn", "route", "generate", "chat", "eval", "status", "verify", "remove", "export"]
COMMANDS += ["router", "demo", "doctor", "version", "data"]
LEARN = [
    "--num-layers", "1", "--sequence-length", "16", "--batch-size", "4", "--max-rows", "50", "--learning-rate", "3e-3",
    "--admit-anyway",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, a store with three modules, and text of every domain."""
    home = tmp_path_factory.mktemp("made")
    make_store(home)
    for domain in ALPHABETS:
        write_jsonl(home / f"{domain}.jsonl", [domain_text(domain, 500 + i) for i in range(12)])
    return home


@pytest.fixture
def home(home, monkeypatch) -> Path:
    """It is also the working folder."""
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def answer(run):
    """Runs a command with --json, which must succeed: its one object."""

    def call(*arguments: str) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what a store derives from its modules or keeps for speed."""
    derived = {"lock", "cache", "scratch", "work", *ROUTER_DERIVED}
    return {k: v for k, v in all_files(folder).items() if not derived & set(k.split("/"))}


def scores_of(found: dict) -> bool:
    return (
        set(found["scores"]) == {"letters", "digits", "signs", "none"} and abs(sum(found["scores"].values()) - 1) < 1e-5
    )


# What --json prints


def test_generate_json(home, answer):
    found = answer("generate", "store", domain_text("digits", 9), "--max-new-tokens", "5")
    assert {"text", "module", "scores", "resident_bytes", "loaded"} <= set(found)
    assert (found["module"], found["loaded"]) == ("digits", ["digits"])
    assert isinstance(found["text"], str)
    assert isinstance(found["resident_bytes"], int)
    assert scores_of(found)
    named = answer("generate", "store", "abc", "--module", "signs", "--max-new-tokens", "3")
    assert (named["module"], named["scores"], named["loaded"]) == ("signs", {}, ["signs"])
    alone = answer("generate", "store", "abc", "--module", "base", "--max-new-tokens", "3")
    assert (alone["module"], alone["loaded"]) == (None, [])
    assert alone["resident_bytes"] < named["resident_bytes"]
    nothing = answer("generate", "store", domain_text("general", 9), "--max-new-tokens", "3")
    assert (nothing["module"], nothing["loaded"]) == (None, [])


def test_an_answer_that_ends_at_once_is_explained(home, run, monkeypatch):
    """An empty line alone leaves a user with nothing to do."""
    monkeypatch.setattr("growlm.base.Base.end_tokens", lambda *_: range(10_000))
    code, out, err = run("generate", "store", "abc", "--module", "base")
    assert (code, out.strip()) == (0, "")
    assert "the model ended the text at once; a question is best asked with growlm chat" in err


def test_route_json(home, answer):
    found = answer("route", "store", domain_text("letters", 9))
    assert set(found) == {"module", "refused", "scores", "tied"}
    assert found["module"] == "letters"
    assert scores_of(found)
    assert list(found["scores"].values()) == sorted(found["scores"].values(), reverse=True)
    assert answer("route", "store", domain_text("general", 9))["module"] is None


def test_status_json(home, answer):
    found = answer("status", "store")
    assert {"base", "modules", "total_parameters", "active_parameters"} <= set(found)
    assert found["base"] == "../base"
    assert [m["name"] for m in found["modules"]] == ["digits", "letters", "signs"]
    for module in found["modules"]:
        assert set(module) == {
            "name", "version", "older_versions", "kind", "bytes", "parameters", "about", "text_bytes", "holds_text",
        }  # fmt: skip
        assert (module["version"], module["older_versions"], module["kind"]) == (1, [], "blocks")
    sizes = [m["parameters"] for m in found["modules"]]
    assert found["total_parameters"] - sum(sizes) == found["active_parameters"] - max(sizes) > 0


def test_status_tells_of_older_versions(home, run, answer):
    store = Store.open(home / "store")
    base = store.load_base()
    for seed in (7, 8):
        add_module(store, base, "digits", seed)
    store.remove("digits", 2)
    assert {m["name"]: m["older_versions"] for m in answer("status", "store")["modules"]} == {
        "digits": [1], "letters": [], "signs": [],
    }  # fmt: skip
    lines = run("status", "store")[1].splitlines()
    assert [line.split("  blocks")[0].split() for line in lines[1:4]] == [
        ["digits", "version", "3", "(1", "older", "version)"],
        ["letters", "version", "1"],
        ["signs", "version", "1"],
    ]


def test_route_says_which_modules_are_as_likely(home, run, answer):
    store = Store.open(home / "store")
    prompt = domain_text("digits", 9)
    assert answer("route", "store", prompt)["tied"] == []
    assert "as likely" not in run("route", "store", prompt)[1]
    add_domain(store, add_module(store, store.load_base(), "numbers", 9, domain="digits"), None)
    found = answer("route", "store", prompt)
    assert (found["module"], found["tied"]) == ("digits", ["digits", "numbers"])
    out = run("route", "store", prompt)[1]
    assert out.startswith("digits\n  digits and numbers are as likely, as modules of the same text are; the first")


def test_learn_json(home, answer):
    found = answer("learn", "store", "other", "--data", "other.jsonl", *LEARN)
    assert set(found) >= {
        "name", "version", "loss_before", "loss_after", "tokens", "seconds", "tokens_per_second",
    }  # fmt: skip
    assert (found["name"], found["version"]) == ("other", 1)
    assert found["loss_after"] < found["loss_before"]
    assert found["tokens"] > 0
    again = answer("learn", "store", "other", "--data", "other.jsonl", "general.jsonl", *LEARN, "--update")
    assert again["version"] == 2
    sources = Store.open(home / "store").module("other").manifest.training["sources"]
    assert len(sources) == 2


def test_data_show_json(home, answer, run):
    found = answer("data", "show", "digits.jsonl", "letters.jsonl", "--base", "base", "--samples", "2")
    assert (found["documents"], found["conversations"], len(found["samples"])) == (24, 0, 2)
    assert found["tokens"] == found["learned"] > 0
    # A store knows its base, be that a GGUF file.
    assert answer("data", "show", "digits.jsonl", "letters.jsonl", "--base", "store", "--samples", "2") == found
    code, out, _ = run("data", "show", "digits.jsonl", "--base", "base", "--sequence-length", "8")
    assert (code, out.count("«")) == (0, 3)
    assert out.startswith("read: 12 documents, none held out; all ")
    code, out, err = run("data", "show", "digits.jsonl", "--base", "base", "--text-key", "body")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "digits.jsonl:1: no key 'body' among 'text'" in err


def test_eval_json(home, answer):
    found = answer("eval", "store", "--data", "digits=digits.jsonl", "letters=letters.jsonl", "none=general.jsonl")
    assert {"perplexity", "forgetting", "routing"} <= set(found)
    assert set(found["perplexity"]) == {"digits", "letters", "none"}
    for row in found["perplexity"].values():
        assert {"base", "module", "routed"} <= set(row)
    assert found["forgetting"] == 0
    assert {"accuracy", "confusion", "retained_gain"} <= set(found["routing"])
    assert found["routing"]["accuracy"] == 1
    assert found["routing"]["confusion"]["digits"]["digits"] == 12


def test_new_json(home, answer):
    found = answer("new", "fresh", "--base", "base", "--general", "general.jsonl")
    assert found["base"] == "../base"
    assert json.loads((home / "fresh" / "store.json").read_text()) == found
    assert answer("status", "fresh")["modules"] == []


def test_pretrain_json(home, answer):
    options = ["--preset", "tiny", "--tokens", "512", "--sequence-length", "16", "--batch-size", "4"]
    found = answer("pretrain", "made", "--data", "digits.jsonl", "letters.jsonl", *options, "--vocab-size", "280")
    assert {"loss_before", "loss_after", "tokens", "parameters"} <= set(found)
    assert (home / "made" / "config.json").is_file()


def test_verify_remove_export_and_version_json(home, answer, run):
    assert answer("verify", "store") == {"ok": True, "problems": []}
    found = answer("export", "store", "out", "--module", "digits")
    assert found == {"path": "out", "module": "digits"}
    assert (home / "out" / "model.safetensors").is_file()
    assert answer("remove", "store", "digits", "--yes") == {"removed": "digits", "version": 1}
    assert [m["name"] for m in answer("status", "store")["modules"]] == ["letters", "signs"]
    assert answer("version") == {"growlm": __version__}
    flip(home / "store" / "modules" / "signs" / "1" / "module.safetensors")
    code, out, _ = run("verify", "store", "--json")
    found = json.loads(out)
    assert (code, found["ok"], len(found["problems"])) == (1, False, 1)


def test_a_number_that_is_none_is_null(home, run, monkeypatch):
    monkeypatch.setattr(Store, "status", lambda self: {"loss": math.nan, "worse": [math.inf, "é"]})
    assert run("status", "store", "--json") == (0, '{"loss": null, "worse": [null, "é"]}\n', "")


# What people read


def test_results_are_on_stdout_and_remarks_on_stderr(home, run):
    code, out, err = run("generate", "store", "abc", "--module", "digits", "--max-new-tokens", "6")
    _, whole, _ = run("generate", "store", "abc", "--module", "digits", "--max-new-tokens", "6", "--json")
    assert (code, out) == (0, json.loads(whole)["text"] + "\n")
    assert "[digits;" in err
    assert err.count("\n") == 1
    assert run("route", "store", domain_text("general", 9))[1].startswith("none of the modules\n")
    told = run("generate", "store", domain_text("general", 9), "--max-new-tokens", "2")[2]
    assert "[base: the router chose no module; name one with --module to have it all the same; " in told
    for arguments, word in [
        (("status", "store"), "letters"),
        (("verify", "store"), "3 modules"),
        (("eval", "store", "--data", "digits=digits.jsonl"), "router accuracy 100.0%"),
        (("export", "store", "out", "--module", "digits"), "from_pretrained"),
        (("remove", "store", "signs", "--yes"), "removed signs"),
        (("new", "fresh", "--base", "base"), "made for base"),
        (("version",), __version__),
    ]:
        code, out, err = run(*arguments)
        assert (code, err) == (0, ""), arguments
        assert word in out
    code, out, err = run("learn", "store", "other", "--data", "other.jsonl", *LEARN)
    assert (code, out.startswith("other version 1: learned from")) == (0, True)
    assert all(line.startswith("other: ") for line in err.splitlines())
    assert "other: read: 12 documents; held out: " in err
    assert "other: to train on: 32 rows of 16 tokens; all 512 tokens are learned" in err


def test_eval_writes_its_report(home, run):
    code, out, err = run("eval", "store", "--data", "digits=digits.jsonl", "--report", "report", "--json")
    assert code == 0
    json.loads(out)
    assert "report: report" in err
    assert any((home / "report").iterdir())


def test_sampling_options_reach_the_answer(home, answer):
    one = ["generate", "store", "abc", "--module", "digits", "--max-new-tokens", "12"]
    greedy = answer(*one)["text"]
    hot = [*one, "--temperature", "2"]
    assert answer(*hot, "--top-k", "1")["text"] == answer(*hot, "--top-p", "0.000001")["text"] == greedy
    assert (
        answer(*hot, "--seed", "1")["text"]
        == answer(*hot, "--seed", "1")["text"]
        != answer(*hot, "--seed", "2")["text"]
    )
    stop = greedy[3]
    assert answer(*one, "--stop", stop)["text"] == greedy[: greedy.index(stop)]


def test_several_modules_in_one_answer(home, answer, run):
    found = answer("generate", "store", domain_text("digits", 9), "--mix", "2", "--max-new-tokens", "3")
    assert len(found["mixture"]) == 2
    assert "digits" in found["mixture"]
    found = answer("generate", "store", domain_text("digits", 9), "--reroute", "2", "--max-new-tokens", "5")
    assert found["changes"][0] == [0, "digits"]
    code, _, err = run("generate", "store", domain_text("digits", 9), "--mix", "2", "--max-new-tokens", "3")
    assert (code, "%" in err) == (0, True)
    assert "the router knows 3 modules" in refused(run, home, "generate", "store", "abc", "--mix", "4")


def test_one_version_can_be_removed(home, run, answer):
    store = Store.open(home / "store")
    add_module(store, store.load_base(), "digits", 50)
    assert "no version 7" in refused(run, home, "remove", "store", "digits", "--version", "7", "--yes")
    assert answer("remove", "store", "digits", "--version", "1", "--yes") == {"removed": "digits", "version": 1}
    assert [m["version"] for m in answer("status", "store")["modules"] if m["name"] == "digits"] == [2]
    assert run("verify", "store")[0] == 0
    answer("remove", "store", "digits", "--version", "2", "--yes")  # the last one
    assert "digits" not in Store.open(home / "store").modules


def test_a_report_goes_where_nothing_else_is_and_is_checked_first(home, run, monkeypatch):
    monkeypatch.setattr("growlm.evaluation.measure.evaluate", lambda *a, **k: pytest.fail("evaluated for nothing"))
    data = ("--data", "digits=digits.jsonl", "--report")
    assert "holds something else" in refused(run, home, "eval", "store", *data, "base")
    (home / "file").write_text("")
    assert "cannot write" in refused(run, home, "eval", "store", *data, "file/report")


def test_a_module_that_does_worse_than_the_base_is_said_to(home, run):
    code, out, err = run(
        "learn", "store", "other", "--data", "other.jsonl", *LEARN, "--learning-rate", "0.9", "--epochs", "1"
    )
    assert code == 0, err
    (row,) = (line for line in out.splitlines() if line.startswith("loss, nats a token"))
    before, after = map(float, row.removeprefix("loss, nats a token").split()[:2])
    assert ("does worse than the base" in err) == (after > before)
    assert after > before


def test_several_values_after_one_option():
    assert spread(["learn", "s", "n", "--data", "a", "b", "c", "--epochs", "2"]) == [
        "learn", "s", "n", "--data", "a", "--data", "b", "--data", "c", "--epochs", "2",
    ]  # fmt: skip
    assert spread(["--data=a", "b", "--general", "c", "d"]) == [
        "--data", "a", "--data", "b", "--general", "c", "--general", "d",
    ]  # fmt: skip
    assert spread(["--data", "--json"]) == ["--data", "--json"]
    assert spread(["generate", "s", "p", "--stop", "x"]) == ["generate", "s", "p", "--stop", "x"]


def test_chat_takes_its_turns_from_stdin(home, run, monkeypatch):
    lines = iter(["abc", "", "/module digits", "01 02", "/module nobody", "/what", "/new", "x", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, _, err = run("chat", "store", "--max-new-tokens", "4")
    assert code == 0
    notes = err.splitlines()
    assert notes[0] == "/module NAME (or several), /module base, /module auto, /new, /quit"
    assert "[digits]" in notes
    assert sum("no module 'nobody'" in n for n in notes) == 1
    assert "/what: no such command; there are " + notes[0] in notes
    assert err.count("/module base, /module auto") == 2
    assert next(lines) == "never"


class TalkOnly:
    """A conversation with no one: what it was asked, and how often a stream was read to its end."""

    said: ClassVar[list[str]] = []
    finished = 0

    def __init__(self, *arguments, **options):
        pass

    def say(self, text, **options):
        TalkOnly.said.append(text)
        yield "half an "
        yield Generation("half an answer", "digits", {}, 0, [], [], 1, "stop")
        yield "answer"
        TalkOnly.finished += 1


def test_a_stream_is_read_to_its_end(home, run, monkeypatch):
    """Only then has it finished: what it does after its result would be left undone."""
    monkeypatch.setattr("growlm.engine.chat.Chat", TalkOnly)
    lines = iter(["abc", "def", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, err = run("chat", "store")
    assert (code, out) == (0, "half an answer\n" * 2)
    assert err.count("[digits]") == 2
    assert (TalkOnly.said, TalkOnly.finished) == (["abc", "def"], 2)


def test_chat_in_a_script_fails_if_a_turn_did(home, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("/module nobody\nabc\n"))
    code, _, err = run("chat", "store", "--max-new-tokens", "2")
    assert code == 1
    assert "error:" in err
    code, _, err = run("chat", "store", "--top-p", "0")
    assert (code, err.count("\n"), "--top-p" in err) == (1, 1, True)


def test_chat_ends_with_its_input(home, run, monkeypatch):
    def closed(prompt=""):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert run("chat", "store")[0] == 0


# Errors: status 1, one line on stderr, nothing on stdout, and the store as it was


def bad(path: str, content: bytes | None) -> str:
    if content is not None:
        Path(path).write_bytes(content)
    return path


GOOD = b'{"text": "fine"}\n'
DATA = {
    "missing": ("gone.txt", None, "gone.txt"),
    "empty": ("empty.txt", b"", "empty.txt"),
    "blank": ("blank.txt", b" \n \n", "blank.txt"),
    "bad line": ("bad.jsonl", GOOD * 2 + b'{"text": \n', "bad.jsonl:3"),
    "no object": ("list.jsonl", GOOD + b"[1]\n", "list.jsonl:2"),
    "no key": ("key.jsonl", GOOD + b'{"body": "x"}\n', "key.jsonl:2"),
    "no string": ("int.jsonl", b'{"text": 3}\n', "int.jsonl:1"),
    "utf-8": ("latin.txt", b"caf\xe9 au lait", "latin.txt"),
    "binary": ("zero.txt", b"a\0b", "zero.txt"),
    "parquet": ("bad.parquet", b"nonsense", "bad.parquet"),
    "too short": ("short.txt", b"a", "too little text"),
}


def refused(run, home: Path, *arguments: str) -> str:
    """Runs what must fail, with and without --json; its message."""
    lines = []
    for extra in ([], ["--json"]):
        before = contents(home)
        code, out, err = run(*arguments, *extra)
        assert (code, out) == (1, ""), err
        assert err.startswith("growlm: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert contents(home) == before
        lines.append(err)
    assert lines[0] == lines[1]
    return lines[0]


@pytest.mark.parametrize("case", list(DATA))
@pytest.mark.parametrize("command", ["learn", "eval", "pretrain", "new"])
def test_bad_data(home, run, case, command):
    name, content, word = DATA[case]
    path = bad(name, content)
    arguments = {
        "learn": ("learn", "store", "fresh", "--data", "other.jsonl", path, *LEARN),
        "eval": ("eval", "store", "--data", f"digits={path}"),
        "pretrain": ("pretrain", "out", "--data", path, "--preset", "tiny", "--tokens", "1k"),
        "new": ("new", "out", "--base", "base", "--general", path),
    }[command]
    if case == "too short" and command == "learn":
        arguments = ("learn", "store", "fresh", "--data", path, *LEARN)
    if case in ("empty", "blank") and command == "learn":
        arguments = ("learn", "store", "fresh", "--data", path, *LEARN)
    message = refused(run, home, *arguments)
    if command == "eval" and case == "too short":
        assert "digits" in message
    else:
        assert word in message
    assert not (home / "out" / "store.json").exists()


@pytest.mark.parametrize("failure", ["bad text", "interrupted"])
@pytest.mark.parametrize("folder", ["there", "new", "new/deep/er"])
def test_a_new_store_that_fails_takes_away_what_it_made_and_no_more(home, run, monkeypatch, folder, failure):
    (home / "there").mkdir()
    if failure == "interrupted":
        monkeypatch.setattr("growlm.router.write_general", interrupted)
    before = sorted(home.iterdir())
    data = "gone.txt" if failure == "bad text" else "general.jsonl"
    code, out, err = run("new", folder, "--base", "base", "--general", data)
    assert (code, out, err.count("\n")) == (130 if failure == "interrupted" else 1, "", 1)
    assert sorted(home.iterdir()) == before
    assert list((home / "there").iterdir()) == []


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "where", "message"),
    [
        (("status", "store"), "growlm.store.Store.status", "growlm: interrupted"),
        (("new", "fresh", "--base", "base"), "growlm.store.Store.create", "growlm: interrupted"),
        (
            ("learn", "store", "other", "--data", "other.jsonl", *LEARN),
            "growlm.store.Store.commit",
            "growlm: interrupted; what was saved is kept: run the same command again to go on",
        ),
        (
            ("finetune", "base", "tuned", "--data", "other.jsonl"),
            "growlm.training.finetune.finetune",
            "growlm: interrupted; what was saved is kept: run the same command again to go on",
        ),
        (
            ("grow", "store", "digits", "--experts", "+100"),
            "growlm.training.grow.grow",
            "growlm: interrupted; growlm status tells whether the module has its next version already",
        ),
        (
            ("grow", "store", "digits", "--undo"),
            "growlm.training.grow.take_back",
            "growlm: interrupted; growlm status tells whether the module has its next version already",
        ),
        (
            ("grow", "store", "digits", "--experts", "+100", "--data=other.jsonl"),
            "growlm.training.grow.grow",
            "growlm: interrupted; what was saved is kept: run the same command again to go on",
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_ctrl_c_says_what_is_true(home, run, answer, monkeypatch, arguments, where, message):
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        status, out, err = run(*arguments)
    assert (status, out, err.splitlines()[-1]) == (130, "", message)
    assert all(line.startswith("other: ") for line in err.splitlines()[:-1])
    if arguments[0] == "learn":
        assert list((home / "store" / "work").glob("other-*/checkpoint.json"))  # so it was not true of nothing
        assert answer(*arguments)["version"] == 1


def test_ctrl_c_at_the_question_changes_nothing(home, run, monkeypatch):
    keyboard = StringIO()
    keyboard.isatty = lambda: True
    keyboard.readline = interrupted
    monkeypatch.setattr("sys.stdin", keyboard)
    before = contents(home)
    code, _, err = run("remove", "store", "digits")
    assert (code, err.splitlines()[-1]) == (130, "growlm: interrupted; nothing was changed")
    assert contents(home) == before


def test_bad_bases(home, run):
    (home / "nothing").mkdir()
    assert "nothing" in refused(run, home, "new", "out", "--base", "nothing")
    assert "gone" in refused(run, home, "new", "out", "--base", "./gone")
    edit(home / "base" / "config.json", model_type="bert", architectures=["BertModel"])
    assert "bert" in refused(run, home, "new", "out", "--base", "base")
    assert not (home / "out").exists()


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer", "gone"])
def test_a_changed_base(home, run, change):
    if change == "weights":
        flip(home / "base" / "model.safetensors")
    elif change == "config":
        edit(home / "base" / "config.json", rms_norm_eps=0.5)
    elif change == "tokenizer":
        edit(home / "base" / "tokenizer.json", version="9.9")
    else:
        (home / "base").rename(home / "elsewhere")
    for arguments in (
        ("generate", "store", "abc"),
        ("route", "store", "abc"),
        ("learn", "store", "other", "--data", "other.jsonl", *LEARN),
        ("eval", "store", "--data", "digits=digits.jsonl"),
        ("export", "store", "out", "--module", "digits"),
        ("chat", "store"),
    ):
        if arguments[0] == "chat":
            code, out, err = run(*arguments)
            assert (code, out, err.count("\n")) == (1, "", 1)
        else:
            assert "base" in refused(run, home, *arguments)


@pytest.mark.parametrize("name", ["..", "a/b", "A", "", "auto", "none", "base", "general", "a" * 65, "a b", "-", ".a"])
def test_impossible_names(home, run, name):
    message = refused(run, home, "learn", "store", name, "--data", "other.jsonl", *LEARN)
    assert repr(name) in message
    if name not in ("auto", "base"):
        refused(run, home, "generate", "store", "abc", "--module", name)
    for arguments in (("remove", "store", name, "--yes"), ("export", "store", "out", "--module", name)):
        refused(run, home, *arguments)


def test_taken_and_unknown_names(home, run):
    message = refused(run, home, "learn", "store", "digits", "--data", "other.jsonl", *LEARN)
    assert "digits" in message
    assert "--update" in message
    for arguments in (
        ("generate", "store", "abc", "--module", "nobody"),
        ("chat", "store", "--module", "nobody"),
        ("eval", "store", "--data", "nobody=other.jsonl"),
        ("remove", "store", "nobody", "--yes"),
        ("export", "store", "out", "--module", "nobody"),
    ):
        if arguments[0] == "chat":
            code, out, err = run(*arguments)
            assert (code, out, err.count("\n")) == (1, "", 1)
        else:
            message = refused(run, home, *arguments)
            assert "nobody" in message
            assert "letters" in message
    refused(run, home, "export", "store", "out", "--module", "digits", "--version", "7")


def test_spoilt_stores(home, run):
    manifest = home / "store" / "modules" / "digits" / "1" / "module.json"
    store = home / "store" / "store.json"
    one = ("generate", "store", "abc", "--module", "digits")
    for path, name in ((manifest, "module.json"), (store, "store.json")):
        content = path.read_bytes()
        edit(path, colour="red")
        message = refused(run, home, *one)
        assert "'colour'" in message
        assert name in message
        edit(path, format=2, colour="red")
        assert "format 2" in refused(run, home, *one)
        path.write_text("{")
        assert name in refused(run, home, *one)
        path.write_bytes(content)
    weights = manifest.with_name("module.safetensors")
    content = weights.read_bytes()
    flip(weights)
    assert "module.safetensors: sha256" in refused(run, home, *one)
    assert "module.safetensors: sha256" in refused(run, home, "export", "store", "out", "--module", "digits")
    weights.write_bytes(content[:-100])
    assert "module.safetensors" in refused(run, home, *one)
    weights.unlink()
    assert "module.safetensors" in refused(run, home, *one)
    weights.write_bytes(content)
    flip(weights.with_name("router.safetensors"))
    for derived in ROUTER_DERIVED:  # what is fitted once is not read again until a module changes
        shutil.rmtree(home / "store" / "router" / derived, ignore_errors=True)
    assert "router.safetensors" in refused(run, home, "route", "store", "abc")
    for folder in ("gone", "base"):
        assert "not a store" in refused(run, home, "status", folder)


def test_budgets_that_are_too_small_or_no_size(home, run):
    for memory, word in (
        ("1kB", "too small"),
        ("185kB", "and a pass"),
        ("1MB", "do not fit together"),
        ("much", "much"),
        ("-1", "-1"),
    ):
        message = refused(run, home, "generate", "store", "abc", "--module", "digits", f"--memory={memory}")
        assert word in message
    refused(run, home, "eval", "store", "--data", "digits=digits.jsonl", "--memory", "1kB")


def test_settings_out_of_range(home, run):
    for option, value in [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "-2")]:
        refused(run, home, "generate", "store", "abc", option, value)
    for option, value in [("--epochs", "0"), ("--placement", "under"), ("--tokens", "lots"), ("--kind", "wings")]:
        refused(run, home, "learn", "store", "other", "--data", "other.jsonl", option, value)
    refused(run, home, "eval", "store", "--data", "digits=digits.jsonl", "--sequence-length", "1")
    refused(run, home, "eval", "store", "--data", "digits.jsonl")
    refused(run, home, "generate", "store", "")


def test_existing_folders_are_not_written_over(home, run):
    (home / "full").mkdir()
    (home / "full" / "mine.txt").write_text("mine")
    refused(run, home, "new", "full", "--base", "base")
    refused(run, home, "new", "store", "--base", "base")
    refused(run, home, "export", "store", "full", "--module", "digits")
    refused(run, home, "pretrain", "full", "--data", "other.jsonl", "--preset", "tiny", "--tokens", "512")


def test_remove_asks_first(home, run, monkeypatch):
    message = refused(run, home, "remove", "store", "digits")
    assert "--yes" in message
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for said, code in ((False, 1), (True, 0)):
        before = contents(home)
        monkeypatch.setattr("typer.confirm", lambda text, err=False, said=said: said)
        assert run("remove", "store", "digits")[0] == code
        assert (contents(home) == before) == (not said)


# Usage: status 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("learn", "store"),
        ("learn", "store", "x"),
        ("learn", "store", "x", "--data"),
        ("generate", "store", "abc", "--colour", "red"),
        ("generate", "store", "abc", "--seed", "many"),
        ("fly",),
        ("status", "store", "more"),
        ("new", "out"),
        ("--colour",),
    ],
    ids=" ".join,
)
def test_usage_errors(home, run, arguments):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--help" in err


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600, **options
    )


def test_help_of_every_command_without_torch():
    """`import torch` takes seconds; nobody who asks for help should wait for it."""
    code = """
import sys
from contextlib import redirect_stdout
from io import StringIO
from growlm.cli import main
for arguments in (["--help"], *([c, "--help"] for c in sys.argv[1:])):
    out = StringIO()
    with redirect_stdout(out):
        try:
            main(arguments)
        except SystemExit as stop:
            assert stop.code == 0, arguments
    assert "Usage: growlm" in out.getvalue(), arguments
    assert len(arguments) == 1 or arguments[0] == "version" or "Example" in out.getvalue(), arguments
    assert not {"torch", "transformers", "datasets"} & set(sys.modules), arguments
print("done")
"""
    done = command("-W", "error", "-c", code, *COMMANDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_no_summary_is_cut_on_eighty_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("--help")[1]
    assert "..." not in out.partition("Commands:")[2]
    assert all(f"\n  {name} " in out for name in COMMANDS)


WRONG = {
    "learn nosuch x --data digits.jsonl": "not a store",
    "learn store Bad! --data digits.jsonl": "module name 'Bad!'",
    "learn store x --data nosuch.txt": "no such file or folder",
    "learn store x --data digits.jsonl --warmup 2": "growlm: --warmup is 2.0; it is a share",
    "learn store x --data digits.jsonl --kind nosuch": "growlm: --kind 'nosuch' does not exist",
    "learn store x --data digits.jsonl --tokens 0": "growlm: --tokens is 0; it must be at least --sequence-length, 512",
    "learn store x --data digits.jsonl --tokens few": "growlm: --tokens is 'few', not a count; write it like 4M",
    "learn store x --data digits.jsonl --num-layers 0": "growlm: --num-layers is 0, expected at least 1",
    "learn store x --data digits.jsonl --kind peer --layers one": "growlm: --layers is 'one'; write numbers",
    "learn store x --data digits.jsonl --top-k 3": "growlm: --top-k is for modules of kind peer",
    "learn store x --data digits.jsonl --feature-cache much": "growlm: --feature-cache is 'much', not a size",
    "finetune base out --data digits.jsonl --load-concentration -1": "growlm: --load-concentration is -1.0; it must",
    "pretrain out --data digits.jsonl --preset large": "growlm: --preset 'large' is not one of",
    "router store --kind transformer --router-layers 0": "growlm: --router-layers is 0; it must be at least 1",
    "eval store --data digits=digits.jsonl --max-documents -1": "growlm: --max-documents is -1; it must",
    "learn store x --data nosuch.txt --dry-run": "no such file or folder",
    "generate nosuch hi": "not a store",
    "generate store hi --module nosuch": "no module 'nosuch'",
    "generate store hi --memory much": "growlm: --memory is 'much', not a size; write it like 2GB or 512MiB",
    "route nosuch hi": "not a store",
    "chat nosuch": "not a store",
    "chat store --module nosuch": "no module 'nosuch'",
    "generate store hi --module digit": "no module 'digit'; did you mean digits?",
    "generate store hi --module none": "no module 'none'; to ask the base alone, name it: base",
    "generate store hi --module None": "no module 'None'; to ask the base alone",
    "chat store --module none": "no module 'none'; to ask the base alone",
    "eval store --data base=digits.jsonl": "text that belongs to no module is none=PATH",
    "eval nosuch --data digits=digits.jsonl": "not a store",
    "eval store --data nosuch=digits.jsonl": "no module 'nosuch'",
    "eval store --data digits=nosuch.jsonl": "no such file or folder",
    "grow store nosuch --experts +5": "no module 'nosuch'",
    "grow store digits --experts 5": "write --experts +5",
    "router nosuch": "not a store",
    "status nosuch": "not a store",
    "verify nosuch": "not a store",
    "remove store nosuch --yes": "no module 'nosuch'",
    "export store out --module nosuch": "no module 'nosuch'",
    "usage nosuch --data a=digits.jsonl": "no such folder",
    "usage store --module nosuch --data a=digits.jsonl": "no module 'nosuch'",
    "prune store --module digits --keep 0.5 --data nosuch.txt": "no such file or folder",
    "finetune nosuch out --data digits.jsonl": "no such folder",
    "pretrain out --data nosuch.txt": "no such file or folder",
    "learn store law --data table.csv": "table.csv: header line: no column 'text' among 'id', 'body'",
    "learn store law --data digits.jsonl --text-key body": "digits.jsonl:1: no key 'body' among 'text'",
    "learn store law --data digits.jsonl --format prompt": "digits.jsonl:1: no key 'prompt' among 'text'",
    "learn store law --data digits.jsonl --replay table.csv": "no column 'text'",
    "learn store law --data mixed.jsonl": "mixed.jsonl:2: a record of format prompt among those of format text",
    "grow store digits --data table.csv": "no column 'text'",
    "eval store --data digits=table.csv": "no column 'text'",
    "eval store --data digits=digits.jsonl --text-key body": "no key 'body'",
    "usage store --module digits --data a=digits.jsonl --format chat": "format 'chat' is not one of",
    "prune store --module digits --keep 0.5 --data digits.jsonl --text-key body": "no key 'body'",
    "finetune base out --data table.csv": "no column 'text'",
    "pretrain out --data digits.jsonl --text-key body": "no key 'body'",
    "data show nosuch.txt --base store": "no such file or folder",
    "data show table.csv --base base": "no column 'text'",
    "new fresh --base base --general table.csv": "no column 'text'",
}


def test_what_is_wrong_with_names_is_told_without_torch(home):
    """`import torch` takes seconds; nobody who mistypes should wait for it."""
    code = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from growlm import progress
from growlm.cli import main
progress._FIRST_SECONDS = progress._LOG_SECONDS = 86_400.0  # however busy the machine is
for line, words in json.loads(sys.argv[1]).items():
    err = StringIO()
    with redirect_stderr(err):
        try:
            main(line.split())
        except SystemExit as stop:
            assert stop.code == 1, (line, stop.code, err.getvalue())
    assert words in err.getvalue() and err.getvalue().count("\\n") == 1, (line, err.getvalue())
    assert not {"torch", "transformers", "datasets"} & set(sys.modules), line
print("done")
"""
    (home / "table.csv").write_text("id,body\n1,a\n")
    (home / "mixed.jsonl").write_text('{"text": "a"}\n{"question": "a", "answer": "b"}\n')
    done = command("-W", "error", "-c", code, json.dumps(WRONG), cwd=home)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(("option", "value"), [("--mix", "0"), ("--reroute", "-1")])
def test_a_setting_is_named_as_it_was_written_where_the_answer_is_streamed_too(home, run, option, value):
    for more in ((), ("--json",)):
        code, _, err = run("generate", "store", "hi", option, value, *more)
        assert (code, err.splitlines()[-1].startswith(f"growlm: {option} is {value}; it must be")) == (1, True)


def test_a_setting_is_named_as_it_was_written():
    """In Python by its field, on the command line by its option."""
    makers = {
        "max_rows": lambda: LearnConfig(max_rows=0),
        "feature_cache": lambda: LearnConfig(feature_cache="much"),
        "num_layers": lambda: LearnConfig(num_layers=0),
        "max_documents": lambda: EvalConfig(max_documents=-1),
        "top_p": lambda: SamplingConfig(top_p=2.0),
    }
    for name, make in makers.items():
        for write, expected in ((str, f"{name} is"), (as_option, f"--{name.replace('_', '-')} is")):
            with settings_written(write), pytest.raises(ConfigError, match=f"^{expected}"):
                make()
        with pytest.raises(ConfigError, match=f"^{name} is"):
            make()


def test_the_settings_of_eval_come_from_their_class(home, run, answer):
    found = answer("eval", "store", "--data", "digits=digits.jsonl", "letters=letters.jsonl", "--max-documents", "3")
    assert sum(found["routing"]["confusion"]["digits"].values()) == 3
    assert found["matrix"] is not None
    arguments = ("eval", "store", "--data", "digits=digits.jsonl", "letters=letters.jsonl", "--no-matrix")
    assert answer(*arguments)["matrix"] is None
    text = run("eval", "--help")[1]
    for field in EvalConfig.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text


def test_the_settings_of_every_kind_are_options_of_learn(run):
    """Under a heading of the kind's own, with its default; what follows from other settings is none."""
    common, *headings = run("learn", "--help")[1].split("Options of kind ")
    listed = {kind: text for text in headings for kind in text.partition(":")[0].split(" and ")}
    assert KINDS.keys() == SHAPES.keys()
    assert listed.keys() == SHAPES.keys() - {"recall"}  # a text needs no settings
    assert SHAPES["recall"].settings() == []
    for kind, shape in SHAPES.items():
        assert kind_of(kind).Config is shape
        for name in shape.model_fields if kind in listed else ():
            text = "".join(t for t in headings if kind in t.split(":")[0])
            assert f"--{name.replace('_', '-')} " not in common
            assert (f"--{name.replace('_', '-')} " in text) == (name in shape.settings()), (kind, name)
    assert "searches a token makes. [default: 8]" in " ".join(listed["peer"].split())


@pytest.mark.slow
def test_settings_and_results_of_evaluation_are_imported_when_used():
    code = """
import sys
from growlm.evaluation import EvalConfig
assert "torch" not in sys.modules
import growlm.evaluation.measure
from growlm.evaluation import EvalResult, evaluate
assert callable(evaluate) and EvalResult.__name__ == "EvalResult"
assert set(dir(growlm.evaluation)) >= {"EvalConfig", "EvalResult", "evaluate"}
import growlm
assert growlm.evaluate is evaluate
try:
    growlm.evaluation.nothing
except AttributeError:
    print("done")
"""
    done = command("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_version_as_an_option(run):
    assert run("--version") == (0, f"{__version__}\n", "")


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in out


@pytest.mark.slow
def test_the_script_as_a_process(home):
    """The whole way: real streams, real exit status."""
    main = ("-c", "from growlm.cli import main; main()")
    done = command(*main, "generate", "store", "abc", "--module", "digits", "--max-new-tokens", "4", "--json", cwd=home)
    told = [line for line in done.stderr.splitlines() if not line.startswith("store: ")]  # a slow machine's progress
    assert (done.returncode, told) == (0, [])
    assert json.loads(done.stdout)["module"] == "digits"
    done = command(*main, "remove", "store", "digits", cwd=home, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_version_2_is_what_status_shows(home, answer):
    store = Store.open(home / "store")
    add_module(store, store.load_base(), "digits", 9)
    assert [m["version"] for m in answer("status", "store")["modules"]] == [2, 1, 1]


def test_the_router_is_changed_trained_again_and_rolled_back(home, run, answer):
    code, out, err = run("router", "store")
    assert (code, out) == (0, "gaussian: chooses among 3 of 3 modules\n"), err
    code, out, err = run("router", "store", "--kind", "transformer")
    assert (code, out) == (1, "")
    assert "no text of digits, letters, signs was kept" in err
    assert err.count("\n") == 1
    small = ["--router-layers", "1", "--sequence-length", "32", "--passages", "8", "--epochs", "1"]
    code, _, err = run("new", "kept", "--base", "base", "--router", "transformer", "--keep-samples", "50kB")
    assert code == 0, err
    options = [*LEARN, "--tokens", "600", "--router-samples", "8"]
    for version, name in enumerate(("letters", "digits"), start=1):
        learned = answer("learn", "kept", name, "--data", f"{name}.jsonl", *options)
        assert learned["router"] == version
    found = answer("router", "kept", "--kind", "transformer", *small, "--admit-anyway")
    assert (found["kind"], found["knows"], found["modules"], found["unknown"]) == ("transformer", 2, 2, [])
    assert [v["modules"] for v in found["versions"]] == [1, 2, 2]
    assert found["versions"][2]["bytes"] < found["versions"][1]["bytes"]
    for version in (3, 2):
        found = answer("router", "kept", "--remove-version", version)
    assert (found["knows"], found["unknown"]) == (1, ["digits"])
    code, out, err = run("router", "kept")
    assert "never chosen: digits" in out
    assert answer("router", "kept", "--kind", "gaussian")["knows"] == 2
    assert answer("verify", "kept")["ok"]


def test_bad_router_options_are_one_line(home, run):
    for options, message in (
        (["--kind", "oracle"], "router 'oracle' is not one of gaussian, product-key, transformer"),
        (["--remove-version", "7"], "no trained router of version 7; versions are: none"),
        (["--kind", "transformer", "--router-layers", "0"], "--router-layers is 0; it must be at least 1"),
        (["--kind", "product-key", "--epochs", "3"], "--kind product-key trains nothing, so that --epochs is of no"),
        (["--router-layers", "3"], "this command without --kind transformer trains nothing, so that --router-layers"),
        (["--kind", "gaussian", "--restart"], "--kind gaussian trains nothing, so that --restart is of no effect"),
    ):
        code, out, err = run("router", "store", *options)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
    code, _, err = run("new", "other", "--base", "base", "--router", "transformer", "--keep-samples", "0")
    assert code == 1
    assert "keep some, or use --router gaussian" in err
    assert not (home / "other").exists()
