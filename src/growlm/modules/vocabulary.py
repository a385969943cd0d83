"""Vocabulary rows: a module's own rows of the output head and of the input embedding, for a chosen set of tokens.

A row is held as its difference from the base's row. A difference of zero leaves the base's logits and embeddings
bit-equal, whatever the matrix library does with shapes, and it keeps its precision in bfloat16. Of several modules that
are active together each adds its differences: where two have rows for a token, both count.
Knows the base's head and embedding, nothing of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growlm.base import Base
from growlm.errors import IntegrityError

# b batch, t tokens, d hidden size, v vocabulary, r rows held


class HeadRows(nn.Module):
    """Own rows of the output head: their difference from the base's changes the logits of `ids`.

    Args:
        ids: (r,) token ids, ascending, int64.
        rows: (r, d).
    """

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.rows = nn.Parameter(rows, requires_grad=rows.dtype.is_floating_point)

    def add_to(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Logits (b, t, v) of the base, uncapped, plus this module's part, from hidden (b, t, d) after the norm."""
        own = nn.functional.linear(hidden, self.rows)
        if len(self.ids) == logits.shape[-1]:
            return logits + own
        return logits.scatter_add(-1, self.ids.expand(*own.shape[:-1], -1), own)

    def merged(self, weight: Tensor) -> Tensor:
        """A copy of the head's weight (v, d) with these rows in it, in the rows' dtype."""
        return _merge(weight, self.ids, self.rows)


class InputRows(nn.Module):
    """Own rows of the input embedding, for `ids` (r,), as differences (r, d) from the base's rows."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.rows = nn.Parameter(rows, requires_grad=rows.dtype.is_floating_point)

    def add_to(self, hidden: Tensor, input_ids: Tensor, scale: float) -> Tensor:
        """The base's embeddings (b, t, d) of `input_ids` (b, t), plus this module's part."""
        row = torch.searchsorted(self.ids, input_ids.contiguous()).clamp_(max=len(self.ids) - 1)
        mine = (self.ids[row] == input_ids)[..., None]
        own = nn.functional.embedding(row, self.rows) * scale
        return hidden + torch.where(mine, own, own.new_zeros(())).to(hidden.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return _merge(weight, self.ids, self.rows)


class JoinedHeadRows(nn.Module):
    """The head's rows of several modules. None is copied: what is in memory stays what the modules take."""

    def __init__(self, parts: Sequence[HeadRows]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    @property
    def ids(self) -> Tensor:
        """(r,) tokens that any of them has a row for, ascending."""
        return torch.cat([part.ids for part in self.parts]).unique()

    @property
    def rows(self) -> Tensor:
        """(r, d) the sums of their differences, made anew every time."""
        ids, first = self.ids, self.parts[0].rows
        total = first.new_zeros(len(ids), first.shape[1])
        for part in self.parts:
            total = total.index_add(0, torch.searchsorted(ids, part.ids), part.rows)
        return total

    def add_to(self, logits: Tensor, hidden: Tensor) -> Tensor:
        for part in self.parts:
            logits = part.add_to(logits, hidden)
        return logits

    def merged(self, weight: Tensor) -> Tensor:
        return _merge(weight, self.ids, self.rows)


class JoinedInputRows(nn.Module):
    """The input embedding's rows of several modules."""

    def __init__(self, parts: Sequence[InputRows]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def add_to(self, hidden: Tensor, input_ids: Tensor, scale: float) -> Tensor:
        for part in self.parts:
            hidden = part.add_to(hidden, input_ids, scale)
        return hidden


class VocabularyRows(nn.Module):
    """The rows that a module carries: of the head, of the input, of both or of neither."""

    def __init__(
        self,
        head: HeadRows | JoinedHeadRows | None = None,
        input: InputRows | JoinedInputRows | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.input = input

    @classmethod
    def create(cls, base: Base, vocabulary: str, ids: Tensor | None) -> VocabularyRows:
        """Rows that change nothing yet (all differences zero), for `ids` (r,)."""
        if vocabulary == "none" or ids is None or len(ids) == 0:
            return cls()
        ids = ids.to(torch.int64).unique()

        def zeros() -> Tensor:
            return torch.zeros(len(ids), base.hidden_size)

        own_input = InputRows(ids.clone(), zeros()) if vocabulary == "both" else None
        return cls(HeadRows(ids, zeros()), own_input)

    @classmethod
    def joined(cls, several: Sequence[VocabularyRows]) -> VocabularyRows:
        """What modules with these rows have when they are active together, added in this order."""
        heads = [rows.head for rows in several if isinstance(rows.head, HeadRows)]
        inputs = [rows.input for rows in several if isinstance(rows.input, InputRows)]
        return cls(
            JoinedHeadRows(heads) if len(heads) > 1 else next(iter(heads), None),
            JoinedInputRows(inputs) if len(inputs) > 1 else next(iter(inputs), None),
        )

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], base: Base, where: str) -> VocabularyRows:
        """Rows from saved tensors, named as `state_dict` names them; takes its own out of `tensors`.

        Raises:
            IntegrityError: tensors that do not fit the base or one another.
        """
        parts: dict[str, Any] = {"head": None, "input": None}
        for name, kind in (("head", HeadRows), ("input", InputRows)):
            ids, rows = tensors.pop(f"{name}.ids", None), tensors.pop(f"{name}.rows", None)
            if ids is None and rows is None:
                continue
            if (
                ids is None
                or rows is None
                or ids.ndim != 1
                or rows.shape != (len(ids), base.hidden_size)
                or not _known(ids, base)
            ):
                raise IntegrityError(f"{where}: its {name} rows do not fit the base; learn the module again")
            parts[name] = kind(ids, rows)
        return cls(**parts)

    def embed(self, base: Base, hidden: Tensor, input_ids: Tensor) -> Tensor:
        if self.input is None:
            return hidden
        return self.input.add_to(hidden, input_ids, base.embedding_scale)

    def logits(self, base: Base, hidden: Tensor) -> Tensor:
        """Logits (b, t, v), capped, from hidden states (b, t, d) after the final norm."""
        return self.finish(base, base.head(hidden), hidden)

    def finish(self, base: Base, plain: Tensor, hidden: Tensor) -> Tensor:
        """The same where the base's head has made `plain` (b, t, v) of it already."""
        return base.cap(plain if self.head is None else self.head.add_to(plain, hidden))


def choose_rows(loss_by_token: Tensor, count_by_token: Tensor, max_rows: int) -> Tensor:
    """Which tokens deserve rows of their own: those that the domain uses and the base does not know well.

    Args:
        loss_by_token: (v,) the base's log-loss in nats, summed over a sample's occurrences of each token.
        count_by_token: (v,) occurrences in the domain's text; a token that never occurs gets no row.
        max_rows: the row budget.

    Returns:
        Ascending ids, at most `max_rows` of them. Ordered by lost nats; where the sample is silent, by count.
    """
    used = count_by_token > 0
    # The sample's mean loss stands in for tokens that it did not see.
    mean = loss_by_token.sum() / max(float(loss_by_token.count_nonzero()), 1.0)
    rank = loss_by_token + 1e-6 * (mean if mean > 0 else 1.0) * count_by_token
    order = torch.argsort(rank.masked_fill(~used, -1.0), descending=True, stable=True)
    return order[: min(max_rows, int(used.sum()))].sort().values


def _known(ids: Tensor, base: Base) -> bool:
    if ids.dtype != torch.int64 or len(ids) == 0:
        return False
    return bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < base.vocab_size


def _merge(weight: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    merged = weight.to(rows.dtype, copy=True)
    return merged.index_add(0, ids, rows)
