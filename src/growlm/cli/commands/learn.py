"""growlm learn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_store
from growlm.cli.launching import is_first, run_on
from growlm.cli.options import DataPaths, Devices, Grouped, Json, Restart, StorePath, from_config
from growlm.cli.output import note, print_json, reports
from growlm.errors import ConfigError
from growlm.modules.shapes import SHAPES
from growlm.training.config import LearnConfig


@app.command(cls=Grouped)
@reports("name", long=True)
@from_config(LearnConfig, SHAPES)
def learn(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module.", show_default=False)],
    data: DataPaths,
    config: Any,
    update: Annotated[bool, typer.Option("--update", help="NAME exists: learn its next version.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say how many tokens and steps it would be, how long it would take and how much memory, from a few "
            "real steps; change nothing.",
        ),
    ] = False,
    restart: Restart = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write a page with table, figure and samples to this folder, and losses.jsonl."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Held-out prompts that base and module answer at the end.")
    ] = 3,
    devices: Devices = 1,
    shard_base: Annotated[
        bool,
        typer.Option(
            "--shard-base",
            help="Of several devices each holds a part of the base's layers: for a base that is too large for one.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn a body of text as a new module. The base and all other modules keep their bytes.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm learn brain medicine --data pubmed.jsonl

        growlm learn brain law --data statutes/ --epochs 3 --placement interleaved

        growlm learn brain tax --data tax.parquet --report tax-report/

        growlm learn brain law --data statutes/ --dry-run

        growlm learn brain law --data statutes/ --devices 2

        growlm learn brain law --data statutes/ --devices 8 --shard-base --activation-checkpointing

        torchrun --nproc-per-node 2 -m growlm learn brain law --data statutes/
    """
    opened = open_store(store, data=config.paths(data), **config.reading)
    opened.find(name)
    idle = {"--restart": restart, "--report": report is not None, "--devices": devices > 1, "--shard-base": shard_base}
    if dry_run and (without := [flag for flag, given in idle.items() if given]):
        what = " and ".join(without)
        raise ConfigError(
            f"{what}: of no use with --dry-run, which trains nothing and counts for one device; leave it out"
        )
    if dry_run:
        from growlm.training.estimate import estimate

        told = estimate(opened, name, data, config, update=update, samples=samples)
        if as_json:
            return print_json(told.to_json())
        print("\n".join(told.lines()))
        return None
    if not is_first():
        report = None  # the first writes it
    if report is not None:
        from growlm.evaluation.page import check_folder
        from growlm.training.history import FILE

        check_folder(report, FILE)
    run_on(devices)
    from growlm.training.learn import learn as run

    result = run(opened, name, data, config, update=update, restart=restart, samples=samples, shard_base=shard_base)
    if report is not None:
        from growlm.evaluation.learning import write_learning_report

        note(f"report: {write_learning_report(result, report)}")
    if as_json:
        return print_json(result.to_json())
    print("\n".join(result.lines()))
    if result.loss_after > result.loss_before:
        note(f"{name} does worse than the base on its own held-out text: give more text or --epochs, or remove it")
    return None
