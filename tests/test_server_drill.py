"""Whoever asks over HTTP, leaves, or is served while modules change: every answer is that of the request alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from drills import WholePasses, changing, nothing_is_left
from growlm.engine import Engine
from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, leaving, serving, wait_for
from stores import domain_text, make_store, with_texts

SHAPES = {
    "letters": {"kind": "lora", "r": 4},
    "digits": {"placement": "interleaved", "vocabulary": "both"},
    "signs": {"kind": "lora+recall", "r": 4},
}
PROMPTS = ["abc de", domain_text("digits", 7), "x", domain_text("letters", 3, words=30), "<= >> def add("]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(tmp_path) -> Path:
    make_store(tmp_path, "llama", SHAPES)
    return tmp_path / "store"


def test_clients_that_leave_and_modules_that_change_leave_every_answer_as_it_is_alone(made):
    requests = int(os.environ.get("GROWLM_DRILL", "120"))
    store = Store.open(made)
    base = store.load_base()
    sizes = [stored.bytes for stored in store.modules.values()]
    with Engine(store) as engine:
        weights = engine.fixed_bytes + max(sizes) + sorted(sizes)[-2]
    memory = with_texts(store, weights, texts=3, tokens=256)
    answers: list[tuple[list[int], list[int], str | None]] = []
    statuses: list[int] = []
    settings = {"engine": {"memory": memory, "max_batch": 6}, "service": {"max_queued": 8}}
    with serving(made, **settings) as served:

        def ask(number: int) -> None:
            draw = random.Random(number)
            body: dict[str, Any] = {"temperature": 0, "max_tokens": draw.randint(1, 12), "return_token_ids": True}
            body["model"] = draw.choice([*SHAPES, "base", "auto"])
            chat = draw.random() < 0.3
            prompt = draw.choice(PROMPTS)
            path, field = "completions", {"prompt": prompt}
            if chat:
                path, field = "chat/completions", {"messages": [{"role": "user", "content": prompt}]}
            way = draw.random()
            if way < 0.2:
                with leaving(served, f"/v1/{path}", {**body, **field}, draw.random() * 0.05):
                    return
            if way < 0.5:
                streamed(served, f"/v1/{path}", {**body, **field, "stream": True}, draw.randint(0, 4))
                return
            response = served.http.post(f"/v1/{path}", json={**body, **field})
            # A module that was named may be gone; one that the router chose is no fault of who asks.
            assert response.status_code in ({200, 503} if body["model"] in ("auto", "base") else {200, 404}), (
                response.text
            )
            statuses.append(response.status_code)
            if response.status_code == 200:
                found = response.json()
                (choice,) = found["choices"]
                answers.append((choice["prompt_token_ids"], choice["token_ids"], found["growlm"]["module"]))

        with changing(store, base, served.engine, SHAPES, requests) as versions, ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(ask, number) for number in range(requests)]:
                done.result(300)
        wait_for(served.idle)
        assert served.service._taken == 0
        assert not served.service._live
        nothing_is_left(served.engine)
        assert served.post("/v1/completions", prompt="abc", max_tokens=1).status_code == 200
        tokenizer = served.engine.tokenizer
    assert len(answers) > requests // 6
    passes = {name: [WholePasses(base, [module]) for module in each] for name, each in versions.items()}
    ties, alone = 0, [WholePasses(base, [])]
    ends = base.end_tokens(tokenizer)
    for prompt, tokens, module in answers:
        assert not ends & set(tokens)
        found = [one.apart(prompt, tokens) for one in (alone if module is None else passes[module])]
        assert any(one is not None for one in found), (prompt, tokens, module)
        ties += 0 not in found
    print(f"{len(answers)} answers, {ties} that differ at a tie, statuses {sorted(set(statuses))}")
    assert ties <= max(len(answers) // 50, 1)


def streamed(served: Served, path: str, body: dict[str, Any], lines: int) -> None:
    """Reads so many lines of a stream, and goes."""
    with served.http.stream("POST", path, json=body) as response:
        found = response.iter_lines()
        for _ in range(lines):
            next(found, None)


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.02])
def test_clients_that_go_at_any_moment_take_no_place(made, moment):
    with serving(made, engine={"max_batch": 2}, service={"max_queued": 2}) as served:
        for _ in range(20):
            with leaving(served, "/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 100}, moment):
                pass
        wait_for(served.idle)
        assert served.service._taken == 0
        nothing_is_left(served.engine)
        assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "abc"}, timeout=30).status_code == 200


def test_a_module_that_is_damaged_under_load_fails_its_own_requests_alone(made):
    weights = made / "modules" / "digits" / "1" / "module.safetensors"
    whole = weights.read_bytes()
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    body = {"prompt": PROMPTS[1], "temperature": 0, "max_tokens": 6}
    with serving(made, admin_keys=Keys(["root"])) as served, ThreadPoolExecutor(4) as pool:
        right = {name: served.post("/v1/completions", model=name, **body).json()["choices"] for name in SHAPES}
        over, found = threading.Event(), list[tuple[str, int, Any]]()

        def ask(name: str) -> None:
            while not over.is_set():
                response = served.http.post("/v1/completions", json={"model": name, **body})
                told = response.json()
                found.append((name, response.status_code, told.get("choices", told.get("error"))))

        asking = [pool.submit(ask, name) for name in SHAPES]

        def goes_on(name: str, status: int) -> None:
            """Until some more of a module's requests have ended so."""
            already = len(found)
            wait_for(lambda: [one[:2] for one in list(found[already:])].count((name, status)) > 3)

        try:
            goes_on("digits", 200)
            weights.write_bytes(damaged)
            goes_on("digits", 200)  # it is in memory
            evicted = False
            while not evicted:  # it is in use most of the time
                told = served.http.post("/admin/modules/digits/evict", headers={"Authorization": "Bearer root"})
                assert told.status_code in (200, 409)
                evicted = told.status_code == 200 or any(status == 500 for _, status, _ in list(found))
            goes_on("digits", 500)
            goes_on("letters", 200)
            weights.write_bytes(whole)
            goes_on("digits", 200)
        finally:  # else nobody would hear why
            over.set()
        for one in asking:
            one.result(60)
        wait_for(served.idle)
        nothing_is_left(served.engine)
    for name, status, told in found:
        if status == 200:
            assert told == right[name]
        else:
            assert (name, status, told["code"]) == ("digits", 500, "store")
            assert "module.safetensors" in told["message"]


