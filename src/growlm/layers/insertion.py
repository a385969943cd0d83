"""New experts beside frozen ones (ModuleFormer, section 4.3; equation 9).

A frozen layer's router scores tokens with `A . act(B x)`; new experts bring rows A' and are chosen from `[A ; A']` in
one softmax. A, B and the old experts are read, never changed. Any number of sets of new experts can stand beside the
same layer; those that have not been opened are not there, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from growlm.layers.around import Around
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.grouped import Dispatch, GroupedLinear, grouped_product
from growlm.layers.routing import ExpertRouter, Routing

# n tokens, d hidden size, e experts, k of a token, f width of an expert, z width of the router


class NewExperts(nn.Module):
    """Experts for a layer that has some: rows of its router, and both their linear maps.

    Attributes:
        opened: whether they are chosen at all; a new set is not, so that it changes nothing before it is trained.
    """

    opened: Tensor

    def __init__(self, router: ExpertRouter, first: GroupedLinear, second: GroupedLinear, num_experts: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_experts, router.embeddings.shape[1]))
        self.first = GroupedLinear(num_experts, *first.weight.shape[1:])
        self.second = GroupedLinear(num_experts, *second.weight.shape[1:])
        # The length of such a router's rows means nothing.
        self.compares_directions = router.kind == "cosine"
        self.register_buffer("opened", torch.zeros((), dtype=torch.bool))
        # Half the spread of the old rows: chosen now and then from the start, yet not at once everywhere.
        nn.init.normal_(self.embeddings, std=0.5 * router.embeddings.shape[1] ** -0.5)

    def enable_new_experts(self) -> None:
        self.opened.fill_(True)


class _Union(nn.Module):
    """The router of a layer with experts and of the new ones beside it, and products over all of them.

    The frozen parts are held outside of `nn.Module`'s registry: they are not this module's to train, save or move.
    """

    def __init__(self, frozen: SparseFeedForward | AttentionExperts, new: Sequence[NewExperts]) -> None:
        super().__init__()
        self._frozen = (frozen,)
        self._new = tuple(new)

    @property
    def bias(self) -> Tensor | None:
        return self._frozen[0].bias

    @property
    def num_experts(self) -> int:
        """Old and open new ones."""
        return self._frozen[0].router.num_experts + self.num_new

    @property
    def num_new(self) -> int:
        """Open new ones; they come last."""
        return sum(len(part.embeddings) for part in self._open())

    def router(self, tokens: Tensor) -> Routing:
        """Routes tokens (n, d) among all experts that are open; old ones come first."""
        router = self._frozen[0].router
        features = router.features(tokens)
        logits = [router.logits(features)]
        logits += [router.logits(features, part.embeddings) for part in self._open()]
        return router.choose(torch.cat(logits, -1) if len(logits) > 1 else logits[0])

    def dispatch(self, routing: Routing) -> Dispatch:
        return Dispatch.of(routing.experts, routing.logits.shape[-1])

    def product(self, rows: Tensor, which: str, dispatch: Dispatch) -> Tensor:
        """The linear map `first` or `second` of every sorted row's expert. Old and new experts' rows lie one behind the
        other, so that no weights are copied together; where they part is read back from the device."""
        frozen = self._frozen[0]
        names = ("up", "down") if isinstance(frozen, SparseFeedForward) else ("query", "output")
        weights = [getattr(frozen, names[which == "second"]).weight]
        weights += [getattr(part, which).weight for part in self._open()]
        if len(weights) == 1:
            return grouped_product(rows, weights[0], dispatch.ends)
        found, expert, start = [], 0, 0
        for weight in weights:
            ends = dispatch.ends[expert : expert + len(weight)]
            stop = int(ends[-1])
            if stop > start:
                found.append(grouped_product(rows[start:stop], weight, ends - start))
            expert, start = expert + len(weight), stop
        return torch.cat(found)

    def _open(self) -> list[NewExperts]:
        return [part for part in self._new if bool(part.opened)]


class FeedForwardUnion(_Union):
    """Called as the `SparseFeedForward` that it stands for."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Routing]:
        frozen = self._frozen[0]
        assert isinstance(frozen, SparseFeedForward)
        tokens = hidden.flatten(0, -2)
        routing = self.router(tokens)
        dispatch = self.dispatch(routing)
        inner = frozen.activate(self.product(dispatch.spread(tokens), "first", dispatch))
        out = dispatch.combine(self.product(inner, "second", dispatch), routing.gates)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(hidden.shape).to(hidden.dtype), routing


class AttentionUnion(_Union):
    """Asked as the `AttentionExperts` that it stands for."""

    def queries(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Dispatch]:
        dispatch = self.dispatch(routing)
        return dispatch.unsort(self.product(dispatch.spread(tokens), "first", dispatch)), dispatch

    def outputs(self, heads: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
        out = dispatch.combine(self.product(dispatch.sort(heads), "second", dispatch), routing.gates)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Beside(Around):
    """A dense feed-forward, always on, plus routed experts: `frozen(x) + sum over new of new(x)`."""

    def __init__(self, frozen: nn.Module, new: Sequence[SparseFeedForward]) -> None:
        super().__init__()
        self._frozen, self.new = (frozen,), tuple(new)

    @property
    def frozen(self) -> nn.Module:
        return self._frozen[0]

    def finish(self, hidden: Tensor, plain: Tensor | None) -> Tensor:
        assert plain is not None
        for part in self.new:
            plain = plain + part(hidden)[0]
        return plain
