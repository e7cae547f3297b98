"""Stands in for `cuda.bindings.driver`: the calls that this project makes, on one device of this process's memory.

Left out is what they never ask for: graphs, peer access, managed memory, contexts other than the primary one. Events have no times.
"""

import ctypes
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from tests.emulator.memory import NOTHING, Memory
from tests.emulator.nvrtc import Kernel, KernelLibrary
from tests.emulator.streams import Event, Streams

COMPUTE_CAPABILITY = (9, 0)


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_NOT_FOUND = 500


_DONE = (CUresult.CUDA_SUCCESS,)


class Driver:
    """As a module: every call gives its status first.

    Args:
        streams, memory: which the libraries beside it use too.
    """

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1, CU_MEMORYTYPE_DEVICE=2)
    CUDA_MEMCPY2D = SimpleNamespace
    CUdeviceptr = int

    def __init__(self, streams: Streams, memory: Memory) -> None:
        self.streams, self.memory = streams, memory
        self._modules: dict[int, KernelLibrary] = {}

    # the device

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return _DONE

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return *_DONE, 13000

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return *_DONE, 1

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return (*_DONE, 0) if ordinal == 0 else (CUresult.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:
        return *_DONE, b"emulated GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        return *_DONE, COMPUTE_CAPABILITY[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return *_DONE, 1

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        return _DONE

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        return _DONE

    # memory

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, ...]:
        address = self.memory.allocate(nbytes)
        return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None) if address is None else (*_DONE, address)

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        self.streams.finish()  # as the driver does: nothing that is queued can be reading it
        self.memory.free(address)
        return _DONE

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return *_DONE, self.memory.total_bytes - self.memory.used_bytes, self.memory.total_bytes

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        return *_DONE, self.memory.lock(nbytes)

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        self.streams.finish()
        self.memory.unlock(address)
        return _DONE

    # streams and events

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return *_DONE, self.streams.create()

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self.streams.destroy(stream)
        return _DONE

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self.streams.finish(stream)
        return _DONE

    def cuStreamWaitEvent(self, stream: int, event: Event, flags: int) -> tuple[Any, ...]:
        self.streams.wait_for(event, stream)
        return _DONE

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        return *_DONE, Event()

    def cuEventDestroy(self, event: Event) -> tuple[Any, ...]:
        return _DONE

    def cuEventRecord(self, event: Event, stream: int) -> tuple[Any, ...]:
        self.streams.record(event, stream)
        return _DONE

    def cuEventSynchronize(self, event: Event) -> tuple[Any, ...]:
        self.streams.synchronize(event)
        return _DONE

    def cuEventElapsedTime(self, start: Event, end: Event) -> tuple[Any, ...]:
        return *_DONE, 1.0

    # what is queued

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        """Page-locked memory is read when the copy runs, other memory now."""
        self.memory.check(target, nbytes)
        held = None if self.memory.is_locked(source) else ctypes.string_at(source, nbytes)
        self.streams.put(stream, lambda: _move(target, source if held is None else held, nbytes))
        return _DONE

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.memory.check(source, nbytes)
        self.streams.put(stream, lambda: _move(target, source, nbytes))
        return _DONE

    def cuMemcpy2DAsync(self, copy: SimpleNamespace, stream: int) -> tuple[Any, ...]:
        """From the device, the one direction that is used."""
        given = SimpleNamespace(**vars(copy))
        self.memory.check(given.srcDevice, (given.Height - 1) * given.srcPitch + given.WidthInBytes)

        def rows() -> None:
            for row in range(given.Height):
                source, target = given.srcDevice + row * given.srcPitch, given.dstHost + row * given.dstPitch
                ctypes.memmove(target, source, given.WidthInBytes)

        self.streams.put(stream, rows)
        return _DONE

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.memory.check(address, nbytes)
        self.streams.put(stream, lambda: _fill(address, value, nbytes))
        return _DONE

    def forget(self, address: int, nbytes: int, stream: int) -> None:
        """No call of the driver: the bytes become NaN when the stream comes so far."""
        self.cuMemsetD8Async(address, NOTHING, nbytes, stream)

    # kernels

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        handle = len(self._modules) + 1
        self._modules[handle] = KernelLibrary(image)
        return *_DONE, handle

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        kernel = self._modules[module].find(name.decode())
        return (CUresult.CUDA_ERROR_NOT_FOUND, None) if kernel is None else (*_DONE, kernel)

    def cuLaunchKernel(
        self, kernel: Kernel, blocks: int, blocks_y: int, blocks_z: int, threads: int, *rest: int
    ) -> tuple[Any, ...]:
        """One-dimensional grids without dynamic shared memory. The arguments are copied now."""
        threads_y, threads_z, shared_bytes, stream, parameters, _ = rest
        if (blocks_y, blocks_z, threads_y, threads_z, shared_bytes) != (1, 1, 1, 1, 0) or threads > kernel.most_threads:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        packed = ctypes.string_at(ctypes.c_void_p.from_address(parameters).value or 0, kernel.argument_bytes)
        self.streams.put(stream, lambda: kernel.run(packed, num_blocks=blocks, num_threads=threads))
        return _DONE


def _move(target: int, source: int | bytes, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def _fill(address: int, value: int, nbytes: int) -> None:
    ctypes.memset(address, value, nbytes)
