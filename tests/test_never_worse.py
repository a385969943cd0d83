"""What is learned is never worse: the rate is found, the best step is kept, and what does not help is not admitted."""

from __future__ import annotations

import gc
import itertools
import json
import math
import operator
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disk import flip, write_jsonl
from growlm import Engine, GrowConfig, LearnConfig, Store, learn
from growlm import data as text_data
from growlm.cli import main
from growlm.errors import ConfigError, IntegrityError, Interrupted, NotBetterError
from growlm.modules import ModuleSet
from growlm.modules.blocks import Blocks
from growlm.modules.scoring import paired_losses, passage_losses
from growlm.modules.shapes import PeerConfig
from growlm.training import corpus, module_training, rates, whole_model
from growlm.training.admission import Comparison
from growlm.training.config import FinetuneConfig
from growlm.training.corpus import beginnings, halves
from growlm.training.finetune import finetune
from growlm.training.grow import grow
from growlm.training.rates import between, find_rate, rounds, trials_for
from growlm.training.validation import Validation, read_best
from growlm.units import format_size
from interruptions import at_step, interrupt, steps_of
from stores import make_store, store_with_texts

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> LearnConfig:
    short = {"sequence_length": 32, "batch_size": 2, "epochs": 2, "num_layers": 1, "precision": "float32"}
    return LearnConfig(**{**short, "max_rows": 50, "router_samples": 8, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_with_texts(tmp_path, "llama")


@pytest.fixture
def spoilt(monkeypatch) -> None:
    """Every step makes it worse: it climbs."""
    loss = module_training.linear_cross_entropy
    monkeypatch.setattr(module_training, "linear_cross_entropy", lambda *a, **options: -loss(*a, **options))


# The rate


@given(number=st.integers(2, 9), steps=st.integers(1, 10_000), per_step=st.integers(1, 8))
def test_trials_take_a_tenth_of_the_run_at_most(number, steps, per_step):
    plan = rounds(number, steps, per_step)
    assert sum(rates_tried * length for rates_tried, length in plan) * 10 <= steps * per_step
    if plan:
        assert plan[0][0] == number
        for (many, short), (few, long) in itertools.pairwise(plan):
            assert few == math.ceil(many / 2)
            assert long == 2 * short


@pytest.mark.parametrize("best", [1e-4, 1e-3, 2e-2])
def test_the_best_rate_is_left(tmp_path, best):
    tried: list[tuple[float, int]] = []

    def trial(rate: float, steps: int) -> float:
        tried.append((rate, steps))
        return abs(math.log(rate / best)) / steps if rate < 1 else math.inf

    found, trials = find_rate([1e-4, 1e-3, 2e-2, 5.0], [(4, 3), (2, 6)], trial, tmp_path / "trials.json")
    assert found == best
    assert [(t.rate, t.steps) for t in trials] == tried
    assert len(tried) == 6
    assert sorted(rate for rate, steps in tried if steps == 3) == [1e-4, 1e-3, 2e-2, 5.0]
    # And again from what was written.
    tried.clear()
    assert find_rate([1e-4, 1e-3, 2e-2, 5.0], [(4, 3), (2, 6)], trial, tmp_path / "trials.json") == (best, trials)
    assert tried == []


@pytest.mark.parametrize(
    ("losses", "low", "high"),
    [((2.80, 2.87, 4.4, 18.0), 1, 2), ((6.40, 6.41, 6.51, 6.99), 2, 3), ((5.0, 4.0, 3.0, 9.0), 3, 3),
     ((2.80, 2.95, 4.4, 18.0), 1, 1)],
)  # fmt: skip
def test_few_steps_speak_for_low_rates_so_that_a_higher_one_counts_as_better(tmp_path, losses, low, high):
    """Of those within a twentieth of the best loss; of the last two one between, by how near their losses are."""
    of = dict(zip((1, 2, 3, 4), losses, strict=True))
    found, _ = find_rate([1, 2, 3, 4], [(4, 1), (2, 2)], lambda rate, steps: of[rate], tmp_path / "t.json")
    if low == high:
        assert found == low
    else:
        assert low < found < high


def test_the_last_two_rates_are_weighed_by_their_losses():
    assert between(1e-4, 1e-2, 2.0, 1.9) == 1e-2
    assert between(1e-4, 1e-2, 2.0, 2.0) == 1e-2
    assert between(1e-4, 1e-2, 2.0, 2.05) == 1e-3  # half way, on a logarithmic scale
    assert between(1e-4, 1e-2, 2.0, 2.1) == between(1e-4, 1e-2, 2.0, 9.0) == 1e-4
    assert between(1e-4, 1e-2, 2.0, math.inf) == 1e-4
    assert between(1e-4, 1e-2, math.inf, math.inf) == 1e-4


def test_where_all_rates_diverge_the_lowest_is_left(tmp_path):
    found = find_rate([1, 2, 3, 4], [(4, 1), (2, 2)], lambda rate, steps: math.inf, tmp_path / "t.json")
    assert found[0] == 1


def test_rates_are_tried_around_what_the_width_says():
    assert trials_for(2e-3, 100, 4)[0] == [2e-4, 6.4e-4, 2e-3, 6.4e-3]
    # A short run tries fewer, for a tenth of its steps all the same.
    assert trials_for(2e-3, 20, 4) == ([2e-4, 2e-3], [(2, 4)])
    assert trials_for(2e-3, 5, 4) == ([], [])


def test_a_run_finds_its_rate_and_says_what_it_tried(store, capfd):
    source = store.path.parent / "law.jsonl"
    result = learn(store, "law", [source], config(epochs=4))
    said = store.module("law").manifest.training
    assert [t["steps"] for t in said["trials"]] == sorted(t["steps"] for t in said["trials"])
    assert len(said["trials"]) == 6
    low, high = (t for t in said["trials"] if t["steps"] == said["trials"][-1]["steps"])
    wanted = between(low["rate"], high["rate"], low["loss"], high["loss"])
    assert result.learning_rate == said["learning_rate"] == wanted
    chosen = (
        f"learning rate {result.learning_rate:.2g}, chosen from {low['rate']:.2g} to {high['rate']:.2g} by their losses"
    )
    assert chosen in capfd.readouterr().err
    # A rate that is given is not looked for.
    assert learn(store, "lease", [source], config(learning_rate=1e-3), progress=False).learning_rate == 1e-3
    assert store.module("lease").manifest.training["trials"] == []


@pytest.mark.slow
def test_a_run_that_was_stopped_at_its_trials_ends_with_the_same_bytes(store, monkeypatch):
    source, settings = store.path.parent / "law.jsonl", config(epochs=4)
    whole = store.beside(store.path.parent / "whole")
    learn(whole, "law", [source], settings, progress=False)
    trial, calls = find_rate.__globals__["_write"], []

    def stopping(*arguments: Any) -> None:
        trial(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rates, "_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn(store, "law", [source], settings, progress=False)
    with at_step(20, interrupt), pytest.raises(Interrupted):
        learn(store, "law", [source], settings, progress=False)
    learn(store, "law", [source], settings, progress=False)
    one, other = (s.module("law").manifest for s in (store, whole))
    assert one.files == other.files
    assert one.training["trials"] == other.training["trials"]
    assert one.training["validation"] == other.training["validation"]


# The best step


class Scored:
    """A run of so many steps whose scores are given: one for the beginning, and one for each time that it is scored."""

    def __init__(self, folder: Path, losses: list[float], steps: int = 50) -> None:
        self.now, self.steps = torch.zeros(1), steps
        due = {0: 0} | {math.ceil(steps * i / 5): i for i in range(1, 6)}
        self.scored: list[int] = []

        def score() -> float:
            self.scored.append(int(self.now))
            return losses[due[int(self.now)]]

        self.folder, self.validation = folder, Validation(folder, lambda: {"step": self.now}, score)

    def keep_best(self) -> None:
        if (digest := self.validation.to_put_back) is not None:
            self.now.copy_(read_best(self.folder, digest)["step"])

    def run(self, done: int = 0, stop: int | None = None) -> int:
        self.now.fill_(done)
        self.validation.begin(done, self.steps)
        while done < (self.steps if stop is None else stop) and not self.validation.ended:
            done += 1
            self.now.fill_(done)
            self.validation.after(done, self.steps)
        return done


def test_the_best_step_is_put_back(tmp_path):
    run = Scored(tmp_path, [3.0, 2.0, 1.0, 1.5, 0.9, 0.95])
    assert run.run() == 50
    assert run.scored == [0, 10, 20, 30, 40, 50]
    run.keep_best()
    assert run.now == run.validation.best == 40


def test_a_run_ends_where_it_no_longer_helps(tmp_path):
    run = Scored(tmp_path, [3.0, 2.0, 2.5, 2.2, 0.1, 0.1])
    assert run.run() == 30
    run.keep_best()
    assert run.now == 10


def test_what_became_no_number_is_not_the_best(tmp_path):
    run = Scored(tmp_path, [3.0, math.nan, 2.5, math.inf, 2.6, 2.7])
    run.run()
    run.keep_best()
    assert run.now == 20


@pytest.mark.parametrize("stop", [0, 9, 10, 11, 25, 30, 45])
@pytest.mark.parametrize("lost", [0, 5, 15])
def test_a_run_that_was_killed_scores_and_keeps_the_same(tmp_path, stop, lost):
    """Killed after a step, with a checkpoint from some steps before."""
    losses = [3.0, 2.0, 1.0, 1.5, 0.9, 0.95]
    whole = Scored(tmp_path / "whole", losses)
    whole.run()
    Scored(tmp_path / "killed", losses).run(stop=stop)
    again = Scored(tmp_path / "killed", losses)
    again.run(done=max(stop - lost, 0))
    assert again.validation.losses == whole.validation.losses
    again.keep_best()
    assert again.now == 40


@pytest.mark.parametrize("damage", ["gone", "cut", "list", "other"])
def test_scores_that_are_damaged_are_named(tmp_path, damage):
    losses = [3.0, 2.0, 1.0, 1.5, 0.9, 0.95]
    Scored(tmp_path, losses).run(stop=31)
    file = tmp_path / "validation.json"
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(
            {"cut": file.read_text()[:20], "list": "[1]", "other": '{"losses": {"0": 3.0}, "sha256": null}'}[damage]
        )
    with pytest.raises(IntegrityError, match=r"validation\.json: this part of a stopped run is .*--restart"):
        Scored(tmp_path, losses).run(done=30)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_best_step_that_is_damaged_is_named(tmp_path, damage):
    run = Scored(tmp_path, [3.0, 2.0, 1.0, 1.5, 0.9, 0.95])
    run.run()
    file = tmp_path / "best.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        flip(file)
    with pytest.raises(IntegrityError, match=r"best\.safetensors: this part of a stopped run is .*--restart"):
        run.keep_best()


@pytest.mark.slow
def test_read_too_often_a_text_is_kept_at_its_best(store):
    """Few words, very often, at a high rate: what was held out gets worse while the text itself is learned by heart."""
    source = write_jsonl(store.path.parent / "few.jsonl", [f"{n} {chr(0x4E00 + n * 37 % 500) * 9}" for n in range(20)])
    settings = config(epochs=200, batch_size=1, sequence_length=16, learning_rate=1e-2, admit_anyway=True)
    result = learn(store, "few", [source], settings, progress=False)
    validation = {int(k): v for k, v in store.module("few").manifest.training["validation"].items()}
    assert result.best_step == min((s for s in validation if s), key=lambda s: (validation[s], s))
    assert result.best_step < result.steps == max(validation)
    assert result.tokens == result.steps * 16


# Admission


def test_gain_and_error_are_those_of_the_passages():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (40,), generator=g)
    before = tokens * (3 + 0.1 * torch.randn(40, generator=g)).double()
    after = before - tokens * (0.05 + 0.2 * torch.randn(40, generator=g)).double()
    found = Comparison.of(before, after, tokens)
    assert found.gain == pytest.approx(float((before - after).sum() / tokens.sum()))
    draws = []
    for _ in range(4000):
        some = torch.randint(40, (40,), generator=g)
        draws.append(float((before - after)[some].sum() / tokens[some].sum()))
    assert found.error == pytest.approx(torch.tensor(draws).std().item(), rel=0.15)
    assert found.before - found.after == pytest.approx(found.gain)
    turned = Comparison.of(after, before, tokens)
    assert (turned.gain, turned.error) == pytest.approx((-found.gain, found.error))


@pytest.mark.parametrize(("gain", "better", "worse"), [(0.5, True, False), (0.0, False, False), (-0.5, False, True)])
def test_a_gain_must_be_more_than_its_error(gain, better, worse):
    tokens = torch.tensor([10, 10, 10, 10])
    before = torch.tensor([30.0, 31.0, 29.0, 30.0])
    spread = torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = Comparison.of(before, before - 10 * gain + spread, tokens)
    assert (found.better, found.worse) == (better, worse)
    alone = Comparison.of(before[:1], before[:1] - 10 * gain, tokens[:1])
    assert alone.error is None
    assert (alone.better, alone.worse) == (better, worse)


def test_what_chooses_and_what_decides_share_no_document(store):
    tokenizer = store.load_tokenizer()
    documents = [text_data.Document(f"Rule {n}. " * 30, str(n)) for n in range(5)]
    passages = text_data.passages(documents, tokenizer, 32)
    validation, heldout = halves(passages)
    key = operator.attrgetter("tokens")
    assert sorted([*validation, *heldout], key=key) == sorted(passages, key=key)
    assert not {p.document_index for p in validation} & {p.document_index for p in heldout}
    for single in (text_data.passages(documents[:1], tokenizer, 32), passages[:1]):
        one, other = halves(single)
        assert one
        assert other
        tokens = sorted(t for p in [*one, *other] for t in p.tokens)
        assert tokens == sorted(t for p in single for t in p.tokens)


@pytest.mark.parametrize("grows", [False, True])
def test_admission_is_decided_by_passages_that_chose_nothing(store, monkeypatch, grows):
    """Neither those that it was trained on nor those that chose rate and step."""
    scored, chose = [], []
    pair, passages = corpus.paired_losses, module_training._Passages

    def pairs(sets, some, **options):
        scored.extend(tuple(p) for p in some)
        return pair(sets, some, **options)

    class Watched(passages):
        def __init__(self, training, some):
            chose.extend(tuple(p.tokens) for p in some)
            super().__init__(training, some)

    law, drugs = (store.path.parent / f"{name}.jsonl" for name in ("law", "drugs"))
    shape = {"sequence_length": 32, "batch_size": 2, "router_samples": 8, "precision": "float32", "admit_anyway": True}
    pools = {"kind": "peer", "num_experts": 100, "num_heads": 2, "top_k": 4}
    if grows:
        learn(store, "law", [law], LearnConfig(**pools, **shape), progress=False)
    monkeypatch.setattr(corpus, "paired_losses", pairs)
    monkeypatch.setattr(module_training, "_Passages", Watched)
    if grows:
        grow(store, "law", "+50", [drugs], GrowConfig(**shape), progress=False)
    else:
        learn(store, "law", [law], LearnConfig(num_layers=1, **shape), progress=False)
    assert scored
    assert chose
    assert not set(scored) & set(chose)
    tokenizer = store.load_tokenizer()
    held, rest = text_data.split(text_data.read([drugs if grows else law]), seed=0)[::-1]
    assert {tokenizer.decode(p) for p in [*scored, *chose]} <= {d.text for d in held}
    assert not {tokenizer.decode(p) for p in [*scored, *chose]} & {d.text for d in rest}


@given(lengths=st.lists(st.integers(2, 400), min_size=1, max_size=30), wanted=st.integers(1, 3000))
def test_so_many_tokens_are_scored_as_were_asked_for(lengths, wanted):
    passages = [text_data.Passage(list(range(n)), 0) for n in lengths]
    chosen = [p.tokens for p in beginnings(passages, wanted, seed=1)]
    total = sum(map(len, chosen))
    assert total >= min(wanted, sum(min(n, 128) for n in lengths))
    assert total - len(chosen[-1]) < wanted
    assert all(p == list(range(len(p))) for p in chosen)


def test_a_conversation_is_read_as_far_as_its_first_answer():
    long, late = [False] * 300, [False] * 300
    long[7] = long[290] = late[290] = True
    found = beginnings([text_data.Passage([1] * 300, n, c) for n, c in enumerate((long, late))], 9999, seed=1)
    assert {p.document_index: (len(p.tokens), p.num_scored) for p in found} == {0: (128, 1), 1: (300, 1)}
    assert halves([found[0]]) == ([found[0]], [found[0]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("shape", [{}, {"placement": "interleaved"}, {"vocabulary": "both"}])
def test_what_two_module_sets_share_changes_no_loss(tmp_path, family, shape):
    store = make_store(tmp_path, family, {"letters": shape})
    base = store.load_base()
    sets = [ModuleSet(base), ModuleSet(base, [store.load("letters", base)])]
    tokenizer = store.load_tokenizer()
    passages = [tokenizer.encode("abcde " * n) for n in (2, 9, 5, 30)]
    together = paired_losses(sets, passages)
    assert torch.equal(together, torch.stack([passage_losses(s, passages) for s in sets]))


def test_what_does_not_help_is_not_admitted(store, spoilt):
    source = store.path.parent / "law.jsonl"
    with pytest.raises(NotBetterError, match=r"law: not better than the base.*--admit-anyway") as caught:
        learn(store, "law", [source], config(learning_rate=1e-3), progress=False)
    assert "\n" not in str(caught.value)
    assert store.modules == {}
    with Engine(store) as engine:
        assert engine.generate("The", max_new_tokens=2).module is None
    # Who wants it all the same need not train again.
    anyway = config(learning_rate=1e-3, admit_anyway=True)
    assert steps_of(lambda: learn(store, "law", [source], anyway, progress=False)) == []
    said = store.module("law").manifest.training
    assert said["comparison"]["gain"] <= said["comparison"]["error"]


def test_the_command_says_so_and_fails(store, spoilt, capfd):
    arguments = ["--sequence-length", "32", "--batch-size", "2", "--num-layers", "1", "--learning-rate", "1e-3"]
    with pytest.raises(SystemExit) as stop:
        main(["learn", str(store.path), "law", "--data", str(store.path.parent / "law.jsonl"), *arguments])
    assert stop.value.code == 1
    err = capfd.readouterr().err
    assert "growlm: law: not better than the base, so that nothing was saved: held-out loss" in err
    assert store.modules == {}
    # What it still takes is told, then and later.
    (left,) = store.status()["runs"]
    assert f"{format_size(left['bytes'])} are kept, with which the same command and --admit-anyway saves it" in err
    assert left["bytes"] == sum(p.stat().st_size for p in (store.path / left["folder"]).rglob("*")) > 0
    with pytest.raises(SystemExit):
        main(["status", str(store.path)])
    assert f"  {left['folder']}  {format_size(left['bytes'])} of a run that was not admitted" in capfd.readouterr().out
    learn(store, "law", [store.path.parent / "law.jsonl"], config(admit_anyway=True), progress=False)
    assert store.status()["runs"] == []


def test_an_update_that_is_worse_than_what_it_replaces_is_refused(store):
    source = store.path.parent / "law.jsonl"
    learn(store, "law", [source], config(epochs=6, learning_rate=1e-2), progress=False)
    little = config(tokens=64, learning_rate=1e-3, admit_anyway=False)
    with pytest.raises(NotBetterError, match="law: "):
        learn(store, "law", [source], little, update=True, progress=False)
    assert store.module("law").version == 1
    with pytest.raises(NotBetterError, match="law: worse than version 1, which it would replace"):
        learn(store, "law", [source], config(tokens=640, learning_rate=3e-3), update=True, progress=False)
    assert store.module("law").version == 1
    updated = learn(store, "law", [source], config(epochs=7, learning_rate=1e-2), update=True, progress=False)
    assert updated.version == 2
    assert updated.replaced is not None
    assert updated.replaced["version"] == 1
    assert updated.replaced["after"] == updated.loss_after
    assert updated.replaced["before"] > updated.loss_after
    assert store.module("law").manifest.training["replaced"] == updated.replaced


def test_the_command_shows_how_an_update_compares_with_what_it_replaces(store, capfd):
    source = store.path.parent / "law.jsonl"
    learn(store, "law", [source], config(tokens=640, learning_rate=3e-3), progress=False)
    arguments = ["learn", str(store.path), "law", "--data", str(source), "--update", "--admit-anyway"]
    arguments += ["--sequence-length", "32", "--batch-size", "2", "--num-layers", "1", "--learning-rate", "3e-3"]
    for version, more in ((2, []), (3, ["--json", "--seed", "1"])):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *more])
        assert stop.value.code == 0
        said = store.module("law").manifest.training["replaced"]
        assert said["version"] == version - 1
        out = capfd.readouterr().out
        if more:
            assert json.loads(out)["replaced"] == said
        else:
            losses = f"held-out loss {said['before']:.3f} -> {said['after']:.3f}"
            assert f"\nagainst version 1, which it replaces: {losses} (gain " in out


@pytest.mark.slow
def test_an_update_is_compared_with_what_is_current_when_it_is_saved(store, monkeypatch):
    """Another run has saved a better version meanwhile."""
    source = store.path.parent / "law.jsonl"
    learn(store, "law", [source], config(tokens=640, learning_rate=3e-3), progress=False)
    compare, first = corpus.Tokens.compare, []

    def meanwhile(tokens, before, after, settings):
        if not first:
            first.append(1)
            learn(store, "law", [source], config(epochs=6, learning_rate=1e-2), update=True, progress=False)
        return compare(tokens, before, after, settings)

    monkeypatch.setattr(corpus.Tokens, "compare", meanwhile)
    with pytest.raises(NotBetterError, match="law: worse than version 2, which it would replace"):
        learn(store, "law", [source], config(tokens=960, learning_rate=3e-3), update=True, progress=False)
    assert store.module("law").version == 2


def test_of_refused_runs_the_last_one_stays(store, spoilt):
    source = store.path.parent / "law.jsonl"
    for rate in (1e-3, 2e-3, 3e-3):
        with pytest.raises(NotBetterError):
            learn(store, "law", [source], config(learning_rate=rate), progress=False)
        assert len([p for p in (store.path / "work").iterdir() if p.is_dir()]) == 1
    with pytest.raises(NotBetterError):
        learn(store, "law-2", [source], config(learning_rate=1e-3), progress=False)
    assert len([p for p in (store.path / "work").iterdir() if p.is_dir()]) == 2
    learn(store, "law", [source], config(learning_rate=3e-3, admit_anyway=True), progress=False)
    assert [p.name.rpartition("-")[0] for p in (store.path / "work").iterdir() if p.is_dir()] == ["law-2"]


def test_passages_of_one_document_count_as_one():
    """Sixteen documents of four passages each, which say the same: no more sure than of sixteen passages."""
    g = torch.Generator().manual_seed(0)
    gains = torch.randn(16, generator=g).double()
    tokens = torch.full((64,), 10)
    before = torch.full((64,), 30.0, dtype=torch.float64)
    after = before - 10 * gains.repeat_interleave(4)
    documents = [n // 4 for n in range(64)]
    alone = Comparison.of(before[::4], after[::4], tokens[::4])
    assert Comparison.of(before, after, tokens, documents).error == pytest.approx(alone.error)
    assert Comparison.of(before, after, tokens).error < 0.6 * alone.error
    assert Comparison.of(before[:4], after[:4], tokens[:4], [7] * 4).passages == 4


def test_a_base_is_let_go_of_after_training(store):
    """Where the run's dtype is not the store's, another one is loaded then."""
    base = store.load_base()
    settings = config(learning_rate=1e-3)
    tokens = corpus.TrainingCorpus.read([store.path.parent / "law.jsonl"], settings)
    packed = tokens.tokenized(store.load_tokenizer(), settings)
    work = store.path.parent / "work"
    training = module_training.ModuleTraining(base, Blocks, settings, packed.packed, work, validation=packed.validation)
    training.run()
    gone = weakref.ref(base)
    gc.disable()
    try:
        del training, base
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(("length", "batch"), [(16, 1), (32, 1), (32, 8), (256, 1), (256, 8)])
def test_trials_read_a_tenth_of_what_the_run_reads(store, monkeypatch, length, batch):
    read: list[int] = []
    trial = module_training.ModuleTraining._trial

    def watched(training, rows, *rest):
        read.append(sum(len(labels) for _, labels in rows))
        return trial(training, rows, *rest)

    monkeypatch.setattr(module_training.ModuleTraining, "_trial", watched)
    source = write_jsonl(store.path.parent / "long.jsonl", [f"Rule {n} of {n * 7 % 90}. " * 12 for n in range(100)])
    settings = config(sequence_length=length, batch_size=batch, epochs=1, tokens=24_576, admit_anyway=True)
    result = learn(store, "law", [source], settings, progress=False)
    assert sum(read) * 10 <= result.steps * length * batch


def test_a_shape_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="shape is a PeerConfig; a module of kind blocks has a BlocksConfig"):
        LearnConfig(shape=PeerConfig(num_experts=100))
    assert replace(LearnConfig(kind="peer", top_k=3), seed=4).shape.top_k == 3
    assert replace(LearnConfig(), kind="peer").shape == PeerConfig()
    for wrong in ({"batch_size": "8"}, {"batch_size": 2.5}, {"kind": ["peer"]}):
        with pytest.raises(ConfigError):
            LearnConfig(**wrong)
    with pytest.raises(ConfigError, match="batch_size is None"):
        FinetuneConfig(batch_size=None)


def test_growth_that_does_not_help_is_not_admitted(store, request):
    pools = {"kind": "peer", "num_experts": 100, "num_heads": 2, "top_k": 4}
    shape = {"sequence_length": 32, "batch_size": 2, "router_samples": 8, "precision": "float32"}
    law, drugs = (store.path.parent / f"{name}.jsonl" for name in ("law", "drugs"))
    learn(store, "law", [law], LearnConfig(**pools, **shape, learning_rate=1e-2), progress=False)
    request.getfixturevalue("spoilt")
    spoilt = {**shape, "learning_rate": 1e-3}
    with pytest.raises(NotBetterError, match="law: not better than version 1 on the new text"):
        grow(store, "law", "+50", [drugs], GrowConfig(**spoilt), progress=False)
    assert store.module("law").version == 1
    assert grow(store, "law", "+50", [drugs], GrowConfig(**spoilt, admit_anyway=True)).version == 2


def test_a_result_says_how_sure_it_is(store):
    result = learn(store, "law", [store.path.parent / "law.jsonl"], config(learning_rate=5e-3), progress=False)
    assert result.gain == pytest.approx(result.loss_before - result.loss_after)
    assert 0 < result.error < result.gain
    assert json.loads(json.dumps(result.to_json()))["best_step"] == result.best_step


# Whole models


def test_finetuning_keeps_its_best_step_and_is_no_worse(store, monkeypatch):
    home = store.path.parent
    settings = {"sequence_length": 32, "batch_size": 2, "precision": "float32", "epochs": 2, "learning_rate": 3e-3}
    result = finetune(home / "base", home / "tuned", [home / "law.jsonl"], FinetuneConfig(**settings), progress=False)
    assert result.gain > result.error > 0
    assert 0 < result.best_step <= result.steps
    loss = whole_model.linear_cross_entropy
    monkeypatch.setattr(whole_model, "linear_cross_entropy", lambda *a, **options: -loss(*a, **options))
    with pytest.raises(NotBetterError, match=r"worse: worse than the checkpoint that it began with.*--admit-anyway"):
        finetune(home / "base", home / "worse", [home / "law.jsonl"], FinetuneConfig(**settings), progress=False)
    assert not (home / "worse").exists()
    anyway = FinetuneConfig(**settings, admit_anyway=True)
    arguments = (home / "base", home / "worse", [home / "law.jsonl"], anyway)
    assert steps_of(lambda: finetune(*arguments, progress=False)) == []
    assert (home / "worse" / "model.safetensors").exists()
