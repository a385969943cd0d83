"""Engine: prompts in, answers out, under a budget of bytes. Prefill, route, load, decode, release.

Ties together the router, the module cache, the scheduler and generation; knows a module's fork, never its kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from growlm.base.placement import find_device
from growlm.engine.answers import Answer, Generation
from growlm.engine.generation import Group, Prefilled, decode, prefill
from growlm.engine.kv import PrefixCache
from growlm.engine.mixing import decode_mixed
from growlm.engine.module_cache import Found, ModuleCache
from growlm.engine.prompts import Prompt, Prompts
from growlm.engine.rerouting import decode_rerouted
from growlm.engine.sampling import SamplingConfig
from growlm.engine.scheduler import Names, Wave, plan
from growlm.engine.selection import AUTO, Wanted, require_one_way, select
from growlm.engine.sources import Quote, quotes
from growlm.errors import BudgetError, ClosedError, ConfigError, IntegrityError, setting
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.progress import phase
from growlm.router import NONE, Route, load_router
from growlm.store import MANIFEST, ROUTER_FITTED, WEIGHTS, Store, StoredModule
from growlm.units import format_size, parse_size

_ROW_CACHE = "64MB"
UNIFORM_PRIOR_SHARE = 0.1  # share of a mixture's prior that is spread evenly over its modules


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
        self.base_bytes = self.base.num_bytes()
        self._check_budget(self.base_bytes)
        self.tokenizer = store.load_tokenizer()
        self._prompts = Prompts(self.base, self.tokenizer, strict=strict)
        self._end_tokens = self.base.end_tokens(self.tokenizer)
        self._verified: set[tuple[str, int, int, int]] = set()
        left = None if self.memory is None else self.memory - self.fixed_bytes
        self.modules = ModuleCache(
            left,
            self._find,
            reserved=f" of {format_size(self.memory or 0)} after base {format_size(self.base_bytes)} and router "
            f"{format_size(self.router.num_bytes())}",
            hint="" if self._row_cache is None else f", or lower --row-cache, {format_size(self._row_cache)}",
        )
        self._prefixes = PrefixCache(parse_size(prefix_bytes))
        self._lock = threading.Lock()
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
        with self._lock:
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
        self._require_open()
        config = _sampling(sampling)
        tokens = self._prompts.encode(prompt, config.max_new_tokens)
        return self._answer_one(tokens, module, config, None, reuse, mix, reroute)

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
        self._require_open()
        config = _sampling(sampling)
        tokens = self._prompts.encode(prompt, config.max_new_tokens)
        return self._pieces(tokens, module, config, reuse, mix, reroute)

    def _pieces(
        self, tokens: list[int], module: Wanted, config: SamplingConfig, reuse: bool, mix: int, reroute: int
    ) -> Iterator[str | Generation]:
        queue: SimpleQueue[str | Generation | BaseException] = SimpleQueue()
        stopped = threading.Event()

        def emit(text: str) -> bool:
            queue.put(text)
            return not (stopped.is_set() or self._closed)

        def run() -> None:
            try:
                answer = self._answer_one(tokens, module, config, emit, reuse, mix, reroute)
                self._require_open()  # what was cut short is no answer
                queue.put(answer)
            except BaseException as error:
                queue.put(error)

        # In the caller's context: how settings are written in messages is part of it.
        worker = threading.Thread(target=copy_context().run, args=(run,), name="growlm-stream")
        worker.start()
        try:
            while True:
                item = queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Generation):
                    return
        finally:
            stopped.set()  # whoever reads no further needs no further tokens
            worker.join()

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
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
        by_index: dict[int, Generation] = {}
        with phase("answering", len(order), "prompts") as answering:
            for at in range(0, len(order), self.max_batch):
                chosen = order[at : at + self.max_batch]
                results = self._answer_batch([tokens[i] for i in chosen], [choices[i] for i in chosen], config, None)
                by_index.update(zip(chosen, results, strict=True))
                answering.advance(len(chosen))
        return [by_index[i] for i in range(len(prompts))]

    def route(self, prompt: Prompt) -> Route:
        """Which module the router would choose, and how sure it is of each.

        Raises:
            As `generate` of its prompt.
        """
        self._require_open()
        tokens = self._prompts.encode(prompt)
        with self._turn():
            return self._routes(prefill(self.base, [tokens], {self._read_at}))[0]

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
        with self._turn(), self.modules.using(answer.modules) as held:
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
        if isinstance(names, str):
            raise ConfigError("logits are of modules that are named; ask route() for the router's choice")
        with self._turn(), self.modules.using(names) as held, torch.inference_mode():
            return ModuleSet(self.base, list(held.values())).logits(input_ids)

    # Inside

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.store.path}: this engine was closed; make a new one")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Requests take turns; those that still wait when the engine is closed get none."""
        with self._lock:
            self._require_open()
            yield

    def _answer_one(
        self,
        tokens: list[int],
        module: Wanted,
        config: SamplingConfig,
        emit: Callable[[str], bool] | None,
        reuse: bool,
        mix: int = 1,
        reroute: int = 0,
    ) -> Generation:
        require_one_way(module, mix, reroute, len(self.router.names), self.router.num_listed)
        choice = self._select(module)
        if mix > 1:
            return self._answer_mixed(tokens, config, emit, mix)
        if reroute:
            return self._answer_rerouted(tokens, config, emit, reroute)
        return self._answer_batch([tokens], [choice], config, emit, reuse)[0]

    def _answer_mixed(
        self, tokens: Sequence[int], config: SamplingConfig, emit: Callable[[str], bool] | None, mix: int
    ) -> Generation:
        with self._turn():
            state, (route,) = self._prefill([tokens], [AUTO], False)
            names = list(route.scores)[:mix]
            prior = torch.tensor([route.scores[name] for name in names])
            # A module that the router ruled out may still fit what comes later.
            prior = (1 - UNIFORM_PRIOR_SHARE) * prior / prior.sum() + UNIFORM_PRIOR_SHARE / len(names)
            named = [name for name in names if name != NONE]
            answer = Answer(self.tokenizer, config.stop, emit)
            self.modules.make_fit(named)
            before = self.modules.resident
            with self.modules.using(named) as held:
                sets = [ModuleSet(self.base, [] if name == NONE else [held[name]]) for name in names]
                state = self._reaching({s.fork for s in sets}, state, [tokens])
                weights = decode_mixed(state, sets, prior, config, self._end_tokens, answer.add)
                resident = self.resident_bytes
                del sets
        mixture = dict(zip(names, weights.tolist(), strict=True))
        best = max(mixture, key=lambda name: mixture[name])
        return answer.generation(
            config,
            modules=[] if best == NONE else [best],
            scores=route.scores,
            resident_bytes=resident,
            loaded=[name for name in named if name not in before],
            prompt_tokens=len(tokens),
            mixture=mixture,
        )

    def _answer_rerouted(
        self, tokens: Sequence[int], config: SamplingConfig, emit: Callable[[str], bool] | None, every: int
    ) -> Generation:
        with self._turn():
            before = self.modules.resident
            state, (first,) = self._prefill([tokens], [AUTO], False)
            state.run_on(self.base, {self.base.num_layers})
            answer = Answer(self.tokenizer, config.stop, emit)
            resident: list[int] = []

            @contextmanager
            def using(name: str | None) -> Iterator[ModuleSet]:
                with self.modules.using([] if name is None else [name]) as held:
                    resident.append(self.resident_bytes)
                    yield ModuleSet(self.base, list(held.values()))

            changes = decode_rerouted(
                self.base,
                state,
                lambda states: self._routes_of(states)[0].module,
                using,
                config,
                self._end_tokens,
                answer.add,
                layer=self._read_at,
                every=every,
            )
        used = [name for name in dict.fromkeys(name for _, name in changes) if name is not None]
        return answer.generation(
            config,
            modules=[changes[-1][1]] if changes[-1][1] is not None else [],
            scores=first.scores,
            resident_bytes=max(resident),
            loaded=[name for name in used if name not in before],
            prompt_tokens=len(tokens),
            changes=changes,
        )

    def _answer_batch(
        self,
        texts: Sequence[Sequence[int]],
        wanted: Sequence[Names | str],
        config: SamplingConfig,
        emit: Callable[[str], bool] | None,
        reuse: bool = False,
    ) -> list[Generation]:
        with self._turn():
            # A module that was asked for by name is read while the base runs.
            named = [names for names in dict.fromkeys(wanted) if not isinstance(names, str)]
            for names in named:
                self.modules.make_fit(names)
            before = set(self.modules.resident)
            asked = [name for names in named for name in names]
            for name in dict.fromkeys(asked):
                self.modules.prefetch(name, keep=asked)
            state, routes = self._prefill(texts, wanted, reuse)
            chosen = [
                names if not isinstance(names, str) else () if route.module is None else (route.module,)
                for names, route in zip(wanted, routes, strict=True)
            ]
            # All waves' at once: what the base has not come to yet, and what lies behind it, is read from one state.
            state = self._reaching({self._fork(names) for names in chosen}, state, texts)
            answers = [Answer(self.tokenizer, config.stop, emit) for _ in texts]
            results: list[Generation | None] = [None] * len(texts)
            budget = None if self.memory is None else self.memory - self.fixed_bytes
            for names in set(chosen):
                self.modules.make_fit(names)
            waves = plan(
                chosen,
                budget=budget,
                size=lambda name: self.modules.found(name).bytes,
                resident=self.modules.resident,
            )
            for number, wave in enumerate(waves):
                following = waves[number + 1].names if number + 1 < len(waves) else []
                resident = self._run_wave(state, wave, following, config, answers, texts, reuse)
                for names, rows in wave.groups.items():
                    for row in rows:
                        results[row] = answers[row].generation(
                            config,
                            modules=list(names),
                            scores=routes[row].scores,
                            resident_bytes=resident,
                            loaded=[name for name in names if name not in before],
                            prompt_tokens=len(texts[row]),
                        )
            return [r for r in results if r is not None]

    def _run_wave(
        self,
        state: Prefilled,
        wave: Wave,
        following: Sequence[str],
        config: SamplingConfig,
        answers: Sequence[Answer],
        texts: Sequence[Sequence[int]],
        reuse: bool,
    ) -> int:
        """Decodes one wave while the next one's first module is read; returns the bytes of weights in memory.

        All references to the wave's modules end with this call: what the cache evicts is gone.
        """
        with self.modules.using(wave.names) as held:
            if new := [name for name in following if name not in held]:
                self.modules.prefetch(new[0], keep=following)
            groups = [
                Group(ModuleSet(self.base, [held[name] for name in names]), list(rows))
                for names, rows in wave.groups.items()
            ]
            state = self._reaching({g.modules.fork for g in groups}, state, texts)
            cache = decode(state, groups, config, self._end_tokens, lambda row, token: answers[row].add(token))
            if reuse:
                # The last token of an answer that was not ended by the model has not been run.
                seen = [*texts[0], *answers[0].tokens][: cache.length(0)]
                self._prefixes.put(groups[0].modules.digest, seen, cache)
            return self.resident_bytes

    def _prefill(
        self, texts: Sequence[Sequence[int]], wanted: Sequence[Names | str], reuse: bool
    ) -> tuple[Prefilled, list[Route]]:
        """Runs the base over the prompts, as far as any of them needs, and routes those that want it."""
        unrouted = [Route(None, {})] * len(texts)
        named = [names for names in wanted if not isinstance(names, str)]
        forks = {self._fork(names) for names in named}
        if len(named) == len(wanted):
            prefix = self._prefixes.take(self._digest(named[0]), texts[0]) if reuse else None
            if prefix is None:
                return prefill(self.base, texts, forks), unrouted
            new = [texts[0][len(prefix.tokens) :]]
            return prefill(self.base, new, forks, before=prefix.tokens, cache=prefix.cache), unrouted
        at = self._read_at
        state = prefill(self.base, texts, {*forks, at, *(f for f in self.router.fork_layers if f < at)})
        routes = self._routes(state)
        return state, [r if names == AUTO else Route(None, {}) for names, r in zip(wanted, routes, strict=True)]

    def _reaching(self, layers: set[int], state: Prefilled, texts: Sequence[Sequence[int]]) -> Prefilled:
        """What the base made of `texts` up to these layers: it runs on, or where it has passed one of them without
        keeping its input (a module was updated meanwhile and branches off elsewhere), it begins again."""
        missing = layers - state.hidden.keys()
        if any(layer < max(state.hidden) for layer in missing):
            return prefill(self.base, texts, layers)
        state.run_on(self.base, missing)
        return state

    @property
    def _read_at(self) -> int:
        """After how many layers the router reads the base's states."""
        return self.base.num_layers if self.router.layer is None else self.router.layer

    def _routes(self, state: Prefilled) -> list[Route]:
        """The router's answers for prompts that the base has read as far as the router needs."""
        return self._routes_of(state.hidden[self._read_at], state.visible)

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

    def _digest(self, names: Names) -> str:
        with self.modules.using(names) as held:
            return ModuleSet(self.base, list(held.values())).digest

    def _select(self, wanted: Wanted) -> Names | str:
        return select(self.store, wanted, self.modules.resident_version)

    def _fork(self, names: Names) -> int:
        forks = (self.modules.found(name).stored.fork_on(self.base.num_layers) for name in names)
        return min(forks, default=self.base.num_layers)

    def _memory_of(self, stored: StoredModule) -> int:
        return stored.bytes_with(self._row_cache)

    def _find(self, name: str) -> Found:
        stored = self.store.module(name)
        return Found(stored, self._memory_of(stored), lambda: self._load(stored))

    def _load(self, stored: StoredModule) -> KnowledgeModule:
        """Reads one version of a module; its hash is compared once for a file that does not change."""
        marks = {_mark(stored.folder / file) for file in (WEIGHTS, *stored.text_files)}
        module = self.store.load(
            stored.name,
            self.base,
            version=stored.version,
            verify=not marks <= self._verified,
            row_cache=self._row_cache,
        )
        counted = self._memory_of(stored)
        if module.num_bytes() != counted:
            raise IntegrityError(
                f"{stored.folder / MANIFEST}: says {counted:,} bytes, the weights take {module.num_bytes():,}; "
                f"learn {stored.name!r} again"
            )
        self._verified |= marks
        return module

    def _check_budget(self, base_bytes: int) -> None:
        needed = base_bytes + self.router.num_bytes()
        if self.memory is not None and needed > self.memory:
            raise BudgetError(
                f"--memory {format_size(self.memory)} is too small: base {format_size(base_bytes)} and router "
                f"{format_size(self.router.num_bytes())} need {format_size(needed)} before any module"
            )


def _mark(path: Path) -> tuple[str, int, int, int]:
    """Tells a file that was checked from one that has changed since."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return str(path), 0, 0, 0
    return str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    known = set(SamplingConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; options are {', '.join(sorted(known))}")
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    return SamplingConfig(**options)
