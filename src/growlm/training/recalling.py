"""Recalling: a body's text becomes what a module carries of it, and its gates are fitted on held-out passages.

Nothing else is trained here: a few dozen numbers, by what base and text say of some thousand tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growlm import data as text_data
from growlm.base import Base
from growlm.base.padding import pad_right
from growlm.layers.recall import mixture_losses
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.progress import phase, say, track
from growlm.recall.contexts import Contexts
from growlm.recall.memory import Memory
from growlm.recall.text import RecalledText
from growlm.training.config import FITTED
from growlm.training.corpus import Tokens, beginnings

# Over all tokens, on the squares of what the gates are apart from where they begin: few tokens move them little.
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
# Tokens below which it cannot be told that a text adds nothing, only that it harms. None of them may be a quote: gates
# that follow so few closely forget what quotes want.
_FEW = 1024
# Of nine domains, each with texts of 3,000, 20,000 and 400,000 tokens, and of quotes from these
# (benchmarks.quality.typical_gates).
_TYPICAL = (
    (-4.64, 2.23, -0.23, 1.01, -0.48, 1.23, 0.32, 0.95, -1.09, -0.25),
    (-4.90, 0.57, 0.51, 3.73, -0.62, 1.18, 0.62, 1.89, -1.77, -0.63),
    (-1.76, 0.35, 0.22, 0.30, 0.12, 2.13, -0.48, 0.33, -0.10, -0.23),
    (-1.98, 0.98, 0.10, 0.02, -0.10, 1.45, -0.04, 0.87, -0.87, -0.20),
)
_FOLDS = 4
_BATCH = 8  # passages that are read at a time


@dataclass(frozen=True)
class Fitted:
    """How the gates were found.

    Attributes:
        penalty: over all tokens, the one of several that did best on passages that fitted nothing; None: the text adds
            nothing there, or on few tokens harms, and every gate is closed.
        tokens: on which they were fitted.
        before, after: nats a token there without and with the text, passages being left out in turn.
        error: standard error of the difference.
    """

    penalty: float | None
    tokens: int
    before: float
    after: float
    error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def told(self) -> str:
        if self.penalty is None:
            return f"text: adds nothing on {self.tokens:,} held-out tokens ({self.before:.3f} nats a token without it)"
        return (
            f"text: {self.before:.3f} nats a token without it, {self.after:.3f} with it, on {self.tokens:,} held-out "
            "tokens that are left out of the fit in turn"
        )


def token_documents(documents: Sequence[text_data.Document], tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Source and token ids of each, as training reads them: a text with its end, a conversation in the template."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    pairs = zip(documents, text_data.whole(documents, tokenizer), strict=True)
    for document, ids in track(pairs, "tokenizing what is recalled", "documents", total=len(documents)):
        yield document.source, np.concatenate([ids, end[: int(ids[-1:].tolist() != end.tolist())]])


def remember(module: KnowledgeModule, text: RecalledText, base: Base, passages: Sequence[text_data.Passage]) -> Fitted:
    """Gives a module its text, and gates that suit it; closes them where the text adds nothing.

    Args:
        passages: held out, of documents that are not in the text.
    """
    assert module.memory is not None
    memory = module.memory
    memory.text = text
    memory.close()
    chosen = beginnings(passages, FITTED, 0)
    with phase("fitting what the text adds", len(chosen), "passages") as fitting:
        parts = []
        for at in range(0, len(chosen), _BATCH):
            parts.append(Sample.of(ModuleSet(base, [module]), memory, chosen[at : at + _BATCH], at))
            fitting.advance(min(_BATCH, len(chosen) - at))
    sample = Sample.joined(parts)
    found, gates = best(sample)
    if gates is not None:
        memory.gates.data.copy_(gates)
    say(found.told())
    return found


def recalling(
    base: Base, module: KnowledgeModule, tokens: Tokens, tokenizer: Any, where: str
) -> tuple[KnowledgeModule, dict[str, Any]]:
    """A trained module with the text of its body, or as it is without any where the text adds nothing to its layers;
    and what a manifest says of it."""
    text = text_of(base, tokens.documents, tokenizer)
    fitted = remember(module, text, base, tokens.validation)
    if fitted.penalty is None and module.trains:
        say("the text is not kept; --kind recall keeps a text that helps the base alone")
        return without_memory(base, module, where), {"tokens": 0, "documents": 0, "fit": fitted.to_json()}
    record = {"tokens": text.num_tokens, "documents": text.num_documents, "fit": fitted.to_json()}
    return module, record


def text_of(base: Base, documents: Sequence[text_data.Document], tokenizer: Any) -> RecalledText:
    """Documents, sorted.

    Raises:
        DataError: a token that the base has no row for.
    """
    found = token_documents(documents, tokenizer)
    return RecalledText.of(known(base, found, tokenizer), base.vocab_size)


def known(base: Base, documents: Iterable[tuple[str, np.ndarray]], tokenizer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The documents.

    Raises:
        DataError: a token that the base has no row for.
    """
    for source, ids in documents:
        base.require_rows(ids, source, tokenizer)
        yield source, ids


