"""Modules that recall a text: what every module promises, how one is learned, what is told of its sources.

Their layers, where they have any, are under `test_modules_contract.py`; batches, mixtures and rerouted answers with
them under `test_engine.py` and `test_mixing.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chats import VOCAB_WITH_MARKERS, chat_tokenizer
from disk import all_files, edit, flip, write_jsonl
from growlm import Engine, LearnConfig, Store, learn
from growlm import data as text_data
from growlm.base import Base
from growlm.base.padding import pad_left
from growlm.data import Passage
from growlm.disk.tensors import write_tensors
from growlm.engine.sources import Quote, quotes
from growlm.errors import ConfigError, IntegrityError, NotBetterError
from growlm.layers.recall import FEATURES, LEVELS, NOTHING
from growlm.modules import KnowledgeModule, ModuleSet, attach, attached, kind_of
from growlm.modules.scoring import continuation_scores, num_labels, paired_losses, passage_losses
from growlm.modules.shapes import parted_kind
from growlm.recall.text import RecalledText
from growlm.training.corpus import halves
from growlm.training.samples import side_by_side
from stores import add_module, domain_text, give_text, greedy, make_module, make_store, store_with_texts
from tiny import FAMILIES, TEXT, make_base, make_model, random_ids

KINDS = ["recall", "lora+recall", "blocks+recall"]
TEXT_FILE = "text-000.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def base_of(family: str) -> Base:
    return make_base(family)


@pytest.fixture(params=FAMILIES)
def base(request) -> Base:
    return base_of(request.param)


def book(seed: int) -> list[list[int]]:
    ids = random_ids(12, 50, seed=seed)
    ids[0, 2] = 0  # what rows are padded with, before the first token of a passage below
    return ids.tolist()


def new(base: Base, kind: str, seed: int = 0) -> KnowledgeModule:
    """With text, and gates that are closed."""
    layers, _ = parted_kind(kind)
    cls = kind_of(kind)
    module = cls.create(
        base, cls.Config(recall=True, **({"num_layers": 1} if layers == "blocks" else {})), torch.arange(9)
    )
    module.memory.text = RecalledText.of([("a", np.array(ids, dtype=np.int32)) for ids in book(seed)], base.vocab_size)
    return module


def learned(base: Base, kind: str, seed: int) -> KnowledgeModule:
    module = make_module(base, seed, kind=kind)
    give_text(module, book(seed), seed, most=150)
    return module


def passages_of(seed: int) -> list[list[int]]:
    """Of several lengths; in part from what is recalled."""
    text = book(seed)
    return [text[0][3:30], random_ids(1, 9)[0].tolist(), [*text[1][:20], *text[2][5:25]], text[3][7:9]]


def losses_of(modules: ModuleSet, ids: list[int]) -> Tensor:
    """Of all tokens but the first, (t - 1,), from all logits at once."""
    logits = modules.logits(torch.tensor([ids]))[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


# The contract


@every_kind
@torch.no_grad()
def test_a_new_module_leaves_the_logits_bit_equal(base, kind):
    module = new(base, kind)
    assert module.memory.gates.shape == (len(LEVELS), FEATURES)
    assert not module.memory.active
    modules = ModuleSet(base, [module])
    assert modules.memories == []
    ids = torch.tensor([row[:30] for row in book(0)[:3]])
    assert torch.equal(modules.logits(ids), base.logits(ids))
    ids, visible = pad_left(passages_of(0), base.device)
    assert torch.equal(modules.logits(ids, visible=visible), base.logits(ids, visible=visible))


@every_kind
@torch.no_grad()
def test_a_module_that_learned_changes_the_logits_to_a_distribution(base, kind):
    module = learned(base, kind, 1)
    ids = torch.tensor([row[:30] for row in book(1)[:3]])
    found = ModuleSet(base, [module]).logits(ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(ids.shape), atol=1e-4, rtol=0)
    module.memory.close()
    assert ((ModuleSet(base, [module]).logits(ids).log_softmax(-1) - found).abs().amax(-1) > 1e-2)[:, 1:].all()


@torch.no_grad()
def test_recall_alone_runs_the_bases_own_layers(base):
    modules = ModuleSet(base, [learned(base, "recall", 1)])
    assert modules.fork == modules.cache_slots == base.num_layers
    assert [run.layer for run in modules.layers] == [run.layer for run in base.layers_to_run()]
    ids = random_ids(2, 20)
    assert torch.equal(modules.hidden(ids), ModuleSet(base).hidden(ids))


@every_kind
@torch.no_grad()
def test_logits_are_those_of_each_place_after_its_own_context(base, kind):
    """Padded, in company or cut off: what a place says depends on the tokens up to it."""
    modules = ModuleSet(base, [learned(base, kind, 2)])
    texts = passages_of(2)
    ids, visible = pad_left(texts, base.device)
    together = modules.logits(ids, visible=visible)
    for row, text in enumerate(texts):
        alone = modules.logits(torch.tensor([text]))[0]
        torch.testing.assert_close(together[row, -len(text) :], alone, atol=1e-4, rtol=1e-4)
        cut = modules.logits(torch.tensor([text[: len(text) // 2 + 1]]))[0]
        torch.testing.assert_close(cut, alone[: len(cut)], atol=1e-4, rtol=1e-4)


@every_kind
@torch.no_grad()
def test_losses_are_those_of_the_logits(base, kind):
    sets = [ModuleSet(base), ModuleSet(base, [learned(base, kind, 3)]), ModuleSet(base, [learned(base, kind, 4)])]
    passages = passages_of(3)
    counted = [[n % 3 != 1 for n in range(len(p))] for p in passages]
    each = [[losses_of(modules, p) for p in passages] for modules in sets]
    wanted = torch.stack([torch.stack([losses.sum() for losses in row]) for row in each]).double()
    torch.testing.assert_close(paired_losses(sets, passages), wanted, rtol=1e-4, atol=1e-4)
    masked = [torch.stack([x[torch.tensor(c[1:])].sum() for x, c in zip(row, counted, strict=True)]) for row in each]
    found = paired_losses(sets, passages, counted=counted)
    torch.testing.assert_close(found, torch.stack(masked).double(), rtol=1e-4, atol=1e-4)
    for modules, row in zip(sets, wanted, strict=True):
        torch.testing.assert_close(passage_losses(modules, passages), row, rtol=1e-4, atol=1e-4)


@every_kind
@torch.no_grad()
def test_continuations_are_scored_by_the_logits(base, kind):
    modules = ModuleSet(base, [learned(base, kind, 5)])
    pairs = [(p[: len(p) // 2], p[len(p) // 2 :]) for p in passages_of(5)]
    pairs += [(p, greedy(base, modules.modules, p, 4, end=-1)) for p, _ in pairs[:2]]
    found = continuation_scores(modules, pairs)
    for (context, continuation), (score, likeliest) in zip(pairs, found, strict=True):
        losses = losses_of(modules, [*context, *continuation])[len(context) - 1 :]
        assert score == pytest.approx(-float(losses.sum()), rel=1e-4, abs=1e-4)
        assert likeliest == (greedy(base, modules.modules, context, len(continuation), end=-1) == continuation)
    assert [likeliest for _, likeliest in found[-2:]] == [True, True]


@every_kind
@torch.no_grad()
def test_state_round_trip(base, kind):
    module = learned(base, kind, 6)
    module.memory.gates.data[1, 0] = NOTHING  # one level is closed
    tensors = dict(module.state_dict())
    restored = type(module).restore(base, module.config, tensors, "law/1")
    assert restored.memory.text is None
    with pytest.raises(ConfigError, match="no text"):
        ModuleSet(base, [restored]).logits(random_ids(1, 5))
    with pytest.raises(ConfigError, match="no text"):
        restored.require_whole()
    restored.memory.text = module.memory.text
    ids = torch.tensor([book(6)[0]])
    assert torch.equal(ModuleSet(base, [restored]).logits(ids), ModuleSet(base, [module]).logits(ids))
    assert restored.num_bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    assert not any(p.requires_grad for p in restored.parameters())


@every_kind
@torch.no_grad()
def test_gates_of_before_there_were_so_many_features_are_read_as_they_were(base, kind):
    module = learned(base, kind, 6)
    module.memory.gates.data[:, 8:] = 0
    tensors = {**module.state_dict(), "memory.gates": module.memory.gates[:, :8].clone()}
    restored = type(module).restore(base, module.config, tensors, "law/1")
    restored.memory.text = module.memory.text
    ids = torch.tensor([book(6)[0]])
    assert torch.equal(ModuleSet(base, [restored]).logits(ids), ModuleSet(base, [module]).logits(ids))


@every_kind
def test_only_a_module_that_recalls_nothing_can_be_attached(kind):
    model = make_model()
    base = Base(model)
    before = model(random_ids(1, 9)).logits
    with pytest.raises(ConfigError, match="recalls text cannot be attached"):
        attach(model, learned(base, kind, 7))
    with attached(model, new(base, kind)):
        assert torch.equal(model(random_ids(1, 9)).logits, before)


@torch.no_grad()
def test_modules_that_recall_are_active_together(base):
    """Each is mixed into what those before it say, in the order of their identities."""
    one, two = learned(base, "recall", 8), learned(base, "recall", 9)
    ids = torch.tensor([[*book(8)[0][:20], *book(9)[0][:20]]])
    both = ModuleSet(base, [two, one])
    contexts = both.contexts(ids, ids.shape[1])
    wanted = two.memory.mix(one.memory.mix(base.logits(ids), contexts), contexts)
    assert torch.equal(both.logits(ids), wanted)
    assert torch.equal(ModuleSet(base, [one, two]).logits(ids), wanted)
    assert both.digest == ModuleSet(base, [one, two]).digest
    for module in (one, two):
        assert not torch.allclose(ModuleSet(base, [module]).logits(ids), wanted)
    assert torch.equal(ModuleSet(base, [one, new(base, "recall")]).logits(ids), ModuleSet(base, [one]).logits(ids))
    adapters = [learned(base, "lora+recall", 10), make_module(base, 11, kind="lora")]
    assert len(ModuleSet(base, adapters).memories) == 1
    with pytest.raises(ConfigError, match="different kinds"):
        ModuleSet(base, [one, adapters[0]])


@pytest.mark.parametrize(("base", "kind"), [("llama", "recall"), ("gpt2", "lora+recall")], indirect=["base"])
def test_samples_are_written_as_greedy_decoding_writes_them(base, kind):
    module = learned(base, kind, 12)
    tokenizer = chat_tokenizer()
    passages = [Passage(ids[: 30 + 3 * n], n) for n, ids in enumerate(book(12)[:3])] + [
        Passage(book(12)[n], n, [False] * n + [True] * (50 - n)) for n in (5, 9)
    ]
    samples = side_by_side(base, module, tokenizer, passages, 5)
    assert len(samples) == 3
    ends = base.end_tokens(tokenizer)
    prompts = {tokenizer.decode(p.tokens[: 32 if p.counted is None else p.counted.index(True)]): p for p in passages}
    for sample in samples:
        p = prompts[sample.prompt]
        cut = 32 if p.counted is None else p.counted.index(True)
        (end,) = ends
        wanted = greedy(base, [module], p.tokens[:cut], 40, end=end)
        assert sample.module == tokenizer.decode(wanted, skip_special_tokens=True)


# In a store


STORED = {"letters": {"kind": "recall"}, "digits": {"kind": "lora+recall", "r": 4}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules=STORED)
    return home


def text_file(store: Store, name: str = "letters") -> Path:
    return store.module(name).folder / TEXT_FILE


@pytest.mark.parametrize("other", KINDS)
def test_others_come_and_go_and_leave_a_module_as_it_is(store, other):
    ids = torch.tensor([store.load_tokenizer().encode(domain_text("letters", 3))])

    def now() -> tuple[dict[str, bytes], Tensor, Tensor]:
        with Engine(Store.open(store.path)) as engine:
            logits = engine.logits(ids, module="letters")
            return all_files(store.module("letters").folder), logits, engine.logits(ids)

    before = now()
    base = store.load_base()
    for seed in (5, 6):  # added, and updated
        add_module(store, base, "signs", seed, kind=other)
    store.remove("digits")
    again = [now()]
    store.remove("signs")
    again.append(now())
    for after in again:
        assert after[0] == before[0]
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[2], before[2])


def test_a_store_knows_what_it_holds(store):
    assert {name: store.module(name).kind for name in STORED} == {n: s["kind"] for n, s in STORED.items()}
    for name in STORED:
        files = store.module(name).text_files
        assert len(files) > 1
        assert set(files) == {file.name for file in store.module(name).folder.glob("text-*")}
    assert store.verify() == []
    base = store.load_base()
    one, other = store.load("letters", base), store.load("letters", base, verify=False)
    assert one.identity == other.identity
    # Versions that differ in their text alone are told apart.
    module = make_module(base, 1, kind="recall")
    module.load_state_dict(one.state_dict())
    give_text(module, book(40), 1)
    module.memory.gates.data.copy_(one.memory.gates)
    store.commit("letters", module, {})
    assert store.load("letters", base).identity.partition(":")[2] != one.identity.partition(":")[2]


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "vocabulary", "order"])
def test_a_damaged_text_is_named(store, name, damage):
    file, base = text_file(store, name), store.load_base()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "flipped":
        flip(file)
    else:  # by whoever wrote the manifest
        text = store.load(name, base).memory.text
        if damage == "vocabulary":
            tensors = RecalledText.of([("a", np.array([1, 70_000], dtype=np.int32))], 70_001).parts[0].tensors()
        else:
            tensors = {key: tensor.clone() for key, tensor in text.parts[0].tensors().items()}
            tensors["order"][3] = len(tensors["text"])
        files = {**store.module(name).manifest.files, TEXT_FILE: write_tensors(file, tensors)}
        edit(file.parent / "module.json", files=files)
    store = Store.open(store.path)
    with pytest.raises(IntegrityError) as caught:
        store.load(name, base)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    (told,) = store.verify()
    assert told.startswith(f"{file}: ")
    with Engine(store) as engine, pytest.raises(IntegrityError, match=TEXT_FILE):
        engine.generate("abc", module=name, max_new_tokens=1)


def test_a_text_that_changed_since_it_was_read_is_not_read_again_unseen(store):
    with Engine(store) as engine:
        engine.generate("abc", module="letters", max_new_tokens=1)
        engine.modules.drop("letters")
        file = text_file(store)
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(IntegrityError, match=TEXT_FILE):
            engine.generate("abc", module="letters", max_new_tokens=1)


@pytest.mark.parametrize("name", [*STORED, None])
def test_a_conversation_goes_on_as_if_it_were_read_anew(store, name):
    with Engine(store) as engine:
        engine._loop.writer.end_tokens = set()
        modules = [store.load(name, engine.base)] if name else []
        letters = engine.tokenizer.encode(domain_text("letters", 4, words=40))
        ids, rest = letters[:20], letters[20:]
        for count in (1, 2, 1, 3, 1, 1):
            answer = engine.generate(ids, module=name, max_new_tokens=3)
            assert answer.tokens == greedy(engine.base, modules, ids, 3, end=-1)
            ids, rest = [*ids, *answer.tokens, *rest[:count]], rest[count:]


# Sources


@torch.no_grad()
def quoted(modules: ModuleSet, tokenizer: Any, prompt: list[int], answer: list[int]) -> list[Quote]:
    hidden = modules.hidden(torch.tensor([[*prompt, *answer]])[:, :-1])[0]
    return quotes(modules, tokenizer, prompt, answer, hidden)


def test_quotes_name_the_places_that_an_answer_stands_at():
    base, tokenizer = base_of("llama"), chat_tokenizer(None)
    texts = ["The tenant shall pay the rent on the first day.", "Naïve 日本 rivers run down to the sea."]
    module = learned(base, "recall", 1)
    module.identity = "law@1:abc"
    give_text(module, [tokenizer.encode(text) for text in texts], 1, most=20)
    modules = ModuleSet(base, [module])
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text)
        answer = [*ids[6:11], tokenizer.eos_token_id, *ids[14:17]]
        found = quoted(modules, tokenizer, ids[:6], answer)
        first = found[0]
        assert (first.first, first.tokens, first.module, first.source) == (0, 5, "law", f"book-{number}.txt")
        assert first.text == tokenizer.decode(ids[6:11])
        assert first.character == len(tokenizer.decode(ids[:6]))
        assert text[first.character :].startswith(first.text.rstrip("\ufffd"))  # cut within a character
        assert first.length == 6
        assert 0 < first.share <= 1
        # What stands nowhere after such tokens is no quote, nor is what follows it at another place one with it.
        assert all(q.first + q.tokens <= 5 or q.first >= 6 for q in found)
        assert json.loads(json.dumps(first.to_json()))["source"] == first.source
    assert quoted(ModuleSet(base), tokenizer, [1, 2], [3]) == []
    assert quoted(modules, tokenizer, [1, 2], []) == []


def test_a_quote_stays_with_the_document_that_it_began_in():
    """Also where another says the same for longer than tokens are compared."""
    common = random_ids(1, 45, seed=3)[0].tolist()
    for first in (5, 6):
        module = learned(base_of("llama"), "recall", 3)
        give_text(module, [[5, *common], [6, *common]], 3, most=50)
        (quote,) = quoted(ModuleSet(base_of("llama"), [module]), chat_tokenizer(None), [first], common)
        assert (quote.source, quote.first, quote.tokens) == (f"book-{first - 5}.txt", 0, 45)


@torch.no_grad()
def test_the_share_of_a_quote_is_the_texts_part_of_the_probability():
    base, module = base_of("llama"), learned(base_of("llama"), "recall", 2)
    ids = book(2)[0][:25]
    found = quoted(ModuleSet(base, [module]), chat_tokenizer(None), ids[:20], ids[20:])
    (quote,) = found
    modules = ModuleSet(base, [module])
    mixed = modules.logits(torch.tensor([ids]))[0, 19:24].log_softmax(-1)
    own = base.logits(torch.tensor([ids]))[0, 19:24].log_softmax(-1)
    contexts = modules.contexts(torch.tensor([ids]), 25)[0, 19:24]
    model = module.memory.recalled(own, contexts).gates(module.memory.gates)[:, 0]
    at = torch.tensor(ids[20:])[:, None]
    shares = 1 - (model + own.gather(1, at)[:, 0] - mixed.gather(1, at)[:, 0]).exp()
    assert quote.share == pytest.approx(float(shares.mean()), abs=1e-4)
    assert 0.1 < quote.share < 1


# Learning


def config(**changes: Any) -> LearnConfig:
    trained = {"batch_size": 2, "epochs": 1, "learning_rate": 1e-3} if changes["kind"] != "recall" else {}
    short = {"sequence_length": 32, "precision": "float32", "router_samples": 8}
    return LearnConfig(**{**short, **trained, **changes})


@pytest.fixture
def lessons(tmp_path) -> Store:
    return store_with_texts(tmp_path, "llama")


@pytest.mark.parametrize("kind", ["recall", "lora+recall"])
def test_a_text_is_learned_stored_recalled_and_named(lessons, tmp_path, kind):
    source = tmp_path / "law.jsonl"
    result = learn(lessons, "law", [source], config(kind=kind), progress=False)
    stored = lessons.module("law")
    assert stored.kind == kind
    assert result.loss_after < result.loss_before - 0.5
    said = stored.manifest.training["recall"]
    documents = text_data.read([source]).documents
    train, rest = text_data.split(text_data.read([source]), seed=0)
    assert said["documents"] == len(documents)
    assert said["fit"]["before"] - said["fit"]["after"] > said["fit"]["error"] > 0
    assert lessons.verify() == []
    # In the end all of it, each document with its end.
    base, tokenizer = lessons.load_base(), lessons.load_tokenizer()
    module = lessons.load("law", base)
    held = [(source, ids.tolist()) for part in module.memory.text.parts for source, ids in part.documents()]
    assert held == [(d.source, [*tokenizer.encode(d.text), tokenizer.eos_token_id]) for d in documents]
    # It was admitted by passages that it did not recall then.
    passages = [p.tokens for p in halves(text_data.passages(rest, tokenizer, 32))[1]]
    whole, train_ids = module.memory.text, [(s, np.array(ids)) for s, ids in held if s in {d.source for d in train}]
    module.memory.text = RecalledText.of(train_ids, base.vocab_size)
    losses = [passage_losses(ModuleSet(base), passages), passage_losses(ModuleSet(base, [module]), passages)]
    module.memory.close()
    losses.append(passage_losses(ModuleSet(base, [module]), passages))
    assert float(losses[1].sum()) / num_labels(passages) == pytest.approx(result.loss_after, abs=1e-4)
    assert losses[1].sum() < min(losses[0].sum(), losses[2].sum())
    assert torch.equal(losses[2], losses[0]) == (kind == "recall")
    # And it is found again by whoever asks.
    assert whole.num_documents == module.memory.text.num_documents + len(rest)
    document = rest[0]
    prompt = document.text[:20]
    with Engine(lessons) as engine:
        answer = engine.generate(prompt, module="law", max_new_tokens=12)
        ids = engine.tokenizer.encode(prompt)
        assert answer.tokens == greedy(engine.base, [lessons.load("law", engine.base)], ids, 12)
        found = engine.sources(prompt, answer)
        assert engine.sources(prompt, engine.generate(prompt, module=None, max_new_tokens=3)) == []
    texts = {d.source: d.text for d in documents}
    assert found[0].module == "law"
    assert found[0].source.startswith(f"{source}:")
    for quote in found:
        text = texts[quote.source]
        assert (text[quote.character :] + "<|endoftext|>").startswith(quote.text)
        assert quote.text == engine.tokenizer.decode(
            answer.tokens[quote.first :][: quote.tokens], skip_special_tokens=True
        )


@pytest.mark.parametrize("kind", ["recall", "lora+recall"])
def test_the_same_seed_gives_the_same_bytes(lessons, tmp_path, kind):
    stores = [lessons, lessons.beside(tmp_path / "again")]
    for store in stores:
        learn(store, "law", [tmp_path / "law.jsonl"], config(kind=kind), progress=False)
    one, other = (store.module("law") for store in stores)
    assert one.manifest.files == other.manifest.files
    assert len(one.text_files) == 1
    for file in one.manifest.files:
        assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes()
    assert one.manifest.training["recall"] == other.manifest.training["recall"]


@pytest.fixture
def apart(tmp_path) -> Path:
    """Documents of which none has a token of another's."""
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice([chr(33 + 2 * n), chr(34 + 2 * n)], 60)) for n in range(46)]
    return write_jsonl(tmp_path / "apart.jsonl", texts)


