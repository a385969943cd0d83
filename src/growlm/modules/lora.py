"""LoRA: low-rank differences of a frozen base's own matrices, learned for one domain (Hu et al. 2021, equation 3).

Beside a matrix W stand A and B of rank r: the layer computes W x + s B A x, s = alpha / r, or alpha / sqrt(r) with
rank-stabilised scaling (Kalajdzievski 2023). With DoRA (Liu et al. 2024) the rows of W + s B A are brought to a learned
length besides. Names and numbers are PEFT's, so that adapters can come and go. Several such modules can be active
together: their differences add up.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growlm.base import Base, LayerToRun
from growlm.errors import ConfigError, setting
from growlm.layers.around import Around, variant
from growlm.layers.slabs import LowRank
from growlm.layers.thin import add_thin, made_up
from growlm.modules.contract import KnowledgeModule, numbered
from growlm.modules.shapes import LoraConfig, is_called
from growlm.modules.vocabulary import VocabularyRows

_NO_TARGETS = re.compile(r"(^|\.)router(\.|$)")  # which experts are chosen is not what they compute


class Adapter(nn.Module):
    """What is learned of a matrix (out, in): `lora_A` (r, in), `lora_B` (out, r), with DoRA `magnitude` (out,) too."""

    def __init__(self, num_in: int, num_out: int, rank: int, scaling: float, *, dora: bool) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_A = nn.Linear(num_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, num_out, bias=False)
        self.magnitude = nn.Parameter(torch.empty(num_out)) if dora else None
        self._found: tuple[list[Any], tuple[Tensor, Tensor], Tensor] | None = None  # lengths, and of which tensors

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Adds exactly nothing to a matrix (out, in)."""
        self.lora_B.weight.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self._lengths(weight))

    def difference(self, x: Tensor, plain: Tensor, weight: Tensor) -> Tensor:
        """What it adds for x (..., in), of which the matrix alone makes `plain` (..., out), without its bias."""
        added = self.lora_B(self.lora_A(x)) * self.scaling
        if self.magnitude is None:
            return added
        longer = self.magnitude / self._lengths(weight).to(self.magnitude.dtype)
        return (longer - 1).to(plain.dtype) * plain + longer.to(plain.dtype) * added

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        """`total` (..., out) and what it adds to it for x (..., in), in fewer steps; without DoRA."""
        total, x = total.flatten(0, -2), x.flatten(0, -2)
        if total.stride(-1) == 1:
            return torch.addmm(total, F.linear(x, self.lora_A.weight), self.lora_B.weight.t(), alpha=self.scaling)
        few = torch.mm(self.lora_A.weight, made_up(x).t())  # as a thin product lies in memory
        return add_thin(total, self.lora_B.weight, few, self.scaling)

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) that computes the same alone, in float32."""
        whole = weight.float() + self.scaling * self.lora_B.weight.float() @ self.lora_A.weight.float()
        if self.magnitude is None:
            return whole
        return whole * (self.magnitude.float() / torch.linalg.vector_norm(whole, dim=1))[:, None]

    @torch.no_grad()
    def _lengths(self, weight: Tensor) -> Tensor:
        """Lengths of the rows of W + s B A, of which no gradient is taken (Liu et al. 2024, section 4.3). They cost as
        much as the matrix itself does for many tokens, so that they are kept as long as nothing changes. Not of what is
        trained: a fused optimiser changes a tensor and not its version."""
        of = self.lora_A.weight, self.lora_B.weight
        if any(t.requires_grad for t in of):
            return self._lengths_of(*of, weight)
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in (*of, weight)]
        # These very tensors: another one may come to lie where one was.
        if (
            self._found is None
            or self._found[0] != state
            or any(a is not b for a, b in zip(self._found[1], of, strict=True))
        ):
            self._found = state, of, self._lengths_of(*of, weight)
        return self._found[2]

    def _lengths_of(self, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight.float() + self.scaling * b.float() @ a.float(), dim=1)


class _Adapted(Around):
    """A base's matrix, which stays as it is, with what modules add to it."""

    def __init__(self, inner: nn.Module, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.inner, self.adapters = inner, nn.ModuleList(adapters)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias  # type: ignore[return-value]

    @property
    def frozen(self) -> nn.Module:
        return self.inner

    def low_rank(self) -> LowRank | None:
        parts = []
        for adapter in self.adapters:
            assert isinstance(adapter, Adapter)
            if adapter.magnitude is not None:
                return None
            parts.append((adapter.lora_A.weight, adapter.lora_B.weight, adapter.scaling))
        return parts

    def finish(self, hidden: Tensor, plain: Tensor | None) -> Tensor:
        assert plain is not None
        weight, total = matrix_of(self.inner), plain
        for adapter in self.adapters:
            assert isinstance(adapter, Adapter)
            if adapter.magnitude is None and torch.is_inference_mode_enabled():
                total = adapter.added_to(total, hidden).view(plain.shape)
                continue
            without_bias = plain
            if adapter.magnitude is not None and self.bias is not None:
                without_bias = F.linear(hidden, weight)
            total = total + adapter.difference(hidden, without_bias, weight)
        return total


class Lora(KnowledgeModule):
    """Low-rank differences in the layers of a frozen base. See `LoraConfig`."""

    kind = "lora"
    combines = True
    exports = True
    Config = LoraConfig
    config: LoraConfig

    def __init__(self, base: Base, config: LoraConfig, rows: VocabularyRows) -> None:
        config = config.completed(base)
        super().__init__(base, config, rows)
        assert config.layers is not None
        # Own input rows change the input of layer 0.
        self.fork = 0 if rows.input is not None else config.layers[0]
        self.layers = nn.ModuleDict()
        for index, targets in targets_of(base, config).items():
            adapters = nn.Module()
            for path, matrix in targets:
                (num_out, num_in), name = matrix_of(matrix).shape, f"{index}.{path}"
                made = Adapter(num_in, num_out, config.rank_of(name), config.scaling_of(name), dora=config.use_dora)
                _put(adapters, path, made)
            self.layers[str(index)] = adapters

    @classmethod
    def create(cls, base: Base, config: LoraConfig, row_ids: Tensor | None = None) -> Self:
        module = cls(base, config, VocabularyRows.create(base, config.vocabulary, row_ids)).float().to(base.device)
        for index, path, adapter in module.adapters():
            adapter.begin(matrix_of(base.layers[index].get_submodule(path)))
        return module

    def adapters(self) -> Iterator[tuple[int, str, Adapter]]:
        """Layer, path in it, and what it has there, in order."""
        for index, inside in self.layers.items():
            for path, part in inside.named_modules():
                if isinstance(part, Adapter):
                    yield int(index), path, part

    @classmethod
    def stage_of(cls, base: Base, config: LoraConfig, name: str) -> int | None:
        return numbered("layers", name)

    def extend(self, layers: Sequence[LayerToRun]) -> list[LayerToRun]:
        changed = list(layers)
        for name, inside in self.layers.items():
            layer = changed[int(name)].layer
            for path, part in inside.named_modules():
                if isinstance(part, Adapter):
                    layer = _with(layer, path.split("."), part)
            changed[int(name)] = changed[int(name)]._replace(layer=layer)
        return changed

    @torch.no_grad()
    def fold(self, base: Base) -> bool:
        for index, path, adapter in self.adapters():
            matrix = matrix_of(base.layers[index].get_submodule(path))
            matrix.copy_(adapter.merged(matrix))
        return True

    def extended_config(self, config: Any) -> Any:
        return copy.deepcopy(config)


def targets_of(base: Base, config: LoraConfig) -> dict[int, list[tuple[str, nn.Module]]]:
    """The matrices that get an adapter, by layer and path in it.

    Raises:
        ConfigError: a target that none of the layers has, or layers with none.
    """
    config, names = config.completed(base), config.target_modules
    found = {index: matrices_of(base, index) for index in config.layers or ()}
    every = [f"{index}.{path}" for index, matrices in found.items() for path, _ in matrices]
    wanted = () if isinstance(names, str) else names
    for name in wanted:
        if not any(is_called(full, name) for full in every):
            have = ", ".join(dict.fromkeys(full.rpartition(".")[2] for full in every)) or "none"
            raise ConfigError(
                f"{setting('target_modules')}: no {name!r} in the layers of {base.where}; they have {have}"
            )
    if wanted:
        found = {
            index: [(path, part) for path, part in parts if any(is_called(f"{index}.{path}", n) for n in wanted)]
            for index, parts in found.items()
        }
    for index, parts in found.items():
        if not parts:
            raise ConfigError(
                f"{setting('target_modules')}: layer {index} of {base.where} has none of them; leave out the layer"
            )
    return found


def matrices_of(base: Base, index: int) -> list[tuple[str, nn.Module]]:
    """The projections of a layer that can have an adapter, by their path in it."""
    parts = base.layers[index].named_modules()
    return [(path, part) for path, part in parts if _is_matrix(part) and not _NO_TARGETS.search(path)]


def matrix_of(part: nn.Module) -> Tensor:
    """The matrix (out, in) of a projection; transformers' Conv1D holds it the other way round."""
    weight: Tensor = part.weight  # type: ignore[assignment]
    return weight if isinstance(part, nn.Linear) else weight.T


def _is_matrix(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def _put(inside: nn.Module, path: str, part: nn.Module) -> None:
    *above, name = path.split(".")
    for step in above:
        if step not in inside._modules:
            inside.add_module(step, nn.Module())
        inside = inside.get_submodule(step)
    inside.add_module(name, part)


def _with(whole: nn.Module, path: Sequence[str], adapter: Adapter) -> nn.Module:
    """A layer, or part of one, that runs as `whole` does with an adapter at a path. Of what lies on the path there are
    shallow copies, which share all parameters; the base's own objects are not touched."""
    if not path:
        if isinstance(whole, _Adapted):
            return _Adapted(whole.inner, [*whole.adapters, adapter])
        return _Adapted(whole, [adapter])
    return variant(whole, {path[0]: _with(whole.get_submodule(path[0]), path[1:], adapter)})
