"""Learn: one body of text becomes one module, trained beside the frozen base on its own data alone (IP-LLM, phase 2).

Below the fork the base runs without gradient, and its output is kept where it will be read again. Knows the contract of
modules and nothing of any one kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from growlm import router
from growlm.base import Base
from growlm.errors import BaseModelError, ConfigError, IntegrityError, StoreError
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.modules.probe import probe
from growlm.progress import reporting, say
from growlm.store import MANIFEST, ROUTER_TRAINED, Store, StoredModule
from growlm.training.admission import Comparison, require_better, require_no_worse
from growlm.training.config import AUTO, LearnConfig
from growlm.training.corpus import Tokens
from growlm.training.general import ensure_general
from growlm.training.learn_run import LearnRun
from growlm.training.loop import require_finite
from growlm.training.module_training import ModuleTraining, as_served
from growlm.training.parallel import Ranks, joined
from growlm.training.recalling import recalling, text_of
from growlm.training.router import router_after
from growlm.training.runs import empty, run_folder
from growlm.training.samples import Sample, side_by_side

# Student's t for a 95 % interval, by the number of texts less one; from ten on a formula is near enough.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_Z = 1.96
_LARGEST = 20.0  # loss above which a perplexity is no number that anyone reads


@dataclass(frozen=True)
class LearnResult:
    """What was learned. Losses are in nats a token on held-out text; `tokens` counts every token trained on, in `steps`
    steps, of which `best_step` is the one that was kept."""

    name: str
    version: int
    loss_before: float
    loss_after: float
    tokens: int
    seconds: float
    tokens_per_second: float
    gain: float = 0.0  # by how much the loss is lower, on passages that chose nothing,
    error: float | None = None  # its standard error; None of a single text
    texts: int | None = None  # and of how many held-out texts
    learning_rate: float | None = None
    steps: int | None = None
    best_step: int | None = None
    replaced: dict[str, Any] | None = None  # of an update: the version before, and how it compares with that one
    router: int | None = None  # version of the router that was trained with it, where the store's kind is trained
    validation: dict[str, float] = field(
        default_factory=dict
    )  # held-out loss by steps done, by which the best was kept
    samples: tuple[Sample, ...] = ()  # held-out prompts, answered by base and module
    history: list[dict[str, Any]] = field(default_factory=list)  # of every step, of a run that ended with this call

    def to_json(self) -> dict[str, Any]:
        told = asdict(replace(self, history=[]))
        del told["history"]
        return told

    def table(self) -> list[list[str]]:
        """Base against module on held-out text that chose nothing: a heading, then a row for each number."""
        before, after = self.loss_before, self.loss_after
        lower = f"{1 - math.exp(after - before):.1%}" if after - before < math.log(10) else "no"
        gain = f"{self.gain:.3f}"
        if self.error is not None:
            spread = _errors(self.texts) * self.error
            gain += f" ({self.gain - spread:.3f} to {self.gain + spread:.3f})"
        perplexities = [math.exp(loss) if loss < _LARGEST else math.inf for loss in (before, after)]
        return [
            ["held-out text", "base", self.name, "lower by (95 % interval)"],
            ["loss, nats a token", f"{before:.3f}", f"{after:.3f}", gain],
            ["perplexity", *(_number(p) for p in perplexities), lower],
        ]

    def lines(self, width: int = 200) -> list[str]:
        """What was measured, as a person reads it.

        Args:
            width: characters of a sample's text that are shown.
        """
        texts = "" if self.texts is None else f", measured by {self.texts} held-out text" + "s" * (self.texts != 1)
        router = f"; router version {self.router}" if self.router else ""
        lines = [
            f"{self.name} version {self.version}: learned from {self.tokens:,} tokens, repeats included, in "
            f"{self.seconds:,.0f} s ({self.tokens_per_second:,.0f} tokens/s){texts}{router}"
        ]
        rows = self.table()
        first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
        for label, *cells in rows:
            lines.append("  ".join([label.ljust(first), *map(str.rjust, cells, rest)]))
        if self.replaced is not None:
            found = Comparison(**{key: value for key, value in self.replaced.items() if key != "version"})
            lines.append(f"against version {self.replaced['version']}, which it replaces: {found.told()}")
        for sample in self.samples:
            lines += ["", f"prompt: {shown(sample.prompt, width, end=True)}"]
            parts = {"the text": sample.text, "base": sample.base, self.name: sample.module}
            lines += [f"  {name}: {shown(text, width)}" for name, text in parts.items()]
        return lines


def _number(perplexity: float) -> str:
    if math.isinf(perplexity):
        return "∞"
    return f"{perplexity:,.2f}" if perplexity < 100 else f"{perplexity:,.0f}"


def _errors(texts: int | None) -> float:
    """Standard errors on either side of the mean of so many texts that make a 95 % interval."""
    free = max((texts or 2) - 1, 1)
    if free <= len(_T):
        return _T[free - 1]
    return _Z + (_Z**3 + _Z) / (4 * free) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * free**2)


def shown(text: str, width: int, *, end: bool = False) -> str:
    """A text in one line of at most so many characters: its beginning, or its end."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return f"...{text[-width:]}" if end else f"{text[:width]}..."