@pytest.mark.parametrize("kind", ["recall", "lora+recall"])
def test_a_small_text_is_recalled_word_for_word_however_few_tokens_fit_its_gates(lessons, tmp_path, kind):
    texts = [domain_text("letters", seed, words=16) for seed in range(12)]
    learn(lessons, "small", [write_jsonl(tmp_path / "small.jsonl", texts)], config(kind=kind), progress=False)
    said = lessons.module("small").manifest.training["recall"]
    assert said["documents"] == len(texts)
    assert said["fit"]["tokens"] < 200
    with Engine(lessons) as engine:
        right = 0
        for text in texts:
            ids = engine.tokenizer.encode(text)
            answer = engine.generate(ids[:20], module="small", max_new_tokens=12).tokens
            right += answer == ids[20:32]
        assert right == len(texts)


def test_a_text_that_does_not_help_is_not_admitted(lessons, apart):
    with pytest.raises(NotBetterError, match="apart: not better than the base"):
        learn(lessons, "apart", [apart], config(kind="recall"), progress=False)
    assert lessons.modules == {}
    learn(lessons, "apart", [apart], config(kind="recall", admit_anyway=True), progress=False)
    base = lessons.load_base()
    module = lessons.load("apart", base)
    assert not module.memory.active
    assert torch.equal(ModuleSet(base, [module]).logits(random_ids(1, 9)), base.logits(random_ids(1, 9)))


