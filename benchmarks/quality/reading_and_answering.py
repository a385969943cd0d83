"""Whether a module that reads a question no better than the base does answers it no better either.

Of questions with known answers, the module reads each (the newest 64 tokens, as `--second-look` does) and answers it,
as does the base: the module of the question's domain, or where it has none, the one that the router chose. An answer's
gain is in nats: of the right one among the choices, where there are some, else of the answer's first 64 tokens. Told
are the gains of questions that are read better, and of those that are not, with 95 % intervals by bootstrap, and
Spearman's correlation of both gains. Each origin is a file in OUT, so that a run that was stopped goes on.

Left out is mbpp: its problems are learned in other languages (code_mbxp).

python -m benchmarks.quality.reading_and_answering STORE --data DIR --out answers/ [--questions 200]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.common import kept, machine, same_settings, slug
from benchmarks.lib.prompts import MEDICINE, OTHER_SUBJECTS
from growlm import data as text_data
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.engine.second_look import newest
from growlm.evaluation.statistics import Bootstrap
from growlm.modules import ModuleSet
from growlm.modules.scoring import passage_losses
from growlm.progress import reporting, track
from growlm.store import Store

ANSWERED = 64  # tokens of an answer that are counted
_FRAMES = {"en": "Question: {}\nAnswer:", "vi": "Câu hỏi: {}\nTrả lời:", "de": "Frage: {}\nAntwort:"}


@dataclass(frozen=True)
class Question:
    """What is asked, the answers that there are to choose from (one: it is the answer), and which of them is right."""

    prompt: str
    answers: Sequence[str]
    right: int = 0


@dataclass(frozen=True)
class Origin:
    """Questions of one origin, and the module that knows about them; None: no module does."""

    name: str
    module: str | None
    questions: list[Question]


def origins(data: Path, count: int, seed: int, framed: bool) -> Iterator[Origin]:
    """Questions of four domains, and of none, `count` of each at most; bare, a line each, or in a frame."""

    def put(question: str, answers: Sequence[str], right: int = 0, language: str = "en") -> Question:
        if not framed:
            return Question(f"{question}\n", answers, right)
        return Question(_FRAMES[language].format(question), [f" {answer}" for answer in answers], right)

    def of(name: str, module: str | None, found: Sequence[Question]) -> Origin:
        chosen = list(found)
        random.Random(seed).shuffle(chosen)
        return Origin(name, module, chosen[:count])

    def rows(path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / path).read_text().splitlines()]

    def choices(some: Sequence[dict[str, Any]]) -> list[Question]:
        return [put(row["question"], row["choices"], row["answer"]) for row in some]

    text = (data / "medical_qa" / "test.txt").read_text()
    asked = re.findall(r"^Question: (.+)\nAnswer: (.+)$", text, re.MULTILINE)
    yield of("medical_qa", "medical_qa", [put(q, [a]) for q, a in asked])
    subjects = rows("mmlu/test.jsonl")
    medicine = [row for row in subjects if row["subject"] in MEDICINE]
    yield of("mmlu of medicine", "medical_qa", choices(medicine))
    sums = [put(row["question"], [row["answer"]]) for row in rows("gsm8k/test.jsonl")]
    yield of("gsm8k", "math_gsm8k", sums)
    for language, module in (("vi", "vietnamese_wiki"), ("de", "german_novels")):
        asked_in = rows(f"xquad/{language}.jsonl")
        some = [put(row["question"], [_first(row["answers"])], language=language) for row in asked_in]
        yield of(f"xquad, {language}, without its passage", module, some)
    others = [row for row in subjects if row["subject"] in OTHER_SUBJECTS]
    yield of("mmlu of other subjects", None, choices(others))
    yield of("arc_easy", None, choices(rows("arc_easy/test.jsonl")))
    yield of("piqa", None, choices(rows("piqa/valid.jsonl")))


def _first(answers: Any) -> str:
    found = answers[0] if isinstance(answers, list) else answers["text"][0]
    return str(found)


def gains(engine: Engine, origin: Origin) -> list[dict[str, Any]]:
    """Of each question that a module answers, what it gains on the base in reading, nats a token, and in answering."""
    start = text_data.start_tokens(engine.tokenizer)
    prompts = [[*start, *engine.tokenizer.encode(q.prompt, add_special_tokens=False)] for q in origin.questions]
    names: list[str | None] = [origin.module] * len(prompts)
    if origin.module is None:
        for number, prompt in enumerate(prompts):
            states, _ = engine.router.states(engine.base, [prompt])
            names[number] = engine.router.route(states, None, [prompt])[0].module
    base = ModuleSet(engine.base)
    found = []
    for name in sorted({name for name in names if name is not None}):
        numbers = [number for number, chosen in enumerate(names) if chosen == name]
        seen = [newest(prompts[number], len(start)) for number in numbers]
        some = [origin.questions[number] for number in numbers]
        with engine.modules.using([name]) as held:
            modules = ModuleSet(engine.base, [held[name]])
            read = passage_losses(base, seen) - passage_losses(modules, seen)
            asked = [prompts[number] for number in numbers]
            lost = [_nats(each, engine.tokenizer, asked, some) for each in (base, modules)]
            del modules
        for at, number in enumerate(numbers):
            gain = {"read": float(read[at]) / (len(seen[at]) - 1), "answered": lost[0][at] - lost[1][at]}
            found.append({"question": number, "module": name, **gain})
    return sorted(found, key=lambda row: int(row["question"]))


def _nats(
    modules: ModuleSet, tokenizer: Any, prompts: Sequence[list[int]], questions: Sequence[Question]
) -> list[float]:
    """What the right answers cost: among the choices, or where there are none, by themselves."""
    texts, counted, owners = [], [], []
    for number, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        for answer in question.answers:
            ids = tokenizer.encode(answer, add_special_tokens=False)[:ANSWERED]
            texts.append([*prompt, *ids])
            counted.append([False] * len(prompt) + [True] * len(ids))
            owners.append(number)
    losses = passage_losses(modules, texts, counted=counted)
    return [
        among(losses[torch.tensor([owner == number for owner in owners])], question.right)
        for number, question in enumerate(questions)
    ]


def among(losses: torch.Tensor, right: int) -> float:
    """Log-loss of the right one among answers (n,) of these log-losses; of a single answer, its own."""
    return float(losses[0] if len(losses) == 1 else -torch.log_softmax(-losses, 0)[right])


def told(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the questions that are read better, and of the others, how many there are and what is gained in answering."""
    parts = {"better": [r for r in rows if r["read"] > 0], "no better": [r for r in rows if r["read"] <= 0]}
    result: dict[str, Any] = {}
    for part, some in parts.items():
        gained = torch.tensor([row["answered"] for row in some], dtype=torch.float64)
        result[part] = {"questions": len(some)}
        if len(some) > 1:
            interval = Bootstrap.interval(Bootstrap([len(some)]).sums(0, gained) / len(some))
            result[part] |= {"answered": float(gained.mean()), "interval": interval}
    if len(rows) > 2:
        result["spearman"] = rank_correlation([r["read"] for r in rows], [r["answered"] for r in rows])
    return result


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; equal numbers share their mean rank."""
    ranks = []
    for values in (one, other):
        numbers = torch.tensor(values, dtype=torch.float64)
        less = (numbers[None] < numbers[:, None]).sum(1)
        ranks.append(less.double() + (numbers[None] == numbers[:, None]).sum(1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="of modules that have the names of the domains in DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200, help="of each origin, at most")
    parser.add_argument("--framed", action="store_true", help='as "Question: ... Answer:", which some modules learned')
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    store = Store.open(a.store)
    asked = list(origins(a.data, a.questions, a.seed, a.framed))
    if missing := sorted({origin.module for origin in asked if origin.module} - store.modules.keys()):
        raise SystemExit(f"{a.store}: holds no {', '.join(missing)}")
    settings = {"questions": a.questions, "framed": a.framed, "seed": a.seed}
    same_settings(a.out, {"base": store.manifest.base_fingerprint, **settings})
    with reporting("reading and answering", True), Engine(store) as engine:
        found = {
            origin.name: told(kept(a.out, slug(origin.name), partial(gains, engine, origin)))
            for origin in track(asked, "origins", "origins")
        }
    print("| questions | read better | answered, nats | no better | answered, nats | Spearman |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, of in found.items():
        cells = [text for part in ("better", "no better") for text in (str(of[part]["questions"]), _shown(of[part]))]
        print(
            f"| {name} | {' | '.join(cells)} | {of['spearman']:.2f} |" if "spearman" in of else f"| {name} | too few |"
        )
    result = {"machine": machine(), "base": store.manifest.base, "settings": settings, "origins": found}
    write_atomic(a.out / "reading_and_answering.json", json.dumps(result, indent=1).encode())


def _shown(of: dict[str, Any]) -> str:
    if "answered" not in of:
        return ""
    low, high = of["interval"]
    return f"{of['answered']:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
