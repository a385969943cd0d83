"""Base: the frozen language model, run from any layer to any layer.

Knows how a family embeds, masks, rotates and projects; runs its own decoder layers and any others that are called as
they are, in any order. Knows nothing of modules or stores; a cache goes through to the layers as it is.

Computes what the family's own `forward` computes, operation for operation: the results are bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from growlm.base.anatomy import Anatomy, anatomy_of
from growlm.base.calls import LayerCall
from growlm.base.segments import Segment, SegmentCache, SegmentMask, tell_segments_apart
from growlm.base.sizes import tensor_bytes
from growlm.errors import DataError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# b batch, t new tokens, s tokens seen so far and new ones, d hidden size, v vocabulary


class LayerToRun(NamedTuple):
    """One decoder layer to run, and the attention pattern that it wants."""

    layer: nn.Module
    attention: str  # "full_attention" or "sliding_attention"
    number: int | None = None  # which of the base's layers it is, be it changed; None for one beside them


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward pass shares."""

    positions: Tensor  # (b or 1, t)
    masks: dict[str, Tensor | SegmentMask | None]  # per attention pattern: (b, 1, t, s), or None for plain causal
    rotary: dict[str, tuple[Tensor, Tensor] | None]  # per attention pattern: cosines and sines, where there are any
    cache: Cache | None


