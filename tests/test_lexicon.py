"""The lexicon: words of modules that carry their text, beside what the base makes of a prompt."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlm import Engine, LearnConfig, Store, learn
from growlm.disk.tensors import require_kinds, write_tensors
from growlm.router import lexicon, load_router
from growlm.router.lexicon import Lexicon
from growlm.router.samples import GENERAL_SAMPLES, pack_samples
from stores import make_store

VOCAB = 40


def counts(*tokens: int) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB)


LAW, DRUGS, GENERAL = counts(*[3] * 50, *[4] * 30, *[1] * 20), counts(*[7] * 60, *[1] * 40), counts(*[1] * 90, 2, 3)


def test_words_speak_for_the_module_in_whose_text_they_are():
    found = Lexicon.of([LAW, DRUGS, None], GENERAL)
    law, drugs, both, general, unknown = found.evidence([[3, 4], [7], [3, 7], [2, 2], [39]]).tolist()
    assert law[0] > 5
    assert law[1] < -4
    assert drugs[1] > 3
    assert drugs[0] < -2
    assert law[1] < both[1] < drugs[1]
    assert max(general[:2]) < 0  # general text has it
    assert max(unknown[:2]) < 0
    assert [row[2] for row in (law, drugs, both, general, unknown)] == [0] * 5  # it has no words
    # What every text has says little.
    assert abs(found.evidence([[1]])[0, 0]) < abs(found.evidence([[3]])[0, 0]) / 2


@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60), min_size=1, max_size=5),
    st.lists(st.integers(0, VOCAB + 5), min_size=1, max_size=30),
    st.data(),
)
def test_a_module_says_the_same_whatever_other_modules_there_are(texts, asked, data):
    """Guarantee 9: to the bit, and independent of order; how long a text is, and how often it says it, is no matter."""
    known = [counts(*text) for text in texts]
    whole = Lexicon.of(known, GENERAL)
    said = whole.evidence([asked])[0]
    for owner, one in enumerate(known):
        assert torch.equal(Lexicon.of([one], GENERAL).evidence([asked])[0, 0], said[owner])
    order = data.draw(st.permutations(range(len(known))))
    assert torch.equal(Lexicon.of([known[i] for i in order], GENERAL).evidence([asked])[0], said[list(order)])
    left = sorted(data.draw(st.sets(st.sampled_from(range(len(known))), min_size=1)))
    rest = whole.without(left)
    assert torch.equal(rest.evidence([asked])[0], said[left])
    assert rest.num_bytes() == Lexicon.of([known[i] for i in left], GENERAL).num_bytes()
    torch.testing.assert_close(whole.evidence([asked * 10])[0], whole.evidence([asked * 30])[0])


def test_a_few_tokens_count_as_what_they_are():
    """One token says as much as it does among ten, and no more: half a word must not decide."""
    found = Lexicon.of([LAW], GENERAL)
    one, ten, many = (float(found.evidence([[3] * n])[0, 0]) for n in (1, 10, 50))
    assert ten == pytest.approx(10 * one, rel=1e-5)
    assert many == pytest.approx(ten, rel=1e-5)
    assert found.evidence([[], [VOCAB + 3]]).tolist() == [[0], [0]]


def test_tokens_of_frames_say_nothing_wherever_they_stand():
    framed = counts(*[3] * 50, *[4] * 30, *[1] * 20, *[9] * 400)
    with_frames = Lexicon.of([framed, DRUGS, counts(9, 9)], GENERAL, [9, VOCAB + 2])
    without = Lexicon.of([LAW, DRUGS, None], GENERAL)
    found = with_frames.evidence([[9, 3, 9, 4], [9], [7]])
    assert torch.equal(found, without.evidence([[3, 4], [], [7]]))


def test_it_can_be_kept_where_no_token_is_silent():
    """What is kept holds no empty tensor: it would be read as damaged, and made anew at every opening."""
    found = Lexicon.of([LAW], GENERAL)
    require_kinds(Path("lexicon"), found.tensors | {"members": torch.ones(1, dtype=torch.uint8)}, lexicon._KINDS)
    assert found.evidence([[VOCAB - 1, 3]])[0, 0] != found.evidence([[3]])[0, 0]  # the last token is not silent


def test_of_modules_without_words_there_is_no_lexicon():
    found = Lexicon.of([LAW, None], GENERAL)
    assert found.without([1]) is None
    assert found.without([0]).num_bytes() < found.num_bytes()


# In a store


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Store:
    """Two modules that carry their text, and one that does not; a base of random weights."""
    home = tmp_path_factory.mktemp("lexicon")
    store = make_store(home, modules={"letters": {}})
    for name, words in (("wine", "grape barrel vintage cellar"), ("ships", "anchor mast harbour keel")):
        a, b, c, d = words.split()
        text = "\n\n".join(f"The {a} of number {n} has a {b}, and its {c} lies by the {d}." for n in range(60))
        (home / f"{name}.txt").write_text(text)
        config = LearnConfig(kind="recall", separator="\n\n", sequence_length=32, admit_anyway=True)
        learn(store, name, [home / f"{name}.txt"], config, progress=False)
    general = [
        store.load_tokenizer()(f"the weather of day {n} and what we had for lunch")["input_ids"] for n in range(20)
    ]
    with store.lock():
        store.router_files(GENERAL_SAMPLES).write(pack_samples(general, 1 << 20))
    return Store.open(home / "store")


def copy(made: Store, to: Path) -> Store:
    shutil.copytree(made.path.parent / "base", to / "base")
    return Store.open(shutil.copytree(made.path, to / "store"))


def scores(store: Store, text: str, *, words: bool = True, kind: str = "gaussian") -> dict[str, float]:
    base, ids = store.load_base(), store.load_tokenizer()(text)["input_ids"]
    router = load_router(store, kind=kind)
    (route,) = router.route(*router.states(base, [ids]), [ids] if words else None)
    return route.scores


def test_a_prompts_words_count_in_a_store(made):
    for name, other, text in (("wine", "ships", "vintage cellar"), ("ships", "wine", "mast harbour keel")):
        with_words, without = scores(made, text), scores(made, text, words=False)
        assert with_words[name] - with_words[other] > without[name] - without[other]
        assert with_words == scores(made, text, kind="product-key")
        with Engine(made) as engine:
            assert engine.route(text).scores == pytest.approx(with_words, rel=1e-4)


def test_it_is_kept_and_made_anew_when_modules_change(made, tmp_path, monkeypatch):
    store = copy(made, tmp_path)
    first = scores(store, "vintage cellar")
    file = store.router_files("lexicon")
    kept = file.digest()
    assert kept is not None
    with monkeypatch.context() as patch:
        patch.setattr(lexicon, "_made", lambda *_: pytest.fail("words were counted again"))
        assert scores(store, "vintage cellar") == first
    assert file.digest() == kept
    store.remove("ships")
    assert file.digest() is None  # nothing of its words is left
    alone = load_router(store).lexicon.tensors
    among = load_router(made, {"letters", "wine"}).lexicon.tensors
    assert alone.keys() == among.keys()
    assert all(torch.equal(tensor, among[key]) for key, tensor in alone.items())
    store.remove("wine")
    assert load_router(store).lexicon is None


def test_words_of_a_module_that_is_removed_meanwhile_are_not_kept(made, tmp_path, monkeypatch):
    store = copy(made, tmp_path)
    true = lexicon._made

    def removed_after_counting(*arguments):
        found = true(*arguments)
        monkeypatch.setattr(lexicon, "_made", true)
        for name in ("ships", "wine"):
            Store.open(store.path).remove(name)
        return found

    monkeypatch.setattr(lexicon, "_made", removed_after_counting)
    store.router_files("lexicon").drop()
    load_router(store)
    assert store.router_files("lexicon").digest() is None
    # What an earlier growlm, or a kill, may have left of it goes when the router is next read.
    with store.lock():
        store.router_files("lexicon").write(dict(load_router(made).lexicon.tensors))
    assert load_router(Store.open(store.path)).lexicon is None
    assert store.router_files("lexicon").versions() == []


def test_without_general_text_no_words_count(made, tmp_path):
    store = copy(made, tmp_path)
    store.router_files(GENERAL_SAMPLES).drop()
    assert load_router(store).lexicon is None
    assert store.router_files("lexicon").versions() == []
    with store.lock():
        store.router_files(GENERAL_SAMPLES).write({"other": torch.ones(3)})
    assert load_router(store).lexicon is None


def test_what_was_kept_is_read_without_opening_a_module(made, monkeypatch):
    first = load_router(made).lexicon
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made.module("wine")), "manifest", property(lambda self: pytest.fail("opened")))
        again = load_router(Store.open(made.path)).lexicon
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in first.tensors.items())
    assert load_router(made).num_bytes() > first.num_bytes() > 0


@pytest.mark.parametrize("damage", ["cut", "bytes", "other tensors", "missing"])
def test_a_damaged_text_is_left_out_and_not_kept(made, tmp_path, damage):
    store = copy(made, tmp_path)
    store.router_files("lexicon").drop()
    (text,) = store.module("wine").text_files
    file = store.module("wine").folder / text
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:50])
    elif damage == "bytes":
        file.write_bytes(whole[:-40] + bytes(40))
    elif damage == "other tensors":
        write_tensors(file, {"text": torch.zeros(0, dtype=torch.int32)})
    else:
        file.unlink()
    router = load_router(store)
    ids = store.load_tokenizer()("grape barrel mast harbour")["input_ids"]
    said = dict(zip(router.names, router.lexicon.evidence([ids])[0].tolist(), strict=True))
    assert said["wine"] == said["letters"] == 0
    assert said["ships"] != 0
    assert store.router_files("lexicon").digest() is None
    file.write_bytes(whole)
    assert load_router(store).lexicon.evidence([ids])[0, router.names.index("wine")] != 0


def test_a_damaged_lexicon_is_made_anew(made):
    first = scores(made, "vintage cellar")
    file = next((made.router_path / "lexicon").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    assert scores(made, "vintage cellar") == first
    assert made.verify() == []
