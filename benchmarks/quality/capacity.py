"""Capacity: bits of facts known against number of modules, while the memory in use stays the same.

A base is pretrained on biographies of other people until it recalls them: language, phrasings and how to look a name up
are then known, and only facts are new. Then groups of people are learned one after another: by growlm as one module a
group, and in sequence by finetuning and by one LoRA of a module's size. After each group the bits known of all groups
so far are counted, and set beside the 2 bits a parameter of Allen-Zhu and Li ("Physics of Language Models: Part 3.3",
arXiv:2404.05405). All text is made here. Results are kept as they come: a run that was stopped goes on where it was,
and one of more modules takes over what is there.

python -m benchmarks.quality.capacity --out capacity/
python -m benchmarks.quality.capacity --out capacity/ --modules 8 --methods growlm
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import growlm
from benchmarks.lib import biographies as bio
from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import best_rate, machine
from growlm import data as text_data
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.errors import GrowlmError, TrainingError
from growlm.evaluation import plots
from growlm.modules import ModuleSet
from growlm.modules.scoring import continuation_scores
from growlm.router import NONE, names_of
from growlm.training.config import LearnConfig, PretrainConfig, TrainConfig

METHODS = ["growlm", "finetune-sequence", "lora-sequence"]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # tried from the middle on, until the best is not at an end of those tried


@dataclass(frozen=True)
class Scale:
    """What decides the numbers; results of another scale are not mixed with them.

    Attributes:
        people: of each group.
        exposures: how often each person is read, `texts` of them different.
        base_people: whom the base is pretrained on; it must come to recall them, or its layers look no name up.
    """

    people: int = 200
    exposures: int = 100
    texts: int = 25
    base_people: int = 400
    base_exposures: int = 75
    hidden_size: int = 64
    intermediate_size: int = 128
    base_layers: int = 3
    module_layers: int = 1
    sequence_length: int = 128
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise SystemExit(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in ("exposures", "base_exposures"):
            if getattr(self, name) % self.texts:
                flag = name.replace("_", "-")
                raise SystemExit(f"--{flag} is {getattr(self, name)}; it must be a multiple of --texts, {self.texts}")
        if self.hidden_size % 8:
            raise SystemExit(f"--hidden-size is {self.hidden_size}; it must be a multiple of 8")


# What is counted


def split(tokenizer: Any, asked: bio.Sentence) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, end-of-text first, and of the value: all tokens that hold a character of it."""
    found = tokenizer(asked.text[: asked.end], add_special_tokens=False, return_offsets_mapping=True)
    prompt = sum(end <= asked.start for _, end in found["offset_mapping"])
    return [tokenizer.eos_token_id, *found["input_ids"][:prompt]], found["input_ids"][prompt:]


def value_losses(modules: ModuleSet, tokenizer: Any, asked: Sequence[bio.Sentence]) -> list[tuple[float, bool]]:
    """Of each sentence, the loss of its value in bits, summed over the value's tokens and given the prompt before it;
    and whether greedy decoding would have written the value.

    Each sentence is asked by itself behind an end-of-text token, as the first sentence of a biography is read in
    training. A phrasing was seen in training, though perhaps not of this person.
    """
    scored = continuation_scores(modules, [split(tokenizer, s) for s in asked])
    return [(-score / math.log(2), right) for score, right in scored]


