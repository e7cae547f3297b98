"""Initial noise: torch's CPU `randn` in NumPy, so that a seed gives the same video here as in diffusers or DiffSynth-Studio.

torch draws 32-bit words from MT19937 and turns them into normals by Box-Muller. From 16 elements on it works in float32 on
blocks of 16 (ATen `cpu/DistributionTemplates.h`, with the logarithm and sine polynomials of `cpu/avx_mathfun.h`); below that it
draws pairs in float64. Read and checked against torch 2.13.
"""

import math
from typing import Any

import numpy as np

from runtime.errors import RequestError
from runtime.geometry import Float32

_Float64 = np.ndarray[Any, np.dtype[np.float64]]

_BLOCK = 16  # elements that torch transforms together: eight radii, then eight angles
_CHUNK = 1 << 14  # pairs transformed at once, so that the temporaries stay in the cache
_TWO_PI = np.float32(2 * math.pi)
_FOUR_OVER_PI = np.float32(4 / math.pi)
# Cephes single-precision coefficients (S. Moshier, `logf.c`, `sinf.c`), highest power first.
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_LOW, _LN2_HIGH = -2.12194440e-4, 0.693359375
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_MINUS_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # in three parts


def randn(seed: int, shape: tuple[int, ...]) -> Float32:
    """Standard normal noise, equal to `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`.

    Bit for bit where torch runs its AVX2 code (2.7e8 elements compared on an AMD EPYC); where it runs its portable code,
    angles are rounded elsewhere and the difference stays under 1e-5.

    Args:
        seed: 0 to 2^64-1. The generator keeps the lowest 32 bits, as torch's does.

    Raises:
        RequestError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise RequestError(f"seed={seed}: need 0 to 2^64-1", hint="leave --seed out to have one chosen, or give one in range")
    size = math.prod(shape)
    words = np.random.RandomState(seed & 0xFFFFFFFF)  # MT19937 with Knuth's seeding, frozen by NumPy's policy
    values = _draw_blocks(words, size) if size >= _BLOCK else _draw_pairs(words, size)
    return values.reshape(shape)


def _draw_blocks(words: np.random.RandomState, size: int) -> Float32:
    values = np.empty(size, np.float32)
    whole = size - size % _BLOCK
    uniform = _uniform(words, size)
    for start in range(0, whole, 2 * _CHUNK):
        stop = min(start + 2 * _CHUNK, whole)
        values[start:stop] = _box_muller(uniform[start:stop])
    if whole < size:
        # The last block is drawn anew, and overlaps the one before it.
        values[size - _BLOCK :] = _box_muller(_uniform(words, _BLOCK))
    return values


def _draw_pairs(words: np.random.RandomState, size: int) -> Float32:
    draws = 2 * -(-size // 2)  # a pair of uniforms makes a pair of normals
    high, low = words.randint(0, 1 << 32, size=(draws, 2), dtype=np.uint32).astype(np.uint64).T
    uniform = ((high << np.uint64(32) | low) & np.uint64((1 << 53) - 1)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[1::2]))
    theta = 2 * math.pi * uniform[0::2]
    return np.stack((radius * np.cos(theta), radius * np.sin(theta)), axis=-1).reshape(-1)[:size].astype(np.float32)


def _uniform(words: np.random.RandomState, size: int) -> Float32:
    """Uniform numbers in [0, 1): the lowest 24 bits of each word."""
    drawn = words.randint(0, 1 << 32, size=size, dtype=np.uint32)
    return (drawn & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: Float32) -> Float32:
    """Blocks of 16 uniforms → blocks of 16 normals: radius from the first eight, angle from the last eight."""
    first, second = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)  # [2, blocks, 8]
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - first))
    sin, cos = _sin_cos(_TWO_PI * second)
    return np.stack((radius * cos, radius * sin), axis=1).reshape(-1) + np.float32(0)  # torch adds the mean: -0 becomes 0


def _fma(a: Float32, b: Float32 | float, c: Float32 | float) -> Float32:
    """`a * b + c` with one rounding: the product of two float32 numbers is exact in float64."""
    total: _Float64 = a.astype(np.float64) * np.float64(np.float32(b)) if isinstance(b, float) else a.astype(np.float64) * b
    total += np.float32(c) if isinstance(c, float) else c
    return total.astype(np.float32)


def _polynomial(x: Float32, coefficients: tuple[float, ...]) -> Float32:
    y = _fma(x, coefficients[0], coefficients[1])
    for coefficient in coefficients[2:]:
        y = _fma(y, x, coefficient)
    return y


def _log(x: Float32) -> Float32:
    """Natural logarithm of normal positive numbers, fused and rounded where torch's compiled code does."""
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    low = mantissa < np.float32(math.sqrt(0.5))
    e = (exponent - low).astype(np.float32)
    f = mantissa - np.float32(1) + np.where(low, mantissa, np.float32(0))
    z = f * f
    y = _fma(_polynomial(f, _LOG) * f, z, e * np.float32(_LN2_LOW))
    return _fma(e, _LN2_HIGH, f + _fma(z, -0.5, y))


def _sin_cos(x: Float32) -> tuple[Float32, Float32]:
    """Sine and cosine of non-negative numbers, fused and rounded where torch's compiled code does."""
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    y = octant.astype(np.float32)
    for part in _MINUS_QUARTER_PI:
        x = _fma(y, part, x)
    z = x * x
    cos = _fma(_polynomial(z, _COS) * z, z, z * np.float32(-0.5)) + np.float32(1)
    sin = _fma(_polynomial(z, _SIN) * z, x, x)
    swapped = (octant & 2) != 0
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return np.where(octant & 4, -sin, sin), np.where((octant - 2) & 4, cos, -cos)
