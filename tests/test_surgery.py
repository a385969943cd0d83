"""Usage, pruning and layer dropping on tiny growlm models, against counts and slices made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from disk import write_jsonl
from growlm.base import Base
from growlm.errors import BaseModelError, ConfigError, DataError, StoreError
from growlm.layers.routing import watched
from growlm.model import GrowlmConfig, GrowlmForCausalLM
from growlm.modules import ModuleSet
from growlm.modules.experts import Experts, ExpertsConfig
from growlm.surgery.choosing import Candidates, choose
from growlm.surgery.pruning import choose_experts, drop_layers, prune, without_experts
from growlm.training.config import FinetuneConfig
from growlm.training.finetune import finetune
from growlm.usage.usage import Place, Usage, count_usage
from tiny import TEXT, VOCAB, make_base, make_tokenizer, perturb, random_ids


def make(**changes) -> GrowlmForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 16, "num_experts": 6, "num_attention_experts": 4, "router_size": 8, "eos_token_id": 0,
    }  # fmt: skip
    model = GrowlmForCausalLM(GrowlmConfig(**{**settings, **changes})).eval()
    return perturb(model, 0, strength=0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT * 4))
    return path


def count(model: GrowlmForCausalLM, text: Path, **options) -> Usage:
    return count_usage(ModuleSet(Base(model)), make_tokenizer(), {"a": [text]}, sequence_length=32, **options)


def test_counts_are_those_of_a_loop(text: Path) -> None:
    model = make()
    usage = count(model, text)
    assert [(p.layer, p.part, p.num_experts) for p in usage.places] == [
        (layer, part, number) for layer in range(3) for part, number in (("attention", 4), ("feed_forward", 6))
    ]
    ids = make_tokenizer()(text.read_text())["input_ids"]
    wanted = [torch.zeros(p.num_experts, dtype=torch.int64) for p in usage.places]
    for start in range(0, len(ids), 32):
        routings = model(torch.tensor([ids[start : start + 32]]), output_routings=True).routings
        for i, r in enumerate(routings):
            for j, decision in enumerate((r.attention, r.feed_forward)):
                for expert in decision.experts.flatten().tolist():
                    wanted[2 * i + j][expert] += 1
    assert usage.tokens == {"a": len(ids)}
    for got, want in zip(usage.counts["a"], wanted, strict=True):
        assert torch.equal(got, want)


def test_modules_experts_are_counted_beside_a_dense_base(text: Path) -> None:
    base = make_base("llama")
    module = Experts.create(base, ExpertsConfig(num_experts=3, num_experts_per_tok=2, first_layer=1, vocabulary="none"))
    usage = count_usage(ModuleSet(base, [module]), make_tokenizer(), {"a": [text]}, sequence_length=32)
    assert [(p.layer, p.num_experts) for p in usage.places] == [(1, 3), (2, 3)]
    assert all(int(c.sum()) == 2 * usage.tokens["a"] for c in usage.counts["a"])


def test_new_experts_are_counted_with_the_old_ones(text: Path) -> None:
    base = Base(make())
    module = Experts.create(base, ExpertsConfig(num_experts=2, num_attention_experts=1, vocabulary="none"))
    module.enable_new_experts()
    usage = count_usage(ModuleSet(base, [module]), make_tokenizer(), {"a": [text]}, sequence_length=32)
    assert [p.num_experts for p in usage.places] == [5, 8] * 3


@pytest.mark.parametrize("tokens", [50, 64, 200])
def test_so_many_tokens_are_read_however_short_the_documents(tokens: int, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("\n\n".join(f"The river number {n} runs down." for n in range(60)))
    data = {"a": [tmp_path / "short.txt"]}
    usage = count_usage(
        ModuleSet(Base(make())), make_tokenizer(), data, sequence_length=32, tokens=tokens, separator="\n\n"
    )
    assert tokens - 1 <= usage.tokens["a"] <= tokens
    assert int(usage.counts["a"][0].sum()) == 2 * usage.tokens["a"]


def test_divergence_by_hand() -> None:
    usage = Usage([Place(0, "attention", 2)], {"a": [torch.tensor([3, 0])], "b": [torch.tensor([1, 2])]}, {})
    p, q = torch.tensor([3.5, 0.5]) / 4, torch.tensor([1.5, 2.5]) / 4
    assert usage.divergence("a", "b") == pytest.approx(float((p * (p / q).log()).sum()))
    assert usage.divergence("a", "a") == 0.0
    assert json.loads(json.dumps(usage.to_json()))["unevenness"]["a"] == [pytest.approx(0.6931, abs=1e-4)]


def test_watching_is_undone_and_does_not_nest_outwards() -> None:
    model = make()
    with watched() as outer:
        model(random_ids(1, 4))
        with watched() as inner:
            model(random_ids(1, 4))
        model(random_ids(1, 4))
    assert (len(outer), len(inner)) == (12, 6)


@pytest.mark.parametrize("normalise", ["max", "sum"])
def test_the_least_used_experts_go(normalise: str, text: Path) -> None:
    model = make()
    usage = count(model, text)
    kept = choose_experts(model, usage, "a", keep=0.8, normalise=normalise)
    assert any(len(k) < p.num_experts for k, p in zip(kept, usage.places, strict=True))
    scores = []
    for place, (counts, k) in enumerate(zip(usage.counts["a"], kept, strict=True)):
        assert len(k) >= 2
        score = counts / (counts.max() if normalise == "max" else counts.sum())
        gone = [e for e in range(len(counts)) if e not in k]
        assert all(float(score[e]) <= min(float(score[i]) for i in k) for e in gone)
        scores.append((place, score, k, gone))
    smaller = without_experts(model, usage.places, kept)
    share = smaller.num_parameters() / model.num_parameters()
    largest = 2 * 32 * 32 + 8
    assert 0.8 - largest / model.num_parameters() < share <= 0.8


def by_hand(normalise: str, keep: float) -> list[list[int]]:
    """Two routers with ten parameters an expert and twenty elsewhere: one uses all experts alike, one few of them."""
    even, few = torch.tensor([50, 48, 46, 44]), torch.tensor([2, 80, 1, 100, 90])
    routers = [Candidates(even, 0, 10, 1), Candidates(few, 0, 10, 1)]
    return choose(routers, total=110, keep=keep, normalise=normalise)


def test_shares_by_hand() -> None:
    # The least, one of each, are 0 and 3. By the largest count the next are .96, .92 and .88 of the first router and .9
    # and .8 of the second; by the sum .26, .24 and .23, and .33 and .29.
    orders = {
        "max": [(0, 1), (0, 2), (1, 4), (0, 3), (1, 1), (1, 0), (1, 2)],
        "sum": [(1, 4), (1, 1), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2)],
    }
    for normalise, order in orders.items():
        kept = [{0}, {3}]
        for number, (router, expert) in enumerate(order, start=5):
            kept[router].add(expert)
            assert by_hand(normalise, number / 11 + 1e-9) == [sorted(k) for k in kept], (normalise, number)


def test_the_model_is_pruned_in_the_order_that_is_asked_for() -> None:
    model = make(num_attention_experts=0, num_hidden_layers=2, num_experts=[4, 5])
    counts = [torch.tensor([50, 48, 46, 44]), torch.tensor([2, 80, 1, 100, 90])]
    usage = Usage([Place(0, "feed_forward", 4), Place(1, "feed_forward", 5)], {"a": counts}, {})
    total, size = model.num_parameters(), 2 * 32 * 16 + 8
    kept = {n: choose_experts(model, usage, "a", keep=(total - 4 * size) / total, normalise=n) for n in ("max", "sum")}
    assert kept == {"max": [[0, 1, 2], [3, 4]], "sum": [[0, 1], [1, 3, 4]]}


def test_pruned_model_computes_what_is_left() -> None:
    """Experts that are never chosen can go without a trace, but for their share of the softmax."""
    model = make(num_attention_experts=0, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.router.project.weight.zero_()
        model.model.layers[0].mlp.experts.router.project.bias.fill_(1.0)
        model.model.layers[0].mlp.experts.router.embeddings.copy_(torch.arange(6.0)[:, None].expand(6, 8) / 10)
        model.model.layers[0].mlp.experts.router.embeddings[4:] = -30.0  # logits so low that their share is nothing
    smaller = without_experts(model, [Place(0, "feed_forward", 6)], [[0, 1, 2, 3]])
    assert smaller.config.num_experts == [4]
    torch.testing.assert_close(smaller(random_ids(2, 9)).logits, model(random_ids(2, 9)).logits)


def test_prune_writes_an_ordinary_checkpoint(folder: Path, text: Path, tmp_path: Path) -> None:
    result = prune(folder, tmp_path / "small", [text], keep=0.7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.num_parameters() == result["parameters"]
    assert result["kept"] <= 0.7
    assert torch.isfinite(loaded(random_ids(1, 8)).logits).all()
    assert loaded.generate(random_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    again = prune(tmp_path / "small", tmp_path / "smaller", [text], keep=0.95)
    assert again["parameters"] < result["parameters"]


def test_keeping_everything_changes_nothing(folder: Path, text: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "same", [text], keep=1.0)
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (folder, tmp_path / "same"))
    assert torch.equal(before(random_ids(1, 8)).logits, after(random_ids(1, 8)).logits)


@pytest.mark.parametrize(("order", "chosen"), [("top", [0, 1]), ("uniform", [0, 2])])
@pytest.mark.parametrize("pools", [False, True])
def test_layers_are_dropped(order: str, chosen: list[int], pools: bool) -> None:
    changes = {"feed_forward": ["dense", "peer", "memory"], "peer_num_experts": [0, 36, 30], "peer_top_k": 2}
    model = make(num_attention_experts=[4, 0, 3], **(changes if pools else {}))
    smaller = drop_layers(model, 0.67, order)
    assert smaller.config.num_hidden_layers == 2
    for new, old in zip(smaller.model.layers, (model.model.layers[i] for i in chosen), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values(), strict=True))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", [f"The tenant of room {n} pays {n * 7 % 90} crowns." for n in range(80)])
    return tmp_path / "corpus.jsonl"


@pytest.mark.slow
def test_finetuning_concentrates_and_leaves_the_config_alone(
    folder: Path, corpus: Path, text: Path, tmp_path: Path
) -> None:
    settings = {"tokens": 2560, "sequence_length": 16, "batch_size": 4, "learning_rate": 3e-3, "precision": "float32"}

    def unevenness(weight: float) -> float:
        out = tmp_path / f"tuned-{weight}"
        finetune(folder, out, [corpus], FinetuneConfig(load_concentration=weight, **settings), progress=False)
        tuned = AutoModelForCausalLM.from_pretrained(out)
        assert tuned.config.auxiliary_loss == "mutual_information"  # a later finetuning does not concentrate unasked
        return sum(count(tuned, text).to_json()["unevenness"]["a"])

    assert unevenness(3.0) > unevenness(0.5) > unevenness(0.0)


def test_concentration_needs_experts(corpus: Path, tmp_path: Path) -> None:
    make(feed_forward="dense", num_attention_experts=0).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="without experts; --load-concentration needs some"):
        finetune(
            tmp_path / "dense", tmp_path / "out", [corpus], FinetuneConfig(load_concentration=1.0, sequence_length=16)
        )


# Bad input


def test_a_share_that_would_empty_a_layer_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep is 0\.1; with as many experts .* 0\.\d\d of the parameters stay"):
        prune(folder, tmp_path / "out", [text], keep=0.1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(keep: float, folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a share of all parameters"):
        prune(folder, tmp_path / "out", [text], keep=keep)


def test_a_dense_model_is_refused(text: Path, tmp_path: Path) -> None:
    from tiny import save_base

    with pytest.raises(BaseModelError, match="family 'llama'; only growlm models"):
        prune(save_base(tmp_path / "base"), tmp_path / "out", [text], keep=0.5)
    with pytest.raises(ConfigError, match="no routed experts"):
        count_usage(ModuleSet(make_base("llama")), make_tokenizer(), {"a": [text]})
    with pytest.raises(ConfigError, match="sequence_length is 0; it must be at least 2"):
        count_usage(ModuleSet(Base(make())), make_tokenizer(), {"a": [text]}, sequence_length=0, tokens=100)
    with pytest.raises(ConfigError, match="no routed experts"):
        count(make(feed_forward="dense", num_attention_experts=0), text)


def test_other_errors(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="normalise is 'mean', expected max or sum"):
        prune(folder, tmp_path / "out", [text], keep=0.5, normalise="mean")
    with pytest.raises(StoreError, match="exists already"):
        prune(folder, folder, [text], keep=0.5)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="shorter than two tokens"):
        prune(folder, tmp_path / "out", [tmp_path / "short.txt"], keep=0.5)
    make(feed_forward="peer", num_attention_experts=0, peer_num_experts=36, peer_top_k=2).save_pretrained(
        tmp_path / "p"
    )
    make_tokenizer().save_pretrained(tmp_path / "p")
    with pytest.raises(ConfigError, match="found by product keys; pools can be pruned in a store's module"):
        prune(tmp_path / "p", tmp_path / "out", [text], keep=0.5)
    with pytest.raises(ConfigError, match="leaves none"):
        drop_layers(make(), 0.1, "top")
    with pytest.raises(ConfigError, match="order 'bottom'"):
        drop_layers(make(), 0.5, "bottom")
