"""Engines of a Ray cluster behind one server: one that is killed costs no answer, and a new version is never mixed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from growlm.cli import main
from growlm.cluster.edge import EdgeService
from growlm.cluster.preference import preferred
from growlm.cluster.replica import Order, Told
from growlm.cluster.serving import replica_range
from growlm.engine import Engine
from growlm.errors import ConfigError
from growlm.server.refusals import Refusal
from growlm.store import Store
from servers import wait_for
from stores import PLAIN, add_module, domain_text, make_store

NAMES = list(PLAIN)
PROMPTS = [
    domain_text(domain, seed, words=6) for domain in ("letters", "digits", "signs", "general") for seed in range(2)
]


class Cluster:
    """`growlm serve --ray local` of two engines in a process of its own."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "growlm", "serve", str(store), "--port", "0", "--ray", "local", "--replicas", "2",
                "--device", "cpu", "--max-batch", "4", "--watch", "0.2",
            ],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        wait_for(lambda: self._process.poll() is not None or any("serving" in line for line in self.said), 150)
        assert self._process.poll() is None, "".join(self.said)
        (url,) = re.findall(r"http://\S+/v1", "".join(self.said))
        self.http = httpx.Client(base_url=url, timeout=120)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self.said += self._process.stderr

    def ask(self, prompt: str, model: str, **settings: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "model": model, "temperature": 0, "max_tokens": 24, **settings}
        answer = self.http.post("completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def streamed(self, prompt: str, model: str) -> tuple[str, str | None]:
        """Text and module of an answer that is streamed."""
        body = {"prompt": prompt, "model": model, "temperature": 0, "max_tokens": 24, "stream": True}
        with self.http.stream("POST", "completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]", lines[-1]
        chunks = [json.loads(line) for line in lines[:-1]]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks), chunks[-1]["growlm"]["module"]

    def engines(self) -> list[int]:
        """Processes of this server's engines."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
        rows = [line.split(None, 2) for line in listed]
        parent = {int(pid): int(before) for pid, before, *_ in rows}

        def mine(pid: int) -> bool:  # another server's may run beside it
            return pid == self._process.pid or (pid in parent and mine(parent[pid]))

        replicas = [int(pid) for pid, _, *called in rows if called and "ray::ServeReplica" in called[0]]
        return [pid for pid in replicas if mine(pid)]

    def stop(self) -> None:
        self.http.close()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(90)
        self._listening.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("cluster")
    make_store(home, "llama", PLAIN)
    running = Cluster(home / "store")
    yield running
    running.stop()
    assert "Traceback" not in "".join(running.said)


def alone(store: Path, asked: list[tuple[str, str]]) -> list[tuple[str, str | None]]:
    """What one engine answers, one prompt after another."""
    with Engine(Store.open(store), device="cpu") as engine:
        wanted = {"auto": "auto", "base": None}
        found = [
            engine.generate(prompt, module=wanted.get(model, model), temperature=0, max_new_tokens=24)
            for prompt, model in asked
        ]
    return [(answer.text, answer.module) for answer in found]


def test_an_engine_that_is_killed_costs_no_answer_and_no_module_is_mistaken(cluster):
    draw = random.Random(0)
    asked = [(draw.choice(PROMPTS), draw.choice([*NAMES, "auto", "base"])) for _ in range(60)]
    wanted = alone(cluster.store, asked)
    before = cluster.engines()
    assert len(before) == 2
    begun = threading.Semaphore(0)

    def one(number: int) -> tuple[str, str | None]:
        begun.release()
        prompt, model = asked[number]
        if number % 2:
            return cluster.streamed(prompt, model)
        answer = cluster.ask(prompt, model)
        return answer["choices"][0]["text"], answer["growlm"]["module"]

    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(one, number) for number in range(len(asked))]
        for _ in range(20):
            begun.acquire()
        os.kill(before[0], signal.SIGKILL)
        found = [answer.result(120) for answer in answers]
    assert found == wanted
    wait_for(lambda: len(set(cluster.engines()) - {before[0]}) == 2, 60)  # another one has begun in its place
    assert cluster.streamed(*asked[0]) == wanted[0]


def test_a_module_that_many_want_is_read_by_both_engines_and_others_by_one(cluster):
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda _: cluster.ask(PROMPTS[0], "signs", max_tokens=60), range(24)))
    read = Counter(name for answer in answers for name in answer["growlm"]["loaded"])
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert read["signs"] <= 2
    for _ in range(6):  # one after another: the engine that has it answers
        assert cluster.ask(PROMPTS[0], "signs")["growlm"]["loaded"] in ([], ["signs"])
    assert [cluster.ask(PROMPTS[0], "signs")["growlm"]["loaded"] for _ in range(4)] == [[]] * 4


def test_a_new_version_is_served_by_all_once_it_is_by_one_and_never_mixed(cluster):
    asked = [(prompt, "digits") for prompt in PROMPTS[:4]]
    old = alone(cluster.store, asked)
    store = Store.open(cluster.store)
    found: list[list[tuple[str, str | None]]] = [[] for _ in asked]
    stop = threading.Event()

    def again(number: int) -> None:
        while not stop.is_set():
            found[number].append(cluster.streamed(*asked[number]))

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(again, number) for number in range(len(asked))]
        try:
            wait_for(lambda: all(len(answers) > 2 for answers in found), 60)
            add_module(store, store.load_base(), "digits", 99)
            new = alone(cluster.store, asked)
            assert all(one != other for one, other in zip(old, new, strict=True))
            wait_for(lambda: all(answers[-2:] == [new[n]] * 2 for n, answers in enumerate(found)), 60)
        finally:
            stop.set()
        for one in asking:
            one.result(60)
    for number, answers in enumerate(found):
        changed = answers.index(new[number])
        assert set(answers[:changed]) == {old[number]}
        assert set(answers[changed:]) == {new[number]}  # an engine that was behind has not answered since


def test_a_version_that_is_withdrawn_is_served_by_none_and_one_that_is_learned_again_by_all(cluster):
    store, asked = Store.open(cluster.store), [(prompt, "letters") for prompt in PROMPTS[:2]]
    first = alone(cluster.store, asked)
    add_module(store, store.load_base(), "letters", 77)
    second = alone(cluster.store, asked)
    wait_for(lambda: [cluster.streamed(*one) for one in asked] == second, 60)
    store.remove("letters", version=2)
    assert [cluster.streamed(*one) for one in asked] == first
    store.remove("letters")
    add_module(store, store.load_base(), "letters", 78)  # version 1 again, of other weights
    third = alone(cluster.store, asked)
    assert third not in (first, second)
    assert [cluster.streamed(*one) for one in asked] == third


def test_prompts_are_echoed_with_their_probabilities_in_streams_too(cluster):
    body = {"prompt": PROMPTS[0], "model": "signs", "echo": True, "logprobs": 1, "max_tokens": 5, "temperature": 0}
    whole = cluster.http.post("completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
    with cluster.http.stream("POST", "completions", json={**body, "stream": True}) as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line and line != "data: [DONE]"]
    told = [chunk["choices"][0]["logprobs"] for chunk in lines]
    assert [token for one in told if one for token in one["tokens"]] == whole


def test_bad_requests_and_unknown_modules_are_told_as_by_one_engine(cluster):
    refused = cluster.http.post("completions", json={"prompt": "ab", "model": "nobody"})
    assert refused.status_code == 404
    assert "no model 'nobody'" in refused.json()["error"]["message"]
    refused = cluster.http.post("completions", json={"prompt": "ab" * 400, "model": "signs"})
    assert refused.status_code == 400
    assert "positions" in refused.json()["error"]["message"]
    both = cluster.ask(PROMPTS[0], "letters", n=2, temperature=1.0, seed=3, logprobs=1)
    assert len({choice["text"] for choice in both["choices"]}) == 2
    with Engine(Store.open(cluster.store), device="cpu") as engine:
        drawn = engine.choices(PROMPTS[0], 2, module="letters", temperature=1.0, seed=3, max_new_tokens=24)
    assert [choice["text"] for choice in both["choices"]] == [answer.text for answer in drawn]
    lengths = [len(choice["logprobs"]["tokens"]) for choice in both["choices"]]
    assert lengths == [len(answer.tokens) for answer in drawn]


# Without a cluster


class Lost:
    """Replicas of which each tells something and is lost, or answers."""

    def __init__(self, *tries: list[Told]) -> None:
        self.tries, self.orders = list(tries), []

    def __call__(self, order: Order) -> Lost:
        self.orders.append(order)
        self._items = self.tries.pop(0)
        return self

    async def __aiter__(self):
        for item in self._items:
            yield item
        if not self._items or (self._items[-1].end is None and self._items[-1].other is None):
            raise ActorDiedError

    def cancel(self) -> None:
        pass


def written_by(store: Path, *tries: list[Told]) -> tuple[Any, Lost]:
    """What one request comes to, an answer or an error, by replicas that tell these things."""
    replicas = Lost(*tries)

    async def ask() -> Any:
        with Engine(Store.open(store), device="cpu") as engine:
            service = EdgeService(engine, replicas, lambda: 1, places=4)
            service.start()
            try:
                asked = await service.ask([PROMPTS[0]], module="signs", temperature=0, max_new_tokens=4)
                return (await asked.whole())[0]
            except Refusal as refusal:
                return refusal
            finally:
                service.close()

    return asyncio.run(ask()), replicas


def test_an_order_goes_on_behind_what_was_told_or_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("growlm.cluster.edge._PAUSE", 0.01)
    store = make_store(tmp_path, "llama", PLAIN).path
    with Engine(Store.open(store), device="cpu") as engine:
        whole = engine.generate(PROMPTS[0], module="signs", temperature=0, max_new_tokens=4)
    first, rest = whole.tokens[:2], whole.tokens[2:]
    end = Told(0, rest, [], end=whole)
    answer, _ = written_by(store, [Told(0, first, [])], [Told(0, first, []), end])
    assert (answer.text, answer.tokens, answer.module) == (whole.text, whole.tokens, "signs")
    longer = [Told(0, whole.tokens[:3], []), Told(0, whole.tokens[3:], [], end=whole)]
    answer, _ = written_by(store, [Told(0, first, [])], [], longer)
    assert answer.tokens == whole.tokens
    otherwise = [first[0], (first[1] + 1) % 300]
    refused, _ = written_by(store, [Told(0, first, [])], [Told(0, otherwise, []), end])
    assert (refused.status, refused.code) == (503, "no_replica")
    assert "would write it otherwise" in refused.message
    refused, _ = written_by(store, [Told(0, first, [])], [Told(0, [], [], other="signs")])
    assert (refused.status, refused.code) == (503, "module_changed")
    answer, replicas = written_by(store, [Told(0, [], [], other="signs")], [Told(0, first, []), end])
    assert answer.tokens == whole.tokens  # nothing was told: it is asked for as the store is by now
    assert len(replicas.orders) == 2
    refused, _ = written_by(store, *[[]] * 5)
    assert (refused.status, refused.code) == (503, "no_replica")
    monkeypatch.setattr("growlm.cluster.edge.version_of", lambda stored: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what goes wrong before an order is given is heard as well
        written_by(store, [])


def test_where_no_engine_runs_nobody_waits(tmp_path, monkeypatch):
    for name, value in (("_LOOK", 0.01), ("_WITHOUT", 0.05)):
        monkeypatch.setattr(f"growlm.cluster.edge.{name}", value)
    store = make_store(tmp_path, "llama", PLAIN).path

    class Waits:
        async def __aiter__(self):
            await asyncio.sleep(60)
            yield None

        def cancel(self) -> None:
            pass

    async def ask() -> None:
        with Engine(Store.open(store), device="cpu") as engine:
            running = [1]
            service = EdgeService(engine, lambda order: Waits(), lambda: running[0], places=4)
            service.start()
            asked = await service.ask([PROMPTS[0]], module="signs")
            running[0] = 0
            with pytest.raises(Refusal, match="no engine of the cluster answers"):
                await asyncio.wait_for(asked.whole(), 10)
            with pytest.raises(Refusal, match="no engine of the cluster answers"):
                service.require_whole()
            running[0] = 1
            while True:  # they come back
                await asyncio.sleep(0.02)
                try:
                    service.require_whole()
                    break
                except Refusal:
                    continue
            service.close()

    asyncio.run(asyncio.wait_for(ask(), 20))


@given(st.sets(st.uuids().map(str), min_size=2, max_size=12), st.data())
def test_an_engine_that_goes_moves_the_modules_that_preferred_it_and_no_others(replicas, data):
    gone = data.draw(st.sampled_from(sorted(replicas)))
    for number in range(20):
        before = preferred(f"module-{number}", sorted(replicas))
        after = preferred(f"module-{number}", sorted(replicas - {gone}))
        assert after == [replica for replica in before if replica != gone]


def test_modules_are_spread_evenly():
    first = Counter(preferred(f"module-{number}", ["a", "b", "c", "d"])[0] for number in range(2000))
    assert all(400 < count < 600 for count in first.values())


def test_the_base_alone_goes_to_whoever_has_least_to_do_and_a_module_to_its_own_first():
    from growlm.cluster.by_module import ByModule

    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]

    def ranked(*names: str) -> list[list[str]]:
        asked = SimpleNamespace(args=[SimpleNamespace(names=names)])
        chosen = asyncio.run(ByModule.choose_replicas(None, replicas, asked))  # type: ignore[arg-type]
        return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]

    assert ranked() == [["a", "b", "c"]]
    assert ranked("law") == [[name] for name in preferred("law", ["a", "b", "c"])]


@pytest.mark.parametrize(("text", "found"), [("2", (2, 2)), ("1-8", (1, 8))])
def test_numbers_of_engines(text, found):
    assert replica_range(text) == found


@pytest.mark.parametrize("text", ["0", "8-1", "two", "1-", "-1", ""])
def test_numbers_of_engines_that_cannot_be(text):
    with pytest.raises(ConfigError, match=r"--replicas is .*; give a number like 2, or a range like 1-8"):
        replica_range(text)


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys):
    make_store(tmp_path, "llama", {"letters": {}})
    for options, told in (
        (["--ray", "127.0.0.1:9"], "growlm: --ray 127.0.0.1:9: no cluster answers there"),
        (["--replicas", "2"], "growlm: --replicas is 2, and there is no --ray; give the address of a cluster"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["serve", str(tmp_path / "store"), "--port", "0", *options])
        assert caught.value.code == 1
        assert told in capsys.readouterr().err.splitlines()[-1]
