"""The contract of knowledge modules: one suite over every kind with layers, family and set of vocabulary rows.

A new kind adds a row to `SHAPES`; nothing else here may know it. Kind `recall` has no layers, and other kinds that
recall do more than their layers: `test_recall.py` holds them to the same contract.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Container, Iterator, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from growlm.base import Base
from growlm.base.cache import cache_of
from growlm.errors import ConfigError, IntegrityError
from growlm.modules import KINDS, KnowledgeModule, ModuleSet, attach, attached, detach, kind_of
from growlm.modules.scoring import passage_losses
from tiny import FAMILIES, VOCAB, WINDOW, make_base, make_model, perturb, random_ids

# The settings of each kind under test, by the name that shows in a test's id.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "blocks": {
        "top": {"num_layers": 2, "placement": "top"},
        "interleaved": {"num_layers": 2, "placement": "interleaved"},
        "recorded": {"num_layers": 2, "placement": "interleaved", "after": (1, 2), "sources": (0, 1)},
    },
    "experts": {
        "everywhere": {"num_experts": 3, "num_attention_experts": 2, "router_size": 8},
        "upper": {"num_experts": 2, "num_experts_per_tok": 1, "first_layer": 1, "expert_size": 5},
    },
    "peer": {
        "beside": {"num_experts": 30, "num_heads": 2, "top_k": 3, "layers": (0, 2)},
        "instead": {"num_experts": 16, "num_heads": 1, "top_k": 4, "replace_feed_forward": True, "query_norm": "layer"},
    },
    "lora": {
        "everywhere": {"r": 3},
        "upper": {"r": 2, "lora_alpha": 3.0, "layers": (1, 2), "use_rslora": True},
        "dora": {"r": 4, "use_dora": True},
    },
}
VOCABULARIES = ["none", "head", "both"]
ALL_SHAPES = [(kind, name, settings) for kind, shapes in SHAPES.items() for name, settings in shapes.items()]
Case = tuple[str, dict[str, Any]]


def case_of(kind: str, name: str, settings: dict[str, Any], vocabulary: str) -> Any:
    return pytest.param((kind, {**settings, "vocabulary": vocabulary}), id=f"{kind}-{name}-{vocabulary}")


def marks_of(family: str, kind: str, name: str) -> Any:
    """One case a kind, of families that differ most, runs under other releases of transformers too."""
    first = name == next(iter(SHAPES[kind]))
    return pytest.mark.versions if first and family in ("llama", "gemma3_text", "gpt_neox", "growlm") else ()


def pairs_of(families: Sequence[str], kinds: Container[str] = KINDS) -> Any:
    """Every family with every shape, each with one set of vocabulary rows, in turn: of family, shape and rows every
    two meet, which is what a mistake takes (rows know no layer, and layers no row); all three in every combination
    took two and a half times as long and caught nothing more."""
    return pytest.mark.parametrize(
        ("base", "case"),
        [
            pytest.param(family, *case.values, id=f"{family}-{case.id}", marks=marks_of(family, *shape[:2]))
            for turn, family in enumerate(families)
            for number, shape in enumerate(ALL_SHAPES)
            if shape[0] in kinds
            for case in [case_of(*shape, VOCABULARIES[(turn + number) % 3])]
        ],
        indirect=["base"],
    )


FULLEST = [case_of(*shape, "both") for shape in ALL_SHAPES]
COMBINING = [kind for kind in KINDS if kind_of(kind).combines]
every_pair = pairs_of(FAMILIES)
ROW_IDS = torch.arange(1, VOCAB, 3)  # with the last token in it, and without the first
LENGTHS = [WINDOW - 3, 2 * WINDOW + 1]  # within the sliding window and beyond it


@functools.cache
def base_of(family: str) -> Base:
    return make_base(family)


@pytest.fixture(params=FAMILIES)
def base(request) -> Base:
    """One base per family for the whole file: no test may leave a trace on it."""
    return base_of(request.param)


def make_module(base: Base, case: Case, *, seed: int | None = None) -> KnowledgeModule:
    """A new module; with a seed, one that has learned something."""
    name, settings = case
    kind = kind_of(name)
    row_ids = None if settings["vocabulary"] == "none" else ROW_IDS
    module = kind.create(base, kind.Config(**settings), row_ids)
    if seed is None:
        return module
    module.enable_new_experts()
    return perturb(module, seed)


def snapshot(base: Base) -> dict[str, Any]:
    """The objects that make up a model, and what attention calls them."""
    decoder, anatomy = base.decoder, base.anatomy
    layers = getattr(decoder, anatomy.layers)
    return {
        "objects": [
            *(base.model, decoder, base.model.config, decoder.config, layers, *layers),
            *(getattr(decoder, anatomy.embedding), getattr(decoder, anatomy.norm), getattr(base.model, anatomy.head)),
        ],
        "indices": [getattr(layer, anatomy.attention).layer_idx for layer in layers],
        "config": base.model.config.to_dict(),
        "names": list(base.model.state_dict()),
        "attributes": sorted(vars(base.model)),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert [id(o) for o in now["objects"]] == [id(o) for o in before["objects"]]
    assert {k: v for k, v in now.items() if k != "objects"} == {k: v for k, v in before.items() if k != "objects"}


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    input_ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    visible = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return input_ids, visible


@torch.no_grad()
def greedy(modules: ModuleSet, prompt: Tensor, num_new: int) -> Tensor:
    """The tokens of greedy decoding, each from a full forward pass."""
    ids = prompt[None]
    for _ in range(num_new):
        ids = torch.cat([ids, modules.logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :]


def loss_of(modules: ModuleSet, input_ids: Tensor) -> Tensor:
    logits = modules.logits(input_ids)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def part_of(name: str) -> str:
    """`layers.0` of `layers.0.mlp.weight`, `rows.head` of `rows.head.rows`."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1 if numbers else -1])


