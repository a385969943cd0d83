"""Clients that are heavy to install, against `growlm serve`: those of JavaScript and Python, curl, and schemathesis,
which sends what nobody would.

What they need is installed into a folder of its own, which is kept between runs. In the end the server has answered
all, holds nothing, and says nothing of an error inside.

python tests/clients/run.py [--home .clients] [--cases 400]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
_FINE = ("serving", "page", "WARNING:  Invalid HTTP request received.")  # the last is uvicorn's, of what is no HTTP
PYTHON = ("llm", "litellm", "langchain-openai", "schemathesis")
JAVASCRIPT = ("openai@6", "@anthropic-ai/sdk@0")


def installed(home: Path) -> Path:
    """The python that has the clients; node finds its own beside `chat.mjs`."""
    home.mkdir(exist_ok=True)
    (home / "chat.mjs").write_text((HERE / "chat.mjs").read_text())
    if not (home / "node_modules").exists():
        run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), *JAVASCRIPT)
    python = home / "venv" / "bin" / "python"
    if not (home / "ready").exists():
        run(sys.executable, "-m", "venv", str(home / "venv"))
        run(str(python), "-m", "pip", "install", "--quiet", *PYTHON)
        (home / "ready").touch()
    return python


def run(*command: str) -> None:
    began = time.monotonic()
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    name = " ".join(Path(part).name if part.startswith("/") else part for part in command[:4])
    if result.returncode:
        raise SystemExit(f"{result.stdout[-6000:]}\n{name}: ended with status {result.returncode}")
    print("".join(f"    {line}\n" for line in result.stdout.splitlines() if line.endswith("fine")), end="")
    print(f"{name} ... {time.monotonic() - began:.0f} s", flush=True)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A tiny store's server, which in the end holds nothing and has made no mistake."""
    sys.path.insert(0, str(HERE.parent))
    from stores import make_store

    make_store(folder, "llama", {"letters": {"kind": "lora", "r": 4}, "digits": {"kind": "lora", "r": 4}})
    (folder / "keys").write_text("user\n")
    (folder / "admin").write_text("root\n")
    command = [sys.executable, "-m", "growlm", "serve", str(folder / "store"), "--port", "0", "--memory", "256MB"]
    command += ["--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admin")]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            end = time.monotonic() + 120
            while (found := re.search(r"at (http://127\.0\.0\.1:\d+)/v1", (folder / "log").read_text())) is None:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit((folder / "log").read_text())
                time.sleep(0.1)
            yield found[1]
            end = time.monotonic() + 60
            while (left := status(found[1]))["running"] + left["waiting"]:
                if time.monotonic() > end:
                    raise SystemExit(f"the server still holds what nobody waits for: {left}")
                time.sleep(0.1)
        finally:
            process.terminate()
    lines = (folder / "log").read_text().splitlines()
    wrong = [line for line in lines if not line.startswith("{") and not line.startswith(_FINE)]
    statuses = [json.loads(line)["status"] for line in lines if line.startswith("{")]
    if wrong or 500 in statuses:
        raise SystemExit("the server says:\n" + "\n".join(wrong[-40:]))
    print(f"{len(statuses)} requests, none of which ended with an error inside")


def status(url: str) -> dict[str, int]:
    request = urllib.request.Request(f"{url}/admin/status", headers={"Authorization": "Bearer root"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, int] = json.load(answer)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path(".clients"), help="where the clients are installed")
    parser.add_argument("--cases", type=int, default=40, help="of schemathesis, for each operation")
    a = parser.parse_args()
    python = installed(a.home.resolve())
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url:
        run("node", str(a.home.resolve() / "chat.mjs"), url)
        run(str(python), str(HERE / "chat.py"), url)
        asked = ["-sSf", "-H", "Authorization: Bearer user", "-H", "Content-Type: application/json"]
        run(
            "curl",
            *asked,
            f"{url}/v1/chat/completions",
            "-d",
            '{"messages": [{"role": "user", "content": "01"}], "max_tokens": 2}',
        )
        run(
            str(python), "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-c", "not_a_server_error",
            "-H", "Authorization: Bearer root", "-n", str(a.cases), "--exclude-path-regex", "^/admin/jobs",
        )  # fmt: skip


if __name__ == "__main__":
    main()
