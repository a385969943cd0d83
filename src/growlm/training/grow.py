"""Grow: more experts for a learned module of kind peer, trained on new text alone, and taken back again (PEER).

What a module has learned keeps its bits: a step appends sub-keys and the experts that they find, and what was there is
neither renumbered nor trained. Every step is recorded, with its share of what the router knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growlm import router
from growlm.base import Base
from growlm.base.placement import Placement, find_device
from growlm.disk.files import locked
from growlm.errors import ConfigError, IntegrityError, StoreError, setting
from growlm.modules import KnowledgeModule, ModuleSet
from growlm.modules.peer import Peer, PeerConfig
from growlm.modules.probe import probe
from growlm.progress import reporting, say
from growlm.store import ROUTER_TRAINED, WEIGHTS, Store, StoredModule
from growlm.training.admission import require_better
from growlm.training.config import GrowConfig
from growlm.training.corpus import (
    Files,
    TrainingCorpus,
    bytes_to_keep,
    evidence_beside,
    joined,
    parted,
    require_positions,
)
from growlm.training.general import ensure_general
from growlm.training.loop import require_finite
from growlm.training.module_training import ModuleTraining, as_served
from growlm.training.router import require_samples, router_after
from growlm.training.runs import empty, folder_of, module_run, run_folder
from growlm.units import parse_count


@dataclass(frozen=True)
class GrowResult:
    """What became of a module. Numbers of experts are those of each of its pools. Losses, in nats a token on held-out
    text, and what follows are None where nothing was trained."""

    name: str
    version: int
    experts_before: int
    experts: int
    experts_open: int  # of these, those that can be found
    loss_before: float | None = None
    loss_after: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    gain: float | None = None  # by how much the loss is lower,
    error: float | None = None  # and its standard error; None of a single text
    router: int | None = None  # version of the router that was trained with it, where the store's kind is trained

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def grow(
    store: Store,
    name: str,
    experts: int | str | None = None,
    data: Sequence[str | Path] = (),
    config: GrowConfig | None = None,
    *,
    restart: bool = False,
    progress: bool | None = None,
) -> GrowResult:
    """Appends experts to a module, trains new ones on `data`, or both; the result is the module's next version.

    Until they are trained the module answers as before, to the bit. Training changes nothing but what was appended and
    never trained; a run that was stopped goes on where it was when it is called again with the same arguments.

    Args:
        experts: how many more in every pool, e.g. 4096 or "+4k"; None trains what was appended before.
        data: files, folders or `hub:owner/name`; none trains nothing.
        restart: forget what a stopped run with the same arguments had done.
        progress: False is silent; by default there are bars on stderr, or where it is no terminal, lines, one in ten
            seconds at most.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: it is of another kind, `experts` is no number by which it can grow, nothing is to be done, or there
            is no such device.
        StoreError: the module is being grown by another process or was changed meanwhile, or the disk is full.
        DataError: data that is missing, malformed or too little.
        TrainingError: the loss became NaN or infinite; nothing is saved.
        Interrupted: stopped by the user; progress is saved.
    """
    config = config or GrowConfig()
    number = None if experts is None else _number(experts)
    if number is None and not data:
        raise ConfigError("nothing to do: give a number of experts to append, text to train new ones on, or both")
    placement = Placement.of(config.device, config.precision)
    _peer(store, name)
    with reporting(name, progress), alone(store, name):
        stored, shape = _peer(store, name)
        if data:
            return _train(store, stored, shape, number, data, config, placement, restart=restart)
        assert number is not None
        return _append(store, stored, shape, number, config.seed, placement.device)


def take_back(store: Store, name: str, *, device: str | torch.device = "auto") -> GrowResult:
    """Takes the last step of a module's growth back: its next version has neither the step's experts nor its text in
    the router's evidence, and everything else to the bit as it was before that step. The version with them stays.

    Args:
        device: where its answer to a fixed text is computed, which is kept beside it.

    Raises:
        UnknownModuleError: no such module.
        ConfigError: it is of another kind, there is no step to take back, or no such device.
        IntegrityError: its manifest does not say how it has grown.
        StoreError: the module is being grown by another process or was changed meanwhile, or the disk is full.
    """
    found = find_device(device)
    _peer(store, name)
    with alone(store, name):
        stored, shape = _peer(store, name)
        steps = _steps(stored, shape)
        if not steps:
            raise ConfigError(f"{stored.folder}: its pools are as they were learned; there is no step to take back")
        base, module = _load(store, stored, found)
        files = evidence_beside(stored)
        try:
            files = parted(files, steps[-1]["evidence"])
        except (KeyError, TypeError, ValueError):
            raise _unrecorded(stored) from None
        return _commit(store, stored, base, module.taken_back(base), steps[:-1], files)


def _append(
    store: Store, stored: StoredModule, shape: PeerConfig, number: int, seed: int, device: torch.device
) -> GrowResult:
    grown = shape.grown(number)  # before anything is read
    steps = _steps(stored, shape)
    base, module = _load(store, stored, device)
    step = {**_numbers(shape, grown), **_from(stored), "seed": seed, "tokens": 0, "sources": [], "evidence": {}}
    step["evidence"] = dict.fromkeys(("vectors", "heldout", "samples"), 0)
    return _commit(store, stored, base, module.grown(base, number, seed), [*steps, step], evidence_beside(stored))


def _train(
    store: Store,
    stored: StoredModule,
    shape: PeerConfig,
    number: int | None,
    data: Sequence[str | Path],
    config: GrowConfig,
    placement: Placement,
    *,
    restart: bool,
) -> GrowResult:
    name, steps = stored.name, _steps(stored, shape)
    router.require_same_states(store, stored)  # what the router keeps of the new text joins what it has
    keep = bytes_to_keep(store, name, config)
    if store.manifest.router == ROUTER_TRAINED:
        require_samples(store, list(store.modules.values()))
    body = TrainingCorpus.read(data, config)
    busy = f"{store.path}: the same growth of {name!r} is running already"

    def run_from(origin: Any) -> str:
        return module_run(store, ["grow", name, origin, number, body.digest], config, placement)

    if steps and _unfinished(store, stored, steps[-1]) and steps[-1]["run"] == run_from(steps[-1].get("from")):
        with run_folder(folder_of(store, name, steps[-1]["run"]), busy, restart=True):
            say(f"version {stored.version} is saved already")
            version = router_after(store, restart=restart, device=config.device)
        return _result(stored, shape, steps[-1], version)
    if number is not None:
        grown = shape.grown(number)
    elif shape.rows_open < shape.steps[-1]:
        grown = shape
    else:
        raise ConfigError(
            f"{stored.folder}: all its experts are trained; say with --experts +N how many new ones the text is for"
        )
    if not shape.open_steps:
        raise ConfigError(f"{stored.folder}: its experts are untrained; run growlm learn")
    # What was appended before and never trained is trained along, and from then on is one step with it.
    opened = shape.model_copy(update={"steps": shape.steps[: shape.open_steps]})
    step: dict[str, Any] = {**_numbers(opened, grown), **_from(stored)}

    store.check_base()
    tokenizer = store.load_tokenizer()
    tokens = body.tokenized(tokenizer, config)
    for line in body.lines(tokens, tokenizer, config):
        say(line)
    run = run_from(step["from"])
    with run_folder(folder_of(store, name, run), busy, restart=restart) as work:
        base, module = _load(store, stored, placement.device)
        require_positions(base, config)
        tokens.require_rows(base, body.where, tokenizer)
        served = base.dtype
        if not router.has_general(store):
            ensure_general(store, base, tokenizer)
        if number is not None:
            module = module.grown(base, number, config.seed)
        module.float().train_new()
        learning = ModuleTraining(
            base, module, config, tokens.packed, work, replay=tokens.replay, validation=tokens.validation
        )
        # Sub-keys have a dense gradient, of which the old rows are zero: a decay would change them.
        seconds = learning.run(decay=lambda parameter, _: module.is_table(parameter))
        num_tokens, searched = learning.num_tokens, learning.record()
        del learning
        if placement.dtype != served:
            del base
            base = store.load_base(device=placement.device)
        trained = as_served(base, module, name)
        former = ModuleSet(base, [store.load(name, base, version=stored.version)])
        found = tokens.compare(former, ModuleSet(base, [trained]), config)
        require_finite(f"{name}: the held-out loss after training", found.after)
        if not config.admit_anyway:
            require_better(name, found, f"version {stored.version} on the new text")
        files, counts = joined(
            evidence_beside(stored), tokens.evidence(base, config, keep, store.manifest.routing_layer)
        )
        step |= {
            **body.record(),
            "tokens": num_tokens,
            "seed": config.seed,
            "settings": config.to_json(),
            **placement.record(),
            "run": run,
            "loss_before": found.before,
            "loss_after": found.after,
            "comparison": found.to_json(),
            **searched,
            "seconds": seconds,
            "evidence": counts,
        }
        result = _commit(store, stored, base, trained, [*steps[: shape.open_steps - 1], step], files)
        empty(work)  # the disk is needed; the folder stays until the router knows the text as well
        version = router_after(store, restart=restart, base=base)
    saved, shape = _peer(store, name)
    assert saved.version == result.version
    return _result(saved, shape, step, version)


def _unfinished(store: Store, stored: StoredModule, step: dict[str, Any]) -> bool:
    """Whether a version is there whose run has not ended: the run's folder goes last."""
    run = step.get("run")
    return isinstance(run, str) and folder_of(store, stored.name, run).is_dir()


