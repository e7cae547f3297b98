"""Numbers in device memory, by CUDA's names for their types, as float32 arrays and back."""

from enum import IntEnum

import numpy as np
import torch

from runtime.backends.base import Array
from tests.emulator.memory import Memory


class Kind(IntEnum):
    """cudaDataType_t; cuDNN's names for the same."""

    FLOAT = 0
    HALF = 2
    INT32 = 10
    BFLOAT16 = 14
    FP8_E4M3 = 28


_BITS = {Kind.FLOAT: np.float32, Kind.HALF: np.float16, Kind.INT32: np.int32, Kind.BFLOAT16: np.uint16, Kind.FP8_E4M3: np.uint8}
_LARGEST_E4M3 = 448.0


def read(memory: Memory, address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: Kind) -> Array:
    """The numbers as float32, int32 as it is. Raises AssertionError: some lie outside of device memory."""
    bits = np.array(memory.bits(address, shape, strides, _BITS[kind]), order="C")
    if kind is Kind.BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind is Kind.FP8_E4M3:
        values: Array = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
        return values
    return bits.astype(np.float32) if kind is Kind.HALF else bits


def write(memory: Memory, address: int, values: Array, strides: tuple[int, ...], kind: Kind) -> None:
    """Round float32 numbers to the type, E4M3 to its largest where they are larger, and put them there."""
    given = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    bits: Array
    if kind is Kind.BFLOAT16:
        bits = given.bfloat16().view(torch.uint16).numpy()
    elif kind is Kind.FP8_E4M3:
        bits = given.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    else:
        bits = values.astype(_BITS[kind])
    memory.bits(address, values.shape, strides, _BITS[kind])[...] = bits
