"""Settings of the verbs that train: the only home of their defaults. Command-line flags derive from these classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from growlm.errors import ConfigError, first_error, setting
from growlm.modules.shapes import SHAPES, BlocksConfig, ModuleConfig, parted_kind
from growlm.units import parse_count, parse_size

AUTO = "auto"  # a learning rate that is found or computed, or the kind that suits the base
ON_PUBLISHED = "lora+recall"  # the kind that learns most at equal bytes on bases of so many parameters and more
_PUBLISHED = 50_000_000
_OF_TRAINING = ("tokens", "epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "clip", "replay",
                "gradient_accumulation_steps", "activation_checkpointing")  # fmt: skip
FITTED = 4096  # held-out tokens on which it is fitted how much a text that is recalled counts
_SEEDS = 2**63  # how many there are: torch takes no larger ones as they are

# Sizes of a llama, or the file of a growlm model's config.
PRESETS: Mapping[str, Mapping[str, int] | Path] = {
    # A llama each, embeddings tied; parameters with its own vocabulary: about 1 M, 8 M and 42 M.
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 8192},
    "base": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 16384},
    **{path.stem: path for path in sorted((Path(__file__).parents[1] / "model" / "presets").glob("*.json"))},
}


@dataclass(frozen=True)
class TrainConfig:
    """What both verbs share.

    Attributes:
        tokens: training tokens in all, e.g. 500000 or 2M; by default the data is read --epochs times.
        sequence_length: tokens a row.
        batch_size: rows a step.
        epochs: how often the data is read where --tokens is not given.
        learning_rate: at its peak, then down a cosine to a tenth; auto finds it by short trials, or where all of a
            model is trained computes it from the width.
        warmup: share of all steps over which the learning rate rises.
        weight_decay: of matrices; norms and biases have none.
        clip: largest norm of the gradient; 0 does not clip.
        seed: of everything random.
        text_key: key of the text in JSON, column in tables.
        device: where to compute: cpu, cuda, cuda:N, mps, or auto: a CUDA GPU where there is one, else the processor.
        precision: of matrix products: bfloat16, float32, or auto: bfloat16 on a CUDA GPU or a processor that is made
            for it, else float32.
        separator: cuts text files into documents, e.g. '\\n\\n', a blank line; by default a file is one document.
        checkpoint_seconds: how often progress is saved; a run that is killed goes on from there.
    """

    tokens: int | str | None = None
    epochs: int = 1
    sequence_length: int = 512
    batch_size: int | None = 8
    learning_rate: float | str | None = AUTO
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    text_key: str = "text"
    separator: str | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", parse_count(self.tokens, "tokens"))
        for name in ("epochs", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{setting(name)} is {value!r}; it must be a whole number")
            if value < 1:
                raise ConfigError(f"{setting(name)} is {value}; it must be at least 1")
        if self.tokens is not None and int(self.tokens) < self.sequence_length:
            least = f"{setting('sequence_length')}, {self.sequence_length}"
            raise ConfigError(f"{setting('tokens')} is {self.tokens}; it must be at least {least}")
        rate = AUTO if self.learning_rate is None else self.learning_rate
        if rate != AUTO:
            try:
                rate = float(rate)
            except (TypeError, ValueError):
                raise ConfigError(f"{setting('learning_rate')} is {rate!r}; give a number, or auto") from None
            if not 0 < rate < 1:
                raise ConfigError(f"{setting('learning_rate')} is {rate}; it must be between 0 and 1")
        object.__setattr__(self, "learning_rate", rate)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"{setting('warmup')} is {self.warmup}; it is a share of all steps, from 0 to below 1")
        for name in ("weight_decay", "clip", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{setting(name)} is {getattr(self, name)}; it must be a number, 0 or more")
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"{setting('seed')} is {self.seed}; it must be from 0 to below 2**63")
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ConfigError(f"{setting('precision')} {self.precision!r} is not one of auto, bfloat16, float32")

    def rate_or(self, computed: float) -> float:
        """The learning rate that is given; where it is auto, what was found or computed for it."""
        return self.learning_rate if isinstance(self.learning_rate, float) else computed

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of the data that a run can use: `tokens` in whole rows."""
        return None if self.tokens is None else -(-int(self.tokens) // self.sequence_length) * self.sequence_length

    def rows_wanted(self, num_rows: int) -> int:
        """Rows that a run reads of data with `num_rows`, again and again if need be."""
        if self.max_tokens is None:
            return self.epochs * num_rows
        return self.max_tokens // self.sequence_length

    @property
    def reading(self) -> dict[str, Any]:
        """How data is read: the settings of `growlm.data.read`."""
        return {"text_key": self.text_key, "separator": self.separator}

    def to_json(self) -> dict[str, Any]:
        """What is recorded: all but the device, which another machine may not have. What it came to is recorded by
        itself."""
        settings = asdict(self)
        del settings["device"]
        return settings


@dataclass(frozen=True)
class StepConfig(TrainConfig):
    """How a step is computed that may not fit into memory as it is.

    Attributes:
        gradient_accumulation_steps: parts in which a step's rows are computed, one after another, where not all of them
            fit into memory at once.
        activation_checkpointing: of a layer keep its input alone, and compute it once more when its gradient is due:
            less memory, about a third more time.
    """

    gradient_accumulation_steps: int = 1
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_accumulation_steps < 1:
            found = self.gradient_accumulation_steps
            raise ConfigError(f"{setting('gradient_accumulation_steps')} is {found}; it must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """As of all; only what was said: a run goes on that knew of neither."""
        settings = super().to_json()
        for name in ("gradient_accumulation_steps", "activation_checkpointing"):
            if settings[name] == getattr(StepConfig, name):
                del settings[name]
        return settings


@dataclass(frozen=True)
class ConversationConfig(StepConfig):
    """What verbs share that learn conversations as well as text.

    Attributes:
        format: of records: text, messages (role and content), sharegpt (conversations of from and value), alpaca
            (instruction, input, output) or prompt (prompt and completion, or question and answer); auto tells by their
            keys.
        loss: of conversations: answers learns what the assistant says, with the end of its turn; all learns all of it.
    """

    format: str = "auto"
    loss: str = "answers"

    def __post_init__(self) -> None:
        from growlm.data import FORMATS, LOSSES  # which brings numpy: not for --help

        super().__post_init__()
        for name, known in (("format", FORMATS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{setting(name)} {getattr(self, name)!r} is not one of {', '.join(known)}")

    @property
    def reading(self) -> dict[str, Any]:
        return {**super().reading, "format": self.format}

    def to_json(self) -> dict[str, Any]:
        """As of all; what is said of conversations only where it was said: a run on text goes on that knew of none."""
        settings = super().to_json()
        for name in ("format", "loss"):
            if settings[name] == getattr(ConversationConfig, name):
                del settings[name]
        return settings


@dataclass(frozen=True)
class WholeModelConfig(StepConfig):
    """What verbs share that train all of a model.

    Attributes:
        separate_documents: of growlm models: tokens attend to their own document only; by default rows of packed text
            are read across their ends.
        segment_length: of growlm models: rows run in segments of so many tokens, each reading the keys and values of
            those before it without gradient (Transformer-XL), as far back as the config's history_length.
    """

    separate_documents: bool = False
    segment_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment_length is not None and self.segment_length < 1:
            raise ConfigError(f"{setting('segment_length')} is {self.segment_length}; it must be at least 1")


@dataclass(frozen=True)
class PretrainConfig(WholeModelConfig):
    """Settings of `growlm pretrain`.

    Attributes:
        preset: tiny, small or base: a llama of about 1, 8 or 42 million parameters; molm-tiny: a ModuleFormer of 15
            million, 5 of them active; molm-4b-k2, molm-4b-k4, molm-8b-k2: the published sizes; peer-tiny: 39 million, 5
            of them active, in one layer 65,536 tiny experts (PEER).
        config: path of a transformers config.json to use instead of a preset.
        vocab_size: of the byte-level BPE trained on the data; by default the preset's or the config's.
    """

    preset: str = "small"
    config: str | None = None
    vocab_size: int | None = None
    sequence_length: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config is None and self.preset not in PRESETS:
            raise ConfigError(f"{setting('preset')} {self.preset!r} is not one of {', '.join(PRESETS)}")
        if self.config is not None and self.preset != type(self).preset:
            raise ConfigError(
                f"{setting('preset')} is {self.preset!r} and {setting('config')} {self.config!r}; give one of them"
            )


@dataclass(frozen=True)
class FinetuneConfig(WholeModelConfig, ConversationConfig):
    """Settings of `growlm finetune`.

    Attributes:
        load_concentration: weight of the loss that makes a growlm model use fewer experts, instead of its own.
        admit_anyway: save what does worse than the checkpoint did, as held-out text tells.
    """

    load_concentration: float = 0.0
    admit_anyway: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.load_concentration < math.inf:
            raise ConfigError(
                f"{setting('load_concentration')} is {self.load_concentration}; it must be a number, 0 or more"
            )


@dataclass(frozen=True)
class ModuleTrainConfig(ConversationConfig):
    """What verbs share that train parameters beside a frozen base.

    Attributes:
        batch_size: rows a step, by default 1 to 8, so that a run has about a hundred steps.
        admit_anyway: save what does no better than what was there before, as held-out text tells.
        feature_cache: disk space for the base's outputs when the data is read more than once.
        router_samples: passages of which the router keeps a trace (vectors, no text).
        keep_samples: text kept for a router that is trained on it, e.g. 2MB; 0 keeps none; by default what the store
            says.
        replay: a file or folder of other text that is read as well, on top of --tokens, e.g. what was learned before.
        replay_ratio: share of the rows that come from --replay.
    """

    epochs: int = 2
    batch_size: int | None = None
    admit_anyway: bool = False
    feature_cache: int | str = "2GB"
    router_samples: int = 96
    keep_samples: int | str | None = None
    replay: str | None = None
    replay_ratio: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "feature_cache", parse_size(self.feature_cache, "feature_cache"))
        if self.replay is None and self.replay_ratio != type(self).replay_ratio:
            raise ConfigError(
                f"{setting('replay_ratio')} is {self.replay_ratio} and there is no {setting('replay')}; name the "
                "text to replay"
            )
        if not 0 < self.replay_ratio < 1:
            raise ConfigError(
                f"{setting('replay_ratio')} is {self.replay_ratio}; it is a share of the rows, above 0 and below 1"
            )
        if self.keep_samples is not None:
            object.__setattr__(self, "keep_samples", parse_size(self.keep_samples, "keep_samples"))
        if self.router_samples < 1:
            raise ConfigError(f"{setting('router_samples')} is {self.router_samples}; it must be at least 1")

    def paths(self, data: Sequence[str]) -> list[str]:
        """All that is read: the data, and the text that is replayed."""
        return [*data, *([] if self.replay is None else [self.replay])]


@dataclass(frozen=True)
class GrowConfig(ModuleTrainConfig):
    """Settings of `growlm grow`, which trains new experts of a module and nothing else."""


@dataclass(frozen=True, init=False)
class LearnConfig(ModuleTrainConfig):
    """Settings of `growlm learn`, and in the same call those of the module's kind: the fields of its config in
    `growlm.modules.shapes`, as in `LearnConfig(kind="peer", num_experts=65_536, epochs=3)`.

    Attributes:
        kind: of module: blocks (whole layers), lora (low-rank differences of the base's own matrices), experts (routed
            experts in the base's own layers), peer (a pool of very many tiny experts in a layer), recall (the text
            itself, found by what stands before) or one of the others with it, e.g. lora+recall; auto: lora+recall on a
            base of 50 million parameters or more, blocks on a smaller one.
        max_rows: the most tokens that get rows of their own; by default a quarter of the vocabulary and at most 8,192,
            so that modules of one store need about the same memory.
        routing_regularisation: of kinds with routers: weight of the loss that keeps new experts from being chosen
            readily.
        load_concentration: of kinds with routers: weight of the loss that makes fewer experts be used.
        shape: made of the settings of the kind.
    """

    kind: str = AUTO
    max_rows: int | None = None
    routing_regularisation: float = 0.0
    load_concentration: float = 0.0
    shape: ModuleConfig = field(default_factory=BlocksConfig)

    def __init__(self, kind: str = AUTO, **settings: Any) -> None:
        """
        Raises:
            ConfigError: no such kind, a setting that nothing has or only other kinds have, or a value that cannot be.
        """
        own = {f.name: f.default for f in fields(self)}
        of_shape = {name: settings.pop(name) for name in list(settings) if name not in own}
        if kind == AUTO:
            kind = _kind_with(of_shape)
        # Until the base is known: a smaller one is what every setting suits.
        layers, recalls = ("blocks", False) if kind == AUTO else parted_kind(kind)
        for name in of_shape:
            if name not in SHAPES[layers].settings():
                have = [other for other, shape in SHAPES.items() if name in shape.settings()]
                if not have:
                    raise ConfigError(f"there is no setting {setting(name)}; growlm learn --help lists them")
                raise ConfigError(
                    f"{setting(name)} is for modules of kind {' or '.join(have)}; this one is of kind {kind}"
                )
        shape = settings.get("shape")
        if shape is None or shape in (other() for other in SHAPES.values()):  # of which nothing was chosen
            settings["shape"] = shape if isinstance(shape, SHAPES[layers]) else SHAPES[layers]()
        elif not isinstance(shape, SHAPES[layers]):
            raise ConfigError(
                f"shape is a {type(shape).__name__}; a module of kind {layers} has a {SHAPES[layers].__name__}"
            )
        try:
            chosen = {**settings["shape"].model_dump(exclude_unset=True), **of_shape}
            settings["shape"] = SHAPES[layers](**chosen | ({"recall": True} if recalls else {}))
        except ValidationError as error:
            raise ConfigError(first_error(error, setting)) from None
        for name, value in {**own, **settings, "kind": kind}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "recall":
            for name in _OF_TRAINING:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"{setting(name)} is of no effect: a module of kind recall is not trained")
        for name in ("routing_regularisation", "load_concentration"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{setting(name)} is {value}; it must be a number, 0 or more")
            if value and not self.shape.has_routers:
                have = " or ".join(kind for kind, shape in SHAPES.items() if shape.has_routers)
                raise ConfigError(f"{setting(name)} is for modules of kind {have}; this one is of kind {self.kind}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"{setting('max_rows')} is {self.max_rows}; it must be at least 1")

    def on(self, parameters: int, before: str | None = None) -> LearnConfig:
        """With the kind that `auto` means: that of the version `before`, or what suits a base of so many parameters."""
        if self.kind != AUTO:
            return self
        given = self.shape.model_dump(exclude_unset=True)
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("kind", "shape")}
        for kind in (before, ON_PUBLISHED if parameters >= _PUBLISHED else None):
            if kind is not None and given.keys() <= set(SHAPES[parted_kind(kind)[0]].settings()):
                return LearnConfig(kind, **own, **given)
        return LearnConfig("blocks", **own, **given)

    def to_json(self) -> dict[str, Any]:
        settings = super().to_json()
        del settings["shape"]
        chosen = self.shape.model_dump(mode="json")
        return {**settings, **{name: chosen[name] for name in self.shape.settings()}}


def _kind_with(settings: Mapping[str, Any]) -> str:
    """The kind that settings of a shape are of, where no kind is named: auto if they suit what that may be."""
    if settings.keys() <= set(BlocksConfig.settings()):
        return AUTO
    return ON_PUBLISHED if settings.keys() <= set(SHAPES[parted_kind(ON_PUBLISHED)[0]].settings()) else "blocks"


@dataclass(frozen=True)
class RouterConfig(TrainConfig):
    """Settings of a transformer router's training. A row is a passage of one domain's kept text, cut to
    `sequence_length` tokens; `tokens` and `epochs` count them over all domains.

    Attributes:
        router_layers: decoder layers of the router.
        passages: rows drawn from every domain's kept text.
        admit_anyway: keep a version that does worse than the one before, as held-out text tells.
    """

    router_layers: int = 4
    passages: int = 256
    admit_anyway: bool = False
    sequence_length: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("router_layers", "passages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{setting(name)} is {getattr(self, name)}; it must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """As of all; the next training asks for itself what it admits."""
        settings = super().to_json()
        del settings["admit_anyway"]
        return settings