def counted(asked: Sequence[bio.Sentence], scored: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """One group's row: bits known in all and by attribute, mean loss of a value in bits, and the share of values that
    greedy decoding writes."""
    losses: dict[str, list[float]] = {a: [] for a in bio.ATTRIBUTES}
    for sentence, (loss, _) in zip(asked, scored, strict=True):
        losses[sentence.attribute].append(loss)
    bits = bio.bits_known(losses)
    loss, recall = fmean(loss for loss, _ in scored), fmean(right for _, right in scored)
    return {"bits": sum(bits.values()), "attributes": bits, "loss": loss, "recall": recall}


# The experiment


class Capacity:
    """One experiment: its people, its base, and where results are kept."""

    def __init__(self, out: Path, scale: Scale, modules: int) -> None:
        if scale.base_people + modules * scale.people > bio.NUM_NAMES:
            raise SystemExit(
                f"{scale.base_people:,} people for the base and {modules} groups of {scale.people:,}: "
                f"there are {bio.NUM_NAMES:,} names"
            )
        self.out, self.scale = out, scale
        if self.kept("scale", lambda: asdict(scale)) != asdict(scale):
            raise SystemExit(f"{out}: holds results of other settings ({out}/results/scale.json); give another --out")
        self.base = self._base().resolve()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.groups = [
            bio.people(scale.people, scale.seed, skip=scale.base_people + number * scale.people)
            for number in range(modules)
        ]
        self.texts = [self.text(name_of(n), group, scale.seed + 1 + n) for n, group in enumerate(self.groups)]
        # Everyone is asked for every fact once, in a phrasing drawn for the whole experiment.
        self.asked = [
            [s for person in group for s in bio.sentences(person, random.Random(f"{scale.seed} {person.name}"))]
            for group in self.groups
        ]

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A result from its file, or made now and written."""
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            write_atomic(path, json.dumps(make(), indent=1).encode())
        return json.loads(path.read_text())

    def settings(self, rate: float, exposures: int) -> dict[str, Any]:
        """What every training here has in common. In float32: matrices this small gain nothing from less."""
        return {
            "epochs": exposures // self.scale.texts,
            "sequence_length": self.scale.sequence_length,
            "batch_size": self.scale.batch_size,
            "learning_rate": rate,
            "seed": self.scale.seed,
            "precision": "float32",
        }

    def _base(self) -> Path:
        base, scale = self.out / "base", self.scale
        if not base.exists():
            config = LlamaConfig(
                hidden_size=scale.hidden_size,
                intermediate_size=scale.intermediate_size,
                num_hidden_layers=scale.base_layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                vocab_size=2048,
                max_position_embeddings=max(256, scale.sequence_length),
                tie_word_embeddings=True,
            )
            write_atomic(self.out / "base-config" / "config.json", config.to_json_string().encode())
            text = self.text("base", bio.people(scale.base_people, scale.seed), scale.seed)
            settings = PretrainConfig(**self.settings(3e-3, scale.base_exposures), config=str(self.out / "base-config"))
            growlm.pretrain(base, [text], settings)
        return base

    def text(self, name: str, group: Sequence[bio.Person], seed: int) -> Path:
        path = self.out / "text" / f"{name}.jsonl"
        if not path.exists():
            lines = [json.dumps({"text": text}) for text in bio.biographies(group, self.scale.texts, seed)]
            write_atomic(path, ("\n".join(lines) + "\n").encode())
        return path

    def count(self, modules: ModuleSet, group: int) -> dict[str, Any]:
        return counted(self.asked[group], value_losses(modules, self.tokenizer, self.asked[group]))

    def before(self) -> list[dict[str, Any]]:
        """What the base itself knows of every group: nothing, or the count is wrong."""
        base = Baseline(self.model, self.tokenizer).base
        return [self.count(ModuleSet(base), group) for group in range(len(self.groups))]

    def rate(self, method: str, trial: Callable[[float, int], float]) -> float:
        """The rate with which the first group's values have the least loss after a quarter of the exposures."""

        def loss(rate: float) -> float:
            try:
                return trial(rate, max(self.scale.exposures // 4, self.scale.texts))
            except TrainingError:  # it diverged
                return math.inf

        return best_rate(RATES, lambda r: self.kept(f"rate-{method}-{r:g}", partial(loss, r)))

    def stages(self, method: str, stage: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        """What a method knows after each group."""
        return [self.kept(f"{method}-{n + 1}", partial(stage, n)) for n in range(len(self.groups))]

    # Methods

    def learn(self, store: growlm.Store, group: int, rate: float, exposures: int) -> None:
        config = LearnConfig(
            admit_anyway=True,
            **self.settings(rate, exposures),
            num_layers=self.scale.module_layers,
            vocabulary="none",
            router_samples=256,
        )
        growlm.learn(store, name_of(group), [self.texts[group]], config)

    def growlm(self) -> list[dict[str, Any]]:
        """One module a group; of every group how much its own module knows, and the module that the router chose."""

        def trial(rate: float, exposures: int) -> float:
            folder = self.out / "trials" / f"growlm-{rate:g}"
            shutil.rmtree(folder, ignore_errors=True)
            store = growlm.Store.create(folder, base=self.base)
            self.learn(store, 0, rate, exposures)
            with growlm.Engine(store) as engine:
                loss = self.answered(engine, 0, [name_of(0)] * len(self.asked[0]))["loss"]
            shutil.rmtree(folder)
            return loss

        rate = self.rate("growlm", trial)
        folder = self.out / "stores" / "growlm"
        store = growlm.Store.open(folder) if folder.exists() else growlm.Store.create(folder, base=self.base)

        def stage(group: int) -> dict[str, Any]:
            if store.find(name_of(group)) is None:
                self.learn(store, group, rate, self.scale.exposures)
            with growlm.Engine(store) as engine:
                chosen = [self.routes(engine, g) for g in range(group + 1)]
                own = [self.answered(engine, g, [name_of(g)] * len(names)) for g, names in enumerate(chosen)]
                routed = [self.answered(engine, g, names) for g, names in enumerate(chosen)]
            module = store.module(name_of(group))
            return {
                "rate": rate,
                "seconds": module.manifest.training["seconds"],
                "trained": sum(store.module(name_of(g)).parameters for g in range(group + 1)),
                "active": module.parameters,
                "groups": own,
                "routed": routed,
                "accuracy": fmean(name == name_of(g) for g, names in enumerate(chosen) for name in names),
                "none": fmean(name == NONE for names in chosen for name in names),
            }

        return self.stages("growlm", stage)

    def answered(self, engine: growlm.Engine, group: int, names: Sequence[str]) -> dict[str, Any]:
        """A group's row when each sentence is answered by the module named for it."""
        asked = self.asked[group]
        scored = [(0.0, False)] * len(asked)
        for name in sorted(set(names)):
            mine = [i for i, n in enumerate(names) if n == name]
            with engine.modules.using([] if name == NONE else [name]) as held:
                modules = ModuleSet(engine.base, list(held.values()))
                found = value_losses(modules, self.tokenizer, [asked[i] for i in mine])
            for i, each in zip(mine, found, strict=True):
                scored[i] = each
        return counted(asked, scored)

    def routes(self, engine: growlm.Engine, group: int) -> list[str]:
        """The router's choice for each sentence of a group, from its prompt: name and phrasing, not the value."""
        prompts = [split(self.tokenizer, s)[0] for s in self.asked[group]]
        return names_of(engine.router.route(*engine.router.states(engine.base, prompts)))

    def baseline(self, method: str) -> list[dict[str, Any]]:
        """One model that is trained on one group after another; a LoRA has as many parameters as one module."""
        layer = sum(p.numel() for p in self.model.model.layers[0].parameters())
        lora = self.scale.module_layers * layer if method.startswith("lora") else None

        def fresh() -> Baseline:
            return Baseline(self.model, self.tokenizer, lora_parameters=lora, seed=self.scale.seed)

        def learn(model: Baseline, group: int, rate: float, exposures: int) -> float:
            # The documents that growlm.learn trains on: it holds some out.
            documents, _ = text_data.split(text_data.read([self.texts[group]]), seed=self.scale.seed)
            folder = self.out / "runs" / method / f"{group + 1}-{rate:g}-{exposures}"
            settings = TrainConfig(**self.settings(rate, exposures))
            seconds = model.learn(documents, settings, folder, f"{method}: {name_of(group)}")
            shutil.rmtree(folder)
            return seconds

        def trial(rate: float, exposures: int) -> float:
            model = fresh()
            learn(model, 0, rate, exposures)
            return self.count(ModuleSet(model.base), 0)["loss"]

        rate = self.rate(method, trial)

        def weights(group: int) -> Path:
            return self.out / "runs" / method / f"after-{group + 1}.safetensors"

        def stage(group: int) -> dict[str, Any]:
            model = fresh()
            if group:
                model.model.load_state_dict(read_tensors(weights(group - 1)), strict=False)
            seconds = learn(model, group, rate, self.scale.exposures)
            write_tensors(weights(group), dict(model.parameters))
            size = sum(p.numel() for p in model.parameters.values())
            rows = [self.count(ModuleSet(model.base), g) for g in range(group + 1)]
            return {"rate": rate, "seconds": seconds, "trained": size, "active": size, "groups": rows}

        return self.stages(method, stage)


def name_of(group: int) -> str:
    return f"people-{group + 1}"


# What is shown


def lines_of(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The stages of each line of table and figure: every method, and growlm's router beside its own modules."""
    lines = {("growlm, own module" if method == "growlm" else method): s for method, s in results.items()}
    if "growlm" in results:
        lines["growlm, routed"] = [s | {"groups": s["routed"]} for s in results["growlm"]]
    return lines


def kbits(stages: Sequence[Mapping[str, Any]]) -> list[float]:
    return [sum(row["bits"] for row in stage["groups"]) / 1e3 for stage in stages]


def figure(results: Mapping[str, list[dict[str, Any]]], group_bits: float) -> Figure:
    """Kilobits known against groups learned, one line a method, and all that there were to know."""
    lines = lines_of(results)
    with matplotlib.rc_context(plots.SETTINGS):
        drawn = Figure(figsize=(plots.WIDTH / 72, 3.4), layout="constrained")
        axes = drawn.add_subplot()
        counts = range(1, max(map(len, lines.values())) + 1)
        axes.plot(
            counts, [group_bits * n / 1e3 for n in counts], ":", color=plots.LIGHT["muted"], label="all there are"
        )
        roles = dict(zip(lines, ("module", "ink", "base", "router"), strict=False))
        for name, marker in zip(lines, "os^D", strict=False):
            axes.plot(counts[: len(lines[name])], kbits(lines[name]), color=plots.LIGHT[roles[name]], marker=marker,
                      markersize=4, label=name)  # fmt: skip
        axes.set(xlabel="groups of people learned, one after another", ylabel="kbit known", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        drawn.legend(loc="outside upper center", ncols=3)
    return drawn


def table(results: Mapping[str, list[dict[str, Any]]], group_bits: float, base_parameters: int) -> list[str]:
    """Bits known after each number of groups, and what that is at the end, a line a method."""
    lines = lines_of(results)
    known = {name: [1e3 * k for k in kbits(stages)] for name, stages in lines.items()}
    counts = range(1, max(map(len, lines.values())) + 1)
    made = ["| kbit known of | " + " | ".join(f"{n} learned" for n in counts) + " |", "|---|" + "---:|" * len(counts)]
    for name, bits in {"all there are": [group_bits * n for n in counts], **known}.items():
        made.append(f"| {name} | " + " | ".join(f"{b / 1e3:.1f}" for b in bits) + " |")
    heads = "share known, values recalled, first group known, last group known, parameters trained, "
    heads += "in memory with the base, bits a trained parameter, bits a trained parameter in use"
    made += ["", f"| at the end | {heads.replace(', ', ' | ')} |", "|---|" + "---:|" * 8]
    for name, stages in lines.items():
        last, bits = stages[-1], known[name][-1]
        rows = last["groups"]
        shares = [bits / group_bits / len(rows), fmean(row["recall"] for row in rows)]
        shares += [row["bits"] / group_bits for row in (rows[0], rows[-1])]
        memory = last["active"] + (0 if name.startswith("finetune") else base_parameters)
        made.append(
            f"| {name} | " + " | ".join(f"{s:.1%}" for s in shares) + f" | {last['trained']:,} | {memory:,} "
            f"| {bits / last['trained']:.2f} | {bits / last['active']:.2f} |"
        )
    return made


def report(experiment: Capacity, methods: Sequence[str]) -> str:
    modules, scale = len(experiment.groups), experiment.scale
    size = experiment.model.num_parameters()
    before = experiment.kept(f"base-{modules}", experiment.before)
    results: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        if method in methods:
            results[method] = experiment.growlm() if method == "growlm" else experiment.baseline(method)
    group_bits = bio.bits_per_person() * scale.people
    with matplotlib.rc_context(plots.SETTINGS):
        figure(results, group_bits).savefig(experiment.out / "capacity.svg")
    made = table(results, group_bits, size)
    made += [
        "",
        "Published: 2 bits a parameter after 1000 exposures, 1 after 100. "
        f"Here: {bio.bits_per_person():.1f} bits a person, {scale.exposures} exposures, seed {scale.seed}.",
        f"Base: {size:,} parameters, knows {sum(row['bits'] for row in before) / 1e3:.2f} kbit before. {machine()}.",
    ]
    for method, stages in results.items():
        seconds = sum(s["seconds"] for s in stages)
        made.append(f"{method}: learning rate {stages[0]['rate']:g}, {seconds:,.0f} seconds of training.")
    if "growlm" in results:
        last = results["growlm"][-1]
        made.append(
            f"Router, from the prompt with the name: accuracy {last['accuracy']:.1%} (chance {1 / modules:.1%}), "
            f"none for {last['none']:.1%}."
        )
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, stores and checkpoints")
    parser.add_argument("--modules", type=int, default=5, help="groups of people, one module each")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    for field in fields(Scale):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="%(default)s")
    given = vars(parser.parse_args())
    out, modules, methods = given.pop("out"), given.pop("modules"), given.pop("methods")
    if modules < 1:
        raise SystemExit(f"--modules is {modules}; it must be at least 1")
    try:
        made = report(Capacity(out, Scale(**given), modules), methods)
    except GrowlmError as error:
        raise SystemExit(str(error)) from None
    write_atomic(out / "capacity.md", f"{made}\n".encode())
    print(made)


if __name__ == "__main__":
    main()
