"""Self-attention with keys brought to whole tiles: what it gives is attention over the keys there are."""

import numpy as np
import pytest

from runtime.backends.cuda.array import DeviceArray
from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.self_attention import KEY_TILES, MOST_SPARE, SelfAttention
from runtime.specs import DType
from tests.gpu.bits import Array, from_bits, to_bits
from tests.gpu.conftest import kernels_for_this_gpu

pytestmark = pytest.mark.gpu

HEADS, WIDTH = 1, 128
TOLERANCE = {DType.BF16: 4e-3, DType.F8_E4M3: 7e-2}
"""Relative error (2-norm) of some queries. One H200: see the measurements in runtime/backends/cuda/attention.py."""


class Recorded:
    """Passes calls on to `Attention`, and notes how many keys it was given and how many of them count."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self.keys: list[tuple[int, int | None]] = []

    def run(
        self, query: DeviceArray, key: DeviceArray, *others: DeviceArray, num_heads: int, num_keys: int | None = None
    ) -> None:
        self.keys.append((key.shape[0], num_keys))
        value, out = others
        self._attention.run(query, key, value, out, num_heads=num_heads, num_keys=num_keys)


def draw(seed: int, dtype: DType, rows: int, *, spread: float = 1.0, offset: float = 0.0) -> Array:
    generator = np.random.default_rng(seed)
    return to_bits(generator.standard_normal((rows, WIDTH)) * spread + offset * generator.standard_normal(WIDTH), dtype)


def reference(query: Array, key: Array, value: Array, dtype: DType) -> Array:
    q, k, v = (from_bits(bits, dtype) for bits in (query, key, value))
    scores = q @ k.T / np.sqrt(WIDTH)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = weights @ v / weights.sum(-1, keepdims=True)
    return out


def error_of(given: Array, expected: Array) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("dtype", "tokens", "keys"),
    [(DType.BF16, 16300, 16384), (DType.BF16, 300, 300), (DType.F8_E4M3, 16300, 16384), (DType.F8_E4M3, 37, 256)],
)
def test_spare_keys_change_less_than_rounding(device: Device, dtype: DType, tokens: int, keys: int) -> None:
    kernels = AttentionKernels(device, kernels_for_this_gpu()[device.arch])
    bits = [
        draw(0, dtype, tokens),
        draw(1, dtype, tokens, offset=1.0),
        draw(2, dtype, tokens, spread=30 if dtype is DType.F8_E4M3 else 1),
    ]
    spare = -tokens % KEY_TILES[dtype]
    query, key, value = (
        device.from_host(np.concatenate([array, np.full((spare, WIDTH), 3, array.dtype)]), dtype).sparing_rows(spare)
        for array in bits
    )
    out = device.empty((tokens, WIDTH), dtype)
    with Attention(device) as attention:
        recorded = Recorded(attention)
        SelfAttention(recorded, kernels).run(query, key, value, out, num_heads=HEADS)  # type: ignore[arg-type]
        device.synchronize()
    assert recorded.keys == [(keys, tokens if dtype is DType.F8_E4M3 else None)]
    rows = slice(tokens - min(200, tokens), tokens)
    expected = reference(bits[0][rows], bits[1], bits[2], dtype)
    assert error_of(from_bits(device.to_host(out), dtype)[rows], expected) < TOLERANCE[dtype]


def test_bf16_takes_no_more_spare_keys_than_its_rounding_hides() -> None:
    assert -16300 % KEY_TILES[DType.BF16] <= MOST_SPARE * 16300 and -300 % KEY_TILES[DType.BF16] > MOST_SPARE * 300


def test_without_spare_rows_keys_are_taken_as_they_are(device: Device) -> None:
    kernels = AttentionKernels(device, kernels_for_this_gpu()[device.arch])
    query, key, value = (device.from_host(draw(seed, DType.BF16, 16300), DType.BF16) for seed in range(3))
    with Attention(device) as attention:
        recorded = Recorded(attention)
        SelfAttention(recorded, kernels).run(query, key, value, device.empty(query.shape, DType.BF16), num_heads=HEADS)  # type: ignore[arg-type]
        device.synchronize()
    assert recorded.keys == [(16300, None)]
