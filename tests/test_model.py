"""The from-scratch model as a transformers model: caches, padding, packing, history, checkpoints, Auto classes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import growlm
from growlm.base import Base
from growlm.base.cache import cache_of
from growlm.layers import PEER, ProductKeyMemory, ProductKeys, retrievals
from growlm.model import GrowlmConfig, GrowlmForCausalLM
from growlm.modules import ModuleSet
from growlm.modules.blocks import Blocks, BlocksConfig

PRESETS = Path(growlm.__file__).parent / "model" / "presets"
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "num_experts": 5, "router_size": 8, "eos_token_id": 0, "peer_num_experts": 30, "peer_num_heads": 3, "peer_top_k": 4,
}  # fmt: skip
KINDS = {
    "stickbreaking, dense": {"feed_forward": "dense"},
    "stickbreaking, experts": {"num_attention_experts": 4},
    "softmax, dense": {"attention": "softmax", "feed_forward": "dense", "num_key_value_heads": 1, "gated": True},
    "softmax, experts": {"attention": "softmax", "num_attention_experts": 3, "norm": "rmsnorm", "expert_bias": True},
    "mixed": {"attention": ["softmax", "stickbreaking", "softmax"], "feed_forward": ["dense", "experts", "dense"]},
    "softmax, peer": {"attention": "softmax", "feed_forward": ["dense", "peer", "experts"], "auxiliary_loss": "none"},
    "stickbreaking, memory and peer": {
        "feed_forward": ["memory", "peer", "peer"], "peer_num_experts": [20, 30, 42], "peer_neurons_per_expert": 2,
        "peer_gated": True, "peer_key_size": 8, "peer_query_norm": "layer", "peer_scores": "sigmoid",
    },
}  # fmt: skip
BATCH_NORM = {"feed_forward": ["dense", "peer", "memory"], "attention": "softmax"}


def make(kind: str = "stickbreaking, experts", **changes) -> GrowlmForCausalLM:
    torch.manual_seed(0)
    model = GrowlmForCausalLM(GrowlmConfig(**{**SIZES, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer) * 0.05)
    return model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> GrowlmForCausalLM:
    return make(request.param)


def ids(batch: int = 2, tokens: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def gradients(model: GrowlmForCausalLM) -> dict[str, torch.Tensor]:
    return {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}


def statistics(model: GrowlmForCausalLM) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


@torch.no_grad()
def test_cached_steps_equal_the_whole_pass(model: GrowlmForCausalLM) -> None:
    text = ids()
    whole = model(text).logits
    out = model(text[:, :7], use_cache=True)
    close(out.logits, whole[:, :7])
    for start, stop in ((7, 12), (12, 13), (13, 20)):  # several tokens at once, and one
        out = model(text[:, start:stop], cache=cache_of(out), use_cache=True)
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
    alone = model.generate(text[:1, 5:], max_new_tokens=6, do_sample=False)[0, 15:]  # may end before the other row
    assert torch.equal(written[0, 20 : 20 + len(alone)], alone)


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
    history = model.model.history(cache_of(first))
    assert history.get_seq_length() == 8
    assert all(not layer.keys.requires_grad for layer in history.layers)
    again = model(text[:, 12:], cache=history, use_cache=True).logits
    alone = model(text[:, 12:]).logits
    assert not torch.allclose(again, alone)
    model.train()
    history = model.model.history(cache_of(first), 4)
    model(text[:, 12:], cache=history, use_cache=True, labels=text[:, 12:]).loss.backward()
    # A model whose keys of the past had a gradient would have to keep the first segment's graph.
    assert model.model.embed_tokens.weight.grad is not None
    seen = model.model.embed_tokens.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert set(seen) == set(text[0, 12:].tolist())


def test_history_of_one_layer_equals_a_longer_text() -> None:
    model = make(num_hidden_layers=1, history_length=12)
    text = ids(1, 20)
    with torch.no_grad():
        history = model.model.history(cache_of(model(text[:, :12], use_cache=True)))
        close(model(text[:, 12:], cache=history, use_cache=True).logits, model(text).logits[:, 12:])


def test_a_cache_comes_under_either_name_but_not_under_both() -> None:
    model, text = make(), ids(1, 8)
    with torch.no_grad():
        caches = [cache_of(model(text[:, :5], use_cache=True)) for _ in range(2)]
        close(model(text[:, 5:], past_key_values=caches[0]).logits, model(text[:, 5:], cache=caches[1]).logits)
        with pytest.raises(ValueError, match="not both"):
            model(text[:, 5:], cache=caches[0], past_key_values=caches[1])


@pytest.mark.parametrize(("length", "word"), [(9, "a history of 9 tokens, expected 1 to history_length, 8"), (0, "0")])
def test_a_history_longer_than_allowed_is_refused(length: int, word: str) -> None:
    model = make(history_length=8)
    cache = cache_of(model(ids(1, 20), use_cache=True))
    with pytest.raises(ValueError, match=word):
        model.model.history(cache, length)


def test_history_with_rotary_positions_is_refused() -> None:
    model = make("mixed", history_length=8)
    cache = cache_of(model(ids(1, 20), use_cache=True))
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
    plain = gradients(model)
    model.zero_grad()
    # transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model(ids(), labels=ids()).loss.backward()
    checked = gradients(model)
    assert plain.keys() == checked.keys()
    for name in plain:
        close(plain[name], checked[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_model_computes_the_same(model: GrowlmForCausalLM) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(ids(), labels=ids())
    plain = model(ids(), labels=ids())
    close(out.logits, plain.logits)
    out.loss.backward()
    compiled_gradients = gradients(model)
    model.zero_grad()
    plain.loss.backward()
    for name, gradient in gradients(model).items():
        close(compiled_gradients[name], gradient)


# Product keys


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_batch_once_in_the_statistics(reentrant: bool) -> None:
    model = make(**BATCH_NORM).train()
    before = copy.deepcopy(model.state_dict())
    model(ids(), labels=ids()).loss.backward()
    plain = statistics(model)
    model.load_state_dict(before)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_(True)
    model(inputs_embeds=embedded, labels=ids()).loss.backward()
    assert statistics(model).keys() == plain.keys()
    for name, value in statistics(model).items():
        assert not torch.equal(value, before[name])
        assert torch.equal(value, plain[name])


def test_padding_counts_for_nothing_in_the_statistics_of_queries() -> None:
    """Nor in what other tokens get: in training a batch is normalised together."""
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    seen = []
    for padding in (1, 50):
        model = make(**BATCH_NORM).train()
        changed = text.clone()
        changed[0, :5] = padding
        logits = model(changed, attention_mask=mask).logits
        seen.append((logits[mask.bool()], statistics(model)))
    close(seen[0][0], seen[1][0])
    for name, value in seen[0][1].items():
        close(value, seen[1][1][name])
    unmasked = make(**BATCH_NORM).train()
    assert not torch.allclose(unmasked(text).logits[mask.bool()], seen[0][0])


def test_new_layers_are_initialised_as_they_say() -> None:
    config = GrowlmConfig(**{**SIZES, **BATCH_NORM, "hidden_size": 64, "peer_num_experts": 900})
    for model in (GrowlmForCausalLM(config), AutoModelForCausalLM.from_config(config)):
        peer, memory = model.model.layers[1].mlp, model.model.layers[2].mlp
        assert (type(peer), type(memory)) == (PEER, ProductKeyMemory)
        wanted = {"up": 64**-0.5, "down": 0.1 * (3 / 4 * 0.42) ** -0.5}
        for name, std in wanted.items():
            assert getattr(peer, name).std().item() == pytest.approx(std, rel=0.05)
        assert memory.values.std().item() == pytest.approx(0.1 * (3 / 4) ** -0.5, rel=0.05)
        assert peer.keys.query.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert peer.keys.keys_a.std().item() == pytest.approx(32**-0.5, rel=0.15)
        assert torch.equal(peer.keys.norm.weight, torch.ones(96))


def test_tables_of_a_loaded_model_are_those_that_were_saved(tmp_path: Path) -> None:
    model = make(**BATCH_NORM)
    model.train()(ids())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = model.state_dict()
    assert {"model.layers.1.mlp.up", "model.layers.2.mlp.keys.norm.running_mean"} <= saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[1].mlp.up.dtype == torch.bfloat16
    assert torch.isfinite(half(ids()).logits).all()


def test_active_parameters_are_queries_sub_keys_and_rows_read() -> None:
    dense, peer = (make(feed_forward=kind, num_hidden_layers=1) for kind in ("dense", "peer"))
    queries = 32 * 3 * 16 + 2 * 3 * 16
    rest = dense.num_active_parameters() - 2 * 32 * 24
    assert peer.num_active_parameters() - rest == queries + (5 + 6) * 8 + 12 * 2 * 32
    assert peer.num_parameters() - dense.num_parameters() == queries + (5 + 6) * 8 + 30 * 2 * 32 - 2 * 32 * 24
    few = make(feed_forward="memory", num_hidden_layers=1, peer_num_experts=6)  # fewer than 3 x 4
    assert few.num_active_parameters() - rest == queries + (2 + 3) * 8 + 6 * 32


def test_product_keys_have_no_routing_and_no_auxiliary_loss() -> None:
    model = make("stickbreaking, dense", feed_forward="peer", auxiliary_loss_weight=1.0).train()
    out = model(ids(), labels=ids(), output_routings=True)
    assert [r.feed_forward for r in out.routings] == [None] * 3
    assert out.auxiliary_loss.item() == 0
    with retrievals() as found:
        model(ids())
    assert [r.experts.shape for r in found] == [(40, 3, 4)] * 3
    assert sum(isinstance(m, ProductKeys) for m in model.modules()) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if "feed_forward" in v])
def test_a_store_runs_it_as_a_base(kind: str) -> None:
    """From layer to layer."""
    model = make(kind)
    base = Base(model)
    text = ids()
    visible = torch.ones_like(text, dtype=torch.bool)
    visible[0, :5] = False
    assert torch.equal(base.logits(text), model(text).logits)
    close(base.logits(text, visible=visible)[visible], model(text, attention_mask=visible).logits[visible])


@torch.no_grad()
def test_new_layers_above_it_change_nothing_yet() -> None:
    """They are copies of the last one."""
    base = Base(make(attention="softmax", feed_forward=["dense", "peer", "dense"]))
    blocks = Blocks.create(base, BlocksConfig(num_layers=2, vocabulary="none"))
    assert torch.equal(ModuleSet(base, [blocks]).logits(ids()), base.logits(ids()))


def test_peer_tiny_has_the_sizes_that_the_guide_says() -> None:
    config = AutoConfig.from_pretrained(PRESETS / "peer-tiny.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(38.6e6, rel=0.01)
    assert model.num_active_parameters() == pytest.approx(5.1e6, rel=0.01)
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["GrowlmMLP", "GrowlmMLP", "PEER", "GrowlmMLP"]


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


def masks_by_query(text: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every query sees, (b, 1, t, s), of a mask (b, s): as truth, and to be added to scores."""
    t = text.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return {"bool": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, -1e9)}


