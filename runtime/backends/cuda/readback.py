"""Copies to the host that nobody waits for yet: through page-locked memory, on the compute stream, so that the device goes on meanwhile."""

import ctypes
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.array import HOST_TYPES, DeviceArray
from runtime.backends.cuda.device import Device, check
from runtime.errors import EngineError


class Readback:
    """Page-locked memory for arrays on their way to the host; a piece is used again once its array was taken or given up.

    Args:
        device: the GPU; it must outlive this.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pieces: list[_Piece] = []

    def fetch(self, array: DeviceArray) -> "Fetched":
        """Queue the copy of a contiguous array, which may be dropped as soon as this returns.

        Raises:
            ValueError: the array has gaps.
            EngineError: the system page-locks no more memory.
        """
        if not array.is_contiguous:
            raise ValueError(f"an array of shape {list(array.shape)} with gaps between its rows cannot be fetched")
        piece = self._free_piece(array.nbytes)
        piece.copy(array, self._device.stream)
        return Fetched(piece, array)

    def close(self) -> None:
        """Release everything. The device may be in any state, so nothing is raised here."""
        for piece in self._pieces:
            piece.free(self._device.stream)
        self._pieces.clear()

    def _free_piece(self, nbytes: int) -> "_Piece":
        free = [piece for piece in self._pieces if not piece.taken]
        fitting = [piece for piece in free if piece.nbytes >= nbytes]
        if fitting:
            return min(fitting, key=lambda piece: piece.nbytes)
        for piece in free:  # smaller than what is fetched now
            piece.free(self._device.stream)
            self._pieces.remove(piece)
        self._pieces.append(_Piece(nbytes))
        return self._pieces[-1]


class Fetched:
    """An array on its way; call it once, for the elements."""

    def __init__(self, piece: "_Piece", array: DeviceArray) -> None:
        self._piece: _Piece | None = piece
        self._shape, self._dtype, self._nbytes = array.shape, HOST_TYPES[array.dtype], array.nbytes
        piece.taken = True

    def __call__(self) -> Array:
        """Wait for the copy.

        Raises:
            CudaError: the device reports an error.
        """
        assert self._piece is not None, "fetched twice"
        elements: Array = self._piece.read(self._nbytes).view(self._dtype).reshape(self._shape)
        self._give_back()
        return elements

    def __del__(self) -> None:
        self._give_back()  # if nobody wanted it: whatever the piece takes next is queued behind this copy

    def _give_back(self) -> None:
        if self._piece is not None:
            self._piece.taken, self._piece = False, None


class _Piece:
    """Page-locked memory, and the event after the last copy into it."""

    def __init__(self, nbytes: int) -> None:
        from cuda.bindings import driver

        self._driver, self.nbytes, self.taken = driver, nbytes, False
        result = driver.cuMemHostAlloc(max(1, nbytes), 0)
        if int(result[0]) != 0:
            raise EngineError(f"the system page-locks no further {nbytes / 2**20:,.0f} MiB", hint="free memory of this machine")
        self._address = int(result[1])
        self._copied: Any = check("cuEventCreate", driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def copy(self, array: DeviceArray, stream: int) -> None:
        if array.nbytes:
            call = self._driver.cuMemcpyDtoHAsync(self._address, array.pointer, array.nbytes, stream)
            check("cuMemcpyDtoHAsync", call)
        check("cuEventRecord", self._driver.cuEventRecord(self._copied, stream))

    def read(self, nbytes: int) -> Array:
        check("cuEventSynchronize", self._driver.cuEventSynchronize(self._copied))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._address)).copy()

    def free(self, stream: int) -> None:
        self._driver.cuStreamSynchronize(stream)
        self._driver.cuEventDestroy(self._copied)
        self._driver.cuMemFreeHost(self._address)