def test_a_server_that_is_killed_under_load_leaves_a_store_that_is_served_again(made):
    body = {"prompt": PROMPTS[1], "temperature": 0, "max_tokens": 40, "model": "auto", "stream": True}

    @contextmanager
    def served(port: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
        command = [sys.executable, "-m", "growlm", "serve", str(made), "--port", port, "--no-access-log"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            told = next(line for line in process.stderr if line.startswith("serving"))
            found = re.search(r"http://127\.0\.0\.1:(\d+)", told)
            assert found is not None
            try:
                yield process, found[1]
            finally:
                process.kill()

    def text_of(port: str) -> tuple[str, bool]:
        """What a stream has said, and whether it has ended as it should."""
        text, ended = "", False
        try:
            with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    ended = ended or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
        except httpx.HTTPError:
            pass
        return text, ended

    with served("0") as (process, port), ThreadPoolExecutor(6) as pool:
        whole, ended = text_of(port)
        assert ended
        asked = [pool.submit(text_of, port) for _ in range(6)]
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        for one in asked:
            text, ended = one.result(60)
            assert whole.startswith(text)
            assert text == whole or not ended
    assert Store.open(made).verify() == []
    with served(port) as (_, again):  # the same port, at once
        assert again == port
        assert text_of(port) == (whole, True)
