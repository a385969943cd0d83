"""Generation: prefill and decode for a batch whose rows run under different module sets.

Below the lowest fork all rows share the base's work; above it every group runs its own layers. Knows layers through
`ModuleSet` only; does not know which module a row should have, nor where modules come from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growlm.base import Base, Pass
from growlm.base.cache import KVCache
from growlm.base.padding import pad_left
from growlm.engine.sampling import SamplingConfig, sample
from growlm.modules import ModuleSet

# b batch, t new tokens, s tokens seen so far and new ones, d hidden size, v vocabulary


@dataclass
class Prefilled:
    """What the base made of a batch of prompts, once for all module sets.

    Attributes:
        input_ids: (b, t), padded on the left; without the `past` tokens that were in the cache already.
        seen: (b, past + t), with them; -1 where a row is padded.
        visible: (b, past + t) bool, or None where nothing is padded.
        cache: keys and values of the base's layers.
        hidden: the input of layer f, (b, t, d), for every layer f asked for; the last is where the base has come to.
    """

    input_ids: Tensor
    seen: Tensor
    visible: Tensor | None
    past: int
    shared: Pass
    cache: KVCache
    hidden: dict[int, Tensor]

    @torch.inference_mode()
    def run_on(self, base: Base, layers: Collection[int]) -> None:
        """Runs the base on to the inputs of further layers, of which none lies before where it has come to."""
        at = max(self.hidden)
        for layer in sorted(layers):
            self.hidden[layer], at = base.run(self.hidden[at], base.layers_to_run(at, layer), self.shared), layer


@dataclass
class Group:
    """Rows of a batch that run under one module set."""

    modules: ModuleSet
    rows: list[int]


@torch.inference_mode()
def prefill(
    base: Base,
    texts: Sequence[Sequence[int]],
    layers: Collection[int],
    *,
    before: Sequence[int] = (),
    cache: KVCache | None = None,
) -> Prefilled:
    """Runs the base over prompts.

    Args:
        texts: token ids; the new ones where `cache` holds the tokens `before` them (of a single text) already.
        layers: whose inputs are wanted: where module sets may branch off, and what the router reads. The base is run
            up to the last of them.
    """
    input_ids, visible = pad_left(texts, base.device)
    past, seen = len(before), input_ids
    assert past == 0 or visible is None
    if past:
        seen = torch.cat([torch.tensor([before], device=base.device), input_ids], dim=1)
    elif visible is not None:
        seen = input_ids.masked_fill(~visible, -1)
    cache = KVCache(base.num_layers) if cache is None else cache
    embedded, shared = base.begin(input_ids, past=past, visible=visible, cache=cache)
    begun = {0: base.embed_positions(embedded, shared.positions)}
    state = Prefilled(input_ids, seen, visible, past, shared, cache, begun)
    state.run_on(base, layers)
    return state


class _Running:
    """One group while it decodes: its module set, its share of the batch and its own keys and values."""

    def __init__(self, group: Group, start: int, cache: KVCache) -> None:
        self.modules = group.modules
        self.start, self.stop = start, start + len(group.rows)
        self.cache = cache

    def part(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop] if tensor.shape[0] > 1 else tensor

    def project(self, hidden: Tensor, seen: Tensor) -> Tensor:
        """Logits (b, 1, v) after the newest of all rows' tokens (b, s)."""
        contexts = self.modules.contexts(self.part(seen), 1)
        return self.modules.project(hidden[:, -1:], contexts)

    def share(self, shared: Pass) -> Pass:
        return shared.part(self.part, self.cache)


