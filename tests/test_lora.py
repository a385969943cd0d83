"""Modules of kind lora: what PEFT computes, and adapters that come and go in its format."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from growlm import Engine, LearnConfig, Store, evaluate, export, import_adapter, learn
from growlm.cli import main
from growlm.errors import BaseModelError, ConfigError, GrowlmError, IntegrityError, NotBetterError, StoreError
from growlm.modules import ModuleSet
from growlm.modules.lora import Lora
from growlm.modules.shapes import LoraConfig as LoraShape
from growlm.surgery.peft import read_adapter, write_adapter
from growlm.training.optim import make_optimizer
from stores import add_experts, make_store, store_with_texts, with_texts
from tiny import FAMILIES, make_base, make_model, perturb, random_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]

# As PEFT's users write them, by family: names, layers, patterns.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32}),
    "upper layers": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]}),
    "rank-stabilised": ("llama", {"target_modules": ["o_proj", "up_proj"], "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True}),
    "DoRA, transposed": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": "all-linear"}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "another name for layers": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "ranks by name": ("gemma2", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5}}),
    "ranks by layer": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 6, "layers.0.self_attn.q_proj": 1},
            "alpha_pattern": {r".*\.2\.self_attn\.q_proj": 3},
        },
    ),
    "some of a name": ("llama", {"target_modules": r".*\.(0\.self_attn\.q_proj|2\.mlp\.up_proj)"}),
}


def trained(family: str, settings: dict[str, Any], folder: Path) -> torch.Tensor:
    """An adapter as PEFT saves it; the logits of base and adapter on `random_ids(2, 20)`."""
    model = make_model(family)
    made = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        wanted = made(random_ids(2, 20)).logits
    made.save_pretrained(folder)
    return wanted


@pytest.mark.parametrize(("family", "settings"), ADAPTERS.values(), ids=ADAPTERS)
@torch.no_grad()
def test_an_adapter_of_pefts_computes_what_peft_computes_and_goes_back_as_it_came(family, settings, tmp_path):
    wanted = trained(family, settings, tmp_path / "theirs")
    base = make_base(family)
    plain = base.logits(random_ids(2, 20))
    module = read_adapter(tmp_path / "theirs", base)
    found = ModuleSet(base, [module]).logits(random_ids(2, 20))
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

    (tmp_path / "ours").mkdir()
    write_adapter(module, base, tmp_path / "ours", called="tiny")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    back = peft.PeftModel.from_pretrained(make_model(family), tmp_path / "ours")
    torch.testing.assert_close(back(random_ids(2, 20)).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_was_learned_here_is_an_adapter_for_peft(family, tmp_path):
    base = make_base(family)
    config = LoraShape(r=3, lora_alpha=5.0, layers=(1, 2), rank_pattern={"v_proj": 2})
    module = perturb(Lora.create(base, config), 3)
    wanted = ModuleSet(base, [module]).logits(random_ids(2, 20))
    write_adapter(module, base, tmp_path, called="tiny")
    model = peft.PeftModel.from_pretrained(make_model(family), tmp_path)
    torch.testing.assert_close(model(random_ids(2, 20)).logits, wanted, atol=1e-5, rtol=1e-5)
    again = read_adapter(tmp_path, base)
    assert torch.equal(ModuleSet(base, [again]).logits(random_ids(2, 20)), wanted)


# Adapters that are refused


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    trained("llama", {"target_modules": ["q_proj", "v_proj"]}, tmp_path / "adapter")
    return tmp_path / "adapter"


def setting(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(folder: Path, pattern: str, by: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({re.sub(pattern, by, key): tensor for key, tensor in load_file(path).items()}, path)


def refused(folder: Path, kind: type[GrowlmError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        read_adapter(folder, make_base())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("times", [2, 3])
def test_a_prefix_that_was_written_twice_is_read_once(adapter, times):
    wanted = read_adapter(adapter, make_base())
    rename(adapter, r"^base_model\.model\.", "base_model.model." * times)
    found = read_adapter(adapter, make_base())
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_16"}, "takes a part of the base away.*path_initial_model_for_weight_conv"),
        ({"init_lora_weights": "olora"}, "takes a part of the base away"),
        ({"init_lora_weights": "loftq"}, "takes a part of the base away"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save are lm_head, embed_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"use_something_new": True}, "use_something_new is True, which modules of kind lora do not do"),
    ],
)
def test_what_modules_do_not_do_is_an_error(adapter, changes, match):
    setting(adapter, **changes)
    refused(adapter, ConfigError, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": {"(": 3}}, {"alpha_pattern": [1]}, {"alpha_pattern": {"q_proj": "x"}}, {"lora_alpha": "x"},
        {"lora_alpha": None}, {"lora_alpha": -1}, {"lora_alpha": 0}, {"modules_to_save": 7}, {"alpha_pattern": "q"},
    ],
)  # fmt: skip
def test_settings_that_peft_does_not_write_are_one_line(adapter, changes):
    setting(adapter, **changes)
    refused(adapter, IntegrityError, "adapter_config.json: a setting is none that PEFT writes")


def test_tensors_that_are_no_matrices_are_named(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for wrong in (torch.zeros(()), torch.zeros(4), torch.zeros(4, 32, 1)):
        save_file({**tensors, key: wrong}, path)
        refused(adapter, IntegrityError, "layers.0.self_attn.q_proj: lora_A or lora_B is no matrix")


def test_ways_to_begin_that_leave_the_base_alone_are_read(adapter):
    for begun in (False, "gaussian", "eva", "orthogonal"):
        setting(adapter, init_lora_weights=begun)
        read_adapter(adapter, make_base())


def test_keys_that_match_nothing_are_refused_and_not_left_out(adapter):
    rename(adapter, r"layers\.0", "layers.9")
    refused(adapter, BaseModelError, "has no model.layers.9.self_attn.[qv]_proj; it is an adapter for another model")
    rename(adapter, r"model\.layers\.9", "transformer.h.0")
    refused(adapter, BaseModelError, "is of no layer of base, whose layers are called model.layers.0")
    rename(adapter, r"lora_", "ia3_")
    refused(adapter, ConfigError, "is no matrix of a LoRA adapter")


def test_an_adapter_whose_settings_name_another_rank_than_its_tensors_have_is_refused(adapter):
    setting(adapter, r=5)
    refused(adapter, IntegrityError, "has rank 4, adapter_config.json says 5; save the adapter again")
    setting(adapter, r=4, rank_pattern={"q_proj": 2})
    refused(adapter, IntegrityError, "q_proj has rank 4, adapter_config.json says 2")


def test_an_adapter_of_another_width_or_part_is_refused(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, key: torch.zeros(4, 48)}, path)
    refused(
        adapter, BaseModelError, "goes from 48 to 32, that of base from 32 to 32; it is an adapter for another model"
    )
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused(adapter, IntegrityError, "lora_A is missing")
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, path)
    refused(adapter, ConfigError, "belongs to the embedding or the head")
    save_file({**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 32)}, path)
    refused(adapter, ConfigError, "belongs to the embedding or the head")
    save_file({**tensors, "base_model.model.model.norm.weight": torch.zeros(32)}, path)
    refused(adapter, ConfigError, "is no matrix of a LoRA adapter")


def test_an_adapter_that_changes_nothing_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({k: t * 0 if "lora_B" in k else t for k, t in load_file(path).items()}, path)
    refused(adapter, ConfigError, "all lora_B are zero, so that it changes nothing")
    save_file({}, path)
    refused(adapter, ConfigError, "changes nothing")


def test_a_folder_with_a_pickle_or_a_link_is_not_read(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("growlm.surgery.peft.read_tensors", None)
    monkeypatch.setattr("growlm.surgery.peft.read_object", None)
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "x.pkl"):
        (adapter / name).touch()
        refused(adapter, IntegrityError, f"{name}: may be a pickle, which can run code")
        (adapter / name).unlink()
    os.symlink(tmp_path, adapter / "out")
    refused(adapter, IntegrityError, "out: is a link")
    (adapter / "out").unlink()
    (adapter / "adapter_model.safetensors").rename(tmp_path / "away.safetensors")
    os.symlink(tmp_path / "away.safetensors", adapter / "adapter_model.safetensors")
    refused(adapter, IntegrityError, "adapter_model.safetensors: is a link")


def test_files_that_are_missing_or_cut_are_named(adapter, tmp_path):
    refused(tmp_path / "nowhere", IntegrityError, "no such folder")
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    refused(adapter, IntegrityError, "adapter_model.safetensors")
    path.unlink()
    refused(adapter, IntegrityError, "there is no adapter_model.safetensors in it")
    path.write_bytes(whole)
    for content in ("{", "[]", '{"r": NaN}'):
        (adapter / "adapter_config.json").write_text(content)
        refused(adapter, GrowlmError, "adapter_config.json")


# Settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": "q_prj"}, "target_modules: no 'q_prj' in the layers of base; they have q_proj, k_proj"),
        ({"target_modules": "3.self_attn.q_proj"}, "no '3.self_attn.q_proj'"),
        ({"layers": "2-3"}, "layer 3: base has layers 0 to 2"),
        ({"layers": (0, 0)}, "layers are 0, 0; name each once"),
        ({"layers": "2-1"}, "at least one"),
        ({"layers": "1", "target_modules": "0.self_attn.q_proj"}, "no '0.self_attn.q_proj'"),
        ({"layers": (0, 1), "target_modules": ("1.mlp.up_proj",)}, "layer 0 of base has none of them"),
    ],
)
def test_what_the_base_does_not_have_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        Lora.create(make_base(), LoraShape(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0}, {"r": -1}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"layers": "x"}, {"layers": "1-"},
        {"target_modules": ""}, {"target_modules": ()}, {"rank_pattern": "q_proj"}, {"rank_pattern": "q_proj=0"},
        {"alpha_pattern": {"q_proj": -1}},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises((ConfigError, ValueError)):
        LoraShape(**settings)


def test_settings_as_the_command_line_has_them():
    found = LoraShape(
        layers="1,4-6", target_modules="q_proj,v_proj", rank_pattern="v_proj=2", alpha_pattern="v_proj=3.5"
    )
    assert found.layers == (1, 4, 5, 6)
    assert found.target_modules == ("q_proj", "v_proj")
    assert (found.rank_of("4.self_attn.v_proj"), found.rank_of("4.self_attn.q_proj")) == (2, 16)
    assert found.scaling_of("4.self_attn.v_proj") == 3.5 / 2
    assert found.scaling_of("4.self_attn.q_proj") == 2
    assert LoraShape(r=16, use_rslora=True).scaling_of("0.mlp.up_proj") == 32 / 4


@torch.no_grad()
def test_doras_rows_have_the_length_that_is_learned():
    base = make_base()
    module = perturb(Lora.create(base, LoraShape(r=2, use_dora=True, target_modules=("q_proj",))), 1)
    for index, path, adapter in module.adapters():
        whole = adapter.merged(base.layers[index].get_submodule(path).weight)
        torch.testing.assert_close(torch.linalg.vector_norm(whole, dim=1), adapter.magnitude.abs())


# Into a store, and out of it


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_with_texts(tmp_path, "llama")


def adapter_of(store: Store, folder: Path, *, sign: int = 1) -> Path:
    """What PEFT learns from the store's law text; with another sign, what makes it do worse there."""
    model = store.load_base().model.requires_grad_(True)
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    made = peft.get_peft_model(model, settings)
    tokenizer = store.load_tokenizer()
    text = "\n".join(json.loads(line)["text"] for line in (store.path.parent / "law.jsonl").read_text().splitlines())
    ids = torch.tensor(tokenizer(text)["input_ids"][: 32 * 64]).view(-1, 32)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    for step in range(24):
        batch = ids[torch.arange(8 * step, 8 * step + 8) % len(ids)]
        (sign * made(batch, labels=batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    made.save_pretrained(folder)
    return folder


def test_an_adapter_becomes_a_module_with_and_without_text(store, tmp_path, capfd):
    folder = adapter_of(store, tmp_path / "adapter")
    law = store.path.parent / "law.jsonl"
    result = import_adapter(store, "law", folder, [law], progress=False)
    assert result.comparison.gain > result.comparison.error > 0
    assert (result.version, result.parameters) == (1, store.module("law").parameters)
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(store.path), "written", str(folder), "--json"])
    assert stopped.value.code == 0
    assert json.loads(capfd.readouterr().out)["comparison"] is None
    base = store.load_base()
    wanted = peft.PeftModel.from_pretrained(store.load_base().model, folder)
    ids = random_ids(2, 20)
    for name in ("law", "written"):
        module = store.load(name, base)
        torch.testing.assert_close(ModuleSet(base, [module]).logits(ids), wanted(ids).logits, atol=1e-5, rtol=1e-5)
    assert evaluate(store, {"law": [law]}, progress=False).forgetting == 0
    with Engine(store) as engine:
        text = " ".join(json.loads(line)["text"] for line in law.read_text().splitlines()[3:9])
        assert engine.route(text).module in ("law", "written")
    assert store.verify() == []
    with pytest.raises(StoreError, match=r"'law' exists \(version 1\); use --update"):
        import_adapter(store, "law", folder, progress=False)
    assert import_adapter(store, "law", folder, update=True, progress=False).version == 2


