"""A GPU of two streams and some bytes: what is queued runs later, in any order that the events allow, and reads what then lies there."""

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.arena import Pools
from runtime.backends.cuda.array import HOST_TYPES, Buffer, DeviceArray, contiguous
from runtime.backends.cuda.calls import Calls
from runtime.memory import Layout
from runtime.residency import whole_pages
from runtime.specs import DType

COPY, COMPUTE = 0, 1


class FakeEvent:
    def __init__(self) -> None:
        self.asked = self.happened = 0  # times it was queued, and came to pass


class FakeGpu:
    """Device and copy stream in one. `random` decides which stream goes on where both can."""

    arch, name, stream = "sm_00", "fake", 0

    def __init__(self, *, total_bytes: int = 1 << 40, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.total_bytes = total_bytes
        self.limit_bytes: int | None = None
        self.peak_bytes = 0
        self.calls = Calls()
        self.memory_of: dict[int, Array] = {}  # slabs
        self._segments: dict[int, Array] = {}  # what arrays lie in
        self._pools = Pools(self._take)
        self.page_locked_bytes: dict[int, int] = {}
        self.log: list[str] = []
        self.copied: list[int] = []  # bytes of each copy
        self.closed = False
        self._queues: tuple[list[Any], list[Any]] = ([], [])
        self._lock = threading.RLock()
        self._next = 1 << 30

    # the device

    @property
    def reserved_bytes(self) -> int:
        return sum(len(memory) for memories in (self.memory_of, self._segments) for memory in memories.values())

    @property
    def used_bytes(self) -> int:
        return self._pools.used_bytes

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        return self._pools.empty(shape, dtype)

    zeros = empty

    def allocate(self, nbytes: int) -> Buffer:
        return self._pools.allocate(nbytes)

    def from_host(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.empty(array.shape, dtype or next(kind for kind, host in HOST_TYPES.items() if host == array.dtype))

    def to_host(self, array: DeviceArray) -> Array:
        return np.zeros(array.shape, HOST_TYPES[array.dtype])

    @property
    def device(self) -> "FakeGpu":
        return self

    def slab(self, nbytes: int) -> DeviceArray:
        start = self._take_into(self.memory_of, whole_pages(nbytes))
        return contiguous(start, (nbytes,), DType.F8_E4M3, Buffer(start, self._free))

    def reserve(self, layout: Layout) -> None:
        self.trim()
        self.log.append(f"reserve {layout.nbytes}")
        self._pools.reserve(layout)

    def trim(self) -> None:
        for start in self._pools.pop_empty():
            del self._segments[start]

    def memory(self) -> tuple[int, int]:
        return self.total_bytes - self.reserved_bytes, self.total_bytes

    # the copy stream

    def use_here(self) -> None: ...

    def new_event(self) -> FakeEvent:
        return FakeEvent()

    def copy(self, source: Array, pointer: int) -> None:
        def run() -> None:
            into, offset = self._find(pointer)
            into[offset : offset + len(source)] = source
            self.copied.append(len(source))

        self._queue(COPY, run)

    def mark(self, event: FakeEvent) -> None:
        self._mark(COPY, event)

    def mark_computing(self, event: FakeEvent) -> None:
        self._mark(COMPUTE, event)

    def hold(self, event: FakeEvent) -> None:
        self._queue(COPY, (event, event.asked))

    def hold_computing(self, event: FakeEvent) -> None:
        self._queue(COMPUTE, (event, event.asked))

    def wait(self, event: FakeEvent) -> None:
        asked = event.asked
        with self._lock:
            while event.happened < asked:
                assert self._advance(), "the host waits for what can never happen"

    def page_locked(self, nbytes: int) -> Array:
        memory = np.zeros(nbytes, np.uint8)
        self.page_locked_bytes[memory.ctypes.data] = nbytes
        return memory

    def free_page_locked(self, array: Array) -> None:
        del self.page_locked_bytes[array.ctypes.data]

    def synchronize(self) -> None:
        self.finish()

    def close(self) -> None:
        self.closed = True

    # the test's side

    def compute(self, read: DeviceArray, expected: Array) -> None:
        """Queue computing that reads an array, and must find `expected` there."""

        pointer = read.pointer  # as a device does: what is queued keeps no array

        def run() -> None:
            into, offset = self._find(pointer)
            found = into[offset : offset + expected.nbytes]
            assert (found == expected.reshape(-1).view(np.uint8)).all(), "computed with another unit's weights"

        self._queue(COMPUTE, run)

    def finish(self) -> None:
        """Run everything that is queued."""
        with self._lock:
            while self._advance():
                pass
            assert not any(self._queues), "queued work can never run"

    def _advance(self) -> bool:
        """One thing of one stream; False when neither can go on."""
        for stream in self.random.permutation(2):
            queue = self._queues[stream]
            if queue and not (isinstance(queue[0], tuple) and queue[0][0].happened < queue[0][1]):
                work = queue.pop(0)
                if not isinstance(work, tuple):
                    work()
                return True
        return False

    def _queue(self, stream: int, work: Callable[[], None] | tuple[FakeEvent, int]) -> None:
        with self._lock:
            self._queues[stream].append(work)
            if self.random.random() < 0.5:
                self._advance()

    def _mark(self, stream: int, event: FakeEvent) -> None:
        event.asked += 1

        def run(turn: int = event.asked) -> None:
            event.happened = max(event.happened, turn)

        self._queue(stream, run)

    def _find(self, pointer: int) -> tuple[Array, int]:
        known = self.memory_of | self._segments
        start = max(start for start in known if start <= pointer)
        return known[start], pointer - start

    def _free(self, pointer: int) -> None:
        self.finish()  # as the driver does
        self.log.append(f"free {len(self.memory_of.pop(pointer))}")

    def _take(self, nbytes: int) -> int:
        return self._take_into(self._segments, nbytes)

    def _take_into(self, memories: dict[int, Array], nbytes: int) -> int:
        start, self._next = self._next, self._next + nbytes
        memories[start] = np.zeros(nbytes, np.uint8)
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        assert self.limit_bytes is None or self.reserved_bytes <= self.limit_bytes, "over the budget"
        return start


class ComputingGpu(FakeGpu):
    """A fake GPU that arrays can be sent to and fetched from; `events` says what was run, and when the host waited for it."""

    name, stream = "Fake RTX", 77

    def __init__(self, *, arch: str = "sm_89", **options: Any) -> None:
        super().__init__(**options)
        self.arch = arch
        self.events: list[str] = []

    def make_current(self) -> None: ...

    def from_host(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        kept, into = array.copy(), super().from_host(array, dtype)
        self._queue(COMPUTE, lambda: self.write(into.pointer, kept))
        return into

    def to_host(self, array: DeviceArray) -> Array:
        self.synchronize()
        return self.read(array.pointer, array.shape, HOST_TYPES[array.dtype])

    def synchronize(self) -> None:
        self.events.append("wait")
        super().synchronize()

    def wait(self, event: FakeEvent) -> None:
        if event.happened < event.asked:
            self.events.append("wait")
        super().wait(event)

    def fetch(self, array: DeviceArray) -> Callable[[], Array]:
        """What stands for `Readback.fetch`."""
        found: list[Array] = []
        self.run(lambda: found.append(self.read(array.pointer, array.shape, HOST_TYPES[array.dtype])))

        def take() -> Array:
            self.synchronize()
            return found[0]

        return take

    def run(self, work: Callable[[], None]) -> None:
        """Queue some computing."""
        self._queue(COMPUTE, work)

    def write(self, pointer: int, array: Array) -> None:
        memory, offset = self._find(pointer)
        assert offset + array.nbytes <= len(memory), "beyond the memory that it lies in"
        memory[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> Array:
        memory, offset = self._find(pointer)
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        assert offset + nbytes <= len(memory), "beyond the memory that it lies in"
        found: Array = memory[offset : offset + nbytes].copy().view(dtype).reshape(shape)
        return found
