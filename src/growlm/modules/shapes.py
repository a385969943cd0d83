"""Shapes: the settings that give a module of a kind its shape, as manifests record them and `learn` takes them.

A setting is here once: its name, type, bounds, default, and the line of `growlm learn --help`. Knows no tensors and
imports nothing heavy: the command line's options are made from it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from growlm.errors import ConfigError, setting

if TYPE_CHECKING:
    from growlm.base import Base

# Whole numbers have bounds, far beyond what anyone needs, below which no size made of them overflows.
Layer = Annotated[int, Field(ge=0, le=65_536)]  # of a base; the module asks whether its own base has so many
Size = Annotated[int, Field(ge=1, le=2**20)]
_Number = Annotated[int, Field(ge=1, le=65_536)]
_NumberOrNone = Annotated[int, Field(ge=0, le=65_536)]
_Alpha = Annotated[float, Field(gt=0, le=1e6)]
_Rows = Annotated[int, Field(ge=1, le=2**40)]


class ModuleConfig(BaseModel):
    """What every kind has. Unknown keys are refused.

    Attributes:
        vocabulary: own rows of the output head (head), of the input embedding too (both), or none.
        recall: whether it carries the domain's text as well: what the kind says, as in lora+recall.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    recorded: ClassVar[frozenset[str]] = frozenset()  # fields that follow from others, or from what became of a module
    has_routers: ClassVar[bool] = False  # whether a module of this shape has routers, on which losses can be put

    vocabulary: Literal["none", "head", "both"] = "head"
    recall: bool = False

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the fields that can be chosen when a module is made."""
        return [name for name in cls.model_fields if name not in {"recall", *cls.recorded}]

    def recorded_as(self) -> dict[str, Any]:
        """As a manifest has it. That a module recalls nothing is not said: what could read it before still can."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k != "recall" or v}

    def about(self) -> str:
        """What `growlm status` says of it besides its size."""
        return ""

    @property
    def new_layers(self) -> int:
        """Layers of its own that keep keys and values, behind the base's slots for them."""
        return 0


