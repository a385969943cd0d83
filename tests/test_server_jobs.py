"""A store that is taught while it is served."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from growlm.server.files import Files
from growlm.server.jobs import Job, Jobs
from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, serving, wait_for
from stores import ALPHABETS, domain_text, make_store

ADMIN = {"Authorization": "Bearer root"}
SIGNS = domain_text("signs", 77)
SHORT = {
    "tokens": 2000, "sequence_length": 64, "kind": "lora", "learning_rate": 0.003, "separator": "\\n\\n"
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(domain: str, documents: int = 80) -> str:
    draw = random.Random(domain)
    words = (" ".join("".join(draw.choices(ALPHABETS[domain], k=4)) for _ in range(40)) for _ in range(documents))
    return "\n\n".join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "signs.txt").write_text(text_of("signs"))
    (folder / "none.txt").write_text("")
    return folder


@pytest.fixture
def served(tmp_path, folder) -> Iterator[Served]:
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    with taught(tmp_path / "store", Files(folder, most_bytes=100_000, most=3)) as served:
        yield served


def taught(store: Path, files: Files, **jobs: Any) -> Any:
    """A server with jobs, which tell it once they have ended."""
    made: list[Served] = []

    async def ended() -> None:
        await made[0].service.reload()

    class Teaching:
        def __enter__(self) -> Served:
            keys = {"keys": Keys(["user"]), "admin_keys": Keys(["root"])}
            self.served = serving(store, **keys, files=files, jobs=Jobs(str(store), ended=ended, **jobs))
            made.append(self.served.__enter__())
            return made[0]

        def __exit__(self, *exception: object) -> None:
            self.served.__exit__(*exception)  # type: ignore[arg-type]

    return Teaching()


def admin(served: Served, method: str, path: str, **request: Any) -> httpx.Response:
    return served.http.request(method, f"/admin/{path}", headers=ADMIN, **request)


def begun(served: Served, verb: str, module: str | None = None, **body: Any) -> str:
    response = admin(served, "POST", "jobs", json={"verb": verb, "module": module, **body})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def ended(served: Served, job: str) -> list[dict[str, Any]]:
    """The events of a job, to its end."""
    with served.http.stream("GET", f"/admin/jobs/{job}/events", headers=ADMIN, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def chat(served: Served, text: str) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "model": "auto", "max_tokens": 2}
    return served.http.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer user"}).json()


def test_a_module_is_learned_asked_updated_and_removed_without_a_restart(served):
    sent = admin(served, "PUT", "files/signs.txt", content=text_of("signs")).json()
    assert chat(served, SIGNS)["growlm"]["module"] is None
    job = begun(served, "learn", "signs", files=[sent["id"]], **SHORT)
    twice = {"verb": "learn", "module": "signs", "files": [sent["id"]]}
    assert admin(served, "POST", "jobs", json=twice).json()["error"]["code"] == "job_exists"
    events = ended(served, job)
    last = events[-1]
    assert (last["type"], last["state"], last["verb"], last["module"]) == ("job", "done", "learn", "signs")
    assert {event["state"] for event in events if event["type"] == "job"} >= {"running", "done"}
    assert any("read: 80 documents" in event.get("line", "") for event in events)
    assert last["result"]["loss_after"] < last["result"]["loss_before"]
    assert len(last["result"]["samples"]) == 3
    assert "read: 80 documents" in admin(served, "GET", f"jobs/{job}/log").text
    assert chat(served, SIGNS)["growlm"]["module"] == "signs"  # which it knows at once
    for verb, module, status, told in (
        ("learn", "signs", 409, "is learned as an update"),
        ("update", "nosuch", 404, "no module 'nosuch'"),
        ("remove", "nosuch", 404, "no module 'nosuch'"),
    ):
        body = {"verb": verb, "module": module, "files": ["signs.txt"]}
        refused = admin(served, "POST", "jobs", json=body)
        assert (refused.status_code, told in refused.text) == (status, True)
    update = ended(served, begun(served, "update", "signs", files=["signs.txt"], **SHORT))[-1]
    assert (update["state"], update["result"]["version"]) == ("done", 2)
    assert ended(served, begun(served, "verify"))[-1]["state"] == "done"
    assert ended(served, begun(served, "remove", "signs"))[-1]["state"] == "done"
    assert chat(served, SIGNS)["growlm"]["module"] is None
    states = [(one["verb"], one["state"]) for one in admin(served, "GET", "jobs").json()["data"]]
    assert states == [("learn", "done"), ("update", "done"), ("verify", "done"), ("remove", "done")]


def test_jobs_that_are_left_or_die_leave_store_and_server_whole(served):
    long = {**SHORT, "tokens": 2_000_000, "epochs": None}
    first = begun(served, "learn", "signs", files=["signs.txt"], **long)
    waits = begun(served, "learn", "later", files=["signs.txt"], **SHORT)
    assert admin(served, "GET", f"jobs/{waits}").json()["state"] == "queued"  # one at a time
    assert admin(served, "DELETE", f"jobs/{waits}").json()["state"] == "cancelled"

    def training(job: str) -> bool:
        found = admin(served, "GET", f"jobs/{job}").json()
        assert found["state"] == "running" or not found["seconds"]
        return found["progress"].get("title") == "training"

    wait_for(lambda: training(first), 60)
    progress = admin(served, "GET", f"jobs/{first}").json()["progress"]
    assert 0 <= progress["done"] < progress["total"]
    assert chat(served, "abc de").get("choices")  # others are answered meanwhile
    left = admin(served, "DELETE", f"jobs/{first}").json()
    assert left["state"] == "cancelled"
    # One that is killed, as by a machine that runs out of memory.
    second = begun(served, "learn", "signs", files=["signs.txt"], **long)
    wait_for(lambda: training(second), 60)
    jobs = [job for job in served.jobs.all() if job.id == second]
    os.killpg(jobs[0].process.pid, signal.SIGKILL)
    last = ended(served, second)[-1]
    assert (last["state"], last["error"]) == ("failed", "it was ended by signal 9")
    store = Store.open(served.engine.store.path)
    assert store.verify() == []
    assert list(store.modules) == ["letters"]
    assert chat(served, "abc de").get("choices")


def test_a_job_that_takes_too_much_memory_fails_alone(tmp_path, folder):
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    with taught(tmp_path / "store", Files(folder), memory=256 << 20) as served:
        last = ended(served, begun(served, "learn", "signs", files=["signs.txt"], **SHORT))[-1]
        assert last["state"] == "failed"
        assert last["error"] == "it took more memory than --job-memory 268.4 MB; raise it"
        assert chat(served, "abc de").get("choices")
        assert Store.open(served.engine.store.path).verify() == []


def test_a_server_that_stops_ends_its_jobs(tmp_path, folder):
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    with taught(tmp_path / "store", Files(folder)) as served:
        job = begun(served, "learn", "signs", files=["signs.txt"], **{**SHORT, "tokens": 2_000_000})
        wait_for(lambda: admin(served, "GET", f"jobs/{job}").json()["progress"], 60)
        process = served.jobs.all()[0].process
    assert process.returncode is not None
    assert Store.open(tmp_path / "store").verify() == []


def test_a_server_that_is_killed_takes_its_job_along(tmp_path, folder):
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    options = ["--port", "0", "--learn-from", str(folder), "--no-access-log"]
    command = [sys.executable, "-m", "growlm", "serve", str(tmp_path / "store"), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        link = next(found for line in server.stderr if (found := re.match(r"page: (\S+)/#key=(\S+),", line)))
        body = {"verb": "learn", "module": "signs", "files": ["signs.txt"], **SHORT, "tokens": 2_000_000}
        with httpx.Client(base_url=f"{link[1]}/admin/", headers={"Authorization": f"Bearer {link[2]}"}) as http:
            job = http.post("jobs", json=body).json()["id"]
            wait_for(lambda: http.get(f"jobs/{job}").json()["progress"].get("title") == "training", 60)
        (process,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        server.kill()
        wait_for(lambda: not Path(f"/proc/{process}").exists())
    store = Store.open(tmp_path / "store")
    assert (store.verify(), list(store.modules)) == ([], ["letters"])
    assert store.status()["runs"]  # what it had come to


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"verb": "teach", "module": "signs"}, "verb is 'teach'"),
        ({"verb": "learn", "module": "signs"}, "files is empty"),
        ({"verb": "learn", "module": "No Name", "files": ["signs.txt"]}, "module is 'No Name'"),
        ({"verb": "learn", "module": "--yes", "files": ["signs.txt"]}, "module is '--yes'"),
        ({"verb": "remove"}, "module is missing"),
        ({"verb": "remove", "module": "letters", "files": ["signs.txt"]}, "leave out files"),
        ({"verb": "learn", "module": "auto", "files": ["signs.txt"]}, "and not auto or base"),
        ({"verb": "verify", "module": "letters"}, "leave out module"),
        ({"verb": "learn", "module": "x", "files": ["../store/store.json"]}, "is not in the folder"),
        ({"verb": "learn", "module": "x", "files": ["/etc/passwd"]}, "is not in the folder"),
        ({"verb": "learn", "module": "x", "files": ["nosuch.txt"]}, "there is no 'nosuch.txt'"),
        ({"verb": "learn", "module": "x", "files": ["a\0b"]}, "there is no"),
        ({"verb": "learn", "module": "x", "files": ["a" * 5000]}, "there is no"),
        ({"verb": "learn", "module": "x", "files": ["signs.txt"], "separator": "a\0b"}, "separator is"),
        ({"verb": "learn", "module": "x", "files": ["signs.txt"], "text_key": "\0"}, "text_key is"),
        ({"verb": "learn", "module": "x", "files": ["signs.txt"], "kind": "magic"}, "kind is 'magic'"),
        ({"verb": "learn", "module": "x", "files": ["signs.txt"], "tokens": 0}, "tokens is 0"),
        ({"verb": "learn", "module": "x", "files": ["signs.txt"], "data": "/etc"}, "data"),
    ],
)
def test_jobs_that_cannot_be_are_refused_before_anything_runs(served, body, told):
    response = admin(served, "POST", "jobs", json=body)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]
    assert served.jobs.all() == []


def test_what_is_no_job_is_told(served):
    for method, path in (("GET", "jobs/x"), ("DELETE", "jobs/x"), ("GET", "jobs/x/events"), ("GET", "jobs/x/log")):
        missing = admin(served, method, path)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_such_job")
    empty = ended(served, begun(served, "learn", "x", files=["none.txt"], **SHORT))[-1]
    assert empty["state"] == "failed"
    assert "none.txt" in empty["error"]


@pytest.mark.parametrize(
    ("name", "content", "status", "told"),
    [
        ("..%2Fmine.txt", b"x", 404, "no such path"),
        ("..%5Cmine.txt", b"x", 400, "no name of a file"),
        (".hidden.txt", b"x", 400, "no name of a file"),
        ("bomb.zip", b"PK", 400, "archives are to be unpacked"),
        ("text.txt.gz", b"x", 400, "archives are to be unpacked"),
        ("program.exe", b"x", 400, "text is read from"),
        ("empty.txt", b"", 400, "is empty"),
        ("long.txt", b"x" * 100_001, 413, "larger than 100.0 kB"),
        ("a" * 201 + ".txt", b"x", 400, "no name of a file"),
        ("\u8a9e" * 120 + ".txt", b"x", 400, "no name of a file"),
    ],
)
def test_files_that_cannot_be_are_refused_and_nothing_is_kept(served, name, content, status, told):
    response = admin(served, "PUT", f"files/{name}", content=content)
    assert response.status_code == status
    assert told in response.json()["error"]["message"]
    pieces = (content[at : at + 1000] for at in range(0, len(content), 1000))  # of which nobody says how many
    assert admin(served, "PUT", f"files/{name}", content=pieces).status_code == status
    kept = served.files._kept
    assert kept is None or not list(kept.iterdir())


def test_a_kind_that_takes_a_package_that_is_not_here_is_refused_before_it_is_sent(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    response = admin(served, "PUT", "files/law.pdf", content=b"%PDF")
    assert response.status_code == 400
    assert 'law.pdf: PDF is read with an extra: pip install "growlm[documents]"' in response.json()["error"]["message"]
    assert served.files.all() == []


def test_files_are_kept_until_they_are_removed_or_the_server_ends(served):
    ids = [admin(served, "PUT", f"files/{n}.txt", content=b"text").json()["id"] for n in range(3)]
    assert admin(served, "PUT", "files/more.txt", content=b"text").status_code == 400
    assert admin(served, "DELETE", f"files/{ids[0]}").json() == {"removed": True}
    assert admin(served, "DELETE", f"files/{ids[0]}").status_code == 404
    assert admin(served, "PUT", "files/more.txt", content=b"text").status_code == 200
    kept = served.files._kept
    assert kept is not None
    served.stop()
    assert not kept.exists()


def test_a_job_that_is_cancelled_before_it_has_a_process_does_nothing(served):
    job = begun(served, "remove", "letters")
    assert admin(served, "DELETE", f"jobs/{job}").json()["state"] == "cancelled"
    assert "letters" in served.engine.store.modules


def test_what_goes_wrong_with_one_job_is_no_matter_to_the_next(served, monkeypatch):
    def refused(*limits: Any) -> None:
        raise ValueError("no such limit")

    monkeypatch.setattr("growlm.server.jobs.os.setpriority", refused)
    last = ended(served, begun(served, "verify"))[-1]
    assert (last["state"], last["error"]) == ("failed", "no such limit")
    (job,) = served.jobs.all()
    wait_for(lambda: not Path(f"/proc/{job.process.pid}").exists() or job.process.returncode is not None)
    monkeypatch.undo()
    assert ended(served, begun(served, "verify"))[-1]["state"] == "done"


def test_a_damaged_store_is_named_by_file(served):
    weights = next((served.engine.store.path / "modules" / "letters").rglob("module.safetensors"))
    whole = bytearray(weights.read_bytes())
    whole[-50] ^= 1
    weights.write_bytes(whole)
    last = ended(served, begun(served, "verify"))[-1]
    assert (last["state"], "module.safetensors" in last["error"]) == ("failed", True)


def test_what_a_job_says_is_cut_and_the_newest_is_kept():
    job = Job("learn", "law", [])
    for number in range(6000):
        job.says(f"line {number} of /tmp/growlm-files-ab12/0f/law.txt")
    assert (len(job.lines), job.said) == (5000, 6000)
    assert job.lines[-1] == "line 5999 of law.txt"

    async def told() -> list[dict[str, Any]]:
        job.turns("done")
        return [event async for event in job.events()]

    events = asyncio.run(told())
    assert [event["type"] for event in events] == ["line"] * 5000 + ["job"]


def test_a_job_runs_nothing_that_lies_where_the_server_was_started(tmp_path, folder, monkeypatch):
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}})
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    with taught(tmp_path / "store", Files(folder)) as served:
        assert ended(served, begun(served, "verify"))[-1]["state"] == "done"


def test_only_the_admin_key_teaches(served):
    for headers in ({}, {"Authorization": "Bearer user"}):
        for method, path in (("PUT", "files/a.txt"), ("POST", "jobs"), ("GET", "jobs"), ("DELETE", "jobs/x")):
            assert served.http.request(method, f"/admin/{path}", headers=headers).status_code == 401
