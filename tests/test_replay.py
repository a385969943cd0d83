"""The replay of the order of learning: every module takes part, measured or not, within the budget."""

from __future__ import annotations

import math
import shutil
import weakref
from pathlib import Path

import pytest

from disk import write_jsonl
from growlm.errors import BudgetError, GrowlmError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.report import write_report
from growlm.evaluation.summary import summary
from growlm.router import TransformerRouter
from growlm.training.config import RouterConfig
from growlm.training.router import train_router
from stores import PLAIN, add_module, domain_text, make_store, with_pass

pytestmark = pytest.mark.usefixtures("one_thread")

GAUSSIAN, TRANSFORMER = EvalConfig(router="gaussian"), EvalConfig(router="transformer")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    store = make_store(home, modules={name: {"strength": 0.02, "steps": 30} for name in PLAIN}, keep_samples=50_000)
    train_router(store, RouterConfig(router_layers=2, passages=16, epochs=2, batch_size=8, learning_rate=5e-3))
    for name in PLAIN:
        write_jsonl(home / f"{name}.jsonl", [domain_text(name, 900 + i) for i in range(4)])
    return home


def heldout(home: Path, *names: str) -> dict[str, list[Path]]:
    return {name: [home / f"{name}.jsonl"] for name in names}


# Modules without text


def test_a_module_that_is_not_measured_takes_texts_from_those_that_are(store, home):
    """In the order of learning: letters, digits, signs, again. The last two have no text here."""
    before = evaluate(store, heldout(home, "letters", "digits"), GAUSSIAN).to_json()
    # One more of the same kind of text, which comes first in the alphabet and so wins, and has learned nothing.
    add_module(store, store.load_base(), "again", 5, domain="letters", strength=0.3)
    result = evaluate(store, heldout(home, "letters", "digits"), GAUSSIAN).to_json()
    assert result["routing"]["confusion"]["letters"]["again"] > 0
    routed = [result["perplexity"][name]["routed"] for name in ("letters", "digits")]
    own = [result["perplexity"][name]["module"] for name in ("letters", "digits")]
    matrix = result["matrix"]
    assert matrix["domains"] == ["letters", "digits"]
    assert matrix["after"][-1] == pytest.approx(routed, rel=1e-12)
    assert [row[0] for row in matrix["after"][:2]] == pytest.approx([own[0]] * 2)
    taken = math.log(routed[0] / own[0])
    assert taken > 0.1
    # Digits can be forgotten too, as something was learned after them.
    digits = math.log(routed[1] / matrix["after"][1][1])
    assert matrix["average_forgetting"] == pytest.approx((taken + digits) / 2)
    assert matrix["backward_transfer"] == pytest.approx(-matrix["average_forgetting"])
    assert before["matrix"]["average_forgetting"] < 0.1 < matrix["average_forgetting"]

    text = "\n".join(summary(result))
    assert "\nafter digits " in text
    assert "\nnow " in text
    page = write_report(result, home / "report").read_text()
    assert "<span>after digits</span>" in page
    assert "<span>now</span>" in page


def test_modules_learned_earlier_are_there_from_the_first_row(store, home):
    add_module(store, store.load_base(), "more-letters", 5, domain="letters", strength=0.02, steps=30)
    shutil.copy(home / "letters.jsonl", home / "more-letters.jsonl")
    result = evaluate(store, heldout(home, "digits", "more-letters"), GAUSSIAN).to_json()
    matrix = result["matrix"]
    assert matrix["domains"] == ["digits", "more-letters"]
    assert len(matrix["after"]) == 2
    # Before its own module was there, such text went to letters, which help it.
    assert matrix["after"][0][1] < 0.9 * matrix["before"][1]
    assert matrix["forward_transfer"] == pytest.approx(math.log(matrix["before"][1] / matrix["after"][0][1]))


def test_an_update_is_named_because_every_row_is_of_todays_versions(store, home):
    data = heldout(home, "letters", "digits")
    result = evaluate(store, data, GAUSSIAN).to_json()
    assert result["matrix"]["updated"] == []
    assert "today" not in "\n".join(summary(result)) + write_report(result, home / "report").read_text()
    add_module(store, store.load_base(), "letters", 50, strength=0.3)
    add_module(store, store.load_base(), "signs", 51)
    result = evaluate(store, data, GAUSSIAN).to_json()
    assert result["matrix"]["updated"] == ["letters", "signs"]
    assert summary(result)[-1] == "every row is of today's versions; updated since: letters, signs"
    page = write_report(result, home / "report").read_text()
    assert "Updated since, and shown as they are today: letters, signs." in page


# Memory


class Bound:
    """Counts the trained routers that are alive, with the base, whenever one more is made ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._alive: list[weakref.ref[TransformerRouter]] = []
        bind = TransformerRouter.bind

        def watched(router: TransformerRouter, base):
            others = [found for ref in self._alive if (found := ref()) is not None]
            self.most = max(self.most, base.num_bytes() + sum(r.num_bytes() for r in [router, *others]))
            ready = bind(router, base)
            self._alive.append(weakref.ref(ready))
            return ready

        monkeypatch.setattr(TransformerRouter, "bind", watched)

    @property
    def routers(self) -> int:
        return len(self._alive)


def test_one_earlier_router_at_a_time_is_in_memory_and_counted(store, home, monkeypatch):
    data = heldout(home, *PLAIN)
    free = evaluate(store, data, TRANSFORMER).to_json()
    memory = free["memory"]
    file = store.router_path / "transformer" / "1" / "router.safetensors"
    fixed = memory["base_bytes"] + memory["router_bytes"]
    budget = fixed + max(file.stat().st_size, *memory["modules"].values())
    watch = Bound(monkeypatch)
    tight = evaluate(store, data, TRANSFORMER, memory=with_pass(store, budget)).to_json()
    assert watch.routers == 3  # the engine's own, and those of two earlier stages
    assert watch.most <= budget
    assert tight["matrix"] == free["matrix"]


def test_a_replay_that_does_not_fit_is_refused_with_the_numbers(store, home, monkeypatch):
    data = heldout(home, *PLAIN)
    memory = evaluate(store, data, TRANSFORMER).memory
    fixed = memory["base_bytes"] + memory["router_bytes"]
    watch = Bound(monkeypatch)
    with pytest.raises(BudgetError, match=r"too small to replay .*base .* kB, router .* kB .*need .* --no-matrix$"):
        evaluate(store, data, TRANSFORMER, memory=with_pass(store, fixed + memory["router_bytes"]) - 1)
    assert watch.routers == 1  # the engine's own
    assert watch.most <= fixed


# A router that knows nothing


def test_a_router_that_was_trained_for_no_module_is_not_measured(store, home):
    for name in PLAIN:
        store.remove(name)
    add_module(store, store.load_base(), "other", 9)
    write_jsonl(home / "other.jsonl", [domain_text("other", 900 + i) for i in range(4)])
    for trained_for_others in (True, False):
        if not trained_for_others:
            store.router_files("transformer").drop()
        with pytest.raises(GrowlmError, match=r"growlm router .*store --kind transformer"):
            evaluate(store, heldout(home, "other"), TRANSFORMER)
    assert evaluate(store, heldout(home, "other"), GAUSSIAN).routing["accuracy"] == 1.0
