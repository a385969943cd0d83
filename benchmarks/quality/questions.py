"""Knowledge, not style: questions about the text that a module was given, answered with and without module, memory and
retrieval.

Of every domain, questions with four answers each (`benchmarks.lib.facts`) about the first `--text` tokens of its
training text: half of them about the rows that its adapter was trained on (`benchmarks.quality.recall`), half about the
rest. They are asked as the text goes on or, with `--reworded`, in words after which the answer stands nowhere in it. An
answer is chosen by its log-probability a byte: answers to one question differ in length, and a plain sum favours short
ones; the sum is told beside it. A way is any of these, joined with +, or `base`:

    lora                     the adapter
    finetuned                all of the base trained on the adapter's rows (`benchmarks.quality.finetuned --keep`)
    joint                    all of the base trained on the rows of all domains (the same, with `--joint`)
    recall, recall-rows      a memory of the whole text, or of the rows that the adapter was trained on
    bm25-N, embedding-N      the N passages of the whole text that are nearest to the question put before it, the
                             nearest last

Each way of a domain is a file in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.questions --data DIR --base CHECKPOINT --adapters recall/ --out questions/
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.answering import answered
from benchmarks.lib.common import kept, machine, same_settings, slug
from benchmarks.lib.domains import DOMAINS
from benchmarks.lib.facts import Question, questions
from benchmarks.lib.published import LENGTH
from benchmarks.lib.retrieval import Bm25, Embedding, Encoder, Index, cut
from benchmarks.quality.recall import Adapters
from growlm import data as text_data
from growlm.base import Base
from growlm.base.checkpoint import fingerprint, load_model
from growlm.disk.tensors import read_tensors
from growlm.layers.recall import FEATURES, LEVELS
from growlm.modules import KnowledgeModule, ModuleSet, kind_of
from growlm.progress import reporting, track
from growlm.recall.text import RecalledText
from growlm.training.config import AUTO
from growlm.training.recalling import remember
from growlm.units import format_size, parse_count

ASKED = ("medical_qa",)  # domains that are questions and answers by themselves
WAYS = [
    "base", "lora", "recall", "recall-rows", "lora+recall", "lora+recall-rows", "bm25-1", "bm25-3", "embedding-1",
    "embedding-3", "lora+bm25-1", "recall+bm25-1", "finetuned", "joint",
]  # fmt: skip
WHOLE = {"finetuned", "joint"}  # ways that are a base of their own
CONTEXT = 96  # tokens before an answer, at the most
PASSAGE = 100  # tokens of a passage that is found
WRITTEN = 8  # tokens of an answer, at the most, that is looked for in what is written
FITTING = 6000  # held-out tokens that a memory's gates may be fitted on


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        scores: log-probabilities of the choices in nats, the true one first.
        sizes: bytes of each.
        written: whether greedy decoding would have written the true one; None where that is long.
        found: whether a passage before the question has the answer after the words before it; None without passages.
        seconds: to find passages and to score all choices.
    """

    scores: list[float]
    sizes: list[int]
    written: bool | None
    found: bool | None
    seconds: float

    @property
    def right(self) -> bool:
        """By log-probability a byte."""
        return _first([score / size for score, size in zip(self.scores, self.sizes, strict=True)])

    @property
    def right_in_sum(self) -> bool:
        return _first(self.scores)


def _first(scores: Sequence[float]) -> bool:
    return scores[0] > max(scores[1:])


