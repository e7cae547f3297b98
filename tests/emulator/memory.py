"""Device memory and page-locked memory, both of this process: what lies where, and NaN in all that nobody has written."""

import ctypes
from collections import deque
from typing import Any

import numpy as np

from runtime.backends.base import Array

NOTHING = 0xFF
"""What unwritten bytes are: NaN as float32, float16, bf16 and E4M3."""
_ALIGNMENT = 512
_MARGIN = 4096  # bytes on either side of a piece that must stay as they are
_KEPT_BYTES = 256 << 20  # of pieces given back, which stay readable and full of NaN for a while


class Memory:
    """Pieces of device memory of `total_bytes` in all, and page-locked ones. Addresses are this process's."""

    def __init__(self, *, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._pieces: dict[int, tuple[int, Array]] = {}  # address → bytes, with its margins
        self._given_back: deque[Array] = deque()
        self._locked: dict[int, Array] = {}

    def allocate(self, nbytes: int) -> int | None:
        """Address of a piece; None: there is no room."""
        if nbytes > self.total_bytes - self.used_bytes:
            return None
        raw = np.full(nbytes + 2 * _MARGIN + _ALIGNMENT, NOTHING, np.uint8)
        address = raw.ctypes.data + _MARGIN
        address += -address % _ALIGNMENT
        self._pieces[address] = nbytes, raw
        self.used_bytes += nbytes
        return address

    def free(self, address: int) -> None:
        """Give a piece back. Raises AssertionError: something was written beside it."""
        nbytes, raw = self._pieces.pop(address)
        self.used_bytes -= nbytes
        start = address - raw.ctypes.data
        untouched = (raw[:start] == NOTHING).all() and (raw[start + nbytes :] == NOTHING).all()
        assert untouched, f"something was written beside {nbytes} bytes of device memory"
        raw.fill(NOTHING)
        self._given_back.append(raw)
        while sum(kept.nbytes for kept in self._given_back) > _KEPT_BYTES:
            self._given_back.popleft()

    def check(self, address: int, nbytes: int) -> None:
        """Raises AssertionError: these are not bytes of one piece."""
        for start, (length, _) in self._pieces.items():
            if start <= address and address + nbytes <= start + length:
                return
        assert nbytes == 0, f"{nbytes} bytes at {address:#x} are no device memory"

    def bits(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Array:
        """A view of elements in device memory; strides count elements. Raises AssertionError as `check` does."""
        itemsize = np.dtype(dtype).itemsize
        elements = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        nbytes = 0 if 0 in shape else elements * itemsize
        if not nbytes:
            return np.zeros(shape, dtype)
        self.check(address, nbytes)
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)).view(dtype)
        view: Array = np.lib.stride_tricks.as_strided(flat, shape, tuple(stride * itemsize for stride in strides))
        return view

    def lock(self, nbytes: int) -> int:
        """Address of page-locked memory."""
        raw = np.full(nbytes, NOTHING, np.uint8)
        self._locked[raw.ctypes.data] = raw
        return int(raw.ctypes.data)

    def unlock(self, address: int) -> None:
        del self._locked[address]

    def is_locked(self, address: int) -> bool:
        return any(start <= address < start + raw.nbytes for start, raw in list(self._locked.items()))
