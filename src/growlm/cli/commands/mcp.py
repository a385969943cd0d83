"""growlm mcp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_engine
from growlm.cli.options import Device, ExpertsOn, Memory, RowCache, SecondLook, StorePath
from growlm.cli.output import note
from growlm.errors import ConfigError
from growlm.requirements import require_extra


@app.command()
def mcp(
    store: StorePath,
    memory: Memory = None,
    device: Device = "auto",
    experts_on: ExpertsOn = "memory",
    row_cache: RowCache = None,
    second_look: SecondLook = False,
    learn_from: Annotated[
        Path | None,
        typer.Option("--learn-from", metavar="FOLDER", help="Files in it may be learned; without it none may."),
    ] = None,
) -> None:
    """Give a store to an assistant as tools, over stdin and stdout.

    The tools are ask, route, list_modules and learn. Over HTTP `growlm serve` has them at /mcp.

    Examples:

        growlm mcp brain --memory 2GB

        growlm mcp brain --learn-from notes/
    """
    require_extra("mcp", "mcp", "fastapi", "prometheus_client")
    import anyio

    from growlm.server.assistants import assistant
    from growlm.server.files import Files
    from growlm.server.jobs import Jobs
    from growlm.server.service import Service

    if learn_from is not None and not learn_from.is_dir():
        raise ConfigError(f"--learn-from {learn_from}: is no folder; name one with text to learn from")

    async def serve() -> None:
        service = Service(
            open_engine(store, memory, device, experts_on, row_cache, strict=True, second_look=second_look), watch=2.0
        )
        jobs, files = Jobs(str(store), ended=service.reload), Files(learn_from)
        service.start()
        jobs.start()
        note(f"{store}: {len(service.engine.store.modules)} modules, for one assistant; it ends with its input")
        try:
            await assistant(service, jobs, files, owner=True).run_stdio_async()
        finally:
            await jobs.close()
            service.close()

    anyio.run(serve)
