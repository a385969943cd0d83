"""growlm doctor."""

from __future__ import annotations

from typing import Any

import typer

from growlm.cli.app import app
from growlm.cli.options import Json
from growlm.cli.output import print_json
from growlm.units import counted, format_size

_STATES = {"newer": "  newer than tested", "older": "  too old"}


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed here, and what will not work. It also says what this machine has.

    Exits with status 1 if something will not work; what is merely untested is a warning.

    Example:

        growlm doctor
    """
    from growlm.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    if not found["ok"]:
        raise typer.Exit(1)


def _lines(found: dict[str, Any]) -> list[str]:
    rows = [
        (name, f"{v['installed'] or 'not installed':<13} {v['range'] or ''}{_STATES.get(v['state'], '')}")
        for name, v in found["versions"].items()
    ]
    processor = found["processor"]
    parts = [processor["name"], counted(processor["cores"], "core")]
    parts += [counted(processor["threads"], "thread")] if processor["threads"] else []
    rows.append(("processor", ", ".join([*parts, *processor["instructions"]])))
    for device in found["devices"]:
        memory = f", {_size(device['free_bytes'])} of {_size(device['bytes'])} free" if device["bytes"] else ""
        rows.append((device["device"], f"{device['name']}{memory}"))
    if not found["devices"]:
        rows.append(("gpu", "none that torch can use"))
    chosen = ", ".join(f"{dtype} on {device}" for device, dtype in found["precision"].items())
    rows.append(("precision", f"auto takes {chosen}" if chosen else "unknown"))
    rows.append(("memory", f"{_size(found['memory']['free_bytes'])} free"))
    rows.append(("disk", f"{_size(found['disk']['free_bytes'])} free in {found['disk']['folder']}"))
    width = max(len(name) for name, _ in rows)
    remarks = [f"problem: {line}" for line in found["problems"]] + [f"warning: {line}" for line in found["warnings"]]
    return [f"{name:<{width}}  {text}".rstrip() for name, text in rows] + (remarks or ["all is well"])


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else format_size(num_bytes)
