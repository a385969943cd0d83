"""Prompts as people write them, with the domain that each belongs to: passages, sentences that break off, questions.

Knows the folders of text and of tasks, and token ids; no router.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.domains import DOMAINS, GENERAL
from benchmarks.lib.facts import questions
from growlm import data as text_data

LONGEST = 64  # tokens of a prompt that is no passage
LENGTHS = (16, 32, 64, 200)  # tokens of the beginnings of passages
_TEXT = 200_000  # characters of a domain's training text that are asked about
_FEWEST = 24  # tokens of a passage
_NEWS = 60  # characters of a sentence of news, at the least

# What users of these domains might ask. No sentence is from their text.
QUESTIONS = {
    "law_dc_code": [
        "Who appoints the members of the board of the District of Columbia Housing Authority?",
        "What penalty does the D.C. Code set for operating a business without a licence?",
        "How long may a tenant withhold rent in the District before eviction begins?",
        "What must a notice of a public hearing contain under District law?",
        "Is a landlord in the District of Columbia allowed to keep a security deposit?",
        "What powers does the Council of the District of Columbia give the Mayor in an emergency?",
        "Which tax applies to the sale of alcoholic beverages in the District?",
        "What are the qualifications of a notary public under the statute?",
        "When does a certificate of need for a health facility expire?",
        "What is the statute of limitations for a claim against the District?",
        "How is the term 'public utility' defined in the code?",
        "May the Superior Court order restitution for a misdemeanor?",
    ],
    "german_novels": [
        "Wer war der alte Graf, und warum verließ er das Schloss?",
        "Was sagte der Förster, als das Mädchen an die Tür klopfte?",
        "Warum weinte die Mutter, als der Brief des Sohnes kam?",
        "Wie sah die Stube des Pfarrers aus?",
        "Weshalb reiste der junge Baron nach Wien?",
        "Was geschah in der Nacht auf dem Friedhof?",
        "Wen liebte Fräulein Adelheid wirklich?",
        "Woher kannte der Kapitän den Chinesen?",
        "Was stand in dem Testament des Onkels?",
        "Wohin ritt der Reiter durch den verschneiten Wald?",
        "Warum schwieg der Rittmeister so lange?",
        "Welches Geheimnis verbarg die alte Magd?",
    ],
    "shakespeare": [
        "Why doth Hamlet feign madness before the king?",
        "What news brings the messenger from Rome?",
        "Who murdered Banquo, and at whose command?",
        "How does Romeo learn of Juliet's death?",
        "What does Lear say when Cordelia is dead?",
        "Why does Iago hate Othello?",
        "What bond did Antonio make with Shylock?",
        "Who is Falstaff's companion at the tavern?",
        "What did the witches promise Macbeth?",
        "Wherefore is my lord of Gloucester so sad?",
        "Which of the suitors opens the leaden casket?",
        "What does Mark Antony tell the Romans of Caesar's will?",
    ],
    "bible_en_kjv": [
        "Who was the father of Isaac?",
        "What did the LORD say unto Moses out of the bush?",
        "How many days was Jonah in the belly of the fish?",
        "Which sons did Leah bear unto Jacob?",
        "What did Pilate ask of Jesus?",
        "Why did Cain slay his brother Abel?",
        "What gifts did the wise men bring?",
        "How long did David reign over Israel?",
        "Whom did Saul meet on the road to Damascus?",
        "What is the first commandment?",
        "What did the angel tell the shepherds?",
        "Who interpreted the dream of Nebuchadnezzar?",
    ],
    "finance_fed_speeches": [
        "What did the Federal Reserve do to support credit during the financial crisis?",
        "Why does the FOMC aim at two percent inflation?",
        "How do higher capital requirements make large banks safer?",
        "What role do community banks play in lending to small businesses?",
        "How did subprime mortgages spread losses through the financial system?",
        "What are the risks of a central bank digital currency?",
        "Why did long-term interest rates stay low while the federal funds rate rose?",
        "What does the Community Reinvestment Act ask of banks?",
        "How do stress tests assess the capital of bank holding companies?",
        "What explains the slowdown of labor productivity growth?",
        "How does monetary policy affect unemployment?",
        "What is the outlook for the U.S. economy this year?",
    ],
}
# The first is one of those that a router is shown, the other two are not.
FRAMES = {
    "framed": "Question: {}\nAnswer:",
    "otherwise framed": "Problem: {}\nSolution:",
    "as a dialogue": "User: {}\nAssistant:",
}
GREETINGS = [
    "Hi there!",
    "Hello, can you help me with something?",
    "Good morning. I have a question.",
    "Hey, it's me again.",
    "Thanks, that was useful. One more thing.",
    "Sorry to bother you so late.",
]
MEDICINE = {"anatomy", "clinical_knowledge", "college_medicine", "medical_genetics", "professional_medicine"}
OTHER_SUBJECTS = {
    "astronomy", "high_school_world_history", "marketing", "nutrition", "philosophy", "sociology", "world_religions",
}  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """Prompts of one form and origin.

    Attributes:
        form: `passage`, `sentence` (it breaks off), `gap` (a sentence with a gap), `question`, `other`, `news`,
            one of these in one of `FRAMES`, or two turns of a user.
        origin: the domain or task that they are from.
        wanted: the domain whose module should answer; None: no module.
        texts: token ids of each.
    """

    form: str
    origin: str
    wanted: str | None
    texts: list[list[int]]

    @property
    def name(self) -> str:
        return f"{self.form}, {self.origin}"


def all_prompts(data: Path, tokenizer: Any, count: int, seed: int) -> Iterator[Prompts]:
    """Every form of prompt of nine domains, and prompts that belong to none, `count` of each at most."""

    def of(form: str, origin: str, wanted: str | None, texts: Sequence[str], start: bool = True) -> Prompts:
        chosen = list(texts)
        random.Random(seed).shuffle(chosen)
        ids = tokenizer(chosen[:count], add_special_tokens=False)["input_ids"]
        return Prompts(form, origin, wanted, [i[:LONGEST] if start else i[-LONGEST:] for i in ids])

    for domain in DOMAINS:
        yield Prompts("passage", domain, domain, passages(data / domain / "test.txt", tokenizer, count, seed))
        if domain == "medical_qa":
            text = (data / domain / "test.txt").read_text()
            asked_of_medicine = re.findall(r"^Question: (.+)$", text, re.MULTILINE)
            yield of("question", domain, domain, asked_of_medicine)
            continue
        documents = [d.text for d in text_data.read([data / domain / "train.txt"], separator="\n\n").documents]
        random.Random(seed).shuffle(documents)
        asked = questions(_beginning(documents), [], count, seed)
        yield of("sentence", domain, domain, [q.context for q in asked], start=False)
        yield of("gap", domain, domain, [q.reworded.removesuffix("\nAnswer:") for q in asked])
        if domain in QUESTIONS:
            yield of("question", domain, domain, QUESTIONS[domain])

    def tasks(name: str, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / name / file).read_text().splitlines()]

    subjects = tasks("mmlu", "test.jsonl")
    medicine = [q["question"] for q in subjects if q["subject"] in MEDICINE]
    yield of("question", "mmlu of medicine", "medical_qa", medicine)
    sums = [q["question"] for q in tasks("gsm8k", "test.jsonl")]
    yield of("question", "gsm8k", "math_gsm8k", sums)
    yield of("question", "mbpp", "code_mbxp", [q["description"].strip() for q in tasks("mbpp", "mbpp.jsonl")])
    yield of("question", "xquad, vi", "vietnamese_wiki", [q["question"] for q in tasks("xquad", "vi.jsonl")])
    others = [q["question"] for q in subjects if q["subject"] in OTHER_SUBJECTS]
    yield Prompts("other", GENERAL, None, _novels(data, tokenizer, count, seed))
    yield of("other", "clinc150", None, [q["text"] for q in tasks("clinc150", "test.jsonl")])
    yield of("other", "boolq", None, [q["question"] for q in tasks("boolq_noctx", "test.jsonl")])
    yield of("other", "arc_easy", None, [q["question"] for q in tasks("arc_easy", "test.jsonl")])
    yield of("other", "mmlu of other subjects", None, others)
    yield of("other", "piqa", None, [q["question"] for q in tasks("piqa", "valid.jsonl")])
    yield of("other", "lambada", None, [q["text"] for q in tasks("lambada", "test.jsonl")])

    for form, frame in FRAMES.items():
        for origin, texts in (("medical_qa", asked_of_medicine), ("mmlu of medicine", medicine), ("gsm8k", sums)):
            domain = "math_gsm8k" if origin == "gsm8k" else "medical_qa"
            yield of(f"{form} question", origin, domain, [frame.format(text) for text in texts])
        for origin, file in (("arc_easy", "test.jsonl"), ("piqa", "valid.jsonl")):
            yield of(f"{form} other", origin, None, [frame.format(q["question"]) for q in tasks(origin, file)])
    # What a router sees of a conversation: the user's turns.
    requests = [q["text"] for q in tasks("clinc150", "test.jsonl")]
    of_domains = {
        "medical_qa": asked_of_medicine,
        "math_gsm8k": sums,
        "code_mbxp": [q["description"].strip() for q in tasks("mbpp", "mbpp.jsonl")],
        "law_dc_code": QUESTIONS["law_dc_code"],
        "finance_fed_speeches": QUESTIONS["finance_fed_speeches"],
        "bible_en_kjv": QUESTIONS["bible_en_kjv"],
    }
    for domain, asked_of in of_domains.items():
        yield of("greeting and question", domain, domain, _turns(GREETINGS, asked_of, seed))
        yield of("two questions", domain, domain, _turns(asked_of, asked_of, seed))
    yield of("greeting and other", "clinc150", None, _turns(GREETINGS, requests, seed))
    yield of("two others", "clinc150", None, _turns(requests, requests, seed))
    news = tasks("ntrex_en_de_vi", "all.jsonl")
    for language in ("en", "de", "vi"):
        yield of("news", f"ntrex, {language}", None, [row[language] for row in news if len(row[language]) > _NEWS])


def _turns(first: Sequence[str], second: Sequence[str], seed: int) -> list[str]:
    """Of each second text a conversation, in which it comes after one of the first."""
    draw = random.Random(seed)
    return [f"{draw.choice(first)}\n{text}" for text in second]


def passages(path: Path, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Passages of up to 200 tokens, of as many documents as there are."""
    documents = text_data.read([path], separator="\n\n").documents
    random.Random(seed).shuffle(documents)
    found: list[list[list[int]]] = []
    for document in documents[:count]:
        start = 0 if len(documents) >= count else 2000  # a whole book begins with its title
        ids = tokenizer(document.text[start : start + _TEXT], add_special_tokens=False)["input_ids"]
        found.append([ids[at : at + LENGTHS[-1]] for at in range(0, len(ids), LENGTHS[-1])])
    rounds = [[cut[n] for cut in found if n < len(cut) and len(cut[n]) >= _FEWEST] for n in range(count)]
    return [piece for some in rounds for piece in some][:count]


def _novels(data: Path, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    return [p[:LONGEST] for p in passages(data / GENERAL / "test.txt", tokenizer, count, seed)]


def _beginning(documents: Sequence[str]) -> list[str]:
    """The first documents, until they have so many characters."""
    total, chosen = 0, []
    for document in documents:
        chosen.append(document[: _TEXT - total])
        total += len(document)
        if total >= _TEXT:
            break
    return chosen
