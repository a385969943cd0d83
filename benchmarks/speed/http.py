"""What HTTP adds to the engine, and what a server does when more is asked than it can answer.

    added     16 streams of one module, asked of a server and of an engine in this process, in turn: the first token and
              each that follows. The server is `growlm serve`; the engine makes steps and hands out pieces, no more.
              Both have `--threads`; with `--pin` the server has one core to itself, as the engine has, and who asks has
              another: all that HTTP takes is then taken from the server's engine
    sweep     ever more clients, each of which asks again as soon as it is answered or refused (after as long as it is
              told to wait): tokens a second, how long an answer took, how many were refused, and whether any was left

Prompts are random, and none begins like another. Medians of `--rounds`; a round is all streams of one side.

python -m benchmarks.speed.http --base CHECKPOINT --out http/
python -m benchmarks.speed.http --base CHECKPOINT --out http/ --only sweep --clients 1 8 32 160 320
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import machine
from benchmarks.speed.serve import make_store
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.engine.request import State
from growlm.store import Store

MODULE = "lora-0"


@dataclass
class Timed:
    """One answer: seconds to its first text and to its end, tokens that were asked for, and its status."""

    first: float
    whole: float
    status: int = 200


def prompts(draw: np.random.Generator, vocabulary: int, count: int, length: int) -> list[list[int]]:
    return draw.integers(1, vocabulary, size=(count, length)).tolist()


# The engine


def asked_directly(engine: Engine, texts: Sequence[list[int]], new: int) -> list[Timed]:
    """All at once, of the engine itself."""
    began = time.perf_counter()
    requests = [engine.submit(text, module=MODULE, stream=True, max_new_tokens=new, seed=0) for text in texts]
    first, whole = dict[int, float](), dict[int, float]()
    while len(whole) < len(requests):
        engine.step()
        now = time.perf_counter() - began
        for number, request in enumerate(requests):
            if request.answer.pieces:
                first.setdefault(number, now)
                request.answer.pieces.clear()
            if request.state is State.FINISHED:
                whole.setdefault(number, now)
    return [Timed(first.get(number, whole[number]), whole[number]) for number in range(len(requests))]


# The server


@contextmanager
def server(store: Path, a: argparse.Namespace, core: str | None) -> Iterator[int]:
    command = [sys.executable, "-m", "growlm", "serve", str(store), "--port", "0", "--no-access-log", "--watch", "0"]
    command += ["--max-batch", str(a.max_batch), "--max-queued", str(a.max_queued)]
    pinned = ["taskset", "-c", core, *command] if core else command
    env = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
    with subprocess.Popen(pinned, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("serving"))
        found = re.search(r"http://127\.0\.0\.1:(\d+)", told)
        assert found is not None, told
        try:
            yield int(found[1])
        finally:
            process.terminate()


async def asked_over_http(port: int, text: list[int], new: int) -> Timed:
    """By hand, so that little time is spent on asking."""
    body = {"prompt": text, "model": MODULE, "max_tokens": new, "temperature": 0, "stream": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + content)
        status = int((await reader.readline()).split()[1])
        first, waits = None, 0.0
        while line := await reader.readline():
            if first is None and line.startswith(b"data: {"):
                first = time.perf_counter() - began
            if line.lower().startswith(b"retry-after:"):
                waits = float(line.split()[1])
        whole = time.perf_counter() - began
        if waits:
            await asyncio.sleep(waits)
        return Timed(first or whole, whole, status)
    finally:
        writer.close()


async def all_over_http(port: int, texts: Sequence[list[int]], new: int) -> list[Timed]:
    return list(await asyncio.gather(*(asked_over_http(port, text, new) for text in texts)))


# The parts


def added(store: Path, a: argparse.Namespace, draw: np.random.Generator) -> dict[str, Any]:
    core, own = ("0", "1") if a.pin else (None, None)
    torch.set_num_threads(a.threads)
    rounds: dict[str, list[tuple[float, float]]] = {"engine": [], "http": []}
    with server(store, a, core) as port, Engine(Store.open(store), max_batch=a.max_batch) as engine:
        for number in range(a.rounds + 1):
            for side in rounds if number % 2 else reversed(rounds):
                texts = prompts(draw, engine.base.vocab_size, a.streams, a.prompt)
                if side == "engine":
                    with on_core(core):
                        timed = asked_directly(engine, texts, a.new)
                else:
                    with on_core(own):
                        timed = asyncio.run(all_over_http(port, texts, a.new))
                assert all(one.status == 200 for one in timed)
                first = statistics.median(one.first for one in timed)
                each = statistics.median((one.whole - one.first) / (a.new - 1) for one in timed)
                if number:  # the first is to warm up
                    rounds[side].append((first, each))
    found: dict[str, Any] = {}
    for at, name in enumerate(("first", "token")):
        sides = {side: [values[at] for values in each] for side, each in rounds.items()}
        ratios = [h / e for h, e in zip(sides["http"], sides["engine"], strict=True)]
        found[name] = {
            **{side: 1000 * statistics.median(values) for side, values in sides.items()},
            "ratio": statistics.median(sides["http"]) / statistics.median(sides["engine"]),
            "ratios": [min(ratios), max(ratios)],
        }
        print(
            f"{name}: engine {found[name]['engine']:.1f} ms, over HTTP {found[name]['http']:.1f} ms, ratio "
            f"{found[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f} in rounds)",
            flush=True,
        )
    return found


@contextmanager
def on_core(core: str | None) -> Iterator[None]:
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(core)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def sweep(store: Path, a: argparse.Namespace, draw: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    vocabulary = Store.open(store).load_base().vocab_size
    with server(store, a, None) as port:
        asyncio.run(all_over_http(port, prompts(draw, vocabulary, 2, a.prompt), a.new))
        for clients in a.clients:
            row = asyncio.run(_with_clients(port, clients, vocabulary, a, draw))
            rows.append(row)
            print(
                f"{clients:4} clients: {row['tokens_a_second']:6.1f} tokens/s, {row['answered']} answered, "
                f"{row['refused']} refused, {row['lost']} lost; whole answer p50 {row['p50']:.1f} s, p99 "
                f"{row['p99']:.1f} s; refusal p99 {1000 * row['refusal_p99']:.0f} ms",
                flush=True,
            )
    return rows


async def _with_clients(
    port: int, clients: int, vocabulary: int, a: argparse.Namespace, draw: np.random.Generator
) -> dict[str, Any]:
    timed: list[Timed] = []
    lost = 0
    began = time.perf_counter()

    async def client() -> None:
        nonlocal lost
        while time.perf_counter() - began < a.seconds:
            (text,) = prompts(draw, vocabulary, 1, a.prompt)
            try:
                timed.append(await asked_over_http(port, text, a.new))
            except (OSError, IndexError):  # no word
                lost += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    answered = sorted(one.whole for one in timed if one.status == 200)
    refused = sorted(one.whole for one in timed if one.status == 503)
    lost += len(timed) - len(answered) - len(refused)
    return {
        "clients": clients, "seconds": seconds, "answered": len(answered), "refused": len(refused), "lost": lost,
        "tokens_a_second": len(answered) * a.new / seconds,
        "p50": percentile(answered, 0.5), "p99": percentile(answered, 0.99), "refusal_p99": percentile(refused, 0.99),
    }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    return values[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="for the store, and the results")
    parser.add_argument("--only", choices=("added", "sweep"))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-queued", type=int, default=128)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 160, 240])
    parser.add_argument("--seconds", type=float, default=20, help="of each number of clients")
    a = parser.parse_args()
    make_store(a.out / "store", a.base)
    draw = np.random.default_rng(0)
    print(machine())
    for name, part in (("added", added), ("sweep", sweep)):
        if a.only in (None, name):
            found: dict[str, Any] = {
                "machine": machine(),
                "settings": {k: str(v) for k, v in vars(a).items() if k not in ("base", "out")},
            }
            found[str(name)] = part(a.out / "store", a, draw)
            title = f"{name}-pinned" if a.pin and name == "added" else name
            write_atomic(a.out / f"{title}.json", json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
