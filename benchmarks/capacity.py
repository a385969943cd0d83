"""Capacity: bits of facts known against number of modules, while the memory in use stays the same.

A base is pretrained on biographies of other people, so that language and phrasings are known and only facts are new.
Then groups of people are learned one after another: by growlm as one module a group, and by finetuning and one LoRA in
sequence. After each group it is counted how many bits of all groups so far are known, and set beside the 2 bits a
parameter that Allen-Zhu and Li found ("Physics of Language Models: Part 3.3", arXiv:2404.05405; 1 bit a parameter
after 100 exposures). All text is made here. Results are kept as they come: a run that was stopped goes on where it was.

python benchmarks/capacity.py --out capacity/
python benchmarks/capacity.py --out capacity/ --modules 8 --methods growlm
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import growlm
from baselines import Baseline
from biographies import (
    ATTRIBUTES,
    NUM_NAMES,
    Person,
    Sentence,
    biographies,
    bits_per_person,
    num_bits,
    people,
    sentences,
)
from common import machine
from growlm import data as text_data
from growlm.errors import TrainingError
from growlm.evaluation import plots
from growlm.files import read_tensors, write_atomic, write_tensors
from growlm.modules import ModuleSet
from growlm.modules.scoring import continuation_scores
from growlm.router import NONE, base_states, names_of
from growlm.training.config import LearnConfig, PretrainConfig, TrainConfig

METHODS = ["growlm", "finetune-sequence", "lora-sequence"]
PUBLISHED = 2.0  # bits a parameter, after 1000 exposures
RATES = {"growlm": (3e-3, 1e-2), "finetune-sequence": (1e-3, 3e-3), "lora-sequence": (3e-3, 1e-2)}
ROUTE_BATCH = 128  # prompts that are routed together


@dataclass(frozen=True)
class Scale:
    """What decides the numbers; results of another scale are not mixed with them."""

    people: int = 600
    exposures: int = 100
    texts: int = 5
    base_people: int = 20_000
    base_epochs: int = 2
    hidden_size: int = 64
    base_layers: int = 3
    module_layers: int = 1
    sequence_length: int = 128
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (name != "seed"):
                raise SystemExit(f"--{name.replace('_', '-')} is {value}; it must be at least {int(name != 'seed')}")
        if self.exposures % self.texts:
            raise SystemExit(f"--exposures is {self.exposures}; it must be a multiple of --texts, {self.texts}")
        if self.hidden_size % 8:
            raise SystemExit(f"--hidden-size is {self.hidden_size}; it must be a multiple of 8")


# What is counted


def value_losses(modules: ModuleSet, tokenizer: Any, asked: Sequence[Sentence]) -> tuple[list[float], list[bool]]:
    """Of each sentence, the loss of its value in bits, summed over the value's tokens and given the prompt before it;
    and whether greedy decoding would have written the value.

    Each sentence is asked by itself behind an end-of-text token, as the first sentence of a biography is read in
    training. A phrasing was seen in training, though perhaps not of this person.
    """
    scored = continuation_scores(modules, [split(tokenizer, s) for s in asked])
    return [-score / math.log(2) for score, _ in scored], [right for _, right in scored]


def split(tokenizer: Any, asked: Sentence) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, end-of-text first, and of the value: all tokens that hold a character of it."""
    found = tokenizer(asked.text[: asked.end], add_special_tokens=False, return_offsets_mapping=True)
    prompt = sum(end <= asked.start for _, end in found["offset_mapping"])
    return [tokenizer.eos_token_id, *found["input_ids"][:prompt]], found["input_ids"][prompt:]