# Kinds and their configs


def test_every_kind_is_under_test():
    assert SHAPES.keys() | {"recall"} == KINDS.keys()


def test_unknown_kind_is_refused_and_names_the_kinds():
    with pytest.raises(ConfigError, match=r"'bricks'.*blocks"):
        kind_of("bricks")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_knows_its_name(kind):
    assert kind_of(kind).kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_config_key_is_refused(kind):
    with pytest.raises(ValidationError, match="num_layrs"):
        kind_of(kind).Config(num_layrs=2)


@pytest.mark.parametrize("case", FULLEST)
def test_config_survives_json_and_cannot_be_changed(case):
    module = make_module(base_of("llama"), case)
    assert type(module.config).model_validate_json(module.config.model_dump_json()) == module.config
    with pytest.raises(ValidationError):
        module.config.vocabulary = "none"


# Identity


@every_pair
@torch.no_grad()
def test_a_new_module_leaves_the_logits_bit_equal(base, case):
    module = make_module(base, case)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    modules = ModuleSet(base, [module])
    for tokens in LENGTHS:
        input_ids = random_ids(2, tokens)
        assert torch.equal(modules.logits(input_ids), base.logits(input_ids)), tokens
    input_ids, visible = left_padded([random_ids(1, n)[0] for n in LENGTHS])
    assert torch.equal(modules.logits(input_ids, visible=visible), base.logits(input_ids, visible=visible))


@pytest.mark.parametrize("case", FULLEST)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_a_new_module_leaves_the_logits_bit_equal_in_bfloat16(family, case):
    base = Base(make_model(family).to(torch.bfloat16))
    module = make_module(base, case)
    input_ids = random_ids(2, LENGTHS[1])
    logits = base.logits(input_ids)
    with torch.autocast("cpu", torch.bfloat16):  # as in training: the module in float32
        assert torch.equal(ModuleSet(base, [module]).logits(input_ids), base.logits(input_ids))
    module.to(torch.bfloat16)  # as when served
    served = ModuleSet(base, [module]).logits(input_ids)
    assert served.dtype == torch.bfloat16
    assert torch.equal(served, logits)


@every_pair
@torch.no_grad()
def test_a_new_module_attached_leaves_forward_bit_equal(base, case):
    input_ids = random_ids(2, LENGTHS[1])
    before = base.model(input_ids).logits
    with attached(base.model, make_module(base, case)) as model:
        assert torch.equal(model(input_ids).logits, before)


