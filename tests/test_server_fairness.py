"""What one client asks, sends slowly, does not read or leaves takes nothing from others that it need not take."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from growlm.engine import Engine
from growlm.engine.asking import Asking
from growlm.engine.request import State
from growlm.errors import UnknownModuleError
from growlm.server import door, events
from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, serving, wait_for
from stores import domain_text

SHAPES = {
    "letters": {"kind": "lora", "r": 4},
    "digits": {"placement": "interleaved", "vocabulary": "both"},
}
ASK = {"prompt": "abc", "model": "base", "max_tokens": 2, "temperature": 0}
SAY = {"messages": [{"role": "user", "content": domain_text("digits", 7)}], "max_tokens": 2, "temperature": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def sent(served: Served, body: Any, *, of_it: float = 1.0, key: str = "") -> Iterator[socket.socket]:
    """A client that sends a part of its request, and reads nothing of the answer."""
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        content = json.dumps(body).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head += [f"Authorization: Bearer {key}"] * bool(key) + [f"Content-Length: {len(content)}", "", ""]
        client.sendall("\r\n".join(head).encode() + content[: int(of_it * len(content))])
        yield client


# Places


def test_an_answer_that_has_ended_takes_no_place_though_others_of_its_request_go_on(made):
    with serving(made, engine={"max_batch": 4}, service={"max_queued": 0}) as served:
        served.engine._loop.writer.end_tokens = set()
        requests: list[Any] = []
        several = served.engine._asking.several

        def of_unlike_length(first: Any, n: int) -> list[Any]:
            requests.extend(several(first, n))
            for request in requests[1:]:
                request.config = type(request.config)(**{**vars(request.config), "max_new_tokens": 1})
            return requests

        served.engine._asking.several = of_unlike_length  # type: ignore[method-assign]
        with served.http.stream(
            "POST", "/v1/completions", json={**ASK, "n": 4, "max_tokens": 240, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            wait_for(lambda: sum(request.state is State.FINISHED for request in requests) == 3)
            wait_for(lambda: served.service.running_and_waiting() == (1, 0))
            served.engine._asking.several = several  # type: ignore[method-assign]
            assert served.post("/v1/completions", **ASK).status_code == 200
        wait_for(served.idle)


def test_who_reads_nothing_of_a_stream_holds_no_place_and_is_left(made, monkeypatch):
    monkeypatch.setattr(events, "_PATIENCE", 1.0)
    with serving(made, engine={"max_batch": 8}, service={"max_queued": 0}) as served:
        served.engine._loop.writer.end_tokens = set()
        body = {**ASK, "n": 8, "max_tokens": 200, "logprobs": 20, "stream": True}
        whole = len(served.post("/v1/completions", **body).content)
        served._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with sent(served, body) as client:
            wait_for(lambda: served.service.running_and_waiting() != (0, 0))
            wait_for(lambda: served.service.running_and_waiting() == (0, 0), 60)
            assert served.post("/v1/completions", **ASK).status_code == 200
            time.sleep(1.5)  # nothing is read meanwhile, and the server gives up
            client.settimeout(20)
            got = 0
            while part := client.recv(1 << 20):
                got += len(part)
        assert 0 < got < whole  # the server has given up
        wait_for(served.idle)


def test_a_chat_keeps_its_place_from_its_routing_to_its_answers(made):
    with serving(made, engine={"max_batch": 1}, service={"max_queued": 3}) as served:
        refused: list[int] = []
        stop = threading.Event()

        def others() -> None:
            while not stop.is_set():
                refused.append(served.post("/v1/completions", **ASK).status_code)

        threads = [threading.Thread(target=others) for _ in range(2)]
        for thread in threads:
            thread.start()
        found = [served.post("/v1/chat/completions", **SAY, n=2) for _ in range(8)]
        stop.set()
        for thread in threads:
            thread.join()
        for response in found:
            told = response.json()
            if response.status_code == 503:
                assert "growlm" not in told  # before anything was done for it
            else:
                assert (response.status_code, len(told["choices"])) == (200, 2)
        assert any(response.status_code == 200 for response in found)
        wait_for(served.idle)


# Time


def test_a_timeout_is_for_all_that_a_request_waits_for(made, monkeypatch):
    with serving(made, service={"timeout": 0.6}) as served:
        holds = threading.Event()
        served.service._preparing.submit(holds.wait)
        began = time.monotonic()
        response = served.post("/v1/completions", **ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - began < 3
        holds.set()
        wait_for(served.idle)
        step = served.engine.step

        def slow() -> bool:
            time.sleep(0.35)
            return step()

        monkeypatch.setattr(served.engine, "step", slow)  # routing alone is in time, and the answer is not
        assert served.post("/v1/chat/completions", **{**SAY, "max_tokens": 8}).status_code == 504
        wait_for(served.idle)


def test_a_limited_keys_first_router_is_waited_for_by_nobody_else(made, monkeypatch):
    with serving(made, keys=Keys(["all", "some lett*"])) as served:
        waits = threading.Event()
        among = Asking.among

        def slow(asking: Asking, names: Any) -> Any:
            if names is not None and not asking._reloading.has_router(frozenset(names)):
                waits.wait(20)
            return among(asking, names)

        monkeypatch.setattr(Asking, "among", slow)
        found: list[httpx.Response] = []

        def first() -> None:
            headers = {"Authorization": "Bearer some"}
            found.append(served.http.post("/v1/completions", json={**ASK, "model": "auto"}, headers=headers))

        thread = threading.Thread(target=first)
        thread.start()
        time.sleep(0.3)
        headers = {"Authorization": "Bearer all"}
        began = time.monotonic()
        for path, body in (("/v1/completions", ASK), ("/tokenize", {"prompt": "abc"})):
            assert served.http.post(path, json=body, headers=headers).status_code == 200
        assert time.monotonic() - began < 5
        assert found == []
        waits.set()
        thread.join()
        assert found[0].status_code == 200


# Bodies


def test_a_text_that_is_much_too_long_is_refused_before_all_of_it_is_read(made, monkeypatch):
    with serving(made) as served:
        seen: list[int] = []
        from growlm.data import encoding

        encode = encoding.encode_texts
        monkeypatch.setattr(encoding, "encode_texts", lambda t, texts: seen.extend(map(len, texts)) or encode(t, texts))
        long = "ab cd " * 600_000
        for path, body in (
            ("completions", {**ASK, "prompt": long}),
            ("chat/completions", {"messages": [{"role": "user", "content": long}], "model": "base"}),
        ):
            response = served.post(f"/v1/{path}", **body)
            assert response.status_code == 400
            assert "more than 256 prompt tokens exceed the base's 256 positions" in response.json()["error"]["message"]
        assert sum(seen) < 100_000
        assert served.post("/tokenize", prompt="ab cd " * 30_000).json()["count"] > 30_000


def test_a_body_that_stalls_is_given_up(made, monkeypatch):
    monkeypatch.setattr(door, "_BODY_TAKES", 0.5)
    with serving(made, keys=Keys(["k"])) as served, sent(served, ASK, of_it=0.5, key="k") as client:
        client.settimeout(10)
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        answer = served.http.post("/v1/completions", json=ASK, headers={"Authorization": "Bearer k"})
        assert answer.status_code == 200  # whose client is waited for long after its body has come
        wait_for(served.idle)


def test_bodies_that_are_sent_at_once_have_a_bound_together(made, monkeypatch):
    monkeypatch.setattr(door, "_BODIES", 1)
    with serving(made, max_body=4000) as served:
        with sent(served, {"prompt": "a" * 3500}, of_it=0.9):
            wait_for(lambda: reading(served) > 3000)
            response = served.post("/v1/completions", prompt="a" * 3000)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
            assert served.post("/v1/completions", **ASK).status_code == 200
        wait_for(lambda: reading(served) == 0)


def reading(served: Served) -> int:
    stack = served.app.middleware_stack
    while not isinstance(stack, door.Door):
        stack = stack.app
    return stack._reading


# Modules that go


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
def test_a_module_that_the_router_chose_and_that_goes_is_no_fault_of_who_asks(made, monkeypatch, path):
    body = {"prompt": SAY["messages"][0]["content"]} if path == "completions" else {"messages": SAY["messages"]}
    body = {"input": SAY["messages"]} if path == "responses" else {**body, "max_tokens": 2}
    with serving(made) as served:
        asks, left = Engine.submit_several, [1]

        def gone(engine: Engine, *arguments: Any, **options: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise UnknownModuleError(f"{engine.store.path}: no module 'digits'")
            return asks(engine, *arguments, **options)

        monkeypatch.setattr(Engine, "submit_several", gone)
        assert served.post(f"/v1/{path}", **body).status_code == 200  # it is routed again
        left[0] = 10
        response = served.post(f"/v1/{path}", **body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert str(made) not in response.text
        left[0] = 1
        assert served.post(f"/v1/{path}", **body, model="digits").status_code == 404  # whom the client has named
        wait_for(served.idle)


# What is told


def test_nobody_but_the_admin_is_told_where_the_store_lies(tmp_path, made):
    keys, admin = Keys(["all", "some letters"]), Keys(["root"])
    with serving(made, keys=keys, admin_keys=admin) as served:
        asked = [
            ("/v1/completions", {**ASK, "prompt": [99999]}),
            ("/detokenize", {"tokens": [99999]}),
            ("/v1/completions", {**ASK, "logit_bias": {"99999": 1}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}], "model": "base", "tools": [{}]}),
        ]
        for key in ("all", "some"):
            for path, body in asked:
                told = served.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
                assert told.status_code == 400
                assert str(made.parent) not in told.text
        told = served.http.post(asked[0][0], json=asked[0][1], headers={"Authorization": "Bearer root"})
        assert "/base" in told.json()["error"]["message"]


def test_a_store_that_is_named_as_its_module_leaves_that_module_its_name(tmp_path):
    from stores import make_store

    make_store(tmp_path, "llama", SHAPES)
    (tmp_path / "store").rename(tmp_path / "digits")
    with serving(tmp_path / "digits") as served:
        found = served.post("/v1/completions", **{**ASK, "model": "digits"}).json()["growlm"]
        assert found["module"] == "digits"
        assert served.http.get("/v1/models/digits").json()["kind"] == "blocks"
        assert (
            served.post("/v1/completions", **{**ASK, "model": "digits:letters"}).json()["growlm"]["module"] == "letters"
        )


def test_a_module_in_use_or_pinned_is_not_evicted_and_that_is_told(made):
    headers = {"Authorization": "Bearer root"}
    with serving(made, admin_keys=Keys(["root"])) as served:
        served.engine._loop.writer.end_tokens = set()
        body = {**ASK, "model": "digits", "max_tokens": 250, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            told = served.http.post("/admin/modules/digits/evict", headers=headers)
            assert (told.status_code, told.json()["error"]["code"]) == (409, "in_use")
        wait_for(served.idle)
        assert not served.http.post("/admin/modules/store:digits/evict", headers=headers).json()["resident"]
        assert served.http.post("/admin/modules/store:digits/pin", headers=headers).json()["pinned"]
        assert served.http.post("/admin/modules/store:digits/evict", headers=headers).status_code == 409
        assert not served.http.post("/admin/modules/store:digits/unpin", headers=headers).json()["pinned"]


def test_no_page_of_the_server_runs_what_is_not_its_own(made):
    with serving(made) as served:
        assert [served.http.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 200]


def test_a_conversation_that_asks_nothing_is_the_bases(made: Path):
    with serving(made) as served:
        for turns in ([{"role": "system", "content": "Be brief."}], [{"role": "user", "content": ""}]):
            told = served.post("/v1/chat/completions", messages=turns, max_tokens=2, model="auto")
            assert (told.status_code, told.json()["growlm"]["module"]) == (200, None)


def test_a_server_for_this_machine_is_not_called_by_other_names(made):
    for keys in ({}, {"admin_keys": Keys(["root"])}):
        with serving(made, local=True, **keys) as served:
            for path in ("/v1/models", "/mcp"):
                told = served.http.request("POST" if path == "/mcp" else "GET", path, headers={"Host": "evil.example"})
                assert (told.status_code, told.json()["error"]["code"]) == (421, "misdirected")


def test_stores_open_again(made):
    assert Store.open(made).verify() == []