@pytest.mark.parametrize("dtype", ["bool", "float"])
def test_a_mask_for_each_query_says_what_is_padding(dtype: str) -> None:
    text = ids()
    mask = torch.ones_like(text)
    mask[0, :5] = 0
    by_query = masks_by_query(text, mask)[dtype]
    plain = make().train()(text, attention_mask=mask, labels=text)
    found = make().train()(text, attention_mask=by_query, labels=text)
    close(found.auxiliary_loss, plain.auxiliary_loss)
    close(found.loss, plain.loss)
    unmasked = make().train()(text, attention_mask=torch.ones_like(by_query).tril().bool(), labels=text)
    assert not torch.allclose(unmasked.auxiliary_loss, plain.auxiliary_loss)
    # Of a batch's statistics too.
    changes = {**BATCH_NORM, "attention": "stickbreaking"}
    models = [make(**changes).train() for _ in range(2)]
    for model, given in zip(models, (mask, by_query), strict=True):
        model(text, attention_mask=given)
    for name, value in statistics(models[0]).items():
        close(value, statistics(models[1])[name])


def test_a_mask_for_each_query_with_a_past() -> None:
    text = ids()
    mask = torch.ones_like(text)
    mask[0, 5:8] = 0
    losses = []
    for given in (mask, masks_by_query(text, mask)["bool"][:, :, 5:]):
        model = make().train()
        past = cache_of(model(text[:, :5], use_cache=True))
        losses.append(model(text[:, 5:], attention_mask=given, cache=past, labels=text[:, 5:]).loss)
    close(*losses)


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (torch.ones(2, 20, 20), "attention_mask has 3 dimensions, expected 2 or 4"),
        (torch.ones(2, 2, 20, 20), r"shape \(2, 2, 20, 20\), expected \(b, 1, 20, 20\)"),
        (torch.ones(2, 1, 20, 19), r"shape \(2, 1, 20, 19\), expected"),
        (torch.ones(2, 1, 20, 20, dtype=torch.long), "torch.int64 for each query, expected bool"),
        (torch.ones(2, 19), "covers 19 tokens, expected 20"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()(ids(), attention_mask=mask)


@pytest.mark.parametrize("kind", ["stickbreaking, experts", "softmax, experts"])
def test_documents_that_do_not_fit_are_refused(kind: str) -> None:
    model, text = make(kind), ids()
    for documents in (torch.zeros_like(text[:1]), torch.zeros_like(text[:, 1:])):
        with pytest.raises(ValueError, match="documents of shape"):
            model(text, document_ids=documents)
    past = cache_of(model(text[:, :12], use_cache=True))
    with pytest.raises(ValueError, match=r"documents of shape \(2, 1\), expected \(2, 13\)"):
        model(text[:, 12:13], cache=past, document_ids=torch.zeros(2, 1, dtype=torch.long))


def test_what_is_not_known_is_refused() -> None:
    model = make()
    for part in (model, model.model):
        with pytest.raises(TypeError, match="argument 'documents' that growlm models do not have"):
            part(ids(), documents=torch.zeros(2, 20))
        with pytest.raises(TypeError, match="'cu_seq_lens_q'"):  # transformers' way to keep documents apart
            part(ids(), cu_seq_lens_q=torch.tensor([0, 40]))
        with pytest.raises(ValueError, match="output_attentions is True; growlm models do not return it"):
            part(ids(), output_attentions=True)
        with pytest.raises(ValueError, match="ask for output_routings"):
            part(ids(), output_router_logits=True)


def test_what_transformers_hands_to_every_model_is_taken() -> None:
    model, text = make(), ids()
    idle = {"token_type_ids": torch.zeros_like(text), "cache_position": torch.arange(20), "output_attentions": False}
    whole = model(text, labels=text)
    assert torch.equal(model(text, labels=text, **idle).logits, whole.logits)
    close(model(text, labels=text, num_items_in_batch=19).loss, whole.loss * 2)  # of 38 predictions
    assert isinstance(model.config.keys_to_ignore_at_inference, list)
    loss, logits, *_ = model(text, labels=text, return_dict=False)
    assert torch.equal(logits, whole.logits)
    close(loss, whole.loss)
    assert torch.equal(model.model(text, return_dict=False)[0], model.model(text).last_hidden_state)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        assert model.generate(text[:1], max_new_tokens=3, **options).shape[1] > 20


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


@pytest.mark.slow
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
        "import growlm; from transformers import LlamaForCausalLM as L, AutoConfig as A; "
        "print(type(A.for_model('growlm')).__name__)",
        "import growlm, transformers.modeling_layers; from growlm.model import GrowlmConfig as C; "
        "print(type(C()).__name__)",
        "import growlm.base.parts, growlm.model.decoder as d; print(d.GrowlmConfig.__name__)",
    ],
)
def test_auto_classes_find_it_after_import(program: str) -> None:
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "GrowlmConfig"


