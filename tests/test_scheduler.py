"""The scheduler: who has a place, whose modules are read and which tokens run, over a real cache of modules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growlm.base.rooms import Rooms
from growlm.engine.account import Account, Footprint
from growlm.engine.answers import Answer
from growlm.engine.module_cache import ModuleCache
from growlm.engine.request import Request, State
from growlm.engine.resident import Found
from growlm.engine.sampling import SamplingConfig
from growlm.engine.scheduler import PATIENCE, Scheduler
from growlm.errors import BudgetError, UnknownModuleError

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}


def cache_of(budget: int | None, loads: list[str] | None = None) -> ModuleCache:
    def find(name: str) -> Found:
        if name not in SIZES:
            raise UnknownModuleError(f"no module {name!r}")

        def load() -> Any:
            if loads is not None:
                loads.append(name)
            return name

        return Found(None, SIZES[name], load)  # type: ignore[arg-type]

    return ModuleCache(budget, find)


def asked(names: str | None, tokens: int = 1) -> Request:
    config = SamplingConfig()
    return Request([1] * tokens, None if names is None else tuple(names), config, Answer(None, ()))


class Desk:
    """Requests that are admitted, and end when they are told to."""

    def __init__(self, budget: int | None, max_batch: int) -> None:
        self.loads: list[str] = []
        self.modules = cache_of(budget, self.loads)
        account = Account(budget, [0], 0, 0)
        self.scheduler = Scheduler(self.modules, account, lambda _: Footprint(1, 1), Request.give_up, max_batch)
        self.failed: list[tuple[Request, BaseException]] = []

    def admit(self) -> list[Request]:
        return self.scheduler.admit(self.fail)

    def fail(self, request: Request, error: BaseException) -> None:
        self.scheduler.remove(request)
        self.failed.append((request, error))

    def end(self, request: Request) -> None:
        for load in (request.loads or {}).values():
            load.module()
        self.scheduler.remove(request)
        self.modules.release(request.let_go())


@given(
    wanted=st.lists(st.sampled_from(["", "a", "b", "c", "d", "e", "ab", "bc", "ae"]), max_size=30),
    budget=st.none() | st.integers(6, 15),
    max_batch=st.integers(1, 6),
    draws=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_all_are_admitted_once_within_the_budget_and_the_places(wanted, budget, max_batch, draws):
    desk = Desk(budget, max_batch)
    requests = [asked(names) for names in wanted]
    served: list[Request] = []
    left = list(requests)
    while left or not desk.scheduler.idle:
        while left and draws.random() < 0.5:
            desk.scheduler.add(left.pop(0))
        served += desk.admit()
        assert len(desk.scheduler.active) <= max_batch
        if budget is not None:
            assert desk.modules.resident_bytes <= budget
        for request in [r for r in desk.scheduler.active if draws.random() < 0.5]:
            desk.end(request)
    assert sorted(served, key=lambda r: r.arrival) == requests
    assert not desk.failed
    assert not any(one.pins for one in desk.modules._resident.values())
    desk.modules.close()


def test_those_whose_modules_are_in_memory_go_first_and_one_without_room_holds_up_nobody():
    desk = Desk(5, 8)
    desk.scheduler.add(first := asked("d"))
    assert desk.admit() == [first]
    later = [asked("e"), asked("d"), asked(""), asked("a"), asked("b")]
    for request in later:
        desk.scheduler.add(request)
    assert desk.admit() == [later[1], later[2], later[3]]  # neither e nor b fits beside d and a
    for request in [first, *later[1:4]]:
        desk.end(request)
    assert desk.admit() == [later[0]]
    desk.modules.close()


def test_nobody_is_passed_by_more_than_so_many_later_ones():
    """Requests for a small module come without end, two at a time; the large one's turn comes."""
    desk = Desk(5, 2)
    desk.scheduler.add(asked("d"))
    desk.admit()
    desk.scheduler.add(large := asked("e"))
    passed = 0
    for _ in range(PATIENCE + 5):
        desk.scheduler.add(asked("d"))
        passed += len(desk.admit())
        if large.loads is not None:
            break
        desk.end(desk.scheduler.active[0])
    assert large.loads is not None
    assert passed <= PATIENCE + 1
    desk.modules.close()


