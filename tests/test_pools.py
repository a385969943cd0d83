"""Usage of experts found by product keys: against counts made by hand, in models and in modules, beside routers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from growlm.base import Base
from growlm.cli import main
from growlm.errors import ConfigError
from growlm.layers import retrievals
from growlm.model import GrowlmConfig, GrowlmForCausalLM
from growlm.modules import ModuleSet
from growlm.modules.peer import Peer, PeerConfig
from growlm.surgery.pruning import choose_experts
from growlm.usage.figures import usage_figure
from growlm.usage.pools import PoolCounts, count_pools
from growlm.usage.usage import Usage, count_usage
from tiny import TEXT, VOCAB, make_base, make_tokenizer, perturb

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
    "num_experts": 6, "router_size": 8, "eos_token_id": 0, "peer_num_experts": [20, 30, 42], "peer_num_heads": 2,
    "peer_top_k": 3,
}  # fmt: skip


def make(**changes) -> GrowlmForCausalLM:
    torch.manual_seed(0)
    changes = {"feed_forward": ["peer", "experts", "memory"], **changes}
    return perturb(GrowlmForCausalLM(GrowlmConfig(**{**SIZES, **changes})).eval(), 0, strength=0.2)


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[Path]]:
    """Of lengths at which rows are padded."""
    found = {}
    for name, text in (("a", TEXT[0] + TEXT[2] * 3), ("b", TEXT[1] * 9)):
        found[name] = [tmp_path / f"{name}.txt"]
        found[name][0].write_text(text)
    return found


def usage_of(model: GrowlmForCausalLM, texts: dict[str, list[Path]]) -> Usage:
    return count_usage(ModuleSet(Base(model)), make_tokenizer(), texts, sequence_length=32)


@torch.no_grad()
def by_hand(model: GrowlmForCausalLM, path: Path, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Counts and sums of gates, with one passage a forward pass, so that none is padded."""
    found = [(torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.float64)) for n in sizes]
    ids = make_tokenizer()(path.read_text())["input_ids"]
    for start in range(0, len(ids), 32):
        if len(ids[start : start + 32]) < 2:
            continue
        with retrievals() as seen:
            model(torch.tensor([ids[start : start + 32]]))
        for (counts, gates), r in zip(found, seen, strict=True):
            for expert, gate in zip(r.experts.flatten().tolist(), r.gates.flatten().tolist(), strict=True):
                counts[expert] += 1
                gates[expert] += gate
    return found


def test_pools_are_counted_beside_routers(texts) -> None:
    model = make()
    usage = usage_of(model, texts)
    assert [(p.layer, p.part) for p in usage.places] == [(1, "feed_forward")]
    for name, paths in texts.items():
        pools = usage.pools[name]
        assert [(p.layer, p.num_experts) for p in pools] == [(0, 20), (2, 42)]
        for pool, (counts, gates) in zip(pools, by_hand(model, paths[0], [20, 42]), strict=True):
            assert torch.equal(pool.counts, counts)
            torch.testing.assert_close(pool.gates, gates, rtol=1e-4, atol=1e-6)
    choices = [[usage.counts[n][0], *(p.counts for p in usage.pools[n])] for n in ("a", "b")]
    wanted = 0.0
    for p, q in zip(*choices, strict=True):
        p, q = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
        wanted += float((p * (p / q).log()).sum()) / 3
    assert usage.divergence("a", "b") == pytest.approx(wanted, rel=1e-5)


def test_share_and_unevenness_by_hand() -> None:
    pool = PoolCounts(1, torch.tensor([3, 0, 1, 0]), torch.tensor([1.5, 0.0, 0.5, 0.0]).double())
    assert pool.share_used == 0.5
    assert pool.unevenness == pytest.approx(math.log(4) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    even = PoolCounts(1, torch.ones(8, dtype=torch.int64), torch.full((8,), 0.25).double())
    assert (even.share_used, even.unevenness) == (1.0, pytest.approx(0.0, abs=1e-12))
    assert "4 experts, 50.0% used" in pool.line()


def test_the_table_has_a_line_a_layer_and_json_the_counts(texts) -> None:
    usage = usage_of(make(feed_forward="peer", peer_num_experts=10_000), texts)
    lines = usage.lines()
    assert len(lines) == 2 * (1 + 3) + 3
    assert sum("10,000 experts" in line for line in lines) == 6
    assert max(map(len, lines)) < 120
    written = json.loads(json.dumps(usage.to_json()))
    for name in texts:
        for i, (pool, counted) in enumerate(zip(written["pools"][name], usage.pools[name], strict=True)):
            assert pool["counts"] == counted.counts.tolist()
            assert (pool["layer"], pool["experts"], pool["share_used"]) == (i, 10_000, counted.share_used)
            assert pool["unevenness"] == counted.unevenness


def test_the_command_counts_a_checkpoint(texts, tmp_path: Path, capsys) -> None:
    make(feed_forward="memory").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for more in ([], ["--figure", str(tmp_path / "x.svg")]):
        with pytest.raises(SystemExit) as ended:
            main(["usage", str(tmp_path / "model"), "--data", f"a={texts['a'][0]}", *more])
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert "layer 2 product keys   42 experts," in out  # what was counted is told in any case
    assert "not drawn: a figure shows routed experts" in err
    assert not (tmp_path / "x.svg").exists()


def test_pools_of_a_module_are_counted(texts) -> None:
    base = make_base("llama")
    module = Peer.create(base, PeerConfig(num_experts=30, layers=(0, 2), num_heads=2, top_k=3, vocabulary="none"))
    module.enable_new_experts()
    usage = count_usage(ModuleSet(base, [module]), make_tokenizer(), texts, sequence_length=32)
    assert [(p.layer, p.num_experts) for p in usage.pools["a"]] == [(0, 30), (2, 30)]
    assert all(int(p.counts.sum()) == 2 * 3 * usage.tokens["a"] for p in usage.pools["a"])


def test_a_model_without_pools_is_not_run_for_them(monkeypatch) -> None:
    modules = ModuleSet(make_base("llama"))
    monkeypatch.setattr(ModuleSet, "hidden", lambda *_: pytest.fail("ran for nothing"))
    assert count_pools(modules, [[1, 2, 3]]) == []


def test_what_has_nothing_to_count_or_to_prune_is_refused(texts) -> None:
    with pytest.raises(ConfigError, match=r"^the model has no routed experts to count"):
        count_usage(ModuleSet(make_base("llama")), make_tokenizer(), texts)
    model = make(feed_forward="peer")
    usage = usage_of(model, texts)
    with pytest.raises(ConfigError, match="a figure shows routed experts"):
        usage_figure(usage)
    with pytest.raises(ConfigError, match="parameters stay"):
        choose_experts(model, usage, "a", keep=0.5, normalise="max")
