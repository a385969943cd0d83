"""The contract that every kind of knowledge module keeps: new parameters beside a frozen base.

Engine, learning, store and evaluation ask a module for its fork, its layers, its vocabulary rows, what is saved of it,
and what its docstrings here offer besides; they know nothing of any one kind.
"""

from __future__ import annotations

import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from growlm.base import Base, LayerToRun, tensor_bytes
from growlm.errors import ConfigError, IntegrityError, settings_written
from growlm.modules.shapes import ModuleConfig
from growlm.modules.vocabulary import VocabularyRows
from growlm.recall.memory import Memory, widened

_made = itertools.count()  # modules in the order in which this process made them


class Arriving(Protocol):
    """Weights on their way to the device that they are used on."""

    def there(self) -> bool:
        """Whether all have come."""

    def wait(self, stage: int | None) -> bool:
        """What is computed from now on begins once the weights are there that are read up to one of the base's stages;
        by default, all. Returns whether all are there by now."""


class KnowledgeModule(nn.Module, ABC):
    """New parameters for one base.

    Attributes:
        config: its shape, as saved.
        fork: first base layer whose output it changes; `num_layers` of the base if none.
        rows: its vocabulary rows.
        memory: the domain's text that it carries, if its config says `recall`.
        shape: family, layers, width and vocabulary of the base that it was made for.
        identity: tells it from every other module and version; part of the key of its key-value caches. Modules that
            are active together run in its order.
        arriving: where not all of its weights are on its device yet.
    """

    kind: ClassVar[str]
    combines: ClassVar[bool] = False  # whether several of the kind can be active together
    trains: ClassVar[bool] = True  # whether it has parameters that are trained
    exports: ClassVar[bool] = True  # whether base and module together are a model of the base's own family
    Config: ClassVar[type[ModuleConfig]]

    config: ModuleConfig
    fork: int
    rows: VocabularyRows
    memory: Memory | None
    identity: str
    shape: tuple[str, int, int, int]
    arriving: Arriving | None = None

    @abstractmethod
    def __init__(self, base: Base, config: Any, rows: VocabularyRows) -> None:
        super().__init__()
        self.config, self.rows = config, rows
        self.memory = Memory() if config.recall else None
        if self.memory is not None:
            self.memory.close()
        self.shape = base_shape(base)
        self.identity = f"unsaved-{next(_made):09}-{uuid.uuid4().hex}"

    @classmethod
    @abstractmethod
    def create(cls, base: Base, config: Any, row_ids: Tensor | None = None) -> Self:
        """A new module in float32 that leaves the base's logits bit-equal. `row_ids` (r,): tokens with own rows."""

    @classmethod
    def stage_of(cls, base: Base, config: Any, name: str) -> int | None:
        """The first of the base's layers, with what runs before it, whose pass reads a saved tensor of this name;
        `num_layers` of the base is behind the last. None: it may be read at any time, and when the module is made."""
        return None

    def arrive(self, stage: int | None = None) -> None:
        """Has what is computed from now on wait for those of the weights that are read up to a stage, and are on their
        way; by default, for all."""
        arriving = self.arriving
        if arriving is not None and arriving.wait(stage):
            self.arriving = None

    @classmethod
    def restore(cls, base: Base, config: Any, tensors: dict[str, Tensor], where: str) -> Self:
        """The module saved as `tensors`, which it uses as they are, without copying or initialising.

        Raises:
            IntegrityError: the tensors are not those of a module of this config on this base.
        """
        own_rows = {k.removeprefix("rows."): v for k, v in tensors.items() if k.startswith("rows.")}
        rows = VocabularyRows.restore(own_rows, base, where)
        held = "both" if rows.input is not None else "none" if rows.head is None else "head"
        if held not in ("none", config.vocabulary):
            raise IntegrityError(f"{where}: has rows of {held!r}, its config says {config.vocabulary!r}")
        try:
            with torch.device("meta"), settings_written(str):  # not what anyone has typed
                module = cls(base, config, rows)
        except ConfigError as error:
            raise IntegrityError(
                f"{where}: its config does not fit the base: {error}; learn the module again"
            ) from None
        if (gates := tensors.get("memory.gates")) is not None:
            tensors = {**tensors, "memory.gates": widened(gates)}
        assign(module, tensors, where)
        return module.eval()

    def enable_new_experts(self) -> None:
        """Called before the first step of training: lets the expert router select new experts, which `create` keeps
        out so that nothing changes."""

    def begin_training(self) -> None:
        """Called after `enable_new_experts` where training begins: batch statistics and dropout of its own are on from
        now on."""

    def require_whole(self) -> None:
        """
        Raises:
            ConfigError: not all of it is in memory.
        """
        if self.memory is not None and self.memory.text is None:
            raise ConfigError("a module that recalls has no text; load it from a store")

    @classmethod
    def is_table(cls, name: str) -> bool:
        """Whether a tensor of its state is a table: large, and read and trained by a few rows at a time."""
        return False

    def keep_rows(self, num_bytes: int) -> None:
        """Its tables, which it was restored with as views of a file, stay on the disk; in so many bytes the rows that
        were read last are kept.

        Raises:
            ConfigError: too few for what one token reads.
        """

    @classmethod
    def bytes_from_disk(cls, config: Any, outline: dict[str, Tensor], num_bytes: int) -> int:
        """Bytes of memory that it takes after `keep_rows`, from its tensors' names, shapes and dtypes.

        Raises:
            ConfigError: as `keep_rows`.
        """
        return tensor_bytes(outline.values())

    @property
    def imitation_share(self) -> float:
        """Share of the steps, the first ones, in which it learns to compute what the base does in its place (see
        `growlm.layers.pools.imitation`)."""
        return 0.0

    def regularisation(self) -> Tensor | None:
        """What `--routing-regularisation` weighs, for a kind that has routers."""
        return None

    @abstractmethod
    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        """All layers to run with this module, from all those without it. Leaves those before `fork` as they are."""

    def fold(self, base: Base) -> bool:
        """Puts what its layers add into the base's own weights, in place, for a checkpoint of both; False for a kind of
        which these are layers of their own."""
        return False

    def cache_slots(self, base: Base) -> int:
        """How many slots of a key-value cache a forward pass with this module uses."""
        return base.num_layers + self.config.new_layers

    @abstractmethod
    def extended_config(self, config: Any) -> Any:
        """A copy of the base's transformers config that describes base and module together as one checkpoint."""

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_bytes(self) -> int:
        return tensor_bytes(self.parameters()) + tensor_bytes(self.buffers())


def base_shape(base: Base) -> tuple[str, int, int, int]:
    """Family, layers, width and vocabulary: what a module's tensors must fit."""
    return base.config.model_type, base.num_layers, base.hidden_size, base.vocab_size


def assign(skeleton: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Gives a module built on the meta device its tensors, as they are.

    Raises:
        IntegrityError: names or shapes differ; the message names the first that does.
    """
    wanted = dict(skeleton.state_dict())
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "is missing" if name in wanted else "is unexpected"
        raise IntegrityError(f"{where}: tensor {name!r} {what}; restore the file or learn the module again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise IntegrityError(f"{where}: tensor {name!r} has dtype {tensor.dtype}; learn the module again")
        if tensor.shape != wanted[name].shape:
            raise IntegrityError(
                f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}; "
                "restore the file or learn the module again"
            )
    skeleton.load_state_dict(tensors, assign=True)
    skeleton.requires_grad_(False)


def numbered(part: str, name: str) -> int | None:
    """Which of a list's parts a tensor belongs to; None where it is of no such list."""
    first, number, *_ = f"{name}..".split(".")
    return int(number) if first == part and number.isdecimal() else None
