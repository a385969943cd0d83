"""Evaluation and usage on a GPU: the processor's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from disk import write_jsonl
from growlm.evaluation import EvalConfig, evaluate
from growlm.modules import ModuleSet
from growlm.modules.scoring import continuation_scores, passage_losses
from growlm.store import Store
from growlm.usage.pools import count_pools
from stores import PLAIN, domain_ids, domain_text, make_store
from tiny import make_base

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def home(device, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home)
    for domain in (*PLAIN, "general"):
        write_jsonl(home / f"{domain}.jsonl", [domain_text(domain, 800 + n, words=4 + 3 * n) for n in range(6)])
    return home


def test_an_evaluation_gives_the_processors_numbers(home, without_gpu):
    store = Store.open(home / "store")
    data = {name: [home / f"{name}.jsonl"] for name in ("digits", "letters")} | {"none": [home / "general.jsonl"]}
    config = EvalConfig(sequence_length=24, route_tokens=24)
    found = evaluate(store, data, config, progress=False)
    with without_gpu():
        wanted = evaluate(store, data, config, progress=False)
    assert found.perplexity.keys() == wanted.perplexity.keys()
    for domain, numbers in wanted.perplexity.items():
        for part in ("base", "module", "routed"):
            if part in numbers and isinstance(numbers[part], float):
                assert found.perplexity[domain][part] == pytest.approx(numbers[part], rel=1e-3), (domain, part)
    assert found.routing["accuracy"] == wanted.routing["accuracy"]
    assert found.memory == wanted.memory
    assert found.forgetting == pytest.approx(wanted.forgetting, abs=1e-3)


@torch.no_grad()
def test_losses_of_passages(device, home, near):
    store = Store.open(home / "store")
    texts = domain_ids(store.load_tokenizer(), "digits", 10)
    results, scores = [], []
    for where in (device, "cpu"):
        base = store.load_base(device=where)
        modules = ModuleSet(base, [store.load("digits", base)])
        results.append(passage_losses(modules, texts))
        scores.append(continuation_scores(modules, [(t[:5], t[5:12]) for t in texts]))
    assert results[0].device.type == "cpu"
    near("evaluation: losses of passages", *results)
    near("evaluation: continuations", *(torch.tensor([s for s, _ in part]) for part in scores))


def test_what_a_text_uses(device, home):
    base = make_base("growlm", feed_forward=["peer", "dense", "memory", "dense"], peer_num_experts=64,
                     peer_num_heads=2, peer_top_k=3, num_attention_experts=0)  # fmt: skip
    texts = domain_ids(Store.open(home / "store").load_tokenizer(), "digits", 10)
    wanted = count_pools(ModuleSet(base), texts)
    base.model.to(device)
    for one, other in zip(count_pools(ModuleSet(base), texts), wanted, strict=True):
        assert torch.equal(one.counts, other.counts)
        torch.testing.assert_close(one.gates, other.gates, rtol=1e-4, atol=1e-5)
