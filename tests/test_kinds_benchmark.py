"""Benchmark of kinds: every shape begins as the base and learns, and one of several parts is what its parts are."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from growlm.data import PackedTokens
from growlm.modules import ModuleSet
from growlm.modules.blocks import Blocks
from growlm.modules.lora import Lora
from growlm.modules.peer import Peer
from growlm.modules.shapes import BlocksConfig
from growlm.training.config import LearnConfig
from growlm.training.module_training import ModuleTraining
from tiny import make_base, perturb, random_ids

sys.path.insert(0, str(Path(__file__).parents[1]))
shapes = import_module("benchmarks.lib.shapes")
kinds = import_module("benchmarks.quality.kinds")
shaped, joined = shapes.shaped, shapes.joined
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = random_ids(8, 17)
NARROW = {"num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12}
PEER = {"num_experts": 36, "num_heads": 2, "top_k": 4, "key_size": 8}
SHAPES = {
    "narrow": shaped(shapes.Narrow, **NARROW),
    "narrow, svd": shaped(shapes.Narrow, **NARROW, init="svd", placement="interleaved"),
    "narrow, random, by gradient": shaped(shapes.Narrow, **NARROW, init="random", placement="gradient"),
    "narrow, no attention": shaped(shapes.Narrow, **{**NARROW, "num_heads": 0}),
    "whole layers by gradient": shaped(shapes.Narrow, num_layers=2, placement="gradient"),
    "delta": shaped(shapes.Delta, num_values=500),
    "delta, evenly": shaped(shapes.Delta, num_values=500, choice="evenly"),
    "delta, whole matrices": shaped(shapes.Delta, num_values=5000, choice="matrices"),
    "lora by gradient": shaped(shapes.GradientLora, r=4),
    "shared pools": shaped(shapes.SharedPeer, **PEER, layers="0-2", query_norm="layer"),
    "lora + narrow": joined(shaped(Lora, r=2), shaped(shapes.Narrow, **NARROW)),
    "lora + peer": joined(shaped(Lora, r=2), shaped(Peer, **PEER)),
}


@pytest.fixture(params=["llama", "qwen2"])
def base(request):
    return make_base(request.param)


def training(base, shape, folder):
    config = LearnConfig(
        "lora", tokens=64, sequence_length=16, batch_size=4, learning_rate=1e-2, device="cpu", precision="float32"
    )
    return ModuleTraining(base, shape.on(TEXT), config, PackedTokens(TEXT.int().numpy()), folder)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_begins_as_the_base_and_one_step_moves_the_loss(base, name, tmp_path):
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    run = training(base, SHAPES[name], tmp_path)
    ids = random_ids(2, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(ModuleSet(base, [run.module.eval()]).logits(ids), base.logits(ids))
        run.module.begin_training()
        first = float(sum(run._losses(0)))
    run.run()
    assert run.steps_done == 1
    with torch.no_grad():
        assert float(sum(run._losses(0))) < first
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


@pytest.mark.parametrize("name", ["lora + narrow", "lora + peer"])
def test_a_hybrid_is_its_parts(base, name):
    ids = random_ids(2, 16)
    whole = SHAPES[name].create(base).eval()
    whole.enable_new_experts()
    for learned, other in ((0, 1), (1, 0)):
        whole = SHAPES[name].create(base).eval()
        whole.enable_new_experts()
        perturb(whole.parts[learned], 1)
        with torch.no_grad():
            together = ModuleSet(base, [whole]).logits(ids)
            assert torch.equal(together, ModuleSet(base, [whole.parts[learned]]).logits(ids))
            assert not torch.equal(together, base.logits(ids))
            perturb(whole.parts[other], 2)
            assert not torch.equal(together, ModuleSet(base, [whole]).logits(ids))
    assert whole.num_parameters() == sum(part.num_parameters() for part in whole.parts)


def test_tables_of_a_hybrid_are_those_of_its_pools():
    whole = SHAPES["lora + peer"].create(make_base())
    tables = {name for name, _ in whole.named_parameters() if whole.is_table(name)}
    assert tables == {"parts.1.pools.0.up", "parts.1.pools.0.down"}


def test_pools_with_shared_keys_have_them_once():
    base = make_base()
    shared, own = (
        shaped(of, **PEER, layers="0-2", query_norm="layer").create(base) for of in (shapes.SharedPeer, Peer)
    )
    keys = sum(p.numel() for p in own.pools[0].keys.parameters())
    assert shared.num_parameters() == own.num_parameters() - 2 * keys


def test_whole_layers_from_a_third_on_are_growlms_blocks():
    base = make_base(num_hidden_layers=9)
    ours = shaped(shapes.Narrow, num_layers=3, placement="interleaved").create(base)
    blocks = Blocks.create(base, BlocksConfig(num_layers=3, placement="interleaved", vocabulary="none"))
    assert ours.config.after == blocks.config.after
    theirs = blocks.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.state_dict().items())


def test_narrow_copies_take_the_heads_that_write_most_with_the_units_that_do():
    base = make_base()
    attention, mlp = base.layers[0].self_attn, base.layers[0].mlp
    with torch.no_grad():
        attention.o_proj.weight[:, 16:] *= 10  # the second group of two heads, of width 8
        mlp.down_proj.weight[:, [5, 40]] *= 100
    narrow = shaped(shapes.Narrow, num_layers=3, num_heads=2, num_key_value_heads=1, intermediate_size=2).create(base)
    layer = narrow.layers[0]
    # Which of the two heads comes first is the same in queries and in what is written, which is zero.
    heads = {tuple(h.flatten().tolist()) for h in layer.self_attn.q_proj.weight.view(2, -1)}
    assert heads == {tuple(h.flatten().tolist()) for h in attention.q_proj.weight[16:].view(2, -1)}
    assert torch.equal(layer.self_attn.v_proj.weight, attention.v_proj.weight[8:])
    units = layer.mlp.gate_proj.weight
    assert {tuple(u) for u in units.tolist()} == {tuple(u) for u in mlp.gate_proj.weight[[5, 40]].tolist()}


def test_a_placement_by_gradient_is_where_new_layers_would_move_most():
    base = make_base(num_hidden_layers=5)
    found = shaped(shapes.Narrow, num_layers=2, placement="gradient").on(TEXT).create(base)
    everywhere = shaped(shapes.Narrow, num_layers=5, placement="all").create(base)
    assert everywhere.config.after == (1, 2, 3, 4, 5)
    steep = shapes.gradients(base, list(everywhere.parameters()), TEXT, everywhere.extend(base.layers_to_run()))
    sizes = dict.fromkeys(range(5), 0.0)
    for (name, _), gradient in zip(everywhere.named_parameters(), steep, strict=True):
        sizes[int(name.split(".")[1])] += float(gradient.square().sum())
    assert found.config.after == tuple(sorted(i + 1 for i in sorted(sizes, key=lambda i: -sizes[i])[:2]))


def test_a_delta_learns_the_entries_with_the_largest_gradients():
    base = make_base()
    matrices = {n: p for n, p in base.model.named_parameters() if ".layers." in n and p.ndim == 2}
    steep = shapes.gradients(base, list(matrices.values()), TEXT)
    largest = torch.cat([g.flatten() for g in steep]).abs().topk(500).values
    delta = shaped(shapes.Delta, num_values=500).on(TEXT).create(base)
    assert delta.num_parameters() == 500
    of = dict(zip(matrices, steep, strict=True))
    found = [
        of[f"model.layers.{index}.{path}.weight"].flatten()[difference.where].abs()
        for (index, path), difference in zip(delta._places, delta.differences, strict=True)
    ]
    assert torch.equal(torch.cat(found).sort(descending=True).values, largest)
    with torch.no_grad():
        delta.differences[0].values.fill_(1.0)
        matrix = torch.zeros(of[next(iter(of))].shape)
    place = delta.differences[0].where
    index, path = delta._places[0]
    matrix = base.layers[index].get_submodule(path).weight
    expected = matrix.clone().flatten()
    expected[place] += 1
    assert torch.equal(delta.differences[0](matrix), expected.view_as(matrix))


def test_whole_matrices_are_those_of_the_steepest_gradient_that_there_is_room_for():
    base = make_base()
    delta = shaped(shapes.Delta, num_values=2048, choice="matrices").on(TEXT).create(base)
    assert 0 < delta.num_parameters() <= 2048
    assert all(d.where is None for d in delta.differences)


def test_a_larger_alpha_is_a_larger_rate_of_b():
    base = make_base()
    ids = random_ids(1, 8)
    ends = []
    for alpha, times in ((8.0, 4.0), (32.0, 1.0)):
        torch.manual_seed(0)
        lora = shaped(Lora, r=4, lora_alpha=alpha).create(base)
        groups = [
            {"params": [p for n, p in lora.named_parameters() if "lora_A" in n], "lr": 1e-3},
            {"params": [p for n, p in lora.named_parameters() if "lora_B" in n], "lr": 1e-3 * times},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-20)
        for _ in range(3):
            ModuleSet(base, [lora]).logits(ids).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            ends.append(ModuleSet(base, [lora]).logits(ids))
    assert not torch.allclose(ends[0], base.logits(ids), atol=1e-3)
    assert torch.allclose(ends[0], ends[1], atol=1e-4)


def test_rates_are_tried_beyond_those_of_a_way_until_the_best_is_inside(monkeypatch):
    losses = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0, 8e-3: 1.5}
    asked = []

    def cell(self, domain, way, rate, seed, tokens):
        asked.append(rate)
        return {"valid": losses[rate], "rate": rate}

    monkeypatch.setattr(kinds.Kinds, "cell", cell)
    found = kinds.Kinds.best(kinds.Kinds.__new__(kinds.Kinds), "law", "lora r16", 0, 100, (1e-3, 2e-3))
    assert (found["rate"], asked) == (4e-3, [1e-3, 2e-3, 4e-3, 8e-3])
