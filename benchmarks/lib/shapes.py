"""Shapes of modules that are tried beside growlm's kinds: narrow layers, sparse and whole differences of the base's own
matrices, shared pools, and several shapes in one module. For bases of the llama family and those that are built alike.

`shaped` and `joined` give what `ModuleTraining` takes as a kind. Nothing here can be saved in a store.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.base import Base, LayerToRun
from growlm.errors import ConfigError
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import KnowledgeModule
from growlm.modules.blocks import between
from growlm.modules.lora import Lora, matrices_of
from growlm.modules.peer import Peer
from growlm.modules.shapes import LoraConfig, ModuleConfig, PeerConfig
from growlm.modules.vocabulary import VocabularyRows

# b batch, t tokens, d hidden size


@dataclass(frozen=True)
class Shaped:
    """A class of modules with a config of its own.

    Attributes:
        text: rows (n, t + 1) of the domain, for shapes that look at gradients before they begin.
    """

    of: type[KnowledgeModule]
    config: Any
    text: Tensor | None = None

    def on(self, text: Tensor) -> Shaped:
        return replace(self, text=text)

    def create(self, base: Base, config: Any = None, row_ids: Tensor | None = None) -> KnowledgeModule:
        """A new module, whatever config a run has for its kind."""
        if issubclass(self.of, _OnText | GradientLora):
            return self.of.create_on(base, self.config, self.text)
        return self.of.create(base, self.config, row_ids)


def shaped(of: type[KnowledgeModule], **settings: Any) -> Shaped:
    return Shaped(of, of.Config(**{"vocabulary": "none", **settings}))


def joined(*parts: Shaped) -> Shaped:
    """One module of several parts, which are trained together. A part that adds layers comes after those that change
    the base's own, and pools come after differences of matrices."""
    return Shaped(Joined, JoinedConfig(parts=parts))


class _OnText(KnowledgeModule):
    """A shape that is made on text (n, t + 1), if it needs any."""

    @classmethod
    @abstractmethod
    def create_on(cls, base: Base, config: Any, text: Tensor | None) -> Self: ...

    @classmethod
    def create(cls, base: Base, config: Any, row_ids: Tensor | None = None) -> Self:
        return cls.create_on(base, config, None)

    def cache_slots(self, base: Base) -> int:
        return base.num_layers

    def extended_config(self, config: Any) -> Any:
        raise ConfigError("shapes that are tried make no checkpoints")


def gradients(
    base: Base, weights: Sequence[Tensor], text: Tensor, layers: Sequence[LayerToRun] | None = None
) -> list[Tensor]:
    """Of the loss of text (n, t + 1), by some weights of the base or of the layers that are run in its place."""
    before = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_(True)
    try:
        for row in text.to(base.device):  # one by one: the activations of all would fill the memory
            hidden, shared = base.begin(row[None, :-1])
            hidden = base.embed_positions(hidden, shared.positions)
            hidden = base.norm(base.run(hidden, layers or base.layers_to_run(), shared))
            linear_cross_entropy(hidden.flatten(0, 1), base.head_weight, row[1:], softcap=base.softcap).backward()
        return [w.grad if w.grad is not None else torch.zeros_like(w) for w in weights]
    finally:
        for w, trained in zip(weights, before, strict=True):
            w.requires_grad_(trained)
            w.grad = None


# Layers


