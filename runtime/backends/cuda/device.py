"""One GPU: its context, its one compute stream, its memory. Everything goes through the CUDA driver API of `cuda-bindings`.

What is computed there belongs to the neighbours: `kernels`, `linear`, `attention`.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.arena import Pools
from runtime.backends.cuda.array import HOST_TYPES, Buffer, DeviceArray, contiguous
from runtime.backends.cuda.calls import Calls
from runtime.errors import CudaError, DeviceMemoryError, EngineError
from runtime.memory import Layout, gib
from runtime.residency import whole_pages
from runtime.specs import DType

__all__ = ["HOST_TYPES", "Device", "DeviceArray", "check", "find_obstacle"]

_DEVICE_TYPES = {np.dtype(host): dtype for dtype, host in HOST_TYPES.items()}
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Device:
    """A GPU opened for computing. Use with `with`; arrays are invalid after it.

    Args:
        ordinal: which GPU, as CUDA counts them.

    Raises:
        EngineError: `cuda-bindings` or the driver is not installed, or there is no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        driver = _driver()
        self._driver = driver
        self._handle = check("cuDeviceGet", driver.cuDeviceGet(ordinal))
        self.arch: str = _architecture(driver, self._handle)
        """Architecture as the compilers spell it, for example `sm_90`."""
        self.name: str = check("cuDeviceGetName", driver.cuDeviceGetName(128, self._handle)).split(b"\0")[0].decode()
        # The primary context is the one that cuBLASLt, cuDNN and ONNX Runtime use too.
        self._context = check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(self._handle))
        self.make_current()
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream: int = int(check("cuStreamCreate", driver.cuStreamCreate(flag)))
        """Handle of the one compute stream."""
        self._taken: dict[int, int] = {}  # address → bytes, everything taken from the driver
        self._pools = Pools(self._take)
        self.calls = Calls()
        """What kernels and libraries queue on the stream goes through here."""
        self.limit_bytes: int | None = None
        """The most that may be taken from the driver; None: all there is."""
        self.reserved_bytes = 0
        """Bytes taken from the driver: in use, or kept for the next array."""
        self.peak_bytes = 0
        """The most `reserved_bytes` has been."""
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of arrays in use, slabs not counted."""
        return self._pools.used_bytes

    def make_current(self) -> None:
        """Bind the device to the calling thread; the thread that opened it is bound already."""
        check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """An array of unset elements.

        Raises:
            DeviceMemoryError: not enough memory, even with the free list given back.
        """
        return self._pools.empty(shape, dtype)

    def allocate(self, nbytes: int) -> Buffer:
        """Memory for an array of so many bytes, as `empty` takes it.

        Raises:
            DeviceMemoryError: not enough memory, even with the free list given back.
        """
        return self._pools.allocate(nbytes)

    def slab(self, nbytes: int) -> DeviceArray:
        """Bytes of their own, which go back to the driver when the array is freed or dropped.

        Raises:
            DeviceMemoryError: not enough memory.
        """
        pointer = self._take(whole_pages(nbytes))
        return contiguous(pointer, (nbytes,), DType.F8_E4M3, Buffer(pointer, self._give))

    def reserve(self, layout: Layout) -> None:
        """Take the memory for the arrays to come now, in one piece, after giving back what is not in use.

        Raises:
            DeviceMemoryError: not enough memory.
        """
        self.trim()
        self._pools.reserve(layout)

    def zeros(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """An array of zeros."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            check("cuMemsetD8Async", self._driver.cuMemsetD8Async(array.pointer, 0, array.nbytes, self.stream))
        return array

    def from_host(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        """Copy a NumPy array to the device. `dtype` says what the bits mean; by default uint16 is bf16, uint8 is fp8.

        Pageable memory is staged before the call returns; page-locked memory must stay untouched until `synchronize`.
        """
        dtype = _DEVICE_TYPES.get(array.dtype) if dtype is None else dtype
        if dtype is None or array.dtype != HOST_TYPES[dtype]:
            raise ValueError(f"a NumPy array of {array.dtype} cannot become {dtype or 'a device array'}; see HOST_TYPES")
        source = np.ascontiguousarray(array)
        into = self.empty(array.shape, dtype)
        if source.nbytes:
            call = self._driver.cuMemcpyHtoDAsync(into.pointer, source.ctypes.data, source.nbytes, self.stream)
            check("cuMemcpyHtoDAsync", call)
        return into

    def to_host(self, array: DeviceArray) -> Array:
        """Copy to NumPy, after everything queued on the stream; bf16 and fp8 come back as their bits."""
        result = np.empty(array.shape, HOST_TYPES[array.dtype])
        if result.nbytes:
            check("cuMemcpy2DAsync", self._driver.cuMemcpy2DAsync(self._copy_out(array, result), self.stream))
        self.synchronize()
        return result

    def synchronize(self) -> None:
        """Wait until the stream is done. A kernel that failed earlier is reported here.

        Raises:
            CudaError: the device reports an error.
        """
        check("cuStreamSynchronize", self._driver.cuStreamSynchronize(self.stream))

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device, as the driver sees it: other processes count, our free list counts as used."""
        free, total = check("cuMemGetInfo", self._driver.cuMemGetInfo())
        return int(free), int(total)

    def trim(self) -> None:
        """Give memory in which no array lies back to the driver."""
        self.synchronize()
        for pointer in self._pools.pop_empty():
            self._give(pointer)

    def elapsed_ms(self, work: Callable[[], None]) -> float:
        """Milliseconds the stream takes for what `work` queues, by CUDA events; waits for the end."""
        driver = self._driver
        events = [check("cuEventCreate", driver.cuEventCreate(0)) for _ in range(2)]
        try:
            check("cuEventRecord", driver.cuEventRecord(events[0], self.stream))
            work()
            check("cuEventRecord", driver.cuEventRecord(events[1], self.stream))
            check("cuEventSynchronize", driver.cuEventSynchronize(events[1]))
            return float(check("cuEventElapsedTime", driver.cuEventElapsedTime(*events)))
        finally:
            for event in events:
                driver.cuEventDestroy(event)

    def close(self) -> None:
        """Free all memory and the stream. The device may be in any state, so nothing is raised here."""
        if self._closed:
            return
        self._closed = True
        self._pools.close()
        self._driver.cuStreamSynchronize(self.stream)
        for pointer in self._taken:
            self._driver.cuMemFree(pointer)
        self._driver.cuStreamDestroy(self.stream)
        self._driver.cuDevicePrimaryCtxRelease(self._handle)
        self._taken.clear()
        self.reserved_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _take(self, nbytes: int) -> int:
        """Memory from the driver, within the limit; what is kept for arrays to come is given back first where needed."""
        result = self._try_take(nbytes)
        if result is None:
            self.trim()
            result = self._try_take(nbytes)
        if result is None:
            free, total = self.memory()
            within = (
                ""
                if self.limit_bytes is None
                else f"; {gib(self.reserved_bytes)} of a budget of {gib(self.limit_bytes)} are in use"
            )
            raise DeviceMemoryError(
                f"{self.name}: {gib(nbytes)} more is needed, {gib(free)} of {gib(total)} are free{within}",
                hint="lower the size or the number of frames, or end what else uses this GPU",
            )
        self._taken[result] = nbytes
        self.reserved_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return result

    def _try_take(self, nbytes: int) -> int | None:
        if self.limit_bytes is not None and self.reserved_bytes + nbytes > self.limit_bytes:
            return None
        result = self._driver.cuMemAlloc(nbytes)
        return None if int(result[0]) == _OUT_OF_MEMORY else int(check("cuMemAlloc", result))

    def _give(self, pointer: int) -> None:
        if not self._closed:
            self.reserved_bytes -= self._taken.pop(pointer)
            self.make_current()  # the cycle collector may drop a slab on any thread
            check("cuMemFree", self._driver.cuMemFree(pointer))

    def _copy_out(self, array: DeviceArray, result: Array) -> Any:
        width = array.nbytes // max(1, array.shape[0]) if array.shape else array.nbytes
        copy = self._driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice = self._driver.CUdeviceptr(array.pointer)
        copy.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_HOST
        copy.dstHost = result.ctypes.data
        if array.is_contiguous:
            copy.WidthInBytes, copy.Height = array.nbytes, 1
            copy.srcPitch = copy.dstPitch = array.nbytes
        else:
            copy.WidthInBytes, copy.Height = width, array.shape[0]
            copy.srcPitch, copy.dstPitch = array.row_stride * array.dtype.itemsize, width
        return copy


def find_obstacle() -> str | None:
    """Why no GPU can be used here; None when one can."""
    try:
        driver = _driver()
        return None if check("cuDeviceGetCount", driver.cuDeviceGetCount()) else "there is no CUDA device"
    except EngineError as error:  # CudaError is one
        return error.message


def find_architecture(ordinal: int = 0) -> str:
    """The architecture of a GPU, which is not opened for it.

    Raises:
        EngineError: there is no such GPU.
    """
    driver = _driver()
    return _architecture(driver, check("cuDeviceGet", driver.cuDeviceGet(ordinal)))


def driver_version() -> int:
    """The newest CUDA that the driver knows, as CUDA counts: 13010 is 13.1.

    Raises:
        EngineError: there is no driver.
    """
    return int(check("cuDriverGetVersion", _driver().cuDriverGetVersion()))


def check(call: str, result: tuple[Any, ...]) -> Any:
    """What a call of `cuda.bindings` returned besides its status: nothing, one value, or a tuple.

    Raises:
        CudaError: the status is not success; the message has the call, the code and its name.
    """
    status, *values = result
    if int(status) == _OUT_OF_MEMORY:
        raise DeviceMemoryError(
            f"{call}: the device is out of memory", hint="end what else uses this GPU, or give a smaller --vram"
        )
    if int(status) != 0:
        raise CudaError(
            f"{call} failed with {int(status)}: {getattr(status, 'name', type(status).__name__)}",
            hint="a device that failed once stays unusable for this process; start again, and see `nvidia-smi` if it repeats",
        )
    return values[0] if len(values) == 1 else tuple(values) or None


def _architecture(driver: Any, handle: Any) -> str:
    attribute = driver.CUdevice_attribute
    major, minor = (
        check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(item, handle))
        for item in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return f"sm_{major}{minor}"


def _driver() -> Any:
    try:
        from cuda.bindings import driver

        check("cuInit", driver.cuInit(0))
    except ImportError as exc:
        raise EngineError(f"the cuda target needs cuda-bindings: {exc}", hint='`pip install "wanrt[cuda]"`') from exc
    except (CudaError, RuntimeError) as exc:  # RuntimeError: the bindings found no libcuda
        raise EngineError(
            f"no CUDA device can be used here: {exc}",
            hint="this target needs an NVIDIA GPU and its driver; `nvidia-smi` shows both",
        ) from exc
    return driver
