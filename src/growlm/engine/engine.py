"""Engine: prompts in, answers out, under a budget of bytes. Prefill, route, load, decode, release.

Ties together the router, the module cache, the scheduler and generation; knows a module's fork, never its kind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from growlm.engine.generation import Group, Prefilled, decode, prefill
from growlm.engine.kv import Prefix, PrefixCache
from growlm.engine.module_cache import ModuleCache
from growlm.engine.sampling import SamplingConfig
from growlm.engine.scheduler import Wave, plan
from growlm.errors import BudgetError, ConfigError, DataError
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.router import NONE, Route, load_router
from growlm.store import WEIGHTS, Store
from growlm.units import format_size, parse_size

AUTO = "auto"  # let the router choose


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: the answer alone, without the prompt.
        module: which module wrote it; None for the base.
        scores: the router's, best first; empty where the module was given.
        resident_bytes: weights in memory when it was written: base, router and modules.
        loaded: modules that were read from the disk for it.
        tokens: ids of the answer.
        finish_reason: "stop" (an end of text or a stop text) or "length".
    """

    text: str
    module: str | None
    scores: dict[str, float]
    resident_bytes: int
    loaded: list[str]
    tokens: list[int] = field(repr=False)
    prompt_tokens: int
    finish_reason: str

    def to_json(self) -> dict[str, Any]:
        names = ("text", "module", "scores", "resident_bytes", "loaded", "prompt_tokens", "finish_reason")
        return {name: getattr(self, name) for name in names}


