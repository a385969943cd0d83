"""How layers of the installed transformers are called, and what is said of layers that want something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from growlm.base import Base
from growlm.base.cache import KVCache
from growlm.errors import BaseModelError
from tiny import FAMILIES, make_base, make_model, random_ids


class Renamed(nn.Module):
    """A layer whose argument for keys and values has a name that no release had."""

    def forward(self, hidden_states, attention_mask=None, kv=None, **kwargs):
        raise AssertionError("must not run")


class Asking(nn.Module):
    def forward(self, hidden_states, attention_mask, cache, weather):
        raise AssertionError("must not run")


@pytest.mark.parametrize(("layer", "problem"), [(Renamed(), "none of the arguments cache"), (Asking(), "'weather'")])
def test_a_layer_that_is_not_understood_is_one_error_with_the_releases(layer, problem):
    import transformers

    model = make_model()
    model.model.layers[0] = layer
    with pytest.raises(BaseModelError) as raised:
        Base(model, "folder/base")
    message = str(raised.value)
    assert message.startswith(f"folder/base: {type(layer).__name__} of transformers {transformers.__version__}")
    assert problem in message
    assert "tested with transformers" in message
    assert ">=5.17" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_every_name_that_keys_and_values_had_is_used(name):
    seen = {}
    source = f"def forward(self, hidden_states, attention_mask=None, {name}=None):\n    seen.update(given={name})\n"
    scope = {"seen": seen}
    exec(source + "    return hidden_states", scope)
    model = make_model()
    model.model.layers[0] = type("Layer", (nn.Module,), {"forward": scope["forward"]})()
    base, cache = Base(model), KVCache(1)
    hidden, shared = base.begin(random_ids(1, 3), cache=cache)
    base.run(hidden, base.layers_to_run(0, 1), shared)
    assert seen["given"] is cache


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_keeps_its_promises_to_transformers(family):
    """What generation of transformers may do to a cache: crop it, reorder it, and go on."""
    base = make_base(family)
    ids = random_ids(2, 9)
    cache = KVCache(base.num_layers)
    hidden, shared = base.begin(ids, cache=cache)
    base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)
    assert cache.get_seq_length() == 9
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    ids = ids[[1, 0]]
    assert [cache.length(slot) for slot in range(base.num_layers)] == [6] * base.num_layers
    hidden, shared = base.begin(ids[:, 6:], past=6, cache=cache)
    last = base.run(base.embed_positions(hidden, shared.positions), base.layers_to_run(), shared)
    torch.testing.assert_close(base.cap(base.head(base.norm(last))), base.logits(ids)[:, 6:], rtol=1e-4, atol=1e-5)
