"""Planning: bytes, seconds and cost of a base, a store and machines of given sizes, by formulas.

What is not measured is an argument of `Machine` or `Plan` with a default that is an assumption and says so. Knows
arithmetic; measures nothing and simulates nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class BaseShape:
    """A dense decoder with gated feed-forwards, in two bytes a parameter.

    Attributes:
        parameters: of all of it.
        width: of its states.
        key_width: of the keys of one token in one layer, all heads together; values take as much.
        inner: width of the feed-forward.
    """

    parameters: float
    layers: int
    width: int
    key_width: int
    inner: int
    vocabulary: int

    @property
    def bytes(self) -> float:
        return 2 * self.parameters

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * 2 * self.layers * self.key_width

    def lora_parameters(self, r: int) -> int:
        """Of a low-rank module of all seven matrices of a layer: r numbers for each of their inputs and outputs."""
        attention = 2 * (self.width + self.width) + 2 * (self.width + self.key_width)
        return self.layers * r * (attention + 3 * (self.width + self.inner))

    def block_parameters(self, num_layers: int) -> int:
        """Of a module of whole layers, norms left out."""
        attention = 2 * self.width**2 + 2 * self.width * self.key_width
        return num_layers * (attention + 3 * self.width * self.inner)


BASES = {
    "135M": BaseShape(134.5e6, 30, 576, 192, 1536, 49_152),  # SmolLM2
    "8B": BaseShape(8.03e9, 32, 4096, 1024, 14_336, 128_256),  # Llama 3.1
    "70B": BaseShape(70.6e9, 80, 8192, 1024, 28_672, 128_256),
}


@dataclass(frozen=True)
class Machine:
    """Some devices that hold one copy of the base. All numbers but `devices` are of one device, or of its share of the
    machine. Every one is an assumption: data sheets of a device with 80 GB, and round numbers.

    Attributes:
        usable: share of the device's memory that can be planned with.
        reading, computing: shares of bandwidth and of arithmetic that are reached.
        exchange: seconds to sum states over devices, twice a layer; not where there is one.
        hour: price, in whatever money.
        host_share: of the host's memory that keeps modules.
    """

    devices: int = 1
    memory: float = 80e9
    bandwidth: float = 3.35e12
    flops: float = 989e12
    usable: float = 0.9
    reading: float = 0.6
    computing: float = 0.4
    exchange: float = 15e-6
    host_memory: float = 250e9
    host_share: float = 0.5
    host_bandwidth: float = 40e9
    to_device: float = 25e9
    disk: float = 3.8e12
    disk_bandwidth: float = 3e9
    disk_latency: float = 1e-4
    network: float = 3e9
    objects_latency: float = 0.05
    hour: float = 2.5


@dataclass(frozen=True)
class Plan:
    """What is to be served.

    Attributes:
        r: rank of the modules.
        text_tokens: of a module that recalls its text; 0 where none does.
        exponent: of Zipf's law, after which modules are asked for.
        prompt, answer: tokens.
        workspace: bytes a pass takes, of a device.
        vectors, heldout: rows that the router keeps of each domain, as `learn` does at the most.
        objects: bytes a second that the object storage gives to all machines together.
    """

    base: BaseShape = BASES["70B"]
    machine: Machine = field(default_factory=lambda: Machine(devices=8))
    modules: int = 1_000_000
    machines: int = 1000
    r: int = 16
    text_tokens: float = 1e6
    exponent: float = 1.0
    prompt: int = 1000
    answer: int = 250
    batch: int = 64
    workspace: float = 2e9
    vectors: int = 480
    heldout: int = 144
    objects: float = 1e12

    # Bytes

    @property
    def module_bytes(self) -> float:
        return 2 * self.base.lora_parameters(self.r)

    @property
    def evidence_bytes(self) -> dict[str, float]:
        """On the disk, of one module: what every fit reads, and what is read when sums are made anew."""
        return {
            "heldout": 2 * self.heldout * self.base.width + 8 * self.base.width + 8,
            "vectors": 2 * self.vectors * self.base.width,
        }

    @property
    def text_bytes(self) -> float:
        """Of a module's text, sorted: a token's id and its place."""
        return self.text_tokens * ((2 if self.base.vocabulary < 65_536 else 4) + 4)

    def router_bytes(self, indexed: bool = True) -> dict[str, float]:
        """In the memory of every engine: whitened means, an index of one byte a number, and what all domains share."""
        means = 4.0 * self.modules * self.base.width
        return {"means": means, "index": means / 4 if indexed else 0.0, "whitening": 4.0 * self.base.width**2}

    def room(self, batch: int | None = None) -> int:
        """Modules that one machine's devices hold beside base, workspace and a batch's keys and values; below 0 where
        these do not fit themselves."""
        m = self.machine
        texts = (batch or self.batch) * (self.prompt + self.answer) * self.base.token_bytes
        left = m.devices * (m.usable * m.memory - self.workspace) - self.base.bytes - texts
        return math.floor(left / self.module_bytes)

    # Seconds

    def step(self, batch: int, distinct: float) -> float:
        """One token of each of `batch` answers under `distinct` modules: the slower of bytes and arithmetic, and what
        devices tell each other."""
        m = self.machine
        texts = batch * (self.prompt + self.answer / 2) * self.base.token_bytes
        read = (self.base.bytes + distinct * self.module_bytes + texts) / (m.devices * m.bandwidth * m.reading)
        products = 2 * batch * (self.base.parameters + self.module_bytes / 2)
        computed = products / (m.devices * m.flops * m.computing)
        return max(read, computed) + (2 * self.base.layers * m.exchange if m.devices > 1 else 0)

    def prefill(self) -> float:
        """A prompt, read alone."""
        m = self.machine
        products = 2 * self.prompt * (self.base.parameters + self.module_bytes / 2)
        return products / (m.devices * m.flops * m.computing)

    def read_from(self, tier: str) -> float:
        """Seconds until a module is on the devices, each of which reads its share: the slowest way of those it goes."""
        m = self.machine
        ways = {
            "host": (m.host_bandwidth, m.to_device),
            "disk": (m.disk_bandwidth, m.to_device),
            "objects": (m.network, m.disk_bandwidth, self.objects / self.machines / m.devices),
        }[tier]
        return self.latency(tier) + self.module_bytes / (m.devices * min(ways))

    def latency(self, tier: str) -> float:
        """Seconds of one call, however little it reads."""
        return {"host": 0.0, "disk": self.machine.disk_latency, "objects": self.machine.objects_latency}[tier]

    def requests_a_second(
        self, batch: int, distinct: float, missed: float = 0.0, load: float = 0.0, stands: float = 0.0
    ) -> float:
        """Of one machine: devices that read prompts and write answers in turn, and a reader that brings in one module
        after another meanwhile, whichever is slower.

        Args:
            missed: share of the requests whose module is not on the devices.
            load: seconds of a read.
            stands: seconds of a read in which nothing is computed.
        """
        busy = self.prefill() + self.answer * self.step(batch, distinct) / batch + missed * stands
        return min(1 / busy, 1 / (missed * load) if missed * load else math.inf)

    def cost(self, requests_a_second: float) -> float:
        """Of a million tokens that are written, their prompts included."""
        second = self.machine.devices * self.machine.hour / 3600
        return 1e6 * second / (requests_a_second * self.answer)

    def refill(self, hash_rate: float) -> dict[str, float]:
        """Seconds of one machine that begins with nothing while all others go on, and of all at once: the base over the
        network, its hash on one thread, and as many modules as fit."""
        m, modules = self.machine, max(self.room(), 0) * self.module_bytes
        alone, together = m.devices * min(m.network, m.disk_bandwidth), self.objects / self.machines
        return {
            "base, hashed": self.base.bytes / hash_rate,
            "base, read": self.base.bytes / alone,
            "modules, read": modules / alone,
            "all machines at once, read": (self.base.bytes + modules) / min(alone, together),
        }


# Who is in memory


def shares(modules: int, exponent: float) -> np.ndarray:
    """Zipf's law, (modules,)."""
    weights = np.arange(1, modules + 1) ** -exponent
    return weights / weights.sum()


