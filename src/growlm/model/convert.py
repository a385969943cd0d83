"""Conversion of published checkpoints: MoLM (model type `moduleformer`) both ways, JetMoE into ours.

Configs and tensor names alone; nothing is computed but transposed. A tensor too many or too few is an error that names
it, and so is a setting that ours cannot express.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from growlm.errors import ConfigError
from growlm.model.configuration import GrowlmConfig

_LOSSES = {"mi": "mutual_information", "switch": "st_moe", "st_moe": "st_moe"}
_ROUTERS = {"mlp": "mlp", "linear": "linear", "gmm": "cosine"}
# Settings that are the same number or word in both: ours, MoLM's, and what it is where theirs is left out.
_NEEDED = object()
_SAME: list[tuple[str, str, Any]] = [
    ("vocab_size", "vocab_size", _NEEDED),
    ("hidden_size", "n_embd", _NEEDED),
    ("num_hidden_layers", "n_layer", _NEEDED),
    ("num_attention_heads", "n_head", _NEEDED),
    ("num_attention_experts", "n_att_experts", _NEEDED),
    ("attention_experts_per_tok", "k_att", _NEEDED),
    ("intermediate_size", "ffd_hidden", _NEEDED),
    ("num_experts", "n_mlp_experts", _NEEDED),
    ("num_experts_per_tok", "k_mlp", _NEEDED),
    ("router_size", "gating_size", 256),
    ("router_dropout", "moe_pdrop", 0.0),
    ("num_sampled_experts", "sample_topk", 0),
    ("hidden_act", "activation_function", "gelu_new"),
    ("norm_eps", "layer_norm_epsilon", 1e-5),
    ("history_length", "history_length", 0),
    ("sequence_length", "block_size", 512),
    ("auxiliary_loss_weight", "aux_loss_weight", 0.0),
    ("dropout", "resid_pdrop", 0.0),
    ("initializer_range", "initializer_range", 0.02),
    ("tie_word_embeddings", "tie_word_embeddings", False),
    ("bos_token_id", "bos_token_id", None),
    ("eos_token_id", "eos_token_id", None),
    ("pad_token_id", "pad_token_id", None),
]
_ABSENT = ("attn_pdrop", "embd_pdrop")  # dropouts that ours does not have
_Z_WEIGHT = 0.1  # of the z-loss in MoLM's st_moe


def molm_config(source: Mapping[str, Any], where: str) -> GrowlmConfig:
    """Our config of a MoLM config.json. An auxiliary loss of weight 0, mutual information by name, is none.

    Raises:
        ConfigError: a setting that is missing, of a kind that is not known, or that ours cannot express.
    """
    _require_zero(source, _ABSENT, where)
    same = {ours: _setting(source, theirs, default, where) for ours, theirs, default in _SAME}
    heads, width = same["num_attention_heads"], _setting(source, "att_hidden", _NEEDED, where)
    for name, value in (("n_head", heads), ("att_hidden", width)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{where}: {name} is {value!r}, expected a whole number, at least 1")
    if width % heads:
        raise ConfigError(f"{where}: att_hidden is {width}, expected a multiple of n_head, {heads}")
    loss = _word(source, "aux_loss_type", "mi", _LOSSES, where)
    if loss == "mutual_information" and not same["auxiliary_loss_weight"]:
        loss = "none"
    try:
        return GrowlmConfig(
            attention="stickbreaking",
            feed_forward="experts",
            head_dim=width // heads,
            shared_key_value=_projects(same["hidden_size"], heads, width),
            router=_word(source, "gate_type", "mlp", _ROUTERS, where),
            router_z_weight=_Z_WEIGHT,
            auxiliary_loss=loss,
            architectures=["GrowlmForCausalLM"],
            **same,
        )
    except ValueError as error:
        theirs = [f"{ours} is their {name}" for ours, name, _ in _SAME if ours != name and ours in str(error).split()]
        raise ConfigError(f"{where}: {'; '.join([str(error), *theirs])}") from None


def _setting(source: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    if default is _NEEDED and name not in source:
        raise ConfigError(f"{where}: has no setting {name!r}")
    return source.get(name, default)


def _word(source: Mapping[str, Any], name: str, default: str, words: Mapping[str, str], where: str) -> str:
    """Our word for theirs."""
    word = source.get(name, default)
    if not isinstance(word, str) or word not in words:
        raise ConfigError(f"{where}: {name} is {word!r}, expected {' or '.join(words)}")
    return words[word]


def _require_zero(source: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if source.get(name):
            raise ConfigError(
                f"{where}: {name} is {source[name]!r}, which ours has no place for; set it to 0 to convert without it"
            )


def _projects(hidden_size: int, heads: int, width: int) -> bool:
    """Whether a MoLM has projections of keys and values: one head as wide as the model reads its input itself."""
    return not (width == hidden_size and heads == 1)


def to_molm_config(config: GrowlmConfig, where: str) -> dict[str, Any]:
    """The MoLM config.json of ours. No auxiliary loss is written as mutual information of weight 0.

    Raises:
        ConfigError: a model that the layout cannot hold; the message says why.
    """
    wanted = {
        "attention": "stickbreaking",
        "feed_forward": "experts",
        "router_gates": "probabilities",
        "norm": "layernorm",
        "gated": False,
        "expert_bias": False,
        "key_value_bias": True,
        "num_key_value_heads": config.num_attention_heads,
    }
    if config.auxiliary_loss == "st_moe":
        wanted["router_z_weight"] = _Z_WEIGHT
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{where}: {name} is {getattr(config, name)!r}; the MoLM layout holds {value!r} only")
    for name in ("num_experts", "num_attention_experts"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(config, name)!r}; the MoLM layout holds one number for all")
    heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
    if config.shared_key_value and not _projects(config.hidden_size, heads, width):
        raise ConfigError(
            f"{where}: has one head as wide as the model, {width}, and projections of keys and values; in the MoLM "
            "layout such a head has none (shared_key_value false)"
        )
    losses = {ours: theirs for theirs, ours in reversed(_LOSSES.items())} | {"none": "mi"}
    if config.auxiliary_loss not in losses:
        raise ConfigError(
            f"{where}: auxiliary_loss is {config.auxiliary_loss!r}; the MoLM layout holds {', '.join(losses)} only; it "
            "counts in training alone: set another one in config.json"
        )
    routers = {ours: theirs for theirs, ours in _ROUTERS.items()}
    return {
        "model_type": "moduleformer",
        "architectures": ["ModuleFormerForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs, _ in _SAME},
        "att_hidden": width,
        "gate_type": routers[config.router],
        "n_ctx": config.history_length * config.num_hidden_layers,
        "aux_loss_type": losses[config.auxiliary_loss],
        "aux_loss_weight": 0.0 if config.auxiliary_loss == "none" else config.auxiliary_loss_weight,
        **dict.fromkeys(_ABSENT, 0.0),
        "use_cache": True,
    }


_MOLM = [
    (r"transformer\.wte\.weight", "model.embed_tokens.weight"),
    (r"transformer\.ln_f\.(weight|bias)", r"model.norm.\1"),
    (r"lm_head\.weight", "lm_head.weight"),
    (r"transformer\.h\.(\d+)\.ln_1\.(weight|bias)", r"model.layers.\1.input_layernorm.\2"),
    (r"transformer\.h\.(\d+)\.ln_2\.(weight|bias)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"transformer\.h\.(\d+)\.attn\.([kv])_proj\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"transformer\.h\.(\d+)\.attn\.q_proj\.experts\.weight", r"model.layers.\1.self_attn.experts.query.weight"),
    (
        r"transformer\.h\.(\d+)\.attn\.q_proj\.output_experts\.weight",
        r"model.layers.\1.self_attn.experts.output.weight",
    ),
    (r"transformer\.h\.(\d+)\.mlpf\.experts\.weight", r"model.layers.\1.mlp.experts.up.weight"),
    (r"transformer\.h\.(\d+)\.mlpf\.output_experts\.weight", r"model.layers.\1.mlp.experts.down.weight"),
]
_MOLM_ROUTERS = {"attn.q_proj": "self_attn.experts", "mlpf": "mlp.experts"}
# of the router, by kind: their name, ours
_MOLM_GATES = {
    "mlp": {
        "w_gate.0.weight": "project.weight",
        "w_gate.0.bias": "project.bias",
        "w_gate.3.weight": "embeddings",
    },
    "linear": {"w_gate.0.weight": "embeddings"},
    "cosine": {"w_gate.weight": "project.weight", "expert_centroids": "embeddings", "temperature": "temperature"},
}


def molm_names(config: GrowlmConfig) -> Callable[[str], str | None]:
    """MoLM's name of a tensor -> ours; None for one that is not known, and "" for a buffer that is made anew."""
    gates = _MOLM_GATES[config.router]

    def ours(name: str) -> str | None:
        if re.fullmatch(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)", name):
            return ""
        for pattern, replacement in _MOLM:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        if found := re.fullmatch(r"transformer\.h\.(\d+)\.(attn\.q_proj|mlpf)\.gate\.(.+)", name):
            layer, part, tensor = found.groups()
            if tensor in gates:
                return f"model.layers.{layer}.{_MOLM_ROUTERS[part]}.router.{gates[tensor]}"
        return None

    return ours


