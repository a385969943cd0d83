"""Loop: steps that move on all requests: schedule, run one pass, and give each request what is its own.

Whoever waits makes steps, one at a time, and a step moves on what others wait for too: no thread is needed. Knows
requests, what is in memory and how prompts are routed; not who asks, nor where modules come from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from traceback import clear_frames
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from growlm.base import tensor_bytes
from growlm.engine.drafting import MOST
from growlm.engine.mixing import Posterior
from growlm.engine.parts import Parts
from growlm.engine.reading import Reading
from growlm.engine.request import Branch, Request, State
from growlm.engine.runner import Runner, Work, come_to
from growlm.engine.scheduler import Part, Scheduler
from growlm.engine.second_look import reads_better
from growlm.engine.turns import Turns
from growlm.engine.writing import Writer
from growlm.errors import ClosedError, GrowlmError
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.recall.suffixes import LONGEST
from growlm.router import NONE, Route

WINDOW = 128  # newest tokens that a choice is made anew from: a text may have passed into another domain
_LEFT = 5.0  # seconds that a loop that closes waits for modules that its answers go on with
_PAUSE = 0.01  # seconds between two looks at what is being read, where nothing else is to be done


@dataclass(eq=False)
class _Attempt:
    act: Callable[[bool], bool]
    done: bool = False
    error: BaseException | None = None


class Loop:
    """All requests of one engine.

    Args:
        parts: of it.
        drafts: whether answers of modules that recall are tried as their text goes on.
        make_way: called once requests have a place, of which keys and values are counted by then.
        resident: bytes of all weights in memory.
        end_tokens: that end an answer; they are no part of it.
        where: what to call the engine in messages.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        max_batch: int,
        drafts: bool,
        make_way: Callable[[], None],
        resident: Callable[[], int],
        start_tokens: int,
        end_tokens: set[int],
        where: str,
    ) -> None:
        self.base, self.modules, self.routing = parts.base, parts.modules, parts.routing
        self.prefixes, self.account = parts.prefixes, parts.account
        self.slabs, self.rooms = parts.slabs, parts.rooms
        self.runner, self.reading = Runner(self.base, self.slabs), Reading(parts)
        self.scheduler = Scheduler(self.modules, self.account, self.reading.footprint, Request.give_up, max_batch)
        self.writer = Writer(self.base, self.runner, end_tokens)
        self.sets: WeakValueDictionary[tuple[str, ...], ModuleSet] = WeakValueDictionary()  # those that are in use
        self.stepping = Turns()  # held for a step
        self.closed = False
        self.drafts, self._start_tokens = drafts, start_tokens
        self._resident, self._make_way, self._where = resident, make_way, where
        self._base_alone = ModuleSet(self.base)
        self._arriving: deque[Request] = deque()
        self._leaving: deque[Request] = deque()
        self._attempts: list[_Attempt] = []

    def require_open(self) -> None:
        """
        Raises:
            ClosedError: it was closed.
        """
        if self.closed:
            raise self._was_closed()

    def _was_closed(self) -> ClosedError:
        return ClosedError(f"{self._where}: this engine was closed; make a new one")

    def _was_interrupted(self) -> GrowlmError:
        return GrowlmError(f"{self._where}: an answer was interrupted while it was written; ask again")

    def num_bytes(self) -> int:
        """Of keys, values and hidden states of what is being answered."""
        states = [part for one in self.scheduler.all() for parts in list(one.states.values()) for part in list(parts)]
        return self.rooms.num_bytes() + tensor_bytes(states)

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests in at the next step; where the loop is closed they end with an error."""
        self._arriving.extend(requests)
        if self.closed:
            with self.stepping:
                self._refuse_what_can_be_left()

    def step(self) -> bool:
        """One step; returns whether anything is left to do."""
        with self.stepping:
            self.require_open()
            self._step()
        self._let_leave()
        return bool(self._arriving) or not self.scheduler.idle

    def close(self) -> None:
        """Ends what can be left, answers what is being answered, and refuses all else."""
        self.closed = True
        with self.stepping:
            self._refuse_what_can_be_left()
            end = time.monotonic() + _LEFT
            while not self.scheduler.idle:
                self._step()
                if any(request.unread for request in self.scheduler.active):
                    end = time.monotonic() + _LEFT
                elif time.monotonic() > end:  # all that is left waits for a module that hangs
                    for request in self.scheduler.all():
                        self._end(request, error=self._was_closed())
            self.prefixes.clear()
        self.modules.close()

    def drive(self, done: Callable[[], bool]) -> None:
        """Makes steps until it is done, or waits while another thread makes them."""
        while self.stepping.take_unless(done):
            try:
                if self.closed:  # since it was asked
                    self._refuse_what_can_be_left()
                if not done():
                    self._step()
            finally:
                self.stepping.give_back()
                self._let_leave()

    def _refuse_what_can_be_left(self) -> None:
        """Of a closed engine: all but the answers that are being written, to one who waits for the whole."""
        self._take_in()
        for request in [*self.scheduler.waiting, *self.scheduler.active]:
            if request.answer.streams or not request.answer.tokens:
                self._end(request, error=self._was_closed())

    def cancel(self, requests: Sequence[Request]) -> None:
        """Ends requests that have not ended, with all that they hold, as soon as no step is being made. Does not wait:
        a stream that nobody holds any more may be taken away in the middle of a step of the same thread."""
        self._leaving.extend(request for request in requests if request.state is not State.FINISHED)
        self._let_leave()

    def _let_leave(self) -> None:
        while self._leaving and self.stepping.take_now():
            try:
                self._take_in()
            finally:
                self.stepping.give_back()

    def between_steps(self, act: Callable[[bool], bool]) -> None:
        """Has something done while no step is made. As long as it cannot be, nothing new is begun.

        Args:
            act: says whether it was done. It is told whether nothing is being answered, so that nothing will change.

        Raises:
            What `act` raises.
        """
        attempt = _Attempt(act)
        self._attempts.append(attempt)
        self.drive(lambda: attempt.done)
        if attempt.error is not None:
            raise attempt.error

    # A step

    def _make_attempts(self) -> None:
        for attempt in list(self._attempts):
            try:
                attempt.done = attempt.act(not self.scheduler.active)
            except BaseException as error:
                attempt.error, attempt.done = error, True
            if attempt.done:
                self._attempts.remove(attempt)

    def _take_in(self) -> None:
        """Those that have come, and without those that leave."""
        while self._arriving:
            self.scheduler.add(self._arriving[0])
            self._arriving.popleft()
        while self._leaving:
            request = self._leaving.popleft()
            if request.state is not State.FINISHED:
                self._end(request)

    def _step(self) -> None:
        """Admits what can be admitted, runs one pass, and gives every request what is its own."""
        self._take_in()
        self.modules.tend()
        self._set_aside()
        self._make_attempts()
        admitted = []
        if not self._attempts:
            admitted = self.scheduler.admit(lambda request, error: self._end(request, error=error))
        if admitted:
            self._make_way()
        for request in admitted:
            self._with(request, self.reading.begin)
        shared = any(request.unread for request in self.scheduler.active)
        for request in [r for r in self.scheduler.active if r.arrived and (r.here or not shared)]:
            self._with(request, self._start)
        if self.drafts:
            self._draft()
        parts = self.scheduler.parts()
        if not parts:
            self.modules.wait(_PAUSE)
            return
        try:
            logits = self._run(parts)
        except BaseException as error:  # nobody knows how far these have come
            self._fail([part.request for part in parts], error)
            return
        came = [part.request for part in parts if part.request.unread <= 0]
        try:
            while came:
                self._with(came.pop(0), partial(self._goes_on, logits=logits))
        except BaseException:  # Ctrl-C: what the others have come to is lost as well
            for request in came:
                self._end(request, error=self._was_interrupted())
            raise
        finally:
            logits.clear()  # an error that is held holds this frame, and it holds module sets

    def _set_aside(self) -> None:
        """Those whose module hangs keep no place meanwhile, but what was read of it and of others that they need."""
        if hanging := self.modules.hanging():
            for request in [one for one in self.scheduler.active if not hanging.isdisjoint(one.names or ())]:
                if request.state is State.LOADING and not request.arrived:
                    self.scheduler.set_aside(request)

    def _with(self, request: Request, act: Callable[[Request], object]) -> None:
        """What is done with one request; where it fails, that one ends."""
        try:
            act(request)
        except BaseException as error:
            self._fail([request], error)

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        """Ends requests with what went wrong; what is no error of theirs, as Ctrl-C, goes on to who made the step."""
        clear_frames(error.__traceback__)  # which would hold modules as long as the error is held
        plain = isinstance(error, Exception)
        for request in requests:
            self._end(request, error=error if plain else self._was_interrupted())
        if not plain:
            raise error

    def _goes_on(self, request: Request, logits: dict[Branch, Tensor]) -> None:
        """A request that has read all that it could."""
        if request.state is not State.RUNNING:
            self._reach_goal(request)
        elif request.reader is not None:
            (branch,) = request.branches
            self._end(request, request.reader(branch.modules, torch.cat(request.hidden)))
        elif not self._moves(request):
            if not request.answer.tokens:
                self.reading.keep(request)
                self._let_follow(request)
            self._write(request, [logits[branch] for branch in request.branches])

    @torch.inference_mode()
    def _write(self, request: Request, logits: Sequence[Tensor]) -> None:
        """The next token, and one more for every draft that it turns out to be."""
        drafts, request.drafts = request.drafts, []
        for at, draft in enumerate([*drafts, None]):
            goes_on = self.writer.write(request, torch.cat([each[at : at + 1] for each in logits]))
            if not goes_on or request.answer.tokens[-1] != draft:
                break
        request.take_back(len(drafts) - at)
        request.drafter.learn(len(drafts), at)
        if not goes_on:
            self._finish(request)

    def _draft(self) -> None:
        """Drafts for answers of modules that recall: as many as a pass of few texts takes with little more time."""
        writing = [
            request for request in self.scheduler.active if request.state is State.RUNNING and request.unread == 1
        ]
        for request in writing:
            self._with(request, partial(self._draft_of, most=MOST // len(writing)))

    def _draft_of(self, request: Request, most: int) -> None:
        request.drafts = []
        if len(request.branches) > 1 or request.reroute or not request.answer.tokens:
            return
        left = min(request.config.max_new_tokens - len(request.answer.tokens) - 1, most)
        memories = request.branches[0].modules.memories
        if memories and left > 0:
            newest = max(len(request.tokens) + len(request.answer.tokens) - LONGEST, 0)
            request.drafts = request.drafter.propose(memories, request.ids(newest, LONGEST), left)

    def _reach_goal(self, request: Request) -> None:
        """The base has read a prompt as far as it should: the router's turn, or the modules'."""
        states = self.reading.end(request)
        routing = request.state is State.ROUTING
        request.rest()
        if not routing:
            return
        read = states[self.routing.layer]
        newest = WINDOW if request.reroute else read.shape[1]
        text = request.text[: read.shape[1]]
        (request.route,) = self.routing.routes(read[:, -newest:], text[-newest:], request.among)
        request.looks = request.looks and request.route.module is not None
        if request.only_routes and not request.looks:
            self._end(request)
            return
        if request.mix > 1:
            request.together = list(request.route.scores)[: request.mix]
            request.names = tuple(name for name in request.together if name != NONE)
        else:
            self._choose(request, request.route)
        self.scheduler.park(request)

    def _choose(self, request: Request, route: Route) -> None:
        request.names = () if route.module is None else (route.module,)
        request.routed_at = len(request.answer.tokens)
        if request.reroute and (not request.changes or request.changes[-1][1] != route.module):
            request.changes.append((request.routed_at, route.module))

    def _moves(self, request: Request) -> bool:
        """Chooses the module of a request anew where it is time for that; returns whether it does not go on at once."""
        written = len(request.answer.tokens)
        if not request.reroute or not written or written % request.reroute or written == request.routed_at:
            return False
        layer, fork = self.routing.layer, request.branches[0].modules.fork
        if layer > fork:  # the base has not read what was written
            request.names = None
            self._read_again(request)
            return True
        request.routed_at = written
        states = request.states_of(layer)
        newest = max(states.shape[1] - WINDOW, 0)
        ids = request.ids(newest, states.shape[1] - newest)
        (request.route,) = self.routing.routes(states[:, newest:], ids, request.among)
        if request.route.module == request.changes[-1][1]:
            return False
        self._choose(request, request.route)
        if fork < self.base.num_layers:
            self._read_again(request)
            return True
        request.cache = request.branches.pop().cache
        request.cache.cut(self.base.num_layers)
        self._release(request)
        self.scheduler.park(request)
        return True

    def _read_again(self, request: Request) -> None:
        """Has a request that is being written wait to be read again: by the base for the router, or by another module.
        What was read is kept with texts that begin alike, so that it is not read twice where there is room."""
        self.reading.keep(request)
        self._release(request)
        self.scheduler.park(request)
        self.scheduler.give_up([request])

    def _start(self, request: Request) -> None:
        """Lets the modules of a request read its text, from what the base has made of it below their fork."""
        assert request.loads is not None
        held = {name: load.module() for name, load in request.loads.items()}
        several = request.mix > 1
        if several:
            each = [[] if name == NONE else [held[name]] for name in request.together]
            scores = [request.route.scores[name] for name in request.together]
            request.mixture = Posterior.of_scores(scores, self.base.device)
        else:
            each = [list(held.values())]
        sets = [self._set_of(modules) for modules in each]
        if request.looks and self._looks(request, sets[0]):
            return
        if request.call is not None:
            self._end(request, request.call(sets[0]))
            return
        fork = max(modules.fork for modules in sets)
        if not fork:
            request.give_up()
        whole = request.whole_states(len(request.text))
        request.states = {layer: [states] for layer, states in whole.items() if layer <= fork}
        for modules in sets:  # one by one: if there is no memory for one, the others go with the request
            request.branches.append(self._branch(request, modules, modules is sets[-1]))
        if request.cache is not None:  # of which no branch has made use
            request.cache.free()
            request.cache = None
        request.begin(self.reading.read_before(request))
        request.resident = max(request.resident, self._resident())

    def _looks(self, request: Request, modules: ModuleSet) -> bool:
        """Whether it takes another turn: its module reads the prompt no better than the base, or it is only routed."""
        request.looks = False
        better = reads_better(modules, request.tokens, self._start_tokens)
        if not better:
            request.route = Route(None, request.route.scores, refused=request.route.module)
            self._choose(request, request.route)
        if request.only_routes:
            self._end(request)
        elif not better:
            self._release(request)
            self.scheduler.park(request)
        return request.only_routes or not better

    def _branch(self, request: Request, modules: ModuleSet, last: bool) -> Branch:
        level = max((at for at in request.states if at <= modules.fork), default=0)
        if not level:
            cache = self.rooms.new()
        elif last:
            assert request.cache is not None
            cache, request.cache = request.cache, None
        else:  # each goes on from the same keys and values
            assert request.cache is not None
            cache = request.cache.copy()
        branch = Branch(modules, cache, level)
        cache.cut(level)
        if self.account.bounded:
            cache.reserve(self.reading.footprint(request).tokens)
        return branch

    def _set_of(self, held: Sequence[KnowledgeModule]) -> ModuleSet:
        """The one of these modules that is in use, or a new one."""
        key = tuple(sorted(module.identity for module in held))
        made = self.sets.get(key)
        if made is None:
            made = self.sets[key] = ModuleSet(self.base, held)
        return made

    @torch.inference_mode()
    def _run(self, parts: Sequence[Part]) -> dict[Branch, Tensor]:
        """One pass. Of requests that the base reads for, what it has come to is kept; of branches that have read all
        there is, returned are the logits (1, v) after their newest token."""
        works = [self._works(part.request, part.tokens) for part in parts]
        self.runner.run([work for own in works for work in own])
        for part, own in zip(parts, works, strict=True):
            request, start = part.request, part.request.read
            request.read += part.tokens
            for layer, hidden in own[0].kept.items():
                request.states.setdefault(layer, []).append(hidden)
            if request.state is not State.RUNNING:
                assert request.goal is not None
                request.states.setdefault(request.goal, []).append(come_to(own[0]).clone())
                continue
            for branch, work in zip(request.branches, own, strict=True):
                branch.newest = come_to(work)[0, -1 - len(request.drafts) :]
            self.writer.read_prompt(request, own, start)
            if request.reader is not None:
                request.hidden.append(come_to(own[0])[0].clone())
            if request.mixture is not None and request.read >= request.stated:
                request.states.clear()
        writing = [part.request for part in parts if part.request.state is State.RUNNING and part.request.unread <= 0]
        return self.writer.logits([(branch, request) for request in writing for branch in request.branches])

    def _works(self, request: Request, many: int) -> list[Work]:
        """A request's part in a pass, one for each of its branches."""
        start = request.read
        ids = torch.tensor([*request.ids(start, many), *request.drafts], device=self.base.device)
        if request.state is not State.RUNNING:
            assert request.cache is not None
            work = Work(self._base_alone, ids, start, request.cache, leaves=request.goal)
            if request.level:
                work.enters, work.hidden = request.level, request.states_of(request.level)[:, start : start + many]
            work.keeps = self.reading.kept(request.goal or 0) - {request.goal} - self.reading.kept(request.level)
            return [work]
        works = []
        for branch in request.branches:
            work = Work(branch.modules, ids, start, branch.cache)
            if branch.level and start < request.stated:
                work.enters, work.hidden = branch.level, request.states_of(branch.level)[:, start : start + many]
            elif request.mixture is None:
                work.keeps = self.reading.kept(branch.modules.fork)
            works.append(work)
        return works

    def _finish(self, request: Request) -> None:
        self.reading.keep(request)
        config, sampler = request.config, request.sampler
        assert sampler is not None
        names, mixture = list(request.names or ()), {}
        if request.mixture is not None:
            mixture = dict(zip(request.together, request.mixture.weights.tolist(), strict=True))
            best = max(mixture, key=lambda name: mixture[name])
            names = [] if best == NONE else [best]
        result = request.answer.generation(
            config,
            modules=names,
            scores=request.route.scores,
            refused=request.route.refused,
            resident_bytes=max(request.resident, self._resident()) if request.reroute else self._resident(),
            loaded=request.loaded,
            prompt_tokens=len(request.tokens),
            mixture=mixture,
            changes=request.changes,
            logprobs=None if config.logprobs is None else sampler.logprobs[: len(request.answer.tokens)],
            prompt_logprobs=None if config.prompt_logprobs is None else request.prompt_logprobs,
        )
        self._end(request, result)

    def _end(self, request: Request, result: Any = None, error: BaseException | None = None) -> None:
        """Ends a request, and lets go of all that it holds within this step."""
        self.scheduler.remove(request)
        self._release(request)
        request.drop()
        request.result, request.error = result, error
        request.state = State.FINISHED  # last: other threads look at it
        if error is None:
            self._let_follow(request)
        while request.followers:
            self._end(request.followers.pop(), error=error)

    def _let_follow(self, request: Request) -> None:
        """Lets those go on that wait for the same prompt to have been read, and for its module to have been chosen."""
        while request.followers:
            other = request.followers.pop(0)
            if other.state is State.FINISHED:
                continue
            if not (request.mix > 1 or request.reroute):
                other.names, other.route, other.looks = request.names, request.route, request.looks
                if request.loads:  # the same versions, whatever the disk has by then
                    self.modules.hold(request.loads.values())
                    other.loads = dict(request.loads)
            self.scheduler.add(other)

    def _release(self, request: Request) -> None:
        """Lets go of a request's modules, and of what was joined of them where no other request runs under them."""
        gone = {branch.modules.digest for branch in request.branches}
        held = request.let_go()
        if gone - {branch.modules.digest for other in self.scheduler.active for branch in other.branches}:
            self.runner.forget()
        if not self.scheduler.active:
            self.slabs.clear()
        self.modules.release(held)
