"""On a GPU: everything that was asked of growlm's speed there, in one run of at most five minutes.

Stages, each with its share of the time; each case of one is a line at once, and in `<out>/<stage>.json`:

    machine        bandwidths and the rate of a matrix product, of which the others' floors are made
    learn          a step of learning against a step of PEFT's LoRA, on 1.5 and 7 billion parameters
    load           a module of a gigabyte to its first use, and a swap, against the bare copy of its bytes
    engine         tokens a second with one module and with eight, against transformers' generate
    stickbreaking  against flash attention
    peer           against the bytes that it moves
    graphs         a decode pass, eager and as a CUDA graph

A stage that fails, or whose time is over, is told in a line, and the others go on. At the end stands what was asked
beside what was measured. The exit status is 1 where something failed, not where a number was missed.

python -m benchmarks.gpu --out gpu/
python -m benchmarks.gpu --out gpu/ --stages stickbreaking,peer --seconds 60
python -m benchmarks.gpu --out gpu/ --tiny --device cpu
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.common import machine
from benchmarks.stages.bench import Bench, TimeOver, rounded
from growlm.base.placement import find_device
from growlm.disk.files import write_atomic
from growlm.errors import ConfigError

# Seconds of each, of the five minutes; kernels that are compiled count.
STAGES = {"machine": 18, "stickbreaking": 45, "peer": 25, "learn": 82, "load": 60, "engine": 50, "graphs": 18}
_SOFT = 0.85  # share of its time after which a stage begins no further case


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results, a base and a store of 6 GB are kept")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas between")
    parser.add_argument("--seconds", type=float, default=sum(STAGES.values()), help="of all seven stages together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that show only that everything runs")
    parser.add_argument("--json", type=Path, help="also write all results and what was asked into this file")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    wanted = [name for name in a.stages.split(",") if name]
    if unknown := sorted(set(wanted) - STAGES.keys()):
        raise SystemExit(f"no stage {', '.join(unknown)}; stages are {', '.join(STAGES)}")
    a.out.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(find_device(a.device), a.tiny, a.out)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    if bench.device.index is not None:
        torch.cuda.set_device(bench.device)  # what kernels and events run on, where nobody says
    failed: list[str] = []
    share = a.seconds / sum(STAGES.values())
    for name in STAGES:
        # Floors are needed whatever is asked for; those of an earlier run in this folder will do.
        if name in wanted or (name == "machine" and not _known(bench)):
            failed += _stage(bench, name, STAGES[name] * share)
    summary = {
        "machine": machine(),
        "device": bench.name,
        "tiny": a.tiny,
        "results": bench.results,
        "asked": [vars(target) | {"missed": target.missed} for target in bench.targets],
        "failed": failed,
    }
    for file in [a.out / "summary.json", *([a.json] if a.json else [])]:
        write_atomic(file, json.dumps(summary, indent=1).encode())
    _table(bench)
    for line in failed:
        print(f"failed: {line}", flush=True)
    sys.exit(1 if failed else 0)


def _known(bench: Bench) -> bool:
    """Takes over what an earlier run measured of this machine."""
    try:
        kept = json.loads((bench.out / "machine.json").read_text())
        floors = next(row["per second"] for row in kept["results"] if "per second" in row)
    except (OSError, ValueError, KeyError, StopIteration):
        return False
    if kept["tiny"] != bench.tiny:
        return False
    bench.floors.update(floors)
    return True


def _stage(bench: Bench, name: str, seconds: float) -> list[str]:
    """Runs one; returns what failed."""
    bench.begin(name, seconds * _SOFT)
    start = time.monotonic()
    try:
        with _at_most(seconds):
            importlib.import_module(f"benchmarks.stages.{name}").run(bench)
    except (Exception, TimeOver) as error:
        traceback.print_exc(limit=-4)
        bench.problem("stopped", error)
    found = [f"{name}: {line}" for line in bench.problems]
    bench.tell("end", {"seconds": time.monotonic() - start, "problems": len(found)})
    bench.tidy()
    return found


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """
    Raises:
        TimeOver: from within, where it takes longer.
    """

    def end(*_: Any) -> None:
        raise TimeOver(f"its {seconds:.0f} seconds are over")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _table(bench: Bench) -> None:
    if not bench.targets:
        return
    print(f"\n| {'tiny shapes, which show nothing' if bench.tiny else 'what'} | asked | measured | |")
    print("|---|---:|---:|---|")
    for target in bench.targets:
        measured = "" if target.measured is None else f"{rounded(target.measured):g}x"
        verdict = f"not measured{f': {target.why}' * bool(target.why)}" if target.measured is None else ""
        if target.measured is not None and target.missed and not bench.tiny:
            verdict = "missed"
        print(f"| {target.what} | {'>=' if target.least else '<='} {target.asked:g}x | {measured} | {verdict} |")


if __name__ == "__main__":
    main()
