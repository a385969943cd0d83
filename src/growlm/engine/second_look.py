"""Second look: whether the module that a router chose reads the newest tokens of a text better than the base alone.

A router tells what a text looks like, not whether its module helps: examination questions of a neighbouring subject
look like the domain's, and the module has nothing to say to them. Knows module sets and token ids; chooses no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from growlm.data import start_tokens
from growlm.modules import ModuleSet
from growlm.modules.scoring import label_losses

if TYPE_CHECKING:
    from growlm.engine.engine import Engine

LONGEST = 64  # newest tokens of a text that are read
AT_A_TIME = 16  # of them, whose logits are held


def reads_better(modules: ModuleSet, tokens: Sequence[int], start: int = 0) -> bool:
    """Whether the modules give the newest tokens of a text, `LONGEST` at most, a higher probability than the base alone
    does. Of a single token nothing can be said, and they keep it.

    Args:
        start: so many tokens begin every text, and are read before the newest.
    """
    seen = newest(tokens, start)
    return len(seen) < 2 or _nats(modules, seen) < _nats(ModuleSet(modules.base), seen)


def newest(tokens: Sequence[int], start: int) -> list[int]:
    """What is read of a text: `LONGEST` tokens at most."""
    return list(tokens) if len(tokens) <= LONGEST else [*tokens[:start], *tokens[start - LONGEST :]]


@torch.inference_mode()
def _nats(modules: ModuleSet, tokens: list[int]) -> float:
    """Log-loss of all tokens but the first."""
    ids = torch.tensor([tokens], device=modules.base.device)
    inputs, labels = ids[:, :-1], ids[0, 1:]
    hidden, contexts = modules.hidden(inputs)[0], modules.contexts(inputs, inputs.shape[1])
    total = 0.0
    for at in range(0, len(labels), AT_A_TIME):
        part = slice(at, at + AT_A_TIME)
        own = None if contexts is None else contexts[0][part]
        losses = label_losses(modules, hidden[part], labels[part], own).cpu()  # not every device has float64
        total += float(losses.double().sum())
    return total


class SecondLooks:
    """Looks again at what an engine's routers choose for many texts, at each text and module once."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._start = engine, len(start_tokens(engine.tokenizer))
        self._better: dict[tuple[str, tuple[int, ...]], bool] = {}

    def kept(self, names: Sequence[str | None], texts: Sequence[Sequence[int]]) -> list[str | None]:
        """The chosen modules, one a text, without those that read theirs no better than the base.

        Raises:
            As `ModuleCache.using`.
        """
        asked = [(name, tuple(newest(text, self._start))) for name, text in zip(names, texts, strict=True)]
        for name in sorted({name for name in names if name is not None}):
            new = {text for chosen, text in asked if chosen == name and (name, text) not in self._better}
            if new:
                with self._engine.modules.using([name]) as held:
                    modules = ModuleSet(self._engine.base, [held[name]])
                    self._better |= {(name, text): reads_better(modules, text) for text in new}
                    del modules
        return [name if name is None or self._better[name, text] else None for name, text in asked]
