"""Reading: how far the base reads a prompt, what that comes to, and what of it need not be read again.

Knows requests and what is kept of texts; runs nothing and chooses no module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from growlm.engine.account import Footprint
from growlm.engine.kv import BASE
from growlm.engine.parts import Parts
from growlm.engine.request import Names, Request
from growlm.router import NONE

if TYPE_CHECKING:
    from growlm.store import StoredModule


class Reading:
    """Of one engine."""

    def __init__(self, parts: Parts) -> None:
        self._base, self._modules, self._routing = parts.base, parts.modules, parts.routing
        self._prefixes, self._account, self._rooms = parts.prefixes, parts.account, parts.rooms

    def footprint(self, request: Request) -> Footprint:
        """What a request comes to while it is routed, or where its modules are known, from then on."""
        states = self.num_kept
        if self._reads_nothing(request):
            return Footprint(0, 0)
        if request.names is None:
            return Footprint(len(request.text), self._routing.layer, states)
        tokens, slots = len(request.tokens) + request.config.max_new_tokens, self._base.num_layers
        found = self._stored(request, request.names)
        slots += max((stored.shape()[1].new_layers for stored in found), default=0)
        return Footprint(tokens, slots, states, max(request.mix, 1))

    @property
    def num_kept(self) -> int:
        """Of how many layers the inputs are kept."""
        return len(self.kept(self._base.num_layers))

    def goal_of(self, request: Request) -> int:
        """The layer to which the base reads a prompt, whatever becomes of it there."""
        if self._reads_nothing(request):
            return 0
        if request.names is None:
            return self._routing.layer
        if request.mix > 1:
            return max(self._fork_of(request, (name,) if name != NONE else ()) for name in request.together)
        return self._fork_of(request, request.names)

    def kept(self, goal: int) -> set[int]:
        """Layers, up to one, of which inputs are kept: where the router reads and where modules branch off."""
        return {at for at in (*self._routing.fork_layers, self._routing.layer, goal) if 0 < at <= goal}

    def begin(self, request: Request) -> None:
        """Has the base read a prompt as far as the router needs, or up to where its modules branch off, while they are
        loaded; what was read before of a text that begins like it is not read again."""
        goal = self.goal_of(request)
        if not goal:
            request.give_up()
        if goal <= request.level:
            return
        request.goal, request.read = goal, 0
        request.cache = request.cache or self._rooms.new()
        if self._account.bounded:  # to have its place from now on
            request.cache.reserve(self.footprint(request).tokens)
        slots, layers = range(request.level, goal), self.kept(goal) - self.kept(request.level)
        found = self._prefixes.find(BASE, request.text, slots, layers, salt=request.salt)
        if found.tokens:
            request.cache.reserve(found.tokens)
            found.fill(request.cache, slots)
            request.states |= {layer: [found.states(layer)] for layer in layers}
            request.read = found.tokens

    def end(self, request: Request) -> dict[int, Tensor]:
        """The base has read a prompt as far as it should, which is kept for texts that begin like it; returns the
        inputs (1, n, d) of layers that were kept of it."""
        assert request.cache is not None
        assert request.goal is not None
        states = request.whole_states(request.read)
        self._prefixes.put(BASE, request.text, request.cache, range(request.goal), states, salt=request.salt)
        return states

    def read_before(self, request: Request) -> int:
        """How many tokens of a prompt its modules need not read any more, of which keys and values are filled in."""
        if len(request.branches) > 1:
            return 0
        (branch,) = request.branches
        if request.reroute and branch.modules.fork == self._base.num_layers:  # the next module takes over its states
            return 0
        slots = range(branch.modules.fork, branch.modules.cache_slots)
        if request.config.prompt_logprobs is not None or request.reader is not None:  # all of it is wanted
            return 0
        if branch.level < branch.modules.fork:  # what lies between was not read for it
            return 0
        if not slots:
            return len(request.text) - 1
        found = self._prefixes.find(branch.modules.digest, request.text, slots, salt=request.salt)
        if found.tokens:
            branch.cache.reserve(found.tokens)
            found.fill(branch.cache, slots)
        return found.tokens

    def keep(self, request: Request) -> None:
        """Keeps the keys and values of what a request has read, for texts that begin like it."""
        if request.mix > 1:
            return
        (branch,), text = request.branches, request.text[: request.read]
        modules = branch.modules
        if modules.fork:
            states = request.whole_states(request.read)
            self._prefixes.put(BASE, text, branch.cache, range(modules.fork), states, salt=request.salt)
        if modules.fork < modules.cache_slots and not (request.reroute and modules.fork == self._base.num_layers):
            slots = range(modules.fork, modules.cache_slots)
            self._prefixes.put(modules.digest, text, branch.cache, slots, salt=request.salt)

    def _reads_nothing(self, request: Request) -> bool:
        """Whether all that it needs is that its modules are there."""
        return request.call is not None or (request.only_routes and request.names is not None)

    def _fork_of(self, request: Request, names: Names) -> int:
        """The layer up to which the base reads for these modules."""
        forks = (stored.fork_on(self._base.num_layers) for stored in self._stored(request, names))
        return min(forks, default=self._base.num_layers)

    def _stored(self, request: Request, names: Names) -> list[StoredModule]:
        """The versions that a request holds, or else is going to be given."""
        held = request.loads or {}
        return [(held[name].found if name in held else self._modules.found(name)).stored for name in names]
