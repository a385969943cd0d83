"""What a user gets who learns domains on a published base with no option given: losses, seconds, memory, forgetting.

Every run is the command line's own, in a process of its own: `growlm new`, `growlm learn`, `growlm eval`. Each cell's
numbers are a file as soon as it has ended, and a benchmark that was stopped goes on where it was.

DIR holds a folder a domain with train.txt and test.txt, documents between blank lines.

    python -m benchmarks.quality.published_base --data DIR --base MODEL.gguf --out published/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.common import machine
from benchmarks.lib.domains import DOMAINS, GENERAL
from growlm.disk.files import write_atomic

REPEATED = ["medical_qa", "law_dc_code", "german_novels"]  # with several seeds
LONG = "medical_qa"  # once with more text
BLANK_LINE = "\n\n"
_TEXTS = ("samples", "store", "base", "memory", "confusion")


def run(*arguments: object) -> dict[str, Any]:
    """One command: what it printed, its exit status, its seconds, those to its first line, its peak memory in bytes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "growlm", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    lines, first = [], None
    for line in process.stderr:
        first = first or time.monotonic() - started
        lines.append(line.rstrip())
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "arguments": [str(a) for a in arguments[:1]],
        "status": process.returncode,
        "wall": time.monotonic() - started,
        "first_line": first,
        "peak_bytes": used.ru_maxrss * 1024,
        "result": json.loads(printed) if printed.lstrip().startswith("{") else None,
        "said": lines[-40:],
    }


class Cells:
    """The benchmark's cells, each made once."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.rows: dict[str, Any] = {}

    def cell(self, name: str, *arguments: object) -> dict[str, Any]:
        path = self.a.out / "cells" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            write_atomic(path, json.dumps(run(*arguments), indent=1).encode())
            found = json.loads(path.read_bytes())
            print(
                f"    {found['wall']:.0f} s, status {found['status']}; {(found['said'] or [''])[-1][:160]}", flush=True
            )
        self.rows[name] = json.loads(path.read_bytes())
        return self.rows[name]

    def store(self, seed: int) -> Path:
        folder = self.a.out / "stores" / str(seed)
        if not (self.a.out / "cells" / f"new-{seed}.json").exists() and folder.exists():
            shutil.rmtree(folder)  # half made
        self.cell(f"new-{seed}", "new", folder, "--base", self.a.base)
        return folder

    def learn(self, domain: str, seed: int, tokens: str) -> None:
        name = domain if tokens == self.a.tokens else f"{domain}_{tokens}"
        train = self.a.data / domain / "train.txt"
        found = self.cell(
            f"learn-{name}-{seed}", "learn", self.store(seed), name, "--data", train, "--separator", BLANK_LINE,
            "--tokens", tokens, "--seed", seed, "--json",
        )  # fmt: skip
        if (result := found["result"]) is not None:
            found["wall_to_steps"] = found["wall"] / result["seconds"]
            losses = f"{result['loss_before']:.3f} -> {result['loss_after']:.3f}, gain {result['gain']:.3f}"
            print(f"    {losses} ± {result['error'] or 0:.3f}, rate {result['learning_rate']}", flush=True)

    def evaluate(self, seed: int, domains: list[str]) -> None:
        texts = [f"{d}={self.a.data / d / 'test.txt'}" for d in domains]
        self.cell(
            f"eval-{seed}", "eval", self.store(seed), "--data", *texts, f"none={self.a.data / GENERAL / 'test.txt'}",
            "--separator", BLANK_LINE, "--tokens", self.a.test_tokens, "--no-matrix", "--json",
        )  # fmt: skip

    def forced(self, seed: int, domains: list[str]) -> None:
        """What a module does to text of no domain where it is asked for by name: the router would choose none."""
        for domain in domains:
            if self.rows.get(f"learn-{domain}-{seed}", {}).get("result") is None:
                continue  # it was refused
            self.cell(
                f"forced-{domain}-{seed}", "eval", self.store(seed),
                "--data", f"{domain}={self.a.data / GENERAL / 'test.txt'}", "--separator", BLANK_LINE,
                "--tokens", self.a.general_tokens, "--no-matrix", "--json",
            )  # fmt: skip


def table(rows: dict[str, Any]) -> list[str]:
    """Every learning, and what `growlm eval` says of the test texts."""
    lines = [
        "| domain, seed | base | module | gain | rate | wall, s | wall / steps | peak, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in rows.items():
        if not name.startswith("learn-"):
            continue
        label, wall, peak = name.removeprefix("learn-"), f"{found['wall']:.0f}", f"{found['peak_bytes'] / 1e9:.2f}"
        if (said := found["result"]) is None:
            lines.append(f"| {label} | refused | | | | {wall} | | {peak} |")
            continue
        gain = f"{said['gain']:.3f} ± {said['error']:.3f}"
        losses = f"{said['loss_before']:.3f} | {said['loss_after']:.3f} | {gain} | {said['learning_rate']:.2g}"
        lines.append(f"| {label} | {losses} | {wall} | {found['wall'] / said['seconds']:.2f} | {peak} |")
    for name, found in rows.items():
        if name.startswith("eval-") and found["result"] is not None:
            said = found["result"]
            lines += ["", "| test text, perplexity | base | module | routed |", "|---|---:|---:|---:|"]
            for domain, row in said["perplexity"].items():
                lines.append(f"| {domain} | {row['base']:.2f} | {row['module']:.2f} | {row['routed']:.2f} |")
            routing = said["routing"]
            lines.append(f"router accuracy {routing['accuracy']:.1%}, retained gain {routing['retained_gain']:.1%}")
    forced = {name: found["result"] for name, found in rows.items() if name.startswith("forced-") and found["result"]}
    if forced:
        lines += ["", f"| {GENERAL}, nats above the base | module forced on | routed |", "|---|---:|---:|"]
    for name, said in forced.items():
        ((domain, row),) = ((d, r) for d, r in said["perplexity"].items() if name == f"forced-{d}-0")
        above = [f"{math.log(row[way] / row['base']):+.3f}" for way in ("module", "routed")]
        lines.append(f"| {domain} | " + " | ".join(above) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--tokens", default="40k")
    parser.add_argument("--long-tokens", default="100k")
    parser.add_argument("--test-tokens", default="8k")
    parser.add_argument("--general-tokens", default="5k", help="of text of no domain, under each module")
    parser.add_argument("--seeds", type=int, default=3, help=f"of {', '.join(REPEATED)}")
    a = parser.parse_args()
    cells = Cells(a)
    first = [d for d in REPEATED if d in a.domains]
    for domain in [*first, *(d for d in a.domains if d not in first)]:
        cells.learn(domain, 0, a.tokens)
    cells.evaluate(0, a.domains)
    cells.forced(0, a.domains)
    if LONG in a.domains:
        cells.learn(LONG, 3, a.long_tokens)
    for seed in range(1, a.seeds):
        for domain in first:
            cells.learn(domain, seed, a.tokens)
    print("\n".join(table(cells.rows)))
    for found in cells.rows.values():  # numbers alone: no text, no places
        found.pop("said")
        found["result"] = {key: value for key, value in (found["result"] or {}).items() if key not in _TEXTS} or None
    told = {"machine": machine(), "base": a.base.name, "tokens": a.tokens, "cells": cells.rows}
    write_atomic(a.out / "published_base.json", json.dumps(told, indent=1).encode())
    print(f"{a.out / 'published_base.json'}: {len(cells.rows)} cells")


if __name__ == "__main__":
    main()
