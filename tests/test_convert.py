"""Published checkpoints: what they compute, read and written back; JetMoE against transformers' own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM

from growlm.base.cache import cache_of
from growlm.errors import BaseModelError, ConfigError, StoreError
from growlm.model import GrowlmConfig, GrowlmForCausalLM, convert
from growlm.surgery.conversion import convert_checkpoint

GOLDEN = Path(__file__).with_name("golden")
NAMES = ["molm-k2", "molm-heads", "molm-linear-gate"]


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-4) -> bool:
    return float((got - want).detach().abs().max()) <= bound * float(want.detach().abs().max())


def load(golden: Path, tmp_path: Path):
    return AutoModelForCausalLM.from_pretrained(convert_checkpoint(golden, tmp_path / "ours")[0])


def test_molm_computes_what_the_reference_does(golden: Path, tmp_path: Path) -> None:
    model, expected = load(golden, tmp_path).train(), load_file(golden / "expected.safetensors")
    ids = expected["input_ids"]
    out = model(ids, labels=ids, output_hidden_states=True)
    assert close(out.logits, expected["logits"])
    assert close(out.hidden_states[-1], expected["hidden_last"])
    assert close(out.loss, expected["loss"])
    weight = model.config.auxiliary_loss_weight
    assert close(out.auxiliary_loss / weight, expected["aux_loss"])
    out.loss.backward()
    grads = convert.to_molm({n: p.grad for n, p in model.named_parameters()}, model.config, "here")
    checked = [name for name in expected if name.startswith("grad.")]
    assert len(checked) == 4
    for name in checked:
        assert close(grads[name.removeprefix("grad.")], expected[name]), name


@torch.no_grad()
def test_molm_decodes_what_the_reference_does(golden: Path, tmp_path: Path) -> None:
    model, expected = load(golden, tmp_path), load_file(golden / "expected.safetensors")
    ids = expected["input_ids"]
    start = ids.shape[1] - 8
    out = model(ids[:, :start], use_cache=True)
    steps = []
    for at in range(start, ids.shape[1]):
        out = model(ids[:, at : at + 1], cache=cache_of(out), use_cache=True)
        steps.append(out.logits[:, 0])
    assert close(torch.stack(steps, 1), expected["cached_step_logits"])
    greedy = model.generate(ids[:1, :16], max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, expected["greedy"])


def test_molm_comes_back_as_it_was(golden: Path, tmp_path: Path) -> None:
    back = convert_checkpoint(convert_checkpoint(golden, tmp_path / "ours")[0], tmp_path / "back")[0]
    before, after = load_file(golden / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = json.loads((golden / "config.json").read_text())
    written = json.loads((back / "config.json").read_text())
    assert all(settings[k] == written[k] for k in written if k in settings)
    assert written["model_type"] == "moduleformer"


@torch.no_grad()
def test_jetmoe_computes_what_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = JetMoeConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8,
        intermediate_size=24, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2,
        pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = JetMoeForCausalLM(config).eval()
    for p in model.parameters():
        p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "jetmoe")
    ours = AutoModelForCausalLM.from_pretrained(convert_checkpoint(tmp_path / "jetmoe", tmp_path / "ours")[0])
    ids = torch.randint(0, 101, (2, 20))
    assert close(ours(ids).logits, model(ids).logits)
    padded = torch.ones_like(ids)
    padded[0, :6] = 0
    # Positions count what is visible; transformers' own model counts padding too where it is not told.
    positions = (padded.cumsum(-1) - 1).clamp(min=0)
    theirs = model(ids, attention_mask=padded, position_ids=positions).logits
    assert close(ours(ids, attention_mask=padded).logits[0, 6:], theirs[0, 6:])
    wanted = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(ids[:1, :8], max_new_tokens=8, do_sample=False), wanted)


# Bad input


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(GOLDEN / "molm-k2", folder)
    (folder / "expected.safetensors").unlink()
    return folder


def edit(folder: Path, **changes) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(copy: Path, tmp_path: Path) -> None:
    edit(copy, **{"transformer.h.1.mlpf.experts.weight": None})
    with pytest.raises(BaseModelError, match=r"missing: transformer\.h\.1\.mlpf\.experts\.weight"):
        convert_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_too_many_is_named(copy: Path, tmp_path: Path) -> None:
    edit(copy, **{"transformer.h.1.mlpf.bias": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlpf\.bias"):
        convert_checkpoint(copy, tmp_path / "out")
    edit(copy, **{"transformer.h.1.mlpf.bias": None, "transformer.h.7.ln_1.weight": torch.zeros(32)})
    with pytest.raises(BaseModelError, match=r"unexpected: transformer\.h\.7\.ln_1\.weight"):
        convert_checkpoint(copy, tmp_path / "out")


def test_a_shape_that_differs_is_named(copy: Path, tmp_path: Path) -> None:
    edit(copy, **{"transformer.ln_f.bias": torch.zeros(31)})
    with pytest.raises(BaseModelError, match=r"transformer\.ln_f\.bias has shape \(31,\), its config says \(32,\)"):
        convert_checkpoint(copy, tmp_path / "out")


def test_an_unknown_layout_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(BaseModelError, match="model type 'mamba'; known layouts are"):
        convert_checkpoint(copy, tmp_path / "out")


def test_a_missing_setting_is_named(copy: Path, tmp_path: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "k_mlp"}))
    with pytest.raises(ConfigError, match="no setting 'k_mlp'"):
        convert_checkpoint(copy, tmp_path / "out")


def test_more_experts_chosen_than_there_are(copy: Path, tmp_path: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"k_mlp": 7}))
    with pytest.raises(ConfigError, match="uses 7 experts, expected 1 to num_experts, 6"):
        convert_checkpoint(copy, tmp_path / "out")


def test_what_the_molm_layout_cannot_hold_is_refused(copy: Path, tmp_path: Path) -> None:
    ours, *kinds = convert_checkpoint(copy, tmp_path / "ours")
    assert kinds == ["moduleformer", "growlm"]
    settings = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(settings | {"attention": "softmax"}))
    with pytest.raises(ConfigError, match="attention is 'softmax'; the MoLM layout holds 'stickbreaking' only"):
        convert_checkpoint(ours, tmp_path / "out")
    GrowlmForCausalLM(
        GrowlmConfig(hidden_size=16, num_attention_heads=2, feed_forward="peer", peer_num_experts=36)
    ).save_pretrained(tmp_path / "peer")
    with pytest.raises(ConfigError, match="feed_forward is 'peer'; the MoLM layout holds 'experts' only"):
        convert_checkpoint(tmp_path / "peer", tmp_path / "out")


def test_an_existing_folder_is_left_alone(copy: Path) -> None:
    with pytest.raises(StoreError, match="exists already"):
        convert_checkpoint(copy, copy)
    assert (copy / "model.safetensors").exists()


def set_up(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_head": 0}, "n_head is 0, expected a whole number, at least 1"),
        ({"n_head": 5}, "att_hidden is 24, expected a multiple of n_head, 5"),
        ({"att_hidden": None}, "att_hidden is None, expected a whole number"),
        ({"n_embd": "x"}, "hidden_size is 'x', expected a whole number, at least 1; hidden_size is their n_embd$"),
        ({"n_layer": None}, "num_hidden_layers is None, .*; num_hidden_layers is their n_layer$"),
        ({"activation_function": "foo"}, "hidden_act is 'foo', .*; hidden_act is their activation_function$"),
        ({"layer_norm_epsilon": "small"}, "norm_eps is 'small'"),
        ({"gate_type": "top"}, "gate_type is 'top', expected mlp or linear or gmm"),
        ({"aux_loss_type": ["mi"]}, r"aux_loss_type is \['mi'\], expected mi or"),
        ({"attn_pdrop": 0.1}, "attn_pdrop is 0.1, which ours has no place for"),
        ({"embd_pdrop": 0.1}, "embd_pdrop is 0.1, which ours has no place for"),
        ({"sample_topk": 3}, "num_sampled_experts is 3, expected 0 to those that a token uses, 2"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named(changes: dict, word: str, copy: Path, tmp_path: Path) -> None:
    set_up(copy, **changes)
    with pytest.raises(ConfigError, match=word):
        convert_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_setting_of_ours_that_cannot_be_is_named(copy: Path, tmp_path: Path) -> None:
    ours, *_ = convert_checkpoint(copy, tmp_path / "ours")
    set_up(ours, num_attention_heads=0)
    with pytest.raises(ConfigError, match="num_attention_heads is 0, expected a whole number"):
        convert_checkpoint(ours, tmp_path / "out")


def test_jetmoes_dropout_of_attention_is_refused(tmp_path: Path) -> None:
    JetMoeConfig(attention_dropout=0.1).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"attention_dropout is 0\.1, which ours has no place for"):
        convert.jetmoe_config(settings, "here")
    assert convert.jetmoe_config(settings | {"attention_dropout": 0.0}, "here").num_hidden_layers == 12


@torch.no_grad()
def test_the_norms_epsilon_goes_both_ways(copy: Path, tmp_path: Path) -> None:
    set_up(copy, layer_norm_epsilon=1e-2)
    ours, *_ = convert_checkpoint(copy, tmp_path / "ours")
    back, *_ = convert_checkpoint(ours, tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(ours)
    assert model.config.norm_eps == model.model.layers[0].input_layernorm.eps == 1e-2
    assert json.loads((back / "config.json").read_text())["layer_norm_epsilon"] == 1e-2


def test_no_auxiliary_loss_stays_none() -> None:
    for loss, weight in (("none", 0.5), ("mutual_information", 0.5), ("st_moe", 0.5), ("st_moe", 0.0)):
        ours = GrowlmConfig(auxiliary_loss=loss, auxiliary_loss_weight=weight, num_attention_experts=4)
        back = convert.molm_config(convert.to_molm_config(ours, "here"), "there")
        assert back.auxiliary_loss == loss
        assert back.auxiliary_loss_weight == (0.0 if loss == "none" else weight)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"auxiliary_loss": "load_concentration"}, "'load_concentration'; the MoLM layout holds .*none only"),
        ({"auxiliary_loss": "st_moe", "router_z_weight": 0.3}, "router_z_weight is 0.3; the MoLM layout holds 0.1"),
        ({"num_attention_heads": 1}, "one head as wide as the model, 256, and projections"),
    ],
    ids=str,
)
def test_what_could_not_be_read_back_is_not_written(changes: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        convert.to_molm_config(GrowlmConfig(num_attention_experts=4, **changes), "here")


def test_one_head_that_reads_its_input_itself_goes_both_ways() -> None:
    ours = GrowlmConfig(num_attention_heads=1, num_attention_experts=4, shared_key_value=False)
    assert convert.molm_config(convert.to_molm_config(ours, "here"), "there").shared_key_value is False
