"""Pretrain: text in, an ordinary checkpoint out; complete or absent, and the same bytes whether stopped or not."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import optim
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from disk import flip, write_jsonl
from growlm.base import Base
from growlm.errors import BaseModelError, ConfigError, DataError, IntegrityError, Interrupted, StoreError, TrainingError
from growlm.layers import retrievals
from growlm.layers.cross_entropy import linear_cross_entropy
from growlm.modules import ModuleSet
from growlm.modules.scoring import num_labels, passage_losses
from growlm.store import Store
from growlm.training.config import FinetuneConfig, LearnConfig, PretrainConfig
from growlm.training.finetune import finetune
from growlm.training.learn import learn
from growlm.training.pretrain import default_rate, new_model, pretrain, train_tokenizer
from interruptions import at_step, exit_code, forked, in_new_process, interrupt, kill, steps_of
from tiny import SETTINGS

ANIMALS = ["fox", "dog", "cat", "owl", "hare", "wolf", "crow", "toad"]
VERBS = ["sees", "follows", "feeds", "hears", "warns"]
PLACES = ["river", "hill", "barn", "wood", "well", "road"]

pytestmark = pytest.mark.usefixtures("one_thread")


def story(number: int) -> str:
    first, second = ANIMALS[number % 8], ANIMALS[number * 5 % 7]
    return f"The {first} {VERBS[number % 5]} the {second} by the {PLACES[number * 3 % 6]} on day {number}."


# Both kinds of layers with product keys, and everything random that they have.
PEER = {
    "attention": "softmax", "feed_forward": ["dense", "peer", "memory", "dense"], "num_attention_experts": 0,
    "peer_num_experts": 64, "peer_num_heads": 2, "peer_top_k": 3, "peer_dropout": 0.1, "peer_query_dropout": 0.1,
}  # fmt: skip


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    if family == "peer":
        family, changes = "growlm", PEER | changes
    AutoConfig.for_model(family, **{**SETTINGS[family], **changes}).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def home(tmp_path) -> Path:
    write_jsonl(tmp_path / "text.jsonl", [story(n) for n in range(200)])
    write_config(tmp_path / "llama", "llama")
    return tmp_path


def settings_of(home: Path, **changes: Any) -> PretrainConfig:
    small = {"sequence_length": 24, "batch_size": 8, "config": str(home / "llama" / "config.json")}
    return PretrainConfig(**{**small, "precision": "float32", "learning_rate": 5e-3, **changes})


def run(home: Path, out: str = "out", *, restart: bool = False, **changes: Any):
    return pretrain(home / out, [home / "text.jsonl"], settings_of(home, **changes), restart=restart, progress=False)


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_only(home: Path, *names: str) -> None:
    """Nothing but what was there and what was asked for: no scratch, no lock."""
    assert sorted(p.name for p in home.iterdir()) == sorted(["llama", "text.jsonl", *names])


# What comes out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_folder_is_a_checkpoint_that_transformers_loads(home, family):
    path = write_config(home / family, family)
    result = run(home, config=str(path))
    out = home / "out"
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == AutoConfig.from_pretrained(path).num_hidden_layers
    assert model.config.vocab_size == len(tokenizer) == result.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    for text in (story(12345), "  spaces,\ttabs\n\nand ünïcödé: 漢字 🦉 3.14159"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    assert_only(home, "out", *({family} - {"llama"}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls_for_text_it_never_saw(home, precision):
    result = run(home, epochs=6, precision=precision)
    assert result.loss_after < 0.6 * result.loss_before
    base = Base(AutoModelForCausalLM.from_pretrained(home / "out", dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    unseen = [tokenizer(story(n))["input_ids"] for n in range(1000, 1030)]
    loss = float(passage_losses(ModuleSet(base), unseen).sum()) / num_labels(unseen)
    assert loss < 0.7 * result.loss_before


def test_the_losses_are_of_the_text_that_was_held_out(home):
    result = run(home)
    held_out = [json.loads(line)["text"] for line in (home / "out" / "heldout.jsonl").read_text().splitlines()]
    assert len(held_out) == 16
    assert set(held_out) <= {story(n) for n in range(200)}
    base = Base(AutoModelForCausalLM.from_pretrained(home / "out"))
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    ids = [tokenizer(text)["input_ids"] for text in held_out]
    pieces = [piece[i : i + 24] for piece in ids for i in range(0, len(piece) - 1, 24)]
    loss = float(passage_losses(ModuleSet(base), pieces).sum()) / num_labels(pieces)
    assert result.loss_after == pytest.approx(loss, rel=1e-4)


def test_the_record_says_what_was_done(home):
    result = run(home, epochs=2, seed=5)
    record = json.loads((home / "out" / "pretrain.json").read_text())
    assert {k: record[k] for k in result.to_json()} == result.to_json()
    assert record["settings"] == settings_of(home, epochs=2, seed=5).to_json()
    (source,) = record["sources"]
    content = (home / "text.jsonl").read_bytes()
    assert (source["sha256"], source["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert result.tokens == 2 * run(home, "once", seed=5).tokens
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_the_number_of_tokens_bounds_the_run(home):
    assert run(home, "a", tokens=3 * 8 * 24).tokens == 3 * 8 * 24
    assert run(home, "b", tokens="1k").tokens == pytest.approx(1000, abs=8 * 24)
    once = run(home, "c").tokens
    assert once < run(home, "d", tokens=2 * once).tokens <= 2 * once + 8 * 24


@pytest.mark.parametrize("times", [0.3, 3, 7.7])
def test_no_fewer_tokens_are_trained_on_than_asked_for(home, times):
    """The last batch of an epoch is short."""
    once = run(home, "once", batch_size=50).tokens
    asked = int(times * once)
    assert asked <= run(home, batch_size=50, tokens=asked).tokens < asked + 50 * 24


def test_a_preset_is_a_llama_with_its_own_vocabulary(home):
    result = pretrain(
        home / "out",
        [home / "text.jsonl"],
        PretrainConfig(preset="tiny", vocab_size=300, sequence_length=16, batch_size=4, tokens=128),
        progress=False,
    )
    config = AutoConfig.from_pretrained(home / "out")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 128, 4)
    assert config.tie_word_embeddings
    assert config.vocab_size == result.vocab_size == 300
    assert config.max_position_embeddings >= 2048


def test_what_was_pretrained_is_a_base_to_learn_on(home):
    run(home)
    store = Store.create(home / "store", home / "out")
    law = write_jsonl(home / "law.jsonl", [f"Rule {n}: no toad shall pass gate {n % 9}." for n in range(80)])
    config = LearnConfig(sequence_length=16, batch_size=4, num_layers=1, admit_anyway=True)
    result = learn(store, "law", [law], config, progress=False)
    assert result.loss_after < result.loss_before
    assert store.verify() == []


# The parts


def test_digits_stay_single_and_every_text_can_be_written():
    tokenizer = train_tokenizer([story(n) for n in range(200)] + ["2024 2024 2024"] * 50, 400)
    assert len(tokenizer) <= 400
    assert [tokenizer.decode([i]) for i in tokenizer("2024")["input_ids"]] == ["2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("\x00\x7f\u2028é")["input_ids"]) == "\x00\x7f\u2028é"
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|endoftext|>"
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer(["text"], 256)


def test_the_tokenizer_does_not_depend_on_chance():
    texts = [story(n) for n in range(200)]
    first, second = (train_tokenizer(texts, 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_new_model_follows_its_seed_and_writes_small_into_the_residual_stream():
    config = AutoConfig.for_model("llama", **SETTINGS["llama"])
    first, again, other = new_model(config, 0), new_model(config, 0), new_model(config, 1)
    weights = dict(first.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)
    for layer in first.model.layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        for small, plain in ((attention.o_proj, attention.q_proj), (feed_forward.down_proj, feed_forward.up_proj)):
            ratio = small.weight.std().item() / plain.weight.std().item()
            assert ratio == pytest.approx((2 * 3) ** -0.5, rel=0.15)


@pytest.mark.parametrize("changes", [{"separate_documents": True}, {"segment_length": 8}], ids=str)
def test_documents_kept_apart_and_segments_train_another_model(home, changes):
    config = str(write_config(home / "growlm", "growlm", history_length=16, attention="stickbreaking"))
    plain = run(home, "plain", config=config)
    other = run(home, "other", config=config, **changes)
    assert other.loss_after < other.loss_before
    assert plain.loss_after != other.loss_after
    assert json.loads((home / "other" / "pretrain.json").read_text())["settings"].items() >= changes.items()


# Product keys


def test_a_model_with_product_keys_learns_and_says_what_it_uses(home, capsys):
    config = str(write_config(home / "peer", "peer"))
    result = pretrain(home / "out", [home / "text.jsonl"], settings_of(home, config=config, epochs=6), progress=True)
    assert result.loss_after < 0.7 * result.loss_before
    assert [(p.layer, p.num_experts) for p in result.pools] == [(1, 64), (2, 64)]
    record = json.loads((home / "out" / "pretrain.json").read_text())
    assert record["pools"] == result.to_json()["pools"]
    # What the record says is what can be counted in the model that was saved.
    model = AutoModelForCausalLM.from_pretrained(home / "out")
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    counts, gates = torch.zeros(2, 64), torch.zeros(2, 64, dtype=torch.float64)
    for line in (home / "out" / "heldout.jsonl").read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        for start in range(0, len(ids), 24):
            if len(ids[start : start + 24]) > 1:
                with retrievals() as found, torch.no_grad():
                    model(torch.tensor([ids[start : start + 24]]))
                for i, r in enumerate(found):
                    counts[i] += torch.bincount(r.experts.flatten(), minlength=64)
                    gates[i].index_add_(0, r.experts.flatten(), r.gates.flatten().double())
    for i, pool in enumerate(result.pools):
        share = gates[i] / gates[i].sum()
        assert pool.share_used_after == pytest.approx(float((counts[i] > 0).float().mean()))
        assert pool.unevenness_after == pytest.approx(math.log(64) + float(torch.xlogy(share, share).sum()), rel=1e-3)
        assert 0 < pool.share_used_before <= 1
        assert pool.unevenness_before != pool.unevenness_after
    told = capsys.readouterr().err
    assert "layer 1: 64 experts, of which held-out text uses" in told
    assert "layer 2: 64 experts" in told


def test_what_a_text_does_not_retrieve_keeps_its_bits(home):
    """With weight decay, too."""
    path = write_config(home / "peer", "peer", peer_num_experts=2500, peer_top_k=1)
    result = run(home, config=str(path), tokens=8 * 24, weight_decay=0.1)
    config = AutoConfig.from_pretrained(path)
    config.vocab_size = result.vocab_size
    trained, new = AutoModelForCausalLM.from_pretrained(home / "out"), new_model(config, 0)
    for layer, table in ((1, "up"), (1, "down"), (2, "values")):
        before, after = (getattr(m.model.layers[layer].mlp, table) for m in (new, trained))
        changed = (before != after).any(-1).sum()
        assert 0 < changed <= 8 * 24 * 2


def test_finetuning_goes_on_with_the_running_statistics(home):
    config = str(write_config(home / "peer", "peer"))
    run(home, config=config)
    settings = FinetuneConfig(sequence_length=24, batch_size=8, precision="float32", tokens=8 * 24 * 6)
    arguments = (home / "out", home / "tuned", [home / "text.jsonl"], settings)
    with at_step(3, interrupt), pytest.raises(Interrupted):
        finetune(*arguments, progress=False)
    result = finetune(*arguments, progress=False)
    finetune(home / "out", home / "whole", *arguments[2:], progress=False)
    assert weights_of(home / "tuned") == weights_of(home / "whole")
    assert json.loads((home / "tuned" / "finetune.json").read_text())["pools"] == result.to_json()["pools"]
    before, after = (load_file(home / name / "model.safetensors") for name in ("out", "tuned"))
    name = "model.layers.1.mlp.keys.norm.running_mean"
    assert not torch.equal(before[name], after[name])
    assert result.pools[0].share_used_before == pytest.approx(
        json.loads((home / "out" / "pretrain.json").read_text())["pools"][0]["share_used_after"], rel=0.3
    )


def test_a_pool_that_memory_has_no_room_for_is_refused(home):
    path = write_config(home / "peer", "peer", peer_num_experts=2**40)
    with pytest.raises(ConfigError, match=r"the rows of 1099511627776 experts need [\d,]+ bytes, and [\d,]+ are free"):
        run(home, config=str(path))
    assert_only(home, "peer")


def test_the_default_rate_falls_with_the_width():
    rates = [default_rate(width) for width in (64, 256, 1024, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] < 0.01


# Guarantee 10: the same run gives the same bytes


def test_the_same_seed_gives_the_same_bytes(home):
    run(home, "a")
    torch.rand(1000)
    run(home, "b")
    run(home, "c", seed=1)
    assert weights_of(home / "a") == weights_of(home / "b")
    assert weights_of(home / "a") != weights_of(home / "c")
    assert (home / "a" / "tokenizer.json").read_bytes() == (home / "b" / "tokenizer.json").read_bytes()


TWICE, HALF, COUNTED = {"epochs": 2}, {"epochs": 2, "precision": "bfloat16"}, {"tokens": 9000}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", COUNTED), ("llama", HALF), ("gpt2", TWICE), ("gpt2", HALF), ("peer", TWICE), ("peer", COUNTED)],
    ids=str,
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(home, family, changes):
    """gpt2 has dropout: the state of the random numbers goes on, too. Product keys have running statistics, and tables
    whose rows have a state each."""
    changes = {"config": str(write_config(home / family, family)), **changes}
    steps = len(steps_of(lambda: run(home, "whole", **changes)))
    for at in (2, steps // 2, steps - 2):
        with at_step(at, interrupt), pytest.raises(Interrupted, match=f"stopped after step {at + 1} of {steps}"):
            run(home, **changes)
        assert not (home / "out").exists()
    seen = []
    with at_step(steps - 1, lambda: seen.append(True)):
        run(home, **changes)
    assert weights_of(home / "out") == weights_of(home / "whole")
    assert_only(home, "out", "whole", *({family} - {"llama"}))


def test_dropout_is_on_while_it_trains(home):
    """Otherwise the test above says nothing of random numbers."""
    path = write_config(home / "gpt2", "gpt2")
    run(home, "with", config=str(path))
    write_config(home / "gpt2", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    run(home, "without", config=str(path))
    left, right = (load_file(home / out / "model.safetensors") for out in ("with", "without"))
    assert any(not torch.equal(left[k], right[k]) for k in left)


def test_restart_begins_anew(home):
    with at_step(5, interrupt), pytest.raises(Interrupted):
        run(home)
    with at_step(0, lambda: None):
        run(home, restart=True)
    run(home, "other")
    assert weights_of(home / "out") == weights_of(home / "other")
    assert_only(home, "out", "other")


def test_other_settings_do_not_go_on_with_a_stopped_run(home):
    with at_step(5, interrupt), pytest.raises(Interrupted):
        run(home)
    with at_step(0, lambda: None):
        run(home, seed=1)


def test_a_run_goes_on_in_the_precision_that_it_was_stopped_in(home, monkeypatch):
    """Whatever a processor takes `auto` for."""

    def processor(*, native: bool) -> None:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: native)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")  # of which the flags tell all

    for out in ("a", "b"):
        processor(native=False)
        with at_step(5, interrupt), pytest.raises(Interrupted):
            run(home, out, precision="auto")
    processor(native=True)
    assert steps_of(lambda: run(home, "a", precision="auto"))[0] == 0
    assert steps_of(lambda: run(home, "b", precision="float32"))[0] == 6


def test_a_damaged_checkpoint_is_named_and_restart_begins_anew(home):
    for number, damage in enumerate(
        (flip, Path.unlink, lambda path: path.with_name("checkpoint.json").write_text("{}"))
    ):
        with at_step(5, interrupt), pytest.raises(Interrupted):
            run(home, f"out-{number}")
        (tensors,) = home.glob(f".out-{number}-*/step-*.safetensors")
        damage(tensors)
        for _ in range(2):
            with pytest.raises(
                IntegrityError, match=rf"out-{number}-.*(step-6|checkpoint).*; restore it, or use --restart"
            ):
                run(home, f"out-{number}")
        run(home, f"out-{number}", restart=True)


KILLS = [3, 11]


def killed_and_resumed(home: Path) -> None:
    """A child process for each run: killed in its course, then finished."""

    def train(at: int) -> None:
        run(home, f"out-{at}", checkpoint_seconds=0.0)

    def until_killed(at: int) -> None:
        with at_step(at, kill):
            train(at)

    for at in KILLS:
        assert exit_code(forked(until_killed, at)) == -signal.SIGKILL
        assert not (home / f"out-{at}").exists()
        assert exit_code(forked(train, at)) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(home):
    in_new_process(killed_and_resumed, home)
    run(home, "whole")
    for at in KILLS:
        assert weights_of(home / f"out-{at}") == weights_of(home / "whole")
    assert_only(home, "whole", *(f"out-{at}" for at in KILLS))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_nothing(home, monkeypatch):
    count = itertools.count()

    def loss(*arguments: Any, **options: Any) -> torch.Tensor:
        value = linear_cross_entropy(*arguments, **options)
        return value * math.nan if next(count) == 5 else value

    monkeypatch.setattr("growlm.training.whole_model.linear_cross_entropy", loss)
    with pytest.raises(TrainingError, match=r"loss at step 6 of \d+ is nan; .*--learning-rate"):
        run(home, checkpoint_seconds=0.0)
    assert_only(home)


def test_a_model_whose_loss_is_no_number_is_not_saved(home, monkeypatch):
    original = optim.AdamW.step

    def last(self: optim.AdamW, *arguments: Any, **options: Any) -> Any:
        original(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(optim.AdamW, "step", last)
    with pytest.raises(TrainingError, match="held-out loss after training is nan"):
        run(home, tokens=8 * 24)
    assert_only(home)


# Refusals


def test_a_folder_that_holds_something_is_refused(home):
    (home / "out").mkdir()
    (home / "out" / "notes.txt").write_text("mine")
    for out in ("out", "text.jsonl"):
        with pytest.raises(StoreError, match="exists already"):
            run(home, out)
    assert [p.name for p in (home / "out").iterdir()] == ["notes.txt"]
    assert_only(home, "out")


def test_an_empty_folder_is_filled(home):
    (home / "out").mkdir()
    run(home)
    assert (home / "out" / "model.safetensors").is_file()


def test_the_same_run_twice_at_once_is_refused(home):
    refused = []

    def again() -> None:
        with pytest.raises(StoreError, match="running already"):
            run(home)
        refused.append(True)

    with at_step(3, again):
        run(home)
    assert refused == [True]
    assert_only(home, "out")


def test_bad_data_and_settings_are_refused_and_leave_nothing(home):
    def refused(error: type[Exception], **changes: Any) -> str:
        with pytest.raises(error) as caught:
            run(home, **changes)
        assert "\n" not in str(caught.value)
        assert not (home / "out").exists()
        return str(caught.value)

    with pytest.raises(DataError, match="no such file"):
        pretrain(home / "out", [home / "absent"], settings_of(home), progress=False)
    refused(DataError, text_key="body")
    refused(DataError, sequence_length=100_000)
    assert "at least 257" in refused(ConfigError, vocab_size=100)
    refused(ConfigError, config=str(home / "absent.json"))
    refused(ConfigError, preset="huge", config=None)
    refused(ConfigError, batch_size=0)
    refused(ConfigError, segment_length=0)
    assert "growlm models" in refused(ConfigError, separate_documents=True)
    assert "give one of them" in refused(ConfigError, preset="tiny")
    misspelt = write_config(home / "growlm", "growlm", num_expert=4)
    assert "no setting 'num_expert'; did you mean num_experts?" in refused(ConfigError, config=str(misspelt))
    (home / "bad.json").write_text("{")
    refused(BaseModelError, config=str(home / "bad.json"))
    (home / "bad.json").unlink()
    AutoConfig.for_model("bert").save_pretrained(home / "bert")
    refused(BaseModelError, config=str(home / "bert" / "config.json"))


def test_sequences_longer_than_learned_positions_are_refused(home):
    path = write_config(home / "gpt2", "gpt2", n_positions=16)
    with pytest.raises(ConfigError, match="16 positions"):
        run(home, config=str(path))


def test_the_settings_that_are_given_are_not_changed(home):
    config = settings_of(home)
    before = config.to_json()
    pretrain(home / "out", [home / "text.jsonl"], config, progress=False)
    assert config.to_json() == before
    assert json.loads((home / "llama" / "config.json").read_text())["vocab_size"] == SETTINGS["llama"]["vocab_size"]
