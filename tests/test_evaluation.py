"""Evaluation: perplexities equal a loop over documents; routing and forgetting are what their definitions say."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from disk import edit, write_jsonl
from growlm.errors import BudgetError, ConfigError, DataError, UnknownModuleError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.plots import matrix_figure
from growlm.evaluation.report import write_report
from growlm.evaluation.statistics import Bootstrap
from growlm.evaluation.summary import summary
from growlm.modules import ModuleSet
from growlm.modules.probe import probe
from growlm.router import GaussianRouter, Route, Router, load_router
from growlm.store import Store
from stores import PLAIN, Watch, add_module, domain_text, make_store, with_pass

DOCUMENTS = 6
CONFIG = EvalConfig(sequence_length=24, route_tokens=24)

pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(domain: str, number: int) -> str:
    return domain_text(domain, 800 + number, words=4 + 3 * number)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules={name: {"strength": 0.02, "steps": 30} for name in PLAIN})
    for domain in (*PLAIN, "general", "other"):
        write_jsonl(home / f"{domain}.jsonl", [text_of(domain, i) for i in range(DOCUMENTS)])
    return home


@pytest.fixture
def data(home) -> dict[str, list[Path]]:
    found = {name: [home / f"{name}.jsonl"] for name in ("digits", "letters")}
    return {**found, "none": [home / "general.jsonl"]}


def losses_of(store: Store, module: str | None, domain: str, length: int = 24) -> list[tuple[float, int]]:
    """Summed log-loss and number of labels of each document, one piece after another, with plain arithmetic."""
    base, tokenizer = store.load_base(), store.load_tokenizer()
    modules = ModuleSet(base, [] if module is None else [store.load(module, base)])
    found = []
    for number in range(DOCUMENTS):
        ids = tokenizer.encode(text_of(domain, number))
        total, labels = 0.0, 0
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) < 2:
                continue
            with torch.no_grad():
                logits = modules.logits(torch.tensor([piece]))[0].double()
            for at, token in enumerate(piece[1:]):
                total += float(logits[at].logsumexp(-1) - logits[at, token])
                labels += 1
        found.append((total, labels))
    return found


def perplexity(losses: list[tuple[float, int]]) -> float:
    return math.exp(sum(total for total, _ in losses) / sum(labels for _, labels in losses))


def routed_as(monkeypatch, wrong: dict[tuple[str, int], str | None]) -> None:
    """A router that is right but for these documents: (domain, number) -> its choice.

    It knows a document by its pooled state, as the true one does.
    """
    true_route = GaussianRouter.route
    seen: list[str | None] = []

    def route(self, hidden, visible=None, texts=None):
        lengths = [hidden.shape[1]] * len(hidden) if visible is None else visible.sum(-1).tolist()
        routes = true_route(self, hidden, visible, texts)
        changed = []
        for found, length in zip(routes, lengths, strict=True):
            # Within a domain, the documents are told apart by their order, which is that of their lengths.
            domain = found.module or "none"
            number = seen.count(domain)
            seen.append(domain)
            assert length > 0
            changed.append(Route(wrong[domain, number], {}) if (domain, number) in wrong else found)
        return changed

    monkeypatch.setattr(GaussianRouter, "route", route)


# Perplexity


def test_perplexities_equal_a_loop_over_documents(store, data):
    result = evaluate(store, data, CONFIG)
    assert set(result.perplexity) == {"digits", "letters", "none"}
    for name, domain in (("digits", "digits"), ("letters", "letters"), ("none", "general")):
        row = result.perplexity[name]
        base, own = losses_of(store, None, domain), losses_of(store, None if name == "none" else name, domain)
        assert row["base"] == pytest.approx(perplexity(base), rel=1e-5)
        assert row["module"] == pytest.approx(perplexity(own), rel=1e-5)
        assert row["tokens"] == sum(labels for _, labels in base)
        assert row["documents"] == DOCUMENTS
        if name != "none":
            assert row["module"] < 0.9 * row["base"]
        assert row["routed"] == row["module"]  # the router is right about all of them


def test_long_documents_are_scored_in_pieces_and_only_the_first_are_read(store, data):
    for length in (8, 24, 100):
        row = evaluate(store, {"digits": data["digits"]}, EvalConfig(sequence_length=length)).perplexity["digits"]
        assert row["base"] == pytest.approx(perplexity(losses_of(store, None, "digits", length)), rel=1e-5)
    some = evaluate(store, {"digits": data["digits"]}, replace(CONFIG, max_documents=2))
    assert some.perplexity["digits"]["base"] == pytest.approx(
        perplexity(losses_of(store, None, "digits")[:2]), rel=1e-5
    )
    assert some.perplexity["digits"]["documents"] == 2
    assert sum(some.routing["confusion"]["digits"].values()) == 2


def test_tokens_bound_a_long_document(store, data):
    some = evaluate(store, {"digits": data["digits"]}, replace(CONFIG, tokens="40")).perplexity["digits"]
    whole = evaluate(store, {"digits": data["digits"]}, CONFIG).perplexity["digits"]
    # One token of every passage is read and not scored.
    assert 40 - some["documents"] <= some["tokens"] < 40 + CONFIG.sequence_length
    assert some["tokens"] < whole["tokens"]


# Routing


def test_perfect_routing_keeps_all_of_the_gain(store, data):
    routing = evaluate(store, data, CONFIG).routing
    assert routing["accuracy"] == 1.0
    assert routing["retained_gain"] == 1.0
    assert routing["confusion"] == {
        "digits": {"digits": 6, "letters": 0, "none": 0},
        "letters": {"digits": 0, "letters": 6, "none": 0},
        "none": {"digits": 0, "letters": 0, "none": 6},
    }


@pytest.mark.parametrize("choice", ["signs", "letters", None])
def test_a_misrouted_document_costs_what_its_choice_costs(store, data, monkeypatch, choice):
    routed_as(monkeypatch, {("digits", 2): choice})
    result = evaluate(store, data, CONFIG)
    routing = result.routing
    label = choice or "none"
    assert routing["accuracy"] == 17 / 18
    assert routing["confusion"]["digits"]["digits"] == 5
    assert routing["confusion"]["digits"][label] == 1
    assert sum(sum(row.values()) for row in routing["confusion"].values()) == 18
    base, own = losses_of(store, None, "digits"), losses_of(store, "digits", "digits")
    routed = [*own[:2], losses_of(store, choice, "digits")[2], *own[3:]]
    assert result.perplexity["digits"]["routed"] == pytest.approx(perplexity(routed), rel=1e-5)
    assert result.perplexity["letters"]["routed"] == result.perplexity["letters"]["module"]

    def gain(losses: list[tuple[float, int]]) -> float:
        return sum(b - x for (b, _), (x, _) in zip(base, losses, strict=True))

    kept = result.perplexity["digits"]["retained_gain"]
    assert kept == pytest.approx(gain(routed) / gain(own), rel=1e-4)
    assert kept < 0.99


def test_retained_gain_is_a_share_of_the_summed_log_loss_of_all_domains(store, data, monkeypatch):
    routed_as(monkeypatch, {("digits", 0): None, ("letters", 5): None})
    gains = {}
    for name in ("digits", "letters"):
        base, own = losses_of(store, None, name), losses_of(store, name, name)
        gains[name] = [b - o for (b, _), (o, _) in zip(base, own, strict=True)]
    total = sum(map(sum, gains.values()))
    kept = total - gains["digits"][0] - gains["letters"][5]
    found = evaluate(store, data, CONFIG).routing["retained_gain"]
    assert found == pytest.approx(kept / total, rel=1e-4)
    assert 0 < found < 1


def test_text_of_no_module_counts_against_a_router_that_chooses_one(store, home, data, monkeypatch):
    routed_as(monkeypatch, {("none", 1): "letters"})
    result = evaluate(store, {"none": data["none"]}, CONFIG)
    assert result.routing["accuracy"] == 5 / 6
    assert result.routing["confusion"] == {"none": {"none": 5, "letters": 1}}
    assert result.perplexity["none"]["base"] == result.perplexity["none"]["module"]
    base = losses_of(store, None, "general")
    routed = [base[0], losses_of(store, "letters", "general")[1], *base[2:]]
    assert result.perplexity["none"]["routed"] == pytest.approx(perplexity(routed), rel=1e-5)
    assert result.routing["retained_gain"] is None  # nothing could be gained


def test_what_text_of_no_module_loses_is_told_apart_from_the_domains_gain(store, home, data, monkeypatch):
    routed_as(monkeypatch, {("none", 1): "letters", ("digits", 0): None})
    result = evaluate(store, data, CONFIG).to_json()
    row, routing = result["perplexity"]["none"], result["routing"]
    lost = math.log(row["routed"] / row["base"])
    assert routing["none_cost"] == pytest.approx(lost)
    low, high = routing["none_cost_interval"]
    assert low <= lost <= high
    assert f"routing costs text of no domain {lost:+.4f} nats a token" in summary(result)
    page = write_report(result, home / "report").read_text()
    assert f"text of no domain loses {lost:+.4f} nats a token" in page
    assert f"cost of routing on text of no domain: {lost:+.4f} nats a token" in page

    monkeypatch.undo()
    routed_as(monkeypatch, {("digits", 0): None})
    without = evaluate(store, {name: data[name] for name in ("digits", "letters")}, CONFIG).to_json()
    assert without["routing"]["retained_gain"] == pytest.approx(routing["retained_gain"])
    assert without["routing"]["retained_gain_interval"] == pytest.approx(routing["retained_gain_interval"])
    assert (without["routing"]["none_cost"], without["routing"]["none_cost_interval"]) == (None, None)
    assert "of no domain +" not in "\n".join(summary(without))


@pytest.mark.parametrize("start", [False, True], ids=["no start token", "start token"])
def test_the_router_sees_its_tokens_whatever_is_scored_at_once(store, data, monkeypatch, start):
    if start:
        load = Store.load_tokenizer

        def starting(self):
            tokenizer = load(self)
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
            )
            return tokenizer

        monkeypatch.setattr(Store, "load_tokenizer", starting)
    found = [
        evaluate(store, data, replace(CONFIG, sequence_length=length, route_tokens=20)).routing for length in (8, 20)
    ]
    assert found[0]["confusion"] == found[1]["confusion"]
    assert found[0]["calibration"] == found[1]["calibration"]
    fewer = evaluate(store, data, replace(CONFIG, sequence_length=8, route_tokens=8)).routing
    assert fewer["calibration"] != found[0]["calibration"]


# The order of learning


def test_the_matrix_replays_what_the_store_knew_after_each_domain(store, data, monkeypatch):
    for day, name in enumerate(("signs", "letters", "digits"), start=1):  # not the alphabet's order
        learned_on(store, name, day)
    result = evaluate(store, data, CONFIG)
    matrix = result.matrix
    assert matrix["domains"] == ["letters", "digits"]
    base = [result.perplexity[name]["base"] for name in matrix["domains"]]
    own = [result.perplexity[name]["module"] for name in matrix["domains"]]
    assert matrix["before"] == pytest.approx(base)
    # Signs and letters are known at first: digits are theirs or none's.
    assert matrix["after"][0][0] == pytest.approx(own[0])
    among = load_router(store, ["letters", "signs"])
    assert among.names == ["letters", "signs"]
    alone = [loss_of_route(store, among, i) for i in range(DOCUMENTS)]
    assert matrix["after"][0][1] == pytest.approx(perplexity(alone), rel=1e-5)
    assert matrix["after"][1] == pytest.approx(own)
    assert matrix["average_forgetting"] == pytest.approx(0.0, abs=1e-12)
    assert matrix["forward_transfer"] == pytest.approx(math.log(base[1] / matrix["after"][0][1]))


def learned_on(store: Store, name: str, day: int, *, version: int = 1) -> None:
    manifest = store.path / "modules" / name / str(version) / "module.json"
    edit(manifest, created=f"2026-01-{day:02}T00:00:00.000000+00:00")


def test_an_update_does_not_change_a_modules_place_in_the_order_of_learning(store, data):
    def order() -> tuple[list[str], list[str]]:
        result = evaluate(store, data, CONFIG)
        return result.matrix["domains"], list(result.memory["modules"])

    for day, name in enumerate(("letters", "digits", "signs"), start=1):
        learned_on(store, name, day)
    assert order() == (["letters", "digits"], ["letters", "digits", "signs"])
    add_module(store, store.load_base(), "letters", 50)
    learned_on(store, "letters", 9, version=2)
    assert order() == (["letters", "digits"], ["letters", "digits", "signs"])
    # Of versions that are gone or damaged nothing is known.
    (store.path / "modules" / "letters" / "1" / "module.json").write_text("{")
    assert order() == (["digits", "letters"], ["digits", "signs", "letters"])
    shutil.rmtree(store.path / "modules" / "letters" / "1")
    assert order() == (["digits", "letters"], ["digits", "signs", "letters"])


def test_modules_of_the_same_instant_are_in_the_order_of_their_names(store, data):
    for name in store.modules:
        learned_on(store, name, 1)
    assert evaluate(store, dict(reversed(data.items())), CONFIG).matrix["domains"] == ["digits", "letters"]


def loss_of_route(store: Store, router: Router, number: int) -> tuple[float, int]:
    """What a router's choice makes of a document of digits."""
    ids = store.load_tokenizer().encode(text_of("digits", number))[:24]
    (route,) = router.route(*router.states(store.load_base(), [ids]))
    return losses_of(store, route.module, "digits")[number]