def from_molm(tensors: Mapping[str, Tensor], config: GrowlmConfig, where: str) -> dict[str, Tensor]:
    """MoLM's tensors by our names.

    Raises:
        ConfigError: a tensor that the layout does not have.
    """
    ours = molm_names(config)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = ours(name)
        if new is None:
            raise ConfigError(f"{where}: tensor {name!r} is not one of the MoLM layout")
        if new and not (new == "lm_head.weight" and config.tie_word_embeddings):
            renamed[new] = tensor
    return renamed


def to_molm(tensors: Mapping[str, Tensor], config: GrowlmConfig, where: str) -> dict[str, Tensor]:
    """Our tensors by MoLM's names."""
    renamed = {molm_name(name, config, where): tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        renamed["lm_head.weight"] = renamed["transformer.wte.weight"].clone()
    return renamed


def molm_name(name: str, config: GrowlmConfig, where: str) -> str:
    """MoLM's name of a tensor of ours.

    Raises:
        ConfigError: the layout has no such tensor.
    """
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(self_attn\.experts|mlp\.experts)\.router\.(.+)", name):
        layer, part, rest = found.groups()
        parts = {new: old for old, new in _MOLM_ROUTERS.items()}
        gates = {new: old for old, new in _MOLM_GATES[config.router].items()}
        return f"transformer.h.{layer}.{parts[part]}.gate.{gates[rest]}"
    return _theirs(name, where)


_PLAIN = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.experts.query": "attn.q_proj.experts",
    "self_attn.experts.output": "attn.q_proj.output_experts",
    "mlp.experts.up": "mlpf.experts",
    "mlp.experts.down": "mlpf.output_experts",
}


