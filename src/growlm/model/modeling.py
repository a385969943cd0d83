"""The language model that growlm trains from scratch, as transformers has models: every layer chooses its parts.

A layer is attention (stick-breaking, or softmax with rotary positions; ordinary heads, or a mixture of them) and
feed-forward (dense, routed experts, or experts or values found by product keys); see `decoder.py`. What the routers
decided is returned by `forward(..., output_routings=True)` and kept nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from growlm.base.cache import CACHE_NAME, cache_of
from growlm.base.parts import LlamaRotaryEmbedding, can_return_tuple
from growlm.layers.experts import AttentionExperts, SparseFeedForward
from growlm.layers.grouped import GroupedLinear
from growlm.layers.losses import load_balance, load_concentration, mutual_information, router_z
from growlm.layers.peer import PEER, ProductKeyMemory
from growlm.layers.product_keys import ProductKeys
from growlm.layers.routing import ExpertRouter
from growlm.model.configuration import GrowlmConfig
from growlm.model.decoder import Decision, GrowlmDecoderLayer, new_norm

# b batch, t new tokens, s tokens seen so far and new ones, d hidden size, h heads, g heads of keys, w head width


@dataclass(frozen=True)
class LayerRouting:
    """The decisions of one layer's routers; None where it has none, as with product keys, which have no such loss."""

    attention: Decision | None
    feed_forward: Decision | None


@dataclass
class GrowlmOutput(BaseModelOutputWithPast):
    """Adds `routings`, one a layer, where they were asked for."""

    routings: tuple[LayerRouting, ...] | None = None


@dataclass
class GrowlmCausalLMOutput(CausalLMOutputWithPast):
    """Adds `routings` where they were asked for, and the `auxiliary_loss` that is part of `loss`, in training."""

    auxiliary_loss: Tensor | None = None
    routings: tuple[LayerRouting, ...] | None = None


class GrowlmPreTrainedModel(PreTrainedModel):
    config_class = GrowlmConfig
    config: GrowlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GrowlmDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupedLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, ExpertRouter):
            nn.init.normal_(module.embeddings, std=module.embeddings.shape[-1] ** -0.5)
            if module.temperature is not None:
                nn.init.zeros_(module.temperature)
        elif isinstance(module, SparseFeedForward | AttentionExperts) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # These have their own; parts come before the whole, so that it is the last word on their projections too.
        elif isinstance(module, ProductKeys):
            module.reset_parameters()
        elif isinstance(module, PEER | ProductKeyMemory):
            module.reset_tables()


