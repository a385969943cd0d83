"""Knowledge modules: new parameters beside a frozen base. This file is the contract that every kind keeps.

A module is asked for five things, and engine, learning, store and evaluation ask for nothing else:
`fork`, the first base layer whose output it changes; `extend`, the layers to run with it; `rows`, its vocabulary rows;
`state_dict` and `config`, what is saved. Nothing here changes a base, except `attach`, which `detach` undoes.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from growlm.base import Base, Step, tensor_bytes
from growlm.base.anatomy import anatomy_of
from growlm.errors import BaseModelError, ConfigError, IntegrityError
from growlm.modules.vocabulary import VocabularyRows

__all__ = [
    "KINDS", "KnowledgeModule", "ModuleConfig", "ModuleSet", "attach", "attached", "check_together", "detach",
    "kind_of",
]  # fmt: skip

KINDS = {
    "blocks": "growlm.modules.blocks:Blocks",
    "experts": "growlm.modules.experts:Experts",
    "peer": "growlm.modules.peer:Peer",
}


_made = itertools.count()  # modules in the order in which this process made them


class ModuleConfig(BaseModel):
    """What the manifest records of a module's shape. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def about(self) -> str:
        """What `growlm status` says of it besides its size."""
        return ""


class KnowledgeModule(nn.Module, ABC):
    """New parameters for one base.

    Attributes:
        config: its shape, as saved.
        fork: first base layer whose output it changes; `num_layers` of the base if none.
        rows: its vocabulary rows.
        shape: family, layers, width and vocabulary of the base that it was made for.
        identity: tells it from every other module and version; part of the key of its key-value caches. Modules that
            are active together run in its order.
    """

    kind: ClassVar[str]
    combines: ClassVar[bool] = False  # whether several of the kind can be active together
    exports: ClassVar[bool] = True  # whether base and module together are a model of the base's own family
    Config: ClassVar[type[ModuleConfig]]

    config: ModuleConfig
    fork: int
    rows: VocabularyRows
    identity: str
    shape: tuple[str, int, int, int]

    @abstractmethod
    def __init__(self, base: Base, config: Any, rows: VocabularyRows) -> None:
        super().__init__()
        self.config, self.rows = config, rows
        self.shape = base_shape(base)
        self.identity = f"unsaved-{next(_made):09}-{uuid.uuid4().hex}"

    @classmethod
    @abstractmethod
    def create(cls, base: Base, config: Any, row_ids: Tensor | None = None) -> Self:
        """A new module in float32 that leaves the base's logits bit-equal. `row_ids` (r,): tokens with own rows."""

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
            with torch.device("meta"):
                module = cls(base, config, rows)
        except ConfigError as error:
            raise IntegrityError(
                f"{where}: its config does not fit the base: {error}; learn the module again"
            ) from None
        assign(module, tensors, where)
        return module.eval()

    def open(self) -> None:
        """Called before the first step of training: what `create` keeps shut, so that nothing changes, is opened."""

    def begin_training(self) -> None:
        """Called after `open` where training begins: batch statistics and dropout of its own are on from now on."""

    def require_whole(self) -> None:
        """
        Raises:
            ConfigError: not all of it is in memory.
        """

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
    def extend(self, steps: Sequence[Step]) -> list[Step]:
        """All layers to run with this module, from all those without it. Leaves those before `fork` as they are."""

    @abstractmethod
    def cache_slots(self, base: Base) -> int:
        """How many slots of a key-value cache a forward pass with this module uses."""

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


def kind_of(name: str) -> type[KnowledgeModule]:
    """The class of a module kind.

    Raises:
        ConfigError: no such kind.
    """
    if name not in KINDS:
        raise ConfigError(f"module kind {name!r} does not exist; kinds are {', '.join(KINDS)}")
    home, _, cls = KINDS[name].partition(":")
    return getattr(importlib.import_module(home), cls)


def check_together(named: Sequence[tuple[str, type[KnowledgeModule]]]) -> None:
    """Checks that modules, by what to call them and their class, can be active in one request.

    Raises:
        ConfigError: one of several is of a kind that runs alone, or two are of different kinds.
    """
    if len(named) < 2:
        return
    combining = " or ".join(kind for kind in KINDS if kind_of(kind).combines)
    first, kind = named[0]
    for name, other in named:
        if not other.combines:
            raise ConfigError(
                f"{name} is of kind {other.kind}, and such modules cannot be active together with others; name one "
                f"module alone, or learn them with --kind {combining}"
            )
        if other is not kind:
            raise ConfigError(
                f"{first} is of kind {kind.kind} and {name} of kind {other.kind}: modules of different kinds cannot be "
                "active together; leave out one of them"
            )


