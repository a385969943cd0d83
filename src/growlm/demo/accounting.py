"""Accounting: the parameters of a base with layers per domain, and the part of them that must be in memory.

Reproduces the numbers published for IP-LLM ("Infinite-parameter Large Language Model") from the shapes in a
config: models are built on torch's meta device, which allocates nothing. Knows no weights and no store.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from growlm.errors import ConfigError

PAPER_CONFIG = Path(__file__).with_name("qwen1.5-7b.json")

# In the paper's "B". They agree with the count in units of 2**30, and none does in units of 10**9: Qwen1.5-7B
# has 7.72e9 parameters, 7.19 * 2**30. The router is given as 0.7 and as 0.75 B; it has the layers of a block.
_PAPER = {"base": 7.2, "router": 0.7, "block": 0.75, "all blocks": 16.6, "total": 24.5, "resident": 8.7}
_PAPER_UNIT = 2**30
_PAPER_SHARE_SAVED = 0.65
_PAPER_NUM_DOMAINS = 22


@dataclass(frozen=True)
class Accounting:
    """Numbers of parameters, embeddings and output head included. Blocks and router share the base's head."""

    base: int
    block: int  # one domain
    router: int
    num_domains: int

    @property
    def blocks(self) -> int:
        """Parameters of all domains' blocks."""
        return self.num_domains * self.block

    @property
    def total(self) -> int:
        """Parameters on disk."""
        return self.base + self.router + self.blocks

    @property
    def resident(self) -> int:
        """Parameters in memory while one domain answers."""
        return self.base + self.router + self.block

    @property
    def share_saved(self) -> float:
        """Share of `total` that need not be in memory, between 0 and 1; the same at every precision."""
        return 1 - self.resident / self.total

    def lines(self) -> list[str]:
        """The accounting as lines of text, beside the paper's numbers if base and domains are the paper's."""
        counts = {
            "base": self.base,
            "router": self.router,
            "block": self.block,
            "all blocks": self.blocks,
            "total": self.total,
            "resident": self.resident,
        }
        if round(self.base / _PAPER_UNIT, 1) != _PAPER["base"] or self.num_domains != _PAPER_NUM_DOMAINS:
            lines = [f"{'':<12}{'parameters':>16}"]
            lines += [f"{name:<12}{count:>16,}" for name, count in counts.items()]
            return [*lines, f"{'saved':<12}{self.share_saved:>16.1%}"]
        lines = [f"{'':<12}{'parameters':>16}{'/ 2^30':>9}{'paper':>8}"]
        lines += [
            f"{name:<12}{count:>16,}{count / _PAPER_UNIT:>9.2f}{_PAPER[name]:>8}" for name, count in counts.items()
        ]
        return [
            *lines,
            f"{'saved':<12}{self.share_saved:>16.1%}{'':>9}{_PAPER_SHARE_SAVED:>8.0%}",
            "The paper's numbers fit units of 2^30. In units of 10^9, embeddings included: "
            f"base {self.base / 1e9:.2f}, total {self.total / 1e9:.2f}, resident {self.resident / 1e9:.2f}.",
            f"In bfloat16: {2 * self.total / 1e9:.1f} GB on disk, {2 * self.resident / 1e9:.1f} in memory.",
        ]


def paper_config() -> PreTrainedConfig:
    """The config of the paper's base, Qwen1.5-7B: its shapes, without special tokens."""
    return AutoConfig.for_model(**json.loads(PAPER_CONFIG.read_text(encoding="utf-8")))


def account(config: PreTrainedConfig, *, num_domains: int = 22, num_layers: int = 4) -> Accounting:
    """Count a base of this config, a block of `num_layers` more layers per domain, and a router of as many.

    No weights are read or allocated.

    Raises:
        ConfigError: `num_domains` or `num_layers` is less than one.
    """
    for name, value in (("num_domains", num_domains), ("num_layers", num_layers)):
        if value < 1:
            raise ConfigError(f"accounting: {name} is {value}, expected at least 1")
    base = _num_parameters(config)
    block = _num_parameters(_deepened(config, num_layers)) - base
    return Accounting(base=base, block=block, router=block, num_domains=num_domains)


def _deepened(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The config with `num_layers` more layers: what it counts more is a block, in every model family."""
    values = config.to_dict()
    values.pop("layer_types", None)  # one entry a layer: let the family fill in the new number of them
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[key] += num_layers
    return type(config)(**values)


def _num_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once
