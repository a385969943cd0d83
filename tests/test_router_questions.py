"""What a router is shown besides passages: questions of a text's own words, and general text of several forms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growlm import LearnConfig
from growlm.errors import DataError
from growlm.router.evidence import SCALE, frames_of, read_general
from growlm.router.fitting import fit, gram_of
from growlm.router.gaussian import GaussianRouter
from growlm.router.interface import names_of
from growlm.training.corpus import TrainingCorpus
from growlm.training.general import FRAMES, ensure_general, framed_texts, shipped_forms
from growlm.training.questions import short_questions
from stores import domain_text, make_store

LAW = "The tenant of the upper floor shall pay the landlord twelve crowns on the first day of every quarter."
RECIPE = "Knead flour, butter and eggs; let the dough rest under a damp cloth until the oven glows."


def words(text: str) -> set[str]:
    return {word.strip(".,;?!").lower() for word in text.split()}


def test_questions_are_of_the_texts_words():
    asked = short_questions([LAW, RECIPE], 200, seed=0)
    assert len(asked) == 200
    own = [question for question in asked if words(question) & (words(LAW) | words(RECIPE))]
    assert own == asked
    assert len(set(asked)) > 100
    forms = words(" ".join(short_questions(["zzz"], 400, seed=1)))
    assert set.union(*map(words, asked)) <= words(LAW) | words(RECIPE) | forms  # whole ones
    for text in (LAW, RECIPE):
        assert sum(bool(words(q) & (words(text) - {"the", "of", "on"})) for q in asked) > 40


def test_questions_follow_their_seed():
    assert short_questions([LAW], 20, seed=3) == short_questions([LAW], 20, seed=3)
    assert short_questions([LAW], 20, seed=3) != short_questions([LAW], 20, seed=4)


@given(st.lists(st.text(max_size=80), max_size=4), st.integers(0, 12), st.integers(0, 99))
def test_any_text_has_questions_or_none(texts, count, seed):
    found = short_questions(texts, count, seed)
    assert len(found) in (0, count)
    assert all(question.strip() for question in found)


def test_a_text_without_spaces_is_cut():
    assert max(map(len, short_questions(["字" * 5000], 50, seed=0))) < 150


@pytest.mark.parametrize("apart", [True, False])
def test_a_domain_between_two_forms_of_general_text(apart):
    """One mean of questions and stories lies where neither is, and a domain may be: every form is a class."""
    draw = torch.Generator().manual_seed(0)
    width = 16
    side = torch.zeros(width)
    side[0] = 6.0

    def texts(centre: torch.Tensor, count: int) -> torch.Tensor:
        return ((centre + torch.randn(count, width, generator=draw)) * SCALE).round().to(torch.int16)

    vectors = texts(torch.zeros(width), 200)
    forms = [texts(side, 100), texts(-side, 100)]
    domain = {"sum": vectors.long().sum(0), "count": torch.tensor([200]), "heldout": texts(torch.zeros(width), 50)}
    general = {
        "vectors": torch.cat(forms),
        "forms": torch.tensor([100, 100] if apart else [200]),
        "heldout": torch.cat([texts(side, 25), texts(-side, 25)]),
        "frames": vectors[:0],
    }
    fitted = fit([lambda: domain], general, gram_of(vectors) + gram_of(general["vectors"]))
    router = GaussianRouter(["law"], *fitted, {"law": 0})
    asked = {name: texts(centre, 50).float() / SCALE for name, centre in (("a", side), ("b", -side))}
    none = sum(names_of(router.route_pooled(v)).count("none") for v in asked.values())
    own = names_of(router.route_pooled(texts(torch.zeros(width), 50).float() / SCALE)).count("law")
    assert (none + own > 140) is apart


@pytest.mark.parametrize(("shown", "others"), [(True, 0), (True, 100), (False, 0)])
def test_a_frame_that_all_of_a_domains_text_has_does_not_tell_it(shown, others):
    """A domain of framed questions, beside general text that has no frames: framed general text is general all the
    same, where it is known what a frame changes, however many other domains there are."""
    draw = torch.Generator().manual_seed(0)
    width, count = 16, 200
    frame, topic = 8 * torch.eye(width)[0], 4 * torch.eye(width)[1]

    def texts(centre: torch.Tensor, count: int) -> torch.Tensor:
        return ((centre + torch.randn(count, width, generator=draw)) * SCALE).round().to(torch.int16)

    own, other = texts(frame + topic, count), texts(torch.zeros(width), count)
    domain = {"sum": own.long().sum(0), "count": torch.tensor([count]), "heldout": texts(frame + topic, 50)}
    changes = ((frame + 0.2 * torch.randn(100, width, generator=draw)) * SCALE).round().to(torch.int16)
    general = {
        "vectors": other,
        "forms": torch.tensor([count]),
        "heldout": texts(torch.zeros(width), 50),
        "frames": changes if shown else changes[:0],
    }
    rest = [texts(5 * torch.randn(width, generator=draw) + 20 * torch.eye(width)[2], count) for _ in range(others)]
    more = [{"sum": v.long().sum(0), "count": torch.tensor([count]), "heldout": v[:50]} for v in rest]
    gram = torch.stack([gram_of(v) for v in (own, other, *rest)]).sum(0)
    names = ["law", *(f"other {number}" for number in range(others))]
    fitted = fit([lambda d=d: d for d in (domain, *more)], general, gram)
    router = GaussianRouter(names, *fitted, dict.fromkeys(names, 0))

    def chosen(centre: torch.Tensor, name: str) -> int:
        return names_of(router.route_pooled(texts(centre, 100).float() / SCALE)).count(name)

    assert chosen(frame + topic, "law") > 90
    assert chosen(torch.zeros(width), "none") > 90
    assert (chosen(frame, "none") > 80) is shown
    assert (chosen(topic, "law") > 80) is shown


def test_what_all_framed_texts_have_is_silent(tmp_path):
    store = make_store(tmp_path, modules={})
    base, tokenizer = store.load_base(), store.load_tokenizer()
    texts = framed_texts(base, tokenizer)
    assert len(texts) == 48
    assert {len(text.framed) for text in texts} == {len(FRAMES)}
    found = frames_of(base, texts, store.manifest.routing_layer)
    assert found["frames"].shape == (48 * len(FRAMES), base.hidden_size)
    assert found["frames"].abs().sum() > 0
    silent = set(found["silent"].tolist())
    assert set(tokenizer.encode("Question:")) & silent
    assert not any(set(text.plain) <= silent for text in texts)
    # What a frame changes has much in common for all texts.
    differences = found["frames"].float().view(48, len(FRAMES), -1)
    around = differences - differences.mean(0)
    assert around.square().sum() < 0.7 * differences.square().sum()
    # A store that was told of no frames reads as before.
    assert len(read_general(store)["frames"]) == 0
    (store.base_folder / "heldout.jsonl").unlink()
    ensure_general(store, base, tokenizer)
    assert torch.equal(read_general(store)["frames"], found["frames"])
    assert set(read_general(store)["silent"].tolist()) == silent


def test_the_sample_of_general_text_has_eight_forms(tmp_path):
    store = make_store(tmp_path, modules={})
    base, tokenizer = store.load_base(), store.load_tokenizer()
    forms = shipped_forms(base, tokenizer)
    assert set(forms) == {"articles", "asked", "exams", "news", "questions", "requests", "stories", "talk"}
    for name, (train, heldout) in forms.items():
        assert len(train) >= 3 * len(heldout) > 60, name
        assert not {tuple(text) for text in train} & {tuple(text) for text in heldout}, name
    assert shipped_forms(base, tokenizer) == forms
    base.vocab_size = 1  # a tokenizer that knows more tokens than the base has rows for
    assert shipped_forms(base, tokenizer) == {}
    (store.base_folder / "heldout.jsonl").unlink()
    with pytest.raises(DataError, match="sample of general text: too little text"):
        ensure_general(store, base, tokenizer)


def test_questions_of_which_the_base_has_no_row_are_left_out(tmp_path):
    store = make_store(tmp_path, modules={})
    base, tokenizer = store.load_base(), store.load_tokenizer()
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{domain_text("digits", n, words=30)}"}}\n' for n in range(40)))
    config = LearnConfig(sequence_length=16).on(0)
    tokens = TrainingCorpus.read([path], config).tokenized(tokenizer, config)
    whole, heldout = tokens.shown(base, config)
    assert len(whole) > len(tokens.questions[0]) == config.router_samples
    assert len(heldout) >= len(tokens.questions[1]) == 16
    own = replace(tokens, questions=([], [])).shown(base, config)
    base.vocab_size = 0
    assert tokens.shown(base, config) == own
