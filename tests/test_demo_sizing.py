"""Sizing of the demo: it fits the time, more time never does less, and what is too little is said."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from growlm.demo import sizing
from growlm.demo.sizing import DOMAINS, FAST, DemoSize, Speeds, less, plan, rehearsal, seconds_of, total

# One thread without bfloat16, and a fast machine.
SLOW = Speeds(2e-6, 1 / 5000, 1 / 6500, 1 / 13_000, 1 / 10_000, {"learn": 3.0, "evaluate": 3.0, "report": 4.0})
QUICK = Speeds(2e-7, 1 / 80_000, 1 / 90_000, 1 / 300_000, 1 / 200_000, {"learn": 0.5})


def scaled(speeds: Speeds, by: float) -> Speeds:
    numbers = {k: v * by for k, v in asdict(speeds).items() if k != "fixed"}
    return Speeds(**numbers, fixed={k: v * by for k, v in speeds.fixed.items()})


times = st.floats(0.01, 20).map(lambda by: scaled(SLOW, by))
machines = st.builds(
    lambda tiny, dearer, both: {"tiny": tiny, **({"small": scaled(tiny, dearer)} if both else {})},
    times,
    st.floats(1, 10),
    st.booleans(),
)
seconds = st.floats(1, 20_000)


def amounts(size: DemoSize) -> list[int]:
    return [size.pretrain_tokens, *size.learn_tokens.values(), size.router_samples, size.max_documents]


@given(machines, seconds)
def test_the_planned_time_never_exceeds_what_there_is(machine, left):
    size = plan(machine, left)
    if size is None:
        assert left < sizing.seconds_for_least(machine)
    else:
        assert total(size, machine[size.preset]) <= left
        assert sum(size.text_bytes.values()) > 0


@given(machines, seconds, st.floats(1, 50))
def test_more_time_never_does_less(machine, left, times_more):
    little, much = plan(machine, left), plan(machine, times_more * left)
    assume(little is not None)
    assert much is not None
    order = sizing.presets()
    assert order.index(much.preset) >= order.index(little.preset)
    if much.preset == little.preset:
        assert all(m >= n for m, n in zip(amounts(much), amounts(little), strict=True))
        assert all(much.text_bytes[name] >= size for name, size in little.text_bytes.items())


@given(machines, seconds, st.floats(1, 50))
def test_a_slower_machine_never_does_more(machine, left, slower):
    size, other = plan(machine, left), plan({p: scaled(s, slower) for p, s in machine.items()}, left)
    if size is None:
        assert other is None
    elif other is not None and other.preset == size.preset:
        assert all(m >= n for m, n in zip(amounts(size), amounts(other), strict=True))


@given(machines)
def test_from_the_floor_on_every_module_has_enough(machine):
    least, half = sizing.seconds_for_least(machine), sizing.seconds_for_half(machine)
    assert least <= half
    assert plan(machine, 0.99 * least) is None
    assert plan(machine, 1.0001 * least) is not None
    assert sizing.enough(plan(machine, 1.0001 * half))
    below = plan(machine, 0.9 * half)
    assert below is None or not sizing.enough(below)


def test_a_fast_machine_takes_the_larger_preset_and_stops_where_the_text_ends():
    machine = {"tiny": QUICK, "small": scaled(QUICK, 5)}
    ten, hour = plan(machine, 600), plan(machine, 3600)
    assert ten.preset == hour.preset == "small"
    assert plan({"tiny": QUICK}, 600).preset == "tiny"
    assert plan(machine, 36_000) == hour
    assert hour.text_bytes["english"] <= 12_000_000


def test_only_what_may_fit_is_measured():
    assert sizing.presets() == ["tiny", "small"]
    assert sizing.worth_measuring("small", QUICK, 600)
    assert not sizing.worth_measuring("small", SLOW, 600)


@pytest.mark.parametrize(("preset", "english", "code"), [("tiny", 3.2, 2.0), ("small", 3.7, 2.5)])
def test_there_is_text_for_every_token(preset, english, code):
    # Bytes of a token, as they were counted.
    for minutes in range(1, 200):
        size = plan({preset: scaled(SLOW, 0.3)}, 60 * minutes)
        if size is not None:
            assert size.text_bytes["english"] >= 1.1 * english * size.pretrain_tokens
            for name in DOMAINS:
                assert size.text_bytes[name] >= 1.1 * code * size.learn_tokens[name]


@pytest.mark.parametrize("size", [FAST, rehearsal("tiny"), rehearsal("small")])
def test_every_stage_has_a_time(size):
    each = seconds_of(size, SLOW)
    assert tuple(each) == size.stages
    assert total(size, SLOW) == pytest.approx(sum(each.values()))
    assert each["report"] == 4.0
    assert each["learn-python"] > size.learn_tokens["python"] * SLOW.learn + 3.0


def test_what_stages_take_besides_is_counted():
    size = rehearsal("tiny")
    took = {stage: 1000.0 + at for at, stage in enumerate(size.stages)}
    assert seconds_of(size, sizing.with_fixed(SLOW, size, took)) == pytest.approx(took)
    quick = dict.fromkeys(size.stages, 0.0)
    assert set(sizing.with_fixed(SLOW, size, quick).fixed.values()) == {0.0}


SIZE = plan({"tiny": SLOW}, 600)
assert SIZE is not None
LATER = SIZE.stages[2:]  # pretraining has ended


def test_with_time_enough_nothing_changes():
    left = sum(seconds_of(SIZE, SLOW)[stage] for stage in LATER)
    assert less(SIZE, SLOW, LATER, 1.001 * left, 1.0) == SIZE
    assert less(SIZE, SLOW, LATER, 1.001 * left, 1.1) != SIZE


@given(st.floats(1, 600), st.floats(1, 4), st.integers(0, len(SIZE.stages) - 1))
def test_short_of_time_what_has_not_begun_shrinks_to_fit(left, pace, begun):
    waiting = SIZE.stages[begun:]
    size = less(SIZE, SLOW, waiting, left, pace)
    needed = pace * sum(seconds_of(size, SLOW)[stage] for stage in waiting)
    smallest = less(SIZE, SLOW, waiting, 0.0, pace)
    assert needed <= left or size == smallest
    for name in DOMAINS:
        assert size.learn_tokens[name] <= SIZE.learn_tokens[name]
        if f"learn-{name}" not in waiting:
            assert size.learn_tokens[name] == SIZE.learn_tokens[name]
    if "text" not in waiting:
        assert size.text_bytes == SIZE.text_bytes
    if "pretrain" not in waiting:
        assert size.pretrain_tokens == SIZE.pretrain_tokens
    if "learn-python" not in waiting:
        assert size.router_samples == SIZE.router_samples  # as the first domain's
    if "evaluate" not in waiting:
        assert size == SIZE


def test_domains_that_have_not_begun_share_what_is_left():
    size = less(SIZE, SLOW, SIZE.stages[3:], 120.0, 1.0)
    assert size.learn_tokens["python"] == SIZE.learn_tokens["python"]
    assert size.learn_tokens["cpp"] == size.learn_tokens["maths"] < SIZE.learn_tokens["maths"]


def test_how_many_tokens_were_missed():
    half, enough = math.log(2), replace(SIZE, learn_tokens=dict.fromkeys(DOMAINS, sizing._PATHS["tiny"].enough))
    assert sizing.tokens_missed(enough, dict.fromkeys(DOMAINS, 1.01 * half)) == 1
    assert sizing.tokens_missed(enough, {"python": 1.0, "cpp": half / 3, "maths": half / 2}) == pytest.approx(3)
    assert 1 < sizing.tokens_missed(enough, {"python": -0.5}) < 100
    machine = {"tiny": SLOW}
    assert sizing.seconds_for_half(machine, 3) > sizing.seconds_for_half(machine)
