"""Graphs: one decode pass of the base's layers, joined over so many texts, started kernel by kernel and as one CUDA
graph. Says whether graphs would pay, and for how many texts.

The graph is of fixed texts and lengths: an engine would have to copy its own into it, and to choose one by the number
of texts. What prepares a pass (places, masks, rotary positions) is measured apart and stays outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.stages.bases import prompts_of, store_of
from benchmarks.stages.bench import Bench, Side, ms, ratio
from growlm.base import Base, Pass
from growlm.base.rooms import Rooms, TextCache
from growlm.base.segments import Segment
from growlm.engine.runner import Runner, Work
from growlm.modules import ModuleSet


def run(bench: Bench) -> None:
    base = store_of(bench).load_base(device=bench.device)
    buckets, past = ((1, 2), 16) if bench.tiny else ((1, 8, 32), 512)
    if not bench.cuda:
        bench.tell("graphs", {"left out": "a processor has no CUDA graphs; the pass alone is measured"})
    for number, count in enumerate(buckets):
        if bench.over(f"{count} texts"):
            break
        with torch.inference_mode():
            _at(bench, base, count, past, bench.left() / (len(buckets) - number))
        bench.tidy()


def _at(bench: Bench, base: Base, count: int, past: int, seconds: float) -> None:
    caches = _read(base, count, past)
    hidden = base.embedding(torch.ones(1, count, dtype=torch.long, device=bench.device))
    layers = base.layers_to_run()

    def prepared() -> Pass:
        return base.pass_of_segments(hidden, [Segment(1, past, cache) for cache in caches])

    shared = prepared()

    def eager() -> Tensor:
        """Writes each text's next keys and values where the last call did."""
        for cache in caches:
            for slot in cache.lengths:
                cache.lengths[slot] = past
        return base.run(hidden, layers, shared)

    sides: dict[str, Side] = {"preparation": prepared, "eager": eager}
    if bench.cuda:
        try:
            sides["graph"] = _captured(eager)
        except Exception as error:
            bench.problem(f"{count} texts, capture", error)
    taken = bench.turns(f"{count} texts", sides, seconds=seconds / 2, rounds=21)
    weights = sum(p.nbytes for layer in base.layers for p in layer.parameters())
    kept = sum(2 * cache.of(slot)[0].nbytes for cache in caches for slot in range(base.num_layers))
    floor = bench.moving(weights + kept)
    for name, took in taken.items():
        numbers = {"ms": ms(took)}
        if name != "preparation":
            numbers |= {"floor ms": ms(floor), "times its floor": took / floor}
        bench.tell(f"{count} texts, {name}", numbers | {"eager over it": ratio(taken.get("eager"), took)})
    if "graph" in taken and "preparation" in taken:
        whole = {name: taken["preparation"] + taken[name] for name in ("eager", "graph")}
        bench.tell(f"{count} texts, with preparation", {
            "eager ms": ms(whole["eager"]), "graph ms": ms(whole["graph"]),
            "eager over graph": whole["eager"] / whole["graph"],
        })  # fmt: skip


def _read(base: Base, count: int, past: int) -> list[TextCache]:
    """Texts of so many tokens, read, with room for one more."""
    rooms, runner, alone = Rooms(), Runner(base), ModuleSet(base)
    caches = [rooms.new() for _ in range(count)]
    for cache, ids in zip(caches, prompts_of(base.vocab_size, count, past), strict=True):
        cache.reserve(past + 1)
        runner.run([Work(alone, torch.tensor(ids, device=base.device), 0, cache)])
    return caches


def _captured(run: Callable[[], Tensor]) -> Callable[[], None]:
    """What replays a pass. Before it is captured it runs on another stream: what libraries make on first use must not
    fall into the graph.

    Raises:
        ArithmeticError: the replayed pass gives something else.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = run().clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    apart = float((out - wanted).float().abs().max() / wanted.float().abs().max())
    if not apart <= 1e-2:
        raise ArithmeticError(f"a replayed pass is {apart:.2g} from the pass")
    return graph.replay
