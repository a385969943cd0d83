"""The from-scratch model as a transformers model: caches, padding, packing, history, checkpoints, Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import growlm
from growlm.model import GrowlmConfig, GrowlmForCausalLM

PRESETS = Path(growlm.__file__).parent / "model" / "presets"
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "num_experts": 5, "router_size": 8, "eos_token_id": 0,
}  # fmt: skip
KINDS = {
    "stickbreaking, dense": {"feed_forward": "dense"},
    "stickbreaking, experts": {"num_attention_experts": 4},
    "softmax, dense": {"attention": "softmax", "feed_forward": "dense", "num_key_value_heads": 1, "gated": True},
    "softmax, experts": {"attention": "softmax", "num_attention_experts": 3, "norm": "rmsnorm", "expert_bias": True},
    "mixed": {"attention": ["softmax", "stickbreaking", "softmax"], "feed_forward": ["dense", "experts", "dense"]},
}


def make(kind: str = "stickbreaking, experts", **changes) -> GrowlmForCausalLM:
    torch.manual_seed(0)
    model = GrowlmForCausalLM(GrowlmConfig(**{**SIZES, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> GrowlmForCausalLM:
    return make(request.param)


def ids(batch: int = 2, tokens: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cached_steps_equal_the_whole_pass(model: GrowlmForCausalLM) -> None:
    text = ids()
    whole = model(text).logits
    out = model(text[:, :7], use_cache=True)
    close(out.logits, whole[:, :7])
    for start, stop in ((7, 12), (12, 13), (13, 20)):  # several tokens at once, and one
        out = model(text[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
        close(out.logits, whole[:, start:stop])


def test_generate_with_and_without_cache(model: GrowlmForCausalLM) -> None:
    text = ids(1, 6)
    with_cache = model.generate(text, max_new_tokens=12, do_sample=False)
    assert torch.equal(with_cache, model.generate(text, max_new_tokens=12, do_sample=False, use_cache=False))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: GrowlmForCausalLM) -> None:
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    padded = model(text, attention_mask=mask).logits
    close(padded[0, 5:], model(text[:1, 5:]).logits[0])
    close(padded[1], model(text[1:]).logits[0])
    written = model.generate(text, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model.generate(text[:1, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(written[0, 20:], alone[0, 15:][: written.shape[1] - 20])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model: GrowlmForCausalLM) -> None:
    text = ids(1, 20)
    documents = (torch.arange(20) >= 8).long()[None]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(text, document_ids=documents, position_ids=positions).logits
    close(packed[:, 8:], model(text[:, 8:]).logits)
    close(packed[:, :8], model(text[:, :8]).logits)


def test_history_is_read_without_gradient() -> None:
    model = make(history_length=8)
    text = ids(1, 20)
    first = model(text[:, :12], use_cache=True)
    history = model.model.history(first.past_key_values)
    assert history.get_seq_length() == 8
    assert all(not layer.keys.requires_grad for layer in history.layers)
    again = model(text[:, 12:], past_key_values=history, use_cache=True).logits
    alone = model(text[:, 12:]).logits
    assert not torch.allclose(again, alone)
    model.train()
    history = model.model.history(first.past_key_values, 4)
    model(text[:, 12:], past_key_values=history, use_cache=True, labels=text[:, 12:]).loss.backward()
    # A model whose keys of the past had a gradient would have to keep the first segment's graph.
    assert model.model.embed_tokens.weight.grad is not None
    seen = model.model.embed_tokens.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert set(seen) == set(text[0, 12:].tolist())


def test_history_of_one_layer_equals_a_longer_text() -> None:
    model = make(num_hidden_layers=1, history_length=12)
    text = ids(1, 20)
    with torch.no_grad():
        history = model.model.history(model(text[:, :12], use_cache=True).past_key_values)
        close(model(text[:, 12:], past_key_values=history, use_cache=True).logits, model(text).logits[:, 12:])


@pytest.mark.parametrize(("length", "word"), [(9, "a history of 9 tokens, expected 1 to history_length, 8"), (0, "0")])
def test_a_history_longer_than_allowed_is_refused(length: int, word: str) -> None:
    model = make(history_length=8)
    cache = model(ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=word):
        model.model.history(cache, length)


def test_history_with_rotary_positions_is_refused() -> None:
    model = make("mixed", history_length=8)
    cache = model(ids(1, 20), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="stick-breaking attention in all layers"):
        model.model.history(cache)


@torch.no_grad()
def test_a_longer_text_than_trained_on_runs() -> None:
    model = make(sequence_length=512)
    long = ids(1, 4096)
    logits = model(long).logits
    assert torch.isfinite(logits).all()
    close(logits[:, :512], model(long[:, :512]).logits)


def test_save_and_load(model: GrowlmForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GrowlmForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_gradient_checkpointing_changes_no_gradient(model: GrowlmForCausalLM) -> None:
    model.train()
    model(ids(), labels=ids()).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(ids(), labels=ids()).loss.backward()
    checked = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == checked.keys()
    for name in plain:
        close(plain[name], checked[name])


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_computes_the_same(model: GrowlmForCausalLM) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(ids(), labels=ids())
    plain = model(ids(), labels=ids())
    close(out.logits, plain.logits)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain.loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad)


def test_auxiliary_loss_is_added_in_training_only() -> None:
    model = make(auxiliary_loss_weight=1.0)
    quiet = model(ids(), labels=ids())
    assert quiet.auxiliary_loss is None
    model.train()
    trained = model(ids(), labels=ids())
    close(trained.loss - trained.auxiliary_loss, quiet.loss)
    assert model.train()(ids()).loss is None


@pytest.mark.parametrize("loss", ["mutual_information", "load_concentration", "st_moe"])
def test_auxiliary_loss_leaves_padding_out(loss: str) -> None:
    model = make(auxiliary_loss=loss).train()
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    before = model(text, attention_mask=mask, labels=text).auxiliary_loss
    changed = text.clone()
    changed[0, :5] = 50
    close(before, model(changed, attention_mask=mask, labels=text).auxiliary_loss)
    assert not torch.allclose(before, model(text, labels=text).auxiliary_loss)


def test_routings_are_returned_and_kept_nowhere() -> None:
    model = make()
    assert model(ids()).routings is None
    routings = model(ids(), output_routings=True).routings
    assert [r.attention.experts.shape for r in routings] == [(40, 2)] * 3
    assert [r.feed_forward.logits.shape for r in routings] == [(40, 5)] * 3
    assert not any(isinstance(v, torch.Tensor) for m in model.modules() for v in vars(m).values())


def test_sizes_are_those_of_table_1() -> None:
    table = {"molm-4b-k2": (4e9, 350e6), "molm-4b-k4": (4e9, 700e6), "molm-8b-k2": (8e9, 700e6)}
    for name, (total, active) in table.items():
        config = AutoConfig.from_pretrained(PRESETS / f"{name}.json")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == pytest.approx(total, rel=0.05)
        assert model.num_active_parameters() == pytest.approx(active, rel=0.06)


def test_every_preset_is_known_to_pretrain() -> None:
    from growlm.training.config import PRESETS as KNOWN

    assert {p.stem for p in PRESETS.glob("*.json")} <= set(KNOWN)


@pytest.mark.parametrize(
    "program",
    [
        "import growlm; from transformers import AutoConfig; print(type(AutoConfig.for_model('growlm')).__name__)",
        "import transformers.models.auto.modeling_auto, growlm; from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('growlm')).__name__)",
        "import growlm.model.modeling; from transformers import AutoModelForCausalLM as A, AutoConfig; "
        "print(type(A.from_config(AutoConfig.for_model('growlm', num_hidden_layers=1)).config).__name__)",
        "import growlm.model; growlm.model.GrowlmForCausalLM; from transformers import AutoModel as A, AutoConfig; "
        "print(type(A.from_config(AutoConfig.for_model('growlm', num_hidden_layers=1)).config).__name__)",
        "import growlm, sys; print('GrowlmConfig' if not {'torch', 'transformers'} & set(sys.modules) else 'heavy')",
    ],
)
def test_auto_classes_find_it_after_import(program: str) -> None:
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "GrowlmConfig"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_experts_per_tok": 6}, "layer 0: a token uses 6 experts, expected 1 to num_experts, 5"),
        ({"attention": "linear"}, "attention is 'linear', expected stickbreaking or softmax"),
        ({"feed_forward": ["dense"]}, "feed_forward lists 1 layers, expected 3"),
        ({"auxiliary_loss": "l2"}, "auxiliary_loss is 'l2'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"num_key_value_heads": 4, "num_attention_heads": 2}, "2 heads cannot share 4"),
        ({"shared_key_value": False}, "head_dim is 32, not 16"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(Exception, match=word):
        GrowlmConfig(**{**SIZES, **changes})


def test_config_comes_back_as_it_was(tmp_path: Path) -> None:
    config = GrowlmConfig(**{**SIZES, **KINDS["mixed"], "num_experts": [0, 5, 0]})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded._name_or_path = ""
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "growlm"