def test_a_router_among_some_modules_is_that_of_a_store_without_the_others(store):
    vectors = torch.randn(8, store.load_base().hidden_size, generator=torch.Generator().manual_seed(0))
    before = [r.scores for r in load_router(store, ["digits", "letters"]).route_pooled(vectors)]
    store.remove("signs")
    assert before == [r.scores for r in load_router(store).route_pooled(vectors)]


def test_no_matrix_where_it_is_not_wanted_or_of_one_domain(store, data):
    assert evaluate(store, data, replace(CONFIG, matrix=False)).matrix is None
    assert evaluate(store, {"digits": data["digits"]}, CONFIG).matrix is None


# How sure one can be


def test_intervals_hold_what_they_are_of(store, data, monkeypatch):
    routed_as(monkeypatch, {("digits", 2): None, ("none", 1): "letters"})
    result = evaluate(store, data, replace(CONFIG, matrix=False))
    for row in result.perplexity.values():
        for side in ("base", "module", "routed"):
            low, high = row[f"{side}_interval"]
            assert low < row[side] < high
    routing = result.routing
    for key in ("accuracy", "retained_gain"):
        low, high = routing[f"{key}_interval"]
        assert low < routing[key] <= high <= 1
    assert routing["none"] == {"of_no_domain": 5 / 6, "of_domains": 1 / 12}
    assert sum(b["documents"] for b in routing["calibration"]["bins"]) == 18