class ModuleSet:
    """The modules active for a request (none: the base itself), as the layers and projections to run.

    Several run in the order of their identities, whatever order they are given in: sums of floating-point numbers
    depend on it, and the digest says nothing of an order. What their vocabulary rows add is added up.

    Raises:
        ConfigError: modules that cannot be active together, or one that is given twice.
        BaseModelError: a module that was made for a base of another shape.
    """

    def __init__(self, base: Base, modules: Sequence[KnowledgeModule] = ()) -> None:
        modules = sorted(modules, key=lambda m: m.identity)
        check_together([(_called(m), type(m)) for m in modules])
        for one, next_one in itertools.pairwise(modules):
            if one.identity == next_one.identity:
                raise ConfigError(f"{_called(one)} is given twice; give it once")
        for module in modules:
            if module.shape != base_shape(base):
                raise BaseModelError(f"a module made for a base of shape {module.shape} cannot run on {base.where}")
        self.base = base
        self.modules = tuple(modules)
        self.fork = min((m.fork for m in modules), default=base.num_layers)
        steps = base.steps()
        for module in modules:
            steps = module.extend(steps)
        self.steps = steps
        self.rows = VocabularyRows.joined([m.rows for m in modules])
        self.cache_slots = max((m.cache_slots(base) for m in modules), default=base.num_layers)
        names = "\n".join(m.identity for m in modules)
        self.digest = hashlib.sha256(names.encode()).hexdigest() if modules else "base"

    def embed(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        return self.rows.embed(self.base, hidden, input_ids)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (b, t, v) from the last layer's output (b, t, d)."""
        return self.rows.logits(self.base, self.base.norm(hidden))

    def hidden(self, input_ids: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """The last layer's output (b, t, d), before the final norm, without a cache."""
        hidden, shared = self.base.begin(input_ids, visible=visible)
        hidden = self.base.embed_positions(self.embed(hidden, input_ids), shared.positions)
        return self.base.run(hidden, self.steps, shared)

    def logits(self, input_ids: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of `input_ids` (b, t), without a cache."""
        return self.project(self.hidden(input_ids, visible=visible))


def _called(module: KnowledgeModule) -> str:
    name, at, _ = module.identity.partition("@")
    return name if at else "a module"


class _HeadWithRows(nn.Module):
    def __init__(self, head: nn.Module, rows: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = head, rows

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows.add_to(self.inner(hidden), hidden)  # type: ignore[operator]


class _EmbeddingWithRows(nn.Module):
    def __init__(self, embedding: nn.Module, rows: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.rows, self.scale = embedding, rows, scale

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows.add_to(self.inner(input_ids), input_ids, self.scale)  # type: ignore[operator]


def attach(model: Any, module: KnowledgeModule) -> None:
    """Makes a transformers model run with `module`: its own `forward`, `generate` and cache work on.

    Changes the model in place, for one module at a time; `detach` gives it back as it was. The engine does not use
    this: it runs any number of modules beside one base that nobody changes.

    Raises:
        ConfigError: a module is attached already.
        BaseModelError: the family is not supported.
    """
    if hasattr(model, "_growlm_detached"):
        raise ConfigError("this model has a module attached already; detach it first")
    base = Base(model, freeze=False)
    if module.shape != base_shape(base):
        raise BaseModelError(f"a module made for a base of shape {module.shape} cannot be attached to this model")
    anatomy, decoder = base.anatomy, base.decoder
    layers = [step.layer for step in module.extend(base.steps())]
    state = {
        "config": model.config,
        "layers": getattr(decoder, anatomy.layers),
        "indices": [getattr(layer, anatomy.attention).layer_idx for layer in layers],
        "extended": layers,
        "head": base.head,
        "embedding": base.embedding,
    }
    setattr(decoder, anatomy.layers, nn.ModuleList(layers))
    _number(layers, anatomy.attention, range(len(layers)))
    _set_config(model, decoder, module.extended_config(model.config))
    if module.rows.head is not None:
        setattr(model, anatomy.head, _HeadWithRows(base.head, module.rows.head))
    if module.rows.input is not None:
        wrapped = _EmbeddingWithRows(base.embedding, module.rows.input, base.embedding_scale)
        setattr(decoder, anatomy.embedding, wrapped)
    model._growlm_detached = state


def detach(model: Any) -> None:
    """Undoes `attach`: the model's layers, config, head and embedding are the same objects as before.

    Raises:
        ConfigError: nothing is attached.
    """
    state = model.__dict__.pop("_growlm_detached", None)
    if state is None:
        raise ConfigError("this model has no module attached")
    anatomy = anatomy_of(state["config"], "base")
    decoder = getattr(model, anatomy.decoder)
    _number(state["extended"], anatomy.attention, state["indices"])
    setattr(decoder, anatomy.layers, state["layers"])
    setattr(decoder, anatomy.embedding, state["embedding"])
    setattr(model, anatomy.head, state["head"])
    _set_config(model, decoder, state["config"])


@contextmanager
def attached(model: Any, module: KnowledgeModule) -> Iterator[Any]:
    """`attach` for the length of a `with` block."""
    attach(model, module)
    try:
        yield model
    finally:
        detach(model)


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


def _number(layers: Sequence[nn.Module], attention: str, indices: Sequence[int]) -> None:
    for layer, index in zip(layers, indices, strict=True):
        getattr(layer, attention).layer_idx = index


def _set_config(model: Any, decoder: Any, config: Any) -> None:
    model.config = decoder.config = config