def without_memory(base: Base, module: KnowledgeModule, where: str) -> KnowledgeModule:
    """The same module, which carries no text."""
    tensors = {name: t for name, t in module.state_dict().items() if not name.startswith("memory.")}
    return type(module).restore(base, module.config.model_copy(update={"recall": False}), tensors, where)


@dataclass
class Sample:
    """What is known of held-out tokens.

    Attributes:
        losses: (n,) the model's.
        said: (n, j) probabilities that the levels give them.
        features, there: (n, j, f) and (n, j) bool, as `Recalled` has them.
        passages: (n,) which each is of.
    """

    losses: Tensor
    said: Tensor
    features: Tensor
    there: Tensor
    passages: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, modules: ModuleSet, memory: Memory, passages: Sequence[text_data.Passage], number: int = 0) -> Sample:
        """What modules and memory say of passages, which are counted from `number` on."""
        ids, scored = pad_right([p.tokens for p in passages], modules.base.device)
        if (masks := text_data.masks_of(passages)) is not None:
            scored = scored & pad_right([[int(c) for c in m] for m in masks], modules.base.device)[0].bool()
        scored, labels = scored[:, 1:], ids[:, 1:]
        hidden = modules.hidden(ids[:, :-1])[scored]
        contexts, labels = Contexts.of(ids[:, :-1], ids.shape[1] - 1)[scored], labels[scored]
        rows = torch.arange(number, number + len(passages), device=ids.device)[:, None].expand_as(scored)[scored]
        parts = []
        for at in range(0, len(labels), 512):
            some = slice(at, at + 512)
            own = modules.project(hidden[some]).float().log_softmax(-1)
            found = memory.recalled(own, contexts[some])
            losses = -own.gather(1, labels[some, None])[:, 0]
            there = found.masses.sum(-1) > 0
            parts.append(cls(losses, found.probability(labels[some]), found.features, there, rows[some]))
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        names = ("losses", "said", "features", "there", "passages")
        return cls(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names))

    def where(self, chosen: Tensor) -> Sample:
        return Sample(*(getattr(self, f)[chosen] for f in ("losses", "said", "features", "there", "passages")))

    def mixture(self, gates: Tensor) -> Tensor:
        """Losses (n,) with gates (j, f)."""
        scores = (self.features * gates).sum(-1).masked_fill(~self.there, -math.inf)
        weights = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1).log_softmax(-1)
        return mixture_losses(self.losses, self.said, weights)


def best(sample: Sample) -> tuple[Fitted, Tensor | None]:
    """How the gates were found, and the gates; None where the text adds nothing."""
    before, n, start = float(sample.losses.mean()), len(sample.losses), typical_gates()
    if len(sample.passages.unique()) < 2:  # pieces of the only one
        sample = replace(sample, passages=torch.arange(n) * _FOLDS // max(n, 1))
    numbers = sample.passages.unique()
    folds = min(_FOLDS, len(numbers))
    nothing = Fitted(None, n, before, before, 0.0)
    if folds < 2:
        return nothing, None
    tried = []
    for penalty in _PENALTIES if n >= _FEW else _PENALTIES[2:]:
        losses = torch.empty_like(sample.losses)
        for fold in range(folds):
            out = torch.isin(sample.passages, numbers[fold::folds])
            losses[out] = sample.where(out).mixture(fit(sample.where(~out), penalty / n, start)).detach()
        gain = sample.losses - losses
        # Tokens of one passage depend on each other.
        each = torch.zeros(int(numbers.max()) + 1).index_add_(0, sample.passages, gain - gain.mean())
        error = float(each.square().sum().sqrt()) / n
        tried.append(Fitted(penalty, n, before, float(losses.mean()), error))
    found = min(tried, key=lambda found: found.after)
    least = found.error if n >= _FEW else -found.error
    if not found.before - found.after > least:  # or it became no number
        return replace(nothing, error=found.error), None
    assert found.penalty is not None
    return found, fit(sample, found.penalty / n, start)


def typical_gates() -> Tensor:
    """Gates (j, f) as texts of many domains and sizes want them, from which those of a text begin."""
    return torch.tensor(_TYPICAL)


def fit(sample: Sample, penalty: float, start: Tensor) -> Tensor:
    """Gates (j, f) with the lowest loss, not far from where they begin.

    Args:
        penalty: on the squares of how far, beside nats a token.
    """
    gates = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([gates], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = sample.mixture(gates).mean() + penalty * (gates - start).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return gates.detach()