def test_compute_counts_parameters_and_speed(store, data):
    compute = evaluate(store, data, CONFIG).compute
    sizes = [m.parameters for m in store.modules.values()]
    assert compute["total_parameters"] - compute["active_parameters"] == sum(sizes) - max(sizes)
    assert compute["active_parameters"] - compute["base_parameters"] == max(sizes)
    assert compute["tokens_per_second"].keys() == {"base", "module"}
    assert min(compute["tokens_per_second"].values()) > 0


# Forgetting


def test_nothing_is_forgotten_when_others_are_learned_updated_and_removed(store, data):
    def forgetting() -> tuple[float, list[str]]:
        result = evaluate(store, {"digits": data["digits"]}, CONFIG)
        return result.forgetting, result.forgetting_detail["changed"]

    assert forgetting() == (0.0, [])
    base = store.load_base()
    add_module(store, base, "other", 50)
    assert forgetting() == (0.0, [])
    add_module(store, base, "letters", 51)
    assert forgetting() == (0.0, [])
    store.remove("signs")
    assert forgetting() == (0.0, [])
    checked = evaluate(store, {"digits": data["digits"]}, CONFIG).forgetting_detail["checked"]
    assert checked == ["base", "digits", "letters", "other"]


def alter(store: Store, name: str, by: float) -> None:
    """Changes a module's weights and its manifest with them: no hash tells."""
    folder = store.path / "modules" / name / "1"
    tensors = load_file(folder / "module.safetensors")
    save_file({k: v + by if v.is_floating_point() else v for k, v in tensors.items()}, folder / "module.safetensors")
    manifest = json.loads((folder / "module.json").read_text())
    digest = hashlib.sha256((folder / "module.safetensors").read_bytes()).hexdigest()
    manifest["files"]["module.safetensors"] = digest
    (folder / "module.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("by", [0.05, 1e-5])
def test_a_module_altered_behind_the_stores_back_is_named(store, data, by):
    alter(store, "letters", by)
    assert store.verify() == []
    result = evaluate(store, {"digits": data["digits"]}, CONFIG)
    assert result.forgetting_detail["changed"] == ["letters"]
    assert result.forgetting != 0
    assert "changed since learned: letters; 1 of 4 parts" in summary(result.to_json())


def recorded(store: Store, name: str, **by: float) -> None:
    """Makes a module's record say that the base's or its own loss was lower by so much, of other logits."""
    path = store.path / "modules" / name / "1" / "module.json"
    training = json.loads(path.read_text())["training"]
    for part, lower in by.items():
        found = training["probe"][part]
        training["probe"][part] = {"logits": "0" * 64, "loss": found["loss"] - lower}
    edit(path, training=training)


@pytest.mark.parametrize(
    ("records", "largest", "changed"),
    [
        ({"letters": {"module": 1.0}}, 1.0, ["letters"]),  # not the mean with those that stayed
        (
            {"letters": {"module": 1.0}, "digits": {"module": -1.0}},
            1.0,
            ["digits", "letters"],
        ),  # nor with one that fell
        ({"letters": {"module": -0.5}}, -0.5, ["letters"]),
        ({name: {"base": 0.5} for name in PLAIN}, 0.5, ["base"]),  # one part, whoever recorded it
        ({"letters": {"base": 0.25}, "digits": {"base": 0.5}, "signs": {"module": 0.3}}, 0.5, ["base", "signs"]),
    ],
)
def test_forgetting_is_the_largest_increase(store, home, data, records, largest, changed):
    for name, by in records.items():
        recorded(store, name, **by)
    result = evaluate(store, {"digits": data["digits"]}, CONFIG).to_json()
    assert result["forgetting"] == pytest.approx(largest)
    assert result["forgetting_detail"]["changed"] == changed
    assert f"changed since learned: {', '.join(changed)}; {len(changed)} of 4 parts" in summary(result)
    assert f"4 parts compared bit for bit, {len(changed)} changed" in write_report(result, home / "report").read_text()


def test_a_store_without_records_says_that_nothing_was_checked(store, home, data):
    for name in store.modules:
        edit(store.path / "modules" / name / "1" / "module.json", training={})
    result = evaluate(store, {"digits": data["digits"]}, CONFIG)
    assert result.forgetting_detail == {"checked": [], "changed": [], "not_comparable": []}
    assert result.forgetting is None
    assert any(line.endswith("forgetting -") for line in summary(result.to_json()))
    write_report(result.to_json(), home / "report")


def test_forgetting_of_one_module_that_diverged_is_not_known(store, data):
    for name in ("digits", "signs"):
        store.remove(name)
    diverge(store, "letters")
    result = evaluate(store, {"letters": data["letters"]}, CONFIG)
    assert result.forgetting is None
    assert result.forgetting_detail == {"checked": ["base", "letters"], "changed": [], "not_comparable": ["letters"]}


# Modules that diverged


def diverge(store: Store, name: str, *, recorded: bool = True) -> None:
    """Makes a module's weights nan; its manifest then says what `learn` would have written of it."""
    folder = store.path / "modules" / name / "1"
    tensors = load_file(folder / "module.safetensors")
    spoilt = {k: torch.full_like(v, math.nan) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(spoilt, folder / "module.safetensors")
    manifest = json.loads((folder / "module.json").read_text())
    manifest["files"]["module.safetensors"] = hashlib.sha256((folder / "module.safetensors").read_bytes()).hexdigest()
    (folder / "module.json").write_text(json.dumps(manifest))
    if recorded:
        base = store.load_base()
        found = probe(ModuleSet(base, [store.load(name, base)]))
        assert math.isnan(found["loss"])
        manifest["training"]["probe"]["module"] = {**found, "loss": None}  # JSON has no nan
        (folder / "module.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("recorded", [True, False], ids=["when learned", "since"])
def test_a_module_that_diverged_is_named_and_the_others_are_measured(store, data, home, recorded):
    before = evaluate(store, data, CONFIG).to_json()
    diverge(store, "letters", recorded=recorded)
    found = evaluate(store, data, CONFIG)
    assert found.forgetting_detail["not_comparable"] == ["letters"]
    assert found.forgetting_detail["changed"] == ([] if recorded else ["letters"])
    assert found.forgetting == 0
    result = found.to_json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["perplexity"]["digits"] == before["perplexity"]["digits"]
    row = result["perplexity"]["letters"]
    assert row["base"] == before["perplexity"]["letters"]["base"]
    assert (row["module"], row["module_interval"], row["routed"], row["retained_gain"]) == (None, None, None, None)
    assert result["routing"]["retained_gain"] is None
    assert result["matrix"]["after"][1][result["matrix"]["domains"].index("letters")] is None

    text = "\n".join(summary(result))
    assert "nan" not in text.lower()
    assert "not in forgetting: letters;" in text
    page = write_report(result, home / "report").read_text()
    assert "or is none now: letters" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    write_report({**result, "perplexity": found.perplexity, "matrix": found.matrix}, home / "report")  # nan as it is
    assert summary({**result, "perplexity": found.perplexity, "matrix": found.matrix}) == summary(result)


@pytest.mark.parametrize("record", [{}, {"base": None}, {"module": {}}, {"module": {"logits": 3, "loss": "x"}}])
def test_a_record_that_is_no_record_stops_nothing(store, data, record):
    path = store.path / "modules" / "letters" / "1" / "module.json"
    edit(path, training={**json.loads(path.read_text())["training"], "probe": record})
    result = evaluate(store, {"digits": data["digits"]}, CONFIG)
    assert result.forgetting == 0
    assert "letters" in result.forgetting_detail["not_comparable"]


def test_a_loss_that_is_no_number_has_no_colour():
    nan = math.nan
    figure = matrix_figure({"domains": ["a", "b"], "before": [9.0, nan], "after": [[3.0, 4.0], [None, nan]]})
    shares = [patch.get_facecolor()[3] for patch in figure.axes[0].patches]
    assert shares == [0, 1, 0, 0, 0, 0]
    for value in (nan, math.inf):
        draws = Bootstrap([3])
        assert draws.interval(draws.sums(0, torch.tensor([1.0, value, 2.0]))) is None


# Memory


def test_memory_is_counted_and_kept_to(store, data, monkeypatch):
    result = evaluate(store, data, CONFIG)
    sizes = {name: module.bytes for name, module in store.modules.items()}
    memory = result.memory
    assert memory["modules"] == sizes
    assert memory["total_bytes"] - memory["resident_bytes"] == sum(sizes.values()) - max(sizes.values())
    watch = Watch(monkeypatch)
    tight = evaluate(store, data, CONFIG, memory=with_pass(store, memory["resident_bytes"]))
    assert memory["resident_bytes"] - max(sizes.values()) + watch.most <= memory["resident_bytes"]
    assert tight.perplexity == result.perplexity
    assert tight.forgetting == 0
    with pytest.raises(BudgetError):
        evaluate(store, data, CONFIG, memory=with_pass(store, memory["resident_bytes"]) - 1)


# What cannot be evaluated


def test_an_unknown_domain_is_an_error_before_anything_runs(store, data, monkeypatch):
    monkeypatch.setattr(Store, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(UnknownModuleError, match="nobody"):
        evaluate(store, {**data, "nobody": data["digits"]}, CONFIG)
    with pytest.raises(DataError, match="digits and none are given the same text, which cannot belong to both"):
        evaluate(store, {"digits": data["digits"], "none": data["digits"]}, CONFIG)
    with pytest.raises(DataError, match="no evaluation data"):
        evaluate(store, {}, CONFIG)


def test_two_modules_are_compared_on_one_text(store, data):
    found = evaluate(store, {"digits": data["digits"], "signs": data["digits"]}, CONFIG).to_json()["perplexity"]
    assert found["digits"]["base"] == found["signs"]["base"]
    assert found["digits"]["module"] != found["signs"]["module"]


def test_documents_of_one_token_are_left_out_or_refused(store, home):
    path = home / "short.jsonl"
    path.write_text('{"text": "a"}\n{"text": "?"}\n')
    with pytest.raises(DataError, match=r"digits.*two tokens"):
        evaluate(store, {"digits": [path]}, CONFIG)
    with pytest.raises(DataError, match=r"none.*two tokens"):
        evaluate(store, {"none": [path]}, CONFIG)
    lines = ['{"text": "a"}', *(home / "digits.jsonl").read_text().splitlines(), '{"text": "?"}']
    path.write_text("\n".join(lines))
    row = evaluate(store, {"digits": [path]}, CONFIG).perplexity["digits"]
    assert row["documents"] == DOCUMENTS
    assert row["base"] == pytest.approx(perplexity(losses_of(store, None, "digits")), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"sequence_length": 1}, {"max_documents": -1}, {"route_tokens": 0}, {"tokens": 1}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EvalConfig(**settings)


def test_the_result_is_plain_json(store, data):
    result = evaluate(store, data, CONFIG).to_json()
    assert json.loads(json.dumps(result)) == result
