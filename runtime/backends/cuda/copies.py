"""The stream on which weights arrive: copies from page-locked memory beside the computing, and the events that order the two."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.device import Device, check
from runtime.errors import EngineError

Event = Any
"""A CUDA event: a point in a stream that another stream, or the host, can wait for."""


class CopyStream:
    """Copies to the device beside its compute stream; to be used from one thread besides the one that computes.

    Args:
        device: the GPU; it must outlive this.
    """

    def __init__(self, device: Device) -> None:
        from cuda.bindings import driver

        self._device, self._driver = device, driver
        self._stream = int(check("cuStreamCreate", driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        self._events: list[Event] = []
        self._page_locked: dict[int, int] = {}  # address → bytes
        self._closed = False

    def use_here(self) -> None:
        """Bind the calling thread to the device; every thread but the one that opened it needs this first."""
        self._device.make_current()

    def new_event(self) -> Event:
        """An event; it lasts as long as this stream."""
        flag = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = check("cuEventCreate", self._driver.cuEventCreate(flag))
        self._events.append(event)
        return event

    def copy(self, source: Array, pointer: int) -> None:
        """Queue a copy of page-locked bytes; they must stay as they are until it is done."""
        call = self._driver.cuMemcpyHtoDAsync(pointer, source.ctypes.data, source.nbytes, self._stream)
        check("cuMemcpyHtoDAsync", call)

    def mark(self, event: Event) -> None:
        """The event happens when all copies queued so far are done."""
        check("cuEventRecord", self._driver.cuEventRecord(event, self._stream))

    def mark_computing(self, event: Event) -> None:
        """The event happens when all computing queued so far is done."""
        check("cuEventRecord", self._driver.cuEventRecord(event, self._device.stream))

    def hold(self, event: Event) -> None:
        """Copies queued from now on wait for the event."""
        check("cuStreamWaitEvent", self._driver.cuStreamWaitEvent(self._stream, event, 0))

    def hold_computing(self, event: Event) -> None:
        """What is computed from now on waits for the event."""
        check("cuStreamWaitEvent", self._driver.cuStreamWaitEvent(self._device.stream, event, 0))

    def wait(self, event: Event) -> None:
        """Wait, on the host, until the event has happened."""
        check("cuEventSynchronize", self._driver.cuEventSynchronize(event))

    def synchronize(self) -> None:
        """Wait, on the host, until all copies are done."""
        check("cuStreamSynchronize", self._driver.cuStreamSynchronize(self._stream))

    def page_locked(self, nbytes: int) -> Array:
        """Host memory, uint8 [nbytes], that copies read without staging; until `free_page_locked`.

        Raises:
            EngineError: the system gives no more of it.
        """
        result = self._driver.cuMemHostAlloc(nbytes, 0)
        if int(result[0]) != 0:
            raise EngineError(f"the system page-locks no further {nbytes / 2**20:,.0f} MiB", hint="free memory of this machine")
        address = int(result[1])
        self._page_locked[address] = nbytes
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def free_page_locked(self, array: Array) -> None:
        """Give page-locked memory back; no copy from it may be under way."""
        address = array.ctypes.data
        if self._page_locked.pop(address, None) is not None:
            check("cuMemFreeHost", self._driver.cuMemFreeHost(address))

    def close(self) -> None:
        """Release everything. The device may be in any state, so nothing is raised here."""
        if self._closed:
            return
        self._closed = True
        self._driver.cuStreamSynchronize(self._stream)
        for event in self._events:
            self._driver.cuEventDestroy(event)
        for address in self._page_locked:
            self._driver.cuMemFreeHost(address)
        self._driver.cuStreamDestroy(self._stream)
        self._events.clear()
        self._page_locked.clear()


def free_host_bytes() -> int:
    """Memory of this machine that programs can still have; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
