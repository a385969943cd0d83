"""Tasks of lm-evaluation-harness before and after domains were learned: base, routed, finetuned.

A way is a store with the module that answers (`auto`: the router chooses), or a checkpoint alone. Of every task the
same items, drawn once, are answered by each way through the harness; a difference to the first way is paired by item,
with its 95 % interval by bootstrap. Choices are judged by log-probability a character (`acc_norm`) where they are texts
of their own; of tasks that have one answer, its log-probability in nats is told. Zero shots, prompts of our own words.

A task of which more than one row of a hundred stands in texts that the store's modules have learned is refused, unless
--allow-contaminated. Results are files in OUT, known by what was asked of whom, so that a run that was stopped goes on.

DIR holds a folder a task with JSON lines, as `growlm-lm-eval` reads them (docs/guides/eval.md), and for the others:
winogrande (question with _, choices, answer), codah (question, choices, answer), lambada (text), xquad (de.jsonl,
vi.jsonl: context, question, answers), gsm8k (question, answer), mbpp (prompt, canonical_solution).

python -m benchmarks.quality.tasks --data DIR --out tasks/ --ways base=brain:base routed=brain:auto finetuned=ft/
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from lm_eval.tasks import TaskManager

import growlm
from benchmarks.lib.common import kept, machine, slug
from growlm.base.checkpoint import fingerprint
from growlm.errors import GrowlmError
from growlm.evaluation.harness import HarnessModel
from growlm.evaluation.statistics import Bootstrap

_FILES = {
    "arc_easy": "arc_easy/test.jsonl",
    "piqa": "piqa/valid.jsonl",
    "winogrande": "winogrande/valid.jsonl",
    "codah": "codah/all.jsonl",
    "mmlu": "mmlu/test.jsonl",
    "lambada": "lambada/test.jsonl",
    "xquad_de": "xquad/de.jsonl",
    "xquad_vi": "xquad/vi.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
}
TASKS = [name for name in _FILES if name not in ("gsm8k", "mbpp")]
_XQUAD = {"xquad_de": ("Frage", "Antwort"), "xquad_vi": ("Câu hỏi", "Trả lời")}


def _one_answer(row: dict[str, Any], task: str) -> tuple[str, str]:
    """Prompt and the answer that goes on from it."""
    if task == "lambada":
        before, _, last = row["text"].strip().rpartition(" ")
        return before, f" {last}"
    if task == "gsm8k":
        return f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
    if task == "mbpp":
        return row["prompt"], row["canonical_solution"]
    question, answer = _XQUAD[task]
    first = row["answers"][0] if isinstance(row["answers"], list) else row["answers"]["text"][0]
    return f"{row['context']}\n{question}: {row['question']}\n{answer}:", f" {first}"


def rows_of(task: str, data: Path, items: int, seed: int) -> list[dict[str, Any]]:
    """So many items, drawn from a task's file."""
    rows = [json.loads(line) for line in (data / _FILES[task]).read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    return rows[:items]


def config_of(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The harness's config of a task of these items."""
    config: dict[str, Any] = {
        "task": f"local_{task}",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    if task in ("arc_easy", "piqa", "mmlu"):
        config["doc_to_text"] = "Question: {{question}}\nAnswer:"
    elif task == "codah":
        config["doc_to_text"] = "{{question}}"
    elif task == "winogrande":  # what comes after the blank is judged, with each name before it
        for row in rows:
            before, _, row["after"] = row["question"].partition("_")
            row["choices"], row["after"] = [before + name for name in row["choices"]], row["after"].strip()
        config |= {"doc_to_text": "answer", "doc_to_target": "after", "metric_list": [{"metric": "acc"}]}
    else:
        rows = [dict(zip(("prompt", "reply"), _one_answer(row, task), strict=True)) for row in rows]
        config = {key: config[key] for key in ("task", "test_split")} | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{reply}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }
    return config | {"custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)}}


class Way:
    """One column: a store and who answers in it."""

    def __init__(self, given: str, a: argparse.Namespace) -> None:
        self.name, _, where = given.partition("=")
        path, _, asked = where.partition(":")
        self.module, _, look = asked.partition(":")
        if look not in ("", "look"):
            raise SystemExit(f"--ways {given}: behind the module there may be :look, and is :{look}")
        if not self.module:
            self.module, checkpoint = "base", Path(path)
            store = a.out / "stores" / slug(self.name, fingerprint(checkpoint)[:12])
            if not store.exists():
                growlm.Store.create(store, base=checkpoint.resolve())
            path = str(store)
        self.path, self.a = path, a
        versions = {m.name: m.manifest.created for m in growlm.Store.open(path).modules.values()}
        self.look = bool(look)
        self.where = [str(Path(path).resolve()), self.module + look, versions if self.module != "base" else {}]
        self._model: HarnessModel | None = None

    def answered(self, task: str) -> dict[str, Any]:
        """Of each item what it counts: right or not, and nats where there is one answer; which modules answered."""

        def asked() -> dict[str, Any]:
            if self._model is None:
                self._model = HarnessModel(
                    self.path, module=self.module, allow_contaminated=self.a.allow_contaminated, device="cpu",
                    second_look=self.look,
                )  # fmt: skip
            self._model._chosen.clear()
            found = lm_eval.simple_evaluate(
                model=self._model, tasks=[config_of(task, rows_of(task, self.a.data, self.a.items, self.a.seed))],
                task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=True,
                verbosity="ERROR",
            )  # fmt: skip
            samples = sorted(found["samples"][f"local_{task}"], key=lambda s: s["doc_id"])
            right = [float(s.get("acc_norm", s["acc"])) for s in samples]
            nats = [-float(s["perplexity"]) for s in samples] if "perplexity" in samples[0] else None
            modules = Counter(name or "none" for name in self._model._chosen.values())
            return {"right": right, "nats": nats, "modules": dict(modules)}

        asked_of = (self.where, self.a.allow_contaminated, rows_of(task, self.a.data, self.a.items, self.a.seed))
        return kept(self.a.out, slug(self.name, task, sha256(json.dumps(asked_of).encode()).hexdigest()[:12]), asked)


def paired(before: list[float], after: list[float]) -> tuple[float, list[float]]:
    """Mean difference by item and its 95 % interval."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    sums = Bootstrap([len(differences)]).sums(0, differences) / len(differences)
    interval = Bootstrap.interval(sums)
    assert interval is not None
    return float(differences.mean()), interval


def table(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A row a task and measure; each way beside the first, with the paired difference."""
    names = list(next(iter(found.values())))
    lines = ["| task | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for task, ways in found.items():
        measures: list[tuple[str, str, Callable[[float], str], Callable[[float], str]]] = []
        measures.append(("right", "%", lambda v: f"{100 * v:.1f}", lambda v: f"{100 * v:+.1f}"))
        if ways[names[0]]["nats"] is not None:
            measures.append(("nats", "nats", lambda v: f"{v:.2f}", lambda v: f"{v:+.2f}"))
        for key, unit, plain, signed in measures:
            first = ways[names[0]][key]
            cells = [plain(sum(first) / len(first))]
            for name in names[1:]:
                mean, (low, high) = paired(first, ways[name][key])
                told = f"{plain(sum(ways[name][key]) / len(first))} ({signed(mean)}; {signed(low)} to {signed(high)})"
                cells.append(told)
            lines.append(f"| {task}, {unit} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder a task")
    parser.add_argument("--out", type=Path, required=True, help="results, and stores of checkpoints")
    parser.add_argument(
        "--ways",
        nargs="+",
        required=True,
        metavar="NAME=STORE:MODULE",
        help="MODULE may be auto:look, with a second look; or NAME=CHECKPOINT",
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(_FILES), metavar="TASK")
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--seed", type=int, default=0, help="which items")
    parser.add_argument("--allow-contaminated", action="store_true", help="tasks too that a module has learned")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_DATASETS_CACHE", str(a.out / "cache"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(machine())
    ways = [Way(given, a) for given in a.ways]
    try:
        found = {task: {way.name: way.answered(task) for way in ways} for task in a.tasks}
    except GrowlmError as error:
        raise SystemExit(f"tasks: {str(error).replace('allow_contaminated=true', '--allow-contaminated')}") from error
    print("\n".join(table(found)))
    for task, told in found.items():
        routed = [f"{name} answered by {way['modules']}" for name, way in told.items() if way["modules"]]
        if routed:
            print(f"{task}: " + "; ".join(routed))


if __name__ == "__main__":
    main()