def learn(
    store: Store,
    name: str,
    data: Sequence[str | Path],
    config: LearnConfig | None = None,
    *,
    update: bool = False,
    restart: bool = False,
    samples: int = 0,
    shard_base: bool = False,
    progress: bool | None = None,
) -> LearnResult:
    """Trains a new module on `data` and adds it to the store and its router.

    A run that was stopped goes on where it was when it is called again with the same arguments; once its module is
    saved, with the router's training. Called in each of several ranks that torchrun has started, they train together
    (`parallel`), and the first of them writes.

    Args:
        data: files, folders or `hub:owner/name`.
        update: allow `name` to exist; the module becomes its next version.
        restart: forget what a stopped run with the same arguments had done.
        samples: how many held-out prompts base and module answer at the end, side by side.
        shard_base: of several ranks each has a part of the base's layers, which are gathered where they run.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        StoreError: `name` is not allowed or is taken, or the disk is full.
        DataError: data that is missing, malformed or too little.
        TrainingError: the loss became NaN or infinite; nothing is saved.
        NotBetterError: the module does no better than the base on held-out text, or worse than the version that it is
            to replace; nothing is saved.
        BaseModelError: the store's base is missing or has changed.
        ConfigError: there is no such device, or one alone to share a base.
        Interrupted: stopped by the user; progress is saved.
        RankError: another of the processes that train it together has ended.
    """
    with joined() as ranks, reporting(name, progress if ranks.first else False):
        if shard_base:
            ranks.require_several("--shard-base")
            if store.manifest.router == ROUTER_TRAINED:
                raise ConfigError(
                    f"{store.path}: its router is a transformer that is trained with the whole base; --shard-base is "
                    'for stores of another router ("growlm router --help")'
                )
        if config is not None and config.batch_size is not None:
            ranks.require_divisor(config.batch_size)
        run = LearnRun.prepare(
            store, name, data, config or LearnConfig(), update=update, ranks=ranks, shard_base=shard_base
        )
        run.require_agreed(ranks)
        if not ranks.first:
            return _along(run, ranks)
        result = _learn(
            run, ranks, chosen=config is None or config.kind == AUTO, update=update, restart=restart, samples=samples
        )
        ranks.first_says(None)  # they look for it now
        return result


def _along(run: LearnRun, ranks: Ranks) -> LearnResult:
    """What ranks do beside the first: they train along, and find what it has saved."""
    if run.saved is None:
        tokens, tokenizer = run.tokenized()
        base, kind = _base_to_train_on(run, ranks, tokens, tokenizer), kind_of(run.config.kind)
        if kind.trains:
            ModuleTraining(
                base, kind, run.config, tokens.packed, run.folder, tokens.begin, tokens.replay,
                ranks=ranks, whole=run.whole_base,
            ).run()  # fmt: skip
            if run.rounds_base:
                del base
                base = run.load_base()
    ranks.first_says(None)
    stored = run.store.find(run.name)
    if stored is None:
        raise StoreError(f"{run.store.path}: module {run.name!r}, which rank 0 has saved, is not there")
    return _result(stored, None)


def _base_to_train_on(run: LearnRun, ranks: Ranks, tokens: Tokens, tokenizer: Any) -> Base:
    # The router is only shown what the engine will show it: the base in the store's dtype.
    unshown = ranks.first_says(not router.has_general(run.store))
    rounded = run.placement.dtype if kind_of(run.config.kind).trains else None
    base = run.load_base(dtype=None if unshown else rounded)
    run.require_fit(base, tokens, tokenizer)
    if unshown and ranks.first:
        ensure_general(run.store, base, tokenizer)
    if unshown and run.shared_by is not None and run.rounds_base and rounded is not None:
        ranks.first_says(None)  # until then the others give their parts of this one
        del base
        base = run.load_base(dtype=rounded)
    return base


