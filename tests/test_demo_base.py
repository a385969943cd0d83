"""The demo on a published base: the same life cycle, what is refused is told, and finetuning stands beside it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disk import all_files, write_jsonl
from growlm import cli
from growlm.demo import corpora, published_sizing, published_stages, record
from growlm.demo.published_sizing import (
    DOMAINS,
    PublishedSize,
    PublishedSpeeds,
    finetuning,
    less,
    plan,
    seconds_for_finetuning,
    seconds_for_least,
    seconds_of,
    total,
)
from growlm.demo.published_stages import PublishedStages
from growlm.demo.run import demo
from growlm.demo.sizing import learning
from growlm.errors import BaseModelError, DataError, Interrupted, NotBetterError, StoreError
from growlm.store import Store
from growlm.training import learn as learning_module
from interruptions import at_step, interrupt
from stores import domain_text
from tiny import save_base

pytestmark = pytest.mark.usefixtures("one_thread")

# Two steps of finetuning: one that is stopped, and one more.
LEARNED = list(DOMAINS[:2])
TINY = PublishedSize(dict.fromkeys(LEARNED, 4608), True, 2, dict(published_sizing.TEXT_BYTES))
SPEEDS = PublishedSpeeds(load=4.0, read=1 / 1200, score=1 / 1000, learn=1 / 200, finetune=1 / 120)
_TEXTS = {"english": "general", "models": "letters", "operators": "digits", "maths": "signs"}


def write_texts(out: Path, *, max_bytes: Mapping[str, int]) -> None:
    for name in max_bytes:
        (out / name).mkdir(parents=True, exist_ok=True)
        documents = [domain_text(_TEXTS[name], seed, words=60) for seed in range(40)]
        write_jsonl(out / name / "train.jsonl", documents[:36])
        write_jsonl(out / name / "test.jsonl", documents[36:])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("published") / "given", max_position_embeddings=512)


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(corpora, "write", write_texts)
    monkeypatch.setattr(published_sizing, "FAST", TINY)


def measured(out: Path) -> dict[str, Any]:
    """What was measured, less what differs between two runs."""
    results = {p.stem: json.loads(p.read_bytes())["result"] for p in sorted((out / "stages").glob("[ef]*.json"))}
    for key in ("store", "base", "date", "compute"):
        results["evaluate"]["evaluation"].pop(key)
    return results


def status_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *arguments])
    return caught.value.code


@pytest.mark.slow
def test_the_whole_of_it_and_again_after_every_stop(base, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = demo(whole, base=base, fast=True, progress=False)
    assert sorted(Store.open(whole / "brain").modules) == sorted(LEARNED)
    assert list(result.evaluation["perplexity"]) == [*LEARNED, "none"]
    assert result.missed == []
    assert result.evaluation["forgetting"] == 0
    assert result.evaluation["forgetting_detail"]["changed"] == []
    assert list(result.finetuned) == [*LEARNED, "english"]
    rows = result.evaluation["perplexity"]
    last = LEARNED[-1]
    assert result.finetuned[last]["perplexity"] < rows[last]["base"]
    assert result.finetuned[last]["lost"] == 0
    assert result.finetuned["english"]["lost"] == pytest.approx(
        math.log(result.finetuned["english"]["perplexity"] / rows["none"]["base"])
    )
    assert [path.name for path in (whole / "finetuned").iterdir()] == [last]
    assert (whole / "report" / "index.html").is_file()
    lines = result.lines()
    assert lines[1].split() == ["domain", "base", "module", "routed", "finetuned"]
    assert [line.split()[0] for line in lines[2:5]] == [*LEARNED, "english"]

    def stopped_in(name: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(PublishedStages, name, lambda *_: (_ for _ in ()).throw(DataError("no more")))
            with pytest.raises(DataError, match="no more"):
                demo(parts, base=base, fast=True, progress=False)

    stopped_in("_learn")
    with at_step(0, interrupt), pytest.raises(Interrupted):  # in learning
        demo(parts, base=base, fast=True, progress=False)
    stopped_in("_finetune")
    with at_step(0, interrupt), pytest.raises(Interrupted):  # in finetuning
        demo(parts, base=base, fast=True, progress=False)
    assert demo(parts, base=base, fast=True, progress=False).missed == []
    assert measured(parts) == measured(whole)
    before = all_files(parts)
    demo(parts, base=base, fast=True, progress=False)
    assert all_files(parts) == before
    with pytest.raises(StoreError, match="holds the demo of `growlm demo --base"):
        demo(parts, fast=True, progress=False)


def test_what_is_refused_is_told_and_the_demo_goes_on(base, tmp_path, monkeypatch, capsys):
    known, refused = LEARNED

    def require(name: str, found: Any) -> None:
        if name == refused:
            raise NotBetterError(f"{name}: not better than the base")

    def unchanged(source: Path, out: Path, *arguments: Any, **settings: Any) -> None:
        shutil.copytree(source, out)

    monkeypatch.setattr(learning_module, "require_better", require)
    monkeypatch.setattr(published_stages, "finetune", unchanged)
    arguments = ["--base", str(base), "--fast", "--out", str(tmp_path / "out")]
    assert status_of([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["better"] is False
    assert found["not_better"] == [refused]
    assert found["refused"][refused]["reason"] == f"{refused}: not better than the base"
    assert list(found["evaluation"]["perplexity"]) == [known, "none"]
    # Held-out text is cut alike for all: a base that was not changed has the base's perplexity.
    rows = {**found["evaluation"]["perplexity"], **found["refused"]}
    for name in (*LEARNED, "english"):
        row = rows["none" if name == "english" else name]
        assert found["finetuned"][name]["perplexity"] == pytest.approx(row["base"], rel=1e-5)
        assert found["finetuned"][name]["lost"] == pytest.approx(0, abs=1e-5)
    assert status_of(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith(refused)).split()[2] == "refused"
    assert f"refused: {refused}: not better than the base" in lines


def test_too_few_minutes(base, tmp_path, monkeypatch, capsys):
    arguments = ["--base", str(base), "--out", str(tmp_path / "out"), "--minutes"]
    assert status_of([*arguments, "0.001"]) == 1  # as it is measured
    assert re.search(
        r"is too few for .* the least takes about [\d.]+ minutes?, and .* from about [\d.]+ minutes? on\n$",
        capsys.readouterr().err,
    )
    monkeypatch.setattr(PublishedStages, "measure", lambda self: {"speeds": vars(SPEEDS)})
    assert status_of([*arguments, "3"]) == 1
    least = math.ceil(2 * seconds_for_least(SPEEDS) / 60) / 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--minutes 3 is too few for a demo with this base on this machine: the least takes about {least:g}" in last

    begun = []

    def run(self: PublishedStages, stage: str, done: Any) -> dict[str, Any]:
        begun.append(stage)
        raise DataError("no more")

    monkeypatch.setattr(PublishedStages, "run", run)
    with pytest.raises(DataError):  # nothing of it is in the way
        demo(tmp_path / "out", base=base, minutes=2 * least, progress=False)
    assert begun == ["base"]


@pytest.mark.parametrize("pace", [1.0, 1.6])
def test_it_ends_within_its_minutes_and_finetuning_is_what_is_left_out(base, tmp_path, monkeypatch, capsys, pace):
    now, begun = [0.0], []
    row = {"base": 9.0, "module": 8.0, "routed": 8.0}
    evaluation = {
        "perplexity": dict.fromkeys((*DOMAINS, "none"), row),
        "routing": {"retained_gain": 0.9, "accuracy": 0.8},
        "memory": {"resident_bytes": 10, "total_bytes": 20},
        "forgetting": 0.0,
        "forgetting_detail": {"changed": []},
    }
    status = {"total_parameters": 30, "active_parameters": 10}
    gives: dict[str, Any] = {
        "base": {"parameters": 5},
        "evaluate": {"evaluation": evaluation, "status": status, "refused": {}},
        "generate": {"samples": [{"domain": "maths", "prompt": "1", "text": "2", "module": None}]},
        "finetune": {"perplexity": {**dict.fromkeys(DOMAINS, 9.5), "english": 18.0}},
    }

    def run(self: PublishedStages, stage: str, done: Any) -> dict[str, Any]:
        begun.append(stage)
        now[0] += pace * seconds_of(self.size, SPEEDS).get(stage, 10.0)
        return gives.get(stage.partition("-")[0], {})

    def measure(self: PublishedStages) -> dict[str, Any]:
        now[0] += 20.0
        return {"speeds": vars(SPEEDS)}

    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(PublishedStages, "run", run)
    monkeypatch.setattr(PublishedStages, "measure", measure)
    minutes = 1.1 * (seconds_for_finetuning(SPEEDS) + 40) / 60
    result = demo(tmp_path / "out", base=base, minutes=minutes)
    assert now[0] <= 60 * minutes
    assert sum(result.seconds.values()) == pytest.approx(now[0])
    assert begun == list(PublishedSize(**result.size).stages)
    err, lines = capsys.readouterr().err, result.lines()
    if pace == 1:
        assert result.finetuned["models"]["lost"] == 0
        assert result.finetuned["english"] == {"perplexity": 18.0, "lost": pytest.approx(math.log(2))}
        assert result.minutes_to_finetune is None
        assert "short of time" not in err
        assert lines[2].split() == ["models", "9.00", "8.00", "8.00", "9.50"]
    else:
        assert result.finetuned is None
        assert "short of time, so that less is left to do" in err
        assert minutes < result.minutes_to_finetune < 4 * minutes
        assert f"not finetuned, to compare: about --minutes {result.minutes_to_finetune} would do" in lines
        assert lines[2].split() == ["models", "9.00", "8.00", "8.00"]


@pytest.mark.parametrize("what", ["nothing", "text", "folder", "gguf", "cut"])
def test_a_base_that_is_none(base, tmp_path, what, capsys):
    given = tmp_path / "given"
    if what == "text":
        given.write_text("no base")
    elif what == "folder":
        given.mkdir()
    elif what == "gguf":
        given = given.with_suffix(".gguf")
        given.write_bytes(b"GGUF and no more")
    elif what == "cut":
        shutil.copytree(base, given)
        (given / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="given") as caught:
        demo(tmp_path / "out", base=given, progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_size_fits_the_time_and_more_time_never_does_less():
    least, finetuned = seconds_for_least(SPEEDS), seconds_for_finetuning(SPEEDS)
    assert plan(SPEEDS, 0.99 * least) is None
    before = None
    for seconds in [1.01 * least * 1.1**i for i in range(40)]:
        size = plan(SPEEDS, seconds)
        assert total(size, SPEEDS) <= seconds
        assert tuple(s for s in size.stages if s not in published_sizing.FIRST) == tuple(seconds_of(size, SPEEDS))
        assert size.finetune == (seconds >= finetuned)
        if before and before.finetune == size.finetune:
            assert size.learn_tokens[DOMAINS[0]] >= before.learn_tokens[DOMAINS[0]]
            assert size.max_documents >= before.max_documents
        before = size
    assert seconds_for_finetuning(replace(SPEEDS, finetune=None)) == math.inf
    assert not plan(replace(SPEEDS, finetune=None), 20 * finetuned).finetune


def test_short_of_time_finetuning_goes_first_and_what_has_begun_stays():
    size = plan(SPEEDS, 1.2 * seconds_for_finetuning(SPEEDS))
    assert size.finetune
    waiting = size.stages[size.stages.index(learning(DOMAINS[1])) :]
    needed = sum(seconds_of(size, SPEEDS)[stage] for stage in waiting)
    assert less(size, SPEEDS, waiting, 1.001 * needed, 1.0) == size
    for share in (0.9, 0.6, 0.4):
        cut = less(size, SPEEDS, waiting, share * needed, 1.0)
        assert cut.learn_tokens[DOMAINS[0]] == size.learn_tokens[DOMAINS[0]]
        each = seconds_of(cut, SPEEDS)
        assert sum(each[stage] for stage in cut.stages if stage in waiting) <= share * needed
    assert not cut.finetune
    assert finetuning(DOMAINS[0]) not in cut.stages