class Base:
    """A causal language model of a supported family, frozen, in evaluation mode.

    Args:
        model: a transformers `...ForCausalLM`.
        where: what to call it in messages.
        freeze: put the model in evaluation mode and its parameters out of autograd's reach, in place.

    Raises:
        BaseModelError: the family is not supported, or its layers in the installed transformers are not understood.
    """

    def __init__(self, model: Any, where: str = "base", *, freeze: bool = True) -> None:
        self.where = where
        self.fingerprint: str | None = None  # known where the base came from a folder
        self.anatomy: Anatomy = anatomy_of(model.config, where)
        self.model = model.eval().requires_grad_(False) if freeze else model
        self.config = model.config
        self.decoder = getattr(model, self.anatomy.decoder)
        self.embedding = getattr(self.decoder, self.anatomy.embedding)
        self.final_norm = getattr(self.decoder, self.anatomy.norm)
        self.head: nn.Module = getattr(model, self.anatomy.head)
        self.layers: list[nn.Module] = list(getattr(self.decoder, self.anatomy.layers))
        self.num_layers = len(self.layers)
        self._call = LayerCall.of(self.layers[0], where)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._eager = self.config._attn_implementation == "eager"
        self._window: int | None = getattr(self.config, "sliding_window", None)
        self._patterns = sorted({self.attention_pattern(i) for i in range(self.num_layers)})

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """Rows of the output head, (v, d)."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def embedding_scale(self) -> float:
        """What a stored embedding row is multiplied by when it is read."""
        return math.sqrt(self.hidden_size) if self.anatomy.scaled_embedding else 1.0

    @property
    def max_positions(self) -> int | None:
        """Longest text in tokens that learned positions allow; None where positions are rotary."""
        return self.config.max_position_embeddings if self.anatomy.positions else None

    @property
    def trained_positions(self) -> int | None:
        """Tokens that its positions were made for, be they rotary; None where it says none or has no positions."""
        if self.anatomy.unbounded:
            return None
        made_for: int | None = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if made_for is None or not isinstance(original, int) or not isinstance(factor, int | float):
            return made_for
        return max(made_for, int(original * factor))  # configs of stretched positions may still give the first

    def require_rows(self, ids: Any, what: str, tokenizer: Any = None) -> None:
        """Checks token ids, a list, array or tensor of at least one, before they meet a table of rows: on a GPU one
        that is not there would end the process.

        Args:
            what: whose ids they are, for the message.
            tokenizer: to name the token.

        Raises:
            DataError: an id that the base has no row for.
        """
        extremes = (ids.min(), ids.max()) if hasattr(ids, "min") else (min(ids), max(ids))
        wrong = [i for i in map(int, extremes) if not 0 <= i < self.vocab_size]
        if wrong:
            found, named, hint = wrong[-1], "", "give ids of its own tokenizer"
            if tokenizer is not None and 0 <= found < len(tokenizer):
                named = f" ({tokenizer.convert_ids_to_tokens(found)!r})"
                hint = "its tokenizer knows tokens that it has no rows for: leave them out of the text"
            raise DataError(
                f"{what}: token id {found}{named} is not in the vocabulary of {self.where}, which has ids 0 to "
                f"{self.vocab_size - 1}; {hint}"
            )

    def end_tokens(self, tokenizer: Any) -> set[int]:
        """Tokens that end a text or a turn, as config, generation config and tokenizer say."""
        ends: set[Any] = set()
        for holder in (self.config, getattr(self.model, "generation_config", None), tokenizer):
            value = getattr(holder, "eos_token_id", None)
            ends |= set(value) if isinstance(value, list | tuple) else {value}
        return {e for e in ends if e is not None}

    def checkpoint_activations(self) -> None:
        """From now on layers in training keep their inputs alone and are computed once more in the backward pass."""
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def num_bytes(self) -> int:
        """Bytes of all weights, shared ones counted once."""
        return tensor_bytes(self.model.parameters()) + tensor_bytes(self.model.buffers())

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def attention_pattern(self, index: int) -> str:
        """Attention pattern of base layer `index`."""
        if self.anatomy.sliding_everywhere:
            return "full_attention" if self._window is None else "sliding_attention"
        types = getattr(self.config, "layer_types", None)
        return types[index] if types else "full_attention"

    def layers_to_run(self, start: int = 0, stop: int | None = None) -> list[LayerToRun]:
        """The base's own layers from `start` up to `stop`."""
        stop = self.num_layers if stop is None else stop
        return [LayerToRun(self.layers[i], self.attention_pattern(i), i) for i in range(start, stop)]

    def begin(
        self,
        input_ids: Tensor,
        *,
        past: int = 0,
        visible: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Pass]:
        """Embeds `input_ids` (b, t) and prepares what all layers share.

        Args:
            past: tokens already in `cache`.
            visible: (b, past + t) bool, False where a row is padded (on the left); None when nothing is padded.

        Returns:
            Hidden states (b, t, d), and the pass to hand to `run`.
        """
        num_new = input_ids.shape[1]
        if visible is None:
            positions = torch.arange(past, past + num_new, device=input_ids.device)[None]
        else:
            positions = (visible.long().cumsum(-1) - 1).clamp_(min=0)[:, past:]
        hidden = self.embedding(input_ids)
        return hidden, self.pass_for(hidden, positions, past=past, visible=visible, cache=cache)

    def pass_for(
        self,
        hidden: Tensor,
        positions: Tensor,
        *,
        past: int = 0,
        visible: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Pass:
        """The pass for hidden states (b, t, d) that already exist, at `positions` (b or 1, t)."""
        masks: dict[str, Tensor | SegmentMask | None] = {
            pattern: self._mask(pattern, hidden, hidden.shape[1], past, visible) for pattern in self._patterns
        }
        return Pass(positions, masks, self._rotary(hidden, positions), cache)

    def pass_of_segments(self, hidden: Tensor, segments: Sequence[Segment]) -> Pass:
        """The pass for hidden states (1, t, d) of several texts' new tokens, one text after another; each sees its own
        keys and values, which grow by its tokens."""
        tell_segments_apart(self.config)
        places = [torch.arange(s.past, s.past + s.tokens, device=hidden.device) for s in segments]
        positions, cache = torch.cat(places)[None], SegmentCache(segments, hidden.device)
        masks: dict[str, Tensor | SegmentMask | None] = {}
        for pattern in self._patterns:
            window = self._window if pattern == "sliding_attention" else None
            own = (self._mask(pattern, hidden, s.tokens, s.past, None) if s.tokens > 1 else None for s in segments)
            masks[pattern] = SegmentMask(cache, tuple(own), tuple(side.mask(window, hidden) for side in cache.sides))
        return Pass(positions, masks, self._rotary(hidden, positions), cache)

    def embed_positions(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Adds learned positions, where the family has them: the input of layer 0."""
        if self.anatomy.positions is None:
            return hidden
        return hidden + getattr(self.decoder, self.anatomy.positions)(positions)

    def run(self, hidden: Tensor, layers: Sequence[LayerToRun], shared: Pass) -> Tensor:
        """Runs layers in order: (b, t, d) -> (b, t, d)."""
        arguments = {
            pattern: self._call.arguments(
                position_ids=shared.positions,
                use_cache=shared.cache is not None,
                cache=shared.cache,
                position_embeddings=turned,
            )
            for pattern, turned in shared.rotary.items()
        }
        for layer, attention, _ in layers:
            hidden = layer(hidden, attention_mask=shared.masks[attention], **arguments[attention])
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        return self.final_norm(hidden)

    def cap(self, logits: Tensor) -> Tensor:
        """The family's bound on logits, where it has one."""
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def logits(self, input_ids: Tensor, *, visible: Tensor | None = None) -> Tensor:
        """The base's own logits, (b, t, v)."""
        hidden, shared = self.begin(input_ids, visible=visible)
        hidden = self.run(self.embed_positions(hidden, shared.positions), self.layers_to_run(), shared)
        return self.cap(self.head(self.norm(hidden)))

    def _rotary(self, hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor] | None]:
        if self.anatomy.positions is not None:
            return dict.fromkeys(self._patterns)
        turn = self.decoder.rotary_emb
        if self.anatomy.rotary_by_pattern:
            return {pattern: turn(hidden, position_ids=positions, layer_type=pattern) for pattern in self._patterns}
        return dict.fromkeys(self._patterns, turn(hidden, position_ids=positions))

    def _mask(self, pattern: str, hidden: Tensor, num_new: int, past: int, visible: Tensor | None) -> Tensor | None:
        if self.anatomy.masks_padding_only:
            return None if visible is None else visible[:, None, None].bool()
        total = past + num_new
        window = self._window if pattern == "sliding_attention" and self._window else total + 1
        windowed = total >= window
        plain = not windowed and (num_new == 1 or past == 0)
        if plain and visible is None and (num_new == 1 or not self._eager):
            return None
        query = torch.arange(past, total, device=hidden.device)[:, None]
        key = torch.arange(total, device=hidden.device)[None]
        mask = key <= query
        if windowed:
            mask = mask & (key > query - window)
        mask = mask[None, None]
        if visible is not None:
            mask = mask & visible[:, None, None].bool()
        if not self._eager:
            # A row of padding sees nothing; let it see itself, so that its softmax is defined.
            return mask if visible is None else mask | (key == query)
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
            ~mask, torch.finfo(hidden.dtype).min
        )
