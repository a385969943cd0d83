"""The contract of knowledge modules on a GPU: every kind, on every family of bases."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

from growlm.base import Base
from growlm.modules import ModuleSet, attached
from test_modules_contract import FULLEST, LENGTHS, left_padded, loss_of, make_module
from tiny import FAMILIES, make_model, random_ids

pytestmark = pytest.mark.gpu


@functools.cache
def base_on(family: str, where: str, dtype: torch.dtype = torch.float32) -> Base:
    return Base(make_model(family).to(where, dtype))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("case", FULLEST)
@torch.no_grad()
def test_a_new_module_leaves_the_logits_bit_equal(device, family, case):
    base = base_on(family, device)
    module = make_module(base, case)
    assert {t.device.type for t in module.state_dict().values()} == {device}
    modules = ModuleSet(base, [module])
    for tokens in LENGTHS:
        ids = random_ids(2, tokens).to(device)
        assert torch.equal(modules.logits(ids), base.logits(ids))
    ids, visible = (x.to(device) for x in left_padded([random_ids(1, n)[0] for n in LENGTHS]))
    assert torch.equal(modules.logits(ids, visible=visible), base.logits(ids, visible=visible))


@pytest.mark.parametrize("case", FULLEST)
@torch.no_grad()
def test_a_new_module_leaves_the_logits_bit_equal_in_bfloat16(device, family, case):
    base = base_on(family, device, torch.bfloat16)
    module = make_module(base, case).to(torch.bfloat16)
    ids = random_ids(2, LENGTHS[1]).to(device)
    assert torch.equal(ModuleSet(base, [module]).logits(ids), base.logits(ids))


@pytest.mark.parametrize("case", FULLEST)
@torch.no_grad()
def test_detach_restores_the_bits(device, near, family, case):
    base = base_on(family, device)
    module = make_module(base, case, seed=7)
    ids = random_ids(2, LENGTHS[1]).to(device)
    before = base.model(ids).logits
    with attached(base.model, module) as model:
        with_module = model(ids).logits
    assert torch.equal(base.model(ids).logits, before)
    assert not torch.equal(with_module, before)
    near("contract: attached, and as a module set", with_module, ModuleSet(base, [module]).logits(ids))


@pytest.mark.parametrize("case", FULLEST)
@torch.no_grad()
def test_reading_with_a_cache_equals_reading_at_once(device, near, family, case):
    base = base_on(family, device)
    modules = ModuleSet(base, [make_module(base, case, seed=3)])
    ids = random_ids(2, LENGTHS[1]).to(device)
    cache, past, parts = DynamicCache(), 0, []
    for part in ids.split([8, 1, 1, LENGTHS[1] - 10], dim=1):
        hidden, shared = base.begin(part, past=past, cache=cache)
        hidden = base.embed_positions(modules.embed(hidden, part), shared.positions)
        parts.append(modules.project(base.run(hidden, modules.layers, shared)))
        past += part.shape[1]
    near("contract: with a cache", torch.cat(parts, 1), modules.logits(ids))


@pytest.mark.parametrize("case", FULLEST)
def test_logits_and_gradients_are_those_of_the_processor(device, near, family, case):
    """The module comes to the device by its saved tensors, as from a store."""
    here, there = base_on(family, "cpu"), base_on(family, device)
    module = make_module(here, case, seed=1)
    tensors = {name: t.to(device, copy=True) for name, t in module.state_dict().items()}
    moved = type(module).restore(there, module.config, tensors, "law/1").requires_grad_()
    ids, visible = left_padded([random_ids(1, n)[0] for n in LENGTHS])
    padded = [
        ModuleSet(base, [m]).logits(ids.to(base.device), visible=visible.to(base.device))
        for base, m in ((there, moved), (here, module))
    ]
    for row, length in enumerate(LENGTHS):  # what padding itself says means nothing
        near("contract: logits of a padded batch", *(x[row, -length:] for x in padded))
    ids = random_ids(2, LENGTHS[1])
    for base, m in ((there, moved), (here, module)):
        loss_of(ModuleSet(base, [m]), ids.to(base.device)).backward()
    for (name, one), other in zip(moved.named_parameters(), module.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            near(f"contract: gradients of {module.kind}", one.grad, other.grad, times=10)


@pytest.mark.parametrize("case", FULLEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_saved_tensors_are_the_module(device, family, case, dtype):
    base = base_on(family, device, dtype)
    module = make_module(base, case, seed=10).to(dtype)
    ids = random_ids(2, LENGTHS[1]).to(device)
    wanted = ModuleSet(base, [module]).logits(ids)
    tensors = {name: t.cpu().to(device) for name, t in copy.copy(module.state_dict()).items()}
    restored = type(module).restore(base, module.config, tensors, "law/1")
    assert torch.equal(ModuleSet(base, [restored]).logits(ids), wanted)


@pytest.mark.parametrize("case", [c for c in FULLEST if c.values[0][0] != "blocks"])
@torch.no_grad()
def test_several_modules_leave_one_another_as_they_are(device, case):
    base = base_on("growlm", device)
    one, two = make_module(base, case, seed=1), make_module(base, case, seed=2)
    ids = random_ids(2, LENGTHS[1]).to(device)
    alone = ModuleSet(base, [one]).logits(ids)
    together = ModuleSet(base, [one, two]).logits(ids)
    assert not torch.allclose(alone, together)
    assert torch.equal(ModuleSet(base, [two, one]).logits(ids), together)
    assert torch.equal(ModuleSet(base, [one]).logits(ids), alone)
    assert torch.equal(ModuleSet(base, [one, make_module(base, case)]).logits(ids), alone)
