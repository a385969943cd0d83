"""Rerouting: the module is chosen anew every few tokens of an answer, from hidden states that decoding leaves behind.

The base never runs over a token twice: its states of all tokens so far are kept, before its end for the module that
takes over and where the router reads. That needs modules that begin after the base's last layer. Knows how to run; asks
for choices and modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from growlm.base import Base
from growlm.base.cache import KVCache
from growlm.engine.generation import Group, Prefilled, decode, prefill
from growlm.engine.sampling import SamplingConfig
from growlm.errors import ConfigError
from growlm.modules import ModuleSet

# n tokens so far, d hidden size

WINDOW = 128  # newest tokens that the choice is made from: a text may have passed into another domain


@torch.inference_mode()
def decode_rerouted(
    base: Base,
    prefilled: Prefilled,
    choose: Callable[[Tensor], str | None],
    using: Callable[[str | None], AbstractContextManager[ModuleSet]],
    config: SamplingConfig,
    end_tokens: Collection[int],
    on_token: Callable[[int], bool],
    *,
    layer: int,
    every: int,
) -> list[tuple[int, str | None]]:
    """Writes the answer to a single prompt, over which the base has been run whole, with its states after `layer` kept.

    Args:
        choose: a module for the base's states (1, t, d) of the newest tokens after `layer`.
        using: gives the module set of a name and holds it in memory for a `with` block.
        every: tokens between two choices.

    Returns:
        Every change of module: how many tokens had been written, and the module from there on.

    Raises:
        ConfigError: a chosen module changes the base's own layers.
    """
    depth = base.num_layers
    text = prefilled.input_ids[0].tolist()
    state, cache = prefilled, prefilled.cache
    hidden = {at: prefilled.hidden[at] for at in {layer, depth}}
    generators = [torch.Generator(base.device).manual_seed(config.seed)]
    changes: list[tuple[int, str | None]] = []
    written, ended = 0, False

    def took(row: int, token: int) -> bool:
        nonlocal written, ended
        text.append(token)
        written += 1
        ended = not on_token(token)
        return not ended

    while True:
        name = choose(hidden[layer][:, -WINDOW:])
        if not changes or name != changes[-1][1]:
            changes.append((written, name))
            state = _from_the_beginning(base, text, hidden[depth], cache)
        most = min(every, config.max_new_tokens - written)
        before = written
        passed: dict[int, list[Tensor]] = {at: [] for at in hidden}
        with using(name) as modules:
            if modules.fork < depth:
                raise ConfigError(
                    f"{name} changes the base from layer {modules.fork} on, and --reroute needs modules above its last "
                    "layer; learn it as blocks with --placement top --vocabulary head"
                )
            chunk = replace(config, max_new_tokens=most)
            cache = decode(state, [Group(modules, [0])], chunk, end_tokens, took, generators=generators, passed=passed)
        if ended or written - before < most or written == config.max_new_tokens:
            return changes
        # The newest token has not been run yet.
        state = prefill(base, [text[-1:]], hidden, before=text[:-1], cache=cache)
        hidden = {at: torch.cat([states, *passed[at], state.hidden[at]], dim=1) for at, states in hidden.items()}


def _from_the_beginning(base: Base, text: list[int], below: Tensor, cache: KVCache) -> Prefilled:
    """A state from which a module that has seen nothing yet reads all that the base made of `text`."""
    cache = cache.select(None, 0, base.num_layers)
    ids = torch.tensor([text], device=below.device)
    shared = base.pass_for(below, torch.arange(len(text), device=below.device)[None], cache=cache)
    return Prefilled(ids, ids, None, 0, shared, cache, {base.num_layers: below})