@torch.inference_mode()
def decode(
    prefilled: Prefilled,
    groups: Sequence[Group],
    config: SamplingConfig,
    end_tokens: Collection[int],
    on_token: Callable[[int, int], bool],
    *,
    generators: list[torch.Generator] | None = None,
    passed: dict[int, list[Tensor]] | None = None,
) -> KVCache:
    """Writes the answers of a batch.

    Args:
        groups: the rows to run, each in one group; rows of the batch in no group are left alone.
        end_tokens: tokens that end a row; not reported.
        on_token: told a row and its next token; returns whether the row goes on.
        generators: of the draws, one a row, to go on with; by default new ones from the config's seed.
        passed: gets the states (b, 1, d) that each new token had before layers that are its keys, of which none lies
            behind the lowest fork.

    Returns:
        Keys and values of the rows that were left at the end, the prompts' included.
    """
    base = groups[0].modules.base
    joint = min(g.modules.fork for g in groups)
    rows = [r for g in groups for r in g.rows]
    everything = rows == list(range(len(prefilled.input_ids)))
    chosen = None if everything else torch.tensor(rows, device=base.device)
    prefix = prefilled.cache.select(chosen, 0, joint)
    visible, seen = prefilled.visible, prefilled.seen
    if chosen is not None:
        visible, seen = None if visible is None else visible[chosen], seen[chosen]
    running: list[_Running] = []
    logits: list[Tensor] = []
    for group in groups:
        own = None if everything and len(groups) == 1 else torch.tensor(group.rows, device=base.device)
        state, hidden = begin_group(prefilled, group, own, joint, running[-1].stop if running else 0)
        running.append(state)
        logits.append(state.project(hidden, seen))

    if generators is None:
        generators = [torch.Generator(base.device).manual_seed(config.seed) for _ in rows]
    length = prefilled.past + prefilled.input_ids.shape[1]
    live = torch.ones(len(rows), dtype=torch.bool)
    for count in range(1, config.max_new_tokens + 1):
        tokens = sample(torch.cat(logits)[:, -1], config, generators)
        for at, token in enumerate(tokens.tolist()):
            if live[at] and (token in end_tokens or not on_token(rows[at], token)):
                live[at] = False
        if count == config.max_new_tokens or not live.any():
            break
        if int(live.sum()) * 2 <= len(rows):
            kept = torch.nonzero(live)[:, 0]
            prefix = prefix.select(kept.to(base.device))
            running = _compact(running, live)
            rows = [rows[i] for i in kept.tolist()]
            generators = [generators[i] for i in kept.tolist()]
            tokens = tokens[kept.to(base.device)]
            visible = None if visible is None else visible[kept.to(base.device)]
            seen = seen[kept.to(base.device)]
            live = live[kept]
        if visible is not None:
            visible = torch.cat([visible, visible.new_ones(len(rows), 1)], dim=-1)
        seen = torch.cat([seen, tokens[:, None]], dim=1)
        logits = step_groups(base, seen, joint, prefix, running, past=length, visible=visible, passed=passed)
        length += 1
    return prefix.extended(running[0].modules.cache_slots).joined(running[0].cache, joint)


def begin_group(
    prefilled: Prefilled, group: Group, rows: Tensor | None, joint: int, start: int
) -> tuple[_Running, Tensor]:
    """Runs a group's own layers over the prompts: what the base did below the group's fork is not done again.

    Args:
        rows: of the batch, or None where the group is the whole batch.
        joint: below this layer all groups share one cache.
        start: the group's first row among those that decode together.

    Returns:
        The group, ready for `step_groups`, and its last layer's output (b, t, d).
    """
    modules, base = group.modules, group.modules.base
    cache = prefilled.cache.select(rows, joint, modules.fork).extended(modules.cache_slots)
    if prefilled.past:
        cache = prefilled.cache.select(rows, joint).extended(modules.cache_slots)
    running = _Running(group, start, cache)
    if rows is None:
        shared = replace(prefilled.shared, cache=cache)
    else:

        def part(tensor: Tensor) -> Tensor:
            return tensor[rows] if tensor.shape[0] > 1 else tensor

        shared = prefilled.shared.part(part, cache)
    if modules.fork == 0:
        input_ids = prefilled.input_ids if rows is None else prefilled.input_ids[rows]
        hidden = modules.embed(base.embedding(input_ids), input_ids)
        hidden = base.embed_positions(hidden, shared.positions)
    else:
        hidden = prefilled.hidden[modules.fork]
        hidden = hidden if rows is None else hidden[rows]
    hidden = base.run(hidden, modules.layers[modules.fork :], shared)
    return running, hidden


def step_groups(
    base: Base,
    seen: Tensor,
    joint: int,
    prefix: KVCache,
    running: Sequence[_Running],
    *,
    past: int,
    visible: Tensor | None,
    passed: dict[int, list[Tensor]] | None = None,
) -> list[Tensor]:
    """The logits of each group, (b, 1, v), after one more token of every row, the newest of `seen` (b, s)."""
    tokens = seen[:, -1:]
    embedded, shared = base.begin(tokens, past=past, visible=visible, cache=prefix)
    hidden = embedded
    if joint > 0:
        hidden, at = base.embed_positions(hidden, shared.positions), 0
        for layer in sorted({*(passed or ()), joint}):
            hidden, at = base.run(hidden, base.layers_to_run(at, layer), shared), layer
            if passed is not None and layer in passed:
                passed[layer].append(hidden)
    logits = []
    for group in running:
        own = hidden if len(running) == 1 else hidden[group.start : group.stop]
        group_pass = group.share(shared) if len(running) > 1 else replace(shared, cache=group.cache)
        if joint == 0:
            own_tokens = tokens if len(running) == 1 else tokens[group.start : group.stop]
            own = base.embed_positions(group.modules.embed(own, own_tokens), group_pass.positions)
        own = base.run(own, group.modules.layers[joint:], group_pass)
        logits.append(group.project(own, seen))
    return logits


def _compact(running: Sequence[_Running], live: Tensor) -> list[_Running]:
    """The groups without the rows that have ended; groups that have none left are gone."""
    compacted: list[_Running] = []
    start = 0
    for group in running:
        kept = torch.nonzero(live[group.start : group.stop])[:, 0]
        if len(kept):
            device = group.modules.base.device
            cache = group.cache.select(kept.to(device))
            compacted.append(_Running(Group(group.modules, kept.tolist()), start, cache))
            start += len(kept)
    return compacted