def _commit(
    store: Store, old: StoredModule, base: Base, module: KnowledgeModule, steps: list[dict[str, Any]], files: Files
) -> GrowResult:
    """Saves a module as the version after `old`, with the steps by which it has grown."""
    probes = {"base": probe(ModuleSet(base)), "module": probe(ModuleSet(base, [module]))}
    training = {**old.manifest.training, "growth": steps, "probe": probes}
    saved = router.commit_and_route(
        store, old.name, module, training, files, old, made_from=old.version, evidence_of=old
    )
    return _result(saved, old.shape()[1], None, None)


def _result(stored: StoredModule, before: PeerConfig, step: dict[str, Any] | None, router: int | None) -> GrowResult:
    """
    Args:
        before: shape of the version before, where nothing was trained; the `step` that was trained says it itself.
    """
    shape = stored.shape()[1]
    b = shape.sub_keys[1]
    numbers = (stored.name, stored.version, before.steps[-1] * b, shape.steps[-1] * b, shape.rows_open * b)
    if step is None:
        return GrowResult(*numbers)
    name, version, _, experts, opened = numbers
    try:
        speed = step["tokens"] / max(step["seconds"], 1e-9)
        return GrowResult(
            name, version, step["experts"][0], experts, opened, step["loss_before"], step["loss_after"],
            step["tokens"], step["seconds"], speed, *_gain(step), router,
        )  # fmt: skip
    except KeyError:
        raise _unrecorded(stored) from None


