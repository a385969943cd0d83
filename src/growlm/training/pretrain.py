"""Pretrain: a small causal language model from scratch (IP-LLM's segmented pretraining, phase 1).

Text in, an ordinary transformers checkpoint with its tokenizer out. Knows nothing of modules or stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growlm import data as text_data
from growlm.base.anatomy import FAMILIES, anatomy_of
from growlm.base.settings import config_settings
from growlm.errors import ConfigError, setting
from growlm.progress import phase, reporting
from growlm.training.config import PRESETS, PretrainConfig
from growlm.training.parallel import joined
from growlm.training.whole_model import TrainedModel, train_whole

END_OF_TEXT = "<|endoftext|>"
_TOKENIZER_BYTES = 50_000_000  # of text, enough for any vocabulary that is trained here


def pretrain(
    out: str | Path,
    data: Sequence[str | Path],
    config: PretrainConfig | None = None,
    *,
    restart: bool = False,
    shard_model: bool = False,
    progress: bool | None = None,
) -> TrainedModel:
    """Trains a tokenizer and a model on `data` and saves them to `out` as a transformers checkpoint.

    Beside them lie `pretrain.json`, what was done, and `heldout.jsonl`, the held-out text. Resuming and errors are
    those of `train_whole`.

    Args:
        shard_model: of several ranks each has a part of the model's layers, of their gradients and optimiser state.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.
    """
    config = config or PretrainConfig()

    def make(documents: list[text_data.Document]) -> tuple[nn.Module, Any]:
        model_config = _model_config(config)
        tokenizer = train_tokenizer([d.text for d in documents], model_config.vocab_size)
        model_config.vocab_size = len(tokenizer)
        model_config.eos_token_id = tokenizer.eos_token_id
        model_config.bos_token_id = model_config.pad_token_id = None
        return new_model(model_config, config.seed), tokenizer

    out = Path(out).expanduser()
    with joined() as ranks, reporting(out.name, progress if ranks.first else False):
        return train_whole(
            out,
            data,
            config,
            make,
            verb="pretrain",
            rate=default_rate,
            restart=restart,
            ranks=ranks,
            shard_model=shard_model,
        )


def new_model(model_config: Any, seed: int) -> nn.Module:
    """A model with random weights. All initialisation is here: the family's own, except that projections into the
    residual stream are scaled down by the square root of their number, as GPT-2 has it.

    Raises:
        ConfigError: tables of experts that memory has no room for.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    except MemoryError as error:
        raise ConfigError(f"this model cannot be made here: {error}") from None
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
        raise ConfigError(f"{setting('vocab_size')} is {vocab_size}; a byte-level vocabulary has at least 257 entries")
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

    read = min(sum(map(len, texts)), _TOKENIZER_BYTES)
    with phase("training the tokenizer", read, "characters", note=f"{vocab_size:,} entries") as training:

        def some() -> Iterator[str]:
            size = 0
            for text in texts:
                yield text
                size += len(text)
                training.advance(len(text))
                if size > _TOKENIZER_BYTES:
                    return

        tokenizer.train_from_iterator(some(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def default_rate(hidden_size: int) -> float:
    """Peak learning rate where none is given."""
    return min(2e-3, 0.4 / hidden_size)


def _refuse_unknown(model_config: Any, path: Path) -> None:
    """
    Raises:
        ConfigError: a setting that a growlm model does not have, as a misspelt one.
    """
    plain = type(model_config)()
    known = {*vars(plain), *plain.to_dict(), "auto_map"}
    unknown = sorted(vars(model_config).keys() - known) if model_config.model_type == "growlm" else []
    if unknown:
        close = get_close_matches(unknown[0], known, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{path}: a growlm model has no setting {unknown[0]!r}{meant}")


def _model_config(config: PretrainConfig) -> Any:
    from transformers import AutoConfig, LlamaConfig

    preset = PRESETS[config.preset] if config.config is None else Path(config.config)
    if isinstance(preset, Path):
        path = preset.expanduser()
        if not path.exists():
            raise ConfigError(f"{path}: no such file; give a transformers config.json, or the folder that holds one")
        folder = path.parent if path.name == "config.json" else path
        config_settings(folder / "config.json" if folder.is_dir() else path, FAMILIES)
        try:
            model_config = AutoConfig.from_pretrained(folder if folder.is_dir() else path)
        except Exception as error:
            raise ConfigError(
                f"{path}: not a readable transformers config ({' '.join(str(error).split())[:300]})"
            ) from None
        anatomy_of(model_config, str(path))
        _refuse_unknown(model_config, path)
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