@torch.no_grad()
def test_no_module_is_the_base(base):
    modules = ModuleSet(base)
    input_ids = random_ids(2, LENGTHS[1])
    assert torch.equal(modules.logits(input_ids), base.logits(input_ids))
    assert modules.digest == "base"
    assert modules.fork == modules.cache_slots == base.num_layers


# Running with a module


@every_pair
@torch.no_grad()
def test_attached_forward_equals_the_module_set(base, case):
    module = make_module(base, case, seed=1)
    modules = ModuleSet(base, [module])
    for tokens in LENGTHS:
        input_ids = random_ids(2, tokens)
        wanted = modules.logits(input_ids)
        assert (wanted - base.logits(input_ids)).abs().max() > 1e-2
        with attached(base.model, module) as model:
            torch.testing.assert_close(model(input_ids).logits, wanted, atol=1e-5, rtol=1e-5)


@every_pair
def test_generate_with_a_module_attached_equals_greedy_decoding(base, case):
    module = make_module(base, case, seed=2)
    modules = ModuleSet(base, [module])
    prompts = [random_ids(1, n, seed=n)[0] for n in (7, WINDOW + 1)]
    wanted = torch.stack([greedy(modules, prompt, 6) for prompt in prompts])
    input_ids, visible = left_padded(prompts)
    # No token ends the text early.
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=VOCAB + 1)
    with attached(base.model, module) as model:
        out = model.generate(
            input_ids, attention_mask=visible.long(), generation_config=settings, return_dict_in_generate=True
        )
    assert torch.equal(out.sequences[:, input_ids.shape[1] :], wanted)
    cache = cache_of(out)
    assert len(cache.layers) == modules.cache_slots
    assert cache.get_seq_length() == input_ids.shape[1] + 5


@every_pair
@torch.no_grad()
def test_reading_with_a_cache_equals_reading_at_once(base, case):
    modules = ModuleSet(base, [make_module(base, case, seed=3)])
    tokens = LENGTHS[1]
    input_ids = random_ids(2, tokens)
    cache, past, parts = DynamicCache(), 0, []
    for part in input_ids.split([8, 1, 1, tokens - 10], dim=1):
        hidden, shared = base.begin(part, past=past, cache=cache)
        hidden = base.embed_positions(modules.embed(hidden, part), shared.positions)
        parts.append(modules.project(base.run(hidden, modules.layers, shared)))
        past += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), modules.logits(input_ids), atol=1e-5, rtol=1e-4)
    assert len(cache.layers) == modules.cache_slots
    assert all(layer.get_seq_length() == tokens for layer in cache.layers)


@every_pair
@torch.no_grad()
def test_slots_below_the_fork_hold_the_bases_own_keys(base, case):
    """A cache made by the base serves every module up to its fork."""
    modules = ModuleSet(base, [make_module(base, case, seed=3)])
    input_ids = random_ids(2, LENGTHS[1])
    caches = []
    for layers in (base.layers_to_run(), modules.layers):
        cache = DynamicCache()
        hidden, shared = base.begin(input_ids, cache=cache)
        if layers is modules.layers:
            hidden = modules.embed(hidden, input_ids)
        base.run(base.embed_positions(hidden, shared.positions), layers, shared)
        caches.append(cache)
    for slot in range(modules.fork):
        assert torch.equal(caches[0].layers[slot].keys, caches[1].layers[slot].keys), slot
        assert torch.equal(caches[0].layers[slot].values, caches[1].layers[slot].values), slot


