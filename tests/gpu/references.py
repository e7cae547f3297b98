"""What the fused kernels compute, in float64 by the formulas of `export.functions`, and arrays in awkward layouts to try them on."""

from dataclasses import dataclass

import numpy as np

from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.kernels import Kernels
from runtime.specs import DType
from tests.gpu.bits import Array, from_bits, to_bits

SLACK = 4e-6  # fp32 arithmetic, of the output's greatest magnitude
EPS = 1e-6
FP8_MAX = 448.0
SENTINEL = 7.0
Layout = tuple[int, int]


@dataclass
class Bench:
    """Puts float64 arrays on the device in one layout, and brings outputs back after checking what lies around them."""

    device: Device
    kernels: Kernels
    margins: Layout = (0, 0)

    def put(self, values: Array, dtype: DType) -> DeviceArray:
        left, right = self.margins
        wide = np.full((values.shape[0], left + values.shape[1] + right), SENTINEL)
        wide[:, left : left + values.shape[1]] = values
        return self.device.from_host(to_bits(wide, dtype), dtype).columns(left, left + values.shape[1])

    def vector(self, values: Array) -> DeviceArray:
        """f32 at an address that is aligned only where the layout is."""
        left = self.margins[0]
        padded = np.concatenate([np.full(left, SENTINEL), values])[None].astype(np.float32)
        return self.device.from_host(padded).columns(left, left + len(values))

    def blank(self, rows: int, columns: int, dtype: DType) -> DeviceArray:
        return self.put(np.zeros((rows, columns)), dtype)

    def scales(self, rows: int) -> DeviceArray:
        return self.device.zeros((rows,), DType.F32)

    def get(self, array: DeviceArray) -> Array:
        left, right = self.margins
        whole = DeviceArray(
            array.pointer - left * array.dtype.itemsize,
            (array.shape[0], left + array.shape[1] + right),
            array.dtype,
            left + array.shape[1] + right,
            array.buffer,
        )
        values = from_bits(self.device.to_host(whole), array.dtype)
        assert (values[:, :left] == SENTINEL).all() and (values[:, left + array.shape[1] :] == SENTINEL).all()
        return values[:, left : left + array.shape[1]]

    def get_vector(self, array: DeviceArray) -> Array:
        return from_bits(self.device.to_host(array), array.dtype)


def bf16_noise(shape: tuple[int, ...], *, seed: int, offset: float = 0.0, spread: float = 1.0) -> Array:
    values = offset + spread * np.random.default_rng(seed).standard_normal(shape)
    return from_bits(to_bits(values, DType.BF16), DType.BF16)


def f32_noise(size: int, *, seed: int, offset: float = 0.0) -> Array:
    values: Array = (offset + np.random.default_rng(seed).standard_normal(size)).astype(np.float32).astype(np.float64)
    return values


def layer_norm(x: Array, gain: Array, shift: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS) * gain + shift
    return normed


def rms_norm_rope(x: Array, weight: Array, cos: Array | None, sin: Array | None, num_heads: int) -> Array:
    normed: Array = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * weight
    if cos is None or sin is None:
        return normed
    pairs = normed.reshape(len(x), num_heads, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[:, None]
    return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)


def assert_rounded(values: Array, expected: Array, dtype: DType, scale: Array | float = 1.0) -> None:
    """Each value is `expected` rounded once to bf16 or to fp8 with `scale`, but for fp32 arithmetic before it."""
    step = {DType.F32: 0.0, DType.BF16: 2.0**-8, DType.F8_E4M3: 2.0**-4}[dtype]
    smallest = 2.0**-10 if dtype is DType.F8_E4M3 else 0.0
    allowed = step * np.abs(expected) + smallest * scale + SLACK * np.abs(expected).max()
    error = np.abs(values * scale - expected)
    assert (error <= allowed).all(), f"off by {np.nanmax(error / allowed):.3f} of what is allowed"


def assert_quantized(values: Array, scale: Array, expected: Array) -> None:
    """Rows of fp8 whose scale is amax / 448."""
    np.testing.assert_allclose(scale, np.abs(expected).max(axis=1) / FP8_MAX, rtol=2e-5)
    assert_rounded(values, expected, DType.F8_E4M3, scale[:, None])
    assert (np.abs(values).max(axis=1) == FP8_MAX).all()
