"""Request: one prompt on its way to an answer, and all that belongs to it alone. Knows no other request."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from growlm.base.rooms import TextCache
from growlm.engine.answers import Answer
from growlm.engine.drafting import Drafter
from growlm.engine.mixing import Posterior
from growlm.engine.sampling import Sampler, SamplingConfig, TokenLogprob
from growlm.router import Route

if TYPE_CHECKING:
    from growlm.engine.resident import Resident
    from growlm.modules import ModuleSet

Names = tuple[str, ...]  # the modules that are active for a request, in their order; none for the base

_arrivals = itertools.count()


class State(enum.Enum):
    WAITING = enum.auto()  # for a place, or where its modules are known, for room for them
    ROUTING = enum.auto()  # the base reads the prompt as far as the router needs
    LOADING = enum.auto()  # its modules are being read, while the base reads the prompt up to where they branch off
    RUNNING = enum.auto()  # its modules read the prompt, and then what they write
    FINISHED = enum.auto()


@dataclass(eq=False)
class Branch:
    """A request's text under one module set: one, or as many as write it together.

    Attributes:
        cache: keys and values of what it has read.
        level: the base layer before which it takes over what the base has read; 0 where it reads from the beginning.
        newest: (n, d) states, behind the last layer, of the newest token that was read, and of drafts after it.
    """

    modules: ModuleSet
    cache: TextCache
    level: int = 0
    newest: Tensor | None = None


@dataclass(eq=False)
class Request:
    """One prompt.

    Attributes:
        tokens: the prompt's ids.
        names: its modules; None as long as the router has not chosen.
        salt: keys and values of its text serve texts with the same one alone.
        mix: how many of the router's choices write together.
        reroute: after how many tokens each the router chooses anew; 0: never.
        among: the modules that the router chooses among; None for all.
        context: of the caller: how settings are written in messages is part of it.
        reader: in place of an answer: is given the module set that reads the prompt and the states (n, d) behind its
            last layer; what it returns is the result.
        call: in place of an answer: is given the module set, once its modules are in memory; what it returns is the
            result. Nothing is read.
        only_routes: ends once the router has chosen.
        looks: the module that the router chooses must read the prompt better than the base, or else none does.
        sampler: what chooses its tokens.
        drafter, drafts: what may come next, and is read with the newest token.
        followers: requests of the same prompt, which begin once this one writes.
        arrival: which of all requests it is.
        state: see `State`.
        route: what the router said.
        together: with `mix`, the names of those that write together, `none` for the base.
        loads: its modules, pinned in memory, of which some may still be read from the disk; None where none is.
        loaded: those that were read from the disk for it.
        overtaken: how many later requests were admitted while it waited for room.
        cache: keys and values of what the base has read for it.
        level: the base layer before which all of the prompt has come.
        goal: the base layer to which the base reads the prompt now; None where the modules read.
        read: how many of its tokens were read on this way.
        states: inputs (1, n, d) of base layers, by layer, of the tokens that came there.
        stated: how many tokens, from the first, its branches take over from the base.
        branches: what runs, while RUNNING.
        mixture: how much each branch counts, where there are several.
        routed_at: how many tokens were written when the router chose last.
        changes: with `reroute`, every change of module: tokens written before it, and the module.
        prompt_logprobs: of the prompt's tokens that were read, but the first, where they are asked for.
        resident: bytes of all weights in memory, at the most.
        hidden: for its reader, the states (n, d) of what was read.
        result, error: how it ended.
    """

    tokens: list[int]
    names: Names | None
    config: SamplingConfig
    answer: Answer
    salt: str = ""
    mix: int = 1
    reroute: int = 0
    among: frozenset[str] | None = None
    context: Context = field(default_factory=copy_context)
    reader: Callable[[ModuleSet, Tensor], Any] | None = None
    call: Callable[[ModuleSet], Any] | None = None
    only_routes: bool = False
    looks: bool = False
    sampler: Sampler | None = None
    followers: list[Request] = field(default_factory=list)
    drafter: Drafter = field(default_factory=Drafter)
    drafts: list[int] = field(default_factory=list)
    arrival: int = field(default_factory=lambda: next(_arrivals))
    state: State = State.WAITING
    route: Route = field(default_factory=lambda: Route(None, {}))
    together: list[str] = field(default_factory=list)
    loads: dict[str, Resident] | None = None
    loaded: list[str] = field(default_factory=list)
    overtaken: int = 0
    cache: TextCache | None = None
    level: int = 0
    goal: int | None = None
    read: int = 0
    states: dict[int, list[Tensor]] = field(default_factory=dict)
    stated: int = 0
    branches: list[Branch] = field(default_factory=list)
    mixture: Posterior | None = None
    routed_at: int = 0
    changes: list[tuple[int, str | None]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    resident: int = 0
    hidden: list[Tensor] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None

    @property
    def text(self) -> list[int]:
        """The prompt and what was written after it."""
        return [*self.tokens, *self.answer.tokens]

    @property
    def unread(self) -> int:
        """How many tokens it can read now."""
        if self.state is State.RUNNING:
            return (self.stated if self.read < self.stated else self._length) - self.read
        return self._length - self.read if self.goal is not None else 0

    @property
    def _length(self) -> int:
        return len(self.tokens) + len(self.answer.tokens)

    @property
    def arrived(self) -> bool:
        """Whether its modules are in memory, and the base reads nothing for it any more."""
        return (
            self.state is State.LOADING
            and self.goal is None
            and self.loads is not None
            and all(load.read for load in self.loads.values())
        )

    @property
    def here(self) -> bool:
        """Whether all weights of its modules are where they are used."""
        return all(load.here for load in (self.loads or {}).values())

    def take_back(self, tokens: int) -> None:
        """Its newest so many tokens were drafts that did not come true."""
        self.read -= tokens
        for branch in self.branches:
            branch.cache.take_back(tokens)
        for parts in self.states.values() if tokens else ():
            parts[-1] = parts[-1][:, :-tokens]

    def ids(self, start: int, count: int) -> list[int]:
        """Of the prompt and what was written after it."""
        behind = max(start - len(self.tokens), 0), max(start + count - len(self.tokens), 0)
        return [*self.tokens[start : start + count], *self.answer.tokens[slice(*behind)]]

    def rest(self) -> None:
        """The base has read all of the prompt up to `goal`."""
        assert self.goal is not None
        self.level, self.goal, self.read = self.goal, None, 0

    def begin(self, read: int = 0) -> None:
        """Its branches read from now on, after keys and values of `read` tokens, or what the base has read."""
        self.state, self.read, self.goal = State.RUNNING, read, None
        levels = {branch.level for branch in self.branches} - {0}
        self.stated = max((sum(part.shape[1] for part in self.states[level]) for level in levels), default=0)

    def states_of(self, layer: int) -> Tensor:
        """The inputs (1, n, d) of a base layer."""
        if len(self.states[layer]) > 1:
            self.states[layer] = [torch.cat(self.states[layer], dim=1)]
        return self.states[layer][0]

    def whole_states(self, tokens: int) -> dict[int, Tensor]:
        """The inputs (1, n, d) of those base layers of which they were kept of all these tokens: not of one that the
        router knows now and did not when it began to be read, or the other way round."""
        counts = {layer: sum(part.shape[1] for part in parts) for layer, parts in self.states.items()}
        return {layer: self.states_of(layer) for layer, count in counts.items() if count == tokens}

    def give_up(self) -> None:
        """Lets go of what the base has read for it, which can be read again."""
        if self.cache is not None:
            self.cache.free()
        self.cache, self.level, self.goal = None, 0, None
        self.states.clear()

    def let_go(self) -> list[Resident]:
        """Gives up its modules and all that was made with them; returns those that it held."""
        held = list((self.loads or {}).values())
        for branch in self.branches:
            branch.cache.free()
        self.branches, self.loads = [], None
        return held

    def drop(self) -> list[Resident]:
        """Gives up all that takes memory, as `let_go` does."""
        self.give_up()
        self.mixture = self.reader = self.call = None
        self.hidden.clear()
        return self.let_go()