def bits_known(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Bits known of each attribute of a group of people: number of people x max(0, log2 S - mean loss in bits), S the
    number of values that the attribute can have (Allen-Zhu and Li's learned bits of the values).

    The floor is on the mean of an attribute in a group: a model that has never met a group, or answers it wrongly,
    knows nothing of it, and not less. Left out are the bits of the names (the paper's N log2 N0: prompts give the
    name away here), what a model knows of phrasings, and the paper's choice of a value's words (log2 S counts the draw
    alone; the lists of values are known to the base). Under 0.1 bits an attribute may be luck in a small group.

    Args:
        losses: of every person, by attribute, summed over the value's tokens, in bits.
    """
    return {a: len(some) * max(0.0, num_bits(a) - fmean(some)) for a, some in losses.items()}


def counted(asked: Sequence[Sentence], losses: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """One group's row: bits by attribute, their sum, and the share of values that greedy decoding writes."""
    by_attribute = {a: [x for s, x in zip(asked, losses, strict=True) if s.attribute == a] for a in ATTRIBUTES}
    bits = bits_known(by_attribute)
    return {"bits": sum(bits.values()), "attributes": bits, "recall": fmean(right)}


# The experiment


class Capacity:
    """One experiment: its people, its base, and where results are kept."""

    def __init__(self, out: Path, scale: Scale, modules: int) -> None:
        if scale.base_people + modules * scale.people > NUM_NAMES:
            raise SystemExit(
                f"{scale.base_people:,} people for the base and {modules} groups of {scale.people:,}: "
                f"there are {NUM_NAMES:,} names"
            )
        self.out, self.scale = out, scale
        settings = json.loads(json.dumps(asdict(scale)))
        if self.kept("scale", lambda: settings) != settings:
            raise SystemExit(f"{out}: holds results of other settings ({out}/results/scale.json); give another --out")
        self.base = self._base().resolve()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.groups = [self._group(number) for number in range(modules)]
        # Everyone is asked for every fact once, in a phrasing drawn for the whole experiment.
        self.asked = [
            [s for person in group for s in sentences(person, random.Random(f"{scale.seed} {person.name}"))]
            for group in self.groups
        ]

    def _group(self, number: int) -> list[Person]:
        return people(self.scale.people, self.scale.seed, skip=self.scale.base_people + number * self.scale.people)

    def _base(self) -> Path:
        base, scale = self.out / "base", self.scale
        if not base.exists():
            config = LlamaConfig(
                hidden_size=scale.hidden_size,
                intermediate_size=scale.hidden_size,
                num_hidden_layers=scale.base_layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                vocab_size=2048,
                max_position_embeddings=max(256, scale.sequence_length),
                tie_word_embeddings=True,
            )
            write_atomic(self.out / "base-config" / "config.json", config.to_json_string().encode())
            others = people(scale.base_people, scale.seed)
            settings = self.settings(4e-3, scale.base_epochs) | {"config": str(self.out / "base-config")}
            growlm.pretrain(base, [self.text("base", others, 1, scale.seed)], PretrainConfig(**settings))
        return base

    def text(self, name: str, group: Sequence[Person], texts: int, seed: int) -> Path:
        path = self.out / "text" / f"{name}.jsonl"
        if not path.exists():
            lines = [json.dumps({"text": text}) for text in biographies(group, texts, seed)]
            write_atomic(path, ("\n".join(lines) + "\n").encode())
        return path

    def group_text(self, number: int) -> Path:
        return self.text(f"group-{number}", self.groups[number], self.scale.texts, self.scale.seed + 1 + number)

    def settings(self, rate: float, epochs: int) -> dict[str, Any]:
        """What every training here has in common. In float32: so small matrices gain nothing from less."""
        return {
            "epochs": epochs,
            "sequence_length": self.scale.sequence_length,
            "batch_size": self.scale.batch_size,
            "learning_rate": rate,
            "seed": self.scale.seed,
            "precision": "float32",
        }

    @property
    def epochs(self) -> int:
        return self.scale.exposures // self.scale.texts

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A result from its file, or made now and written."""
        path = self.out / "results" / f"{name}.json"
        if not path.exists():
            result = make()
            write_atomic(path, json.dumps(result, indent=1).encode())
        return json.loads(path.read_text())

    def count(self, modules: ModuleSet, group: int) -> dict[str, Any]:
        return counted(self.asked[group], *value_losses(modules, self.tokenizer, self.asked[group]))

    def before(self) -> list[dict[str, Any]]:
        """What the base itself knows of every group: nothing, or the count is wrong."""
        base = Baseline(self.model, self.tokenizer).base
        return [self.count(ModuleSet(base), group) for group in range(len(self.groups))]

    def rate(self, method: str, train: Callable[[float], float]) -> float:
        """The rate with which most bits of the first group are known after a quarter of the exposures."""

        def trial(rate: float) -> float:
            print(f"{method}: rate {rate:g} ...", flush=True)
            try:
                return train(rate)
            except TrainingError:  # it diverged
                return 0.0

        bits = {r: self.kept(f"rate-{method}-{r:g}", lambda r=r: trial(r)) for r in RATES[method]}
        return max(bits, key=lambda r: bits[r])

    # Methods

    def learn(self, store: growlm.Store, group: int, rate: float, epochs: int) -> growlm.LearnResult:
        config = LearnConfig(
            **self.settings(rate, epochs), num_layers=self.scale.module_layers, vocabulary="none", feature_cache="4GB"
        )
        return growlm.learn(store, name_of(group), [self.group_text(group)], config)

    def growlm(self) -> list[dict[str, Any]]:
        """One module a group; of every group how much its own module knows, and the module that the router chose."""

        def trial(rate: float) -> float:
            folder = self.out / "trials" / f"growlm-{rate:g}"
            shutil.rmtree(folder, ignore_errors=True)
            store = growlm.Store.create(folder, base=self.base)
            self.learn(store, 0, rate, max(self.epochs // 4, 1))
            with growlm.Engine(store) as engine, engine.modules.using([name_of(0)]) as held:
                bits = self.count(ModuleSet(engine.base, list(held.values())), 0)["bits"]
            shutil.rmtree(folder)
            return bits

        rate = self.rate("growlm", trial)
        folder = self.out / "stores" / "growlm"
        store = growlm.Store.open(folder) if folder.exists() else growlm.Store.create(folder, base=self.base)

        def stage(group: int) -> dict[str, Any]:
            if store.find(name_of(group)) is None:
                self.learn(store, group, rate, self.epochs)
            module = store.module(name_of(group))
            with growlm.Engine(store) as engine:
                own = [self.choose(engine, g, [name_of(g)] * len(self.asked[g])) for g in range(group + 1)]
                chosen = [self.routes(engine, g) for g in range(group + 1)]
                routed = [self.choose(engine, g, names) for g, names in enumerate(chosen)]
            right = [name == name_of(g) for g, names in enumerate(chosen) for name in names]
            none = [name == NONE for names in chosen for name in names]
            return {
                "rate": rate,
                "seconds": module.manifest.training["seconds"],
                "trained": sum(store.module(name_of(g)).parameters for g in range(group + 1)),
                "active": module.parameters,
                "groups": own,
                "routed": {"groups": routed, "accuracy": fmean(right), "none": fmean(none)},
            }

        return self.stages("growlm", stage)

    def choose(self, engine: growlm.Engine, group: int, names: Sequence[str]) -> dict[str, Any]:
        """A group's row when each sentence is answered by the module named for it."""
        asked = self.asked[group]
        losses, right = [0.0] * len(asked), [False] * len(asked)
        for name in sorted(set(names)):
            mine = [i for i, n in enumerate(names) if n == name]
            with engine.modules.using([] if name == NONE else [name]) as held:
                modules = ModuleSet(engine.base, list(held.values()))
                found = value_losses(modules, self.tokenizer, [asked[i] for i in mine])
            for i, loss, hit in zip(mine, *found, strict=True):
                losses[i], right[i] = loss, hit
        return counted(asked, losses, right)

    def routes(self, engine: growlm.Engine, group: int) -> list[str]:
        """The router's choice for each sentence of a group, from its prompt: name and phrasing, not the value."""
        prompts = [split(self.tokenizer, s)[0] for s in self.asked[group]]
        names: list[str] = []
        for at in range(0, len(prompts), ROUTE_BATCH):
            names += names_of(engine.router.route(*base_states(engine.base, prompts[at : at + ROUTE_BATCH])))
        return names

    def baseline(self, method: str) -> list[dict[str, Any]]:
        """One model that is trained on one group after another; the LoRA has as many parameters as one module."""
        layer = sum(p.numel() for p in self.model.model.layers[0].parameters())
        lora = self.scale.module_layers * layer if method.startswith("lora") else None

        def fresh() -> Baseline:
            return Baseline(self.model, self.tokenizer, lora_parameters=lora, seed=self.scale.seed)

        def learn(model: Baseline, group: int, rate: float, epochs: int) -> float:
            documents = text_data.read([self.group_text(group)]).documents
            folder = self.out / "runs" / method / f"{group}-{rate:g}-{epochs}"
            settings = TrainConfig(**self.settings(rate, epochs))
            seconds = model.learn(documents, settings, folder, f"{method}: {name_of(group)}")
            shutil.rmtree(folder)
            return seconds

        def trial(rate: float) -> float:
            model = fresh()
            learn(model, 0, rate, max(self.epochs // 4, 1))
            return self.count(ModuleSet(model.base), 0)["bits"]

        rate = self.rate(method, trial)

        def weights(group: int) -> Path:
            return self.out / "runs" / method / f"after-{group}.safetensors"

        def stage(group: int) -> dict[str, Any]:
            model = fresh()
            if group:
                model.model.load_state_dict(read_tensors(weights(group - 1)), strict=False)
            seconds = learn(model, group, rate, self.epochs)
            write_tensors(weights(group), dict(model.parameters))
            size = sum(p.numel() for p in model.parameters.values())
            rows = [self.count(ModuleSet(model.base), g) for g in range(group + 1)]
            return {"rate": rate, "seconds": seconds, "trained": size, "active": size, "groups": rows}

        return self.stages(method, stage)

    def stages(self, method: str, stage: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for group in range(len(self.groups)):
            found.append(self.kept(f"{method}-{group}", lambda g=group: _told(method, g, stage)))
        return found


def _told(method: str, group: int, stage: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    print(f"{method}: {name_of(group)} ...", flush=True)
    return stage(group)


def name_of(group: int) -> str:
    return f"people-{group + 1}"


# What is shown


def lines_of(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each line of table and figure: every method, and growlm's router beside its own modules."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method, stages in results.items():
        if method == "growlm":
            found["growlm, own module"] = stages
            found["growlm, routed"] = [s | s["routed"] for s in stages]
        else:
            found[method] = stages
    return found


def total(stage: Mapping[str, Any]) -> float:
    return sum(row["bits"] for row in stage["groups"])


def table(results: Mapping[str, list[dict[str, Any]]], people_a_group: int, base_parameters: int) -> list[str]:
    """Bits known after each number of groups, and at the end bits a parameter, a line a method."""
    lines = lines_of(results)
    count = max(map(len, lines.values()))
    head = " | ".join(f"{n + 1} learned" for n in range(count))
    made = [f"| kbit known of | {head} |", "|---|" + "---:|" * count]
    possible = [bits_per_person() * people_a_group * (n + 1) for n in range(count)]
    made.append("| all there are | " + " | ".join(f"{bits / 1e3:.1f}" for bits in possible) + " |")
    for name, stages in lines.items():
        made.append(f"| {name} | " + " | ".join(f"{total(s) / 1e3:.1f}" for s in stages) + " |")
    made += [
        "",
        "| at the end | share known | values recalled | first group known | parameters trained | in memory, base included "
        "| bits a trained parameter | bits a trained parameter in use |",
        "|---|" + "---:|" * 7,
    ]
    for name, stages in lines.items():
        last = stages[-1]
        bits, first = total(last), last["groups"][0]["bits"] / (bits_per_person() * people_a_group)
        memory = last["active"] + (0 if name.startswith("finetune") else base_parameters)
        made.append(
            f"| {name} | {bits / possible[-1]:.1%} | {fmean(row['recall'] for row in last['groups']):.1%} | {first:.1%} "
            f"| {last['trained']:,} | {memory:,} | {bits / last['trained']:.2f} | {bits / last['active']:.2f} |"
        )
    return [*made, f"| published, 1000 exposures | | | | | | {PUBLISHED:.2f} | {PUBLISHED:.2f} |"]


def figure(results: Mapping[str, list[dict[str, Any]]], people_a_group: int) -> Figure:
    """Kilobits known against groups learned, one line a method, and all that there was to know."""
    looks = {
        "growlm, own module": ("module", "o"),
        "growlm, routed": ("router", "o"),
        "finetune-sequence": ("ink", "s"),
        "lora-sequence": ("base", "^"),
    }
    with matplotlib.rc_context(plots.SETTINGS):
        drawn = Figure(figsize=(plots.WIDTH / 72, 3.4), layout="constrained")
        axes = drawn.add_subplot()
        lines = lines_of(results)
        learned = range(1, max(map(len, lines.values())) + 1)
        there = [bits_per_person() * people_a_group * n / 1e3 for n in learned]
        axes.plot(learned, there, color=plots.LIGHT["muted"], linewidth=1, linestyle=":", label="all there are")
        for name, stages in lines.items():
            role, marker = looks[name]
            values = [total(s) / 1e3 for s in stages]
            axes.plot(learned, values, color=plots.LIGHT[role], marker=marker, markersize=4, label=name)
        axes.set_xlabel(f"groups of {people_a_group:,} people learned, one after another")
        axes.set_ylabel("kbit known")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        drawn.legend(loc="outside upper center", ncols=3)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Scale()
    parser.add_argument("--out", type=Path, required=True, help="results, stores and checkpoints")
    parser.add_argument("--modules", type=int, default=5, help="groups of people, one module each")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--people", type=int, default=default.people, help="of each group")
    parser.add_argument("--exposures", type=int, default=default.exposures, help="how often each person is read")
    parser.add_argument("--texts", type=int, default=default.texts, help="different texts of each person")
    parser.add_argument("--base-people", type=int, default=default.base_people, help="whom the base is pretrained on")
    parser.add_argument("--base-epochs", type=int, default=default.base_epochs)
    parser.add_argument("--hidden-size", type=int, default=default.hidden_size)
    parser.add_argument("--base-layers", type=int, default=default.base_layers)
    parser.add_argument("--module-layers", type=int, default=default.module_layers)
    parser.add_argument("--sequence-length", type=int, default=default.sequence_length)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--seed", type=int, default=default.seed)
    given = vars(parser.parse_args())
    out, modules, methods = given.pop("out"), given.pop("modules"), given.pop("methods")
    if modules < 1:
        raise SystemExit(f"--modules is {modules}; it must be at least 1")
    experiment = Capacity(out, Scale(**given), modules)
    size = experiment.model.num_parameters()
    before = experiment.kept(f"base-{modules}", experiment.before)
    results: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        if method in methods:
            results[method] = experiment.growlm() if method == "growlm" else experiment.baseline(method)
    made = table(results, given["people"], size)
    made += [
        "",
        f"Base: {size:,} parameters, knows {sum(row['bits'] for row in before) / 1e3:.1f} kbit before. "
        f"{bits_per_person():.1f} bits a person, read {given['exposures']} times. {machine()}, seed {given['seed']}.",
    ]
    for method, stages in results.items():
        seconds = sum(s["seconds"] for s in stages)
        made.append(f"{method}: learning rate {stages[0]['rate']:g}, {seconds:,.0f} seconds of training.")
    if "growlm" in results:
        routed = results["growlm"][-1]["routed"]
        made.append(
            f"Router, from the prompt with the name: accuracy {routed['accuracy']:.1%} (chance {1 / modules:.1%}), "
            f"none for {routed['none']:.1%}."
        )
    drawn = figure(results, given["people"])
    alt = "kilobits known against groups of people learned"
    write_atomic(out / "capacity.svg", plots.to_svg(drawn, "capacity", alt).encode())
    write_atomic(out / "capacity.png", plots.to_png(drawn))
    write_atomic(out / "capacity.md", ("\n".join(made) + "\n").encode())
    print("\n".join(made))


if __name__ == "__main__":
    main()
