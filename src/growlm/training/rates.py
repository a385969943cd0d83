"""Rates: the peak learning rate that suits a base, a module and a text, found by short trials, successively halved.

All candidates train for a few steps on the same text in the same order; the better half goes on for twice as many, from
the start again, until two are left. Few steps speak for low rates, since what a high one loses at first it wins back
later: of those that do nearly as well as the best, the highest counts as the better one, and of the last two the rate
that is taken lies the nearer to the higher one the less that one's loss is above the other's. Knows rates and losses;
not what is trained. (Successive halving: Jamieson and Talwalkar, 2016.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from growlm.disk.files import read_json, write_atomic
from growlm.progress import phase, say

_SPREADS = ((0.1, 0.32, 1.0, 3.2), (0.1, 1.0))  # of the rate that is computed from the width; the second in short runs
_NEARLY = 0.05  # share of the best loss by which a higher rate may do worse, and still counts as the better one
_SHARE = 10  # trials take one step of so many


@dataclass(frozen=True)
class Trial:
    """What became of a rate.

    Attributes:
        loss: nats a token over the later half of the steps, each on text that was not trained on before.
    """

    rate: float
    steps: int
    loss: float


def trials_for(around: float, num_steps: int, per_step: int) -> tuple[list[float], list[tuple[int, int]]]:
    """Rates to try and in which rounds, as `rounds` says: four about three times apart, or where there is no time for
    these, two; none where a run is too short for any."""
    for shares in _SPREADS:
        if plan := rounds(len(shares), num_steps, per_step):
            return [float(f"{around * share:.2g}") for share in shares], plan
    return [], []


def rounds(num_rates: int, num_steps: int, per_step: int) -> list[tuple[int, int]]:
    """How many rates are tried in each round, and for how many trial steps; empty where a run is too short for trials.

    Args:
        num_steps: of the run.
        per_step: trial steps that cost as much as one of its steps.
    """
    kept = [num_rates]
    while kept[-1] > 2:
        kept.append(math.ceil(kept[-1] / 2))
    # Each round doubles the steps of a rate.
    unit = num_steps * per_step // _SHARE // sum(rates * 2**i for i, rates in enumerate(kept))
    return [(rates, unit * 2**i) for i, rates in enumerate(kept)] if unit >= 2 else []


def find_rate(
    rates: Sequence[float], plan: Sequence[tuple[int, int]], trial: Callable[[float, int], float], file: Path
) -> tuple[float, list[Trial]]:
    """The best rate, and all that was tried.

    Args:
        plan: as `rounds` makes it, at least one.
        trial: trains from the start at a rate for so many steps; the loss, infinite where it became no number.
        file: what is found is kept there, so that a run that is started again goes on with it.
    """
    known = _read(file)
    done: list[Trial] = []
    left = sorted(rates)
    total = sum(number * steps for number, steps in plan)
    with phase("trying learning rates", total, "steps") as trying:
        for turn, (number, steps) in enumerate(plan, start=1):
            assert number == len(left)
            losses: dict[float, float] = {}
            for rate in left:
                loss = known.get((rate, steps))
                if loss is None:
                    loss = trial(rate, steps)
                losses[rate] = loss
                done.append(Trial(rate, steps, loss))
                _write(file, done)
                trying.advance(steps, note=f"{rate:.2g}: {loss:.3f}")
            told = ", ".join(f"{losses[rate]:.3f} at {rate:.2g}" for rate in left)
            say(f"learning rates, round {turn}: loss after {steps} short steps {told}")
            left = sorted(_better_first(losses)[: max(number // 2, 2)])
    low, high = left
    best = between(low, high, losses[low], losses[high])
    say(f"learning rate {best:.2g}, chosen from {low:.2g} to {high:.2g} by their losses")
    return best, done


def between(low: float, high: float, low_loss: float, high_loss: float) -> float:
    """A rate from `low` to `high`: the higher one if its loss is no more, the lower one if it is more by what still
    counts as nearly as well, and evenly between on a logarithmic scale."""
    nearly = _NEARLY * abs(low_loss)
    if not math.isfinite(high_loss) or high_loss > low_loss + nearly:
        return low
    if high_loss <= low_loss:
        return high
    return float(f"{high * (low / high) ** ((high_loss - low_loss) / nearly):.2g}")


def _better_first(losses: Mapping[float, float]) -> list[float]:
    """Rates that do nearly as well as the best, the highest first; then the others, the best first."""
    best = min(losses.values())
    near = [rate for rate, loss in losses.items() if math.isfinite(loss) and loss <= best + _NEARLY * abs(best)]
    rest = [rate for rate in losses if rate not in near]
    return [*sorted(near, reverse=True), *sorted(rest, key=lambda rate: (losses[rate], rate))]


def _read(file: Path) -> dict[tuple[float, int], float]:
    try:
        known = [(float(t["rate"]), int(t["steps"]), t["loss"]) for t in read_json(file)]
        return {(rate, steps): math.inf if loss is None else float(loss) for rate, steps, loss in known}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(file: Path, done: Sequence[Trial]) -> None:
    told = [{**asdict(t), "loss": t.loss if math.isfinite(t.loss) else None} for t in done]
    write_atomic(file, json.dumps(told).encode())
