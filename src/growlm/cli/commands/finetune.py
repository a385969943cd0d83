"""growlm finetune."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import open_source
from growlm.cli.launching import run_on
from growlm.cli.options import (
    DataPaths,
    Devices,
    Json,
    OutPath,
    Restart,
    ShardModel,
    from_config,
)
from growlm.cli.output import print_json, reports
from growlm.training.config import FinetuneConfig
from growlm.units import format_count


@app.command()
@reports("out", long=True)
@from_config(FinetuneConfig)
def finetune(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or a hub id.", show_default=False)],
    out: OutPath,
    data: DataPaths,
    config: Any,
    restart: Restart = False,
    devices: Devices = 1,
    shard_model: ShardModel = False,
    as_json: Json = False,
) -> None:
    """Train all parameters of a checkpoint further.

    As before or after pruning. To keep knowledge apart, learn.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm finetune molm/ code/ --data src/ --load-concentration 0.1

        growlm finetune small/ better/ --data src/ --tokens 2M --learning-rate 1e-4
    """
    open_source(source, [], data, **config.reading)
    run_on(devices)
    from growlm.training.finetune import finetune as run

    result = run(source, out, data, config, restart=restart, shard_model=shard_model)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{out}: {format_count(result.parameters)} parameters; held-out loss {result.loss_before:.3f} -> "
        f"{result.loss_after:.3f} after {result.tokens:,} tokens ({result.tokens_per_second:,.0f} tokens/s)"
    )
    return None