class Domain:
    """One domain's text, what is asked of it, and all that answers."""

    def __init__(self, name: str, adapters: Adapters, a: argparse.Namespace) -> None:
        self.name, self.adapters, self.a = name, adapters, a
        self.tokenizer = adapters.tokenizer
        self._modules: dict[frozenset[str], tuple[KnowledgeModule | None, dict[str, Any]]] = {}
        trained = a.adapters and a.adapters / "adapters" / slug(name, a.seed, a.rate)
        self.folder: Path | None = trained
        if trained and not (trained / "training.json").exists():
            raise SystemExit(
                f"{trained}: holds no adapter; train it with benchmarks.quality.recall, or leave {name} out"
            )

    @cached_property
    def packed(self) -> np.ndarray:
        """The rows (n, LENGTH + 1) of the text."""
        documents = self.adapters.documents(self.name, "train")
        return text_data.pack(documents, self.tokenizer, LENGTH, max_tokens=self.a.text).tokens

    @cached_property
    def trained(self) -> dict[str, Any]:
        assert self.folder is not None
        return json.loads((self.folder / "training.json").read_text())

    @cached_property
    def whole(self) -> list[np.ndarray]:
        """Token ids of the documents, each with its end."""
        stream = np.concatenate([self.packed[:, :-1].reshape(-1), self.packed[-1, -1:]])
        ends = np.flatnonzero(stream == self.tokenizer.eos_token_id)
        return [ids for ids in np.split(stream, ends + 1) if len(ids)]

    @cached_property
    def rows(self) -> list[np.ndarray]:
        return [] if self.folder is None else list(self.packed[self.trained["rows"]])

    @cached_property
    def passages(self) -> list[np.ndarray]:
        end = self.tokenizer.eos_token_id
        return cut([ids[ids != end] for ids in self.whole], PASSAGE)

    @cached_property
    def questions(self) -> list[Question]:
        def make() -> list[dict[str, Any]]:
            end = self.tokenizer.eos_token_id
            documents = [self._decoded(ids[ids != end]) for ids in self.whole]
            rows = [self._decoded(ids) for ids in self.rows]
            found = questions(documents, rows, self.a.questions, self.a.seed, asked=self.name in ASKED)
            return [asdict(question) for question in found]

        return [Question(**q) for q in kept(self.a.out, slug(self.name, "questions"), make)]

    def answers(self, way: str) -> dict[str, Any]:
        """As a file keeps them: what each question was answered, and the bytes of what answered."""
        parts = [part for part in way.split("+") if part != "base"]
        retrieved = [part for part in parts if "-" in part and part != "recall-rows"]
        with reporting(f"{self.name}, {way}"):
            module, made = self._module(frozenset(p for p in parts if p not in (*retrieved, *WHOLE)))
            base, size = self.adapters.base, 0
            for part in sorted(WHOLE & set(parts)):
                base, spent = self._finetuned("joint" if part == "joint" else self.name)
                made, size = {**made, part: spent}, base.num_bytes()
            modules = ModuleSet(base, [] if module is None else [module])
            index, count = (None, 0) if not retrieved else self._retriever(*retrieved)
            asked = track(self.questions, "answering", "questions", total=len(self.questions))
            answers = [self._answer(modules, question, index, count) for question in asked]
        sizes = _sizes(module)
        sizes["module"] += size
        if index is not None:
            text = sum(len(self._decoded(ids).encode()) for ids in self.passages)
            sizes = {
                **sizes,
                "text": sizes["text"] + text,
                "index": sizes["index"] + index.num_bytes,
                "encoder": index.encoder_bytes,
            }
            made = {**made, "index": index.seconds}
        return {"answers": [asdict(answer) for answer in answers], "bytes": sizes, "made": made}

    def _answer(self, modules: ModuleSet, question: Question, index: Index | None, count: int) -> Answer:
        start = time.perf_counter()
        asked = question.reworded if self.a.reworded else question.context
        ids = self._encoded(asked)[-CONTEXT:]
        context, found = [*text_data.start_tokens(self.tokenizer)], None
        if index is not None:
            numbers = index.best(asked, count)[::-1]
            for number in numbers:
                context += [*self.passages[number].tolist(), *self._encoded("\n\n")]
            found = any(question.fact in self._decoded(self.passages[number]) for number in numbers)
        choices = [self._encoded(choice) for choice in question.choices]
        result = answered(modules, [*context, *ids], choices)
        return Answer(
            result.scores,
            [len(choice.encode()) for choice in question.choices],
            result.written[0] if len(choices[0]) <= WRITTEN else None,
            found,
            time.perf_counter() - start,
        )

    def _finetuned(self, name: str) -> tuple[Base, float]:
        """The one that was best on held-out text, and the seconds that it trained."""

        def valid(cell: dict[str, Any]) -> float:
            return cell["domains"][self.name]["valid"] if name == "joint" else cell["valid"]

        cells = [json.loads(p.read_text()) for p in (self.a.finetuned / "results").glob(f"{name}-{self.a.seed}-*")]
        if not cells:
            raise SystemExit(
                f"{self.a.finetuned}: holds no finetuned model of {name}; leave {', '.join(sorted(WHOLE))} out"
            )
        best = min(cells, key=valid)
        folder = self.a.finetuned / "models" / slug(name, self.a.seed, best["rate"])
        return Base(load_model(folder, "float32"), str(folder)), best["seconds"]

    def _module(self, parts: frozenset[str]) -> tuple[KnowledgeModule | None, dict[str, Any]]:
        """The module that has these parts, if any, and how it was made; made once."""
        if parts not in self._modules:
            self._modules[parts] = self._made(parts)
        return self._modules[parts]

    def _made(self, parts: frozenset[str]) -> tuple[KnowledgeModule | None, dict[str, Any]]:
        base = self.adapters.base
        memory = parts & {"recall", "recall-rows"}
        if unknown := parts - {"lora", *memory}:
            raise SystemExit(f"--ways: {', '.join(sorted(unknown))} is not known; known are {', '.join(WAYS)}")
        if not parts:
            return None, {}
        made: dict[str, Any] = {"adapter": self.trained["seconds"]} if "lora" in parts else {}
        if "lora" in parts:
            assert self.folder is not None
            kind = kind_of("lora")
            config = kind.Config(**{**self.trained["config"], "recall": bool(memory)})
            tensors = read_tensors(self.folder / "module.safetensors")
            if memory:
                tensors["memory.gates"] = base.head_weight.new_zeros(len(LEVELS), FEATURES)
            module = kind.restore(base, config, tensors, str(self.folder))
        else:
            kind = kind_of("recall")
            module = kind.create(base, kind.Config())
        if not memory:
            return module, made
        start = time.perf_counter()
        documents = self.whole if "recall" in memory else self.rows
        text = RecalledText.of(((f"{self.name}:{n}", ids) for n, ids in enumerate(documents)), base.vocab_size)
        fitted = remember(module, text, base, self.adapters.passages(self.name, "valid", FITTING))
        return module, {**made, "memory": time.perf_counter() - start, "fit": fitted.to_json()}

    def _retriever(self, way: str) -> tuple[Index, int]:
        kind, _, count = way.rpartition("-")
        if kind not in ("bm25", "embedding") or not count.isdigit() or not 0 < int(count) <= len(self.passages):
            raise SystemExit(f"--ways: {way} is not known; retrieval is bm25-N or embedding-N with N passages")
        return (self._bm25 if kind == "bm25" else self._embedding), int(count)

    @cached_property
    def _bm25(self) -> Bm25:
        return Bm25([self._decoded(ids) for ids in self.passages])

    @cached_property
    def _embedding(self) -> Embedding:
        vectors = self.a.out / "index" / f"{self.name}.safetensors"
        return Embedding([self._decoded(ids) for ids in self.passages], Encoder(self.a.encoder), vectors)

    def _encoded(self, text: str) -> list[int]:
        return text_data.encode_texts(self.tokenizer, [text])[0]

    def _decoded(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _sizes(module: KnowledgeModule | None) -> dict[str, int]:
    """Bytes of what is trained, of the text that is carried, and of its index."""
    sizes = {"module": 0 if module is None else module.num_bytes(), "text": 0, "index": 0}
    if module is not None and module.memory is not None and module.memory.text is not None:
        for part in module.memory.text.parts:
            for name, tensor in part.tensors().items():
                sizes["text" if name in ("text", "names", "name_ends") else "index"] += tensor.nbytes
    return sizes


# What is told


@dataclass(frozen=True)
class Cell:
    """A way's answers to the questions of one domain, or of several together."""

    questions: list[Question]
    answers: list[Answer]
    bytes: dict[str, int]
    seconds: float  # that it took to make what answers

    @classmethod
    def joined(cls, cells: Sequence[Cell]) -> Cell:
        each = [q for cell in cells for q in cell.questions], [x for cell in cells for x in cell.answers]
        sizes = {name: sum(cell.bytes.get(name, 0) for cell in cells) for name in cells[0].bytes}
        return cls(*each, sizes, sum(cell.seconds for cell in cells))

    @property
    def right(self) -> np.ndarray:
        return np.array([answer.right for answer in self.answers], dtype=float)

    def share(self, of: Callable[[Answer], bool | None], where: Callable[[Question], bool] = lambda _: True) -> str:
        """In percent, with half of its 95 % interval, of those answers that are asked."""
        values = [of(answer) for q, answer in zip(self.questions, self.answers, strict=True) if where(q)]
        return percent([float(v) for v in values if v is not None])

    def against(self, other: Cell | None) -> str:
        return "" if other is None else percent((self.right - other.right).tolist(), "+")


def percent(values: Sequence[float], sign: str = "") -> str:
    """Mean and half of its 95 % interval, of paired differences with a sign: as with four answers more, two of them
    right, so that few answers that are all alike do not seem sure (Agresti and Coull 1998)."""
    if not values:
        return ""
    more = [*values, *([-1.0, 0.0, 0.0, 1.0] if sign else [0.0, 0.0, 1.0, 1.0])]
    half = 1.96 * statistics.pstdev(more) / math.sqrt(len(more))
    return f"{100 * statistics.fmean(values):{sign}.1f} ± {100 * half:.1f}"


OFTEN: dict[str, Callable[[int], bool]] = {
    "once": lambda times: times <= 1,
    "2-5 times": lambda times: 2 <= times <= 5,
    "more": lambda times: times > 5,
}


def report(cells: dict[tuple[str, str], Cell]) -> str:
    """Two tables in Markdown, by domain and way."""
    columns = [
        "right", "right by sum", "written", "against base", "against lora", "in rows trained on", "elsewhere",
        "passage has it", "ms a question", "s to make", "module", "text", "index", "encoder",
    ]  # fmt: skip
    lines = _head(["domain", "way", "questions", *columns])
    for (domain, way), cell in cells.items():
        base, lora = cells.get((domain, "base")), cells.get((domain, "lora"))
        row = [
            cell.share(lambda x: x.right),
            cell.share(lambda x: x.right_in_sum),
            cell.share(lambda x: x.written),
            cell.against(base) if way != "base" else "",
            cell.against(lora) if way not in ("base", "lora") else "",
            cell.share(lambda x: x.right, lambda q: q.trained),
            cell.share(lambda x: x.right, lambda q: not q.trained),
            cell.share(lambda x: x.found),
            f"{1000 * statistics.median(x.seconds for x in cell.answers):.0f}",
            f"{cell.seconds:.0f}" if cell.seconds else "",
            *(format_size(size) if (size := cell.bytes.get(name, 0)) else "" for name in columns[-4:]),
        ]
        lines.append(_row([domain, way, str(len(cell.answers)), *row]))
    lines += ["", *_head(["domain", "way", *(f"fact {o}" for o in OFTEN), *(f"answer {o}" for o in OFTEN)])]
    for (domain, way), cell in cells.items():
        row = [_of(cell, lambda q, f=f: f(q.times)) for f in OFTEN.values()]
        row += [_of(cell, lambda q, f=f: f(q.answers)) for f in OFTEN.values()]
        lines.append(_row([domain, way, *row]))
    return "\n".join(lines)


def _of(cell: Cell, where: Callable[[Question], bool]) -> str:
    many = sum(map(where, cell.questions))
    return f"{cell.share(lambda x: x.right, where)} of {many}" if many else ""


def _head(columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [_row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a domain, with train and valid.txt")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint, as growlm convert makes one")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument(
        "--adapters", type=Path, help="what benchmarks.quality.recall left; without, no lora and no rows"
    )
    parser.add_argument(
        "--encoder", type=Path, help="a sentence encoder (BERT, mean of its states); without, no embedding"
    )
    parser.add_argument("--finetuned", type=Path, help="what benchmarks.quality.finetuned left; without, none of it")
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--questions", type=int, default=200, help="a domain")
    parser.add_argument("--reworded", action="store_true", help="ask in words after which the text has no answer")
    parser.add_argument("--text", type=parse_count, default=400_000, help="that the whole text has, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the questions, and of the adapters")
    parser.add_argument("--rate", default=AUTO, help="of the adapters, as they were trained")
    a = parser.parse_args()
    given = {"lora": a.adapters, "rows": a.adapters, "embedding": a.encoder, **dict.fromkeys(WHOLE, a.finetuned)}
    ways = [way for way in a.ways if all(there for name, there in given.items() if name in way)]
    names = ("text", "questions", "seed", "rate")
    settings = {"base": fingerprint(a.base), "rows": bool(a.adapters), **{name: getattr(a, name) for name in names}}
    same_settings(a.out, settings)
    adapters = Adapters(a)
    cells: dict[tuple[str, str], Cell] = {}
    for name in a.domains:
        domain = Domain(name, adapters, a)
        for way in ways:
            found = kept(
                a.out, slug(name, way, *["reworded"] * a.reworded), lambda domain=domain, way=way: domain.answers(way)
            )
            answers = [Answer(**answer) for answer in found["answers"]]
            seconds = sum(spent for part, spent in found["made"].items() if part != "fit")
            cells[name, way] = Cell(domain.questions, answers, found["bytes"], seconds)
    if len(a.domains) > 1:
        for way in ways:
            cells["all", way] = Cell.joined([cells[name, way] for name in a.domains])
    print(f"{machine()}; {'reworded; ' * a.reworded}in percent, with 95 % intervals\n\n{report(cells)}")


if __name__ == "__main__":
    main()
