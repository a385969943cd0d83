"""growlm pretrain."""

from __future__ import annotations

from typing import Any

from growlm.cli.app import app
from growlm.cli.asking import require_data
from growlm.cli.launching import run_on
from growlm.cli.options import DataPaths, Devices, Json, OutPath, Restart, ShardModel, from_config
from growlm.cli.output import print_json, reports
from growlm.training.config import PretrainConfig
from growlm.units import format_count


@app.command()
@reports("out", long=True)
@from_config(PretrainConfig)
def pretrain(
    out: OutPath,
    data: DataPaths,
    config: Any,
    restart: Restart = False,
    devices: Devices = 1,
    shard_model: ShardModel = False,
    as_json: Json = False,
) -> None:
    """Train a small base model and its tokenizer from scratch. The result is a transformers checkpoint like any other.

    Run the same command again to go on after Ctrl-C or a kill.

    Examples:

        growlm pretrain base/ --data notes/ more.jsonl --preset small --tokens 4M

        growlm pretrain base/ --data text.parquet --config my-model/config.json --epochs 2
    """
    require_data(data, **config.reading)
    run_on(devices)
    from growlm.training.pretrain import pretrain as run

    result = run(out, data, config, restart=restart, shard_model=shard_model)
    if as_json:
        return print_json(result.to_json())
    print(
        f"{out}: {format_count(result.parameters)} parameters, vocabulary {result.vocab_size:,}; held-out loss "
        f"{result.loss_before:.3f} -> {result.loss_after:.3f} after {result.tokens:,} tokens "
        f"({result.tokens_per_second:,.0f} tokens/s)"
    )
    return None
