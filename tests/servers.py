"""A server at a free port, and what tests ask it."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from growlm.engine import Engine
from growlm.server.app import create_app
from growlm.server.service import Service
from growlm.store import Store


class Served:
    """A server at a free port, in a thread of its own."""

    def __init__(self, store: Path, *, engine: dict[str, Any], service: dict[str, Any], app: dict[str, Any]) -> None:
        self.engine = Engine(Store.open(store), **{"strict": True, **engine})
        self.service, self.log = Service(self.engine, **service), io.StringIO()
        app.setdefault("log", self.log)
        self.jobs, self.files = app.get("jobs"), app.get("files")
        self.app = create_app(self.service, **app)
        config = uvicorn.Config(self.app, log_level="error", access_log=False)
        self._server, self._socket = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.http.close()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """Chunks of a stream, which ends as it should."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def idle(self) -> bool:
        return self.service.running_and_waiting() == (0, 0) and self.engine._loop.scheduler.idle


def wait_for(there: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def serving(store: Path, *, engine: Any = None, service: Any = None, **app: Any) -> Iterator[Served]:
    served = Served(store, engine=engine or {}, service=service or {}, app=app)
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def leaving(served: Served, path: str, body: Any, seconds: float) -> Iterator[None]:
    """A client that asks, and goes so many seconds later, whether or not the answer is there."""
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
        content = json.dumps(body).encode()
        head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        client.sendall("\r\n".join(head).encode() + content)
        time.sleep(seconds)
        yield
