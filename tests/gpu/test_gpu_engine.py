"""The engine on a GPU: the processor's answers, alone and in company, under a budget, and with experts on the disk."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from growlm import router
from growlm.disk.tensors import read_tensors
from growlm.engine import Engine, Generation
from growlm.errors import BudgetError
from growlm.modules import ModuleSet
from growlm.modules.peer import Peer, PeerConfig
from growlm.modules.probe import probe
from growlm.store import Store
from growlm.store import store as store_module
from stores import Watch, add_experts, domain_ids, domain_text, make_store
from tiny import perturb, random_ids

pytestmark = pytest.mark.gpu

SHAPES: dict[str, dict[str, Any]] = {
    "letters": {"placement": "top", "vocabulary": "head"},
    "digits": {"placement": "interleaved", "vocabulary": "head", "num_layers": 2},
    "signs": {"placement": "top", "vocabulary": "both"},
}
NAMES: list[Any] = ["letters", "digits", "signs", "routed", "pool", ["pool", "other-pool"], None]
PROMPTS = ["abc de", domain_text("digits", 7), "x", domain_text("letters", 3, words=6), "<= >> def add("]
TOKENS = 12
NEAR = 1e-4  # two logits as near as this may change places


def add_pool(store: Store, base: Any, name: str, seed: int) -> None:
    """A module of kind peer, with evidence of text that nothing here asks for."""
    settings = {"num_experts": 240, "num_heads": 2, "top_k": 3, "vocabulary": "none"}
    module = Peer.create(base, PeerConfig(**settings))
    module.enable_new_experts()
    perturb(module, seed, strength=0.3)
    texts = domain_ids(store.load_tokenizer(), "other", first=100 * seed)
    record = {"probe": {"base": probe(ModuleSet(base)), "module": probe(ModuleSet(base, [module.eval()]))}}
    store.commit(
        name,
        module,
        record,
        router.files_of(router.gather_evidence(base, texts[:30], texts[30:], layer=store.manifest.routing_layer)),
    )


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "growlm"])
def store(request, device, tmp_path_factory) -> Store:
    made = make_store(tmp_path_factory.mktemp(request.param), request.param, SHAPES)
    base = made.load_base()
    add_experts(made, base, "routed", 4, domain="other")
    for seed, name in enumerate(("pool", "other-pool"), 5):
        add_pool(made, base, name, seed)
    return made


@pytest.fixture(scope="module")
def engine(store, device):
    with Engine(store, device=device) as made:
        yield made


@pytest.fixture(scope="module")
def reference(store):
    with Engine(store, device="cpu") as made:
        yield made


def answers_alike(found: Generation, wanted: Generation, reference: Engine, prompt: str, module: Any) -> None:
    """The same tokens, or the first that differ are those of two logits that are nearly equal."""
    if found.tokens == wanted.tokens:
        return
    assert found.modules == wanted.modules
    at = next(
        (i for i, (a, b) in enumerate(zip(found.tokens, wanted.tokens, strict=False)) if a != b),
        min(len(found.tokens), len(wanted.tokens)),
    )
    text = [*reference.tokenizer.encode(prompt), *wanted.tokens[:at]]
    best = reference.logits(torch.tensor([text]), module=module)[0, -1].topk(2).values
    assert float(best[0] - best[1]) < NEAR, f"token {at} differs, and the best logits are {best.tolist()}"


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_logits(engine, reference, near, name):
    ids = random_ids(2, 20)
    near("engine: logits", engine.logits(ids, module=name), reference.logits(ids, module=name), times=3)


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_greedy_answers(engine, reference, name):
    for prompt in PROMPTS:
        found, wanted = (e.generate(prompt, module=name, max_new_tokens=TOKENS) for e in (engine, reference))
        answers_alike(found, wanted, reference, prompt, name)
        assert found.prompt_tokens == wanted.prompt_tokens


def test_routed_answers(engine, reference):
    for domain in ("letters", "digits", "signs", "general"):
        prompt = domain_text(domain, 3000)
        found, wanted = (e.generate(prompt, max_new_tokens=TOKENS) for e in (engine, reference))
        assert found.module == wanted.module == (None if domain == "general" else domain)
        answers_alike(found, wanted, reference, prompt, found.module)
        assert engine.route(prompt).module == found.module


def test_many_prompts_under_mixed_modules(engine, reference):
    prompts = [p for p in PROMPTS for _ in NAMES]
    modules: Sequence[Any] = [n for _ in PROMPTS for n in NAMES]
    answers = engine.generate_many(prompts, modules=modules, max_new_tokens=TOKENS)
    for prompt, name, found in zip(prompts, modules, answers, strict=True):
        wanted = reference.generate(prompt, module=name, max_new_tokens=TOKENS)
        answers_alike(found, wanted, reference, prompt, name)


def test_drawn_tokens_do_not_depend_on_the_batch(engine):
    options = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 5}
    alone = [engine.generate(p, module="letters", **options).tokens for p in PROMPTS]
    assert [a.tokens for a in engine.generate_many(PROMPTS, modules="letters", **options)] == alone
    assert engine.generate(PROMPTS[0], module="letters", **{**options, "seed": 6}).tokens != alone[0]


def test_a_stream_is_the_answer_in_pieces(engine):
    *pieces, last = engine.stream(PROMPTS[1], module="digits", max_new_tokens=TOKENS)
    whole = engine.generate(PROMPTS[1], module="digits", max_new_tokens=TOKENS)
    assert last.tokens == whole.tokens
    assert "".join(pieces) == whole.text


def test_a_conversation_reuses_keys(engine, reference):
    for name in ("letters", "signs", "pool", None):
        prompt = PROMPTS[3]
        first = engine.generate(prompt, module=name, max_new_tokens=6)
        tokens = [*engine.tokenizer.encode(prompt), *first.tokens, *engine.tokenizer.encode(" abc")]
        found = engine.generate(tokens, module=name, max_new_tokens=6)
        wanted = reference.generate(tokens, module=name, max_new_tokens=6)
        if found.tokens != wanted.tokens:
            answers_alike(found, wanted, reference, engine.tokenizer.decode(tokens), name)


def test_mixing(engine, reference):
    found, wanted = (e.generate(PROMPTS[1], mix=3, max_new_tokens=8) for e in (engine, reference))
    assert found.mixture == pytest.approx(wanted.mixture, abs=0.02)
    assert found.scores == pytest.approx(wanted.scores, abs=1e-3)


def test_rerouting(device, tmp_path):
    top = {name: {"placement": "top", "vocabulary": "head"} for name in ("letters", "digits")}
    store = make_store(tmp_path, modules=top)
    with Engine(store, device=device) as engine, Engine(store, device="cpu") as reference:
        found, wanted = (e.generate(PROMPTS[1], reroute=4, max_new_tokens=16) for e in (engine, reference))
        assert found.changes[0] == wanted.changes[0]
        if found.tokens == wanted.tokens:
            assert found.changes == wanted.changes


def test_the_budget(device, store, monkeypatch):
    """In it one module fits beside base and router: another makes it go, and what cannot fit is refused."""
    with Engine(store, device=device) as engine:
        fixed = engine.fixed_bytes
    one = max(store.module(name).bytes for name in ("letters", "digits"))
    watch = Watch(monkeypatch)
    with Engine(store, device=device) as engine:
        engine.modules.set_budget(one, "")  # as if texts and passes took nothing, which other budgets' tests count
        for name in ("letters", "digits", "letters"):
            answer = engine.generate(PROMPTS[0], module=name, max_new_tokens=2)
            assert answer.loaded == [name]
            assert answer.resident_bytes <= fixed + one
        engine.generate_many(PROMPTS[:2], modules=["letters", "digits"], max_new_tokens=2)
        assert watch.most <= one
    pool = store.module("pool").bytes
    with Engine(store, device=device) as engine:
        engine.modules.set_budget(pool, "")
        with pytest.raises(BudgetError, match="do not fit together"):
            engine.generate(PROMPTS[0], module=["pool", "other-pool"], max_new_tokens=2)
        assert engine.generate(PROMPTS[0], module="pool", max_new_tokens=2).loaded == ["pool"]
    with pytest.raises(BudgetError, match="base"):
        Engine(store, device=device, memory=fixed - 1)


def test_modules_come_back_from_main_memory_and_not_from_the_disk(device, store, reference, monkeypatch):
    with Engine(store, device=device) as whole:
        rooms = [store.module(name).bytes for name in ("letters", "digits")]
        budget = whole.fixed_bytes + max(rooms) + 1
    read: list[Any] = []
    monkeypatch.setattr(
        store_module, "read_tensors", lambda path, **given: read.append(path.parts[-3]) or read_tensors(path, **given)
    )
    found = {}
    for kept in ("1GB", 0):
        read.clear()
        with Engine(store, device=device, host_memory=kept) as engine:
            engine.modules.set_budget(budget - engine.fixed_bytes, "")
            found[kept] = [
                engine.generate(PROMPTS[0], module=name, max_new_tokens=TOKENS, temperature=0)
                for name in ("letters", "digits", "letters", "digits")
            ]
            assert [answer.loaded for answer in found[kept]] == [["letters"], ["digits"]] * 2
            assert (engine.host_bytes > 0) is (kept != 0)
        assert read == (["letters", "digits"] if kept else ["letters", "digits"] * 2)
    assert [answer.tokens for answer in found["1GB"]] == [answer.tokens for answer in found[0]]


def test_what_is_counted_is_what_the_device_holds(device, store):
    if not torch.cuda.is_initialized():
        pytest.skip("memory is counted where there is a GPU")
    gc.collect()  # what earlier tests have left goes now, not while it is counted
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with Engine(store, device=device) as engine:
        base = torch.cuda.memory_allocated() - before
        engine.generate(PROMPTS[0], module="digits", max_new_tokens=2)
        torch.cuda.synchronize()
        module = torch.cuda.memory_allocated() - before - base
        size = store.module("digits").bytes
        # The allocator rounds each tensor up to 512 bytes; keys and values of the last answer are gone.
        many = 512 * len(dict(store.load("digits", engine.base).state_dict()))
        assert engine.base_bytes <= base + engine.router.num_bytes()
        assert size <= module + many
        assert module <= size + many + (1 << 20)


@pytest.mark.parametrize("cache", ["64MB", 8_000])
def test_experts_on_the_disk(device, engine, store, cache):
    """Rows come from a file's pages to the device as they are needed."""
    with Engine(store, device=device, experts_on="disk", row_cache=cache) as from_disk:
        for prompt in PROMPTS:
            found = from_disk.generate(prompt, module="pool", max_new_tokens=6)
            wanted = engine.generate(prompt, module="pool", max_new_tokens=6)
            answers_alike(found, wanted, engine, prompt, "pool")
        torch.testing.assert_close(
            from_disk.logits(random_ids(1, 20), module="pool"),
            engine.logits(random_ids(1, 20), module="pool"), rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_a_base_in_bfloat16(device, tmp_path: Path):
    """Bits of bfloat16 are the device's own: what is asked is that answers in company are alike in what they are."""
    made = make_store(tmp_path, modules={"letters": {}, "digits": {}})
    store = Store.create(tmp_path / "half", tmp_path / "base", dtype="bfloat16")
    base = store.load_base(device=device)
    for name in ("letters", "digits"):
        module = made.load(name, made.load_base())
        texts = domain_ids(store.load_tokenizer(), name)
        store.commit(
            name,
            module,
            {},
            router.files_of(router.gather_evidence(base, texts[:30], texts[30:], layer=store.manifest.routing_layer)),
        )
    texts = domain_ids(store.load_tokenizer(), "general")
    router.write_general(store, base, [(texts[:30], texts[30:])])
    with Engine(store, device=device) as engine:
        assert engine.base.dtype == torch.bfloat16
        answers = engine.generate_many([domain_text(n, 3000) for n in ("letters", "digits")], max_new_tokens=6)
        assert [a.module for a in answers] == ["letters", "digits"]