class NarrowConfig(ModuleConfig):
    """Shape of `Narrow`.

    Attributes:
        num_layers: new decoder layers.
        placement: after layers at even distances: of all (all), or from the first third on, as growlm's blocks
            (interleaved); or where the gradient of such layers is largest (gradient).
        num_heads: of their attention, by default the base's; 0: they have none.
        num_key_value_heads: by default the base's.
        intermediate_size: of their feed-forward, by default the base's.
        init: from the strongest heads and units of the layer before (copy), the largest singular values of its matrices
            (svd) or at random; what writes into the residual stream is zero in all of them.
        after: base layers that run before each; recorded.
    """

    vocabulary: Literal["none"] = "none"
    num_layers: int
    placement: Literal["all", "interleaved", "gradient"] = "all"
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    init: Literal["copy", "svd", "random"] = "copy"
    after: tuple[int, ...] = ()

    def resolve(self, depth: int) -> NarrowConfig:
        if self.after:
            return self
        first = depth // 3 if self.placement == "interleaved" else 0
        after = tuple(first + -(-(i + 1) * (depth - first) // self.num_layers) for i in range(self.num_layers))
        return self.model_copy(update={"after": after})


class Narrow(_OnText):
    """Decoder layers of the base's family between its own, with fewer heads and hidden units."""

    kind = "narrow"
    Config = NarrowConfig
    config: NarrowConfig

    def __init__(self, base: Base, config: NarrowConfig, rows: VocabularyRows) -> None:
        super().__init__(base, config.resolve(base.num_layers), rows)
        self.fork = self.config.after[0]
        shape = copy.deepcopy(base.config)
        shape.head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        if config.num_heads is not None:
            shape.num_attention_heads = max(config.num_heads, 1)
            shape.num_key_value_heads = min(shape.num_key_value_heads, shape.num_attention_heads)
        shape.num_key_value_heads = config.num_key_value_heads or shape.num_key_value_heads
        shape.intermediate_size = config.intermediate_size or shape.intermediate_size
        self._patterns = [base.attention_pattern(after - 1) for after in self.config.after]
        self.layers = nn.ModuleList()
        for slot, after in enumerate(self.config.after, start=base.num_layers):
            layer = type(base.layers[after - 1])(shape, layer_idx=after - 1)
            getattr(layer, base.anatomy.attention).layer_idx = slot
            self.layers.append((_FeedForward(layer) if config.num_heads == 0 else layer).eval())

    @classmethod
    def create_on(cls, base: Base, config: NarrowConfig, text: Tensor | None) -> Self:
        if config.placement == "gradient" and not config.after:
            assert text is not None, "a placement by gradient needs text"
            everywhere = config.model_copy(update={"after": tuple(range(1, base.num_layers + 1))})
            found = cls.create_on(base, everywhere, None)
            weights = list(found.parameters())
            sizes = iter(gradients(base, weights, text, found.extend(base.layers_to_run())))
            scores = [sum(float(next(sizes).square().sum()) for _ in layer.parameters()) for layer in found.layers]
            best = sorted(range(base.num_layers), key=lambda i: -scores[i])[: config.num_layers]
            config = config.model_copy(update={"after": tuple(i + 1 for i in sorted(best))})
        module = cls(base, config, VocabularyRows()).float().to(base.device)
        for layer, after in zip(module.layers, module.config.after, strict=True):
            _begin(layer, base.layers[after - 1], base, config.init)
        return module

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        return between(layers, self.layers, self._patterns, self.config.after)

    def cache_slots(self, base: Base) -> int:
        return base.num_layers + len(self.layers)


class _FeedForward(nn.Module):
    """A decoder layer without its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


@torch.no_grad()
def _begin(layer: nn.Module, source: nn.Module, base: Base, init: str) -> None:
    """Gives a new layer, which may be narrower than its source, what it begins with: the identity."""
    own, old = dict(layer.named_parameters()), dict(source.named_parameters())
    chosen = _strongest(own, old, base) if init == "copy" else {}
    for name, p in own.items():
        wide = old[name].float()
        if init == "random" and p.ndim > 1:
            nn.init.normal_(p, std=base.config.initializer_range)
        elif p.shape == wide.shape:
            p.copy_(wide)
        elif (leaf := name.split(".")[-2]) in chosen:
            p.copy_(wide[chosen[leaf]])
        elif p.ndim > 1 and p.shape[1] == wide.shape[1]:  # what reads from the residual stream
            values, directions = torch.linalg.svd(wide, full_matrices=False)[1:]
            strongest = values[: len(p), None] * directions[: len(p)]
            p.copy_(strongest * (wide.square().mean() / strongest.square().mean()).sqrt())
        else:
            p.zero_()
    for name, value in base.anatomy.zeroed:
        if name in own:
            own[name].fill_(value)


def _strongest(own: Mapping[str, Tensor], old: Mapping[str, Tensor], base: Base) -> dict[str, Tensor]:
    """Rows of a layer's projections that make the heads and hidden units that write the most, as many as `own` has."""
    gate, up, down = (old[f"mlp.{name}_proj.weight"].float() for name in ("gate", "up", "down"))
    units = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(len(own["mlp.gate_proj.weight"])).indices
    chosen = {"gate_proj": units, "up_proj": units}
    if "self_attn.q_proj.weight" not in own:
        return chosen
    groups = base.config.num_key_value_heads
    width = len(old["self_attn.v_proj.weight"]) // groups
    num_heads, num_groups = (len(own[f"self_attn.{name}_proj.weight"]) // width for name in ("q", "v"))
    written = old["self_attn.o_proj.weight"].float().norm(dim=0).view(groups, -1, width).norm(dim=2)  # (groups, heads)
    heads = written.topk(num_heads // num_groups, dim=1)
    best = heads.values.sum(1).topk(num_groups).indices
    first = best[:, None] * written.shape[1] + heads.indices[best]
    inside = torch.arange(width, device=best.device)
    chosen["k_proj"] = chosen["v_proj"] = (best[:, None] * width + inside).flatten()
    chosen["q_proj"] = (first.flatten()[:, None] * width + inside).flatten()
    return chosen


# Differences of the base's own matrices


class DeltaConfig(ModuleConfig):
    """Shape of `Delta`.

    Attributes:
        num_values: that are learned.
        choice: entries with the largest gradient of all matrices (entries) or of every matrix its share (evenly); or
            matrices as a whole, those with the largest mean square of the gradient first (matrices).
        rows: of the text, on which gradients are taken.
    """

    vocabulary: Literal["none"] = "none"
    num_values: int
    choice: Literal["entries", "evenly", "matrices"] = "entries"
    rows: int = 8


class Delta(_OnText):
    """Differences of chosen entries of the base's matrices, after SpIEL, which grows and drops them besides."""

    kind = "delta"
    Config = DeltaConfig
    config: DeltaConfig

    def __init__(self, base: Base, config: DeltaConfig, chosen: Mapping[tuple[int, str], Tensor | None]) -> None:
        """
        Args:
            chosen: by layer and path in it, places of entries (n,) in the matrix laid out flat, or None for all.
        """
        super().__init__(base, config, VocabularyRows())
        self.fork = min(index for index, _ in chosen)
        self._places = list(chosen)
        matrices = [base.layers[index].get_submodule(path).weight for index, path in chosen]
        self.differences = nn.ModuleList(
            _Difference(matrix, where) for matrix, where in zip(matrices, chosen.values(), strict=True)
        )

    @classmethod
    def create_on(cls, base: Base, config: DeltaConfig, text: Tensor | None) -> Self:
        assert text is not None, "differences are chosen by gradients, which need text"
        places = {(i, path): part.weight for i in range(base.num_layers) for path, part in matrices_of(base, i)}
        found = gradients(base, list(places.values()), text[: config.rows])
        sizes = {place: g.abs().flatten() for place, g in zip(places, found, strict=True)}
        total = sum(map(len, sizes.values()))
        chosen: dict[tuple[int, str], Tensor | None] = {}
        if config.choice == "matrices":
            left = config.num_values
            for place in sorted(sizes, key=lambda p: -float(sizes[p].square().mean())):
                if len(sizes[place]) <= left:
                    chosen[place] = None
                    left -= len(sizes[place])
        elif config.choice == "evenly":
            for place, size in sizes.items():
                chosen[place] = size.topk(round(config.num_values * len(size) / total)).indices.sort().values
        else:
            least = float(torch.cat(list(sizes.values())).kthvalue(total - config.num_values + 1).values)
            chosen = {p: (s >= least).nonzero()[:, 0] for p, s in sizes.items() if bool((s >= least).any())}
        return cls(base, config, dict(sorted(chosen.items()))).float().to(base.device)

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        changed = list(layers)
        for (index, path), difference in zip(self._places, self.differences, strict=True):
            layer = changed[index].layer
            changed[index] = changed[index]._replace(layer=_with(layer, path.split("."), difference))
        return changed


class _Difference(nn.Module):
    """Of a matrix (out, in): of all its entries, or of those at `where` (n,) in it, laid out flat."""

    def __init__(self, matrix: Tensor, where: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("where", where)
        self.values = nn.Parameter(torch.zeros(matrix.shape if where is None else where.shape))

    def forward(self, matrix: Tensor) -> Tensor:
        if self.where is None:
            return matrix + self.values
        return matrix.flatten().index_add(0, self.where, self.values.to(matrix.dtype)).view_as(matrix)


class _Changed(nn.Module):
    """A base's projection with a difference in its matrix."""

    def __init__(self, inner: nn.Module, difference: nn.Module) -> None:
        super().__init__()
        self.inner, self.difference = inner, difference

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.difference(self.inner.weight), self.inner.bias)


def _with(whole: nn.Module, path: Sequence[str], difference: nn.Module) -> nn.Module:
    """A shallow copy that shares all parameters, with a difference in the projection at a path."""
    if not path:
        return _Changed(whole, difference)
    variant = copy.copy(whole)
    variant._modules = {**whole._modules, path[0]: _with(whole.get_submodule(path[0]), path[1:], difference)}
    return variant


# Other forms of growlm's kinds


class GradientLoraConfig(LoraConfig):
    """Shape of `GradientLora`: `rows` of the text, on which gradients are taken."""

    rows: int = 8


class GradientLora(Lora):
    """LoRA of which every `lora_A` begins with the directions in which the matrix's gradient is largest, and not with
    random ones, as large as those would be."""

    Config = GradientLoraConfig

    @classmethod
    def create_on(cls, base: Base, config: GradientLoraConfig, text: Tensor | None) -> Self:
        assert text is not None, "gradients need text"
        module = cls.create(base, config)
        found = list(module.adapters())
        matrices = [base.layers[index].get_submodule(path).weight for index, path, _ in found]
        steep = gradients(base, matrices, text[: config.rows])
        with torch.no_grad():
            for (_, _, adapter), gradient in zip(found, steep, strict=True):
                a = adapter.lora_A.weight
                # All of a large matrix's singular vectors would take a second.
                drawn = min(len(a) + 8, *gradient.shape)
                directions = torch.svd_lowrank(gradient.float(), drawn)[2].T[: len(a)]
                a.copy_(directions * (a.square().mean() / directions.square().mean()).sqrt())
        return module


class SharedPeer(Peer):
    """Pools in several layers that are searched by the same queries and keys."""

    def __init__(self, base: Base, config: PeerConfig, rows: VocabularyRows) -> None:
        super().__init__(base, config, rows)
        for pool in self.pools:
            pool.keys = self.pools[0].keys


# Several in one


class JoinedConfig(ModuleConfig):
    """Shape of `Joined`."""

    vocabulary: Literal["none"] = "none"
    parts: tuple[Any, ...]


class Joined(_OnText):
    """Modules of several shapes that are one: trained, and active, together."""

    kind = "joined"
    Config = JoinedConfig

    def __init__(self, base: Base, config: JoinedConfig, parts: Sequence[KnowledgeModule]) -> None:
        super().__init__(base, config, VocabularyRows())
        self.parts = nn.ModuleList(parts)
        self.fork = min(part.fork for part in parts)

    @classmethod
    def create_on(cls, base: Base, config: JoinedConfig, text: Tensor | None) -> Self:
        parts = [part if text is None else part.on(text) for part in config.parts]
        return cls(base, config, [part.create(base) for part in parts])

    @classmethod
    def is_table(cls, name: str) -> bool:
        _, at, rest = name.partition("pools.")
        return Peer.is_table(at + rest)

    def enable_new_experts(self) -> None:
        for part in self.parts:
            part.enable_new_experts()

    def begin_training(self) -> None:
        for part in self.parts:
            part.begin_training()

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        for part in self.parts:
            layers = part.extend(layers)
        return list(layers)

    def cache_slots(self, base: Base) -> int:
        return max(part.cache_slots(base) for part in self.parts)