def test_one_that_is_to_be_routed_has_its_turn_too():
    desk = Desk(None, 1)
    desk.scheduler.add(asked("a"))
    desk.admit()
    desk.scheduler.add(routed := asked(None))
    desk.scheduler.add(asked("a"))
    desk.end(desk.scheduler.active[0])
    assert desk.admit() == [routed]
    desk.modules.close()


def test_what_can_never_run_fails_alone():
    desk = Desk(6, 4)
    requests = [asked("a"), asked("de"), asked("nobody"), asked("b")]
    for request in requests:
        desk.scheduler.add(request)
    assert desk.admit() == [requests[0], requests[3]]
    assert [request for request, _ in desk.failed] == requests[1:3]
    assert [type(error) for _, error in desk.failed] == [BudgetError, UnknownModuleError]
    desk.modules.close()


def test_a_request_that_is_routed_waits_in_its_turn():
    desk = Desk(None, 4)
    routed, other = asked(None, tokens=9), asked("a")
    desk.scheduler.add(routed)
    assert desk.admit() == [routed]
    assert routed.state is State.ROUTING
    desk.scheduler.add(other)
    routed.names = ("b",)
    desk.scheduler.park(routed)
    assert desk.scheduler.waiting == [routed, other]
    assert desk.admit() == [routed, other]
    desk.modules.close()


@pytest.mark.parametrize(
    ("unread", "expected"),
    [
        ([4000], [512]),  # alone: as much as a pass takes
        ([4000, 1, 1], [64, 1, 1]),  # a long prompt beside answers that are written
        ([4000, 30, 64, 4000, 5], [64, 30, 64, 64, 5]),
        ([4000, *[3000] * 4, 5], [64, 64, 64, 59, 5]),  # the oldest, and then the shortest
    ],
)
def test_a_long_prompt_holds_up_nobody(unread, expected):
    desk = Desk(None, 8)
    requests = [asked("", tokens=tokens) for tokens in unread]
    for request in requests:
        desk.scheduler.add(request)
    desk.admit()
    for request in requests:
        request.begin()
    parts = sorted(desk.scheduler.parts(), key=lambda part: part.request.arrival)
    assert [part.tokens for part in parts] == expected
    desk.modules.close()


def test_a_prompt_that_waited_long_is_routed_however_many_wait_for_their_modules():
    desk = Desk(5, 2)
    old, running = asked(None), asked("a")
    desk.scheduler.add(running)
    desk.admit()
    routed = [asked("e") for _ in range(2)]  # for which there is no room beside it
    for request in routed:
        request.cache = Rooms().new()  # what the base has read of it
        desk.scheduler.add(request)
    desk.scheduler.add(old)
    assert not desk.admit()
    old.overtaken = PATIENCE
    desk.end(running)
    assert old in desk.admit()


def test_whoever_is_added_late_stands_where_he_came():
    desk = Desk(None, 1)
    requests = [asked("a") for _ in range(4)]
    for request in (requests[2], requests[0], requests[3], requests[1]):
        desk.scheduler.add(request)
    assert desk.scheduler.waiting == requests


def test_nothing_is_tried_again_before_something_has_changed(monkeypatch):
    desk = Desk(5, 4)
    requests = [asked("a"), asked("e"), asked("e", 3), asked("e", 5)]
    for request in requests:
        desk.scheduler.add(request)
    tried = []
    begin = ModuleCache.begin
    monkeypatch.setattr(ModuleCache, "begin", lambda *a: tried.append(a[1]) or begin(*a))
    desk.admit()
    assert tried == [("a",), ("e",)]  # longer ones need as much room at least
    requests[0].loads["a"].module()
    desk.admit()
    tried.clear()
    for _ in range(5):
        assert not desk.admit()
    assert not tried
    desk.end(requests[0])
    assert desk.admit()


def test_when_all_that_waited_failed_nothing_waits():
    desk = Desk(3, 2)
    desk.scheduler.add(asked("e"))
    assert desk.admit() == []
    assert [type(error) for _, error in desk.failed] == [BudgetError]
    assert desk.admit() == []
