"""Forgetting: whether base and modules still answer, bit for bit, as they did when each module was learned.

Knows the probe that every module's manifest records; not what the modules are about.
"""

from __future__ import annotations

import math

from growlm.engine import Engine
from growlm.modules import ModuleSet
from growlm.modules.probe import probe
from growlm.progress import track

_BASE = "base"  # no module can have this name


def forgetting(engine: Engine) -> tuple[float | None, dict[str, list[str]]]:
    """Compares what base and modules answer now with what they answered when each module was learned.

    Returns:
        The largest increase of a part's log-loss, in nats a token, among those whose loss is not what it was: a mean
        would hide one part behind those that stayed, or behind another that fell. Below 0 where all of these fell, 0
        where none has moved, None where no module could be compared. And the names of the parts that were `checked`,
        have `changed` in any bit, or are `not_comparable`. The base counts as one part, however many modules recorded
        it.
    """
    checked: list[str] = []
    changed: set[str] = set()
    not_comparable: set[str] = set()
    increases: dict[str, float] = {}  # by part; of the base, the largest over its records
    base_now = probe(ModuleSet(engine.base))
    for name, stored in track(engine.store.modules.items(), "looking for forgetting", "modules"):
        record = stored.manifest.training.get("probe")
        if not isinstance(record, dict):
            continue
        checked.append(name)
        with engine.modules.using([name]) as held:
            module_now = probe(ModuleSet(engine.base, [held[name]]))
        for part, now, then in ((name, module_now, record.get("module")), (_BASE, base_now, record.get("base"))):
            found = then if isinstance(then, dict) else {}
            if "logits" in found and found["logits"] != now["logits"]:
                changed.add(part)
            increase = now["loss"] - found["loss"] if isinstance(found.get("loss"), int | float) else math.nan
            if math.isfinite(increase):
                increases[part] = max(increase, increases.get(part, -math.inf))
            else:
                not_comparable.add(part)
    if checked:
        checked.insert(0, _BASE)
    # The base alone, which nothing ever trains, would answer 0 for modules of which nothing is known.
    compared = increases.keys() - {_BASE}
    largest = max((x for x in increases.values() if x != 0), default=0.0) if compared else None
    not_comparable -= increases.keys()
    return largest, {"checked": checked, "changed": sorted(changed), "not_comparable": sorted(not_comparable)}
