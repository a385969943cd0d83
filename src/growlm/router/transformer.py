"""The transformer router: decoder layers that read the base's last states and name a category (IP-LLM, equation 2).

The layers are of the base's own family and start as the identity; *other* is a category like any domain. They are
trained on kept text of all domains at once (`training/router.py`): a domain that is added takes a new training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from growlm.base import Base, tensor_bytes
from growlm.errors import IntegrityError, StoreError, UnknownModuleError, first_error
from growlm.modules import assign
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.router.interface import NONE, Route, Router
from growlm.router.samples import SAMPLES
from growlm.store import ROUTER_TRAINED
from growlm.store.manifests import as_written

if TYPE_CHECKING:
    from growlm.store import Store, StoredModule
    from growlm.store.manifests import RouterManifest

# b batch, t tokens, d hidden size, c categories: the domains, and the last one for none of them


class RouterLayers(nn.Module):
    """Decoder layers above the base's last, a norm, and a row for each category.

    Args:
        blocks: the layers, at the top of the base and without vocabulary rows.
    """

    def __init__(self, base: Base, blocks: Blocks, num_categories: int) -> None:
        super().__init__()
        self._base = base
        self.blocks = blocks
        self.norm = nn.RMSNorm(base.hidden_size)
        self.categories = nn.Linear(base.hidden_size, num_categories)

    @classmethod
    def create(cls, base: Base, num_layers: int, num_categories: int) -> Self:
        """New layers in float32, drawn from torch's generator."""
        config = BlocksConfig(num_layers=num_layers, placement="top", vocabulary="none")
        return cls(base, Blocks.create(base, config), num_categories).to(base.device)

    @classmethod
    def restore(cls, base: Base, config: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> Self:
        """
        Raises:
            IntegrityError: the tensors are not those of a router of this config on this base.
        """
        try:
            shape = as_written(BlocksConfig, config)
        except ValidationError as error:
            raise IntegrityError(
                f"{where}: its config is not that of a router ({first_error(error)}); train it again"
            ) from None
        own = {k.removeprefix("blocks."): v for k, v in tensors.items() if k.startswith("blocks.")}
        blocks = Blocks.restore(base, shape, own, where)
        with torch.device("meta"):
            layers = cls(base, blocks, len(tensors["categories.bias"]) if "categories.bias" in tensors else 0)
        assign(layers, tensors, where)
        return layers

    def forward(self, hidden: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of the categories (b, t, c) at every token, from the base's last states (b, t, d)."""
        base = self._base
        if visible is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        else:
            positions = (visible.long().cumsum(-1) - 1).clamp_(min=0)
        shared = base.pass_for(hidden, positions, visible=visible)
        layers = self.blocks.extend(base.layers_to_run())[base.num_layers :]
        return self.categories(self.norm(base.run(hidden, layers, shared)))


class TransformerRouter(Router):
    """Trained decoder layers that name a category at a text's last token. `bind` it to a base before it routes.

    Args:
        labels: the domain of each category but the last; those that are not among `forks` are never chosen.
        forks: of every module that can be chosen.
    """

    kind = "transformer"

    def __init__(
        self,
        labels: list[str],
        forks: dict[str, int],
        config: Mapping[str, Any],
        tensors: dict[str, Tensor],
        where: str,
        layers: RouterLayers | None = None,
    ) -> None:
        self.names = [name for name in labels if name in forks]
        self.forks = {name: forks[name] for name in self.names}
        self._labels, self._config, self._tensors, self._where = labels, config, tensors, where
        self._layers = layers

    def bind(self, base: Base) -> TransformerRouter:
        if not self._tensors:  # none was trained yet
            return self
        tensors = {k: v.to(base.device) for k, v in self._tensors.items()}
        layers = RouterLayers.restore(base, self._config, tensors, self._where)
        if len(self._labels) + 1 != layers.categories.out_features:
            raise IntegrityError(
                f"{self._where}: names {len(self._labels)} domains, its tensors do not; train it again"
            )
        return TransformerRouter(self._labels, self.forks, self._config, tensors, self._where, layers)

    @torch.no_grad()
    def route(
        self, hidden: Tensor, visible: Tensor | None = None, texts: Sequence[Sequence[int]] | None = None
    ) -> list[Route]:
        if not self._tensors:
            return [Route(None, {NONE: 1.0}) for _ in hidden]
        assert self._layers is not None, "bind the router to a base first"
        logits = self._layers(hidden, visible)
        last = torch.full((len(hidden),), hidden.shape[1] - 1, device=hidden.device)
        if visible is not None:
            last = (visible.long() * torch.arange(hidden.shape[1], device=hidden.device)).amax(-1)
        scores = logits[torch.arange(len(hidden), device=hidden.device), last].float().cpu()
        gone = torch.tensor([name not in self.forks for name in self._labels] + [False])
        scores = scores.masked_fill(gone, -torch.inf).softmax(-1)
        labels = [*self._labels, NONE]
        routes = []
        order = scores.argsort(dim=-1, descending=True, stable=True)
        for row, ranks in zip(scores.tolist(), order.tolist(), strict=True):
            known = [i for i in ranks if not gone[i]]
            best = labels[known[0]]
            routes.append(Route(None if best == NONE else best, {labels[i]: row[i] for i in known}))
        return routes

    def without(self, names: Collection[str]) -> TransformerRouter:
        left = {name: fork for name, fork in self.forks.items() if name not in names}
        return TransformerRouter(self._labels, left, self._config, self._tensors, self._where, self._layers)

    def num_bytes(self) -> int:
        return tensor_bytes(self._tensors.values())


def load_transformer(store: Store, among: Collection[str] | None = None) -> Router:
    """The store's trained router; in a store without modules one that knows none.

    Args:
        among: names of modules; the newest router that was trained for just these, or else the current one, which then
            chooses among them only.

    Raises:
        StoreError: there are modules to choose from, and no router was trained.
        IntegrityError: the router's files are not what their manifest says.
    """
    files = store.router_files(ROUTER_TRAINED)
    versions = files.versions()
    if not versions:
        if store.modules if among is None else among:
            # To answer "none" would be to say that no module fits.
            raise StoreError(
                f"{store.path}: no transformer router was trained yet; growlm router {store.path} --kind transformer "
                "trains one"
            )
        return TransformerRouter([], {}, {}, {}, str(files.folder))
    chosen = versions[-1]
    for number in reversed(versions if among is not None else []):
        found = files.manifest(number)
        if found is not None and set(found.modules) == set(among or ()):
            chosen = number
            break
    manifest, tensors = files.manifest(chosen), files.read(chosen)
    if manifest is None or tensors is None:
        return load_transformer(store, among)  # that version was taken away meanwhile
    trained = compare(store, manifest)
    modules = [m for m in (*trained.known, *trained.outdated) if among is None or m.name in among]
    forks = {m.name: m.manifest.fork for m in modules}
    return TransformerRouter(list(manifest.modules), forks, manifest.config, tensors, str(files.folder / str(chosen)))


@dataclass(frozen=True)
class Comparison:
    """What a trained router knows of a store's modules, by their kept text and not by their names alone.

    Attributes:
        known: it was trained on their text as it is.
        outdated: it was trained on an earlier version, which the store still has: it chooses them by that text.
        unknown: it was trained on no text of theirs, and never chooses them. A module that was removed and learned
            anew under its old name is among these.
    """

    known: list[StoredModule]
    outdated: list[StoredModule]
    unknown: list[StoredModule]


def compare(store: Store, manifest: RouterManifest | None) -> Comparison:
    """
    Raises:
        IntegrityError: the manifest of a module is damaged.
    """
    found = Comparison([], [], [])
    samples = samples_of(manifest)
    for module, kept in store.read_each(lambda m: m.manifest.files.get(SAMPLES) if m.name in samples else None):
        name = module.name
        if name not in samples:
            found.unknown.append(module)
        elif kept == samples[name]:
            found.known.append(module)
        elif manifest is not None and _earlier(store, name, manifest.modules[name][0]) == samples[name]:
            found.outdated.append(module)
        else:
            found.unknown.append(module)
    return found


def samples_of(manifest: RouterManifest | None) -> dict[str, str]:
    """Hashes of the kept text that a router was trained on, by module."""
    trained = manifest.training.get("samples") if manifest is not None else None
    names = manifest.modules if manifest is not None else {}
    return {name: trained[name] for name in names if name in trained} if isinstance(trained, dict) else {}


def _earlier(store: Store, name: str, version: int) -> str | None:
    """The hash of the text that was kept of an earlier version; None if that version is gone."""
    try:
        return store.module(name, version).manifest.files.get(SAMPLES)
    except UnknownModuleError:
        return None