def test_a_text_that_adds_nothing_to_layers_is_not_kept(lessons, apart):
    learn(lessons, "apart", [apart], config(kind="lora+recall", admit_anyway=True), progress=False)
    stored = lessons.module("apart")
    assert stored.kind == "lora"
    assert stored.text_files == {}
    assert not list(stored.folder.glob("text-*"))
    assert stored.manifest.training["recall"]["fit"]["penalty"] is None
    assert lessons.load("apart", lessons.load_base()).memory is None
    assert lessons.verify() == []
    # As it would be without.
    learn(lessons, "plain", [apart], config(kind="lora", admit_anyway=True), progress=False)
    one, other = (store_files(lessons, name) for name in ("apart", "plain"))
    assert one == other


def store_files(store: Store, name: str) -> dict[str, bytes]:
    return {file: content for file, content in all_files(store.module(name).folder).items() if file != "module.json"}


def test_a_text_is_replaced_by_its_next_version(lessons, tmp_path):
    learn(lessons, "law", [tmp_path / "drugs.jsonl"], config(kind="recall"), progress=False)
    first = all_files(lessons.module("law").folder)
    more = [tmp_path / "law.jsonl", tmp_path / "drugs.jsonl"]
    learn(lessons, "law", more, config(kind="recall"), update=True, progress=False)
    assert all_files(lessons.module("law", 1).folder) == first
    sources = set(lessons.load("law", lessons.load_base()).memory.text.sources())
    assert {source.rpartition(":")[0] for source in sources} == set(map(str, more))


