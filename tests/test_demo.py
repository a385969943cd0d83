"""The demo: it ends within its minutes, keeps what it made, goes on where it was, and says what is missed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from disk import all_files, write_jsonl
from growlm import cli
from growlm.demo import corpora, machine, record, sizing
from growlm.demo.record import FORMAT
from growlm.demo.run import demo
from growlm.demo.sizing import DOMAINS, FAST, DemoSize, Speeds
from growlm.demo.stages import Stages
from growlm.disk.files import locked
from growlm.errors import ConfigError, DataError, IntegrityError, Interrupted, StoreError
from growlm.store import Store
from growlm.training.checkpoints import saved_step
from growlm.training.config import PRESETS
from interruptions import at_step, interrupt
from stores import domain_text

pytestmark = pytest.mark.usefixtures("one_thread")

SPEEDS = Speeds(2e-6, 1 / 5000, 1 / 6500, 1 / 13_000, 1 / 10_000, {"learn": 3.0, "evaluate": 3.0, "report": 4.0})
STAGES = FAST.stages


def given(base: float = 100.0, module: float = 20.0) -> dict[str, Any]:
    """What stages give, as the demo prints it."""
    row = {"base": base, "module": module, "routed": module}
    evaluation = {
        "perplexity": {**dict.fromkeys(DOMAINS, row), "none": {**row, "module": base}},
        "routing": {"retained_gain": 0.9, "accuracy": 0.8},
        "memory": {"resident_bytes": 10, "total_bytes": 20},
        "forgetting": 0.0,
        "forgetting_detail": {"changed": []},
    }
    status = {"total_parameters": 30, "active_parameters": 10}
    sample = {"domain": "cpp", "prompt": "int", "text": "main", "module": "cpp"}
    results: dict[str, Any] = {stage: {} for stage in STAGES}
    results["evaluate"] = {"evaluation": evaluation, "status": status}
    return results | {"generate": {"samples": [sample]}, "report": {"accounting": ["counted"]}}


class Played:
    """Stages that do nothing but take their time, on a clock that only they move.

    Attributes:
        begun: stages, in order.
        sizes: that each stage was given.
        pace: by stage, what it takes for a second that it should.
        fail: raises, five seconds after a stage has begun, which it is told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.begun: list[str] = []
        self.sizes: dict[str, DemoSize] = {}
        self.pace: dict[str, float] = {}
        self.gives = given()
        self.measured = 0
        self.fail: Callable[[str], object] = lambda stage: None
        monkeypatch.setattr(record.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(machine, "measure", self.measure)
        monkeypatch.setattr(Stages, "run", lambda stages, *arguments: self.run(stages, *arguments))

    def measure(self, seconds: float, device: str, precision: str) -> dict[str, Speeds]:
        self.measured += 1
        self.now += 20.0
        return {"tiny": SPEEDS}

    def run(self, stages: Stages, stage: str, done: Mapping[str, Any]) -> dict[str, Any]:
        assert list(done) == list(STAGES[: STAGES.index(stage)])
        self.begun.append(stage)
        self.sizes[stage] = stages.size
        self.now += 5.0
        self.fail(stage)
        self.now += self.pace.get(stage, 1.0) * sizing.seconds_of(stages.size, SPEEDS)[stage] - 5.0
        return self.gives[stage]


@pytest.fixture
def played(monkeypatch) -> Played:
    return Played(monkeypatch)


def failing_at(wanted: str) -> Callable[[str], None]:
    def fail(stage: str) -> None:
        if stage == wanted:
            raise DataError("no more")

    return fail


# Time


def test_it_does_what_fits_and_says_so_before(played, tmp_path, capsys):
    result = demo(tmp_path / "out")
    assert played.begun == list(STAGES)
    assert sum(result.seconds.values()) == pytest.approx(played.now)
    assert 0.7 * 600 < played.now <= 600
    assert result.size == asdict(played.sizes["report"])
    err = capsys.readouterr().err
    first = err.splitlines()[1]
    assert first.startswith("demo: in 10 minutes: a tiny base on ")
    assert f"about {played.now / 60:.1f} minutes in all" in first
    assert "too few" not in err
    assert any(line.startswith(f"took {played.now:.0f} of 600 s: measure 20 s, text ") for line in result.lines())


@pytest.mark.parametrize("minutes", [3, 10, 60])
@pytest.mark.parametrize("pace", [1.0, 1.2, 1.5])
def test_it_ends_within_its_minutes_on_a_machine_that_slows_down(played, tmp_path, minutes, pace):
    played.pace = dict.fromkeys(STAGES, pace)
    result = demo(tmp_path / "out", minutes=minutes, progress=False)
    assert played.now <= 60 * minutes
    assert result.size == asdict(played.sizes["report"])


def test_what_is_left_shrinks_where_pretraining_took_longer(played, tmp_path, capsys):
    played.pace = {"pretrain": 1.6}
    demo(tmp_path / "out")
    planned, later = played.sizes["pretrain"], played.sizes["learn-python"]
    assert later.pretrain_tokens == planned.pretrain_tokens
    assert later.text_bytes == planned.text_bytes
    assert later.learn_tokens["python"] < 0.8 * planned.learn_tokens["python"]
    assert len(set(later.learn_tokens.values())) == 1
    assert "short of time, so that less is left to do: " in capsys.readouterr().err
    assert played.now <= 600


def test_a_rerun_takes_its_sizes_from_the_folder_adapted_ones_too(played, tmp_path):
    played.pace = {"pretrain": 1.5, "learn-python": 1.3}
    first = demo(tmp_path / "out", progress=False)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "out" / "demo.json", tmp_path / "again")
    played.pace = dict.fromkeys(STAGES, 7.0)
    again = demo(tmp_path / "again", progress=False)
    assert again.size == first.size
    assert played.measured == 1
    assert played.sizes["learn-maths"].learn_tokens == first.size["learn_tokens"]


