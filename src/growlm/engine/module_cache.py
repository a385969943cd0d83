"""Module cache: which modules are in memory, under a budget of bytes that is never passed.

Counts bytes before they are read: a swap first evicts, then loads. What others hold of the budget, as keys and values,
is as good as gone. Modules in use are pinned and stay. A module in memory counts as it is there, whatever version the
disk has by now. Knows names, versions, sizes and a function that loads; never runs a module and never opens a file
itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from growlm.engine.fetching import Fetcher
from growlm.errors import BudgetError, GrowlmError, setting
from growlm.modules import KnowledgeModule
from growlm.units import format_size

if TYPE_CHECKING:
    from growlm.store import StoredModule


_TENDED = 1.0  # seconds between two looks at whether others hang


@dataclass(frozen=True)
class Found:
    """One version of a module on the disk.

    Attributes:
        stored: which.
        bytes: what it takes once loaded.
        load: reads exactly this one.
    """

    stored: StoredModule
    bytes: int
    load: Callable[[], KnowledgeModule]


@dataclass
class CacheCounts:
    """What has happened since the cache was made."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class ModuleCache:
    """Modules in memory, least recently used first.

    Args:
        budget: bytes for modules; None for no bound.
        find: the current version of a module. It is called with the lock held, so it should read no more than a
            manifest and a header.
        reserved: what else counts against the whole budget, for messages.
        hint: what else than a larger budget would help, for messages.
        idle: seconds after which a module that nobody uses is let go of; None for never.
        held: bytes of the budget that others hold now.
        make_way: called before a module is read, which is counted by then.
    """

    def __init__(
        self,
        budget: int | None,
        find: Callable[[str], Found],
        reserved: str = "",
        hint: str = "",
        idle: float | None = None,
        held: Callable[[], int] = lambda: 0,
        make_way: Callable[[], None] = lambda: None,
    ) -> None:
        self._budget, self._held, self._make_way = budget, held, make_way
        self._idle = idle
        self._used: dict[str, float] = {}  # when a module was let go of last
        self._kept: set[str] = set()
        self._find = find
        self._reserved, self._hint = reserved, hint
        self._resident: OrderedDict[str, Future[KnowledgeModule]] = OrderedDict()
        self._found: dict[str, Found] = {}  # of those that are resident
        self._pins: Counter[str] = Counter()
        self._lock = threading.Condition()
        self._fetcher = Fetcher()
        self.counts = CacheCounts()
        self.changes = 0  # grows with everything that may make room, or take some

    @property
    def resident(self) -> list[str]:
        """Names in memory, the least recently used first."""
        with self._lock:
            return list(self._resident)

    @property
    def resident_bytes(self) -> int:
        """Bytes of modules in memory, those still being read included."""
        with self._lock:
            return self._taken()

    def resident_version(self, name: str) -> StoredModule | None:
        """The version in memory, None if there is none."""
        with self._lock:
            return self._found[name].stored if name in self._found else None

    def found(self, name: str) -> Found:
        """The version in memory, or else the current one."""
        with self._lock:
            return self._found.get(name) or self._find(name)

    def make_fit(self, names: Collection[str], beside: int = 0, *, waits: bool = True) -> bool:
        """Sees to it that modules fit the budget together if every other module were evicted. Where a version in memory
        is what makes them too large, and the current one is smaller, it goes, if it is not in use.

        Args:
            beside: bytes that who uses them takes as well.
            waits: for a version that is to go and is still being read.

        Returns:
            Whether they do now: not while a version is being read that is to go, and was not waited for.

        Raises:
            BudgetError: they do not fit together; nothing has changed.
        """
        if self._budget is None:
            return True
        with self._lock:
            pinned = sorted(name for name in self._kept - set(names) if name in self._found)
            room = self._budget - beside - sum(self._found[name].bytes for name in pinned)
            sizes = {name: self.found(name).bytes for name in names}
            smaller = self._smaller_on_disk(sizes) if sum(sizes.values()) > room else {}
            replaced: list[str] = []
            for name in sorted(smaller, key=lambda n: smaller[n] - sizes[n]):
                if sum(sizes.values()) <= room:
                    break
                sizes[name] = smaller[name]
                replaced.append(name)
            if sum(sizes.values()) > room:
                text = f"keys and values of this text {format_size(beside)}" if beside else ""
                listed = ", ".join([*(f"{n} {format_size(b)}" for n, b in sizes.items()), *[text] * bool(beside)])
                what = "does not fit" if len(sizes) + bool(beside) == 1 else "do not fit together"
                stay = f", less what is pinned ({', '.join(pinned)})" if pinned else ""
                shorter = f", or ask for fewer tokens with {setting('max_new_tokens')}" if beside else ""
                raise BudgetError(
                    f"{listed} {what}: {format_size(self._budget)} are left for modules, keys and values"
                    f"{self._reserved}{stay}; raise --memory by at least {format_size(sum(sizes.values()) - room)}"
                    f"{shorter}{self._hint}"
                )
            if waits:
                self._settle(replaced)
            elif not all(self._resident[name].done() for name in replaced):
                return False
            for name in replaced:
                self.drop(name)
            return True

    def acquire(self, names: Sequence[str]) -> dict[str, KnowledgeModule]:
        """Brings modules into memory, by name, and pins them until `release`.

        Raises:
            BudgetError: they cannot fit beside what is pinned.
        """
        names = list(dict.fromkeys(names))
        self.make_fit(names)
        futures: dict[str, Future[KnowledgeModule]] = {}
        try:
            for name in names:
                with self._lock:
                    futures[name] = self._there(name, set(names))
                    self._pins[name] += 1
            return {name: self._read(future) for name, future in futures.items()}
        except BaseException:
            self.release(list(futures))
            raise

    def _read(self, future: Future[KnowledgeModule]) -> KnowledgeModule:
        """Waits for a module, and for no other that hangs."""
        while not wait([future], _TENDED).done:
            self._fetcher.tend()
        return future.result()

    def begin(
        self, names: Sequence[str], beside: int = 0
    ) -> tuple[dict[str, Future[KnowledgeModule]], list[str]] | None:
        """Pins modules until `release` and begins to read those that are not in memory, without waiting for anything.

        Args:
            beside: bytes that who uses them takes as well, and that others hold already (`held`).

        Returns:
            Each of them, once it has been read, and the names of those that were not in memory; None, and nothing has
            changed, where there is no room for them beside what is in use or being read.

        Raises:
            BudgetError: they would not fit if every other module were evicted.
            What `find` raises.
        """
        names = list(dict.fromkeys(names))
        if not self.make_fit(names, beside, waits=False):
            return None
        with self._lock:
            missing = [name for name in names if name not in self._resident]
            current = {name: self._find(name) for name in missing}
            if self._budget is not None:
                needed = sum(found.bytes for found in current.values())
                spare = sum(self._found[name].bytes for name in self._evictable(set(names)))
                if self._free() + spare < needed:
                    return None
                self._make_room(needed, set(names))
            futures = {name: self._there(name, set(names), current.get(name)) for name in names}
            for name in names:
                self._pins[name] += 1
            return futures, missing

    def hanging(self) -> set[str]:
        """Names of modules that have been read for so long that nobody should keep a place for them."""
        late = self._fetcher.hanging()
        if not late:
            return set()
        with self._lock:
            return {name for name, future in self._resident.items() if future in late}

    def wait(self, seconds: float) -> None:
        """Until something was read or released, at the longest so many seconds."""
        with self._lock:
            self._lock.wait(seconds)

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[dict[str, KnowledgeModule]]:
        """`acquire` and `release` around a block. Keep no reference beyond it: what is evicted must be gone."""
        held = self.acquire(names)
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
                self._used[name] = time.monotonic()
            self.changes += 1
            self._lock.notify_all()

    def keep(self, name: str) -> None:
        """Brings a module into memory, if it is not there, and keeps it there until `let_go`, whatever comes. A version
        that is there stays.

        Raises:
            BudgetError: it cannot fit beside what is pinned.
            What `find` raises.
        """
        with self._lock:
            if name in self._kept:
                return
        self.acquire([name])
        with self._lock:
            if name in self._kept:  # by another thread, meanwhile
                self._pins[name] -= 1
            self._kept.add(name)

    def let_go(self, name: str) -> None:
        """A module that was kept may be evicted again."""
        with self._lock:
            if name in self._kept:
                self._kept.discard(name)
                self.release([name])

    @property
    def kept(self) -> list[str]:
        """Names of modules that `keep` keeps."""
        with self._lock:
            return sorted(self._kept)

    def tend(self) -> None:
        """To be called now and then: lets go of modules that nobody has used for as long as modules may be idle, and
        has others read where one hangs."""
        self._fetcher.tend()
        if self._idle is None:
            return
        with self._lock:
            now = time.monotonic()
            for name in self._evictable(set()):
                if now - self._used.setdefault(name, now) >= self._idle:
                    self._evict(name)

    def drop(self, name: str) -> None:
        """Forgets a module that is not pinned."""
        with self._lock:
            if name in self._resident and not self._pins[name]:
                self._evict(name)

    def close(self) -> None:
        self._fetcher.close()
        with self._lock:
            self._resident.clear()
            self._found.clear()

    def _there(self, name: str, keep: set[str], current: Found | None = None) -> Future[KnowledgeModule]:
        """A module in memory, which was used now, or one that is begun to be read: the version `current`, where it was
        looked up before."""
        future = self._resident.get(name)
        if future is None:
            return self._start(name, keep, current or self._find(name))
        self.counts.hits += 1
        self._resident.move_to_end(name)
        return future

    def _start(self, name: str, keep: set[str], found: Found) -> Future[KnowledgeModule]:
        """Makes room for a module and begins to read it: the version that was counted, not a later one."""
        self._make_room(found.bytes, keep)
        if name in self._resident:  # another thread began to, while this one waited for room
            return self._resident[name]
        self._found[name] = found
        self._make_way()
        self.counts.loads += 1
        try:
            future = self._resident[name] = self._fetcher.submit(found.load)
        except BaseException:  # no thread to be had, say
            del self._found[name]
            raise
        future.add_done_callback(lambda done: self._is_read(name, done))
        return future

    def _smaller_on_disk(self, sizes: dict[str, int]) -> dict[str, int]:
        """Bytes of the current versions of those modules in memory that take fewer than `sizes`, and are not in use."""
        smaller: dict[str, int] = {}
        for name in [n for n in sizes if n in self._found and not self._pins[n]]:
            with suppress(GrowlmError):  # a damaged version on the disk is no reason to lose the one in memory
                smaller[name] = self._find(name).bytes
        return {name: size for name, size in smaller.items() if size < sizes[name]}

    def _taken(self) -> int:
        return sum(found.bytes for found in self._found.values())

    def _free(self) -> int:
        assert self._budget is not None
        return self._budget - self._held() - self._taken()

    def _make_room(self, needed: int, keep: set[str]) -> None:
        if self._budget is None:
            return
        free = self._free()
        candidates = self._evictable(keep)
        spare = sum(self._found[n].bytes for n in candidates)
        if free + spare < needed:
            # A module that is only being read can go once it is there; nobody knows when one that hangs will be.
            late = keep | self.hanging()
            waiting = [n for n, f in self._resident.items() if not self._pins[n] and n not in late and not f.done()]
            if not waiting:
                pinned = ", ".join(n for n in self._resident if self._pins[n]) or "none"
                raise BudgetError(
                    f"{format_size(needed)} more do not fit: {format_size(self._budget)} are left for modules, keys "
                    f"and values{self._reserved}, in use are: {pinned}, and {format_size(self._held())} of keys and "
                    "values; raise --memory"
                )
            self._settle(waiting)
            self._make_room(needed, keep)
            return
        for name in candidates:
            if free >= needed:
                return
            free += self._found[name].bytes
            self._evict(name)

    def _evictable(self, keep: set[str]) -> list[str]:
        """Modules that can go now, the least recently used first."""
        return [n for n, f in self._resident.items() if not self._pins[n] and n not in keep and f.done()]

    def _evict(self, name: str) -> None:
        del self._resident[name]
        del self._found[name]
        self._used.pop(name, None)
        self.counts.evictions += 1
        self.changes += 1

    def _settle(self, names: Sequence[str]) -> None:
        """Waits until modules have been read, or could not be. Without the lock, which the reader takes after each."""
        futures = [self._resident[name] for name in names if name in self._resident]
        self._lock.wait_for(lambda: all(future.done() for future in futures))

    def _is_read(self, name: str, future: Future[KnowledgeModule]) -> None:
        """What was not read takes no room, and is read again when it is asked for again."""
        failed = future.cancelled() or future.exception() is not None
        with self._lock:
            if failed and self._resident.get(name) is future:
                del self._resident[name], self._found[name]
            self.changes += 1
            self._lock.notify_all()