def test_importing_the_package_imports_nothing_large() -> None:
    program = "import growlm, sys; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_experts_per_tok": 6}, "layer 0: a token uses 6 experts, expected 1 to num_experts, 5"),
        ({"attention": "linear"}, "attention is 'linear', expected stickbreaking or softmax"),
        ({"feed_forward": ["dense"]}, "feed_forward lists 1 layers, expected 3"),
        ({"auxiliary_loss": "l2"}, "auxiliary_loss is 'l2'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"num_key_value_heads": 4, "num_attention_heads": 2}, "2 heads cannot share 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number, at least 1"),
        ({"shared_key_value": False}, "head_dim is 32, not 16"),
        ({"shared_key_value": False, "head_dim": 32}, "num_key_value_heads is 1, not 2"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number, at least 1"),
        ({"hidden_size": "x"}, "hidden_size is 'x', expected a whole number"),
        ({"hidden_size": 33}, "hidden_size is 33, expected a multiple of num_attention_heads, 2; or give head_dim"),
        ({"head_dim": 15, "attention": "softmax"}, "head_dim is 15, expected an even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"vocab_size": 9.5}, "vocab_size is 9.5"),
        ({"history_length": -4}, "history_length is -4, expected a whole number, at least 0"),
        ({"router": "tree"}, "router is 'tree', expected mlp, linear or cosine"),
        ({"router_gates": "hard"}, "router_gates is 'hard', expected probabilities or renormalised"),
        ({"router_size": 0}, "router_size is 0"),
        ({"router_dropout": 1.5}, "router_dropout is 1.5, expected 0 to below 1"),
        ({"dropout": "much"}, "dropout is 'much'"),
        ({"norm_eps": None}, "norm_eps is None, expected a number"),
        ({"num_sampled_experts": 3}, "num_sampled_experts is 3, expected 0 to those that a token uses, 2"),
        ({"hidden_act": "foo"}, "hidden_act is 'foo'"),
        ({"num_experts": [5, 5]}, "num_experts lists 2 layers, expected 3"),
        ({"num_experts": [5, 5, "x"]}, "num_experts is 'x'"),
        ({"num_attention_experts": [2, 2]}, "num_attention_experts lists 2 layers, expected 3"),
        ({"num_attention_experts": -1}, "num_attention_experts is -1"),
        ({"feed_forward": "peer", "peer_key_size": "x"}, "peer_key_size is 'x'"),
        ({"feed_forward": "peer", "peer_top_k": 31}, "layer 0: peer_top_k is 31, expected 1 to .* 30"),
        ({"feed_forward": ["dense", "memory", "dense"], "peer_num_heads": 0}, "layer 1: peer_num_heads is 0"),
        ({"feed_forward": "peer", "peer_num_experts": 10_007}, "peer_num_experts is 10007, .*; use 10005 or 10008$"),
        ({"feed_forward": "peer", "peer_num_experts": [30]}, "peer_num_experts lists 1 layers, expected 3"),
        ({"feed_forward": "peer", "peer_key_size": 9}, "peer_key_size is 9, expected an even number"),
        ({"feed_forward": "memory", "peer_query_norm": "rms"}, "peer_query_norm 'rms' is not one of batch"),
        ({"feed_forward": "peer", "peer_scores": "relu"}, "peer_scores 'relu' is not one of"),
        ({"feed_forward": "peer", "peer_neurons_per_expert": 0}, "peer_neurons_per_expert is 0"),
        ({"feed_forward": "peer", "peer_query_dropout": 1.0}, "peer_query_dropout is 1.0"),
        ({"feed_forward": "peer", "peer_gated": "no"}, "peer_gated is 'no', expected true or false"),
        ({"feed_forward": "memory", "peer_gated": True}, "are for layers with peer, and there is none"),
        ({"feed_forward": "memory", "peer_neurons_per_expert": 3}, "are for layers with peer, and there is none"),
        ({"gated": 1}, "gated is 1, expected true or false"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GrowlmConfig(**{**SIZES, **changes})


def test_a_width_of_heads_that_is_given_need_not_divide_the_models() -> None:
    assert make(hidden_size=33, head_dim=8)(ids()).logits.shape == (2, 20, 97)


@pytest.mark.parametrize("kind", ["mixed", "stickbreaking, memory and peer"])
def test_config_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    config = GrowlmConfig(**{**SIZES, **KINDS[kind], "num_experts": [0, 5, 0]})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded._name_or_path = ""
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "growlm"


@pytest.mark.parametrize("kind", ["stickbreaking, experts", "softmax, dense", "mixed"])
def test_a_cache_of_fixed_size_answers_as_one_that_grows(kind: str) -> None:
    model = make(kind)
    options = {"max_new_tokens": 8, "do_sample": False}
    padded = ids(2, 6)
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    for given in ({}, {"attention_mask": mask}):
        grown = model.generate(padded, **given, **options)
        fixed = model.generate(padded, **given, **options, cache_implementation="static")
        assert torch.equal(fixed, grown)