def test_too_few_minutes_to_do_anything(played, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"--minutes 0.5 is too few .* least takes about 2 minutes, .* on$"):
            demo(tmp_path / "out", minutes=0.5)
    assert played.begun == []
    result = demo(tmp_path / "out", minutes=5)  # nothing of them is in the way
    assert played.begun == list(STAGES)
    assert result.seconds["measure"] == 20
    with pytest.raises(StoreError, match=r"holds the demo of `growlm demo --minutes 5`"):
        demo(tmp_path / "out", minutes=6)


def test_too_few_minutes_to_halve_are_said_before(played, tmp_path, capsys):
    between = (sizing.seconds_for_least({"tiny": SPEEDS}) + 25) / 60
    demo(tmp_path / "out", minutes=between)
    err = capsys.readouterr().err
    assert "too few minutes for every module to halve its domain's perplexity: about " in err
    assert played.now <= 60 * between


@pytest.mark.parametrize("pace", [1.0, 1.4])
def test_a_module_that_does_not_halve_is_said_with_the_minutes_that_would_do(played, tmp_path, pace):
    played.pace = dict.fromkeys(STAGES, pace)
    played.gives = given(100.0, 60.0)
    result = demo(tmp_path / "out", minutes=4, progress=False)
    assert result.not_halved == list(DOMAINS)
    assert result.to_json()["halved"] is False
    assert result.minutes_to_halve is not None
    assert 4 < result.minutes_to_halve < 20
    assert f"not halved: the base's perplexity on python, cpp, maths; about --minutes {result.minutes_to_halve}" in (
        "\n".join(result.lines())
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--minutes", "4", "--out", str(tmp_path / "out"), "--json"])
    assert caught.value.code == 1


def test_halved_is_success(played, tmp_path, capsys):
    played.gives = given(100.0, 50.0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--out", str(tmp_path / "out"), "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["halved"] is True
    assert found["not_halved"] == []
    assert found["minutes_to_halve"] is None
    assert sum(found["seconds"].values()) == pytest.approx(played.now)


def test_the_fast_demo_is_as_large_everywhere(played, tmp_path):
    result = demo(tmp_path / "out", fast=True, progress=False)
    assert result.size == asdict(FAST)
    assert played.measured == 0
    assert "measure" not in result.seconds


def test_what_is_not_known_does_not_lose_the_table(played, tmp_path):
    evaluation = played.gives["evaluate"]["evaluation"]
    evaluation["forgetting"] = evaluation["routing"]["retained_gain"] = None
    assert any("retained gain unknown" in line for line in demo(tmp_path / "out", progress=False).lines())


# Interruptions


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_failure_it_goes_on_where_it_was(played, tmp_path, stage):
    played.fail = failing_at(stage)
    with pytest.raises(DataError, match="no more"):
        demo(tmp_path / "out", progress=False)
    assert played.begun == list(STAGES[: STAGES.index(stage) + 1])
    size, begun = played.sizes[stage], len(played.begun)
    played.fail = failing_at("")
    result = demo(tmp_path / "out", progress=False)
    assert played.begun[begun:] == list(STAGES[STAGES.index(stage) :])
    assert played.measured == 1
    assert played.sizes[stage] == size  # it had begun
    assert sum(result.seconds.values()) == pytest.approx(played.now)
    assert result.seconds[stage] == pytest.approx(5.0 + sizing.seconds_of(size, SPEEDS)[stage])
    assert played.now <= 600


def test_a_stop_in_measuring_counts(played, tmp_path, monkeypatch):
    def stop(seconds: float, device: str, precision: str) -> None:
        played.now += 100.0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(machine, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "out", progress=False)
    result = demo(tmp_path / "out", progress=False)
    assert result.seconds["measure"] == 120.0
    assert played.now <= 600


def test_the_table_comes_from_the_files_of_the_stages(played, tmp_path):
    first = demo(tmp_path / "out", progress=False)
    before = all_files(tmp_path / "out")
    played.fail = failing_at(played.begun[0])
    again = demo(tmp_path / "out", progress=False)
    assert played.begun == list(STAGES)
    assert again == first
    assert all_files(tmp_path / "out") == before


def test_seconds_are_kept_while_a_stage_runs(played, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_COUNT_EVERY", 0.001)
    seen = []

    def killed(stage: str) -> None:
        path = tmp_path / "out" / "stages" / "pretrain.json"
        late = time.perf_counter() + 20
        while stage == "pretrain" and len(seen) < 2 and time.perf_counter() < late:
            found = json.loads(path.read_bytes()) if path.exists() else {"seconds": 0.0}
            if found["seconds"] >= 5.0 and found not in seen:  # not one of before the stage ran
                seen.append(found)
                played.now += 30.0

    played.fail = killed
    demo(tmp_path / "out", progress=False)
    assert [found["result"] for found in seen] == [None, None]
    assert seen[1]["seconds"] == seen[0]["seconds"] + 30.0


# Bad input


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_are_none(tmp_path, minutes):
    with pytest.raises(ConfigError, match=r"minutes is \S+; it must be above 0, e.g. --minutes 10"):
        demo(tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="'half' is not one of"):
        demo(tmp_path / "out", precision="half")
    with pytest.raises(ConfigError, match="--fast is of one size, so that --minutes 3 is of no effect"):
        demo(tmp_path / "out", fast=True, minutes=3)
    assert not (tmp_path / "out").exists()


def damaged_size(text: str) -> str:
    return text.replace('"pretrain_tokens"', '"pretrain"')


def older(text: str) -> str:
    """As demos were before stages had files."""
    return json.dumps({"preset": "small", "vocab_size": 4096})


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        ("demo.json", lambda text: text[:50], IntegrityError, "demo.json: damaged .*; restore it, or choose another"),
        ("demo.json", lambda text: "[]", IntegrityError, "demo.json: damaged .no JSON object."),
        ("demo.json", damaged_size, IntegrityError, "demo.json: damaged .*pretrain_tokens"),
        ("demo.json", older, StoreError, f"of another version of growlm .format None, this one's is {FORMAT}."),
        ("demo.json", lambda text: text.replace("minutes 10", "minutes 7"), StoreError, "demo of `growlm .*inutes 7`"),
        (
            "stages/evaluate.json",
            lambda text: text[:-9],
            IntegrityError,
            "damaged .*; remove it to do this stage again",
        ),
    ],
)
def test_a_record_that_is_not_this_demos(played, tmp_path, file, change, error, message):
    demo(tmp_path / "out", progress=False)
    path = tmp_path / "out" / file
    path.write_text(change(path.read_text()))
    before = all_files(tmp_path / "out")
    with pytest.raises(error, match=message) as caught:
        demo(tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert all_files(tmp_path / "out") == before
    assert played.begun == list(STAGES)


def test_a_damaged_stage_is_done_again_when_its_file_is_removed(played, tmp_path):
    demo(tmp_path / "out", progress=False)
    (tmp_path / "out" / "stages" / "evaluate.json").unlink()
    demo(tmp_path / "out", progress=False)
    assert played.begun == [*STAGES, "evaluate"]


@pytest.mark.parametrize("name", ["notes.txt", "base/model.safetensors"])
def test_a_folder_that_holds_something_else(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    write_jsonl(tmp_path / "out" / name, ["mine"])
    before = all_files(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "out" / name):
        with pytest.raises(StoreError, match="holds something else than a demo; choose another --out"):
            demo(out)
    assert all_files(tmp_path / "out") == before


def test_what_a_killed_process_leaves_at_first_is_not_something_else(played, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".demo.json-12ab").write_text("{")
    (tmp_path / "out" / ".lock").touch()
    demo(tmp_path / "out", progress=False)
    assert played.begun == list(STAGES)


def test_one_at_a_time(played, tmp_path):
    demo(tmp_path / "out", progress=False)
    with locked(tmp_path / "out" / ".lock"), pytest.raises(StoreError, match="another demo is running in it"):
        demo(tmp_path / "out", progress=False)


# The stages themselves

TINY = replace(
    FAST,
    num_layers=1,
    pretrain_batch=2,
    learn_batch=2,
    pretrain_tokens=1024,
    learn_tokens=dict.fromkeys(DOMAINS[:2], 1024),
    router_samples=4,
    max_documents=2,
)
_TEXTS = {"english": "general", "python": "letters", "cpp": "digits", "maths": "signs"}


def write_texts(out: Path, *, max_bytes: Mapping[str, int]) -> None:
    for name in max_bytes:
        (out / name).mkdir(parents=True, exist_ok=True)
        documents = [domain_text(_TEXTS[name], seed, words=60) for seed in range(84)]
        write_jsonl(out / name / "train.jsonl", documents[:80])
        write_jsonl(out / name / "test.jsonl", documents[80:])


@pytest.fixture
def short(monkeypatch) -> None:
    monkeypatch.setattr(corpora, "write", write_texts)
    monkeypatch.setattr(sizing, "FAST", TINY)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(PRESETS, "tiny", sizes)


def measured(out: Path) -> dict[str, Any]:
    """An evaluation, less what differs between two runs."""
    found = json.loads((out / "stages" / "evaluate.json").read_bytes())["result"]["evaluation"]
    for key in ("store", "base", "date", "compute"):
        found.pop(key)
    return found


@pytest.mark.slow
def test_a_demo_that_was_stopped_again_and_again_ends_as_one_that_was_not(short, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = demo(whole, fast=True, progress=False)
    assert (whole / "report" / "index.html").is_file()
    domains = list(TINY.learn_tokens)
    assert sorted(Store.open(whole / "brain").modules) == sorted(domains)
    assert set(result.evaluation["perplexity"]) == {*domains, "none"}
    assert [sample["domain"] for sample in result.evaluation["samples"]] == domains
    assert any("24.5" in line for line in result.lines())

    def stopped_in(name: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Stages, name, lambda *_: failing_at(name)(name))
            with pytest.raises(DataError, match="no more"):
                demo(parts, fast=True, progress=False)

    with at_step(0, interrupt), pytest.raises(Interrupted):  # in pretraining
        demo(parts, fast=True, progress=False)
    (work,) = parts.glob(".base-*")
    assert saved_step(work) == 1
    stopped_in("_learn")
    (parts / "brain" / "modules").mkdir(parents=True)  # as if it had been killed when it made the store
    with at_step(0, interrupt), pytest.raises(Interrupted):  # in learning
        demo(parts, fast=True, progress=False)
    for name in ("_evaluate", "_generate", "_report"):
        stopped_in(name)
    demo(parts, fast=True, progress=False)
    assert measured(parts) == measured(whole)


def test_the_machine_is_measured_by_every_verb(short, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sizing, "REHEARSAL", replace(TINY, learn_tokens={"python": 1024}, text_bytes=sizing.REHEARSAL.text_bytes)
    )
    monkeypatch.setattr(machine, "rehearsal", lambda preset: sizing.REHEARSAL)
    for _ in range(3):  # others on the machine may disturb one of two that are compared
        found = machine.measure(1.0, "cpu", "float32")
        if found["tiny"].pretrain > found["tiny"].read:
            break
    assert list(found) == ["tiny"]  # nothing larger can fit a second
    speeds = found["tiny"]
    assert all(0 < getattr(speeds, name) < 1 for name in ("byte", "pretrain", "learn", "read", "score"))
    assert speeds.pretrain > speeds.read
    assert set(speeds.fixed) == {"text", "pretrain", "learn", "evaluate", "generate", "report"}


@pytest.mark.parametrize("disturbed", ["pretrain", "evaluate"])
def test_who_disturbs_one_stage_is_expected_to_disturb_all(monkeypatch, disturbed):
    clock = {"wall": 0.0, "thread": 0.0}
    gives = given()
    gives["pretrain"] = gives["learn-python"] = {"seconds": 3.0, "tokens": 30}
    gives["evaluate"]["evaluation"]["compute"] = {"tokens_per_second": {"base": 10.0, "module": 10.0}}

    def run(stages: Stages, stage: str, done: Mapping[str, Any]) -> dict[str, Any]:
        clock["wall"] += 9.0 if stage == disturbed else 3.0
        clock["thread"] += 3.0
        return gives[stage]

    monkeypatch.setattr(machine.time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(machine.time, "thread_time", lambda: clock["thread"])
    monkeypatch.setattr(Stages, "run", run)
    speeds = machine.measure(1.0, "cpu", "float32")["tiny"]
    each = [speeds.pretrain, speeds.learn, speeds.read, speeds.score]
    waits = clock["wall"] / clock["thread"]
    slow = [0] if disturbed == "pretrain" else [2, 3]
    assert each == pytest.approx([0.1 * waits / (3 if at in slow else 1) for at in range(4)])


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out" / "notes.jsonl", ["mine"])
    for arguments in (["--minutes", "0"], ["--minutes", "-3"], ["--precision", "half"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(["demo", "--out", str(tmp_path / "out"), *arguments])
        assert caught.value.code in (1, 2)
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
