"""growlm new."""

from __future__ import annotations

from typing import Annotated

import typer

from growlm.cli.app import app
from growlm.cli.asking import require_data
from growlm.cli.options import Json, StorePath
from growlm.cli.output import print_json, reports
from growlm.errors import ConfigError
from growlm.units import format_size


@app.command()
@reports("store")
def new(
    store: StorePath,
    base: Annotated[
        str, typer.Option("--base", help="Checkpoint folder, a GGUF file, or a hub id.", show_default=False)
    ],
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")] = "auto",
    router: Annotated[
        str,
        typer.Option(
            "--router",
            help="gaussian (grows domain by domain), product-key (the same, for very many) or transformer (trained on "
            "kept text).",
        ),
    ] = "gaussian",
    keep_samples: Annotated[
        str | None,
        typer.Option(
            "--keep-samples",
            metavar="SIZE",
            help="Text of every module that is kept for the router; by default 2MB for a transformer, else none.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(
            "--general",
            metavar="PATH...",
            help="General text, from which the router learns what belongs to no module; up to 512 passages of it stay "
            "in the store. By default the held-out text beside the base, or else a sample of everyday text.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where --general is read: cpu, cuda, cuda:N, mps or auto.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Make a store for a base model.

    Examples:

        growlm new brain --base base/

        growlm new brain --base Qwen/Qwen2.5-0.5B --dtype bfloat16 --general news.jsonl

        growlm new brain --base SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16

        growlm new brain --base base/ --router transformer --keep-samples 2MB
    """
    from growlm.disk.files import undone_on_failure
    from growlm.store import Store

    if general:
        require_data(general, format="auto")
        from growlm.base.placement import find_device

        find_device(device)  # before anything is made
    elif device != "auto":
        raise ConfigError("--device is where --general is read; give general text, or leave it out")
    with undone_on_failure(store.expanduser()):
        made = Store.create(store, base, dtype=dtype, router=router, keep_samples=keep_samples)
        if general:
            from growlm.training.general import describe_general

            describe_general(made, made.load_base(device=device), made.load_tokenizer(), general)
    if as_json:
        return print_json(made.manifest.model_dump())
    print(f"{store}: made for {base} ({made.manifest.dtype}, {format_size(made.base_bytes())})")
    return None
