"""lm-evaluation-harness: a store as a model of the harness, named `growlm`.

    growlm-lm-eval run --model growlm --model_args store=brain,memory=2GB --tasks arc_easy

or, from Python, import this module and call `lm_eval.simple_evaluate(model="growlm", model_args="store=brain", ...)`.
Knows the harness's requests; the engine routes and runs. Needs the extra `eval`.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from growlm.base.placement import find_device, out_of_memory
from growlm.data import start_tokens
from growlm.engine import AUTO, Engine
from growlm.engine.second_look import SecondLooks
from growlm.errors import ConfigError, GrowlmError
from growlm.evaluation.contamination import require_unlearned
from growlm.evaluation.tasks import FOLDER
from growlm.modules import ModuleSet
from growlm.modules.scoring import continuation_scores
from growlm.progress import phase, reporting, track
from growlm.requirements import remarks
from growlm.store import Store

_log = logging.getLogger(__name__)
_SUBJECT = "growlm"  # what its progress goes under
_ROUTED = 256  # tokens of a context, the newest, that the router sees at most
_NEW_TOKENS = 256  # where a task does not say how many to write


@register_model("growlm")
class HarnessModel(TemplateLM):
    """A store that answers the harness.

    Args:
        store: folder of the store.
        memory: budget for all weights, as in `growlm generate`.
        module: "auto" (each context is routed), "base", or a module's name for everything.
        max_length: longest text in tokens; by default what the base's config says.
        allow_contaminated: answer tasks too of which more than one row of a hundred stands in a text that a module has
            learned.
        batch_size: the harness's own; requests are batched by length, whatever it says.
        device: as in `growlm generate`.

    Raises:
        StoreError, BudgetError, UnknownModuleError: as `Engine` does.
        ConfigError: an argument that is not known, or a `max_length` that the base cannot read.

    What it is asked raises `DataError` where more than one row of a hundred of the task stands in modules' texts.
    """

    def __init__(
        self,
        store: str,
        memory: str | None = None,
        module: str = AUTO,
        max_length: int | None = None,
        allow_contaminated: bool | str = False,
        second_look: bool | str = False,
        batch_size: Any = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        names = [name for name in unknown if name != "max_batch_size"]
        if names:
            raise ConfigError(
                f"--model_args: {names[0]!r} is not known; known are store, memory, module, max_length, "
                "allow_contaminated, second_look"
            )
        opened = Store.open(store)
        self._module = None if module == "base" else module
        if self._module not in (None, AUTO):
            opened.module(str(self._module))
        looks = _switch("second_look", second_look)
        if looks and self._module != AUTO:
            raise ConfigError("--model_args: second_look is of no effect where module is given; leave one of them out")
        with reporting(_SUBJECT):
            self.engine = Engine(opened, memory=memory, device=device)
        self.tokenizer = self.engine.tokenizer
        self._start = start_tokens(self.tokenizer)
        positions: int = getattr(self.engine.base.config, "max_position_embeddings", None) or 2048
        self.max_length = positions if max_length is None else int(max_length)
        limit = self.engine.base.max_positions
        if limit is not None and self.max_length > limit:
            raise ConfigError(
                f"--model_args: max_length is {self.max_length}; {self.engine.base.where} has {limit} learned "
                "positions, give at most so many"
            )
        self._routed = min(_ROUTED, limit or _ROUTED)
        self._chosen: dict[tuple[int, ...], str | None] = {}  # by the tokens that were routed
        self._allow_contaminated = _switch("allow_contaminated", allow_contaminated)
        self._looks = SecondLooks(self.engine) if looks else None
        self._unlearned: set[tuple[str, int]] = set()  # rows of tasks that were looked for

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.engine.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._start[0] if self._start else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.engine.tokenizer.encode(string, add_special_tokens=False)
        if ids:
            self.engine.base.require_rows(ids, "a text of the task", self.tokenizer)
        begins = bool(self._start) and ids[:1] == self._start
        return ids if add_special_tokens is False or begins else [*self._start, *ids]

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.store.path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.engine.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._require_unlearned(requests, disable_tqdm)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with reporting(_SUBJECT, not disable_tqdm):
            names = self._modules_of([context[-self._routed :] for _, context, _ in requests])
            scores = self._score([(context, continuation) for _, context, continuation in requests], names)
        for (key, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._require_unlearned(requests, disable_tqdm)
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        beginnings = [[*self._start, *text][: self._routed] or [self.prefix_token_id] for text in texts]
        pairs: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(text, self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owner.append(number)
        totals = [0.0] * len(requests)
        with reporting(_SUBJECT, not disable_tqdm):
            chosen = self._modules_of(beginnings)
            scores = self._score(pairs, [chosen[i] for i in owner])
        for number, (value, _) in zip(owner, scores, strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._require_unlearned(requests, disable_tqdm)
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        repeats: dict[tuple[Any, ...], int] = defaultdict(int)
        for number, request in enumerate(requests):
            context, settings = request.args
            sampling = _sampling(settings)
            # The same request again asks for another draw: maj@8 sends each eight times.
            seed = repeats[context, sampling]
            repeats[context, sampling] += 1
            groups[*sampling, seed if sampling[2] > 0 else 0].append(number)
        answers = [""] * len(requests)
        cut = 0
        with reporting(_SUBJECT, not disable_tqdm), phase("answering", len(requests), "prompts"):
            for (stop, tokens, temperature, top_p, seed), places in groups.items():
                room = self.max_length - tokens
                if room < 1:
                    raise ConfigError(
                        f"the task writes up to {tokens} tokens, but a text has {self.max_length} at most, prompt "
                        f"included; give --gen_kwargs max_gen_toks={max(self.max_length // 4, 1)}"
                    )
                prompts = [self.tok_encode(requests[i].args[0]) for i in places]
                cut += sum(len(prompt) > room for prompt in prompts)
                prompts = [prompt[-room:] for prompt in prompts]
                found = self.engine.generate_many(
                    prompts, modules=self._module, stop=stop, max_new_tokens=tokens, temperature=temperature,
                    top_p=top_p, seed=seed,
                )  # fmt: skip
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
        self._note_cuts(cut, len(requests))
        return answers

    def _require_unlearned(self, requests: Sequence[Instance], quiet: bool) -> None:
        """The tasks do not stand in texts that modules which may answer have learned; every row is looked for once."""
        if self._allow_contaminated or self._module is None:
            return
        rows = {(r.task_name or "the task", r.doc_id): r.doc for r in requests if r.doc_id is not None}
        new: dict[str, list[Any]] = defaultdict(list)
        for (task, number), doc in rows.items():
            if (task, number) not in self._unlearned:
                new[task].append(doc)
        store = self.engine.store
        modules = list(store.modules.values()) if self._module == AUTO else [store.module(self._module)]
        with reporting(_SUBJECT, not quiet):
            for task, docs in new.items():
                require_unlearned(task, docs, modules, self.tokenizer, self.engine.base.vocab_size)
        self._unlearned |= rows.keys()

    def _note_cuts(self, cut: int, of: int) -> None:
        if cut:
            _log.warning(
                "%d of %d texts are longer than the %d tokens of max_length: their beginnings, with the first of their "
                "shots, are cut off; fewer shots (--num_fewshot) are shorter", cut, of, self.max_length,
            )  # fmt: skip

    # Modules

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], names: Sequence[str | None]
    ) -> list[tuple[float, bool]]:
        """Each (context, continuation) under its module; a module is read once for all that want it."""
        cut = []
        shortened = 0
        for context, continuation in pairs:
            continuation = continuation[-self.max_length :]
            room = max(self.max_length + 1 - len(continuation), 1)  # the last token is predicted and not read
            shortened += len(context) > room
            cut.append((context[-room:], continuation))
        self._note_cuts(shortened, len(pairs))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(cut)
        with phase("scoring", len(cut), "texts"):
            for name in dict.fromkeys(names):
                places = [place for place, wanted in enumerate(names) if wanted == name]
                with self.engine.modules.using([] if name is None else [name]) as held:
                    modules = ModuleSet(self.engine.base, list(held.values()))
                    found = continuation_scores(modules, [cut[i] for i in places])
                    del modules
                for place, score in zip(places, found, strict=True):
                    scores[place] = score
        return scores

    def _modules_of(self, texts: Sequence[Sequence[int]]) -> list[str | None]:
        """Which module each text wants; a text that was seen before is not read again, unless its module is gone."""
        if self._module != AUTO:
            return [self._module] * len(texts)
        seen = [tuple(text) for text in texts]
        gone = self._gone(self._chosen.values())
        self._chosen = {text: name for text, name in self._chosen.items() if name not in gone}
        new = sorted({text for text in seen if text not in self._chosen}, key=len)
        for at in track(range(0, len(new), 16), "routing", "batches"):
            some = new[at : at + 16]
            self._chosen |= dict(zip(some, self._route(some), strict=True))
        return [self._chosen[text] for text in seen]

    def _route(self, texts: Sequence[Sequence[int]]) -> list[str | None]:
        router = self.engine.router
        states = router.states(self.engine.base, texts)
        names = [route.module for route in router.route(*states, texts)]
        while gone := self._gone(names):  # withdrawn while the harness runs
            router = router.without(gone)
            names = [route.module for route in router.route(*states, texts)]
        return self._looks.kept(names, texts) if self._looks else names

    def _gone(self, names: Iterable[str | None]) -> set[str]:
        return {name for name in set(names) if name is not None and self.engine.store.find(name) is None}


def _switch(name: str, given: bool | str) -> bool:
    if str(given).lower() not in ("true", "false"):
        raise ConfigError(f"--model_args: {name} is {given!r}; give true or false")
    return str(given).lower() == "true"


def _sampling(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
    """Stop texts, most new tokens, temperature and top-p of a request's settings."""
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    temperature = settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if settings.get("do_sample") else 0.0  # as transformers samples
    if settings.get("do_sample") is False:
        temperature = 0.0
    tokens = settings.get("max_gen_toks", settings.get("max_new_tokens", _NEW_TOKENS))
    return tuple(s for s in stop if s), int(tokens), float(temperature), float(settings.get("top_p", 1.0) or 1.0)


def main() -> None:
    """The harness's own command line, to which `growlm` is a model and `growlm_...` are tasks."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    for remark in remarks():
        print(f"growlm: {remark}", file=sys.stderr)
    setup_logging()
    line = HarnessCLI()
    arguments = line.parse_args()
    written = EvaluatorConfig.load_yaml_config(arguments.config) if getattr(arguments, "config", None) else {}
    if "include_path" in arguments:
        given = arguments.include_path or written.get("include_path")
        arguments.include_path = [str(FOLDER), *([given] if given else [])]
    if "device" in arguments and not arguments.device and not written.get("device"):
        arguments.device = str(find_device())  # the harness's default is cuda:0 anywhere
    try:
        line.execute(arguments)
    except (GrowlmError, RuntimeError) as error:
        told = str(error) if isinstance(error, GrowlmError) else out_of_memory(error)
        if told is None:
            raise
        print(f"growlm: {told}", file=sys.stderr)
        sys.exit(1)
