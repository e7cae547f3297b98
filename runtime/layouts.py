"""A stage's tensors on the host between two precisions: element types that NumPy lacks, and channels that lie last."""

import numpy as np

from runtime.backends.base import Array
from runtime.precision import CHANNEL_MULTIPLE
from runtime.specs import DType, TensorSpec


def widen(array: Array, spec: TensorSpec, channels: int) -> Array:
    """A tensor as a backend gives it to the host → float32 (whole numbers as they are), channels first.

    Args:
        channels: how many of a tensor with its channels last are not padding.
    """
    wide = _from_bits(array, spec.dtype)
    return np.moveaxis(wide[..., :channels], -1, 0) if spec.channels_last else wide


def narrow(array: Array, spec: TensorSpec) -> Array:
    """The opposite of `widen`: rounded to the nearest number of the element type, ties to even; padded with zeros."""
    if spec.channels_last:
        array = np.moveaxis(array, 0, -1)
        missing = -array.shape[-1] % CHANNEL_MULTIPLE
        array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(_to_bits(array, spec.dtype))


def _from_bits(array: Array, dtype: DType) -> Array:
    match dtype:
        case DType.BF16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        case DType.F16:
            return array.astype(np.float32)
        case DType.F8_E4M3:
            raise ValueError("activations in fp8 have a scale of their own and cannot be compared")
    return array


def _to_bits(array: Array, dtype: DType) -> Array:
    match dtype:
        case DType.BF16:
            bits = array.astype(np.float32).view(np.uint32)
            rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return rounded
        case DType.F16:
            return array.astype(np.float16)
        case DType.F8_E4M3:
            raise ValueError("activations in fp8 have a scale of their own and cannot be compared")
    return array
