"""A published base that learns domain after domain in the same parameters: what each later domain does to the earlier.

All of the base, or one LoRA adapter on it, trains on the rows of one domain (those of `benchmarks.quality.finetuned`,
every row once), then on those of the next. After each, the loss on every domain's test text and on text of another
kind is measured: the forgetting matrix. A stage is a file in OUT, so that a run that was stopped goes on.

python -m benchmarks.quality.sequence --data DIR --base CHECKPOINT --out sequence/ --rate 2e-4
python -m benchmarks.quality.sequence --data DIR --base CHECKPOINT --out sequence/ --lora 4.9M --rate 2e-3
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from benchmarks.lib.baselines import Baseline
from benchmarks.lib.common import kept, machine, same_settings, slug
from benchmarks.quality.finetuned import Finetuned, add_arguments
from growlm import data as text_data
from growlm.base.checkpoint import fingerprint, save_model
from growlm.disk.files import write_atomic
from growlm.disk.tensors import read_tensors, write_tensors
from growlm.evaluation.continual import ForgettingMatrix
from growlm.units import parse_count


class Sequence:
    """Stages of one model that goes on learning."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.bench = Finetuned(a)
        self.name = slug("finetune" if a.lora is None else f"lora-{a.lora}", a.seed, a.rate)

    def fresh(self) -> Baseline:
        adapters = self.bench.adapters
        return Baseline(adapters.base.model, adapters.tokenizer, lora_parameters=self.a.lora, seed=self.a.seed)

    def run(self) -> dict[str, Any]:
        """Losses before anything was learned and after each domain."""
        domains = self.a.domains
        model = self.fresh()
        before = kept(self.a.out, slug("before", *domains), lambda: self._row(model))
        stages = []
        for number, domain in enumerate(domains):

            def stage(number: int = number, domain: str = domain) -> dict[str, Any]:
                if number:
                    model.model.load_state_dict(read_tensors(self._weights(number - 1)), strict=False)
                rows = text_data.PackedTokens(self.bench.rows(domain))
                folder = self.a.out / "runs" / slug(self.name, number)
                title = f"{self.name}: {domain}"
                seconds = model.learn(rows, self.bench.settings(rows, self.a.rate), folder, title)
                self._weights(number).parent.mkdir(parents=True, exist_ok=True)
                write_tensors(self._weights(number), dict(model.parameters))
                shutil.rmtree(folder)
                if number > 1:
                    self._weights(number - 2).unlink(missing_ok=True)
                return {"domain": domain, "seconds": seconds, **self._row(model)}

            stages.append(kept(self.a.out, slug(self.name, number, domain), stage))
            own, general = stages[-1]["losses"][number], stages[-1]["general"]
            print(f"{self.name}, {domain}: its text {own:.3f}, other text {general:.3f}", flush=True)
        if self.a.keep and not (folder := self.a.out / "models" / self.name).exists():
            model.model.load_state_dict(read_tensors(self._weights(len(domains) - 1)), strict=False)
            half = folder.with_suffix(".part")
            shutil.rmtree(half, ignore_errors=True)
            save_model(model.merged(), half)
            self.bench.adapters.tokenizer.save_pretrained(half)
            half.rename(folder)
        matrix = ForgettingMatrix(domains, before["losses"], [s["losses"] for s in stages])
        return {
            "rate": self.a.rate,
            "parameters": sum(p.numel() for p in model.parameters.values()),
            "general": [before["general"], *(s["general"] for s in stages)],
            "seconds": sum(s["seconds"] for s in stages),
            "losses": [before["losses"], *(s["losses"] for s in stages)],
            "matrix": matrix.to_json(),
        }

    def _row(self, model: Baseline) -> dict[str, Any]:
        losses = [self.bench.loss(model, domain, "test") for domain in self.a.domains]
        return {"losses": losses, "general": model.loss(self.bench.general())}

    def _weights(self, number: int) -> Path:
        return self.a.out / "weights" / self.name / f"after-{number}.safetensors"


def table(domains: list[str], found: dict[str, Any]) -> list[str]:
    """Perplexities after each domain, and what they come to."""
    matrix = found["matrix"]
    lines = ["| after | " + " | ".join(domains) + " | other text |", "|---|" + "---:|" * (len(domains) + 1)]
    for name, row, general in zip(
        ["nothing", *domains], [matrix["before"], *matrix["after"]], found["general"], strict=True
    ):
        lines.append(f"| {name} | " + " | ".join(f"{v:.2f}" for v in row) + f" | {math.exp(general):.1f} |")
    said = {key: matrix[key] for key in ("average_forgetting", "backward_transfer", "forward_transfer")}
    own = [row[i] for i, row in enumerate(matrix["after"])]
    means = [math.exp(sum(map(math.log, r)) / len(r)) for r in (matrix["before"], own, matrix["after"][-1])]
    lines.append(
        f"geometric mean: {means[0]:.2f} before, {means[1]:.2f} of each as it was learned, {means[2]:.2f} at the end; "
        + ", ".join(f"{key.replace('_', ' ')} {value:+.3f}" for key, value in said.items() if value is not None)
        + f" nats a token; {found['seconds']:.0f} s"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lora", type=parse_count, help="an adapter of so many parameters; by default all of the base")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--test-tokens", type=parse_count, default=4_000)
    a = parser.parse_args()
    same_settings(
        a.out,
        {"base": fingerprint(a.base), **{k: getattr(a, k) for k in (
            "domains", "general", "general_tokens", "text", "tokens", "test_tokens")}},
    )  # fmt: skip
    print(machine())
    bench = Sequence(a)
    found = bench.run()
    write_atomic(a.out / f"{bench.name}.json", json.dumps(found, indent=1).encode())
    print("\n".join(table(a.domains, found)))


if __name__ == "__main__":
    main()
