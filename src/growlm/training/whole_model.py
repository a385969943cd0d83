"""Training of a whole model on a body of text: what pretraining and finetuning share.

Knows a transformers model, a tokenizer and text; not where the model came from. Knows nothing of modules or stores.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import save_model
from growlm.base.placement import Placement
from growlm.disk.files import refuse_existing, sync, write_atomic
from growlm.errors import ConfigError, DataError, setting
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.progress import phase, say
from growlm.training.admission import Comparison, require_no_worse
from growlm.training.config import ConversationConfig, WholeModelConfig
from growlm.training.corpus import beginnings, deciding_tokens, halves, validation_tokens
from growlm.training.general import HELDOUT_FILE
from growlm.training.loop import require_finite, train
from growlm.training.parallel import ALONE, Ranks
from growlm.training.runs import require_same_rows, run_folder
from growlm.training.segments import check_segments, document_ids, final_states
from growlm.training.validation import Validation
from growlm.usage.pools import PoolCounts, count_pools

_HELDOUT_DOCUMENTS = 256


@dataclass(frozen=True)
class PoolUse:
    """How the held-out text uses the experts of one layer of product keys.

    Attributes:
        share_used_before, share_used_after: of the experts, those that are retrieved at all.
        unevenness_before, unevenness_after: KL divergence of the accumulated gates from uniform, in nats.
    """

    layer: int
    num_experts: int
    share_used_before: float
    share_used_after: float
    unevenness_before: float
    unevenness_after: float

    @classmethod
    def of(cls, before: PoolCounts, after: PoolCounts) -> PoolUse:
        return cls(
            before.layer, before.num_experts, before.share_used, after.share_used, before.unevenness, after.unevenness
        )

    def line(self) -> str:
        return (
            f"layer {self.layer}: {self.num_experts:,} experts, of which held-out text uses "
            f"{self.share_used_before:.1%} -> {self.share_used_after:.1%}; KL from uniform "
            f"{self.unevenness_before:.3f} -> {self.unevenness_after:.3f} nats"
        )


@dataclass(frozen=True)
class TrainedModel:
    """What was trained. Losses are in nats a token on held-out text; `pools` has the layers of product keys.

    Attributes:
        gain: by how much the loss is lower.
        error: its standard error; None of a single passage.
        steps, best_step: that were made, and the one that was kept.
    """

    path: str
    parameters: int
    vocab_size: int
    loss_before: float
    loss_after: float
    tokens: int
    seconds: float
    tokens_per_second: float
    gain: float
    error: float | None
    steps: int
    best_step: int
    pools: list[PoolUse] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train_whole(
    out: Path,
    data: Sequence[str | Path],
    config: WholeModelConfig,
    make: Callable[[list[text_data.Document]], tuple[Any, Any]],
    *,
    verb: str,
    rate: Callable[[int], float],
    identity: str = "",
    restart: bool = False,
    never_worse: bool = False,
    ranks: Ranks = ALONE,
    shard_model: bool = False,
) -> TrainedModel:
    """Trains all parameters of a model on `data` and saves it to `out`, as a transformers checkpoint.

    Beside it lie `{verb}.json`, what was done, and `heldout.jsonl`, the held-out text. A run that was stopped goes on
    where it was when it is called again with the same arguments.

    Args:
        make: model in float32 and tokenizer, from the documents that are trained on.
        verb: what is being done.
        rate: the peak learning rate by the width of the model, where the config gives none.
        identity: of what `make` starts from, for telling runs apart.
        never_worse: what `make` gives knows something: half of the held-out text chooses the step that is kept, and by
            the other half the result must be no worse.
        ranks: that train it together; the first of them writes.
        shard_model: each of them has a part of the model's layers.

    Raises:
        NotBetterError: it is worse; nothing is saved.
        StoreError: `out` exists and holds something else, or the disk is full.
        DataError: data that is missing, malformed or too little.
        ConfigError: settings that contradict each other, or a device that is not there.
        TrainingError: the loss became NaN or infinite; nothing is saved.
        Interrupted: stopped by the user; progress is saved.
        RankError: another of the processes that train it together has ended.
    """
    refuse_existing(out)
    assert config.batch_size is not None
    ranks.require_divisor(config.batch_size)
    if shard_model:
        ranks.require_several("--shard-model")
    placement = Placement.of(config.device, config.precision)
    corpus = text_data.read(data, **config.reading)
    train_documents, heldout_documents = text_data.split(corpus, at_most=_HELDOUT_DOCUMENTS, seed=config.seed)

    settings = config.to_json() | {"threads": torch.get_num_threads(), "device": placement.device.type}
    settings |= {"precision": str(placement.dtype)}
    for key in ("checkpoint_seconds", "admit_anyway"):
        settings.pop(key, None)
    among = [ranks.size, *(["parts"] if shard_model else [])] if ranks.size > 1 else []
    told = [corpus.digest, settings, *([identity] if identity else []), *among]
    run = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = out.parent / f".{out.name}-{run}"
    busy = f"{out}: the same {verb} is running already"
    ranks.require_same({"text": corpus.digest[:12], "run": run, "place": str(folder.resolve())})
    with run_folder(folder, busy, restart=restart) if ranks.first else nullcontext(folder) as work:
        ranks.require_shared(work.parent)
        model, tokenizer = make(train_documents)
        if ranks.first:
            work.mkdir(parents=True, exist_ok=True)
        result = _run(
            out, work, corpus, train_documents, heldout_documents, config, model, tokenizer, placement, verb, rate,
            never_worse, ranks, shard_model,
        )  # fmt: skip
        found: dict[str, Any] = ranks.first_says({} if result is None else result.to_json())
    return result or TrainedModel(**{**found, "pools": [PoolUse(**pool) for pool in found["pools"]]})


def _run(
    out: Path,
    work: Path,
    corpus: text_data.TextData,
    train_documents: list[text_data.Document],
    heldout_documents: list[text_data.Document],
    config: WholeModelConfig,
    model: Any,
    tokenizer: Any,
    placement: Placement,
    verb: str,
    rate: Callable[[int], float],
    never_worse: bool,
    ranks: Ranks,
    shard_model: bool,
) -> TrainedModel | None:
    """What rank 0 finds; the others train along."""
    learned = config.loss if isinstance(config, ConversationConfig) else "all"
    packed = text_data.pack(
        train_documents,
        tokenizer,
        config.sequence_length,
        max_tokens=config.max_tokens,
        loss=learned,
    )
    passages = text_data.passages(heldout_documents, tokenizer, config.sequence_length, loss=learned)
    if not passages:
        raise DataError("the held-out text is shorter than two tokens; give more text")
    wanted = config.rows_wanted(len(packed))
    chosen_by, decided_by = halves(passages) if never_worse else ([], passages)
    if never_worse:
        decided_by = beginnings(decided_by, deciding_tokens(wanted * config.sequence_length), config.seed)
    heldout = [p.tokens for p in decided_by]

    base = Base(model, str(out), freeze=False)
    if base.max_positions is not None and config.sequence_length > base.max_positions:
        raise ConfigError(
            f"{setting('sequence_length')} is {config.sequence_length}; the config has {base.max_positions} positions"
        )
    for read in (packed.tokens, np.concatenate([p.tokens for p in passages])):
        base.require_rows(read, f"{out}: its text", tokenizer)
    check_segments(
        base,
        config.sequence_length,
        separate_documents=config.separate_documents,
        segment_length=config.segment_length,
    )
    autocast = placement.autocast()

    def measure() -> tuple[Tensor, list[PoolCounts]]:
        """Losses of held-out passages, and what of large pools they use."""
        model.eval()
        with autocast, phase("scoring held-out text", len(heldout), "passages"):
            losses = passage_losses(ModuleSet(base), heldout, counted=text_data.masks_of(decided_by))
        with autocast:
            return losses, count_pools(ModuleSet(base), heldout)

    assert config.batch_size is not None
    order = text_data.schedule(len(packed), config.batch_size, wanted=wanted, seed=config.seed)

    if shard_model:
        from growlm.training.sharding import gather, parallelize

        parallelize(base, placement, ranks)
    else:
        model.to(placement.device)
    if config.activation_checkpointing:
        base.checkpoint_activations()

    def losses_of_step(step: int) -> Iterator[Tensor]:
        for rows, share in ranks.parts_of(order[step], packed.labels, config.gradient_accumulation_steps):
            inputs = packed[rows][:, :-1].to(placement.device)
            labels = packed.labels(rows).to(placement.device)
            documents = document_ids(inputs, tokenizer.eos_token_id) if config.separate_documents else None
            with autocast:
                hidden, auxiliary = final_states(
                    base, inputs, documents=documents, segment_length=config.segment_length
                )
            loss = linear_cross_entropy(
                hidden.to(placement.dtype).flatten(0, 1), base.head_weight, labels.flatten(), softcap=base.softcap
            )
            yield share * (loss if auxiliary is None else loss + auxiliary)

    some = beginnings(chosen_by, validation_tokens(wanted * config.sequence_length), config.seed)
    scored, counted = [p.tokens for p in some], text_data.masks_of(some)

    def score() -> float:
        model.eval()
        with autocast:
            losses = passage_losses(ModuleSet(base), scored, counted=counted)
            loss = float(losses.sum()) / num_labels(scored, counted)
        model.train()
        return loss

    if ranks.first:
        require_same_rows(work, packed.tokens, text_data.start_tokens(tokenizer))
    before, pools_before = measure() if ranks.first else (torch.empty(0), [])
    model.train()
    saved = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    buffers = {name: b for name, b in model.named_buffers() if name in saved}

    def now() -> dict[str, Tensor]:
        return gather(base, {**parameters, **buffers}) if shard_model else {**parameters, **buffers}

    chosen = Validation(work, now, score) if scored and ranks.first else None
    steps, seconds = train(
        parameters,
        losses_of_step,
        len(order),
        lambda step: len(order[step]) * config.sequence_length,
        config,
        config.rate_or(rate(base.hidden_size)),
        folder=work,
        resume_hint="run the same command again to go on",
        buffers=buffers,
        validation=chosen,
        ranks=ranks,
    )
    if not ranks.first:
        return None
    tokens = sum(len(rows) for rows in order[:steps]) * config.sequence_length
    after, pools_after = measure()
    scored_of_each = torch.tensor([p.num_scored for p in decided_by])
    found = Comparison.of(before, after, scored_of_each, [p.document_index for p in decided_by])
    require_finite(f"{out}: the held-out loss after training", found.after)
    if never_worse and not getattr(config, "admit_anyway", False):
        require_no_worse(str(out), found, "the checkpoint that it began with", "give a lower --learning-rate")
    result = TrainedModel(
        path=str(out),
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=len(tokenizer),
        loss_before=found.before,
        loss_after=found.after,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
        gain=found.gain,
        error=found.error,
        steps=steps,
        best_step=chosen.best if chosen else steps,
        pools=[PoolUse.of(b, a) for b, a in zip(pools_before, pools_after, strict=True)],
    )
    for pool in result.pools:
        say(pool.line())
    record = {**result.to_json(), "settings": config.to_json(), **placement.record()}
    weights = gather(base, model.state_dict(keep_vars=True)) if shard_model else None
    _save(out, work, model, weights, tokenizer, heldout_documents, record, corpus, verb)
    return result


def _save(
    out: Path,
    work: Path,
    model: Any,
    weights: dict[str, Tensor] | None,
    tokenizer: Any,
    heldout: list[text_data.Document],
    record: dict[str, Any],
    corpus: text_data.TextData,
    verb: str,
) -> None:
    """The checkpoint appears by one rename: `out` is complete or absent.

    Args:
        weights: the model's, where it has parts of them itself.
    """
    ready = work / "checkpoint"
    shutil.rmtree(ready, ignore_errors=True)
    save_model(model.to("cpu") if weights is None else model, ready, weights)
    tokenizer.save_pretrained(ready)
    lines = [json.dumps({"text": d.plain}, ensure_ascii=False) for d in heldout]
    (ready / HELDOUT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    record["sources"] = [asdict(s) for s in corpus.sources]
    write_atomic(ready / f"{verb}.json", json.dumps(record, indent=2).encode())
    for file in ready.iterdir():
        sync(file)
    if out.is_dir():
        out.rmdir()
    ready.rename(out)
    sync(out.parent)
