"""A module that another process removes at any moment is gone: never damaged, and no error of the system."""

from __future__ import annotations

import builtins
import functools
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from growlm.engine import Engine
from growlm.engine.loading import Loader
from growlm.errors import UnknownModuleError
from growlm.evaluation.replay import in_order
from growlm.router import EVIDENCE, load_router
from growlm.router.samples import GENERAL_SAMPLES, SAMPLES, pack_samples, read_samples
from growlm.server.names import Names
from growlm.server.refusals import Refusal
from growlm.store import ROUTER_DERIVED, ROUTER_FITTED, ROUTER_LEXICON, ROUTER_SUMS, Store
from growlm.training.corpus import evidence_beside
from growlm.training.router import describe_router, require_samples
from stores import add_module, domain_ids, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Three modules, of which `signs`, that recalls, has two versions."""
    home = tmp_path_factory.mktemp("removed")
    kinds = {"letters": {}, "digits": {}, "signs": {"kind": "lora+recall"}}
    store = make_store(home, modules=kinds, keep_samples=1 << 14)
    add_module(store, store.load_base(), "signs", 7, kind="lora+recall")
    with store.lock():
        general = domain_ids(store.load_tokenizer(), "general")
        store.router_files(GENERAL_SAMPLES).write(pack_samples(general, 1 << 14))
    return store


@contextmanager
def before_look(number: int, folder: Path, action: Callable[[], object]) -> Iterator[list[int]]:
    """Does something before the `number`-th time, from 1, that this process asks the system for something below
    `folder`. Yields how often it has asked, in a list of one."""
    asked, busy = [0], [False]

    def watched(ask: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any = ".", *arguments: Any, **more: Any) -> Any:
            below = not isinstance(path, int) and str(path).startswith(str(folder))
            if below and not busy[0]:
                asked[0] += 1
                if asked[0] == number:
                    busy[0] = True
                    action()
                    busy[0] = False
            return ask(path, *arguments, **more)

        return look

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((os, "stat"), (os, "scandir"), (os, "listdir"), (os, "open"), (io, "open")):
            patch.setattr(place, name, watched(getattr(place, name)))
        patch.setattr(builtins, "open", io.open)
        yield asked


def status(store: Store) -> list[str]:
    return [module["name"] for module in store.status()["modules"]]


def described(store: Store) -> None:
    found = describe_router(store)
    assert found["modules"] - found["knows"] == len(found["unknown"])
    assert set(found["unknown"]) <= {"signs"}


def verified(store: Store) -> None:
    assert store.verify() == []


def beside(store: Store) -> None:
    stored = store.module("signs")
    assert evidence_beside(stored).keys() >= {SAMPLES, EVIDENCE}
    assert read_samples(stored)


def cards(store: Store) -> list[str]:
    found = Names(engine_of(store)).cards()
    assert not any("damaged" in card for card in found)
    return [card["id"] for card in found[2:]]


def card(store: Store) -> None:
    assert "damaged" not in Names(engine_of(store)).card("signs")


def fitted_anew(store: Store) -> list[str]:
    for derived in ROUTER_DERIVED:
        store.router_files(derived).drop()
    return load_router(store).names


@functools.cache
def engine_of(store: Store) -> Engine:
    return Engine(store)


LISTING = ("status", "order", "cards", "router", "router fitted anew")
OF_ALL = (*LISTING, "describe", "verify", "samples")
LEFT = {"signs": [["digits", "letters"], ["digits", "letters", "signs"]], "signs/2": [["digits", "letters", "signs"]]}
READERS: dict[str, Callable[[Store], object]] = {
    "status": status,
    "order": lambda store: [module.name for module in in_order(store)],
    "cards": cards,
    "router": lambda store: load_router(store).names,
    "router fitted anew": fitted_anew,
    "describe": described,
    "verify": verified,
    "samples": lambda store: require_samples(store, list(store.modules.values())),
    "beside": beside,
    "load": lambda store: store.load("signs", engine_of(store).base),
    "find": lambda store: Loader(store, engine_of(store).base, None).find("signs").load(),
    "rows": lambda store: Loader(store, engine_of(store).base, 1 << 20).find("signs").load(),
    "card": card,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ["signs", "signs/2"])
def test_a_module_that_is_removed_at_any_moment_is_gone_and_not_damaged(store, tmp_path, reader, what):
    """Of all modules those that are left are told of; of one that was asked for, that it is not there any more."""
    refused = []
    for found in while_it_goes(store, store.path / "modules" / what, tmp_path / "away", READERS[reader]):
        if isinstance(found, Exception):
            refused.append(str(found))
        else:
            assert reader not in LISTING or sorted(found) in LEFT[what]
    assert bool(refused) == (reader not in OF_ALL)
    assert [each for each in refused if not re.search("ask again|modules are|there are auto, base", each)] == []


@pytest.mark.parametrize("reader", ["router", "verify", "describe", "status"])
@pytest.mark.parametrize("what", [ROUTER_FITTED, ROUTER_LEXICON, ROUTER_SUMS])
def test_what_was_derived_for_the_router_may_go_at_any_moment(store, tmp_path, reader, what):
    folder = store.router_path / what
    for found in while_it_goes(store, folder, tmp_path / "away", READERS[reader]):
        assert not isinstance(found, Exception)
        assert reader not in LISTING or found == ["digits", "letters", "signs"]


def while_it_goes(store: Store, folder: Path, away: Path, read: Callable[[Store], Any]) -> Iterator[Any]:
    """What `read` finds while `folder` goes, at each moment from before its first look at the disk to after its last;
    or that a module is unknown."""
    fitted_anew(store)  # what is made when it is first needed is there
    assert folder.exists()
    number, asked = 0, [0]
    while asked[0] >= number:
        number += 1
        try:
            with before_look(number, store.path, lambda: folder.rename(away)) as asked:
                found = read(store)
            yield found
        except (UnknownModuleError, Refusal) as error:
            yield error
        finally:
            if away.exists():
                shutil.rmtree(folder, ignore_errors=True)  # made anew
                away.rename(folder)
    assert number > 2