class _Answer:
    """One row while it is written."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], emit: Callable[[str], bool] | None) -> None:
        self._tokenizer, self._stop, self._emit = tokenizer, stop, emit
        self.tokens: list[int] = []
        self.stopped = False
        self._sent = 0

    def add(self, token: int) -> bool:
        self.tokens.append(token)
        if self._stop or self._emit:
            text = self.text()
            if any(s in text for s in self._stop):
                self.stopped = True
            if self._emit:
                self._send(text)
        return not self.stopped

    def text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def final_text(self) -> str:
        text = self.text()
        cuts = [text.index(s) for s in self._stop if s in text]
        text = text[: min(cuts)] if cuts else text
        if self._emit and len(text) > self._sent:
            self._emit(text[self._sent :])
        return text

    def _send(self, text: str) -> None:
        # Half a character, or what may become a stop text, waits for the next token.
        end = len(text)
        if text.endswith("\ufffd"):
            end = len(text.rstrip("\ufffd"))
        for stop in self._stop:
            if stop in text:
                end = min(end, text.index(stop))
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        if end > self._sent:
            assert self._emit is not None
            if not self._emit(text[self._sent : end]):
                self.stopped = True
            self._sent = end


class Engine:
    """Runs prompts on a store's base with its modules.

    Args:
        store: what to serve.
        memory: budget for all weights in memory, e.g. "2GB"; None for no bound. Keys and values are not counted.
        max_batch: prompts that are run together.

    Raises:
        BudgetError: base and router do not fit the budget.
        BaseModelError: the base is missing or has changed.
    """

    def __init__(
        self,
        store: Store,
        *,
        memory: str | int | None = None,
        max_batch: int = 32,
        device: str | None = None,
        prefix_bytes: str | int = "256MB",
    ) -> None:
        self.store = store
        self.memory = None if memory is None else parse_size(memory)
        self.max_batch = max_batch
        self.router = load_router(store)
        self._check_budget(store.base_bytes())
        self.base = store.load_base(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.base_bytes = self.base.num_bytes()
        self._check_budget(self.base_bytes)
        self.tokenizer = store.load_tokenizer()
        self._end_tokens = _end_tokens(self.base, self.tokenizer)
        self._verified: set[tuple[str, int, int, int]] = set()
        left = None if self.memory is None else self.memory - self.fixed_bytes
        self.modules = ModuleCache(
            left,
            lambda name: store.module(name).bytes,
            self._load,
            reserved=f" of {format_size(self.memory or 0)} after base {format_size(self.base_bytes)} and router "
            f"{format_size(self.router.num_bytes())}",
        )
        self._prefixes = PrefixCache(parse_size(prefix_bytes))
        self._lock = threading.Lock()

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
        self.modules.close()
        self._prefixes.clear()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Answers

    def generate(self, prompt: str, *, module: str | None = AUTO, reuse: bool = False, **sampling: Any) -> Generation:
        """Answers one prompt.

        Args:
            module: a module's name, None for the base alone, or "auto" to let the router choose.
            reuse: keep keys and values for a prompt that continues this one and its answer (a conversation).
            sampling: the fields of `SamplingConfig`, e.g. max_new_tokens=64, temperature=0.8.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: the module does not fit the budget.
            DataError: an empty prompt.
        """
        return self._answer_one(prompt, module, _sampling(sampling), None, reuse)

    def stream(
        self, prompt: str, *, module: str | None = AUTO, reuse: bool = False, **sampling: Any
    ) -> Iterator[str | Generation]:
        """As `generate`, piece by piece: the answer's text as it is written, and at the end the `Generation`."""
        config = _sampling(sampling)
        queue: SimpleQueue[str | Generation | BaseException] = SimpleQueue()
        stopped = threading.Event()

        def emit(text: str) -> bool:
            queue.put(text)
            return not stopped.is_set()

        def run() -> None:
            try:
                queue.put(self._answer_one(prompt, module, config, emit, reuse))
            except BaseException as error:
                queue.put(error)

        worker = threading.Thread(target=run, name="growlm-stream")
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
        self, prompts: Sequence[str], *, modules: Sequence[str | None] | str | None = AUTO, **sampling: Any
    ) -> list[Generation]:
        """Answers many prompts, grouped by module; the answers are in the prompts' order.

        Args:
            modules: one for all, or one a prompt; as `module` of `generate`.
        """
        config = _sampling(sampling)
        wanted = [modules] * len(prompts) if modules is None or isinstance(modules, str) else list(modules)
        if len(wanted) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(wanted)} modules; give one for all, or one a prompt")
        tokens = [self._encode(p, config) for p in prompts]
        self._check_names(wanted)
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
        by_index: dict[int, Generation] = {}
        for at in range(0, len(order), self.max_batch):
            chosen = order[at : at + self.max_batch]
            results = self._answer_batch([tokens[i] for i in chosen], [wanted[i] for i in chosen], config, None)
            by_index.update(zip(chosen, results, strict=True))
        return [by_index[i] for i in range(len(prompts))]

    def route(self, prompt: str) -> Route:
        """Which module the router would choose, and how sure it is of each.

        Raises:
            DataError: an empty prompt.
        """
        tokens = self._encode(prompt, SamplingConfig(max_new_tokens=1))
        with self._lock:
            state = prefill(self.base, [tokens], ())
        assert state.last is not None
        return self.router.route(state.last, None)[0]

    def logits(self, input_ids: Tensor, module: str | None = None) -> Tensor:
        """Logits (batch, tokens, vocab) of `input_ids` (batch, tokens); `module` None is the base.

        Raises:
            UnknownModuleError: no such module.
            BudgetError: the module does not fit the budget.
        """
        names = [] if module is None else [module]
        self._check_names(names)
        with self._lock, self.modules.using(names) as held, torch.inference_mode():
            return ModuleSet(self.base, list(held.values())).logits(input_ids.to(self.base.device))

    # Inside

    def _answer_one(
        self,
        prompt: str,
        module: str | None,
        config: SamplingConfig,
        emit: Callable[[str], bool] | None,
        reuse: bool,
    ) -> Generation:
        tokens = self._encode(prompt, config)
        self._check_names([module])
        return self._answer_batch([tokens], [module], config, emit, reuse)[0]

    def _answer_batch(
        self,
        texts: Sequence[Sequence[int]],
        wanted: Sequence[str | None],
        config: SamplingConfig,
        emit: Callable[[str], bool] | None,
        reuse: bool = False,
    ) -> list[Generation]:
        with self._lock:
            # A module that was asked for by name is read while the base runs.
            before = set(self.modules.resident)
            for name in dict.fromkeys(wanted):
                if name is not None and name != AUTO:
                    self.modules.check_fits([name])
                    self.modules.prefetch(name, keep=[n for n in wanted if n is not None])
            state, routes, prefix = self._prefill(texts, wanted, reuse)
            names = [route.module if name == AUTO else name for name, route in zip(wanted, routes, strict=True)]
            if prefix is not None:
                state = self._continued(state, prefix, names[0], texts)
            answers = [_Answer(self.tokenizer, config.stop, emit) for _ in texts]
            results: list[Generation | None] = [None] * len(texts)
            budget = None if self.memory is None else self.memory - self.fixed_bytes
            for name in set(names) - {None}:
                self.modules.check_fits([str(name)])
            waves = plan(names, budget=budget, size=self._size, resident=self.modules.resident)
            for number, wave in enumerate(waves):
                following = waves[number + 1].names if number + 1 < len(waves) else []
                resident = self._run_wave(state, wave, following, config, answers, texts, reuse)
                for name, rows in wave.groups.items():
                    for row in rows:
                        full = len(answers[row].tokens) == config.max_new_tokens and not answers[row].stopped
                        results[row] = Generation(
                            text=answers[row].final_text(),
                            module=name,
                            scores=routes[row].scores,
                            resident_bytes=resident,
                            loaded=[name] if name is not None and name not in before else [],
                            tokens=answers[row].tokens,
                            prompt_tokens=len(texts[row]),
                            finish_reason="length" if full else "stop",
                        )
            return [r for r in results if r is not None]

    def _run_wave(
        self,
        state: Prefilled,
        wave: Wave,
        following: Sequence[str],
        config: SamplingConfig,
        answers: Sequence[_Answer],
        texts: Sequence[Sequence[int]],
        reuse: bool,
    ) -> int:
        """Decodes one wave while the next one's first module is read; returns the bytes of weights in memory.

        All references to the wave's modules end with this call: what the cache evicts is gone.
        """
        with self.modules.using(wave.names) as held:
            if following:
                self.modules.prefetch(following[0])
            groups = [
                Group(ModuleSet(self.base, [] if name is None else [held[name]]), list(rows))
                for name, rows in wave.groups.items()
            ]
            forks = {g.modules.fork for g in groups} - {0}
            if not forks <= state.hidden.keys():  # a module was updated meanwhile and branches off elsewhere
                state = prefill(self.base, texts, forks)
            cache = decode(state, groups, config, self._end_tokens, lambda row, token: answers[row].add(token))
            if reuse:
                # The last token of an answer that was not ended by the model has not been run.
                seen = [*texts[0], *answers[0].tokens][: cache.length(0)]
                self._prefixes.put(groups[0].modules.digest, seen, groups[0].modules.fork, cache)
            return self.resident_bytes

    def _prefill(
        self, texts: Sequence[Sequence[int]], wanted: Sequence[str | None], reuse: bool
    ) -> tuple[Prefilled, list[Route], Prefix | None]:
        """Runs the base over the prompts, as far as any of them needs, and routes those that want it."""
        automatic = AUTO in wanted
        forks = {self._fork(name) for name in wanted if name != AUTO}
        if automatic and self.router.names:
            forks |= {self._fork(name) for name in self.router.names}
        prefix = self._prefixes.take(texts[0]) if reuse else None
        if prefix is not None and prefix.fork == self.base.num_layers:
            new = [texts[0][len(prefix.tokens) :]]
            base_only = prefix.cache_for("base")
            state = prefill(self.base, new, forks, past=len(prefix.tokens), cache=base_only)
        else:
            prefix = None
            state = prefill(self.base, texts, forks, whole=automatic or None in wanted)
        if not automatic:
            return state, [Route(None, {})] * len(texts), prefix
        assert state.last is not None
        seen = None if state.visible is None else state.visible[:, state.past :]
        routes = self.router.route(state.last, seen)
        return state, [r if name == AUTO else Route(None, {}) for name, r in zip(wanted, routes, strict=True)], prefix

    def _continued(
        self, state: Prefilled, prefix: Prefix, name: str | None, texts: Sequence[Sequence[int]]
    ) -> Prefilled:
        """The state to go on from, once the module is known: the kept keys and values if they are its own, else the
        prompt anew."""
        digest = "base" if name is None else self._digest(name)
        if digest == prefix.digest:
            state.cache = prefix.cache_for(digest)
            return state
        return prefill(self.base, texts, {self._fork(name)}, whole=name is None)

    def _digest(self, name: str) -> str:
        with self.modules.using([name]) as held:
            return ModuleSet(self.base, [held[name]]).digest

    def _fork(self, name: str | None) -> int:
        return self.base.num_layers if name is None else self.store.module(name).manifest.fork

    def _size(self, name: str) -> int:
        return self.store.module(name).bytes

    def _load(self, name: str) -> KnowledgeModule:
        """Reads a module; its hash is compared once for a file that does not change."""
        path = self.store.module(name).folder / WEIGHTS
        try:
            stat = path.stat()
            mark = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            mark = (str(path), 0, 0, 0)
        module = self.store.load(name, self.base, verify=mark not in self._verified)
        self._verified.add(mark)
        return module

    def _encode(self, prompt: str, config: SamplingConfig) -> list[int]:
        tokens = self.tokenizer.encode(prompt)
        if not tokens:
            raise DataError("the prompt is empty; give some text")
        limit = self.base.max_positions
        if limit is not None and len(tokens) + config.max_new_tokens > limit:
            raise ConfigError(
                f"{len(tokens)} prompt tokens and {config.max_new_tokens} new ones exceed the base's {limit} "
                "positions; shorten the prompt or lower --max-new-tokens"
            )
        return tokens

    def _check_names(self, names: Sequence[str | None]) -> None:
        for name in dict.fromkeys(names):
            if name is not None and name != AUTO:
                self.store.module(name)

    def _check_budget(self, base_bytes: int) -> None:
        needed = base_bytes + self.router.num_bytes()
        if self.memory is not None and needed > self.memory:
            raise BudgetError(
                f"--memory {format_size(self.memory)} is too small: base {format_size(base_bytes)} and router "
                f"{format_size(self.router.num_bytes())} need {format_size(needed)} before any module"
            )


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    known = set(SamplingConfig.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; options are {', '.join(sorted(known))}")
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    return SamplingConfig(**options)


def _end_tokens(base: Any, tokenizer: Any) -> set[int]:
    ends: set[Any] = set()
    for holder in (base.config, getattr(base.model, "generation_config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ends |= set(value) if isinstance(value, list | tuple) else {value}
    return {e for e in ends if e is not None}


__all__ = ["AUTO", "NONE", "Engine", "Generation"]
