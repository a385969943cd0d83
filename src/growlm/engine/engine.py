"""Engine: prompts in, answers out, under a budget of bytes.

Ties together a store, its base and router, what is in memory, and the loop that answers; what can be asked of it in
Python is here, how it is answered in `loop.py`. Knows a module's fork, never its kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from growlm.base.placement import find_device
from growlm.data import start_tokens
from growlm.engine.account import Account
from growlm.engine.answers import Answer, Generation
from growlm.engine.asking import Asking, sampling_of
from growlm.engine.budget import Budget
from growlm.engine.drafting import MOST as MOST_DRAFTS
from growlm.engine.grammar import Grammars
from growlm.engine.host_tier import HostTier
from growlm.engine.kv import PrefixCache
from growlm.engine.loading import Loader
from growlm.engine.loop import Loop
from growlm.engine.module_cache import ModuleCache
from growlm.engine.parts import Parts
from growlm.engine.prompts import Prompt, Prompts
from growlm.engine.reloading import Changes, Reloading
from growlm.engine.request import Request, State
from growlm.engine.routing import Routing
from growlm.engine.runner import slot_bytes
from growlm.engine.sampling import SamplingConfig
from growlm.engine.scheduler import MOST_TOKENS
from growlm.engine.second_look import AT_A_TIME
from growlm.engine.selection import AUTO, Wanted
from growlm.engine.sources import Quote, quotes
from growlm.engine.workspace import row_bytes, workspace_bytes
from growlm.errors import ConfigError, setting
from growlm.layers.slabs import Slabs
from growlm.layers.tables import free_bytes
from growlm.layers.thin import allow_thin_products
from growlm.modules import ModuleSet
from growlm.progress import phase
from growlm.router import Route, Router, load_router
from growlm.store import Store
from growlm.units import format_size, parse_size

_LOOKED = 2  # rows of a pass that one of a second look takes: probabilities with and without what is recalled
_ROW_CACHE = "64MB"
_HOST_SHARE = 0.25  # of what is free
_ONE_TOKEN = SamplingConfig(max_new_tokens=1)  # of what is read and not answered


class Engine:
    """Runs prompts on a store's base with its modules.

    Args:
        store: what to serve.
        memory: budget for base, router, modules, keys and values, and what a pass takes besides, e.g. "2GB"; None for
            no bound. On a GPU it is the GPU's memory.
        max_batch: prompts that are run together.
        device: where to compute: cpu, cuda, cuda:N, mps, or auto: a CUDA GPU where there is one, else the processor.
            The dtype is the store's.
        idle: seconds after which a module that no answer uses is let go of, at the next step; None for never.
        prefix_bytes: at most so many bytes, of what `memory` leaves, keep keys and values of texts that were read, for
            those that begin like them, under whatever module; 0 keeps none.
        drafts: try answers of modules that recall as their text goes on, several tokens in one pass. What is answered
            stays the same.
        router: kind of router, gaussian, product-key or transformer; by default the store's own.
        experts_on: where the tables of `peer` modules are: memory, or disk: only the rows that a text reads are read.
        row_cache: of each such module on the disk, memory for the rows that were read last; by default 64MB.
        host_memory: of a GPU: main memory, e.g. "8GB", in which modules that leave the GPU stay, from which they come
            back without a read from the disk; by default a quarter of what is free, 0 for none.
        strict: refuse a prompt that with its answer is longer than what the base's positions were made for; else a
            `GrowlmWarning` says so.
        second_look: of a prompt that is routed, once and to one module, the module and the base read the newest 64
            tokens, and where the module predicts them no better the base answers; `route` says none of these.

    Raises:
        BudgetError: base and router do not fit the budget.
        ConfigError: a setting that cannot be, or a device that is not there.
        BaseModelError: the base is missing or has changed.
        StoreError: a store of modules whose transformer router was never trained.
    """

    def __init__(
        self,
        store: Store,
        *,
        memory: str | int | None = None,
        max_batch: int = 32,
        device: str | torch.device | None = "auto",
        idle: float | None = None,
        prefix_bytes: str | int = "256MB",
        drafts: bool = True,
        router: str | None = None,
        experts_on: str = "memory",
        row_cache: str | int | None = None,
        host_memory: str | int | None = None,
        strict: bool = False,
        second_look: bool = False,
    ) -> None:
        if experts_on not in ("memory", "disk"):
            raise ConfigError(f"{setting('experts_on')} is {experts_on!r}, expected memory or disk")
        if row_cache is not None and experts_on == "memory":
            raise ConfigError(
                f"{setting('row_cache')} is for tables on the disk; use it with {setting('experts_on')} disk"
            )
        rows = parse_size(_ROW_CACHE if row_cache is None else row_cache, "row_cache")
        self._row_cache = rows if experts_on == "disk" else None
        if idle is not None and not (isinstance(idle, int | float) and idle >= 0):
            raise ConfigError(f"{setting('idle')} is {idle!r}; it must be at least 0 seconds")
        if max_batch < 1:
            raise ConfigError(f"{setting('max_batch')} is {max_batch}; it must be at least 1")
        found = find_device(device)
        self.store = store
        self.memory = None if memory is None else parse_size(memory, "memory")
        self.max_batch = max_batch
        unbound = load_router(store, kind=router)
        self._budget = Budget(self.memory, store.base_bytes())
        self._budget.require(unbound.num_bytes())
        self.base = store.load_base(device=found)
        self._routing = Routing(store, self.base, router)
        self._routing.exchange({None: self._routing.bound(unbound)})
        allow_thin_products(self.base.model)
        self._budget.base = self.base_bytes = self.base.num_bytes()
        self._budget.require(self._routing.num_bytes())
        self.tokenizer = store.load_tokenizer()
        self._prompts = Prompts(self.base, self.tokenizer, strict=strict)
        ends = self.base.end_tokens(self.tokenizer)
        grammars = Grammars(self.tokenizer, self.base.vocab_size, ends)
        if self.memory is not None:
            logits = max(max_batch + MOST_DRAFTS, _LOOKED * AT_A_TIME if second_look else 0)
            self._budget.workspace = workspace_bytes(self.base, MOST_TOKENS, logits)
            self._budget.require(self._routing.num_bytes())
        left = self._budget.left(self._routing.num_bytes())
        token = [] if left is None else slot_bytes(self.base)
        self._account = Account(left, token, self.base.hidden_size * self.base.dtype.itemsize, row_bytes(self.base))
        self._prefixes, self._prefix_bytes = PrefixCache(self._room_for_prefixes), parse_size(prefix_bytes)
        self._slabs = Slabs(self._room_for_slabs)
        self._host = None if found.type != "cuda" else HostTier(found, _host_bytes(host_memory))
        self.modules = ModuleCache(
            left,
            Loader(store, self.base, self._row_cache, self._host).find,
            reserved=self._budget.spoken_for(self._routing.num_bytes()),
            hint="" if self._row_cache is None else f", or lower --row-cache, {format_size(self._row_cache)}",
            idle=idle,
            held=lambda: self._account.held_bytes,
            make_way=self._make_way,
        )
        parts = Parts(self.base, self.modules, self._routing, self._prefixes, self._account, self._slabs)
        self._loop = Loop(
            parts,
            max_batch=max_batch,
            drafts=drafts,
            make_way=self._make_way,
            resident=lambda: self.resident_bytes,
            start_tokens=len(start_tokens(self.tokenizer)),
            end_tokens=ends,
            where=str(store.path),
        )
        self._reloading = Reloading(store, parts, self._loop, self._budget, self._make_way)
        self._asking = Asking(
            store, self.base, self.tokenizer, self._prompts, grammars, self.modules, self._routing, self._reloading,
            second_look=second_look,
        )  # fmt: skip

    # What is in memory

    @property
    def router(self) -> Router:
        """What chooses, among all modules that are there."""
        return self._routing.router

    @property
    def workspace_bytes(self) -> int:
        """Bytes that a pass takes at the most; 0 where there is no bound."""
        return self._budget.workspace

    @property
    def fixed_bytes(self) -> int:
        """Bytes of base and routers, which stay."""
        return self.base_bytes + self._routing.num_bytes()

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return self.fixed_bytes + self.modules.resident_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all that `memory` bounds: weights, keys and values of what is being answered, what is kept of texts,
        copies of weights that stand side by side, and what a pass takes (`workspace_bytes`, which is not known where
        there is no bound)."""
        kept = self._prefixes.num_bytes() + self._slabs.num_bytes()
        return self.resident_bytes + self.workspace_bytes + self._loop.num_bytes() + kept

    @property
    def host_bytes(self) -> int:
        """Bytes of main memory that keep modules for a GPU."""
        return 0 if self._host is None else self._host.num_bytes

    def _room_for_prefixes(self) -> int:
        left = self._account.left(self.modules.resident_bytes + self._slabs.num_bytes())
        return self._prefix_bytes if left is None else min(self._prefix_bytes, left)

    def _room_for_slabs(self) -> int | None:
        return self._account.left(self.modules.resident_bytes + self._prefixes.num_bytes())

    def _make_way(self) -> None:
        """Lets go of what is only kept where there is room, as far as there is none any more."""
        self._slabs.shrink()
        self._prefixes.shrink()

    def pin(self, module: str) -> None:
        """Brings a module into memory and keeps it there, whatever else comes, until `unpin`.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: it cannot fit beside what is in use.
            ClosedError: the engine was closed.
        """
        self._loop.require_open()
        self.store.module(module)
        self.modules.keep(module)

    def unpin(self, module: str) -> None:
        """A module that was pinned may be evicted again; one that was not stays as it is."""
        self.modules.let_go(module)

    def reload(self) -> Changes:
        """Serves the store as it is on the disk by now: the router knows modules that were learned since, and answers
        that begin from now on have the versions that are current. Those that have begun end on what they began with.
        While the new router is read, the old one is in memory too.

        Raises:
            BudgetError: the router has grown too large for what is pinned; all stays as it was.
            IntegrityError: a file of the router is damaged; all stays as it was.
            ClosedError: the engine was closed.
        """
        self._loop.require_open()
        return self._reloading.reload()

    def has_router(self, among: Collection[str]) -> bool:
        """Whether what is asked `among` these modules need not wait for a router."""
        return self._reloading.has_router(frozenset(among))

    def make_router(self, among: Collection[str]) -> None:
        """Makes the router of these modules alone, once there is room for it: what is then asked `among` them waits for
        nothing.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: there is no room for it.
        """
        self._asking.among(among)

    @property
    def outdated(self) -> bool:
        """Whether modules have come, changed or gone on the disk since the engine was made, or last reloaded."""
        return self._reloading.due()

    def close(self) -> None:
        """Ends the engine, once what is being answered has ended: a stream does at its next piece, with an error. What
        is asked later raises `ClosedError`. To close twice is no mistake."""
        self._loop.close()

    def __enter__(self) -> Engine:
        self._loop.require_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Answers

    def generate(
        self,
        prompt: Prompt,
        *,
        module: Wanted = AUTO,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> Generation:
        """Answers one prompt.

        Args:
            module: a module's name, or several names of modules that are active together; None for the base alone,
                or "auto" to let the router choose. The order of several names does not matter.
            salt: keys and values that are kept of this text serve texts with the same one alone.
            among: with "auto", modules that the router chooses among, as if the store held no others; a router of them
                is kept in memory. By default all.
            mix: let the best so many of the router's choices write together, weighted by how well each predicted the
                text so far. All of them must fit the budget at once.
            reroute: choose the module anew after every so many tokens; 0 chooses once.
            sampling: the fields of `SamplingConfig`, e.g. max_new_tokens=64, temperature=0.8.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: the modules do not fit the budget together.
            DataError: an empty prompt, or one that the base cannot read.
            ConfigError: modules that cannot be active together, `mix` of more modules than the router knows, `mix`,
                `reroute` and `module` at odds, or a prompt that is too long for the base.
            ClosedError: the engine was closed.
        """
        request = self._ask(prompt, module, sampling, salt=salt, among=among, mix=mix, reroute=reroute)
        return next(self._answers([request]))

    def stream(
        self,
        prompt: Prompt,
        *,
        module: Wanted = AUTO,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> Iterator[str | Generation]:
        """As `generate`, piece by piece: the answer's text as it is written, and at the end the `Generation`.

        Raises:
            As `generate`; and `ClosedError` from the iterator where the engine is closed before the answer has ended.
        """
        return self._pieces(
            self._ask(prompt, module, sampling, streams=True, salt=salt, among=among, mix=mix, reroute=reroute)
        )

    def _pieces(self, request: Request) -> Iterator[str | Generation]:
        self._loop.add([request])
        try:
            pieces, ended = request.answer.pieces, False
            while not ended:
                self._loop.require_open()
                self._loop.drive(lambda: bool(pieces) or request.state is State.FINISHED)
                ended = request.state is State.FINISHED  # before the last pieces are taken: none comes after it
                while pieces:
                    yield pieces.popleft()
                    if not ended:
                        self._loop.require_open()
            yield _result(request)
        finally:  # whoever reads no further needs no further tokens
            self._loop.cancel([request])

    def choices(
        self,
        prompt: Prompt,
        n: int,
        *,
        module: Wanted = AUTO,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> list[Generation]:
        """Several answers to one prompt, which is read once: drawn with `seed`, `seed` + 1, and so on.

        Args:
            n: how many; others as in `generate`.
        """
        first = self._ask(prompt, module, sampling, salt=salt, among=among, mix=mix, reroute=reroute)
        return list(self._answers(self._asking.several(first, n)))

    def generate_many(
        self, prompts: Sequence[Prompt], *, modules: Sequence[Wanted] | str | None = AUTO, **sampling: Any
    ) -> list[Generation]:
        """Answers many prompts, those whose modules are in memory first; the answers are in the prompts' order.

        Args:
            modules: one for all, or a list with one entry a prompt; each as `module` of `generate`.
        """
        self._loop.require_open()
        config = sampling_of(sampling)
        one = modules is None or isinstance(modules, str) or not isinstance(modules, Iterable)
        wanted: list[Any] = [modules for _ in prompts] if one else list(modules or ())
        if len(wanted) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(wanted)} modules; give one for all, or one a prompt")
        tokens = self._prompts.encode_all(prompts, config.max_new_tokens)
        choices = [self._asking.names(w) for w in wanted]
        requests = [self._asking.of_tokens(ids, names, config) for ids, names in zip(tokens, choices, strict=True)]
        with phase("answering", len(requests), "prompts") as answering:
            found = []
            for generation in self._answers(requests):
                found.append(generation)
                answering.advance()
        return found

    def submit(
        self,
        prompt: Prompt,
        *,
        module: Wanted = AUTO,
        stream: bool = False,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> Request:
        """Asks, and does not wait: the request's `result`, or `error`, is there once its `state` is FINISHED, after as
        many calls of `step` as it takes, by whomever. With `stream` its text comes in `answer.pieces`.

        Args:
            Others as in `generate`.

        Raises:
            As `generate`, as far as it is known before anything runs.
        """
        return self.submit_several(
            prompt, 1, module=module, stream=stream, salt=salt, among=among, mix=mix, reroute=reroute, **sampling
        )[0]

    def submit_several(
        self,
        prompt: Prompt,
        n: int,
        *,
        module: Wanted = AUTO,
        stream: bool = False,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> list[Request]:
        """As `submit` for several answers to one prompt, as `choices` gives them."""
        requests = self.requests(
            prompt, n, module=module, stream=stream, salt=salt, among=among, mix=mix, reroute=reroute, **sampling
        )
        self._loop.add([requests[0]])
        return requests

    def requests(
        self,
        prompt: Prompt,
        n: int = 1,
        *,
        module: Wanted = AUTO,
        stream: bool = False,
        salt: str = "",
        among: Collection[str] | None = None,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> list[Request]:
        """As `submit_several`, for another engine of the same store to answer: refused where this one would refuse
        them, and not asked for here."""
        first = self._ask(prompt, module, sampling, streams=stream, salt=salt, among=among, mix=mix, reroute=reroute)
        return self._asking.several(first, n)

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as it would be read.

        Raises:
            As `generate` of its prompt.
        """
        return self._prompts.encode(prompt)

    def require_room(self, text: str) -> None:
        """Refuses what is much too long to be read before it is turned into tokens.

        Raises:
            ConfigError: it is.
        """
        self._prompts.require_room(text)

    def submit_route(self, prompt: Prompt, *, salt: str = "", among: Collection[str] | None = None) -> Request:
        """As `submit` for `route`: the request's `route` is what the router says."""
        self._loop.require_open()
        tokens, answer, among = self.tokens_of(prompt), Answer(self.tokenizer, ()), self._asking.among(among)
        request = Request(
            tokens, None, _ONE_TOKEN, answer, salt=salt, among=among, only_routes=True, looks=self._asking.second_look
        )
        self._loop.add([request])
        return request

    def step(self) -> bool:
        """Moves on all that was asked by one step: a pass over one token of each answer and some of prompts that are
        read. Where modules are still being read and nothing else is to be done, it waits for a moment.

        Returns:
            Whether anything is left to do.
        """
        return self._loop.step()

    def cancel(self, request: Request) -> None:
        """Ends a request, if it has not ended, and gives back all that it holds, once the step that is running has
        ended."""
        self._loop.cancel([request])

    def route(self, prompt: Prompt, *, salt: str = "", among: Collection[str] | None = None) -> Route:
        """Which module the router would choose, and how sure it is of each.

        Args:
            salt, among: as in `generate`.

        Raises:
            As `generate` of its prompt.
        """
        request = self.submit_route(prompt, salt=salt, among=among)
        self._await(request)
        return request.route

    def sources(self, prompt: Prompt, answer: Generation) -> list[Quote]:
        """What of an answer stands in the texts of the modules that wrote it, and where: of those that recall. With
        `mix` and `reroute` of the module that the answer names.

        Args:
            prompt: that was answered.

        Raises:
            As `generate` of the prompt.
        """
        self._loop.require_open()
        tokens, written = self._prompts.encode(prompt, len(answer.tokens)), list(answer.tokens)
        # A text that ended the answer is no part of it.
        while written and len(self.tokenizer.decode(written[:-1], skip_special_tokens=True)) >= len(answer.text):
            written.pop()
        if not written:
            return []

        def read(modules: ModuleSet, hidden: Tensor) -> list[Quote]:
            return quotes(modules, self.tokenizer, tokens, written, hidden)

        text = [*tokens, *written[:-1]]
        return self._run(Request(text, tuple(answer.modules), _ONE_TOKEN, Answer(self.tokenizer, ()), reader=read))

    def logits(self, input_ids: Tensor, module: Wanted = None) -> Tensor:
        """Logits (batch, tokens, vocab) of `input_ids` (batch, tokens) under the modules that are named, as in
        `generate`; None is the base.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: the modules do not fit the budget together.
            ConfigError: modules that cannot be active together, none that is named, or more tokens than the base can
                read.
            DataError: what is no tensor of the base's token ids.
            ClosedError: the engine was closed.
        """
        self._loop.require_open()
        input_ids = self._prompts.batch(input_ids)
        names = self._asking.names(module)
        if names is None:
            raise ConfigError("logits are of modules that are named; ask route() for the router's choice")

        @torch.inference_mode()
        def logits(modules: ModuleSet) -> Tensor:
            return modules.logits(input_ids)

        return self._run(Request([], names, _ONE_TOKEN, Answer(self.tokenizer, ()), call=logits))

    # Inside

    def _ask(self, prompt: Prompt, module: Wanted, sampling: dict[str, Any], **asked: Any) -> Request:
        self._loop.require_open()
        return self._asking.request(prompt, module, sampling, depth=2, **asked)

    def _answers(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Asks for all of them and gives their answers in this order, each once it is there."""
        following = [other for request in requests for other in request.followers]
        self._loop.add([request for request in requests if request not in following])
        try:
            for request in requests:
                self._loop.drive(lambda request=request: request.state is State.FINISHED)  # type: ignore[misc]
                yield _result(request)
        finally:
            self._loop.cancel(requests)

    def _run(self, request: Request) -> Any:
        """
        Raises:
            What it ended with.
        """
        self._loop.add([request])
        return self._await(request)

    def _await(self, request: Request) -> Any:
        """
        Raises:
            What it ended with.
        """
        try:
            self._loop.drive(lambda: request.state is State.FINISHED)
        finally:
            self._loop.cancel([request])
        return _result(request)


def _host_bytes(given: str | int | None) -> int:
    if given is not None:
        return parse_size(given, "host_memory")
    return int((free_bytes(torch.device("cpu")) or 0) * _HOST_SHARE)


def _result(request: Request) -> Any:
    """
    Raises:
        What it ended with.
    """
    if request.error is not None:
        raise request.error
    return request.result