def copies(modules: int, machines: int, exponent: float, bound: float = 1.25) -> np.ndarray:
    """On how many machines each module is in use, where none takes more than `bound` times the mean."""
    return np.clip(np.ceil(shares(modules, exponent) * machines / bound), 1, machines)


def hit_rate(modules: int, machines: int, room: int, exponent: float) -> float:
    """Of modules that are hashed to machines, each of which lets go of the least recently used (Che, Tung and Wang
    2002), as of one cache in which a module that is used on n machines stands n times: no machine is luckier than
    another, and none begins empty."""
    p, n = shares(modules, exponent), copies(modules, machines, exponent)
    if room * machines >= n.sum():
        return 1.0
    low, high = 0.0, 1.0  # of the time after which what is not asked for is gone, in requests
    while (n * -np.expm1(-p / n * high)).sum() < room * machines:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (n * -np.expm1(-p / n * middle)).sum() > room * machines else (middle, high)
    return float((p * -np.expm1(-p / n * high)).sum())


# Whether a router can tell


def separation(modules: int, wrong: float = 0.01) -> float:
    """How far whitened means of `modules` domains must lie from that of general text, in units of a text's own noise,
    for no more than a share `wrong` of general texts to be nearer to some domain: each is with the chance Q(x / 2)."""
    each = -math.expm1(math.log1p(-wrong) / modules)
    return -2 * NormalDist().inv_cdf(each)


def taken_for_one(modules: int, distance: float) -> float:
    """The share of general texts that are nearer to one of `modules` domains, all of them at such a distance."""
    each = NormalDist().cdf(-distance / 2)
    return -math.expm1(modules * math.log1p(-each))
