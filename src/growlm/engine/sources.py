"""Sources: which places of the modules' texts an answer may come from, and how much of it is theirs.

From what prompt and answer come to, read once more with the modules that wrote it. Knows module sets and tokens; writes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from growlm.modules import ModuleSet
from growlm.recall.contexts import Contexts
from growlm.recall.memory import Origin

_AT_A_TIME = 128  # tokens whose logits are held


@dataclass(frozen=True)
class Quote:
    """Consecutive tokens of an answer that stand one after another in a module's text, after the same tokens.

    Attributes:
        text: of the answer.
        first, tokens: which of the answer's tokens they are: the first one, counted from 0, and how many.
        module: whose text.
        source: of the document, as it was read: a file, or a file and the record in it.
        character: where in the document's text they begin, counted from 0.
        length: tokens before them that stand there too, at most 32.
        share: of their probability that is the text's and not the model's own, in the mean.
    """

    text: str
    first: int
    tokens: int
    module: str
    source: str
    character: int
    length: int
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def quotes(
    modules: ModuleSet, tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], hidden: Tensor
) -> list[Quote]:
    """What of an answer stands in the modules' texts, in its order.

    Args:
        hidden: (n, d) the states behind the modules' last layer, of prompt and answer but its last token.
    """
    if not modules.memories or not answer:
        return []
    ids = torch.tensor([[*prompt, *answer]], device=modules.base.device)
    hidden = hidden[-len(answer) :]
    contexts = modules.contexts(ids[:, :-1], len(answer))
    assert contexts is not None
    found: list[tuple[str, Origin] | None] = []
    for at in range(0, len(answer), _AT_A_TIME):  # logits are large
        part = slice(at, at + _AT_A_TIME)
        found += _origins(modules, hidden[part], contexts[0, part], ids[0, -len(answer) :][part])
    runs: list[list[int]] = []
    for at, origin in enumerate(found):
        if origin is None:
            continue
        before = found[at - 1] if at else None
        if before is not None and runs and _follows(before, origin):
            runs[-1].append(at)
        else:
            runs.append([at])
    return [_quote(modules, tokenizer, answer, run, [o for at in run if (o := found[at])]) for run in runs]


def _origins(modules: ModuleSet, hidden: Tensor, contexts: Contexts, tokens: Tensor) -> list[tuple[str, Origin] | None]:
    """Of each token the module and its text's place; where several have one, that with the largest share."""
    best: list[tuple[str, Origin] | None] = [None] * len(tokens)
    logits = modules.rows.logits(modules.base, modules.base.norm(hidden))
    for module in modules.modules:
        if (memory := module.memory) is None or not memory.active:
            continue
        name = module.identity.partition("@")[0]
        for at, origin in enumerate(memory.origins(logits, contexts, tokens)):
            held = best[at]
            if origin is not None and (held is None or origin.share > held[1].share):
                best[at] = name, origin
        logits = memory.mix(logits, contexts)
    return best


def _follows(before: tuple[str, Origin], after: tuple[str, Origin]) -> bool:
    (one, first), (other, second) = before, after
    place, following = first.place, second.place
    return (one, place.part, place.document, place.token + 1) == (
        other,
        following.part,
        following.document,
        following.token,
    )


def _quote(
    modules: ModuleSet, tokenizer: Any, answer: Sequence[int], run: list[int], found: list[tuple[str, Origin]]
) -> Quote:
    name, first = found[0]
    (text,) = [m.memory.text for m in modules.modules if m.identity.partition("@")[0] == name and m.memory]
    assert text is not None
    return Quote(
        text=tokenizer.decode([answer[at] for at in run], skip_special_tokens=True),
        first=run[0],
        tokens=len(run),
        module=name,
        source=first.place.source,
        character=len(tokenizer.decode(text.before(first.place))),
        length=first.length,
        share=sum(origin.share for _, origin in found) / len(found),
    )
