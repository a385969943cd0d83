"""growlm serve."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import secrets
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_engine
from growlm.cli.options import Device, ExpertsOn, Memory, RowCache, SecondLook, StorePath
from growlm.cli.output import note
from growlm.errors import BudgetError, ConfigError
from growlm.requirements import require_extra
from growlm.units import counted, format_size, parse_size

if TYPE_CHECKING:
    from growlm.engine import Engine

_ANY = ("0.0.0.0", "::")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SWITCH = 2e-4  # seconds
_BACKLOG = 1024  # connections that wait to be taken
_TOLD = 3  # modules that are too large
_TOLD_IN = 2  # seconds in which those who are still answered are told that it ends


@app.command()
def serve(
    store: StorePath,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any that is free.")] = 8000,
    memory: Memory = None,
    device: Device = "auto",
    experts_on: ExpertsOn = "memory",
    row_cache: RowCache = None,
    second_look: SecondLook = False,
    host_memory: Annotated[
        str | None,
        typer.Option(
            "--host-memory",
            metavar="SIZE",
            help="With a GPU: main memory that keeps modules which leave it; a quarter of what is free by default.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Answers that are written together.")] = 32,
    max_queued: Annotated[
        int, typer.Option("--max-queued", help="Requests that may wait besides; more are refused with 503.")
    ] = 128,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="That an answer may take; no bound by default.")
    ] = None,
    drain: Annotated[
        int, typer.Option("--drain", metavar="SECONDS", help="For answers to end once the server is told to stop.")
    ] = 30,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Keys that may ask, one a line; behind it the modules that it is for, as patterns.",
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option("--admin-key-file", metavar="FILE", help="Keys for /admin and /metrics as well, one a line."),
    ] = None,
    watch: Annotated[
        float,
        typer.Option(
            "--watch", metavar="SECONDS", help="Between two looks at whether the store has changed; 0 for none."
        ),
    ] = 2.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Pages elsewhere that may ask; * for all; repeatable."),
    ] = None,
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special/--no-parse-special",
            help="What a prompt of completions spells like a special token is one, and not letters.",
        ),
    ] = False,
    learn_from: Annotated[
        Path | None,
        typer.Option(
            "--learn-from", metavar="FOLDER", help="Files in it may be named to learn from, and not only sent."
        ),
    ] = None,
    job_memory: Annotated[
        str | None,
        typer.Option("--job-memory", metavar="SIZE", help="That a process that learns may take; no bound by default."),
    ] = None,
    max_upload: Annotated[str, typer.Option("--max-upload", metavar="SIZE", help="Of a file to learn from.")] = "256MB",
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Of a request.")] = "4MB",
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Have engines on a Ray cluster answer: HOST:PORT, auto, or local for one of this machine.",
            show_default=False,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            "--replicas",
            metavar="N|MIN-MAX",
            help="With --ray: engines, or the fewest and the most of them; by default 1.",
            show_default=False,
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line of JSON on stderr for each request.")
    ] = True,
) -> None:
    """Serve a store over HTTP to clients of OpenAI's interface.

    `model` is auto (the router chooses), base, or a module's name.

    Examples:

        growlm serve brain --memory 2GB

        growlm serve brain --host 0.0.0.0 --port 80 --api-key-file keys.txt --admin-key-file admin.txt

        growlm serve brain --ray auto --replicas 2-8

        curl localhost:8000/v1/completions --json '{"prompt": "Article 1.", "model": "law"}'
    """
    require_extra("serve", "uvicorn", "fastapi", "prometheus_client")
    import uvicorn

    from growlm.server.app import create_app
    from growlm.server.files import Files
    from growlm.server.jobs import Jobs
    from growlm.server.keys import Keys
    from growlm.server.service import Service

    keys, admin_keys, most = (
        Keys.read(api_key_file),
        Keys.read(admin_key_file, admin=True),
        parse_size(max_body, "max_body"),
    )
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port is {port}; it must be from 0 to 65535")
    upload, job_bytes = (
        parse_size(max_upload, "max_upload"),
        parse_size(job_memory, "job_memory") if job_memory else None,
    )
    for name, value, least in (
        ("--max-body", most, 1),
        ("--max-upload", upload, 1),
        ("--max-queued", max_queued, 0),
        ("--drain", drain, 0),
        ("--timeout", timeout or 1, 0),
        ("--watch", watch, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if learn_from is not None and not learn_from.is_dir():
        raise ConfigError(f"--learn-from {learn_from}: is no folder; name one with text to learn from")
    for origin in allow_origin or ():
        if origin != "*" and not re.match(r"https?://[^/]+$", origin):
            raise ConfigError(f"--allow-origin {origin}: is no origin; give one like https://example.org, or *")
    own = secrets.token_urlsafe(18) if api_key_file is admin_key_file is None and host in _LOOPBACK else None
    number = None
    if replicas is not None and ray is None:
        raise ConfigError(f"--replicas is {replicas}, and there is no --ray; give the address of a cluster")
    if ray is not None and second_look:
        raise ConfigError("--second-look: with --ray prompts are routed where no module is; leave one of them out")
    if ray is not None:
        from growlm.cluster.serving import replica_range

        number = replica_range(replicas or "1")
    listening = _listen(host, port)
    bounds: dict[str, Any] = {"max_queued": max_queued, "timeout": timeout, "watch": watch or None}
    with ExitStack() as leaving:
        leaving.callback(listening.close)
        if number is not None:
            from growlm.cluster.serving import on_cluster

            signal.signal(signal.SIGTERM, _leave)  # not without what has been begun elsewhere
            leaving.enter_context(on_cluster(str(ray), store, number[0]))
        engine = open_engine(
            store, memory, device, experts_on, row_cache, strict=True, max_batch=max_batch, host_memory=host_memory,
            second_look=second_look,
        )  # fmt: skip
        leaving.callback(engine.close)
        if number is None:
            service = Service(engine, **bounds)
        else:
            from growlm.cluster.edge import EdgeService
            from growlm.cluster.serving import Replicas

            settings: dict[str, Any] = {"memory": memory, "device": device, "experts_on": experts_on}
            settings |= {"row_cache": row_cache, "strict": True, "max_batch": max_batch, "host_memory": host_memory}
            place = f"{socket.gethostname()}:{listening.getsockname()[1]}"
            note(f"beginning {counted(number[0], 'engine')} on the cluster")
            engines = leaving.enter_context(Replicas(store, settings, number, drain=drain, place=place))
            service = EdgeService(engine, engines.order, engines.running, places=number[1] * max_batch, **bounds)
        jobs = Jobs(str(store), memory=job_bytes, ended=service.reload)
        web = create_app(
            service, keys=keys, admin_keys=admin_keys, own_keys=Keys([own] if own else []),
            local=not keys and host in _LOOPBACK, jobs=jobs, files=Files(learn_from, most_bytes=upload),
            parse_special=parse_special, max_body=most, origins=allow_origin or (),
            **({} if access_log else {"log": None}),
        )  # fmt: skip
        called = socket.gethostname() if host in _ANY else f"[{host}]" if ":" in host else host
        address = f"http://{called}:{listening.getsockname()[1]}"
        note(
            f"serving {store} at {address}/v1: {counted(len(engine.store.modules), 'module')}, "
            f"{format_size(engine.resident_bytes)} of weights in memory{_answered_by(number)}; Ctrl-C ends it"
        )
        for told in _too_large(engine):
            note(told)
        for pattern in sorted(keys.patterns()):
            if not fnmatch.filter(engine.store.modules, pattern):
                note(f"{api_key_file}: {pattern} is for no module that there is by now")
        if not keys and host not in _LOOPBACK:
            note(f"everybody who reaches {host} may ask; --api-key-file says who may")
        note(f"page: {address}/" + (f"#key={own}, where the key is for this run and lets you teach" if own else ""))
        config = uvicorn.Config(web, log_level="warning", access_log=False, timeout_graceful_shutdown=drain + _TOLD_IN)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                jobs.ending.set()  # so that nobody waits for what a job says
                if self.should_exit:  # a second time: what is cut short is no error
                    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                elif asked := sum(service.running_and_waiting()):
                    service.end_in(drain)
                    note(f"{counted(asked, 'answer')} to be ended first, in {drain} s at the most; Ctrl-C ends it now")
                super().handle_exit(sig, frame)

        # The engine's thread asks for Python's lock many times a step, and should not wait long for it where much is
        # asked.
        sys.setswitchinterval(_SWITCH)
        server = Server(config)

        def terminated(sig: int, frame: Any) -> None:
            if not server.should_exit:  # before the server hears of it itself
                os._exit(0)  # nothing has begun

        signal.signal(signal.SIGTERM, terminated)  # uvicorn raises it once more when all has ended
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            if server.force_exit or not server.should_exit:
                raise


def _leave(sig: int, frame: Any) -> None:
    sys.exit(0)


def _answered_by(number: tuple[int, int] | None) -> str:
    if number is None:
        return ""
    fewest, most = number
    return f", answered by {fewest if fewest == most else f'{fewest} to {most}'} engines"


def _too_large(engine: Engine) -> list[str]:
    """Of each module that does not fit the memory budget, why; of the first few in full."""
    found = []
    for name in engine.store.modules:
        try:
            engine.modules.make_fit([name])
        except BudgetError as error:
            found.append(str(error))
    more = [f"and {len(found) - _TOLD:,} more modules that do not fit"] if len(found) > _TOLD else []
    return found[:_TOLD] + more


def _listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        ConfigError: the address cannot be listened at.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen at {host}:{port}: {reason}; choose another with --host and --port") from None
    return listening
