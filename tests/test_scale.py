"""Planning for many modules on many machines: formulas against numbers made by hand, and what must not fall or rise."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.lib.planning import BASES, BaseShape, Machine, Plan, copies, hit_rate, separation, shares, taken_for_one
from benchmarks.speed import bookkeeping, scale

ROUND = Machine(
    devices=2, memory=100.0, bandwidth=10.0, flops=1000.0, usable=1.0, reading=1.0, computing=1.0, exchange=0.5,
    host_bandwidth=4.0, to_device=8.0, disk_bandwidth=2.0, disk_latency=1.0, network=3.0, objects_latency=2.0,
    hour=36.0,
)  # fmt: skip
# 2 layers of width 2, keys of 1, feed-forwards of 3: r (2 * 4 + 2 * 3 + 3 * 5) = 29 r numbers a layer
SMALL = BaseShape(parameters=30, layers=2, width=2, key_width=1, inner=3, vocabulary=100)


def small(**more: object) -> Plan:
    settings = {"modules": 40, "machines": 4, "r": 1, "prompt": 2, "answer": 4, "batch": 1, "workspace": 0.0}
    return Plan(SMALL, ROUND, **{**settings, "objects": 8.0, **more})  # type: ignore[arg-type]


def test_bytes_are_those_of_a_shape_made_by_hand():
    plan = small()
    assert (SMALL.bytes, SMALL.token_bytes) == (60, 8)
    assert SMALL.lora_parameters(1) == 58
    assert SMALL.block_parameters(1) == 2 * 4 + 2 * 2 + 3 * 6
    assert plan.module_bytes == 116
    assert plan.evidence_bytes == {"heldout": 2 * 144 * 2 + 8 * 2 + 8, "vectors": 2 * 480 * 2}
    assert small(text_tokens=10).text_bytes == 10 * 6
    assert plan.router_bytes() == {"means": 320, "index": 80, "whitening": 16}
    assert plan.room() == math.floor((200 - 60 - 6 * 8) / 116) == 0
    assert small(batch=20).room() < 0


def test_a_module_of_the_published_base_has_as_many_numbers_as_learn_makes():
    assert BASES["135M"].lora_parameters(16) == 4_884_480  # what a module of SmolLM2-135M has, gates left out


def test_seconds_and_cost_are_those_made_by_hand():
    plan = small()
    read = (60 + 116 + 4 * 8) / 20
    assert plan.step(1, 1) == pytest.approx(read + 2 * 2 * 0.5)
    computed = 2 * 1000 * (30 + 58) / 2000
    assert plan.step(1000, 0) == pytest.approx(max((60 + 1000 * 32) / 20, computed) + 2)
    assert plan.prefill() == pytest.approx(2 * 2 * (30 + 58) / 2000)
    assert plan.read_from("host") == pytest.approx(116 / 8)
    assert plan.read_from("disk") == pytest.approx(1 + 116 / 4)
    assert plan.read_from("objects") == pytest.approx(2 + 116 / 2)
    busy = plan.prefill() + 4 * plan.step(1, 1)
    assert plan.requests_a_second(1, 1) == pytest.approx(1 / busy)
    assert plan.requests_a_second(1, 1, missed=0.5, load=100) == pytest.approx(1 / 50)
    assert plan.requests_a_second(1, 1, missed=0.5, load=1, stands=20) == pytest.approx(1 / (busy + 10))
    assert plan.cost(0.25) == pytest.approx(1e6 * 2 * 36 / 3600 / 1)
    one_device = Plan(SMALL, Machine(devices=1, exchange=0.5), prompt=2, answer=4)
    assert one_device.step(1, 0) < 0.5  # nobody to tell anything


def test_hits_rise_with_room_and_fall_with_modules_and_a_cache_of_all_misses_nothing():
    by_room = [hit_rate(1000, 10, room, 1.0) for room in (5, 20, 60, 110)]
    assert by_room == sorted(by_room)
    assert by_room[-1] == 1.0
    by_modules = [hit_rate(modules, 10, 20, 1.0) for modules in (300, 1000, 10_000)]
    assert by_modules == sorted(by_modules, reverse=True)
    # Asked evenly, what is there is what has room.
    assert hit_rate(1000, 10, 50, 0.0) == pytest.approx(0.5, abs=0.02)
    assert shares(3, 1.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert copies(3, 10, 1.0).tolist() == [5, 3, 2]


def test_larger_batches_and_more_hits_never_cost_more():
    plan = Plan()
    costs = [plan.cost(plan.requests_a_second(b, b)) for b in (1, 4, 16, 64, 256)]
    assert costs == sorted(costs, reverse=True)
    load = plan.read_from("objects")
    hits = [plan.cost(plan.requests_a_second(64, 64, 1 - hit, load)) for hit in (0.5, 0.9, 0.99, 1.0)]
    assert hits == sorted(hits, reverse=True)
    assert hits[0] > hits[-1]


def test_more_domains_must_lie_farther_from_general_text():
    distances = [separation(10**n) for n in (0, 3, 6)]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(2 * 2.3263, abs=1e-3)  # of the normal distribution's 99 %
    for modules, distance in zip((1, 10**3, 10**6), distances, strict=True):
        assert taken_for_one(modules, distance) == pytest.approx(0.01, rel=1e-4)
    assert taken_for_one(10**6, distances[1]) > 0.99


def test_what_was_measured_and_simulated_is_told(tmp_path, capsys):
    bookkeeping.main(
        ["--out", str(tmp_path), "--modules", "20", "40", "--widths", "32", "64", "--fitted", "50"]
    )  # fmt: skip
    measured = json.loads((tmp_path / "bookkeeping.json").read_text())
    assert measured["by modules"]["40"]["list of models, bytes"] > measured["by modules"]["20"]["list of models, bytes"]
    assert measured["by modules"]["20"]["calls to the disk before a read"] > 2
    more = (
        measured["by modules"]["40"]["calls to the disk of a look"]
        / measured["by modules"]["20"]["calls to the disk of a look"]
    )
    assert 1.5 < more < 2.5
    scale.main(
        [
            "--measured", str(tmp_path / "bookkeeping.json"), "--out", str(tmp_path), "--bases", "8B",
            "--machines", "40", "--modules", "40k", "--simulated", "2", "--cut", "32", "--requests", "40",
        ]
    )  # fmt: skip
    found = json.loads((tmp_path / "scale.json").read_text())["8B"]
    few, all_machines, blind = found["simulated"]
    assert (few["modules"], all_machines["modules"], blind["modules"]) == (2000, 1250, 40_000)
    assert blind["hit rate of devices"] < few["hit rate of devices"] <= 1
    for one in found["simulated"]:
        assert one["hit rate of devices"] + sum(one[f"from {tier}"] for tier in scale.TIERS) == pytest.approx(
            1, abs=2e-3
        )
    stops = [one["stops at, modules"] for one in found["stops"]]
    assert stops == sorted(stops)
    assert "does not fit" in found["costs"][-1]  # 256 texts and as many modules
    for stands, goes_on in zip(found["costs"][:3], found["costs, calls that do not stand in the way"][:3], strict=True):
        assert stands["50% there, else objects"] > goes_on["50% there, else objects"] >= goes_on["cost, all there"]


def test_a_part_stops_where_its_line_crosses_its_limit():
    lines = {key: [1.0, 0.001] for key in ("look for changes, s", "status, s", "gone of all, s", "scrape, s")}
    for router in ("router that compares all, s", "router with an index, s"):
        lines |= {f"{router}, width 4": [0.01, 0.002], f"{router}, width 8": [0.01, 0.004]}
    measured = {
        "routed": [4, 8],
        "line over modules": lines,
        "by modules": {"100": {"list of models, again, s": 0.1}, "1000": {"list of models, again, s": 1.0}},
        "line over width squared": {"fit, each domain, s": [0.0, 0.25]},
        "hash, bytes a second": 1e9,
        "fit, bytes of memory a domain and number of a state": 40.0,
    }
    told = {one["what"]: one for one in scale.stops(small(), measured, between=60.0)}
    look = told["a server's look at its store, every 2 s"]
    assert (look["stops at, modules"], look["at the plan's"]) == (1000, 1.04)
    assert told["fitting after a learning, one thread"]["stops at, modules"] == 60
    router = told["router with an index, a prompt"]  # of width 2: what two numbers more take, taken off
    assert (router["stops at, modules"], router["at the plan's"]) == (40, 0.05)
    assert told["listing models, or one model's card"]["stops at, modules"] == 10_000
