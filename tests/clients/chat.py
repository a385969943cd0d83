"""Python clients that bring a lot with them: llm, litellm and langchain-openai. Chat, stream, stop, error, cancel.

python chat.py URL
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import litellm
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

URL = sys.argv[1]
ASKED: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def by_langchain() -> str:
    model = ChatOpenAI(base_url=f"{URL}/v1", api_key="user", model="digits", max_retries=0, **ASKED)
    whole = model.invoke([HumanMessage("01 02")])
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 8
    said = str(whole.content)
    assert "".join(str(chunk.content) for chunk in model.stream("01 02")) == said
    stop = said[2:4]
    assert model.invoke("01 02", stop=[stop]).content == said[: said.index(stop)]
    with raises("there are auto, base, digits"):
        model.model_copy(update={"model_name": "nosuch"}).invoke("01 02")

    async def left() -> None:
        long = model.model_copy(update={"max_tokens": 180})
        async for _ in long.astream("01 02"):
            break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(long.ainvoke("01 02"), 0.02)

    asyncio.run(left())
    return said


def by_litellm(said: str) -> None:
    asked = {"model": "openai/digits", "api_base": f"{URL}/v1", "api_key": "user", "num_retries": 0, **ASKED}
    messages = [{"role": "user", "content": "01 02"}]
    whole = litellm.completion(messages=messages, **asked)
    assert whole.choices[0].message.content == said
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=messages, stream=True, **asked)
    ]
    assert "".join(pieces) == said
    stopped = litellm.completion(messages=messages, stop=[said[2:4]], **asked)
    assert stopped.choices[0].message.content == said[: said.index(said[2:4])]
    with raises("there are auto, base, digits"):
        litellm.completion(messages=messages, **{**asked, "model": "openai/nosuch"})
    for _ in litellm.completion(messages=messages, stream=True, **{**asked, "max_tokens": 180}):
        break


def by_llm(said: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        settings = "\n".join(
            [
                f"- model_id: {name}\n  model_name: {name}\n  api_base: {URL}/v1\n  api_key_name: growlm"
                for name in ("digits", "nosuch")
            ]
        )
        (Path(home) / "extra-openai-models.yaml").write_text(settings)
        environment = {**os.environ, "LLM_USER_PATH": home}

        def llm(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "llm", *arguments, "--key", "user", "-o", "temperature", "0"]
            return subprocess.run(command, env=environment, text=True, capture_output=True)

        for more in ([], ["--no-stream"]):
            answer = llm("prompt", "01 02", "-m", "digits", "-o", "max_tokens", "8", *more)
            assert answer.stdout.removesuffix("\n") == said, answer
        stopped = llm("prompt", "01 02", "-m", "digits", "-o", "max_tokens", "8", "-o", "stop", said[2:4])
        assert stopped.stdout.removesuffix("\n") == said[: said.index(said[2:4])], stopped
        missing = llm("prompt", "01 02", "-m", "nosuch")
        assert missing.returncode
        assert "there are auto, base, digits" in missing.stderr


@contextlib.contextmanager
def raises(told: str) -> Any:
    said = ""
    try:
        yield
    except Exception as error:
        said = str(error)
    assert told in said, said or f"nothing was raised that says {told!r}"


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    found = by_langchain()
    print("langchain-openai: fine", flush=True)
    by_litellm(found)
    print("litellm: fine", flush=True)
    by_llm(found)
    print("llm: fine", flush=True)
