"""Capacity: biographies say what was drawn, bits are counted right, and the experiment goes on after a kill."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disk import all_files
from growlm.base import Base
from growlm.modules import ModuleSet
from tiny import VOCAB, make_model, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
bio = import_module("benchmarks.lib.biographies")
capacity = import_module("benchmarks.quality.capacity")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
]
TINY = "--people 8 --exposures 4 --texts 2 --base-people 40 --base-exposures 2 --hidden-size 16 "
TINY += "--intermediate-size 16 --base-layers 2 --sequence-length 64 --modules 2"
METHODS = ["growlm", "finetune-sequence", "lora-sequence"]


# Biographies


def test_people_come_from_the_seed_and_share_no_name():
    group = bio.people(500, 3)
    assert group == bio.people(500, 3)
    assert group != bio.people(500, 4)
    assert len({p.name for p in group}) == 500
    assert bio.people(100, 3) + bio.people(400, 3, skip=100) == group


def test_there_are_as_many_people_as_names():
    assert len({p.name for p in bio.people(bio.NUM_NAMES, 0)}) == bio.NUM_NAMES
    for count, skip in ((bio.NUM_NAMES + 1, 0), (1, bio.NUM_NAMES), (-1, 0), (1, -1)):
        with pytest.raises(ValueError, match="there are 40,960 names"):
            bio.people(count, 0, skip=skip)


def test_facts_are_drawn_evenly():
    group = bio.people(5120, 0)
    employers = [p.facts["employer"] for p in group]
    counts = [employers.count(e) for e in bio.EMPLOYERS]  # 20 expected of each
    assert sum((c - 20) ** 2 / 20 for c in counts) < 340  # chi-squared with 255 degrees: p < 0.0003 beyond
    same = sum(p.facts["birth place"] == p.facts["university"] for p in group)
    assert same < 60  # 25.6 expected if the two are independent


def test_values_are_counted_exactly_and_none_begins_another():
    wanted = {"birth date": 28 * 12 * 200, "birth place": 200, "university": 200, "field": 64, "employer": 256}
    assert {a: bio.num_values(a) for a in bio.ATTRIBUTES} == wanted
    assert bio.num_bits("employer") == 8.0
    assert bio.bits_per_person() == pytest.approx(math.log2(67200) + 2 * math.log2(200) + 6 + 8)
    for parts in bio.ATTRIBUTES.values():
        for part in map(sorted, parts):
            assert not any(after.startswith(before) for before, after in pairwise(part))


@given(st.integers(0, 2**32), st.integers(0, bio.NUM_NAMES - 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_span_is_the_value_and_its_prompt_names_the_person(seed, skip, draw):
    person = bio.people(1, seed, skip=skip)[0]
    said = bio.sentences(person, random.Random(draw))
    assert sorted(s.attribute for s in said) == sorted(bio.ATTRIBUTES)
    for s in said:
        assert s.value == s.text[s.start : s.end] == person.facts[s.attribute]
        assert person.name in s.text[: s.start]
        assert s.value not in s.text[: s.start]
    assert bio.biography(person, random.Random(draw)) == " ".join(s.text for s in said)


def test_a_prompt_asks_for_one_attribute_only():
    prompts = [phrasing.split("{value}")[0] for some in bio.PHRASINGS.values() for phrasing in some]
    assert len(set(prompts)) == len(prompts)


def test_everyone_is_written_about_equally_often_in_different_words():
    group = bio.people(20, 1)
    texts = bio.biographies(group, 5, 0)
    assert texts == bio.biographies(group, 5, 0)
    for person in group:
        own = [t for t in texts if person.name in t]
        assert len(own) == 5
        assert len(set(own)) > 1
        assert all(value in t for t in own for value in person.facts.values())


# Bits


def test_bits_by_hand():
    # Employers: 8 bits each, losses 1 and 3 on average 2: 2 people x 6. Fields: 6 bits, losses beyond that: nothing.
    known = bio.bits_known({"employer": [1.0, 3.0], "field": [5.0, 11.0]})
    assert known == {"employer": 12.0, "field": 0.0}


@given(st.integers(1, 50))
def test_a_uniform_guess_knows_nothing_and_no_loss_everything(count):
    guess = bio.bits_known({a: [bio.num_bits(a)] * count for a in bio.ATTRIBUTES})
    assert sum(guess.values()) == pytest.approx(0.0, abs=1e-9)
    perfect = bio.bits_known({a: [0.0] * count for a in bio.ATTRIBUTES})
    assert sum(perfect.values()) == pytest.approx(count * bio.bits_per_person())


@pytest.fixture(scope="module")
def asked() -> list:
    return [s for p in bio.people(6, 0) for s in bio.sentences(p, random.Random(p.name))]


def test_prompt_and_value_are_split_at_the_value(asked):
    tokenizer = make_tokenizer()
    for s in asked:
        prompt, value = capacity.split(tokenizer, s)
        assert prompt[0] == tokenizer.eos_token_id
        assert tokenizer.decode([*prompt[1:], *value]) == s.text[: s.end]
        assert tokenizer.decode(value).strip() == s.value


def test_losses_of_a_model_that_knows_no_token_from_another(asked):
    tokenizer, model = make_tokenizer(), make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    scored = capacity.value_losses(ModuleSet(Base(model)), tokenizer, asked)
    wanted = [len(capacity.split(tokenizer, s)[1]) * math.log2(VOCAB) for s in asked]
    assert [loss for loss, _ in scored] == pytest.approx(wanted, rel=1e-5)
    assert capacity.counted(asked, scored)["bits"] == 0.0


def test_a_model_that_knows_one_attribute_of_everyone(asked):
    scored = [(0.0, True) if s.attribute == "field" else (100.0, False) for s in asked]
    row = capacity.counted(asked, scored)
    assert row["bits"] == row["attributes"]["field"] == 6 * 6.0
    assert row["recall"] == pytest.approx(1 / 5)
    assert row["loss"] == pytest.approx(80.0)


# The experiment


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capacity, "RATES", (3e-3,))

    def call(*extra: str) -> str:
        monkeypatch.setattr(sys, "argv", ["capacity.py", "--out", str(tmp_path / "out"), *TINY.split(), *extra])
        capacity.main()
        return capsys.readouterr().out

    return call


def results(out: Path) -> dict[str, dict]:
    """Every result but seconds, which no two runs share."""
    found = {f.stem: json.loads(f.read_text()) for f in (out / "results").glob("*.json")}
    return {n: {k: v for k, v in r.items() if k != "seconds"} if isinstance(r, dict) else r for n, r in found.items()}


def untimed(table: str) -> list[str]:
    return [re.sub(r"[\d,]+ seconds", "", line) for line in table.splitlines() if not line.endswith("...")]


@pytest.mark.slow
def test_methods_are_compared_and_a_run_that_was_killed_goes_on(run, tmp_path):
    out = tmp_path / "out"
    table = run()
    found = results(out)
    for method in METHODS:
        stages = [found[f"{method}-{n}"] for n in (1, 2)]
        assert [len(s["groups"]) for s in stages] == [1, 2]
        assert all(0 <= row["bits"] <= 8 * bio.bits_per_person() for s in stages for row in s["groups"])
        assert method in table
    one, two = (found[f"growlm-{n}"] for n in (1, 2))
    assert two["groups"][0] == one["groups"][0]  # what a module knows does not change
    assert (two["trained"], two["active"]) == (2 * one["trained"], one["active"])
    assert 0 <= two["accuracy"] <= 1
    assert 0.5 < found["lora-sequence-2"]["active"] / two["active"] < 2
    assert found["finetune-sequence-1"]["groups"][0]["loss"] != found["finetune-sequence-2"]["groups"][0]["loss"]
    assert (out / "capacity.md").read_text().strip() in table
    # As a kill leaves it: the last stage of each method has no result yet.
    for method in METHODS:
        (out / "results" / f"{method}-2.json").unlink()
    before = all_files(out / "stores")
    assert untimed(run()) == untimed(table)
    assert results(out) == found
    weights = [name for name in before if name.endswith("module.safetensors")]
    after = all_files(out / "stores")
    assert len(weights) == 2
    assert all(after[name] == before[name] for name in weights)


def test_one_more_module_keeps_what_is_there(run, tmp_path):
    run("--methods", "growlm", "--modules", "1")
    first = results(tmp_path / "out")["growlm-1"]
    assert "2 learned" in run("--methods", "growlm")
    assert results(tmp_path / "out")["growlm-1"] == first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--modules", "0"], "--modules is 0; it must be at least 1"),
        (["--people", "0"], "--people is 0; it must be at least 1"),
        (["--exposures", "5"], "--exposures is 5; it must be a multiple of --texts, 2"),
        (["--hidden-size", "12"], "--hidden-size is 12; it must be a multiple of 8"),
        (["--people", "40000"], "40 people for the base and 2 groups of 40,000: there are 40,960 names"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run, extra, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run(*extra)


def test_other_settings_are_not_mixed_in(run, tmp_path):
    (tmp_path / "out" / "results").mkdir(parents=True)
    (tmp_path / "out" / "results" / "scale.json").write_text(json.dumps({"people": 9}))
    with pytest.raises(SystemExit, match="holds results of other settings"):
        run()
