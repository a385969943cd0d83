"""Metrics: what a server counts, as Prometheus reads it. Names end as vLLM's do, which dashboards know."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from growlm.engine import Engine, Generation

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one engine.

    Args:
        running_and_waiting: how many requests are being answered, and how many are not yet.
    """

    def __init__(self, engine: Engine, running_and_waiting: Callable[[], tuple[int, int]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._written = 0

        def gauge(name: str, told: str, value: Callable[[], float]) -> None:
            Gauge(f"growlm_{name}", told, registry=registry).set_function(value)

        gauge("num_requests_running", "Requests that are being answered.", lambda: running_and_waiting()[0])
        gauge("num_requests_waiting", "Requests that wait.", lambda: running_and_waiting()[1])
        gauge("resident_bytes", "Bytes of weights in memory.", lambda: engine.resident_bytes)
        gauge("used_bytes", "Bytes of all that the memory budget bounds.", lambda: engine.used_bytes)
        if engine.memory is not None:
            memory = engine.memory
            gauge("budget_bytes", "The memory budget.", lambda: memory)
        gauge("modules_resident", "Modules in memory.", lambda: len(engine.modules.resident))

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"growlm_{name}", told, labels, registry=registry)

        def seconds(name: str, told: str) -> Histogram:
            return Histogram(f"growlm_{name}_seconds", told, buckets=_SECONDS, registry=registry)

        self._prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self._generated = counter("generation_tokens", "Tokens that were written.")
        self._success = counter("request_success", "Answers, by why they ended.", "finished_reason")
        self._by_module = counter("module_requests", "Answers, by who wrote them.", "module")
        self._loads = counter("module_loads", "Modules that were read from the disk.", "module")
        self.refused = counter("requests_refused", "Requests for which there was no place.")
        self.first = seconds("time_to_first_token", "Until the first text.")
        self.between = seconds("inter_token_latency", "Between two pieces of text.")
        self._whole = seconds("e2e_request_latency", "Until an answer's end.")

    def ended(self, answer: Generation, seconds: float) -> None:
        """An answer was written whole."""
        self._prompt.inc(answer.prompt_tokens)
        self._generated.inc(len(answer.tokens))
        self._written += len(answer.tokens)
        self._success.labels(answer.finish_reason).inc()
        self._by_module.labels(answer.module or "base").inc()
        self.loaded(answer.loaded)
        self._whole.observe(seconds)

    def loaded(self, names: Iterable[str]) -> None:
        """Modules were read from the disk."""
        for name in names:
            self._loads.labels(name).inc()

    @property
    def generated_tokens(self) -> int:
        """Tokens that were written since the start."""
        return self._written

    def text(self) -> bytes:
        return generate_latest(self._registry)
