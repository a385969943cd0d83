"""A store as an assistant's tools, asked by the official client."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from growlm.cli import main
from growlm.engine import Engine
from growlm.engine.chat import Chat
from growlm.server.files import Files
from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, serving
from stores import domain_text, make_store
from test_server_jobs import text_of

DIGITS = domain_text("digits", 77)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def made(tmp_path) -> Path:
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}, "digits": {"kind": "lora", "r": 4}})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "signs.txt").write_text(text_of("signs", 60))
    return tmp_path / "store"


@pytest.fixture
def served(made) -> Iterator[Served]:
    keys = {"keys": Keys(["red letters", "all"]), "admin_keys": Keys(["root"])}
    with serving(made, **keys, files=Files(made.parent / "texts")) as served:
        yield served


async def told(client: Client, tool: str, **arguments: Any) -> Any:
    """What a tool says, or the text of its error."""
    result = await client.call_tool(tool, arguments)
    if result.is_error:
        return result.content[0].text
    content = result.structured_content
    return content["result"] if set(content) == {"result"} else content


def over_http(served: Served, key: str, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    async def ask() -> list[Any]:
        async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
            transport = streamable_http_client(f"{served.url}/mcp", http_client=http)
            async with Client(transport) as client:
                return [await told(client, tool, **arguments) for tool, arguments in calls]

    return asyncio.run(ask())


def test_an_assistant_asks_routes_and_lists_over_stdin(made):
    with Engine(Store.open(made)) as engine:
        *_, expected = Chat(engine, max_new_tokens=8).say(DIGITS)

    async def ask() -> None:
        command = StdioServerParameters(command=sys.executable, args=["-m", "growlm", "mcp", str(made)])
        async with Client(command) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {"ask", "route", "list_modules", "learn"}
            assert all(tool.description for tool in tools.values())
            assert set(tools["ask"].input_schema["properties"]) == {"question", "module", "max_tokens"}
            found = await told(client, "ask", question=DIGITS, max_tokens=8)
            assert (found["answer"], found["module"]) == (expected.text, "digits")
            assert found["scores"]["digits"] > 0.5
            assert (await told(client, "ask", question=DIGITS, module="base", max_tokens=2))["module"] == "base"
            assert (await told(client, "route", text=DIGITS))["module"] == "digits"
            assert [one["id"] for one in await told(client, "list_modules")] == ["digits", "letters"]
            assert "there are auto, base, digits" in await told(client, "ask", question="a", module="nosuch")
            assert "max_tokens is 0" in await told(client, "ask", question="a", max_tokens=0)
            bad = {"module": "x", "files": ["a.txt"], "sequence_length": 1}
            assert "sequence_length is 1, expected at least 2" in await told(client, "learn", **bad)
            assert "exceed the 256 positions" in await told(client, "ask", question="abc " * 400)
            assert "start it with --learn-from" in await told(client, "learn", module="x", files=["a.txt"])

    asyncio.run(asyncio.wait_for(ask(), 120))


def test_over_http_keys_are_those_of_the_server(served):
    assert served.http.post("/mcp", json={}).status_code == 401
    asked = [("list_modules", {}), ("route", {"text": DIGITS}), ("ask", {"question": "a", "module": "digits"})]
    modules, route, refused = over_http(served, "red", *asked)
    assert [one["id"] for one in modules] == ["letters"]
    assert set(route["scores"]) == {"letters", "none"}
    assert refused.endswith("there are auto, base, letters")
    modules, route, answer = over_http(served, "all", *asked)
    assert [one["id"] for one in modules] == ["digits", "letters"]
    assert (route["module"], answer["module"]) == ("digits", "digits")
    (refused,) = over_http(served, "all", ("learn", {"module": "signs", "files": ["signs.txt"]}))
    assert refused.endswith("only the admin key may teach")


def test_an_assistant_teaches_a_file_and_asks_about_it(served):
    signs = domain_text("signs", 77)
    learned, answer, refused = over_http(
        served, "root",
        ("learn", {"module": "signs", "files": ["signs.txt"], "sequence_length": 64}),
        ("route", {"text": signs}),
        ("learn", {"module": "more", "files": ["../store/store.json"]}),
    )  # fmt: skip
    assert (learned["module"], learned["version"]) == ("signs", 1)
    assert learned["loss_after"] < learned["loss_before"]
    assert "signs" in answer["scores"]
    assert "is not in the folder" in refused


def test_pages_elsewhere_are_not_answered_where_no_key_is_asked_for(made):
    with serving(made, local=True) as served:
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        headers = {"Accept": "application/json, text/event-stream", "Host": "elsewhere.example"}
        assert served.http.post("/mcp", json=body, headers=headers).status_code == 421
        assert served.http.get("/mcp", headers={"Accept": "text/event-stream"}).status_code == 405  # which would stay
        assert [one["id"] for one in over_http(served, "none", ("list_modules", {}))[0]] == ["digits", "letters"]


def test_a_folder_that_is_not_there_is_told(made, capsys):
    with pytest.raises(SystemExit):
        main(["mcp", str(made), "--learn-from", "nowhere"])
    assert "--learn-from nowhere: is no folder" in capsys.readouterr().err
