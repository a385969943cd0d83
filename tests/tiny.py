"""Tiny models and tokenizers, built in place: one config per supported family, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from growlm.base import Base

VOCAB = 320
WINDOW = 12
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SETTINGS: dict[str, dict] = {
    "llama": {**_SIZES, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_SIZES, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "head_dim": 8},
    "mistral": {**_SIZES, "sliding_window": WINDOW, "head_dim": 8},
    "gemma2": {**_SIZES, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "num_hidden_layers": 4},
    "gemma3_text": {
        **_SIZES,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        },
    },
    "gpt_neox": {**_SIZES, "rotary_pct": 0.5},
    "olmo2": dict(_SIZES),
    "phi3": {**_SIZES, "sliding_window": WINDOW},
    "smollm3": {**_SIZES, "num_hidden_layers": 5, "no_rope_layer_interval": 2},
    "gpt2": _GPT2,
    # Every kind of layer that the from-scratch model has.
    "growlm": {
        **_SIZES,
        "num_hidden_layers": 4,
        "attention": ["stickbreaking", "softmax", "stickbreaking", "softmax"],
        "feed_forward": ["experts", "dense", "dense", "experts"],
        "num_attention_experts": [3, 0, 0, 4],
        "num_experts": [4, 0, 0, 5],
        "head_dim": 8,
        "router_size": 16,
    },
}
FAMILIES = list(SETTINGS)

TEXT = [
    "The quick brown fox jumps over the lazy dog while the river runs down to the sea.",
    "def add(first, second):\n    return first + second\n",
    "Aspirin inhibits the enzyme cyclooxygenase and thereby reduces fever and pain.",
    "The tenant shall pay the rent on the first day of each month to the landlord.",
]


def make_model(family: str = "llama", *, seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SETTINGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    # Gains of exactly one and biases of exactly zero would hide a tensor that is lost on the way.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def make_base(family: str = "llama", **changes) -> Base:
    return Base(make_model(family, **changes))


@torch.no_grad()
def perturb(module: torch.nn.Module, seed: int, *, strength: float = 0.1):
    """Makes of a new module one that has learned something."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_((torch.randn(p.shape, generator=generator) * strength).to(p.device))
    return module


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_base(folder: Path, family: str = "llama", **changes) -> Path:
    """A checkpoint folder as a user would have one."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def random_ids(batch: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