class BlocksConfig(ModuleConfig):
    """Shape of a `blocks` module.

    `after[i]` base layers run before new layer i, which was made from base layer `sources[i]` and attends in its
    pattern. Both follow from the other settings and the base's depth, and are recorded so that a manifest alone
    says what the module is.

    Attributes:
        num_layers: new decoder layers.
        placement: top (after the base's last layer) or interleaved (between its layers: learns more, shares less).
    """

    recorded = frozenset({"after", "sources"})

    num_layers: int = Field(default=4, ge=1, le=1024)
    placement: Literal["top", "interleaved"] = "top"
    after: Annotated[tuple[Layer, ...], Field(max_length=1024)] = ()
    sources: Annotated[tuple[Layer, ...], Field(max_length=1024)] = ()

    def resolve(self, depth: int) -> BlocksConfig:
        """With `after` and `sources` filled in for a base of `depth` layers."""
        if self.after:
            return self
        if self.placement == "top":
            after = (depth,) * self.num_layers
        else:
            first = depth // 3
            after = tuple(first + -(-(i + 1) * (depth - first) // self.num_layers) for i in range(self.num_layers))
        return self.model_copy(update={"after": after, "sources": tuple(max(a - 1, 0) for a in after)})

    @property
    def new_layers(self) -> int:
        return self.num_layers

    def fits(self, depth: int) -> bool:
        """Whether a resolved config describes layers that a base of `depth` can have."""
        inside = all(0 <= a <= depth for a in self.after) and all(0 <= s < depth for s in self.sources)
        counted = len(self.after) == len(self.sources) == self.num_layers
        return inside and counted and list(self.after) == sorted(self.after)


class ExpertsConfig(ModuleConfig):
    """Shape of an `experts` module.

    Where layers differ, as pruning leaves them, a number of experts is a list: one for each layer from `first_layer`.

    Attributes:
        num_experts: new feed-forward experts of a layer.
        num_attention_experts: new ones in a layer whose attention has experts.
        num_experts_per_tok: that a token uses beside a dense feed-forward; a layer that has experts keeps its number.
        expert_size: hidden units beside a dense feed-forward; by default half the width.
        router_size: width of a new router.
        first_layer: the layers from this one on get experts; those before are shared with other modules.
    """

    has_routers = True

    num_experts: _Number | tuple[_Number, ...] = 4
    num_attention_experts: _NumberOrNone | tuple[_NumberOrNone, ...] = 2
    num_experts_per_tok: _Number = 2
    expert_size: Size | None = None
    router_size: Size = 64
    first_layer: Layer = 0

    def experts_of(self, index: int) -> int:
        """Feed-forward experts of the layer `index` after `first_layer`."""
        return self.num_experts if isinstance(self.num_experts, int) else self.num_experts[index]

    def attention_experts_of(self, index: int) -> int:
        many = self.num_attention_experts
        return many if isinstance(many, int) else many[index]

    def check(self, depth: int, where: str) -> None:
        """Checks it against a base of `depth` layers.

        Raises:
            ConfigError: layers that the base does not have, or lists of another length.
        """
        if self.first_layer >= depth:
            raise ConfigError(
                f"{setting('first_layer')} is {self.first_layer}; {where} has {depth} layers, so at most {depth - 1}"
            )
        for name in ("num_experts", "num_attention_experts"):
            numbers = getattr(self, name)
            if isinstance(numbers, tuple) and len(numbers) != depth - self.first_layer:
                raise ConfigError(
                    f"{setting(name)} lists {len(numbers)} layers; {where} has {depth - self.first_layer} from layer "
                    f"{self.first_layer} on"
                )


class PeerConfig(ModuleConfig):
    """Shape of a `peer` module.

    Attributes:
        num_experts: of a pool when it is made, a number with two factors that are not too unequal.
        layers: of the base that get a pool, e.g. 3 or 2,5; by default the middle one.
        replace_feed_forward: the pool stands in place of the layer's feed-forward, which it first learns to compute,
            and not beside it.
        num_heads: searches a token makes.
        top_k: experts that each search finds.
        neurons_per_expert: hidden neurons of an expert.
        key_size: width of a key; by default half the model's.
        query_norm: batch (uses the experts evenly), layer or none.
        steps: rows of side a of the product keys, after the pool was made and after every step of growth, less what
            was pruned; recorded.
        open_steps: of these, so many are trained; what was appended after is not there yet; recorded.
    """

    recorded = frozenset({"steps", "open_steps"})

    num_experts: _Rows = 16_384
    layers: tuple[Layer, ...] | None = None
    replace_feed_forward: bool = False
    num_heads: Size = 8
    top_k: Size = 16
    neurons_per_expert: Size = 1
    key_size: Annotated[Size, Field(ge=2)] | None = None
    query_norm: Literal["batch", "layer", "none"] = "batch"
    steps: tuple[_Rows, ...] = ()
    open_steps: Annotated[int, Field(ge=0, le=65_536)] = 0

    @field_validator("layers", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return _layers(value)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if any(later < before for before, later in pairwise(self.steps)):
            raise ValueError(f"steps are {self.steps}: they may not fall")
        if self.steps:
            _sub_key_counts(self.num_experts)
        if self.open_steps > max(len(self.steps), 1):
            raise ValueError(f"open_steps is {self.open_steps}, of {len(self.steps)} steps")
        return self

    @property
    def sub_keys(self) -> tuple[int, int]:
        """Rows of both sides of the product keys, all steps included."""
        a, b = _sub_key_counts(self.num_experts)
        return (self.steps[-1] if self.steps else a), b

    @property
    def rows_open(self) -> int:
        """Rows of side a that can be found, once anything can."""
        return self.steps[max(self.open_steps, 1) - 1]

    def about(self) -> str:
        a, b = self.sub_keys
        new = (a - self.rows_open) * b if self.steps and self.open_steps else 0
        pools = f" in each of {len(self.layers)} layers" if self.layers and len(self.layers) > 1 else ""
        return f"{a * b:,} experts{pools}" + (f", {new:,} of them not trained" if new else "")

    def grown(self, num_experts: int) -> Self:
        """With one more step, of so many experts in every pool.

        Raises:
            ConfigError: no whole number of sub-keys; says which numbers will do.
        """
        a, b = self.sub_keys
        rows, rest = divmod(num_experts, b)
        if rows < 1 or rest:
            below = max(rows, 1) * b
            raise ConfigError(
                f"{setting('experts')} is {num_experts:+}; a sub-key of this module's pools has {b} experts, and "
                f"they grow by whole ones: use {below:+} or {below + b:+}"
            )
        return self.model_copy(update={"steps": (*self.steps, a + rows)})

    def completed(self, base: Base) -> Self:
        """With what is recorded when a module is made.

        Raises:
            ConfigError: layers that the base does not have, or sizes of pools that cannot be.
        """
        layers = (base.num_layers // 2,) if self.layers is None else _of(self.layers, base)
        try:
            steps = self.steps or (_sub_key_counts(self.num_experts)[0],)
        except ValueError as error:
            raise ConfigError(str(error).removesuffix(", or give sub_keys=(a, b)")) from None
        return self.model_copy(update={"layers": layers, "steps": steps})


class LoraConfig(ModuleConfig):
    """Shape of a `lora` module. Names are PEFT's.

    Attributes:
        r: rank of the differences.
        lora_alpha: what a difference is multiplied by, times the rank; by default twice the rank.
        target_modules: names of the projections that get one, e.g. q_proj,v_proj, or with layer and path,
            3.self_attn.q_proj; all-linear: every one in a layer.
        layers: of the base that get them, e.g. 10-29; by default all. Those before the first are shared with other
            modules.
        use_rslora: divide by the rank's square root (rank-stabilised) and not by the rank.
        use_dora: learn the length of every row of a matrix as well (DoRA).
        rank_pattern: other ranks by name, e.g. down_proj=32,q_proj=8.
        alpha_pattern: other alphas by name, in the same way.
    """

    vocabulary: Literal["none", "head", "both"] = "none"
    r: _Number = 16
    lora_alpha: _Alpha | None = None
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    layers: tuple[Layer, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, _Number] = Field(default_factory=dict)
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict)

    @field_validator("layers", mode="before")
    @classmethod
    def _parse_layers(cls, value: Any) -> Any:
        return _layers(value)

    @field_validator("target_modules", mode="before")
    @classmethod
    def _parse_targets(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            value = value.split(",")
        if isinstance(value, list | tuple) and not (value and all(isinstance(v, str) and v for v in value)):
            raise ConfigError(
                f"{setting('target_modules')} is {value!r}; write names of projections, e.g. q_proj,v_proj"
            )
        return tuple(value) if isinstance(value, list) else value

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _parse_pattern(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",")]
        if not all(name and number for name, _, number in pairs):
            raise ConfigError(
                f"{setting(str(info.field_name))} is {value!r}; write names and numbers, e.g. down_proj=32,q_proj=8"
            )
        return {name: number for name, _, number in pairs}

    def rank_of(self, name: str) -> int:
        """Of the difference of a projection, by its layer and path in it: 3.self_attn.q_proj."""
        return next((rank for key, rank in self.rank_pattern.items() if is_called(name, key)), self.r)

    def alpha_of(self, name: str) -> float:
        alpha = self.lora_alpha or 2.0 * self.r
        return next((alpha for key, alpha in self.alpha_pattern.items() if is_called(name, key)), alpha)

    def scaling_of(self, name: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def about(self) -> str:
        layers = self.layers or ()
        where = f", layers {layers[0]} to {layers[-1]}" if layers else ""
        return f"rank {self.r}{', DoRA' if self.use_dora else ''}{where}"

    def completed(self, base: Base) -> Self:
        """With what is recorded when a module is made.

        Raises:
            ConfigError: layers that the base does not have.
        """
        layers = tuple(range(base.num_layers)) if self.layers is None else _of(self.layers, base)
        return self.model_copy(update={"layers": layers, "lora_alpha": self.lora_alpha or 2.0 * self.r})


class RecallConfig(ModuleConfig):
    """Shape of a `recall` module, which has no layers: a text needs no settings."""

    recorded = frozenset({"vocabulary"})

    vocabulary: Literal["none"] = "none"
    recall: Literal[True] = True


SHAPES: dict[str, type[ModuleConfig]] = {
    "blocks": BlocksConfig,
    "experts": ExpertsConfig,
    "peer": PeerConfig,
    "lora": LoraConfig,
    "recall": RecallConfig,
}
RECALLING = "+recall"  # what a kind is called that carries the domain's text besides


def parted_kind(kind: str) -> tuple[str, bool]:
    """A kind as it is written, e.g. lora+recall: the kind of its layers, and whether text comes with them.

    Raises:
        ConfigError: no such kind.
    """
    name = kind.removesuffix(RECALLING) if isinstance(kind, str) else kind
    recalls = name != kind
    if not isinstance(name, str) or name not in SHAPES or (recalls and name == "recall"):
        also = ", or one of the others with the text itself, e.g. lora+recall"
        raise ConfigError(f"{setting('kind')} {kind!r} does not exist; kinds are {', '.join(SHAPES)}{also}")
    return name, recalls


def is_called(name: str, key: str) -> bool:
    """Whether a name with dots is a key or ends with it."""
    return name == key or name.endswith(f".{key}")


def _layers(value: Any) -> Any:
    """Layers as they are written on the command line or in JSON."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = part.partition("-")
        try:
            found += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise ConfigError(
                f"{setting('layers')} is {value!r}; write numbers of layers, e.g. 3, 2,5 or 10-29"
            ) from None
    return tuple(found)


def _of(layers: tuple[int, ...], base: Base) -> tuple[int, ...]:
    """Layers in order.

    Raises:
        ConfigError: none, one twice, or one that the base does not have.
    """
    if len(set(layers)) < len(layers) or not layers:
        raise ConfigError(f"{setting('layers')} are {', '.join(map(str, layers))}; name each once, and at least one")
    for layer in layers:
        if not 0 <= layer < base.num_layers:
            raise ConfigError(f"layer {layer}: {base.where} has layers 0 to {base.num_layers - 1}")
    return tuple(sorted(layers))


def _sub_key_counts(num_experts: int) -> tuple[int, int]:
    from growlm.layers.product_keys import sub_key_counts

    return sub_key_counts(num_experts)
