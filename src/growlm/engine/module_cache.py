"""Module cache: which modules are in memory, under a budget of bytes that is never passed.

Counts bytes before they are read: a swap first evicts, then loads. Modules in use are pinned and stay. Knows names,
sizes and a function that loads; never runs a module and never opens a file itself.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from growlm.errors import BudgetError
from growlm.modules import KnowledgeModule
from growlm.units import format_size


@dataclass
class CacheCounts:
    """What has happened since the cache was made."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    prefetches: int = 0


class ModuleCache:
    """Modules in memory, least recently used first.

    Args:
        budget: bytes for modules; None for no bound.
        find: bytes of a module once loaded, and a function that reads exactly what was found. It is called without the
            lock held, at most once at a time for a name.
        reserved: what else counts against the whole budget, for messages.
    """

    def __init__(
        self,
        budget: int | None,
        find: Callable[[str], tuple[int, Callable[[], KnowledgeModule]]],
        reserved: str = "",
    ) -> None:
        self._budget = budget
        self._find = find
        self._reserved = reserved
        self._resident: OrderedDict[str, Future[KnowledgeModule]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._pins: Counter[str] = Counter()
        self._lock = threading.Condition()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="growlm-load")
        self.counts = CacheCounts()

    @property
    def resident(self) -> list[str]:
        """Names in memory, the least recently used first."""
        with self._lock:
            return list(self._resident)

    @property
    def resident_bytes(self) -> int:
        """Bytes of modules in memory, those still being read included."""
        with self._lock:
            return sum(self._bytes.values())

    def check_fits(self, names: Sequence[str]) -> None:
        """
        Raises:
            BudgetError: these modules do not fit the budget together, even with all others gone.
        """
        if self._budget is None:
            return
        sizes = {n: self._find(n)[0] for n in names}
        if sum(sizes.values()) > self._budget:
            listed = ", ".join(f"{n} {format_size(b)}" for n, b in sizes.items())
            what = "does not fit" if len(sizes) == 1 else "do not fit together"
            raise BudgetError(
                f"{listed} {what}: {format_size(self._budget)} are left for modules{self._reserved}; raise --memory by "
                f"at least {format_size(sum(sizes.values()) - self._budget)}"
            )

    def acquire(self, names: Sequence[str]) -> tuple[dict[str, KnowledgeModule], list[str]]:
        """Brings modules into memory and pins them until `release`.

        Returns:
            The modules by name, and the names that had to be read from the disk for this call.

        Raises:
            BudgetError: they cannot fit beside what is pinned.
        """
        names = list(dict.fromkeys(names))
        self.check_fits(names)
        futures: dict[str, Future[KnowledgeModule]] = {}
        loaded: list[str] = []
        try:
            for name in names:
                with self._lock:
                    future = self._resident.get(name)
                    if future is not None:
                        self.counts.hits += 1
                        self._resident.move_to_end(name)
                    else:
                        future = self._start(name, keep=set(names))
                        loaded.append(name)
                    self._pins[name] += 1
                    futures[name] = future
            return {name: future.result() for name, future in futures.items()}, loaded
        except BaseException:
            self.release(list(futures))
            raise

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[dict[str, KnowledgeModule]]:
        """`acquire` and `release` around a block. Keep no reference beyond it: what is evicted must be gone."""
        held, _ = self.acquire(names)
        try:
            yield held
        finally:
            held.clear()
            self.release(names)

    def release(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                self._pins[name] -= 1
                assert self._pins[name] >= 0
            self._lock.notify_all()

    def prefetch(self, name: str, keep: Collection[str] = ()) -> bool:
        """Begins to read a module in the background, if room can be made without touching what is pinned or in `keep`.

        A module that cannot be read says so when it is acquired.
        """
        with self._lock:
            if name in self._resident:
                return True
            try:
                self._start(name, keep={name, *keep})
            except BudgetError:
                return False
            self.counts.prefetches += 1
            return True

    def drop(self, name: str) -> None:
        """Forgets a module that is not pinned."""
        with self._lock:
            if name in self._resident and not self._pins[name]:
                self._evict(name)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._resident.clear()
            self._bytes.clear()

    def _start(self, name: str, keep: set[str]) -> Future[KnowledgeModule]:
        """Makes room for a module and begins to read it: the version that was counted, not a later one."""
        size, load = self._find(name)
        self._make_room(size, keep)
        self._bytes[name] = size
        self.counts.loads += 1
        future = self._resident[name] = self._reader.submit(load)
        future.add_done_callback(lambda done: self._forget_failed(name, done))
        return future

    def _make_room(self, needed: int, keep: set[str]) -> None:
        if self._budget is None:
            return
        free = self._budget - sum(self._bytes.values())
        candidates = [n for n, f in self._resident.items() if not self._pins[n] and n not in keep and f.done()]
        spare = sum(self._bytes[n] for n in candidates)
        if free + spare < needed:
            # A module that is only being read can go once it is there.
            waiting = [n for n, f in self._resident.items() if not self._pins[n] and n not in keep and not f.done()]
            if not waiting:
                pinned = ", ".join(n for n in self._resident if self._pins[n]) or "none"
                raise BudgetError(
                    f"{format_size(needed)} more do not fit: {format_size(self._budget)} are left for modules"
                    f"{self._reserved}, in use are: {pinned}; raise --memory"
                )
            for name in waiting:
                self._resident[name].exception()
            self._make_room(needed, keep)
            return
        for name in candidates:
            if free >= needed:
                return
            free += self._bytes[name]
            self._evict(name)

    def _evict(self, name: str) -> None:
        del self._resident[name]
        del self._bytes[name]
        self.counts.evictions += 1

    def _forget_failed(self, name: str, future: Future[KnowledgeModule]) -> None:
        """What was not read takes no room, and is read again when it is asked for again."""
        if not future.cancelled() and future.exception() is None:
            return
        with self._lock:
            if self._resident.get(name) is future:
                del self._resident[name], self._bytes[name]