def test_an_adapter_that_does_not_help_is_not_admitted(store, tmp_path):
    adapter_of(store, tmp_path / "adapter", sign=-1)
    law = store.path.parent / "law.jsonl"
    with pytest.raises(NotBetterError, match="law: not better than the base"):
        import_adapter(store, "law", tmp_path / "adapter", [law], progress=False)
    assert store.modules == {}
    anyway = LearnConfig("lora", admit_anyway=True)
    assert import_adapter(store, "law", tmp_path / "adapter", [law], anyway, progress=False).comparison.gain < 0


def test_a_lora_module_is_learned_and_leaves_in_both_forms(store, tmp_path, capfd):
    settings = {"kind": "lora", "r": 4, "layers": "1-2", "sequence_length": 32, "batch_size": 2, "epochs": 2}
    config = LearnConfig(**settings, precision="float32", learning_rate=1e-2)
    result = learn(store, "law", [store.path.parent / "law.jsonl"], config, progress=False)
    assert result.gain > 0
    assert store.module("law").fork_on(3) == 1
    base = store.load_base()
    ids = random_ids(2, 20)
    wanted = ModuleSet(base, [store.load("law", base)]).logits(ids)
    plain = base.logits(ids)
    for form in ("peft", "checkpoint"):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(store.path), str(tmp_path / form), "--module", "law", "--as", form])
        assert stopped.value.code == 0
    assert "PeftModel.from_pretrained" in capfd.readouterr().out
    model = peft.PeftModel.from_pretrained(store.load_base().model, tmp_path / "peft")
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(whole(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3
    assert torch.equal(store.load_base().logits(ids), plain)


def test_settings_are_options_of_the_command_line(store, capfd):
    law = str(store.path.parent / "law.jsonl")
    line = [
        "learn",
        str(store.path),
        "law",
        "--data",
        law,
        "--kind",
        "lora",
        "--sequence-length",
        "32",
        "--samples",
        "0",
    ]
    line += ["--target-modules", "q_proj,down_proj", "--layers", "1-2", "--r", "3", "--rank-pattern", "down_proj=2"]
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--lora-alpha", "5", "--use-dora", "--admit-anyway", "--tokens", "320"])
    assert stopped.value.code == 0
    config = store.module("law").shape()[1]
    assert (config.r, config.lora_alpha, config.layers, config.use_dora) == (3, 5.0, (1, 2), True)
    assert (config.target_modules, config.rank_pattern) == (("q_proj", "down_proj"), {"down_proj": 2})
    capfd.readouterr()
    for option, value in (("--rank-pattern", "down_proj"), ("--rank-pattern", "down_proj=x"), ("--r", "0")):
        with pytest.raises(SystemExit) as stopped:
            main([*line[:2], "more", *line[3:], option, value])
        assert stopped.value.code == 1
        assert capfd.readouterr().err.splitlines()[-1].startswith(f"growlm: {option}")


def test_only_adapters_leave_as_adapters(store, tmp_path):
    settings = {"sequence_length": 32, "batch_size": 2, "epochs": 1, "admit_anyway": True, "precision": "float32"}
    law = [store.path.parent / "law.jsonl"]
    learn(store, "blocks", law, LearnConfig(num_layers=1, **settings), progress=False)
    learn(store, "rows", law, LearnConfig("lora", vocabulary="head", **settings), progress=False)
    for name, match in (
        ("blocks", "of kind blocks; only modules of kind lora"),
        ("rows", "vocabulary rows of a module"),
    ):
        with pytest.raises(ConfigError, match=match):
            export(store, tmp_path / "out", name, form="peft")
        assert not (tmp_path / "out").exists()
    export(store, tmp_path / "out", "rows")
    base = store.load_base()
    wanted = ModuleSet(base, [store.load("rows", base)]).logits(random_ids(2, 20))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(whole(random_ids(2, 20)).logits, wanted, atol=1e-5, rtol=1e-5)


# In the engine


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Store:
    shapes = {"letters": {"num_layers": 1}}
    store = make_store(tmp_path_factory.mktemp("mixed"), "llama", shapes)
    base = store.load_base()
    add_experts(store, base, "routed", 3, domain="signs")
    for seed, (name, config) in enumerate(
        {
            "low": LoraShape(r=2),
            "upper": LoraShape(r=3, layers=(2,), vocabulary="head"),
            "dora": LoraShape(r=2, use_dora=True, target_modules=("v_proj", "up_proj")),
        }.items()
    ):
        rows = torch.arange(3, 60) if config.vocabulary != "none" else None
        store.commit(name, perturb(Lora.create(base, config, rows), seed + 7), {"tokens": 1, "seed": seed})
    return store


NAMES = ["low", "letters", None, "upper", "dora", "routed", ["low", "upper"], ["upper", "dora"]]


def test_a_batch_of_many_kinds_answers_as_each_alone(mixed):
    prompts = [f"The {n} law" for n in range(len(NAMES))]
    with Engine(mixed) as engine:
        together = engine.generate_many(prompts, modules=NAMES, max_new_tokens=6)
        for prompt, name, answer in zip(prompts, NAMES, together, strict=True):
            assert engine.generate(prompt, module=name, max_new_tokens=6).tokens == answer.tokens
    assert len({tuple(answer.tokens) for answer in together}) > 4


def test_a_module_that_forks_above_shares_what_is_below(mixed):
    base = mixed.load_base()
    assert [mixed.module(name).fork_on(base.num_layers) for name in ("low", "upper", "dora")] == [0, 2, 0]
    assert mixed.module("upper").about() == "rank 3, layers 2 to 2"


@torch.no_grad()
def test_several_add_up(mixed):
    base, ids = mixed.load_base(), random_ids(2, 20)
    low = mixed.load("low", base)
    both = Lora.create(base, LoraShape(r=2))
    for (_, _, one), (_, _, new) in zip(low.adapters(), both.adapters(), strict=True):
        new.lora_A.weight.copy_(one.lora_A.weight)
        new.lora_B.weight.copy_(2 * one.lora_B.weight)
    twin = Lora.restore(base, low.config, {k: v.clone() for k, v in low.state_dict().items()}, "twin")
    found = ModuleSet(base, [low, twin]).logits(ids)
    torch.testing.assert_close(found, ModuleSet(base, [both]).logits(ids), atol=1e-5, rtol=1e-5)


def test_a_memory_budget_holds_with_adapters(mixed):
    largest = max(mixed.module(name).bytes for name in ("low", "upper", "dora"))
    with Engine(mixed) as engine:
        budget = engine.fixed_bytes + largest
    with Engine(mixed, memory=with_texts(mixed, budget)) as engine:
        for name in ("low", "upper", "dora", "low"):
            assert engine.generate("abc", module=name, max_new_tokens=2).loaded == [name] or name == "low"
            assert engine.used_bytes <= with_texts(mixed, budget)


def test_lengths_of_dora_follow_every_step_of_an_optimiser():
    """In float32 too, where a step's weights are the trained tensors themselves: a fused optimiser changes these, and
    not their versions."""
    base, ids = make_base(), random_ids(2, 20)
    module = perturb(Lora.create(base, LoraShape(r=2, use_dora=True)), 1)
    modules = ModuleSet(base, [module])
    optimizer = make_optimizer(dict(module.named_parameters()), lr=0.1)
    modules.logits(ids).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = modules.logits(ids)
        again = Lora.restore(base, module.config, {k: v.clone() for k, v in module.state_dict().items()}, "again")
        assert torch.equal(ModuleSet(base, [again]).logits(ids), trained)


@torch.no_grad()
def test_lengths_of_dora_are_kept_until_something_changes(monkeypatch):
    base, ids = make_base(), random_ids(2, 20)
    module = perturb(Lora.create(base, LoraShape(r=2, use_dora=True)), 1).requires_grad_(False)
    modules, counted, norm = ModuleSet(base, [module]), [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: counted.append(1) or norm(*a, **k))
    first = modules.logits(ids)
    assert len(counted) == len(list(module.adapters()))
    assert torch.equal(modules.logits(ids), first)
    assert len(counted) == len(list(module.adapters()))
    *_, adapter = next(module.adapters())
    adapter.lora_B.weight.mul_(2)
    changed = modules.logits(ids)
    assert len(counted) == len(list(module.adapters())) + 1
    again = Lora.restore(base, module.config, {k: v.clone() for k, v in module.state_dict().items()}, "again")
    assert torch.equal(ModuleSet(base, [again]).logits(ids), changed)
    assert (changed - first).abs().max() > 1e-4