class GrowlmModel(GrowlmPreTrainedModel):
    """The stack: token ids -> hidden states after the final norm."""

    def __init__(self, config: GrowlmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GrowlmDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = new_norm(config)
        self._rotated = any(config.attention_of(i) == "softmax" for i in range(config.num_hidden_layers))
        self.rotary = LlamaRotaryEmbedding(config) if self._rotated else None  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def rotary_emb(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for softmax attention; None where no layer has it."""
        return None if self.rotary is None else self.rotary(hidden, position_ids=position_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_routings: bool = False,
        **others: Any,
    ) -> GrowlmOutput:
        """
        Args:
            attention_mask: (b, s), 0 where a row is padded; or (b, 1, t, s), bool or to be added to scores, for each
                query the keys that it sees. A token that does not see itself is then padding.
            document_ids: (b, s) integers; a token attends to tokens of its own number only.
            cache: a cache to go on from, or a `history`; `past_key_values` is the same under its older name.
            output_routings: return what every router decided.
            others: what transformers hands to every model, where it asks nothing of this one.

        Raises:
            ValueError: a mask of another shape or type, or something asked for that this model does not return.
            TypeError: an argument that is not known.
        """
        _refuse(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, not both")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = _one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        t = hidden.shape[1]
        mask = None if attention_mask is None else self._mask(attention_mask, past, t)
        real = None
        if attention_mask is not None and (self.training or attention_mask.ndim == 2):
            real = _real_tokens(attention_mask, len(hidden), past, t)
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -t:]
            else:
                position_ids = torch.arange(past, past + t, device=hidden.device)[None]
        rotary = self.rotary_emb(hidden, position_ids)
        seen: list[Tensor] = []
        routings: list[LayerRouting] = []
        for layer in self.layers:
            if output_hidden_states:
                seen.append(hidden)
            result = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                use_cache=use_cache,
                position_embeddings=rotary,
                document_ids=document_ids,
                output_routings=output_routings,
                real_tokens=real,
            )
            if output_routings:
                hidden, *flat = result
                pairs = [None if flat[i] is None else Decision(flat[i], flat[i + 1]) for i in (0, 2)]
                routings.append(LayerRouting(*pairs))
            else:
                hidden = result
        hidden = self.norm(hidden)
        return GrowlmOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: cache if use_cache else None},
            hidden_states=(*seen, hidden) if output_hidden_states else None,
            routings=tuple(routings) if output_routings else None,
        )

    @staticmethod
    def _mask(attention_mask: Tensor, past: int, t: int) -> Tensor:
        if attention_mask.ndim == 4:
            shape, dtype = attention_mask.shape, attention_mask.dtype
            if shape[1] != 1 or shape[2] not in (1, t) or shape[3] < past + t:
                raise ValueError(f"attention_mask has shape {tuple(shape)}, expected (b, 1, {t}, {past + t})")
            if dtype != torch.bool and not dtype.is_floating_point:
                raise ValueError(f"attention_mask is a {dtype} for each query, expected bool, or a float to be added")
            return attention_mask
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions, expected 2 or 4")
        if attention_mask.shape[1] != past + t:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, expected {past + t}")
        return attention_mask.bool()[:, None, None]

    def history(self, cache: DynamicCache, length: int | None = None) -> DynamicCache:
        """The last keys and values of a cache without gradient, for the next segment (Transformer-XL).

        Args:
            length: tokens, by default the config's `history_length`, which is also the most.

        Raises:
            ValueError: longer than the config allows, or a layer with rotary positions, which history would shift.
        """
        most = self.config.history_length
        length = most if length is None else length
        if not 0 < length <= most:
            raise ValueError(f"a history of {length} tokens, expected 1 to history_length, {most}")
        if self._rotated:
            raise ValueError("history needs stick-breaking attention in all layers: rotary positions would be shifted")
        kept = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = (getattr(layer, name)[:, :, -length:].detach() for name in ("keys", "values"))
            kept.update(keys, values, index)
        return kept


def _one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, whichever of its two names it came under.

    Raises:
        ValueError: it came under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("give cache or past_key_values, not both: they are two names of one argument")
    return past_key_values if cache is None else cache


def _real_tokens(attention_mask: Tensor, batch: int, past: int, t: int) -> Tensor:
    """Of the new tokens (b, t), which are not padding."""
    if attention_mask.ndim == 2:
        return attention_mask[:, -t:].bool()
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    return seen[:, 0, :, past : past + t].expand(batch, t, t).diagonal(dim1=1, dim2=2)


# What transformers hands to every model: for the loss; of no effect here; and for results that are not to be had.
_FOR_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
_IDLE = ("cache_position", "token_type_ids")
_NOT_RETURNED = {
    "output_attentions": "attention weights are never all in memory",
    "output_router_logits": "ask for output_routings",
}


def _refuse(arguments: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: something is asked for that is not to be had.
        TypeError: an argument that is not known.
    """
    for name, value in arguments.items():
        if name in _NOT_RETURNED:
            if value:
                raise ValueError(f"{name} is {value!r}; growlm models do not return it: {_NOT_RETURNED[name]}")
        elif name not in _IDLE:
            raise TypeError(f"forward() got an argument {name!r} that growlm models do not have")


class GrowlmForCausalLM(GrowlmPreTrainedModel, GenerationMixin):
    """The stack with an output head. In training its loss includes the auxiliary loss of the config."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: GrowlmConfig) -> None:
        super().__init__(config)
        self.model = GrowlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_routings: bool = False,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> GrowlmCausalLMOutput:
        """Arguments and errors as in `GrowlmModel.forward`; `labels` (b, t) are shifted here, -100 is not counted."""
        for_loss = {name: others.pop(name) for name in _FOR_THE_LOSS if name in others}
        cache = _one_cache(cache, past_key_values)
        past = 0 if cache is None else cache.get_seq_length()
        weighed = self.training and labels is not None and self.config.auxiliary_loss != "none"
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            output_routings=output_routings or weighed,
            return_dict=True,
            **others,
        )
        hidden = out.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = auxiliary = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
            if weighed:
                counted = (
                    None if attention_mask is None else _real_tokens(attention_mask, len(hidden), past, hidden.shape[1])
                )
                auxiliary = self.auxiliary_loss(out.routings, None if counted is None else counted.flatten())
                loss = loss + auxiliary
        return GrowlmCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache_of(out)},
            hidden_states=out.hidden_states,
            auxiliary_loss=auxiliary,
            routings=out.routings if output_routings else None,
        )

    def num_active_parameters(self) -> int:
        """Parameters that compute for one token: of experts those that are chosen or retrieved, and no input embedding,
        of which a row is looked up, unless it is the output head as well."""
        total = sum(p.numel() for p in self.parameters())
        if self.lm_head.weight is not self.model.embed_tokens.weight:
            total -= self.model.embed_tokens.weight.numel()
        for module in self.modules():
            if isinstance(module, SparseFeedForward | AttentionExperts):
                weights = sum(
                    p.numel() for m in module.children() if isinstance(m, GroupedLinear) for p in m.parameters()
                )
                idle = module.router.num_experts - module.router.top_k
                total -= weights * idle // module.router.num_experts
            elif isinstance(module, PEER | ProductKeyMemory):
                read = min(module.keys.num_heads * module.keys.top_k, module.keys.num_experts)
                for table in module.parameters(recurse=False):
                    total -= table[0].numel() * (len(table) - read)
        return total

    def auxiliary_loss(self, routings: tuple[LayerRouting, ...] | None, counted: Tensor | None = None) -> Tensor:
        """The config's loss on what all routers decided, weighed, summed over them, in float32.

        Args:
            counted: (b t,), 0 for tokens of padding.
        """
        config = self.config
        total = torch.zeros((), device=self.lm_head.weight.device)
        for routing in routings or ():
            for decision in (routing.attention, routing.feed_forward):
                if decision is None:
                    continue
                if config.auxiliary_loss == "mutual_information":
                    total = total + mutual_information(decision.logits, counted)
                elif config.auxiliary_loss == "load_concentration":
                    total = total + load_concentration(decision.logits, counted)
                elif config.auxiliary_loss == "st_moe":
                    z = router_z(decision.logits, counted)
                    total = (
                        total + load_balance(decision.logits, decision.experts, counted) + config.router_z_weight * z
                    )
        return config.auxiliary_loss_weight * total