@every_pair
@torch.no_grad()
def test_the_fork_is_the_first_base_layer_that_changes(base, case):
    modules = ModuleSet(base, [make_module(base, case, seed=4)])
    fork = modules.fork
    assert modules.fork == modules.modules[0].fork
    assert 0 <= fork <= base.num_layers
    assert all(step.layer is layer for step, layer in zip(modules.layers[:fork], base.layers[:fork], strict=True))
    assert [s.attention for s in modules.layers[:fork]] == [s.attention for s in base.layers_to_run(0, fork)]
    # New layers stand between the base's, or others in the place of the base's.
    instead = len(modules.layers) == base.num_layers
    assert instead or {id(layer) for layer in base.layers} <= {id(step.layer) for step in modules.layers}

    input_ids = random_ids(2, LENGTHS[1])
    embedded, shared = base.begin(input_ids)
    own = base.embed_positions(modules.embed(embedded, input_ids), shared.positions)
    embedded = base.embed_positions(embedded, shared.positions)
    below = base.run(embedded, base.layers_to_run(0, fork), shared)
    with_module = base.run(own, modules.layers[:fork], shared)
    assert torch.equal(with_module, below) == (fork > 0 or modules.rows.input is None)
    # What the next base layer puts out is another thing with the module than without it.
    own_layers = [i for i, s in enumerate(modules.layers) if s.layer in base.layers[fork:]]
    position = fork if instead else next(iter(own_layers), len(modules.layers) - 1)
    after = base.run(own, modules.layers[: position + 1], shared)
    assert not torch.equal(after, base.run(embedded, base.layers_to_run(0, min(fork + 1, base.num_layers)), shared))

    # Going on from the base's own output at the fork is the whole computation.
    if fork > 0:
        again = base.pass_for(below, torch.arange(input_ids.shape[1])[None])
        assert torch.equal(modules.project(base.run(below, modules.layers[fork:], again)), modules.logits(input_ids))


@every_pair
@torch.no_grad()
def test_a_module_runs_alike_beside_others_and_after_them(base, case):
    """Nothing of one module shows in the output of another, or of the base."""
    first, second = make_module(base, case, seed=5), make_module(base, case, seed=6)
    input_ids = random_ids(2, LENGTHS[0])
    alone = ModuleSet(base, [first]).logits(input_ids)
    of_base = base.logits(input_ids)
    with attached(base.model, second) as model:
        other = model(input_ids).logits
    assert not torch.equal(other, alone)
    assert torch.equal(ModuleSet(base, [first]).logits(input_ids), alone)
    assert torch.equal(base.logits(input_ids), of_base)


@pytest.mark.parametrize("case", FULLEST)
def test_digests_tell_module_sets_apart(case):
    base = base_of("llama")
    first, second = make_module(base, case), make_module(base, case)
    digests = {ModuleSet(base, modules).digest for modules in ([], [first], [second])}
    assert len(digests) == 3
    assert ModuleSet(base, [first]).digest == ModuleSet(base, [first]).digest


def test_two_modules_at_once_are_refused():
    base = base_of("llama")
    case = FULLEST[0].values[0]
    with pytest.raises(ConfigError, match="cannot be active together"):
        ModuleSet(base, [make_module(base, case), make_module(base, case)])


# Attach and detach


@every_pair
@torch.no_grad()
def test_detach_restores_base_bitwise(base, case):
    module = make_module(base, case, seed=7)
    input_ids = random_ids(2, LENGTHS[1])
    logits, before = base.model(input_ids).logits, snapshot(base)
    numbers = [m.layer_idx for m in module.modules() if hasattr(m, "layer_idx")]
    attach(base.model, module)
    assert not torch.equal(base.model(input_ids).logits, logits)
    detach(base.model)
    assert_same(snapshot(base), before)
    assert [m.layer_idx for m in module.modules() if hasattr(m, "layer_idx")] == numbers
    assert torch.equal(base.model(input_ids).logits, logits)


@pytest.mark.parametrize("training", [False, True])
def test_attach_and_detach_leave_a_model_as_trainable_as_it_was(training):
    model = make_model("llama").train(training).requires_grad_(training)
    with attached(model, make_module(base_of("llama"), FULLEST[0].values[0])):
        assert model.training == training
        assert all(p.requires_grad == training for p in model.get_submodule("model.layers.0").parameters())
    assert model.training == training
    assert all(p.requires_grad == training for p in model.parameters())


def test_attached_detaches_when_its_block_fails(base):
    module = make_module(base, FULLEST[0].values[0], seed=7)
    before = snapshot(base)
    with pytest.raises(RuntimeError, match="inside"), attached(base.model, module):
        raise RuntimeError("inside")
    assert_same(snapshot(base), before)


def test_attached_config_describes_the_deeper_model(base):
    # The family's settings that have one entry a layer.
    per_layer = [k for k, v in base.config.to_dict().items() if isinstance(v, list) and len(v) == base.num_layers]
    assert "layer_types" in per_layer or not hasattr(base.config, "layer_types")
    for case in FULLEST:
        module = make_module(base, case.values[0])
        depth = len(ModuleSet(base, [module]).layers)
        with attached(base.model, module) as model:
            assert model.config.num_hidden_layers == depth
            assert base.decoder.config is model.config
            assert all(len(getattr(model.config, name)) == depth for name in per_layer), per_layer
            assert type(model.config).from_dict(model.config.to_dict()).num_hidden_layers == depth


