"""bf16 and fp8 E4M3 numbers as the bits in which they travel through NumPy."""

from typing import Any

import numpy as np

from runtime.specs import DType

Array = np.ndarray[Any, Any]


def _e4m3_values() -> Array:
    """Value of each of the 128 positive codes: sign 1, exponent 4 with bias 7, mantissa 3; the last is NaN, there is no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return values


E4M3 = _e4m3_values()


def to_bits(values: Array, dtype: DType) -> Array:
    """Round to the nearest number of the dtype: bf16 as uint16, fp8 (saturating) as uint8, fp32 as it is."""
    if dtype is DType.F32:
        return values.astype(np.float32)
    if dtype is DType.BF16:
        wide = values.astype(np.float32).view(np.uint32)
        rounded: Array = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        return rounded.astype(np.uint16)
    middles = (E4M3[:126] + E4M3[1:127]) / 2
    magnitude = np.abs(values)
    code = np.searchsorted(middles, magnitude)
    tie = np.isin(magnitude, middles)
    code = np.where(tie & (code % 2 == 1), code + 1, code)  # halfway: the even code
    signed: Array = code + 128 * np.signbit(values)
    return signed.astype(np.uint8)


def from_bits(bits: Array, dtype: DType) -> Array:
    """The float64 values of bits."""
    if dtype is DType.F32:
        return bits.astype(np.float64)
    if dtype is DType.BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    magnitude: Array = E4M3[bits & 127]
    return np.where(bits < 128, magnitude, -magnitude)
