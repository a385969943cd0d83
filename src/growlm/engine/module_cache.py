"""Module cache: which modules are in memory, under a budget of bytes that is never passed.

Counts bytes before they are read: a swap first evicts, then loads. What others hold of the budget, as keys and values,
is as good as gone. Modules in use are pinned and stay. A module in memory counts as it is there, whatever version the
disk has by now, until it is retired: then who holds it goes on with it, and who comes is given what the disk has. Knows
names, versions, sizes and a function that loads; never runs a module and never opens a file itself.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from growlm.engine.fetching import Fetcher
from growlm.engine.fitting import Room
from growlm.engine.resident import Found, Resident
from growlm.errors import GrowlmError, UnknownModuleError
from growlm.modules import KnowledgeModule

if TYPE_CHECKING:
    from growlm.store import StoredModule


_TENDED = 1.0  # seconds between two looks at whether others hang


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
        self._room, self._held, self._make_way = Room(budget, reserved, hint), held, make_way
        self._idle = idle
        self._kept: set[str] = set()
        self._find = find
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._retired: list[Resident] = []  # held by those who began with them
        self._lock = threading.Condition()
        self._fetcher = Fetcher()
        self.counts = CacheCounts()
        self._tended = 0
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
            return self._resident[name].found.stored if name in self._resident else None

    def found(self, name: str) -> Found:
        """The version in memory, or else the current one."""
        with self._lock:
            return self._resident[name].found if name in self._resident else self._find(name)

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
        if self._room.num_bytes is None:
            return True
        with self._lock:
            pinned = {n: self._resident[n].found.bytes for n in self._kept - set(names) if n in self._resident}
            sizes = {name: self.found(name).bytes for name in names}
            over = sum(sizes.values()) + beside + sum(pinned.values()) > self._room.num_bytes
            replaced = self._room.fitted(sizes, self._smaller_on_disk(sizes) if over else {}, beside, pinned)
            if waits:
                self._settle([self._resident[name] for name in replaced])
            elif not all(self._resident[name].read for name in replaced):
                return False
            for name in replaced:
                self.drop(name)
            return True

    def acquire(self, names: Sequence[str]) -> dict[str, Resident]:
        """Brings modules into memory, by name, and pins them until `release`.

        Raises:
            BudgetError: they cannot fit beside what is pinned.
        """
        names = list(dict.fromkeys(names))
        self.make_fit(names)
        held: dict[str, Resident] = {}
        try:
            for name in names:
                with self._lock:
                    held[name] = self._there(name, set(names))
                    held[name].pins += 1
            for resident in held.values():
                self._await(resident)
            return held
        except BaseException:
            self.release(held.values())
            raise

    def _await(self, resident: Resident) -> None:
        """Waits for a module, and for no other that hangs.

        Raises:
            What it could not be read for.
        """
        while not wait([resident.future], _TENDED).done:
            self._fetcher.tend()
        resident.module()

    def begin(
        self, names: Sequence[str], beside: int = 0, held: Mapping[str, Resident] | None = None
    ) -> tuple[dict[str, Resident], list[str]] | None:
        """Pins modules until `release` and begins to read those that are not in memory, without waiting for anything.

        Args:
            beside: bytes that who uses them takes as well, and that others hold already (`held`).
            held: those of them that who asks holds by now, in the versions that it goes on with.

        Returns:
            Each of them, which may still be being read, and the names of those that were not in memory; None, and
            nothing has changed, where there is no room for them beside what is in use or being read.

        Raises:
            BudgetError: they would not fit if every other module were evicted.
            What `find` raises.
        """
        names = list(dict.fromkeys(names))
        mine = held or {}
        old = [name for name, one in mine.items() if one.retired]
        beside += sum(mine[name].found.bytes for name in old)
        if not self.make_fit([name for name in names if name not in old], beside, waits=False):
            return None
        with self._lock:
            missing = [name for name in names if name not in self._resident and name not in mine]
            current = {name: self._find(name) for name in missing}
            if self._room.num_bytes is not None:
                needed = sum(found.bytes for found in current.values())
                spare = sum(self._resident[name].found.bytes for name in self._evictable(set(names)))
                if self._free() + spare < needed:
                    return None
                self._make_room(needed, set(names))
            there = {
                name: mine[name] if name in mine else self._there(name, set(names), current.get(name)) for name in names
            }
            for resident in there.values():
                resident.pins += 1
            return there, missing

    def hold(self, held: Iterable[Resident]) -> None:
        """Pins once more what is pinned, until `release`."""
        with self._lock:
            for resident in held:
                resident.pins += 1

    def hanging(self) -> set[str]:
        """Names of modules that have been read for so long that nobody should keep a place for them."""
        late = self._fetcher.hanging()
        if not late:
            return set()
        with self._lock:
            return {name for name, resident in self._resident.items() if resident.future in late}

    def wait(self, seconds: float) -> None:
        """Until something was read or released, at the longest so many seconds."""
        with self._lock:
            self._lock.wait(seconds)

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[dict[str, KnowledgeModule]]:
        """`acquire` and `release` around a block. Keep no reference beyond it: what is evicted must be gone."""
        held = self.acquire(names)
        modules = {name: resident.module() for name, resident in held.items()}
        for module in modules.values():
            module.arrive()
        try:
            yield modules
        finally:
            modules.clear()
            self.release(held.values())

    def release(self, held: Iterable[Resident]) -> None:
        with self._lock:
            for resident in held:
                resident.pins -= 1
                assert resident.pins >= 0
                resident.used = time.monotonic()
                if resident.retired and not resident.pins:
                    self._retired.remove(resident)
                    self.counts.evictions += 1
            self.changes += 1
            self._lock.notify_all()

    def retire_outdated(self) -> None:
        """Retires modules of which the disk has another version than memory, or none. One that is damaged on the disk
        stays."""
        with self._lock:
            for name in {*self._resident, *self._kept}:
                resident = self._resident.get(name)
                try:
                    outdated = self._find(name).mark != (resident and resident.found.mark)
                except UnknownModuleError:
                    outdated = True
                    self._kept.discard(name)  # another that may come under this name is not pinned
                except GrowlmError:
                    outdated = False
                if outdated:
                    self.retire(name)
            self._bring_back()

    def _bring_back(self) -> None:
        """Begins to read modules that are to stay and are not there, as far as there is room."""
        for name in [name for name in self._kept if name not in self._resident]:
            with suppress(GrowlmError):  # who asks for it will be told
                if (begun := self.begin([name])) is not None:
                    self.release(begun[0].values())

    def set_budget(self, budget: int | None, reserved: str) -> None:
        """Another budget from now on, and what the rest is for; what is over it and not in use goes."""
        with self._lock:
            self._room = replace(self._room, num_bytes=budget, reserved=reserved)
            for name in self._evictable(set()):
                if budget is None or self._free() >= 0:
                    break
                self._evict(name)
            self.changes += 1

    @property
    def kept_bytes(self) -> int:
        """Bytes of modules that `keep` keeps."""
        with self._lock:
            return sum(self._resident[name].found.bytes for name in self._kept if name in self._resident)

    @property
    def busy_bytes(self) -> int:
        """Bytes of modules that cannot go now."""
        with self._lock:
            return self._taken() - sum(self._resident[name].found.bytes for name in self._evictable(set()))

    def retire(self, name: str) -> None:
        """A module's version in memory is the disk's no more: who holds it goes on with it, and who asks for it from
        now on is given what the disk has."""
        with self._lock:
            resident = self._resident.get(name)
            if resident is None:
                return
            if not resident.pins and resident.read:
                self._evict(name)
                return
            resident.retired = True
            self._retired.append(self._resident.pop(name))
            self.changes += 1

    def keep(self, name: str) -> None:
        """Brings a module into memory, if it is not there, and keeps it there until `let_go`, whatever comes. A version
        that is there stays.

        Raises:
            BudgetError: it cannot fit beside what is pinned.
            What `find` raises.
        """
        with self._lock:
            before = name in self._kept
            self._kept.add(name)
        try:
            self.release(self.acquire([name]).values())
        except BaseException:
            if not before:
                self.let_go(name)
            raise

    def let_go(self, name: str) -> None:
        """A module that was kept may be evicted again."""
        with self._lock:
            if name in self._kept:
                self._kept.discard(name)
                self.changes += 1
                self._lock.notify_all()

    @property
    def kept(self) -> list[str]:
        """Names of modules that `keep` keeps."""
        with self._lock:
            return sorted(self._kept)

    def tend(self) -> None:
        """To be called now and then: lets go of modules that nobody has used for as long as modules may be idle, and
        has others read where one hangs."""
        self._fetcher.tend()
        with self._lock:
            if self._tended != self.changes:
                self._bring_back()
                self._tended = self.changes
        if self._idle is None:
            return
        with self._lock:
            now = time.monotonic()
            for name in self._evictable(set()):
                resident = self._resident[name]
                resident.used = now if resident.used is None else resident.used
                if now - resident.used >= self._idle:
                    self._evict(name)

    def drop(self, name: str) -> None:
        """Forgets a module that is neither in use, nor kept, nor being read."""
        with self._lock:
            if name in self._evictable(set()):
                self._evict(name)

    def close(self) -> None:
        self._fetcher.close()
        with self._lock:
            self._resident.clear()
            self._retired.clear()

    def _there(self, name: str, keep: set[str], current: Found | None = None) -> Resident:
        """A module in memory, which was used now, or one that is begun to be read: the version `current`, where it was
        looked up before."""
        resident = self._resident.get(name)
        if resident is None:
            return self._start(name, keep, current or self._find(name))
        self.counts.hits += 1
        self._resident.move_to_end(name)
        return resident

    def _start(self, name: str, keep: set[str], found: Found) -> Resident:
        """Makes room for a module and begins to read it: the version that was counted, not a later one."""
        self._make_room(found.bytes, keep)
        if name in self._resident:  # another thread began to, while this one waited for room
            return self._resident[name]
        resident = self._resident[name] = Resident(found, Future())  # counted from now on
        try:
            self._make_way()
            self.counts.loads += 1
            resident.future = self._fetcher.submit(found.load)
        except BaseException:  # no thread to be had, say
            del self._resident[name]
            raise
        resident.future.add_done_callback(lambda done: self._is_read(name, done))
        return resident

    def _smaller_on_disk(self, sizes: dict[str, int]) -> dict[str, int]:
        """Bytes of the current versions of those modules in memory that take fewer than `sizes`, and are not in use."""
        smaller: dict[str, int] = {}
        for name in [n for n in self._unused() if n in sizes]:
            with suppress(GrowlmError):  # a damaged version on the disk is no reason to lose the one in memory
                smaller[name] = self._find(name).bytes
        return {name: size for name, size in smaller.items() if size < sizes[name]}

    def _taken(self) -> int:
        return sum(resident.found.bytes for resident in (*self._resident.values(), *self._retired))

    def _free(self) -> int:
        assert self._room.num_bytes is not None
        return self._room.num_bytes - self._held() - self._taken()

    def _make_room(self, needed: int, keep: set[str]) -> None:
        if self._room.num_bytes is None:
            return
        self._retired = [one for one in self._retired if one.pins or not one.read]
        free = self._free()
        unused = [name for name in self._unused() if name not in keep]
        read = {name for name in unused if self._resident[name].read}  # asked once: the next may be there at any moment
        candidates = [name for name in unused if name in read]
        spare = sum(self._resident[n].found.bytes for n in candidates)
        if free + spare < needed:
            # A module that is only being read can go once it is there; nobody knows when one that hangs will be.
            coming = [self._resident[name] for name in unused if name not in read]
            coming += [one for one in self._retired if not one.pins]
            hanging = self._fetcher.hanging()
            waiting = [one for one in coming if one.future not in hanging]
            if not waiting:
                raise self._room.taken(needed, self._held(), set(self._resident) - set(self._unused()))
            self._settle(waiting)
            self._make_room(needed, keep)
            return
        for name in candidates:
            if free >= needed:
                return
            free += self._resident[name].found.bytes
            self._evict(name)

    def _evictable(self, keep: set[str]) -> list[str]:
        """Modules that can go now, the least recently used first."""
        return [name for name in self._unused() if name not in keep and self._resident[name].read]

    def _unused(self) -> list[str]:
        """Modules that nobody holds and that need not stay, the least recently used first."""
        return [name for name, one in self._resident.items() if not one.pins and name not in self._kept]

    def _evict(self, name: str) -> None:
        del self._resident[name]
        self.counts.evictions += 1
        self.changes += 1

    def _settle(self, residents: Sequence[Resident]) -> None:
        """Waits until modules have been read, or could not be. Without the lock, which the reader takes after each."""
        self._lock.wait_for(lambda: all(resident.read for resident in residents))

    def _is_read(self, name: str, future: Future[KnowledgeModule]) -> None:
        """What was not read takes no room, and is read again when it is asked for again."""
        failed = future.cancelled() or future.exception() is not None
        with self._lock:
            resident = self._resident.get(name)
            if failed and resident is not None and resident.future is future:
                del self._resident[name]
            self._retired = [one for one in self._retired if one.future is not future or one.pins]
            self.changes += 1
            self._lock.notify_all()
