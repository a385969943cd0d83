"""The store as a model of lm-evaluation-harness: its requests one by one, and real tasks from local files."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from growlm.engine import Engine
from growlm.errors import ConfigError, UnknownModuleError
from growlm.evaluation.harness import HarnessModel
from growlm.modules import ModuleSet
from growlm.store import Store
from stores import PLAIN, domain_text, make_store

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CONTEXTS = [domain_text(d, 990) for d in ("letters", "digits", "general")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("made")
    make_store(home, modules={name: {"strength": 0.02, "steps": 30} for name in PLAIN})
    return home


@pytest.fixture
def model(home) -> HarnessModel:
    return HarnessModel(str(home / "store"), max_length=200)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def score_by_hand(store: Store, name: str | None, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    base = store.load_base()
    modules = ModuleSet(base, [] if name is None else [store.load(name, base)])
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = modules.logits(ids)[0, len(context) - 1 : -1].double().log_softmax(-1)
    total = sum(float(row[token]) for row, token in zip(logits, continuation, strict=True))
    return total, logits.argmax(-1).tolist() == continuation


def test_continuations_are_scored_under_the_module_of_their_context(model, home):
    store = Store.open(home / "store")
    asked = [(c, " " + domain_text(d, 7, words=2)) for c in CONTEXTS for d in ("letters", "digits")]
    found = model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    names = ["letters", "letters", "digits", "digits", None, None]
    encode = model.tokenizer.encode
    for (context, continuation), name, (value, greedy) in zip(asked, names, found, strict=True):
        before = encode(context)
        wanted = score_by_hand(store, name, before, encode(context + continuation)[len(before) :])
        assert value == pytest.approx(wanted[0], rel=1e-4)
        assert greedy == wanted[1]


def test_what_greedy_decoding_writes_is_greedy(model):
    with Engine(model.engine.store) as engine:
        answer = engine.generate(CONTEXTS[0], max_new_tokens=4)
    (score,) = model._loglikelihood_tokens([(("", ""), model.tok_encode(CONTEXTS[0]), answer.tokens)])
    assert score[1] is True
    (other,) = model._loglikelihood_tokens([(("", ""), model.tok_encode(CONTEXTS[0]), [*answer.tokens[::-1], 5])])
    assert other[1] is False


def test_a_rolled_text_is_its_whole_log_probability(model, home):
    store, text = Store.open(home / "store"), domain_text("digits", 993, words=8)
    ids = model.tokenizer.encode(text)
    wanted, _ = score_by_hand(store, "digits", [model.prefix_token_id], ids)
    (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-4)
    model.max_length = 16
    (in_windows,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert in_windows == pytest.approx(wanted, rel=0.5)
    assert in_windows != found


def test_long_contexts_are_cut_on_the_left(model):
    model.max_length = 20
    long = model.tok_encode(CONTEXTS[1] * 3)
    cut, whole = model._score([(long[-18:], [5, 6, 7]), (long, [5, 6, 7])], ["digits", "digits"])
    assert cut == whole


def test_generated_text_is_the_engines_and_repeats_are_other_draws(model):
    plain = {"until": ["\n\n"], "max_gen_toks": 6}
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = [(CONTEXTS[0], plain), (CONTEXTS[1], plain), *[(CONTEXTS[0], drawn)] * 4]
    found = model.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    with Engine(model.engine.store) as engine:
        for text, context in zip(found[:2], CONTEXTS, strict=False):
            assert text == engine.generate(context, max_new_tokens=6, stop=("\n\n",)).text
    assert len(set(found[2:])) > 1
    assert found == model.generate_until(requests("generate_until", *asked), disable_tqdm=True)


def test_a_module_that_was_withdrawn_is_chosen_no_more(model, home):
    asked = requests("loglikelihood", (CONTEXTS[1], " 01"))
    Store.open(home / "store").remove("digits")
    ((value, _),) = model.loglikelihood(asked, disable_tqdm=True)
    ((again, _),) = HarnessModel(str(home / "store"), max_length=200).loglikelihood(asked, disable_tqdm=True)
    assert value == pytest.approx(again, rel=1e-4)
    # One that was chosen before.
    letters = requests("loglikelihood", (CONTEXTS[0], " ab"))
    before = model.loglikelihood(letters, disable_tqdm=True)
    Store.open(home / "store").remove("letters")
    assert model.loglikelihood(letters, disable_tqdm=True) != before
    rolled = requests("loglikelihood_rolling", (CONTEXTS[0],))
    assert model.loglikelihood_rolling(rolled, disable_tqdm=True)[0] < 0


def test_sampling_without_a_temperature_samples(model):
    def drawn(**settings) -> list[str]:
        asked = [(CONTEXTS[0], {"until": [], "max_gen_toks": 12, **settings})] * 4
        return model.generate_until(requests("generate_until", *asked), disable_tqdm=True)

    found = drawn(do_sample=True)
    assert len(set(found)) > 1
    assert found == drawn(do_sample=True, temperature=1.0)
    for greedy in ({}, {"do_sample": True, "temperature": 0.0}, {"do_sample": False, "temperature": 1.0}):
        assert len(set(drawn(**greedy))) == 1


def test_a_length_beyond_the_learned_positions_is_refused(tmp_path):
    store = make_store(tmp_path, "gpt2", {}, max_position_embeddings=100)
    with pytest.raises(ConfigError, match=r"max_length is 101; .*base has 100 learned positions, give at most so many"):
        HarnessModel(str(store.path), max_length=101)
    model = HarnessModel(str(store.path), max_length=100)
    long = domain_text("digits", 1, words=60)
    ((value, _),) = model.loglikelihood(requests("loglikelihood", (long, " 01")), disable_tqdm=True)
    assert value < 0


def test_bad_arguments_are_one_line(home):
    with pytest.raises(ConfigError, match="'colour' is not known"):
        HarnessModel(str(home / "store"), colour="red")
    with pytest.raises(UnknownModuleError, match="no module 'nobody'"):
        HarnessModel(str(home / "store"), module="nobody")


# Real tasks


def choices(home: Path) -> dict:
    """Which text goes on with this beginning? Right is what the domain's own letters make."""
    rows = []
    for i in range(12):
        right, wrong = ("letters", "digits") if i % 2 else ("digits", "letters")
        options = [domain_text(right, 600 + i, words=3), domain_text(wrong, 600 + i, words=3)]
        rows.append({"question": domain_text(right, 900 + i), "choices": options, "answer": 0})
    path = home / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }


