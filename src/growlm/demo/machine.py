"""Machine: what it takes for a token with a base of each preset, measured by a demo in small.

Every verb runs as it does in the demo, on a little text, in a folder that goes when it has been measured. What a verb
takes beside its tokens is measured with it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from growlm.base.placement import find_device
from growlm.demo.sizing import Speeds, presets, rehearsal, text_cost, with_fixed, worth_measuring
from growlm.demo.stages import Stages


def measure(seconds: float, device: str, precision: str) -> dict[str, Speeds]:
    """Speeds by preset, of the presets that could do in so many seconds.

    Raises:
        DataError: this install lacks the text.
    """
    ended = time.monotonic() + seconds
    smallest, *larger = presets()
    speeds = {smallest: _speeds(smallest, device, precision)}
    for preset in larger:
        if worth_measuring(preset, speeds[smallest], ended - time.monotonic()):
            speeds[preset] = _speeds(preset, device, precision)
    return speeds


def _speeds(preset: str, device: str, precision: str) -> Speeds:
    size = rehearsal(preset)
    took: dict[str, float] = {}
    busy: dict[str, float] = {}
    done: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="growlm-demo-") as folder:
        stages = Stages(Path(folder), size, device, precision, progress=False)
        for stage in size.stages:
            started, worked = time.monotonic(), time.thread_time()
            done[stage] = stages.run(stage, done)
            took[stage], busy[stage] = time.monotonic() - started, time.thread_time() - worked
    steady = dict.fromkeys(size.stages, 1.0)
    if find_device(device).type == "cpu":
        # Others on the machine disturb one stage and not the next: each is taken to wait as much as all did together.
        waits = sum(took.values()) / sum(busy.values())
        steady = {stage: waits * busy[stage] / took[stage] for stage in size.stages}
    (domain,) = size.learn_tokens
    learning = f"learn-{domain}"
    scored = done["evaluate"]["evaluation"]["compute"]["tokens_per_second"]
    pretrained, learned = done["pretrain"], done[learning]
    speeds = Speeds(
        byte=steady["text"] * took["text"] / text_cost(size),
        pretrain=steady["pretrain"] * pretrained["seconds"] / pretrained["tokens"],
        learn=steady[learning] * learned["seconds"] / learned["tokens"],
        read=steady["evaluate"] / scored["base"],
        score=steady["evaluate"] / scored["module"],
        fixed={},
    )
    return with_fixed(speeds, size, {stage: steady[stage] * took[stage] for stage in size.stages})