def test_attaching_a_second_module_is_refused_and_leaves_the_first():
    base, case = base_of("qwen2"), FULLEST[0].values[0]
    first, second = make_module(base, case, seed=8), make_module(base, case, seed=9)
    input_ids = random_ids(1, 9)
    with torch.no_grad(), attached(base.model, first) as model:
        logits = model(input_ids).logits
        with pytest.raises(ConfigError, match="detach it first"):
            attach(model, second)
        assert torch.equal(model(input_ids).logits, logits)


def test_detach_without_attach_is_refused():
    base = base_of("qwen2")
    with pytest.raises(ConfigError, match="no module attached"):
        detach(base.model)
    with attached(base.model, make_module(base, FULLEST[0].values[0])):
        pass
    with pytest.raises(ConfigError, match="no module attached"):
        detach(base.model)


# State


@every_pair
@torch.no_grad()
def test_state_round_trip(base, case):
    module = make_module(base, case, seed=10)
    tensors = dict(module.state_dict())
    restored = type(module).restore(base, module.config, dict(tensors), "law/1")
    input_ids = random_ids(2, LENGTHS[1])
    wanted = ModuleSet(base, [module]).logits(input_ids)
    modules = ModuleSet(base, [restored])
    assert torch.equal(modules.logits(input_ids), wanted)
    assert modules.fork == module.fork
    assert restored.num_parameters() == module.num_parameters() == sum(p.numel() for p in module.parameters())
    assert restored.num_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    # Used as they are: no copy, nothing initialised over them, nothing to train, nothing left without memory.
    state = restored.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert not any(p.requires_grad for p in restored.parameters())
    assert not any(t.is_meta for t in [*restored.parameters(), *restored.buffers()])
    with attached(base.model, restored) as model:
        torch.testing.assert_close(model(input_ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", FULLEST)
@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
@torch.no_grad()
def test_state_round_trip_in_bfloat16(family, case):
    base = Base(make_model(family).to(torch.bfloat16))
    module = make_module(base, case, seed=10).to(torch.bfloat16)
    restored = type(module).restore(base, module.config, dict(module.state_dict()), "law/1")
    assert {p.dtype for p in restored.parameters()} == {torch.bfloat16}
    input_ids = random_ids(2, LENGTHS[1])
    assert torch.equal(ModuleSet(base, [restored]).logits(input_ids), ModuleSet(base, [module]).logits(input_ids))


@pytest.mark.parametrize("case", FULLEST)
@torch.no_grad()
def test_restoring_leaves_what_was_given_alone(case):
    base = base_of("llama")
    module = make_module(base, case, seed=10)
    tensors = dict(module.state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    restored = type(module).restore(base, module.config, tensors, "law/1")
    ModuleSet(base, [restored]).logits(random_ids(1, 9))
    assert tensors.keys() == copies.keys()
    assert all(torch.equal(tensors[name], copy_) for name, copy_ in copies.items())


def damaged(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """What was done, the part that the error must name, and the tensors."""
    for name, tensor in tensors.items():
        part = f"{name.split('.')[1]} rows" if name.startswith("rows.") else repr(name)
        yield f"{name} missing", part, {k: v for k, v in tensors.items() if k != name}
        longer = torch.cat([tensor, tensor]) if tensor.ndim else tensor.expand(2)
        yield f"{name} too long", part, {**tensors, name: longer}
        if tensor.ndim == 2 and not name.endswith("ids"):
            yield f"{name} too wide", part, {**tensors, name: torch.cat([tensor, tensor], dim=1)}
        if name.endswith(".ids"):
            yield f"{name} too large", part, {**tensors, name: tensor + 1}
            yield f"{name} negative", part, {**tensors, name: tensor - 2}
    yield "extra", "'layers.99.bogus'", {**tensors, "layers.99.bogus": torch.zeros(2)}
    yield "extra row tensor", "'rows.bogus'", {**tensors, "rows.bogus": torch.zeros(2)}


@pytest.mark.parametrize("case", FULLEST)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_tensors_that_are_not_the_modules_are_refused_by_name(family, case):
    base = base_of(family)
    module = make_module(base, case)
    for what, part, tensors in damaged(dict(module.state_dict())):
        with pytest.raises(IntegrityError) as caught:
            type(module).restore(base, module.config, tensors, "modules/law/2")
        message = str(caught.value)
        assert message.startswith("modules/law/2: "), what
        assert part in message, what
        assert "\n" not in message, what


@pytest.mark.parametrize("case", FULLEST)
def test_a_base_of_another_size_is_refused(case):
    module = make_module(base_of("llama"), case)
    wider = make_base("llama", hidden_size=48)
    with pytest.raises(IntegrityError, match="law/1"):
        type(module).restore(wider, module.config, dict(module.state_dict()), "law/1")


# Learning


@pairs_of(["llama", "gemma2", "gpt_neox", "olmo2", "gpt2"])
def test_gradients_reach_the_whole_module_and_not_the_base(base, case):
    module = make_module(base, case)
    module.enable_new_experts()  # as learning does
    modules = ModuleSet(base, [module])
    input_ids = random_ids(2, LENGTHS[1])
    loss = loss_of(modules, input_ids)
    loss.backward()
    gradients = {name: p.grad.to_dense() for name, p in module.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(module.named_parameters()).keys()
    assert all(g.isfinite().all() for g in gradients.values())
    parts: dict[str, float] = {}
    for name, g in gradients.items():
        parts[part_of(name)] = max(parts.get(part_of(name), 0.0), float(g.abs().max()))
    assert parts
    assert all(largest > 1e-6 for largest in parts.values()), parts
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())

    # They point downhill.
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm < 10  # a zero fed into a norm would blow it up
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.sub_(gradients[name], alpha=0.02 / norm.item())
        assert loss_of(modules, input_ids).item() < loss.item() - 0.005 * norm.item()


def test_a_base_stays_bit_identical_through_everything(base):
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    before = snapshot(base)
    input_ids = random_ids(2, LENGTHS[1])
    logits = base.logits(input_ids)
    for case in FULLEST:
        module = make_module(base, case.values[0])
        modules = ModuleSet(base, [module])
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            loss_of(modules, input_ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        with attached(base.model, module) as model:
            model.generate(input_ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        restored = type(module).restore(base, module.config, dict(module.state_dict()), "law/1")
        assert not torch.equal(ModuleSet(base, [restored]).logits(input_ids), logits)
    assert_same(snapshot(base), before)
    now = base.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in weights.items())
    assert torch.equal(base.logits(input_ids), logits)


# What only `blocks` promises


@pytest.mark.parametrize("placement", ["top", "interleaved"])
def test_blocks_zeroed_writes_get_a_gradient(base, placement):
    module = make_module(base, ("blocks", {"num_layers": 2, "placement": placement, "vocabulary": "none"}))
    loss_of(ModuleSet(base, [module]), random_ids(2, LENGTHS[1])).backward()
    parameters = dict(module.named_parameters())
    for layer in range(2):
        zeroed = {name: value for name, value in base.anatomy.zeroed if f"layers.{layer}.{name}" in parameters}
        assert len(zeroed) >= 2
        for name, value in zeroed.items():
            p = parameters[f"layers.{layer}.{name}"]
            assert bool((p == value).all()), name
            assert p.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("placement", ["top", "interleaved"])
@torch.no_grad()
def test_blocks_start_as_copies_of_the_layer_before_them(base, placement):
    settings = {"num_layers": 3, "placement": placement, "vocabulary": "none"}
    module = make_module(base, ("blocks", settings))
    zeroed = {name for name, _ in base.anatomy.zeroed}
    steps = ModuleSet(base, [module]).layers
    own = list(module.layers)
    previous = None
    seen = 0
    for step in steps:
        if step.layer not in own:
            previous = step
            continue
        seen += 1
        source = dict(previous.layer.named_parameters())
        assert step.attention == previous.attention
        for name, p in step.layer.named_parameters():
            assert name in zeroed or torch.equal(p, source[name]), name
            assert p.data_ptr() != source[name].data_ptr()
    assert seen == 3


def test_blocks_placement():
    config = kind_of("blocks").Config
    assert config(num_layers=2, placement="top").resolve(6).after == (6, 6)
    assert config(num_layers=2, placement="interleaved").resolve(6).after == (4, 6)
    for depth in range(1, 13):
        for num_layers in range(1, 15):
            resolved = config(num_layers=num_layers, placement="interleaved").resolve(depth)
            assert len(resolved.after) == len(resolved.sources) == num_layers
            assert list(resolved.after) == sorted(resolved.after)
            assert resolved.after[-1] == depth
            assert resolved.after[0] > 0
            assert all(0 <= source < depth for source in resolved.sources)
            assert resolved.resolve(depth + 1) == resolved


def test_blocks_config_out_of_range_is_refused():
    config = kind_of("blocks").Config
    for wrong in ({"num_layers": 0}, {"placement": "bottom"}, {"vocabulary": "input"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            config(**wrong)


def test_extending_a_config_leaves_the_original(base):
    for case in FULLEST:
        module = make_module(base, case.values[0])
        before = copy.deepcopy(base.config.to_dict())
        extended = module.extended_config(base.config)
        assert base.config.to_dict() == before
        assert extended.num_hidden_layers == len(ModuleSet(base, [module]).layers)


# Several at once


@pairs_of(FAMILIES, COMBINING)
@torch.no_grad()
def test_modules_that_combine_leave_one_another_as_they_are(base, case):
    one, two = make_module(base, case, seed=1), make_module(base, case, seed=2)
    input_ids = random_ids(2, LENGTHS[1])
    alone = [ModuleSet(base, [m]).logits(input_ids) for m in (one, two)]
    both = ModuleSet(base, [one, two])
    together = both.logits(input_ids)
    assert not any(torch.allclose(together, logits) for logits in alone)
    assert both.digest not in [ModuleSet(base, [m]).digest for m in (one, two)]
    assert torch.equal(ModuleSet(base, [two, one]).logits(input_ids), together)
    assert ModuleSet(base, [two, one]).digest == both.digest
    assert both.fork == min(m.fork for m in (one, two))
    # Each again without the other: the same bits.
    for module, logits in zip((one, two), alone, strict=True):
        assert torch.equal(ModuleSet(base, [module]).logits(input_ids), logits)
    # One that has learned nothing yet is not there.
    new = make_module(base, case)
    assert torch.equal(ModuleSet(base, [one, new]).logits(input_ids), alone[0])


@torch.no_grad()
def test_rows_of_several_are_added_up():
    """For a token that two modules have rows for, both count; in the input, in the head, and in what is scored."""
    base = base_of("gemma2")  # scales its embeddings and bounds its logits
    settings = {"num_experts": 2, "vocabulary": "both"}
    ids = [torch.arange(0, 200, 2), torch.arange(0, 300, 3)]
    kind = kind_of("experts")
    modules = [kind.create(base, kind.Config(**settings), own) for own in ids]
    for seed, module in enumerate(modules):
        perturb(module.rows, seed)  # rows alone: experts that have learned nothing add nothing
    together = ModuleSet(base, modules)
    model = make_base("gemma2").model
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for module in modules:
        model.model.embed_tokens.weight.index_add_(0, module.rows.input.ids, module.rows.input.rows)
        model.lm_head.weight.index_add_(0, module.rows.head.ids, module.rows.head.rows)
    input_ids = random_ids(2, 20)
    wanted = model(input_ids).logits
    torch.testing.assert_close(together.logits(input_ids), wanted, rtol=1e-4, atol=1e-5)
    losses = passage_losses(together, input_ids.tolist())
    labels = input_ids[:, 1:, None]
    torch.testing.assert_close(losses.float(), -wanted[:, :-1].log_softmax(-1).gather(-1, labels).sum((1, 2)))


def test_modules_that_do_not_combine_are_refused_by_name():
    base = base_of("llama")
    blocks, experts = (make_module(base, (kind, {"vocabulary": "none"})) for kind in ("blocks", "experts"))
    blocks.identity, experts.identity = "law@1:abc", "tax@2:def"
    with pytest.raises(ConfigError, match="law is of kind blocks, and such modules cannot be active together"):
        ModuleSet(base, [experts, blocks])
    with pytest.raises(ConfigError, match="tax is given twice"):
        ModuleSet(base, [experts, experts])
