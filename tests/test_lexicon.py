"""The lexicon: words of modules that carry their text, beside what the base makes of a prompt."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlm import Engine, LearnConfig, Store, learn
from growlm.router import load_router
from growlm.router.lexicon import Lexicon
from stores import make_store

VOCAB = 40


def counts(*tokens: int) -> np.ndarray:
    return np.bincount(tokens, minlength=VOCAB)


LAW, DRUGS, GENERAL = counts(*[3] * 50, *[4] * 30, *[1] * 20), counts(*[7] * 60, *[1] * 40), counts(*[1] * 90, 2, 3)


def test_words_speak_for_the_module_in_whose_text_they_are():
    found = Lexicon.of([LAW, DRUGS, None], GENERAL)
    law, drugs, both, general, unknown = found.evidence([[3, 4], [7], [3, 7], [2, 2], [39]]).tolist()
    assert law[0] > 5
    assert law[1] < -20
    assert drugs[1] > 5
    assert drugs[0] < -20
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
    torch.testing.assert_close(whole.evidence([asked * 3])[0], said)


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
    return Store.open(home / "store")


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


def test_it_is_kept_and_made_anew_when_modules_change(made, tmp_path):
    store = Store.open(shutil.copytree(made.path, tmp_path / "store"))
    shutil.copytree(made.path.parent / "base", tmp_path / "base")
    first = scores(store, "vintage cellar")
    file = store.router_files("lexicon")
    kept = file.digest()
    assert kept is not None
    assert scores(store, "vintage cellar") == first
    assert file.digest() == kept
    store.remove("ships")
    assert file.digest() is None  # nothing of its words is left
    alone = load_router(store).lexicon.evidence([[5, 6, 7]])
    among = load_router(made, {"letters", "wine"}).lexicon.evidence([[5, 6, 7]])
    assert torch.equal(alone, among)
    store.remove("wine")
    assert load_router(store).lexicon is None


def test_a_damaged_text_is_left_out_and_not_kept(made, tmp_path):
    store = Store.open(shutil.copytree(made.path, tmp_path / "store"))
    shutil.copytree(made.path.parent / "base", tmp_path / "base")
    store.router_files("lexicon").drop()
    (text,) = store.module("wine").text_files
    file = store.module("wine").folder / text
    file.write_bytes(file.read_bytes()[:50])
    lexicon = load_router(store).lexicon
    names = load_router(store).names
    assert lexicon.evidence([[1, 2, 3]])[0, names.index("wine")] == 0
    assert lexicon.evidence([[1, 2, 3]])[0, names.index("ships")] != 0
    assert store.router_files("lexicon").digest() is None


def test_a_damaged_lexicon_is_made_anew(made):
    first = scores(made, "vintage cellar")
    file = next((made.router_path / "lexicon").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    assert scores(made, "vintage cellar") == first
    assert made.verify() == []
