"""Learn: a step of learning a module of every kind against a step of PEFT's LoRA, on the same frozen base in bfloat16.

Weights of the base are held once: the model that PEFT wraps is a copy of the objects around them. Blocks on top are
measured in three ways: `first epoch` (the base below, then the module), `first epoch, kept` (the same where the text
will be read again, so that what the base computed is written to the disk, a row at a time), and `cached`. LoRA has rank
16 in all linear layers and runs under autocast, as its users run it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.flops import FORMULAS
from benchmarks.stages.bases import VOCABULARY, make_model
from benchmarks.stages.bench import Bench, Side, ms, one_line, ratio
from growlm.base import Base
from growlm.data import PackedTokens
from growlm.modules import kind_of
from growlm.training.config import LearnConfig
from growlm.training.module_training import ModuleTraining
from growlm.training.optim import clip_gradients, make_optimizer

RANK = 16
FIRST, KEPT, CACHED, LORA = "blocks, first epoch", "blocks, first epoch, kept", "blocks, cached", "PEFT LoRA"
ASKED = {FIRST: 1.3, CACHED: 3.0}
# By size of the base: rows of a step, and tokens of a row.
STEPS = {"1.5B": (8, 1024), "7B": (4, 1024), "tiny": (2, 32)}


def run(bench: Bench) -> None:
    for size in ("tiny",) if bench.tiny else ("1.5B", "7B"):
        if not bench.over(size):
            _on(bench, size)
            bench.tidy()


def _on(bench: Bench, size: str) -> None:
    rows, length = STEPS[size]
    packed = _tokens(2 * rows, length, VOCABULARY[size])
    model = make_model(size, bench.device)
    peft, why = _peft_step(copy.deepcopy(model, {id(p): p for p in model.parameters()}), packed, rows)
    if peft is None:
        bench.tell(f"{size}, {LORA}", {"left out": why})
    base = Base(model)
    width = base.hidden_size
    kinds: dict[str, dict[str, Any]] = {
        "blocks": {},
        "lora": {"r": RANK},
        "experts": {"expert_size": width // 8},
        "peer": {"num_experts": 256 if bench.tiny else 65_536},
    }
    for kind, settings in kinds.items():
        if bench.over(f"{size}, {kind}"):
            break
        with tempfile.TemporaryDirectory(dir=bench.out) as work:
            try:
                _kind(bench, size, base, kind, settings, packed, peft, Path(work), why)
            except Exception as error:
                bench.problem(f"{size}, {kind}", error)
        bench.tidy()


def _kind(
    bench: Bench,
    size: str,
    base: Base,
    kind: str,
    settings: dict[str, Any],
    packed: PackedTokens,
    peft: Side | None,
    work: Path,
    why: str,
) -> None:
    """One kind's steps and LoRA's, in turns."""
    rows, length = STEPS[size]
    config = LearnConfig(
        kind,
        admit_anyway=True,
        epochs=2,
        sequence_length=length,
        batch_size=rows,
        precision="bfloat16",
        device=str(bench.device),
        **settings,
    )
    learning = ModuleTraining(base, kind_of(kind), config, packed, work)
    try:
        sides = _sides(learning, kind) | ({} if peft is None else {LORA: peft})
        flops = {name: _flops(bench, f"{size}, {name}", side) for name, side in sides.items()}
        taken = bench.turns(f"{size}, {kind}", sides, seconds=bench.left() / 4, rounds=7)
    finally:
        if learning._cache is not None:
            learning._cache.close()
    for name, seconds in taken.items():
        floor = bench.multiplying(flops[name]) if flops[name] else None
        numbers = {
            "ms": ms(seconds), "tokens/s": rows * length / seconds, "TFLOP": (flops[name] or 0) / 1e12,
            "floor ms": None if floor is None else ms(floor), "times its floor": ratio(seconds, floor),
            f"against {LORA}": ratio(taken.get(LORA), seconds),
        }  # fmt: skip
        module = {} if name == LORA else {"parameters": learning.module.num_parameters(), **settings}
        bench.tell(f"{size}, {name}" + (f", beside {kind}" if name == LORA else ""), numbers | module)
    for name in ASKED.keys() & _names(kind):
        against = ratio(taken.get(LORA), taken.get(name))
        bench.ask(f"learn {size}: {name}, over {LORA}, tokens/s", ASKED[name], against, least=True, why=why)


def _names(kind: str) -> set[str]:
    return {FIRST, KEPT, CACHED} if kind == "blocks" else {kind}


def _sides(learning: ModuleTraining, kind: str) -> dict[str, Side]:
    """Steps as `growlm.training.loop` makes them, of the same rows each time."""
    trained = {name: p for name, p in learning.module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, lr=1e-4)
    rows = learning._steps[0]

    def step(losses: Callable[[], Iterable[Tensor]]) -> None:
        for loss in losses():
            loss.backward()
            float(loss.detach())
        float(clip_gradients(trained.values(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def straight() -> Iterable[Tensor]:
        labels = learning.packed.labels(rows).flatten().to(learning.base.device)
        return [learning._loss_of(learning._features(rows), labels)]

    def kept() -> Iterable[Tensor]:
        assert learning._cache is not None
        learning._cache.forget(rows)
        return learning._losses(0)

    if kind != "blocks":
        return {kind: lambda: step(straight)}
    return {
        FIRST: lambda: step(straight),
        KEPT: lambda: step(kept),
        CACHED: lambda: step(lambda: learning._losses(0)),  # behind `kept`, which leaves the rows there
    }


def _peft_step(model: Any, packed: PackedTokens, rows: int) -> tuple[Side | None, str]:
    """A step, or why there is none."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        return None, f"peft cannot be imported here ({one_line(error)})"
    device = model.device
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    peft = get_peft_model(model, settings).train()
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    chosen = np.arange(rows)

    def step() -> None:
        batch = packed[chosen][:, :-1].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = peft(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        float(loss.detach())
        float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, ""


def _flops(bench: Bench, what: str, side: Side) -> int | None:
    """Of a step's matrix products, attention and grouped products; rows of tables count for nothing."""
    try:
        side()
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            side()
        return counter.get_total_flops()
    except Exception as error:
        bench.problem(f"{what}, FLOPs", error)
        return None


def _tokens(rows: int, length: int, vocabulary: int) -> PackedTokens:
    """Zipf-like, as text is."""
    ids = np.minimum(np.random.default_rng(0).zipf(1.2, size=(rows, length + 1)), vocabulary - 1)
    return PackedTokens(ids.astype(np.int32))
