"""Copies to the host that nobody waits for yet, on a driver that runs what was queued only when somebody waits."""

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.array import contiguous
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.readback import Readback
from runtime.errors import CudaError, EngineError
from runtime.specs import DType


class LazyDriver:
    """The driver's calls that `Readback` makes, of one stream; the device's memory is the host's."""

    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.locked: dict[int, Any] = {}  # page-locked memory by its address
        self.events = 0
        self.sick = False

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[int, int]:
        if nbytes > 1 << 20:
            return 2, 0
        memory = np.zeros(nbytes, np.uint8)
        self.locked[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        assert not self.queue, "freed while a copy into it is under way"
        del self.locked[address]
        return (0,)

    def cuEventCreate(self, flags: int) -> tuple[int, list[int]]:
        self.events += 1
        return 0, [0]

    def cuEventDestroy(self, event: list[int]) -> tuple[int]:
        self.events -= 1
        return (0,)

    def cuEventRecord(self, event: list[int], stream: int) -> tuple[int]:
        event[0] += 1  # how often it was queued and has not happened: the last one counts
        self.queue.append(lambda: event.__setitem__(0, event[0] - 1))
        return (0,)

    def cuEventSynchronize(self, event: list[int]) -> tuple[int]:
        while event[0] and not self.sick:
            self.queue.pop(0)()
        return (700 if self.sick else 0,)

    def cuMemcpyDtoHAsync(self, into: int, source: int, nbytes: int, stream: int) -> tuple[int]:
        self.queue.append(lambda: ctypes.memmove(into, source, nbytes))
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        while self.queue and not self.sick:
            self.queue.pop(0)()
        self.queue.clear()
        return (700 if self.sick else 0,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> LazyDriver:
    bindings = pytest.importorskip("cuda.bindings")
    lazy = LazyDriver()
    monkeypatch.setattr(bindings, "driver", lazy, raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", lazy)
    return lazy


def open_readback() -> Readback:
    device: Any = SimpleNamespace(stream=0)
    opened: Device = device
    return Readback(opened)


def on_device(elements: Any) -> Any:
    return contiguous(elements.ctypes.data, elements.shape, DType.U8, None)


def test_an_array_arrives_as_it_was_when_its_copy_was_queued_and_not_when_it_is_taken(driver: LazyDriver) -> None:
    readback = open_readback()
    memory = np.arange(12, dtype=np.uint8).reshape(3, 4)  # of the device; the next step's result goes to the same place
    first = readback.fetch(on_device(memory))
    driver.queue.append(lambda: memory.fill(7))
    second = readback.fetch(on_device(memory))
    driver.queue.append(lambda: memory.fill(9))
    np.testing.assert_array_equal(first(), np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(second(), np.full((3, 4), 7))


def test_memory_that_was_taken_or_given_up_is_used_again_in_the_order_of_the_copies(driver: LazyDriver) -> None:
    readback = open_readback()
    memory = np.full(8, 1, np.uint8)
    readback.fetch(on_device(memory))  # given up at once: its copy still runs, into what the next one takes
    driver.queue.append(lambda: memory.fill(2))
    kept = readback.fetch(on_device(memory))
    assert len(driver.locked) == 1
    other = readback.fetch(on_device(memory))
    assert len(driver.locked) == 2
    assert (kept() == 2).all() and (other() == 2).all()


def test_smaller_pieces_make_way_for_larger_ones_once_their_copies_are_done(driver: LazyDriver) -> None:
    readback = open_readback()
    for nbytes in (8, 16, 32, 32, 16):
        readback.fetch(on_device(np.zeros(nbytes, np.uint8)))
    assert [len(memory) for memory in driver.locked.values()] == [32]
    readback.close()
    assert (driver.locked, driver.events) == ({}, 0)


def test_a_device_that_failed_is_reported_and_everything_is_freed_all_the_same(driver: LazyDriver) -> None:
    readback = open_readback()
    fetched = readback.fetch(on_device(np.zeros(8, np.uint8)))
    driver.sick = True
    with pytest.raises(CudaError, match="cuEventSynchronize failed with 700"):
        fetched()
    readback.close()
    assert (driver.locked, driver.events) == ({}, 0)


def test_a_system_that_page_locks_no_more_is_an_error_that_says_how_much_was_asked(driver: LazyDriver) -> None:
    with pytest.raises(EngineError, match="page-locks no further 2 MiB"):
        open_readback().fetch(on_device(np.zeros(2 << 20, np.uint8)))
