"""Demo: the main job on text that is already there. Pretrain, learn three domains one after another, evaluate, report.

Knows the order of the verbs and how to print what they gave; every number it prints was measured by them.
A demo that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from growlm import data as text_data
from growlm.base.placement import find_device
from growlm.demo import corpora
from growlm.demo.accounting import account, paper_config
from growlm.disk.files import write_atomic
from growlm.engine import Engine
from growlm.errors import StoreError
from growlm.evaluation import EvalConfig, evaluate
from growlm.evaluation.report import write_report
from growlm.router import NONE
from growlm.store import Store
from growlm.training.config import LearnConfig, PretrainConfig
from growlm.training.learn import learn
from growlm.training.pretrain import pretrain
from growlm.training.progress import say
from growlm.units import format_count, format_size

DOMAINS = ("python", "cpp", "maths")
_PROMPT_CHARACTERS = 300  # of a held-out document, for the samples


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: base, tokens, and bytes of text."""

    preset: str
    vocab_size: int
    pretrain_tokens: int
    learn_tokens: int
    num_layers: int
    max_documents: int
    text_bytes: dict[str, int]


FULL = DemoSize(
    preset="small",
    vocab_size=4096,
    pretrain_tokens=1_800_000,
    learn_tokens=300_000,
    num_layers=4,
    max_documents=60,
    text_bytes={"english": 9_000_000, "python": 2_000_000, "cpp": 2_000_000, "maths": 2_000_000},
)
FAST = DemoSize(
    preset="tiny",
    vocab_size=2048,
    pretrain_tokens=500_000,
    learn_tokens=120_000,
    num_layers=2,
    max_documents=40,
    text_bytes={"english": 3_000_000, "python": 1_000_000, "cpp": 1_000_000, "maths": 1_000_000},
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: an evaluation, samples, seconds by step, and the paper's accounting."""

    evaluation: dict[str, Any]
    status: dict[str, Any]
    seconds: dict[str, float]
    report: str
    accounting: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The result as a person reads it."""
        result = self.evaluation
        lines = [
            f"{'domain':<8}  {'base':>8}  {'module':>8}  {'lower by':>8}  {'routed':>8}   (perplexity, held-out files)"
        ]
        for name, row in result["perplexity"].items():
            lower = "" if name == NONE else f"{1 - row['module'] / row['base']:.0%}"
            label = "english" if name == NONE else name
            lines.append(f"{label:<8}  {row['base']:8.1f}  {row['module']:8.1f}  {lower:>8}  {row['routed']:8.1f}")
        routing, memory = result["routing"], result["memory"]
        lines += [
            f"retained gain {routing['retained_gain']:.1%}, router accuracy {routing['accuracy']:.1%} "
            "(english belongs to no module)",
            f"forgetting {result['forgetting']:g}: base and earlier modules answer "
            + ("bit for bit as before" if not result["forgetting_detail"]["changed"] else "differently"),
            f"parameters: {format_count(self.status['total_parameters'])} in all, at most "
            f"{format_count(self.status['active_parameters'])} active",
            f"memory: {format_size(memory['resident_bytes'])} resident (base, router, one module) of "
            f"{format_size(memory['total_bytes'])}",
            "",
            "A sample from each, the module chosen by the router:",
        ]
        for sample in result["samples"]:
            text = " ".join(sample["text"].split())[:90]
            lines.append(f"  {sample['domain']:<7} -> {sample['module'] or 'base':<7} ...{text}")
        lines += ["", *self.accounting, ""]
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [*lines, f"took {sum(self.seconds.values()):.0f} s: {took}", f"report: {self.report}"]


def demo(
    out: str | Path,
    *,
    fast: bool = False,
    device: str = "auto",
    precision: str = "auto",
    progress: bool | None = None,
) -> DemoResult:
    """Runs the demo in the folder `out`: text, base, store and report.

    Args:
        device, precision: as in `LearnConfig`.

    Raises:
        ConfigError: no such device or precision.
        StoreError: `out` holds something else, or a demo of the other size.
        DataError: this install lacks the text.
    """
    out = Path(out).expanduser()
    size = FAST if fast else FULL
    settings = LearnConfig(
        tokens=size.learn_tokens,
        sequence_length=256,
        num_layers=size.num_layers,
        device=device,
        precision=precision,
    )
    find_device(device)
    _claim(out, size)
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, note: str) -> Iterator[None]:
        say(note, progress)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    with step("text", "collecting text from this install"):
        files = corpora.write(out / "text", max_bytes=size.text_bytes)
    with step("pretrain", "1. a base, pretrained on English"):
        if not (out / "base").exists():
            first = PretrainConfig(
                preset=size.preset,
                vocab_size=size.vocab_size,
                tokens=size.pretrain_tokens,
                sequence_length=256,
                device=device,
                precision=precision,
            )
            pretrain(out / "base", [files["english"][0]], first, progress=progress)
    store = Store.open(out / "brain") if (out / "brain").exists() else Store.create(out / "brain", base=out / "base")
    with step("learn", "2. three domains, one after another, each on its own text alone"):
        for name in DOMAINS:
            if name not in store.modules:
                learn(store, name, [files[name][0]], settings, progress=progress)
    with step("evaluate", "3. held-out files: does it know more, is the right module found, is anything forgotten?"):
        heldout = {name: [files[name][1]] for name in DOMAINS} | {NONE: [files["english"][1]]}
        scope = EvalConfig(sequence_length=256, max_documents=size.max_documents, device=device)
        evaluation = evaluate(store, heldout, scope, progress=progress).to_json()
    with step("generate", "4. a sample of each"):
        evaluation["samples"] = _samples(store, {name: files[name][1] for name in DOMAINS}, device)
    page = write_report(evaluation, out / "report")
    accounting = account(paper_config()).lines()
    return DemoResult(evaluation, store.status(), seconds, str(page), accounting)


def _samples(store: Store, heldout: dict[str, Path], device: str) -> list[dict[str, Any]]:
    """A continuation of the beginning of a held-out document of each domain."""
    prompts = {n: text_data.read([path]).documents[0].text[:_PROMPT_CHARACTERS] for n, path in heldout.items()}
    with Engine(store, device=device) as engine:
        answers = engine.generate_many(list(prompts.values()), max_new_tokens=48, temperature=0.7, top_p=0.9)
    return [
        {"domain": name, "prompt": prompt, "text": answer.text, "module": answer.module}
        for (name, prompt), answer in zip(prompts.items(), answers, strict=True)
    ]


def _claim(out: Path, size: DemoSize) -> None:
    marker, content = out / "demo.json", json.dumps(asdict(size), indent=2)
    if marker.is_file() and marker.read_text() == content:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out}: holds something else, or a demo of another size; choose another --out or remove it")
    write_atomic(marker, content.encode())
