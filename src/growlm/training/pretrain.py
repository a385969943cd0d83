"""Pretrain: a small causal language model from scratch (IP-LLM's segmented pretraining, phase 1).

Text in, an ordinary transformers checkpoint with its tokenizer out. Knows nothing of modules or stores.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growlm import data as text_data
from growlm.errors import ConfigError, DataError, StoreError
from growlm.files import sync, write_atomic
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import ModuleSet
from growlm.modules.anatomy import anatomy_of
from growlm.modules.base import Base
from growlm.modules.checkpoint import save_model
from growlm.modules.scoring import num_labels, passage_losses
from growlm.training.config import PRESETS, PretrainConfig
from growlm.training.general import HELDOUT_FILE
from growlm.training.loop import compute_dtype, require_finite, train
from growlm.training.progress import say, training_bar
from growlm.training.runs import run_folder

END_OF_TEXT = "<|endoftext|>"
_HELDOUT_DOCUMENTS = 256
_TOKENIZER_BYTES = 50_000_000  # of text, enough for any vocabulary that is trained here


@dataclass(frozen=True)
class PretrainResult:
    """What was trained. Losses are in nats a token on held-out text."""

    path: str
    parameters: int
    vocab_size: int
    loss_before: float
    loss_after: float
    tokens: int
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pretrain(
    out: str | Path,
    data: Sequence[str | Path],
    config: PretrainConfig | None = None,
    *,
    restart: bool = False,
    progress: bool | None = None,
) -> PretrainResult:
    """Trains a tokenizer and a model on `data` and saves them to `out` as a transformers checkpoint.

    Beside them lie `pretrain.json`, what was done, and `heldout.jsonl`, the held-out text. A run that was stopped goes
    on where it was when it is called again with the same arguments.

    Raises:
        StoreError: `out` exists and holds something else, or the disk is full.
        DataError: data that is missing, malformed or too little.
        ConfigError: settings that contradict each other.
        TrainingError: the loss is no number any more; nothing is saved.
        Interrupted: stopped by the user; progress is saved.
    """
    config = config or PretrainConfig()
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: exists already; choose another folder, or remove it")
    corpus = text_data.read(data, text_key=config.text_key, separator=config.separator)
    train_documents, heldout_documents = text_data.split(corpus, at_most=_HELDOUT_DOCUMENTS, seed=config.seed)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = config.to_json() | {"threads": torch.get_num_threads(), "device": device}
    settings |= {"precision": str(compute_dtype(config.precision, device))}
    settings.pop("checkpoint_seconds")
    run = hashlib.sha256(json.dumps([corpus.digest, settings], sort_keys=True).encode()).hexdigest()[:16]
    folder = out.parent / f".{out.name}-{run}"
    busy = f"{out}: the same pretraining is running already"
    with run_folder(folder, str(out), busy, restart=restart, progress=progress) as work:
        work.mkdir(parents=True, exist_ok=True)
        return _run(out, work, corpus, train_documents, heldout_documents, config, device, progress)


def _run(
    out: Path,
    work: Path,
    corpus: text_data.TextData,
    train_documents: list[text_data.Document],
    heldout_documents: list[text_data.Document],
    config: PretrainConfig,
    device: str,
    progress: bool | None,
) -> PretrainResult:
    model_config = _model_config(config)
    say(f"training a tokenizer of {model_config.vocab_size:,} entries", progress)
    tokenizer = train_tokenizer([d.text for d in train_documents], model_config.vocab_size)
    model_config.vocab_size = len(tokenizer)
    model_config.eos_token_id = tokenizer.eos_token_id
    model_config.bos_token_id = model_config.pad_token_id = None
    say(f"tokenizing {len(train_documents):,} documents", progress)
    packed = text_data.pack(
        train_documents,
        tokenizer,
        config.sequence_length,
        max_tokens=config.max_tokens,
    )
    heldout = [p.tokens for p in text_data.passages(heldout_documents, tokenizer, config.sequence_length)]
    if not heldout:
        raise DataError("the held-out text is shorter than two tokens; give more text")

    model = new_model(model_config, config.seed).to(device)
    base = Base(model, str(out), freeze=False)
    if base.max_positions is not None and config.sequence_length > base.max_positions:
        raise ConfigError(f"sequence_length is {config.sequence_length}; the config has {base.max_positions} positions")
    dtype = compute_dtype(config.precision, device)
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)

    def heldout_loss() -> float:
        model.eval()
        with autocast:
            return float(passage_losses(ModuleSet(base), heldout).sum()) / num_labels(heldout)

    wanted = config.rows_wanted(len(packed))
    order = text_data.schedule(len(packed), config.batch_size, wanted=wanted, seed=config.seed)

    def loss_of_step(step: int) -> Tensor:
        batch = packed[order[step]].to(device)
        with autocast:
            hidden, auxiliary = final_states(base, batch[:, :-1])
        loss = linear_cross_entropy(
            hidden.to(dtype).flatten(0, 1), base.head_weight, batch[:, 1:].flatten(), softcap=base.softcap
        )
        return loss if auxiliary is None else loss + auxiliary

    before = heldout_loss()
    model.train()
    with training_bar(f"pretraining {out.name}", progress) as report:
        seconds = train(
            dict(model.named_parameters()),
            loss_of_step,
            len(order),
            lambda step: len(order[step]) * config.sequence_length,
            config,
            config.learning_rate or default_rate(base.hidden_size),
            folder=work,
            resume_hint="run the same command again to go on",
            report=report,
        )
    tokens = sum(len(rows) for rows in order) * config.sequence_length
    after = heldout_loss()
    require_finite(f"{out}: the held-out loss after training", after)
    result = PretrainResult(
        path=str(out),
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=len(tokenizer),
        loss_before=before,
        loss_after=after,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / max(seconds, 1e-9),
    )
    _save(out, work, model, tokenizer, heldout_documents, {**result.to_json(), "settings": config.to_json()}, corpus)
    return result


def final_states(base: Base, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the head reads, (b, t, d), and the loss on what routers decided, for a model that has one."""
    if not hasattr(base.model, "auxiliary_loss"):
        return base.norm(ModuleSet(base).hidden(input_ids)), None
    out = base.decoder(input_ids, use_cache=False, output_routings=True)
    return out.last_hidden_state, base.model.auxiliary_loss(out.routings)


