"""What an operator may do to a server that runs, and what each key may see of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from growlm.engine import Engine
from growlm.errors import ConfigError
from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, serving, wait_for
from stores import add_module, domain_text, make_store, with_pass

SHAPES = {"letters": {"kind": "lora", "r": 4}, "digits": {"kind": "lora", "r": 4}}
DIGITS, SIGNS = domain_text("digits", 77), domain_text("signs", 77)
KEYS = Keys(["red letters", "blue dig* sig*", "all"])
ADMIN = {"Authorization": "Bearer root"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(tmp_path) -> Path:
    make_store(tmp_path, "llama", SHAPES)
    return tmp_path / "store"


@pytest.fixture
def served(made) -> Iterator[Served]:
    with serving(made, keys=KEYS, admin_keys=Keys(["root"])) as served:
        yield served


def learn(served: Served, name: str, seed: int) -> None:
    add_module(Store.open(served.engine.store.path), served.engine.base, name, seed, domain=name, kind="lora", r=4)


def asked(served: Served, key: str, model: str, prompt: str = DIGITS, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "model": model, "temperature": 0, "max_tokens": 4, **more}
    return served.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def admin(served: Served, path: str, method: str = "POST") -> httpx.Response:
    return served.http.request(method, f"/admin/{path}", headers=ADMIN)


# The store that changes


def test_modules_that_come_change_and_go_are_served_once_it_is_told(served):
    learn(served, "signs", 5)
    assert asked(served, "all", "auto", SIGNS).json()["growlm"]["module"] != "signs"
    assert admin(served, "reload").json() == {"added": ["signs"], "updated": [], "removed": []}
    before = asked(served, "all", "auto", SIGNS).json()
    assert before["growlm"]["module"] == "signs"
    learn(served, "signs", 6)
    assert asked(served, "all", "auto", SIGNS).json()["choices"] == before["choices"]
    assert admin(served, "reload").json()["updated"] == ["signs"]
    now = asked(served, "all", "signs", SIGNS).json()
    assert now["growlm"]["loaded"] == ["signs"]
    assert now["choices"] != before["choices"]
    served.engine.store.remove("signs")
    assert admin(served, "reload").json()["removed"] == ["signs"]
    assert asked(served, "all", "signs", SIGNS).status_code == 404


def test_a_server_that_watches_its_store_finds_out_by_itself(made):
    with serving(made, service={"watch": 0.02}) as served:
        learn(served, "signs", 5)
        wait_for(lambda: "signs" in served.engine.router.names)
        (made / "router" / "general").mkdir(exist_ok=True)
        served.engine.store.remove("signs")
        wait_for(lambda: "signs" not in served.engine.router.names)


def test_a_store_that_cannot_be_read_is_served_as_it_was(made, monkeypatch, caplog):
    with serving(made, service={"watch": 0.02}) as served:
        loaded = served.engine._routing.loaded

        def broken(among: Any) -> Any:
            raise OSError("the disk is gone")

        def odd(among: Any) -> Any:
            raise ValueError("an odd file")

        monkeypatch.setattr(served.engine._routing, "loaded", odd)
        (made / "modules" / "digits" / "1" / "module.json").touch()
        wait_for(lambda: "an odd file" in caplog.text)
        monkeypatch.setattr(served.engine._routing, "loaded", broken)
        learn(served, "signs", 5)
        wait_for(lambda: "the disk is gone" in caplog.text)
        assert asked(served, "none", "auto").json()["growlm"]["module"] == "digits"
        monkeypatch.setattr(served.engine._routing, "loaded", loaded)
        wait_for(lambda: "signs" in served.engine.router.names)
    assert caplog.text.count("the disk is gone") == 1


def test_modules_are_pinned_let_go_of_and_evicted(served):
    card = admin(served, "modules/letters/pin").json()
    assert (card["id"], card["resident"], card["pinned"]) == ("letters", True, True)
    refused = admin(served, "modules/letters/evict")
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, "letters is pinned; unpin it first")
    assert admin(served, "modules/base/pin").status_code == 404
    card = admin(served, "modules/letters/unpin").json()
    assert (card["resident"], card["pinned"]) == (True, False)
    assert admin(served, "modules/letters/evict").json()["resident"] is False
    for verb in ("pin", "unpin", "evict"):
        missing = admin(served, f"modules/nosuch/{verb}")
        assert missing.status_code == 404
        assert "there are auto, base, digits, letters" in missing.json()["error"]["message"]


def test_what_is_in_memory_is_told(made):
    store = Store.open(made)
    with Engine(store) as engine:
        memory = with_pass(store, engine.fixed_bytes + 2 * store.module("letters").bytes) + (1 << 20)
    with serving(made, engine={"memory": memory}, admin_keys=Keys(["root"])) as served:
        asked(served, "none", "digits")
        wait_for(served.idle)
        found = admin(served, "status", "GET").json()
        assert found["memory"]["budget"] == memory
        assert found["memory"]["modules"] == store.module("digits").bytes
        parts = [found["memory"][name] for name in ("base", "router", "modules", "workspace")]
        assert sum(parts) <= found["memory"]["used"] <= memory
        assert (found["running"], found["waiting"], found["generated_tokens"]) == (0, 0, 4)
        assert {one["id"]: one["resident"] for one in found["modules"]} == {"digits": True, "letters": False}


def test_admin_is_for_the_admin_key_alone(made, served):
    for headers in ({}, {"Authorization": "Bearer all"}, {"Authorization": "Bearer wrong"}):
        for path, method in (("status", "GET"), ("reload", "POST"), ("modules/letters/pin", "POST"), ("no", "GET")):
            assert served.http.request(method, f"/admin/{path}", headers=headers).status_code == 401
    assert asked(served, "root", "letters").status_code == 200
    with serving(made) as other:
        refused = other.http.post("/admin/reload", headers=ADMIN)
        assert refused.status_code == 403
        assert "no admin key" in refused.json()["error"]["message"]


def test_a_card_says_what_the_disk_has_and_whether_it_is_damaged(served):
    def card() -> dict[str, Any]:
        found = served.http.get("/v1/models", headers=ADMIN).json()["data"]
        return next(one for one in found if one["id"] == "letters")

    before = card()
    assert (before["version"], before["kind"], "damaged" in before) == (1, "lora", False)
    folder = served.engine.store.module("letters").folder
    manifest, weights = (folder / "module.json").read_text(), (folder / "module.safetensors").read_bytes()
    (folder / "module.json").write_text("{")
    assert card()["damaged"]
    (folder / "module.safetensors").write_bytes(weights[:10])
    (folder / "module.json").write_text(manifest)
    assert card()["damaged"]
    (folder / "module.safetensors").write_bytes(weights)
    assert card() == before
    learn(served, "letters", 9)
    assert (card()["version"], card()["bytes"]) == (2, before["bytes"])


# Keys that are for some modules


def test_a_key_sees_its_own_modules_and_no_others(served):
    def models(key: str) -> list[str]:
        found = served.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()
        return [card["id"] for card in found["data"]]

    assert models("red") == ["auto", "base", "letters"]
    assert models("blue") == ["auto", "base", "digits"]
    assert models("all") == models("root") == ["auto", "base", "digits", "letters"]
    for model in ("digits", "store:digits", "nosuch"):
        missing = asked(served, "red", model)
        assert missing.status_code == 404
        assert missing.json()["error"]["message"].endswith("there are auto, base, letters")
        headers = {"Authorization": "Bearer red"}
        assert served.http.get(f"/v1/models/{model}", headers=headers).status_code == 404
    told = asked(served, "red", "digits").text.replace("no model 'digits'", "")
    assert "digits" not in told
    assert asked(served, "red", "letters").status_code == asked(served, "blue", "digits").status_code == 200


def test_the_router_chooses_among_a_keys_own_modules_as_if_there_were_no_others(served, made):
    everything = asked(served, "all", "auto").json()["growlm"]
    assert (everything["module"], set(everything["scores"])) == ("digits", {"digits", "letters", "none"})
    answer = asked(served, "red", "auto")
    assert set(answer.json()["growlm"]["scores"]) == {"letters", "none"}
    assert answer.headers.get("x-growlm-module", "base") in ("base", "letters")
    turn = {"messages": [{"role": "user", "content": DIGITS}], "max_tokens": 2, "model": "auto"}
    for key, names in (("red", {"letters", "none"}), ("blue", {"digits", "none"})):
        chat = served.http.post("/v1/chat/completions", json=turn, headers={"Authorization": f"Bearer {key}"})
        assert set(chat.json()["growlm"]["scores"]) == names
    learn(served, "signs", 5)  # which blue may use, once it is there
    admin(served, "reload")
    assert set(asked(served, "blue", "auto", SIGNS).json()["growlm"]["scores"]) == {"digits", "signs", "none"}
    assert set(asked(served, "red", "auto", SIGNS).json()["growlm"]["scores"]) == {"letters", "none"}


def test_what_is_kept_of_one_keys_texts_serves_no_other(served, monkeypatch):
    prompt = domain_text("letters", 5, words=20)
    found: dict[str, list[int]] = {}
    find = served.engine._prefixes.find

    def noting(*arguments: Any, salt: str, **named: Any) -> Any:
        kept = find(*arguments, salt=salt, **named)
        found.setdefault(now[0], []).append(kept.tokens)
        return kept

    monkeypatch.setattr(served.engine._prefixes, "find", noting)
    now = [""]
    for key in ("red", "blue", "all", "red", "all"):
        now[0] = f"{key} {len(found)}"
        assert asked(served, key, "base", prompt).status_code == 200
        wait_for(served.idle)
    kept = [max(tokens) for tokens in found.values()]
    assert kept[:3] == [0, 0, 0]
    assert min(kept[3:]) > 0
    for salt in ("red", f"{sha256(b'red').hexdigest()[:12]}\0"):  # as the log tells it
        now[0] = f"forged {salt}"
        assert asked(served, "all", "base", prompt, cache_salt=salt).status_code == 200
        assert max(found[now[0]]) == 0


def test_what_is_refused_says_nothing_of_other_keys_modules(made):
    store = Store.open(made)
    with Engine(store) as engine:
        memory = with_pass(store, engine.fixed_bytes + store.module("digits").bytes) + 100_000
    with serving(made, engine={"memory": memory}, keys=KEYS, admin_keys=Keys(["root"])) as served:
        admin(served, "modules/digits/pin")
        full, limited = (asked(served, key, "letters", DIGITS, max_tokens=60) for key in ("all", "red"))
        assert (full.status_code, limited.status_code) == (422, 422)
        assert "digits" in full.text
        assert "digits" not in limited.text
        assert "do not fit the server's memory" in limited.json()["error"]["message"]


def test_a_module_that_goes_while_it_is_asked_for_is_told_without_the_names_of_others(served, monkeypatch):
    find = served.engine.modules._find

    def gone(name: str) -> Any:
        served.engine.store.remove(name)
        return find(name)

    monkeypatch.setattr(served.engine.modules, "_find", gone)
    missing = asked(served, "red", "letters")
    assert missing.status_code == 404
    assert "digits" not in missing.text


def test_the_log_tells_keys_apart_and_tells_none(served):
    for key in ("red", "blue"):
        asked(served, key, "base")
    wait_for(lambda: len(served.log.getvalue().splitlines()) == 2)
    lines = [json.loads(line) for line in served.log.getvalue().splitlines()]
    assert len({line["key"] for line in lines}) == 2
    assert "red" not in served.log.getvalue()


@pytest.mark.parametrize(
    ("content", "admin", "told"),
    [
        ("one law\none\n", False, "keys:1: this key stands in another line too"),
        ("one\nschl\u00fcssel\n", False, "keys:2: a key has signs that no header can carry"),
        ("root law_*\n", True, "keys:1: an admin key is for all modules"),
    ],
)
def test_keys_that_cannot_be_what_they_say_are_refused(tmp_path, content, admin, told):
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(told)):
        Keys.read(tmp_path / "keys", admin=admin)


def test_a_server_of_this_machine_alone_answers_to_its_own_names(made):
    with serving(made, local=True) as served:
        for host, status in (("127.0.0.1", 200), ("localhost:80", 200), ("[::1]:8000", 200), ("evil.example", 421)):
            assert served.http.get("/v1/models", headers={"Host": host}).status_code == status
