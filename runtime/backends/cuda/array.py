"""Views of device memory, and the memory behind them. `device.Device` makes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.specs import DType

HOST_TYPES: dict[DType, Any] = {
    DType.F32: np.float32,
    DType.F16: np.float16,
    DType.BF16: np.uint16,
    DType.U8: np.uint8,
    DType.F8_E4M3: np.uint8,
    DType.I64: np.int64,
}
"""How each dtype travels in NumPy: bf16 and fp8 as their bits. Of two with the same type there, the last is meant unless one is named."""


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A view of device memory. `row_stride`: elements from one entry of the first axis to the next; rows are contiguous.

    The memory lives as long as some view holds `buffer`; None means that somebody else keeps it alive.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: DType
    row_stride: int
    buffer: "Buffer | None"
    spare_rows: int = 0
    """Rows behind the last one that the memory has room for: kernels that read whole tiles of rows may fill them."""
    unit: "Unit | None" = None
    """What the numbers of an fp8 array stand for; None: themselves, or something that whoever reads them knows."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements themselves, gaps between rows not counted."""
        return self.size * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.row_stride == math.prod(self.shape[1:]) or self.shape[:1] == (1,)

    def rows(self, start: int, stop: int) -> "DeviceArray":
        """Entries `start` to `stop` of the first axis."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} of an array of shape {list(self.shape)}")
        offset = start * self.row_stride * self.dtype.itemsize
        spare_rows = self.spare_rows if stop == self.shape[0] else 0
        return replace(self, pointer=self.pointer + offset, shape=(stop - start, *self.shape[1:]), spare_rows=spare_rows)

    def columns(self, start: int, stop: int) -> "DeviceArray":
        """Columns `start` to `stop` of a 2-D array: the rows stay `row_stride` apart."""
        if len(self.shape) != 2 or not 0 <= start <= stop <= self.shape[1]:
            raise ValueError(f"columns {start}:{stop} of an array of shape {list(self.shape)}")
        offset = start * self.dtype.itemsize
        return replace(self, pointer=self.pointer + offset, shape=(self.shape[0], stop - start))

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same elements with another shape; for contiguous arrays only."""
        if not self.is_contiguous or math.prod(shape) != self.size:
            raise ValueError(f"cannot see {list(self.shape)} (row stride {self.row_stride}) as {list(shape)}")
        return replace(self, shape=shape, row_stride=math.prod(shape[1:]), spare_rows=0)

    def sparing_rows(self, count: int) -> "DeviceArray":
        """The array without its last `count` rows, which become spare rows."""
        return replace(self, shape=(self.shape[0] - count, *self.shape[1:]), spare_rows=self.spare_rows + count)

    def with_spare_rows(self, count: int) -> "DeviceArray":
        """The array and the `count` spare rows behind it."""
        if not 0 <= count <= self.spare_rows:
            raise ValueError(f"{count} spare rows of {self.spare_rows}")
        return replace(self, shape=(self.shape[0] + count, *self.shape[1:]), spare_rows=self.spare_rows - count)

    def free(self) -> None:
        """Give the memory back now, for every view of it; using any of them afterwards is a slip."""
        if self.buffer is not None:
            self.buffer.release()


@dataclass(frozen=True, slots=True)
class Unit:
    """What is meant by a stored number: `stored * scale + offset` of its column. scale is f32 [1], offset f32 [D]."""

    scale: DeviceArray
    offset: DeviceArray


def contiguous(pointer: int, shape: tuple[int, ...], dtype: DType, buffer: "Buffer | None") -> DeviceArray:
    """A view of memory in which the elements lie one after the other."""
    return DeviceArray(pointer, tuple(shape), dtype, math.prod(shape[1:]), buffer)


class Buffer:
    """One allocation. It returns to where it came from when released, or when the last array that holds it is dropped:
    reuse is ordered by the one compute stream. A copy on another stream must hold the array until it is done."""

    __slots__ = ("_recycle", "pointer")

    def __init__(self, pointer: int, recycle: Callable[[int], None]) -> None:
        self.pointer = pointer
        self._recycle: Callable[[int], None] | None = recycle

    def release(self) -> None:
        if self._recycle is not None:
            self._recycle(self.pointer)
            self._recycle = None

    def __del__(self) -> None:
        self.release()  # on any thread, at any time: who takes it back sees to that (`runtime.backends.cuda.turns`)


def expect(array: DeviceArray, dtype: DType, shape: tuple[int, ...]) -> None:
    """Check what a kernel is given.

    Raises:
        ValueError: another element type or shape.
    """
    if array.dtype is not dtype or array.shape != shape:
        raise ValueError(f"expected {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")