def _gain(step: dict[str, Any]) -> tuple[float, float | None]:
    found = step.get("comparison", {})
    return found.get("gain", step["loss_before"] - step["loss_after"]), found.get("error")


def _number(experts: int | str) -> int:
    text = str(experts).strip()
    number = None
    if re.fullmatch(r"[+-]?[0-9]{1,15}", text):
        number = int(text)
    elif re.fullmatch(r"\+?[0-9]{1,9}(\.[0-9]{1,9})?[kKmM]", text):
        number = parse_count(text.removeprefix("+"))
    if number is None or number < 1:
        told = text if len(text) <= 40 else f"{text[:40]}..."
        raise ConfigError(f"{setting('experts')} is {told!r}; give how many to append, e.g. +4096")
    return number


def _peer(store: Store, name: str) -> tuple[StoredModule, PeerConfig]:
    """
    Raises:
        UnknownModuleError: no such module.
        ConfigError: it is of another kind.
    """
    stored = store.module(name)
    if stored.kind != Peer.kind:
        raise ConfigError(
            f"{stored.folder}: is of kind {stored.kind}; modules of kind peer grow, and those that recall their "
            "text. Learn new text as a module of its own"
        )
    shape = stored.shape()[1]
    if not shape.steps or shape.layers is None:
        raise IntegrityError(f"{stored.folder}: its manifest does not say how large its pools are; learn it again")
    return stored, shape


@contextmanager
def alone(store: Store, name: str) -> Iterator[None]:
    """
    Raises:
        StoreError: another process is changing the module's size.
    """
    with locked(store.work / f"{name}-grow.lock", wait=False, keep=False) as mine:
        if not mine:
            raise StoreError(f"{store.path}: {name!r} is being changed by another process; wait for it")
        yield


def _load(store: Store, stored: StoredModule, device: torch.device) -> tuple[Base, Peer]:
    base = store.load_base(device=device)
    module = store.load(stored.name, base, version=stored.version)
    assert isinstance(module, Peer)
    return base, module


def _steps(stored: StoredModule, shape: PeerConfig) -> list[dict[str, Any]]:
    """What is recorded of the steps of growth, the first one after learning first.

    Raises:
        IntegrityError: these are not the steps of its pools.
    """
    steps = stored.manifest.training.get("growth", [])
    b = shape.sub_keys[1]
    try:
        ends = [tuple(step["experts"]) for step in steps]
    except (KeyError, TypeError):
        ends = None
    if ends != [(before * b, after * b) for before, after in zip(shape.steps, shape.steps[1:], strict=False)]:
        raise _unrecorded(stored)
    return steps


def _unrecorded(stored: StoredModule) -> IntegrityError:
    return IntegrityError(f"{stored.folder}: its manifest does not say how its pools have grown; restore it")


def _numbers(before: PeerConfig, after: PeerConfig) -> dict[str, Any]:
    """The experts that a step brings every pool: from, up to and without."""
    b = after.sub_keys[1]
    return {"experts": [before.steps[-1] * b, after.steps[-1] * b]}


def _from(stored: StoredModule) -> dict[str, Any]:
    return {"from": {"version": stored.version, "sha256": stored.manifest.files.get(WEIGHTS)}}
