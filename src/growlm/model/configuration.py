"""Configuration of the language model that growlm trains from scratch: every layer chooses its parts.

`presets` holds the published sizes (ModuleFormer, table 1) and small ones.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from growlm.model.registration import register_model

ATTENTIONS = ("stickbreaking", "softmax")
FEED_FORWARDS = ("dense", "experts", "peer", "memory")
AUXILIARY_LOSSES = ("mutual_information", "load_concentration", "st_moe", "none")
ROUTERS = ("mlp", "linear", "cosine")
GATES = ("probabilities", "renormalised")
NORMS = ("layernorm", "rmsnorm")
_WORDS_BY_LAYER: dict[str, tuple[str, ...]] = {"attention": ATTENTIONS, "feed_forward": FEED_FORWARDS}
_WORDS: dict[str, tuple[str, ...]] = {
    "auxiliary_loss": AUXILIARY_LOSSES, "router": ROUTERS, "router_gates": GATES, "norm": NORMS,
}  # fmt: skip
_MINIMA = {  # of whole numbers
    "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 1, "attention_experts_per_tok": 0, "intermediate_size": 1, "num_experts_per_tok": 0, "router_size": 1,
    "num_sampled_experts": 0, "peer_num_heads": 0, "peer_top_k": 0, "peer_neurons_per_expert": 0, "history_length": 0,
    "sequence_length": 1, "max_position_embeddings": 1,
}  # fmt: skip
_SHARES = ("dropout", "router_dropout", "peer_dropout", "peer_query_dropout")
_FLAGS = ("shared_key_value", "peer_gated", "gated", "key_value_bias", "expert_bias", "tie_word_embeddings")
_NUMBERS = ("norm_eps", "auxiliary_loss_weight", "router_z_weight", "initializer_range")


class GrowlmConfig(PreTrainedConfig):
    """Settings of a growlm model.

    Args:
        attention: `stickbreaking` (no positions) or `softmax` (with rotary ones); one word, or one a layer.
        feed_forward: `dense`, `experts` (a few large ones, routed), `peer` (a great many tiny ones, found by product
            keys) or `memory` (product-key memory, PEER's baseline: values without a neuron); one word, or one a layer.
        num_attention_heads: heads, of every attention expert where there are such.
        num_key_value_heads: by default as many.
        head_dim: by default hidden_size over the number of heads, which must divide it.
        num_attention_experts: 0: ordinary heads; more: a mixture of attention heads, of which a token uses
            `attention_experts_per_tok`.
        shared_key_value: False: keys and values are the layer's input itself (one head as wide as the model).
        intermediate_size: width of the dense feed-forward, or of each expert.
        num_experts, num_experts_per_tok: of the feed-forward.
        router: mlp, linear or cosine; `router_size` is its width.
        router_gates: `probabilities` (over all experts, not renormalised) or `renormalised` (over the chosen).
        num_sampled_experts: of the chosen experts, so many are drawn at random in training.
        peer_num_experts: of a layer with `peer` or `memory`, or a list with one number a layer; a number with two
            factors that are not too unequal, such as a square.
        peer_num_heads, peer_top_k: queries of a token, and experts that each retrieves.
        peer_neurons_per_expert, peer_gated: hidden neurons of an expert of `peer`; twice the products, of which one
            half gates the other.
        peer_key_size: width of a key, by default half of the model's.
        peer_query_norm: of the queries: `batch` (makes the use of experts even), `layer` or `none`.
        peer_scores: gates are the `softmax` of what a head retrieved, or the `sigmoid` of each score.
        peer_dropout, peer_query_dropout: of the hidden neurons (of `memory`: of the gates), and of the queries.
        gated: the feed-forward multiplies two halves (SwiGLU), else one activation. Not of `peer`, see `peer_gated`.
        key_value_bias, expert_bias: biases of key and value projections; a vector added to experts' results.
        norm: layernorm or rmsnorm.
        history_length: most tokens of an earlier segment whose keys and values are read, without gradient.
        auxiliary_loss: mutual_information, load_concentration, st_moe or none, added in training with
            `auxiliary_loss_weight`; st_moe adds its z-loss with `router_z_weight`.
        sequence_length: that it is trained at; a number for users, nothing is bound to it.
    """

    model_type = "growlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers' Trainer adds to it)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        attention: str | list[str] = "stickbreaking",
        feed_forward: str | list[str] = "experts",
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        num_attention_experts: int | list[int] = 0,
        attention_experts_per_tok: int = 2,
        shared_key_value: bool = True,
        intermediate_size: int = 512,
        num_experts: int | list[int] = 8,
        num_experts_per_tok: int = 2,
        router: str = "mlp",
        router_size: int = 256,
        router_gates: str = "probabilities",
        router_dropout: float = 0.0,
        num_sampled_experts: int = 0,
        peer_num_experts: int | list[int] = 65_536,
        peer_num_heads: int = 8,
        peer_top_k: int = 16,
        peer_neurons_per_expert: int = 1,
        peer_gated: bool = False,
        peer_key_size: int | None = None,
        peer_query_norm: str = "batch",
        peer_scores: str = "softmax",
        peer_dropout: float = 0.0,
        peer_query_dropout: float = 0.0,
        hidden_act: str = "gelu_new",
        gated: bool = False,
        key_value_bias: bool = True,
        expert_bias: bool = False,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        history_length: int = 0,
        sequence_length: int = 512,
        max_position_embeddings: int = 2048,
        auxiliary_loss: str = "mutual_information",
        auxiliary_loss_weight: float = 0.01,
        router_z_weight: float = 0.1,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        # What the defaults below are computed from.
        _whole("hidden_size", hidden_size, 1)
        _whole("num_attention_heads", num_attention_heads, 1)
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size is {hidden_size}, expected a multiple of num_attention_heads, {num_attention_heads}; or "
                "give head_dim"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.attention = attention
        self.feed_forward = feed_forward
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.num_attention_experts = num_attention_experts
        self.attention_experts_per_tok = attention_experts_per_tok
        self.shared_key_value = shared_key_value
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router = router
        self.router_size = router_size
        self.router_gates = router_gates
        self.router_dropout = router_dropout
        self.num_sampled_experts = num_sampled_experts
        self.peer_num_experts = peer_num_experts
        self.peer_num_heads = peer_num_heads
        self.peer_top_k = peer_top_k
        self.peer_neurons_per_expert = peer_neurons_per_expert
        self.peer_gated = peer_gated
        self.peer_key_size = peer_key_size
        self.peer_query_norm = peer_query_norm
        self.peer_scores = peer_scores
        self.peer_dropout = peer_dropout
        self.peer_query_dropout = peer_query_dropout
        self.hidden_act = hidden_act
        self.gated = gated
        self.key_value_bias = key_value_bias
        self.expert_bias = expert_bias
        self.norm = norm
        self.norm_eps = norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.history_length = history_length
        self.sequence_length = sequence_length
        self.max_position_embeddings = max_position_embeddings
        self.auxiliary_loss = auxiliary_loss
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.router_z_weight = router_z_weight
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.check()  # first: what transformers finds amiss itself, it says in several lines
        super().__init__(**kwargs)
        register_model()

    def attention_of(self, layer: int) -> str:
        return self.attention if isinstance(self.attention, str) else self.attention[layer]

    def feed_forward_of(self, layer: int) -> str:
        return self.feed_forward if isinstance(self.feed_forward, str) else self.feed_forward[layer]

    def experts_of(self, layer: int) -> int:
        """Feed-forward experts of a layer: pruning leaves layers with different numbers."""
        return self.num_experts if isinstance(self.num_experts, int) else self.num_experts[layer]

    def attention_experts_of(self, layer: int) -> int:
        many = self.num_attention_experts
        return many if isinstance(many, int) else many[layer]

    def peer_experts_of(self, layer: int) -> int:
        return self.peer_num_experts if isinstance(self.peer_num_experts, int) else self.peer_num_experts[layer]

    def product_keys_of(self, layer: int) -> dict[str, Any]:
        """Arguments of the layer's `PEER` or `ProductKeyMemory`, but for the activation."""
        found = {
            "hidden_size": self.hidden_size,
            "num_experts": self.peer_experts_of(layer),
            "num_heads": self.peer_num_heads,
            "top_k": self.peer_top_k,
            "key_size": self.peer_key_size,
            "query_norm": self.peer_query_norm,
            "scores": self.peer_scores,
            "dropout": self.peer_dropout,
            "query_dropout": self.peer_query_dropout,
        }
        if self.feed_forward_of(layer) == "peer":
            found |= {"neurons_per_expert": self.peer_neurons_per_expert, "gated": self.peer_gated}
        return found

    def check(self) -> None:
        """
        Raises:
            ValueError: settings that contradict each other; says which, and what is possible.
        """
        for name, minimum in _MINIMA.items():
            _whole(name, getattr(self, name), minimum)
        if self.peer_key_size is not None:
            _whole("peer_key_size", self.peer_key_size, 1)
        for name in ("num_experts", "num_attention_experts", "peer_num_experts"):
            for number in self._by_layer(name):
                _whole(name, number, 0)
        for name, words in _WORDS_BY_LAYER.items():
            for word in self._by_layer(name):
                _one_of(name, word, words)
        for name, words in _WORDS.items():
            _one_of(name, getattr(self, name), words)
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}, expected true or false")
        if "peer" not in self._by_layer("feed_forward") and (self.peer_gated or self.peer_neurons_per_expert != 1):
            raise ValueError("peer_gated and peer_neurons_per_expert are for layers with peer, and there is none")
        for name in (*_SHARES, *_NUMBERS):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < (1 if name in _SHARES else math.inf):
                what = "0 to below 1" if name in _SHARES else "a number, 0 or more"
                raise ValueError(f"{name} is {value!r}, expected {what}")
        self._check_activation()
        self._check_heads()
        for layer in range(self.num_hidden_layers):
            if self.feed_forward_of(layer) == "experts":
                self._check_experts(layer, "num_experts", self.experts_of(layer), self.num_experts_per_tok)
            elif self.feed_forward_of(layer) in ("peer", "memory"):
                self._check_product_keys(layer)
            if number := self.attention_experts_of(layer):
                self._check_experts(layer, "num_attention_experts", number, self.attention_experts_per_tok)

    def _by_layer(self, name: str) -> list[Any]:
        """A setting that is one for all layers, or a list with one a layer."""
        setting = getattr(self, name)
        if not isinstance(setting, list | tuple):
            return [setting]
        if len(setting) != self.num_hidden_layers:
            raise ValueError(f"{name} lists {len(setting)} layers, expected {self.num_hidden_layers}")
        return list(setting)

    def _check_activation(self) -> None:
        from growlm.base.parts import ACT2FN  # which imports torch

        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected one of transformers': gelu_new, silu, ...")

    def _check_heads(self) -> None:
        heads, shared, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if heads % shared:
            raise ValueError(f"{heads} heads cannot share {shared} of keys")
        if not self.shared_key_value and (width != self.hidden_size or shared != 1):
            raise ValueError(
                "without key and value projections there is one head of keys as wide as the model: "
                f"num_key_value_heads is 1, not {shared}, and head_dim is {self.hidden_size}, not {width}"
            )
        if width % 2 and "softmax" in self._by_layer("attention"):
            raise ValueError(f"head_dim is {width}, expected an even number: rotary positions turn pairs")

    def _check_experts(self, layer: int, name: str, number: int, top_k: int) -> None:
        if not 1 <= top_k <= number:
            raise ValueError(f"layer {layer}: a token uses {top_k} experts, expected 1 to {name}, {number}")
        if self.num_sampled_experts > top_k:
            raise ValueError(
                f"num_sampled_experts is {self.num_sampled_experts}, expected 0 to those that a token uses, {top_k}"
            )

    def _check_product_keys(self, layer: int) -> None:
        from growlm.layers.peer import PEER, ProductKeyMemory

        kind = PEER if self.feed_forward_of(layer) == "peer" else ProductKeyMemory
        try:
            kind(**self.product_keys_of(layer), device="meta")  # which takes no memory
        except ValueError as error:  # it begins with the name of the setting
            message = str(error).removesuffix(", or give sub_keys=(a, b)")
            raise ValueError(f"layer {layer}: peer_{message}") from None


def _whole(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}, expected a whole number, at least {minimum}")


def _one_of(name: str, value: object, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} is {value!r}, expected {', '.join(words[:-1])} or {words[-1]}")
