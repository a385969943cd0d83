"""Task: a task of the harness whose rows are local files or the hub's, with shots of its own subject or of all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import datasets
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask

from growlm.errors import DataError
from growlm.evaluation.tasks.reading import documents, read_rows


class DataTask(ConfigurableTask):
    """What the task files of this folder are, beside what the harness makes of them.

    `dataset_path`, `dataset_name`, `test_split` and `fewshot_split` are the hub's. `dataset_kwargs` holds `folder`, the
    task's folder among local data; `row`, the function that reads a row; and `shots_of_subject`: whether a question's
    shots are the first of its own subject. If not, every question has the same shots, of each subject in turn.

    Raises:
        DataError: for data that is missing or malformed, and for too few shots.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._shots: dict[str, list[dict[str, Any]]] | None = None
        self._shots_from = ""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        source, docs = self._read(self.config.test_split)
        if not docs:
            raise DataError(f"{source}: no rows; give some")
        self.dataset = {self.config.test_split: datasets.Dataset.from_list(docs)}
        self.config.metadata = {**(self.config.metadata or {}), "data": source}

    def fewshot_docs(self) -> None:
        """None: shots are read when a prompt wants some, so that a task without any needs no file of them."""

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> Any:
        if num_fewshot:
            self.sampler = FirstNSampler(self._shots_for(doc, num_fewshot))
        return super().fewshot_context(doc, num_fewshot, **kwargs)

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().process_results(doc, results)
        if "acc" in found and doc["subject"]:
            found["acc_macro"] = (doc["subject"], found["acc"])
        return found

    def aggregation(self) -> dict[str, Any]:
        return {"acc_macro": mean_of_subjects, **super().aggregation()}

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc_macro": True, **super().higher_is_better()}

    def _read(self, split: str) -> tuple[str, list[dict[str, Any]]]:
        options = self.config.dataset_kwargs
        source, rows = read_rows(options["folder"], self.config.dataset_path, self.config.dataset_name, split)
        return source, documents(rows, options["row"])

    def _shots_for(self, doc: Mapping[str, Any], num_fewshot: int) -> list[dict[str, Any]]:
        own = bool(self.config.dataset_kwargs.get("shots_of_subject"))
        if self._shots is None:
            self._shots_from, docs = self._read(self.config.fewshot_split)
            self._shots = by_subject(docs) if own else {"": in_turn(docs)}
        subject = doc["subject"] if own else ""
        shots = self._shots.get(subject, [])
        if len(shots) < num_fewshot:
            which = f" of subject {subject!r}" if subject else ""
            raise DataError(
                f"{self._shots_from}: {len(shots)} rows{which}, {num_fewshot} shots wanted; "
                f"add some, or give --num_fewshot {len(shots)}"
            )
        return shots


def by_subject(docs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for doc in docs:
        groups[doc["subject"]].append(doc)
    return dict(groups)


def in_turn(docs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each subject, then the second of each, and so on."""
    rounds = zip_longest(*by_subject(docs).values())
    return [doc for one_round in rounds for doc in one_round if doc is not None]


def mean_of_subjects(items: Sequence[tuple[str, float]]) -> float:
    """The mean of the subjects' accuracies, however many questions each has."""
    groups: dict[str, list[float]] = defaultdict(list)
    for subject, value in items:
        groups[subject].append(value)
    return sum(sum(values) / len(values) for values in groups.values()) / len(groups)