def majority(home: Path) -> dict:
    """Eight draws a question and the majority of them, as maj@8 is evaluated."""
    path = home / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": domain_text("digits", i), "answer": "0"}) + "\n" for i in range(3)))
    return {
        "task": "local_majority",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "repeats": 8,
        "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6},
        "filter_list": [
            {
                "name": "maj@8",
                "filter": [
                    {"function": "regex", "regex_pattern": "([0-4])", "fallback": "none"},
                    {"function": "majority_vote"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }


def evaluated(home: Path, monkeypatch, *tasks: dict, module: str = "auto") -> dict:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
    arguments = f"store={home}/store,module={module}"
    found = lm_eval.simple_evaluate(
        model="growlm", model_args=arguments, tasks=list(tasks), task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    assert found is not None
    return found["results"]


def test_the_harness_runs_choices_and_majorities_over_a_store(home, monkeypatch):
    found = evaluated(home, monkeypatch, choices(home), majority(home))
    assert found["local_choices"]["acc,none"] == 1.0
    assert 0 <= found["local_majority"]["exact_match,maj@8"] <= 1
    alone = evaluated(home, monkeypatch, choices(home), module="base")
    assert alone["local_choices"]["acc,none"] < 1.0


@pytest.mark.parametrize("silent", [False, True])
def test_it_says_how_far_it_is_unless_the_harness_says_nothing(model, monkeypatch, capsys, silent):
    monkeypatch.setattr("growlm.progress._LOG_SECONDS", 0.0)
    monkeypatch.setattr("growlm.progress._LEAST_SECONDS", 0.0)
    model.loglikelihood(requests("loglikelihood", (CONTEXTS[0], " abc")), disable_tqdm=silent)
    model.generate_until(requests("generate_until", (CONTEXTS[1], {"max_gen_toks": 2})), disable_tqdm=silent)
    told = capsys.readouterr().err
    for line in ("growlm: routing: 1 batch ", "growlm: scoring: 1 text ", "growlm: answering: 1 prompt "):
        assert (line in told) != silent
