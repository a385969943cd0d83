"""Engine: prompts in, answers out, under a budget of bytes. A loop of steps: schedule, run, postprocess.

Whoever waits for an answer makes steps, one at a time, and a step moves on all that is asked: no thread is needed.
Ties together the router, the module cache, the scheduler and the runner; knows a module's fork, never its kind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from growlm.base.placement import find_device
from growlm.base.rooms import Rooms
from growlm.engine.answers import Answer, Generation
from growlm.engine.kv import PrefixCache
from growlm.engine.loading import Loader
from growlm.engine.mixing import Posterior
from growlm.engine.module_cache import ModuleCache
from growlm.engine.prompts import Prompt, Prompts
from growlm.engine.request import Branch, Names, Request, State
from growlm.engine.runner import Runner, Work
from growlm.engine.sampling import SamplingConfig, sample
from growlm.engine.scheduler import Part, Scheduler
from growlm.engine.selection import AUTO, Wanted, require_one_way, select
from growlm.engine.sources import Quote, quotes
from growlm.errors import BudgetError, ClosedError, ConfigError, IntegrityError, setting
from growlm.layers.thin import allow_thin_products
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.scoring import label_losses
from growlm.progress import phase
from growlm.router import NONE, Route, load_router
from growlm.store import ROUTER_FITTED, Store
from growlm.units import format_size, parse_size

_ROW_CACHE = "64MB"
_PAUSE = 0.01  # seconds between two looks at what is being read, where nothing else is to be done
WINDOW = 128  # newest tokens that a choice is made anew from: a text may have passed into another domain


class Engine:
    """Runs prompts on a store's base with its modules.

    Args:
        store: what to serve.
        memory: budget for all weights in memory, e.g. "2GB"; None for no bound. Keys and values are not counted. On a
            GPU it is the GPU's memory.
        max_batch: prompts that are run together.
        device: where to compute: cpu, cuda, cuda:N, mps, or auto: a CUDA GPU where there is one, else the processor.
            The dtype is the store's.
        router: kind of router, gaussian, product-key or transformer; by default the store's own.
        experts_on: where the tables of `peer` modules are: memory, or disk: only the rows that a text reads are read.
        row_cache: of each such module on the disk, memory for the rows that were read last; by default 64MB.
        strict: refuse a prompt that with its answer is longer than what the base's positions were made for; else a
            `GrowlmWarning` says so.

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
        prefix_bytes: str | int = "256MB",
        router: str | None = None,
        experts_on: str = "memory",
        row_cache: str | int | None = None,
        strict: bool = False,
    ) -> None:
        if experts_on not in ("memory", "disk"):
            raise ConfigError(f"{setting('experts_on')} is {experts_on!r}, expected memory or disk")
        if row_cache is not None and experts_on == "memory":
            raise ConfigError(
                f"{setting('row_cache')} is for tables on the disk; use it with {setting('experts_on')} disk"
            )
        rows = parse_size(_ROW_CACHE if row_cache is None else row_cache, "row_cache")
        self._row_cache = rows if experts_on == "disk" else None
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
        found = find_device(device)
        self.store = store
        self.memory = None if memory is None else parse_size(memory, "memory")
        self.max_batch = max_batch
        self.router = load_router(store, kind=router)
        self._check_budget(store.base_bytes())
        self.base = store.load_base(device=found)
        self.router = self.router.bind(self.base)
        if max(self.router.fork_layers, default=0) > self.base.num_layers:  # else the base would be run to nowhere
            for name in self.router.names:
                store.module(name).fork_on(self.base.num_layers)
            raise IntegrityError(f"{store.router_path / ROUTER_FITTED}: is not of this store's modules; delete it")
        allow_thin_products(self.base.model)
        self.base_bytes = self.base.num_bytes()
        self._check_budget(self.base_bytes)
        self.tokenizer = store.load_tokenizer()
        self._prompts = Prompts(self.base, self.tokenizer, strict=strict)
        self._end_tokens = self.base.end_tokens(self.tokenizer)
        left = None if self.memory is None else self.memory - self.fixed_bytes
        self.modules = ModuleCache(
            left,
            Loader(store, self.base, self._row_cache).find,
            reserved=f" of {format_size(self.memory or 0)} after base {format_size(self.base_bytes)} and router "
            f"{format_size(self.router.num_bytes())}",
            hint="" if self._row_cache is None else f", or lower --row-cache, {format_size(self._row_cache)}",
        )
        self._prefixes = PrefixCache(parse_size(prefix_bytes))
        self._scheduler, self._runner, self._rooms = Scheduler(self.modules, max_batch), Runner(self.base), Rooms()
        self._base_alone = ModuleSet(self.base)
        self._sets: WeakValueDictionary[tuple[str, ...], ModuleSet] = WeakValueDictionary()  # those that are in use
        self._arriving: deque[Request] = deque()
        self._stepping = threading.Lock()  # held for a step, and by what must be alone
        self._pausing = 0  # how many want to be alone: nothing more is admitted
        self._closed = False

    # What is in memory

    @property
    def fixed_bytes(self) -> int:
        """Bytes of base and router, which stay."""
        return self.base_bytes + self.router.num_bytes()

    @property
    def resident_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return self.fixed_bytes + self.modules.resident_bytes

    def close(self) -> None:
        """Ends the engine, once what is being answered has ended: a stream does at its next piece, with an error. What
        is asked later raises `ClosedError`. To close twice is no mistake."""
        self._closed = True
        with self._stepping:
            self._refuse(lambda request: request.answer.streams or request.state is State.WAITING)
            while self._scheduler.active:
                self._step()
            self.modules.close()
            self._prefixes.clear()

    def __enter__(self) -> Engine:
        self._require_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Answers

    def generate(
        self,
        prompt: Prompt,
        *,
        module: Wanted = AUTO,
        reuse: bool = False,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> Generation:
        """Answers one prompt.

        Args:
            module: a module's name, or several names of modules that are active together; None for the base alone,
                or "auto" to let the router choose. The order of several names does not matter.
            reuse: keep keys and values for a prompt that continues this one and its answer (a conversation). They serve
                a prompt whose module is named; to choose one, the base must read the whole prompt.
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
        request = self._asked(prompt, module, reuse, mix, reroute, False, sampling)
        return next(self._answers([request]))

    def stream(
        self,
        prompt: Prompt,
        *,
        module: Wanted = AUTO,
        reuse: bool = False,
        mix: int = 1,
        reroute: int = 0,
        **sampling: Any,
    ) -> Iterator[str | Generation]:
        """As `generate`, piece by piece: the answer's text as it is written, and at the end the `Generation`.

        Raises:
            As `generate`; and `ClosedError` from the iterator where the engine is closed before the answer has ended.
        """
        return self._pieces(self._asked(prompt, module, reuse, mix, reroute, True, sampling))

    def _pieces(self, request: Request) -> Iterator[str | Generation]:
        self._arriving.append(request)
        try:
            pieces = request.answer.pieces
            while pieces or request.state is not State.FINISHED:
                self._require_open()
                if pieces:
                    yield pieces.popleft()
                else:
                    self._drive(lambda: bool(pieces) or request.state is State.FINISHED)
            yield _result(request)
        finally:  # whoever reads no further needs no further tokens
            self._cancel([request])

    def generate_many(
        self, prompts: Sequence[Prompt], *, modules: Sequence[Wanted] | str | None = AUTO, **sampling: Any
    ) -> list[Generation]:
        """Answers many prompts, grouped by modules; the answers are in the prompts' order.

        Args:
            modules: one for all, or a list with one entry a prompt; each as `module` of `generate`.
        """
        self._require_open()
        config = _sampling(sampling)
        one = modules is None or isinstance(modules, str) or not isinstance(modules, Iterable)
        wanted: list[Any] = [modules for _ in prompts] if one else list(modules or ())
        if len(wanted) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(wanted)} modules; give one for all, or one a prompt")
        tokens = self._prompts.encode_all(prompts, config.max_new_tokens)
        choices = [self._select(w) for w in wanted]
        requests = [
            Request(ids, names, config, Answer(self.tokenizer, config.stop))
            for ids, names in zip(tokens, choices, strict=True)
        ]
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
        reuse: bool = False,
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
        request = self._asked(prompt, module, reuse, mix, reroute, stream, sampling)
        self._arriving.append(request)
        return request

    def step(self) -> bool:
        """Moves on all that was asked by one step: a pass over one token of each answer and some of prompts that are
        read. Where modules are still being read and nothing else is to be done, it waits for a moment.

        Returns:
            Whether anything is left to do.
        """
        self._require_open()
        with self._stepping:
            self._step()
            return bool(self._arriving) or not self._scheduler.idle

    def cancel(self, request: Request) -> None:
        """Ends a request, if it has not ended, and gives back all that it holds, once the step that is running has
        ended."""
        self._cancel([request])

    def route(self, prompt: Prompt) -> Route:
        """Which module the router would choose, and how sure it is of each.

        Raises:
            As `generate` of its prompt.
        """
        self._require_open()
        tokens = self._prompts.encode(prompt)
        with self._alone():
            ids = torch.tensor(tokens, device=self.base.device)
            work = Work(self._base_alone, ids, 0, Rooms().new(), leaves=self._read_at)
            self._runner.run([work])
            return self._routes_of(_come_to(work))[0]

    def sources(self, prompt: Prompt, answer: Generation) -> list[Quote]:
        """What of an answer stands in the texts of the modules that wrote it, and where: of those that recall. With
        `mix` and `reroute` of the module that the answer names.

        Args:
            prompt: that was answered.

        Raises:
            As `generate` of the prompt.
        """
        self._require_open()
        tokens, written = self._prompts.encode(prompt, len(answer.tokens)), list(answer.tokens)
        # A text that ended the answer is no part of it.
        while written and len(self.tokenizer.decode(written[:-1], skip_special_tokens=True)) >= len(answer.text):
            written.pop()
        with self._alone(), self.modules.using(answer.modules) as held:
            return quotes(ModuleSet(self.base, list(held.values())), self.tokenizer, tokens, written)

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
        self._require_open()
        input_ids = self._prompts.batch(input_ids)
        names = self._select(module)
        if names is None:
            raise ConfigError("logits are of modules that are named; ask route() for the router's choice")
        with self._alone(), self.modules.using(names) as held, torch.inference_mode():
            return ModuleSet(self.base, list(held.values())).logits(input_ids)

    # Inside

    def _require_open(self) -> None:
        if self._closed:
            raise self._was_closed()

    def _was_closed(self) -> ClosedError:
        return ClosedError(f"{self.store.path}: this engine was closed; make a new one")

    def _asked(
        self,
        prompt: Prompt,
        module: Wanted,
        reuse: bool,
        mix: int,
        reroute: int,
        streams: bool,
        sampling: dict[str, Any],
    ) -> Request:
        self._require_open()
        config = _sampling(sampling)
        tokens = self._prompts.encode(prompt, config.max_new_tokens, depth=2)
        require_one_way(module, mix, reroute, len(self.router.names), self.router.num_listed)
        answer = Answer(self.tokenizer, config.stop, streams=streams)
        return Request(tokens, self._select(module), config, answer, reuse, mix, reroute)

    def _answers(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Asks for all of them and gives their answers in this order, each once it is there."""
        self._arriving.extend(requests)
        try:
            for request in requests:
                self._drive(lambda request=request: request.state is State.FINISHED)  # type: ignore[misc]
                yield _result(request)
        finally:
            self._cancel(requests)

    def _drive(self, done: Callable[[], bool]) -> None:
        """Makes steps until it is done, or waits while another thread makes them."""
        while not done():
            with self._stepping:
                if self._closed:  # since it was asked
                    self._refuse(lambda request: True)
                elif not done():
                    self._step()

    def _refuse(self, which: Callable[[Request], bool]) -> None:
        """Ends requests with the error that the engine was closed."""
        self._take_in()
        for request in [*self._scheduler.waiting, *self._scheduler.active]:
            if which(request):
                self._end(request, error=self._was_closed())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What runs in such a block runs while nothing else does: requests that have a place are answered first."""
        self._require_open()
        self._pausing += 1
        try:
            while True:
                with self._stepping:
                    self._require_open()
                    if not self._scheduler.active:
                        yield
                        return
                    self._step()
        finally:
            self._pausing -= 1

    def _cancel(self, requests: Sequence[Request]) -> None:
        """Ends requests that have not ended, with all that they hold."""
        left = [request for request in requests if request.state is not State.FINISHED]
        if left:
            with self._stepping:
                self._take_in()
                for request in left:
                    if request.state is not State.FINISHED:
                        self._end(request)

    # A step

    def _take_in(self) -> None:
        while self._arriving:
            self._scheduler.add(self._arriving.popleft())

    def _step(self) -> None:
        """Admits what can be admitted, runs one pass, and gives every request what is its own."""
        self._take_in()
        if not self._pausing:
            for request in self._scheduler.admit(lambda request, error: self._end(request, error=error)):
                self._read_below(request)
        for request in [r for r in self._scheduler.active if r.arrived]:
            self._start(request)
        parts = self._scheduler.parts()
        if not parts:
            self.modules.wait(_PAUSE)
            return
        try:
            self._run(parts)
            through = [part.request for part in parts if not part.request.unread]
            for request in [r for r in through if r.state is not State.RUNNING]:
                self._come_to_goal(request)
            self._write([request for request in through if request.state is State.RUNNING and not self._moves(request)])
        except BaseException as error:  # nobody knows how far these have come
            clear_frames(error.__traceback__)  # which would hold modules as long as the error is held
            for part in parts:
                self._end(part.request, error=error)
            if not isinstance(error, Exception):
                raise

    def _read_below(self, request: Request) -> None:
        """Has the base read a prompt as far as the router needs, or up to where its modules branch off, while they are
        loaded."""
        if request.names is None:
            goal = self._read_at
        elif request.reroute:  # what the next module takes over lies there too
            goal = self.base.num_layers
        elif request.arrived or request.reuse:
            return
        else:
            goal = self._fork(request.names)
        if goal > request.level:
            request.goal, request.read = goal, 0
            request.cache = request.cache or self._rooms.new()

    def _come_to_goal(self, request: Request) -> None:
        """The base has read a prompt as far as it should: the router's turn, or the modules'."""
        routing = request.state is State.ROUTING
        request.rest()
        if not routing:
            return
        states = request.states_of(self._read_at)
        (request.route,) = self._routes_of(states[:, -WINDOW:] if request.reroute else states)
        if request.mix > 1:
            request.together = list(request.route.scores)[: request.mix]
            request.names = tuple(name for name in request.together if name != NONE)
        else:
            self._choose(request, request.route)
        self._scheduler.park(request)

    def _choose(self, request: Request, route: Route) -> None:
        request.names = () if route.module is None else (route.module,)
        if request.reroute:
            request.changes.append((len(request.answer.tokens), route.module))

    def _moves(self, request: Request) -> bool:
        """Chooses the module of a request anew where it is time for that; returns whether another one goes on."""
        written = len(request.answer.tokens)
        if not request.reroute or not written or written % request.reroute or written == request.changes[-1][0]:
            return False
        (route,) = self._routes_of(request.states_of(self._read_at)[:, -WINDOW:])
        if route.module == request.changes[-1][1]:
            return False
        self._choose(request, route)
        request.cache = request.branches.pop().cache
        request.cache.cut(self.base.num_layers)
        self._release(request)
        self._scheduler.park(request)
        return True

    def _start(self, request: Request) -> None:
        """Lets the modules of a request read its text, from what the base has made of it below their fork."""
        assert request.loads is not None
        try:
            held = {name: load.result() for name, load in request.loads.items()}
            if request.mix > 1:
                alone = [[] if name == NONE else [held[name]] for name in request.together]
                request.begin([self._branch(request, modules) for modules in alone])
                scores = [request.route.scores[name] for name in request.together]
                request.mixture = Posterior.of_scores(scores, self.base.device)
            else:
                branch = self._branch(request, list(held.values()))
                if request.reroute and branch.modules.fork < self.base.num_layers:
                    raise ConfigError(
                        f"{request.changes[-1][1]} changes the base from layer {branch.modules.fork} on, and --reroute "
                        "needs modules above its last layer; learn it as blocks with --placement top --vocabulary head"
                    )
                prefix = self._prefixes.take(branch.modules.digest, request.tokens) if request.reuse else None
                if prefix is not None:
                    branch.cache.free()
                    branch.cache, branch.level = self._rooms.adopt(prefix.cache), 0
                request.begin([branch], 0 if prefix is None else len(prefix.tokens))
        except BaseException as error:
            self._end(request, error=error)
            return
        request.resident = max(request.resident, self.resident_bytes)
        if request.generator is None:
            request.generator = torch.Generator(self.base.device).manual_seed(request.config.seed)

    def _branch(self, request: Request, held: Sequence[KnowledgeModule]) -> Branch:
        modules = self._set_of(held)
        level = max((at for at in request.states if at <= modules.fork), default=0)
        if not level:
            return Branch(modules, self._rooms.new())
        assert request.cache is not None
        if request.mix > 1:  # each goes on from the same keys and values
            cache = request.cache.copy()
        else:
            cache, request.cache = request.cache, None
        cache.cut(level)
        return Branch(modules, cache, level)

    def _set_of(self, held: Sequence[KnowledgeModule]) -> ModuleSet:
        """The one of these modules that is in use, or a new one."""
        key = tuple(sorted(module.identity for module in held))
        made = self._sets.get(key)
        if made is None:
            made = self._sets[key] = ModuleSet(self.base, held)
        return made

    def _run(self, parts: Sequence[Part]) -> None:
        """One pass. Of requests that the base reads for, what it has come to is kept; of others the newest state."""
        works = [self._works(part.request, part.tokens) for part in parts]
        self._runner.run([work for own in works for work in own])
        for part, own in zip(parts, works, strict=True):
            request, start = part.request, part.request.read
            request.read += part.tokens
            for layer, hidden in own[0].kept.items():
                request.states.setdefault(layer, []).append(hidden)
            if request.state is not State.RUNNING:
                assert request.goal is not None
                request.states.setdefault(request.goal, []).append(_come_to(own[0]))
                continue
            for branch, work in zip(request.branches, own, strict=True):
                branch.newest = _come_to(work)[0, -1:]
            if request.mixture is not None and start < len(request.tokens):
                self._weigh(request, own, start)
            if request.read >= request.stated and not request.reroute:
                request.states.clear()

    def _works(self, request: Request, many: int) -> list[Work]:
        """A request's part in a pass, one for each of its branches."""
        start = request.read
        ids = torch.tensor(request.ids(start, many), device=self.base.device)
        if request.state is not State.RUNNING:
            assert request.cache is not None
            work = Work(self._base_alone, ids, start, request.cache, leaves=request.goal)
            if request.level:
                work.enters, work.hidden = request.level, request.states_of(request.level)[:, start : start + many]
            if request.state is State.ROUTING:
                work.keeps = [fork for fork in self.router.fork_layers if 0 < fork < self._read_at]
            return [work]
        works = []
        for branch in request.branches:
            work = Work(branch.modules, ids, start, branch.cache)
            if branch.level and start < request.stated:
                work.enters, work.hidden = branch.level, request.states_of(branch.level)[:, start : start + many]
            elif request.reroute:
                work.keeps = {self._read_at, self.base.num_layers}
            works.append(work)
        return works

    def _weigh(self, request: Request, works: Sequence[Work], start: int) -> None:
        """Takes into a mixture how well each branch has predicted the tokens of the prompt that it has just read."""
        assert request.mixture is not None
        seen = torch.tensor([request.tokens[: start + len(works[0].ids) + 1]], device=self.base.device)
        count = seen.shape[1] - 1 - start  # the prompt's last token has none behind it
        losses = []
        for branch, work in zip(request.branches, works, strict=True):
            contexts = branch.modules.contexts(seen[:, :-1], count)
            own = None if contexts is None else contexts[0]
            losses.append(label_losses(branch.modules, _come_to(work)[0, :count], seen[0, start + 1 :], own))
        for column in torch.stack(losses).T:
            request.mixture.update(-column)

    @torch.inference_mode()
    def _write(self, requests: Sequence[Request]) -> None:
        """The next token of requests that have read all there is."""
        logits = self._logits([branch_of for request in requests for branch_of in _branches(request)])
        ended = []
        for request in requests:
            assert request.generator is not None
            each = torch.cat([logits[branch] for branch in request.branches])
            if request.mixture is None:
                token = int(sample(each, request.config, [request.generator]))
            else:
                each = each.float().log_softmax(-1)
                token = int(sample(request.mixture.mix(each)[None], request.config, [request.generator]))
            if self._ends(request, token):
                ended.append(request)
            elif request.mixture is not None:
                request.mixture.update(each[:, token])
        for request in ended:
            self._finish(request)

    def _logits(self, branches: Sequence[tuple[Branch, list[int]]]) -> dict[Branch, Tensor]:
        """Logits (1, v) after the newest token of each branch, given with its text."""
        by_set: dict[str, list[tuple[Branch, list[int]]]] = {}
        for branch, text in branches:
            by_set.setdefault(branch.modules.digest, []).append((branch, text))
        rows = []
        for own in by_set.values():
            modules = own[0][0].modules
            contexts = [modules.contexts(torch.tensor([text], device=self.base.device), 1) for _, text in own]
            known = [context[:, 0] for context in contexts if context is not None]
            newest = [branch.newest for branch, _ in own if branch.newest is not None]
            rows.append((modules, torch.cat(newest), torch.cat(known) if known else None))
        found: dict[Branch, Tensor] = {}
        for own, logits in zip(by_set.values(), self._runner.logits(rows), strict=True):
            found.update(zip((branch for branch, _ in own), logits.split(1), strict=True))
        return found

    def _ends(self, request: Request, token: int) -> bool:
        if token in self._end_tokens or not request.answer.add(token):
            return True
        return len(request.answer.tokens) == request.config.max_new_tokens

    def _finish(self, request: Request) -> None:
        if request.reuse and len(request.branches) == 1:
            (branch,) = request.branches
            # The last token of an answer that was not ended by the model has not been run.
            self._prefixes.put(branch.modules.digest, request.text[: request.read], branch.cache.kept())
        names, mixture = list(request.names or ()), {}
        if request.mixture is not None:
            mixture = dict(zip(request.together, request.mixture.weights.tolist(), strict=True))
            best = max(mixture, key=lambda name: mixture[name])
            names = [] if best == NONE else [best]
        result = request.answer.generation(
            request.config,
            modules=names,
            scores=request.route.scores,
            resident_bytes=max(request.resident, self.resident_bytes) if request.reroute else self.resident_bytes,
            loaded=request.loaded,
            prompt_tokens=len(request.tokens),
            mixture=mixture,
            changes=request.changes,
        )
        self._end(request, result)

    def _end(self, request: Request, result: Generation | None = None, error: BaseException | None = None) -> None:
        """Ends a request, and lets go of all that it holds within this step."""
        self._scheduler.remove(request)
        self._release(request)
        request.drop()
        request.state, request.result, request.error = State.FINISHED, result, error

    def _release(self, request: Request) -> None:
        """Lets go of a request's modules, and of what was joined of them where no other request runs under them."""
        gone = {branch.modules.digest for branch in request.branches}
        held = request.let_go()
        if gone - {branch.modules.digest for other in self._scheduler.active for branch in other.branches}:
            self._runner.forget()
        self.modules.release(held)

    @property
    def _read_at(self) -> int:
        """After how many layers the router reads the base's states."""
        return self.base.num_layers if self.router.layer is None else self.router.layer

    def _routes_of(self, hidden: Tensor, visible: Tensor | None = None) -> list[Route]:
        """The router's answers, among modules that the store still holds: some may go while this engine runs.

        Args:
            hidden: the base's states (b, t, d) where the router reads them, before the final norm.
        """
        if self.router.layer is None:
            hidden = self.base.norm(hidden)
        while True:
            routes = self.router.route(hidden, visible)
            gone = self.store.missing({name for r in routes for name in r.scores} - {NONE})
            gone |= {r.module for r in routes if r.module is not None and self.store.find(r.module) is None}
            if not gone:
                return routes
            # All that are gone, not only those that were listed: a smaller router takes a copy of what is left.
            self.router = self.router.without(gone | self.store.missing(self.router.names))

    def _select(self, wanted: Wanted) -> Names | None:
        """The modules that are meant; None where the router is to choose."""
        names = select(self.store, wanted, self.modules.resident_version)
        return None if isinstance(names, str) else names

    def _fork(self, names: Names) -> int:
        forks = (self.modules.found(name).stored.fork_on(self.base.num_layers) for name in names)
        return min(forks, default=self.base.num_layers)

    def _check_budget(self, base_bytes: int) -> None:
        needed = base_bytes + self.router.num_bytes()
        if self.memory is not None and needed > self.memory:
            raise BudgetError(
                f"--memory {format_size(self.memory)} is too small: base {format_size(base_bytes)} and router "
                f"{format_size(self.router.num_bytes())} need {format_size(needed)} before any module"
            )


def _result(request: Request) -> Generation:
    """
    Raises:
        What it ended with.
    """
    if request.error is not None:
        raise request.error
    assert request.result is not None
    return request.result


def _branches(request: Request) -> list[tuple[Branch, list[int]]]:
    return [(branch, request.text) for branch in request.branches]


def _come_to(work: Work) -> Tensor:
    assert work.hidden is not None
    return work.hidden


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    known = set(SamplingConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; options are {', '.join(sorted(known))}")
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    return SamplingConfig(**options)