def new_model(model_config: Any, seed: int) -> nn.Module:
    """A model with random weights. All initialisation is here: the family's own, except that projections into the
    residual stream are scaled down by the square root of their number, as GPT-2 has it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    anatomy = anatomy_of(model_config, "config")
    layers = getattr(getattr(model, anatomy.decoder), anatomy.layers)
    with torch.no_grad():
        for layer in layers:
            parameters = dict(layer.named_parameters())
            for name, _ in anatomy.zeroed:
                if name in parameters and parameters[name].ndim >= 2:
                    parameters[name].mul_((2 * len(layers)) ** -0.5)
    return model


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE: every text can be written, and its digits stay single.

    Raises:
        ConfigError: a vocabulary too small for the 256 bytes and the end of text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ConfigError(f"vocab_size is {vocab_size}; a byte-level vocabulary has at least 257 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def some() -> Any:
        size = 0
        for text in texts:
            yield text
            size += len(text)
            if size > _TOKENIZER_BYTES:
                return

    tokenizer.train_from_iterator(some(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def default_rate(hidden_size: int) -> float:
    """Peak learning rate where none is given."""
    return min(2e-3, 0.4 / hidden_size)


def _model_config(config: PretrainConfig) -> Any:
    from transformers import AutoConfig, LlamaConfig

    preset = PRESETS[config.preset] if config.config is None else Path(config.config)
    if isinstance(preset, Path):
        path = preset.expanduser()
        if not path.exists():
            raise ConfigError(f"{path}: no such file; give a transformers config.json, or the folder that holds one")
        folder = path.parent if path.name == "config.json" else path
        try:
            model_config = AutoConfig.from_pretrained(folder if folder.is_dir() else path)
        except Exception as error:
            raise ConfigError(
                f"{path}: not a readable transformers config ({' '.join(str(error).split())[:300]})"
            ) from None
        anatomy_of(model_config, str(path))
    else:
        sizes: dict[str, Any] = dict(preset)
        hidden = sizes["hidden_size"]
        model_config = LlamaConfig(
            **sizes,
            intermediate_size=-(-8 * hidden // 3 // 64) * 64,
            num_key_value_heads=sizes["num_attention_heads"],
            max_position_embeddings=max(2048, config.sequence_length),
            tie_word_embeddings=True,
        )
    if config.vocab_size is not None:
        model_config.vocab_size = config.vocab_size
    return model_config


def _save(
    out: Path,
    work: Path,
    model: Any,
    tokenizer: Any,
    heldout: list[text_data.Document],
    record: dict[str, Any],
    corpus: text_data.TextData,
) -> None:
    """The checkpoint appears by one rename: `out` is complete or absent."""
    ready = work / "checkpoint"
    shutil.rmtree(ready, ignore_errors=True)
    save_model(model.to("cpu"), ready)
    tokenizer.save_pretrained(ready)
    lines = [json.dumps({"text": d.text}, ensure_ascii=False) for d in heldout]
    (ready / HELDOUT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    record["sources"] = [asdict(s) for s in corpus.sources]
    write_atomic(ready / "pretrain.json", json.dumps(record, indent=2).encode())
    for file in ready.iterdir():
        sync(file)
    if out.is_dir():
        out.rmdir()
    ready.rename(out)
    sync(out.parent)