def _learn(run: LearnRun, ranks: Ranks, *, chosen: bool, update: bool, restart: bool, samples: int) -> LearnResult:
    store, name, config = run.store, run.name, run.config
    busy = f"{store.path}: the same learning of {name!r} is running already"
    if run.saved is not None:
        with run_folder(run.folder, busy, restart=True):  # its checkpoints are of no use now
            say(f"version {run.saved.version} is saved already")
            version = router_after(store, restart=restart, device=config.device)
        return _result(run.saved, version)
    store.check_base()
    tokens, tokenizer = run.tokenized()
    for line in run.body.lines(tokens, tokenizer, config):
        say(line)
    if (other := run.of_same_files()) is not None:
        both = "a router can hardly tell them apart and takes one of them"
        say(f"module {other!r} was learned from the same files: {both}; name the other where you want it (--module)")
    if chosen:
        say(f"kind {config.kind}, {'which suits this base' if run.old is None else 'as the version before'}")
    if config.shape.recall:
        leave_out = "" if config.kind == "recall" else "; a kind without +recall does not"
        say(f"the module will hold this text, for anyone who has it to read{leave_out}")

    with run_folder(run.folder, busy, restart=restart) as work:
        base = _base_to_train_on(run, ranks, tokens, tokenizer)
        started, kind = time.monotonic(), kind_of(config.kind)
        if kind.trains:
            learning = ModuleTraining(
                base, kind, config, tokens.packed, work, tokens.begin, tokens.replay, tokens.validation, ranks,
                run.whole_base,
            )  # fmt: skip
            seconds = learning.run()
            trained, num_tokens, searched = learning.module, learning.num_tokens, learning.record()
            steps = learning.history
            del learning
            if run.rounds_base:
                del base
                base = run.load_base()
        else:
            trained, num_tokens, searched, steps = kind.create(base, config.shape), 0, {}, []
            seconds = 0.0
        module = as_served(base, trained, name)
        if module.memory is not None:
            module, remembered = recalling(base, module, tokens, tokenizer, name)
            searched["recall"] = remembered
            num_tokens = num_tokens or remembered["tokens"]  # of which nothing is trained
            seconds = seconds or time.monotonic() - started
        alone, together = ModuleSet(base), ModuleSet(base, [module])
        found = tokens.compare(alone, together, config)
        require_finite(f"{name}: the held-out loss after training", found.after)
        if not config.admit_anyway:
            require_better(name, found)
        files = tokens.evidence(base, config, run.keep, store.manifest.routing_layer)
        training = {
            **run.body.record(),
            "tokens": num_tokens,
            "seed": config.seed,
            "settings": config.to_json(),
            **run.placement.record(),
            "run": run.id,
            "loss_before": found.before,
            "loss_after": found.after,
            "comparison": found.to_json(),
            **searched,
            "seconds": seconds,
            "probe": {"base": probe(alone), "module": probe(together)},
        }
        memory, whole = module.memory, None
        held_back = None if memory is None else memory.text
        # Before it is saved: stopped here, the same command goes on.
        asked = side_by_side(base, module, tokenizer, tokens.heldout, samples, seed=config.seed)
        while True:
            if memory is not None:
                memory.text = held_back
            now = store.find(name)
            if now is not None and not update and (run.old is None or now.version != run.old.version):
                raise StoreError(f"{store.path}: module {name!r} exists (learned meanwhile); use --update")
            # The version that is current now, which another run may have saved while this one learned.
            if now is not None and (former := _loadable(store, now, base)) is not None:
                replaced = tokens.compare(ModuleSet(base, [former]), together, config)
                say(f"version {now.version}, which it would replace: {replaced.told()}")
                if not config.admit_anyway:
                    replacing = f"version {now.version}, which it would replace"
                    require_no_worse(name, replaced, replacing, "give the text of before as --replay")
                training["replaced"] = {"version": now.version, **replaced.to_json()}
            made_from = None if now is None else now.version
            if memory is not None:  # what was held out, it recalls from now on
                memory.text = whole = whole or text_of(base, run.body.text.documents, tokenizer)
                training["recall"] |= {"tokens": whole.num_tokens, "documents": whole.num_documents}
                training["probe"] = {"base": probe(alone), "module": probe(together)}
            try:
                stored = router.commit_and_route(store, name, module, training, files, now, made_from=made_from)
                break
            except StoreError:
                again = store.find(name)
                if made_from is None or again is None or again.version == made_from:
                    raise
        empty(work)  # the disk is needed; the folder stays until the router knows the module as well
        version = router_after(store, restart=restart, base=base)
    return replace(_result(stored, version), samples=asked, history=steps)


def _loadable(store: Store, old: StoredModule, base: Base) -> KnowledgeModule | None:
    """A version that is to be replaced; None if it is damaged or of another base, so that nothing is lost with it."""
    try:
        return store.load(old.name, base, version=old.version)
    except (StoreError, BaseModelError):
        return None


def _result(stored: StoredModule, trained_router: int | None) -> LearnResult:
    said = stored.manifest.training
    try:
        tokens, seconds, before, after = (said[key] for key in ("tokens", "seconds", "loss_before", "loss_after"))
    except KeyError as error:
        raise IntegrityError(
            f"{stored.folder / MANIFEST}: training: {error} is missing; restore it or learn {stored.name!r} again"
        ) from None
    found = said.get("comparison", {})
    return LearnResult(
        stored.name,
        stored.version,
        before,
        after,
        tokens,
        seconds,
        tokens / max(seconds, 1e-9),
        gain=found.get("gain", before - after),
        error=found.get("error"),
        texts=found.get("passages"),
        learning_rate=said.get("learning_rate"),
        steps=said.get("steps"),
        best_step=said.get("best_step"),
        replaced=said.get("replaced"),
        validation=said.get("validation", {}),
        router=trained_router,
    )