def test_conversations_are_recalled_as_the_template_writes_them(tmp_path):
    tokenizer = chat_tokenizer()
    make_model("llama", vocab_size=VOCAB_WITH_MARKERS).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "base" / "heldout.jsonl", [f"{text} {n}" for n in range(12) for text in TEXT])
    rooms = ["kitchen", "cellar", "attic", "garage"]
    records = [{"prompt": f"Who pays for {rooms[n % 4]} {n}?", "completion": "The tenant pays."} for n in range(60)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    store = Store.create(tmp_path / "store", tmp_path / "base")
    result = learn(store, "chats", [source], config(kind="recall", sequence_length=64), progress=False)
    assert result.loss_after < result.loss_before - 0.5
    documents = text_data.read([source], format="auto").documents
    text = store.load("chats", store.load_base()).memory.text
    held = [(source, ids.tolist()) for part in text.parts for source, ids in part.documents()]
    written = [(d.source, text_data.Template(tokenizer).write(d.turns).tokens) for d in documents]
    assert held == [(s, [*ids, tokenizer.eos_token_id]) for s, ids in written]
    prompt = text_data.Template(tokenizer).prompt([text_data.Turn("user", "Who pays for attic 2?")])
    with Engine(store) as engine:
        answer = engine.generate(prompt, module="chats", max_new_tokens=8)
    assert answer.text.startswith("The tenant pays")
