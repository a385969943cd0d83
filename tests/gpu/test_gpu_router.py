"""Routers on a GPU: evidence, fitting and training, and the processor's choices by all three kinds."""

from __future__ import annotations

import pytest
import torch

from growlm import router
from growlm.modules.blocks import Blocks, BlocksConfig
from growlm.router import NONE, Route, load_router
from growlm.store import ROUTERS, Store
from growlm.training.config import RouterConfig
from growlm.training.router import train_router
from stores import PLAIN, domain_ids, make_store

pytestmark = pytest.mark.gpu

QUICK = RouterConfig(router_layers=1, passages=32, epochs=6, batch_size=8, learning_rate=5e-3)
DOMAINS = [*PLAIN, "general"]


@pytest.fixture(scope="module")
def store(device, tmp_path_factory) -> Store:
    """Its transformer router is trained where `train_router` chooses: on the GPU."""
    made = make_store(tmp_path_factory.mktemp("made"), keep_samples=100_000)
    train_router(made, QUICK, progress=False)
    return made


def same(found: list[Route], wanted: list[Route]) -> None:
    assert [r.module for r in found] == [r.module for r in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-3)


@pytest.mark.parametrize("kind", ROUTERS)
def test_choices_are_those_of_the_processor(device, store, kind):
    here, there = store.load_base(), store.load_base(device=device)
    routers = [load_router(store, kind=kind).bind(base) for base in (there, here)]
    tokenizer = store.load_tokenizer()
    right = 0
    for domain in DOMAINS:
        texts = domain_ids(tokenizer, domain, 8, first=2000)
        texts = [text[: 12 + 3 * i] for i, text in enumerate(texts)]  # of several lengths: padded
        routes = [r.route(*r.states(base, texts)) for r, base in zip(routers, (there, here), strict=True)]
        same(*routes)
        right += sum((route.module or NONE) == (NONE if domain == "general" else domain) for route in routes[0])
    assert right >= 0.8 * 8 * len(DOMAINS)


def test_the_trained_router_learned_on_the_device(device, store):
    manifest = store.router_files("transformer").manifest()
    assert manifest.training["accuracy"] > 0.7


def test_evidence_is_that_of_the_processor(device, tell, store):
    tokenizer = store.load_tokenizer()
    texts = domain_ids(tokenizer, "letters", 40)
    seen = [router.gather_evidence(store.load_base(device=d), texts[:30], texts[30:], layer=1) for d in (device, "cpu")]
    for name in seen[0]:
        one, other = seen[0][name], seen[1][name]
        assert one.dtype == torch.int16
        assert one.device.type == "cpu"
        apart = (one.int() - other.int()).abs()
        assert int(apart.max()) <= 2  # of about a thousand steps a unit
        tell(f"router evidence, {name}: {float((apart > 0).float().mean()):.2%} of numbers differ by one step")


def test_a_store_filled_on_the_device_routes_on_the_processor(device, tmp_path):
    """General text and every domain's evidence from the device; the fit, as always, on the processor."""
    made = make_store(tmp_path, modules={})
    there, tokenizer = made.load_base(device=device), made.load_tokenizer()
    texts = domain_ids(tokenizer, "general")
    router.write_general(made, there, [(texts[:30], texts[30:])])
    for name in PLAIN:
        texts = domain_ids(tokenizer, name)
        module = Blocks.create(there, BlocksConfig(num_layers=1, vocabulary="none"))
        files = router.files_of(
            router.gather_evidence(there, texts[:30], texts[30:], layer=made.manifest.routing_layer)
        )
        router.add_domain(made, made.commit(name, module, {}, files), None)
    here = made.load_base()
    for name in DOMAINS:
        texts = domain_ids(tokenizer, name, 8, first=2000)
        found = load_router(made)
        routes = found.route(*found.states(here, texts))
        assert sum((r.module or "general") == name for r in routes) >= 7