def _theirs(name: str, where: str) -> str:
    whole = {"model.embed_tokens.weight": "transformer.wte.weight", "lm_head.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    if name.startswith("model.norm."):
        return name.replace("model.norm.", "transformer.ln_f.")
    if (found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)) and found[2] in _PLAIN:
        return f"transformer.h.{found[1]}.{_PLAIN[found[2]]}.{found[3]}"
    raise ConfigError(f"{where}: tensor {name!r} has no place in the MoLM layout")


def jetmoe_config(source: Mapping[str, Any], where: str) -> GrowlmConfig:
    """Our config of a JetMoE config.json.

    Raises:
        ConfigError: a setting that is missing, or that ours cannot express.
    """
    _require_zero(source, ["attention_dropout"], where)
    try:
        rope = source.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": source.get("rope_theta", 10_000.0),
        }
        return GrowlmConfig(
            vocab_size=source["vocab_size"],
            hidden_size=source["hidden_size"],
            num_hidden_layers=source["num_hidden_layers"],
            attention="softmax",
            feed_forward="experts",
            num_attention_heads=source["num_key_value_heads"],
            head_dim=source["kv_channels"],
            num_attention_experts=source["num_local_experts"],
            attention_experts_per_tok=source["num_experts_per_tok"],
            intermediate_size=source["intermediate_size"],
            num_experts=source["num_local_experts"],
            num_experts_per_tok=source["num_experts_per_tok"],
            router="linear",
            router_gates="renormalised",
            hidden_act=source.get("activation_function", "silu"),
            gated=True,
            key_value_bias=False,
            expert_bias=True,
            norm="rmsnorm",
            norm_eps=source.get("rms_norm_eps", 1e-6),
            rope_parameters=rope,
            max_position_embeddings=source.get("max_position_embeddings", 4096),
            auxiliary_loss="st_moe",
            auxiliary_loss_weight=source.get("aux_loss_coef", 0.01),
            initializer_range=source.get("initializer_range", 0.01),
            tie_word_embeddings=source.get("tie_word_embeddings", True),
            bos_token_id=source.get("bos_token_id"),
            eos_token_id=source.get("eos_token_id"),
            pad_token_id=source.get("pad_token_id"),
            architectures=["GrowlmForCausalLM"],
        )
    except KeyError as error:
        raise ConfigError(f"{where}: has no setting {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def from_jetmoe(tensors: Mapping[str, Tensor], config: GrowlmConfig, where: str) -> dict[str, Tensor]:
    """JetMoE's tensors by our names; its experts' weights are (experts, out, in), ours (experts, in, out).

    Raises:
        ConfigError: a tensor that the layout does not have.
    """
    renamed: dict[str, Tensor] = {}
    parts = {"self_attention.experts": "self_attn.experts", "mlp": "mlp.experts"}
    linears = {
        "self_attention.experts.input_linear": "self_attn.experts.query",
        "self_attention.experts.output_linear": "self_attn.experts.output",
        "mlp.input_linear": "mlp.experts.up",
        "mlp.output_linear": "mlp.experts.down",
    }
    for name, tensor in tensors.items():
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            renamed[name] = tensor
            continue
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                renamed[name] = tensor
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        rest = found[2] if found else ""
        to = f"model.layers.{found[1]}." if found else ""
        stem, _, leaf = rest.rpartition(".")
        if rest in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            renamed[to + rest] = tensor
        elif rest == "self_attention.kv_proj.weight":
            renamed[to + "self_attn.k_proj.weight"], renamed[to + "self_attn.v_proj.weight"] = (
                half.contiguous() for half in tensor.chunk(2)
            )
        elif stem in linears and leaf == "weight":
            renamed[f"{to}{linears[stem]}.weight"] = tensor.transpose(1, 2).contiguous()
        elif stem in parts and leaf == "bias":
            renamed[f"{to}{parts[stem]}.bias"] = tensor
        elif leaf == "weight" and stem.removesuffix(".router.layer") in parts:
            renamed[f"{to}{parts[stem.removesuffix('.router.layer')]}.router.embeddings"] = tensor
        else:
            raise ConfigError(f"{where}: tensor {name!r} is not one of the JetMoE layout")
    return renamed
