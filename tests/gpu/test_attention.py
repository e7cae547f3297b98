"""Attention against float64 NumPy, on operands that are exact in the dtype."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.device import Device
from runtime.errors import EngineError
from runtime.specs import DType
from tests.gpu.bits import Array, from_bits, to_bits

pytestmark = pytest.mark.gpu

TOLERANCE = {DType.BF16: 4e-3, DType.F8_E4M3: 5e-2}
"""Relative error (2-norm). Rounding the result alone costs 1.7e-3 in bf16 and 2.6e-2 in E4M3."""


@pytest.fixture(scope="module")
def attention(device: Device) -> Iterator[Attention]:
    with Attention(device) as opened:
        yield opened


def draw(seed: int, dtype: DType, *shape: int, spread: float = 1.0) -> Array:
    return to_bits(np.random.default_rng(seed).standard_normal(shape) * spread, dtype)


def reference(
    query: Array, key: Array, value: Array, num_heads: int, dtype: DType, factors: tuple[float, float, float] = (1, 1, 1)
) -> Array:
    """softmax(q · kᵀ / √d) · v for each head, [N, H·d] float64, of bits times factors."""
    q, k, v = (
        (from_bits(bits, dtype) * factor).reshape(len(bits), num_heads, -1).swapaxes(0, 1)
        for bits, factor in zip((query, key, value), factors, strict=True)
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = (weights / weights.sum(-1, keepdims=True)) @ v
    return out.swapaxes(0, 1).reshape(query.shape)


def error_of(given: Array, expected: Array) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 128), (3, 64), (5, 24), (2, 8)])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (600, 600), (257, 512), (64, 3)])
def test_attention_matches_float64(
    device: Device, attention: Attention, queries: int, keys: int, num_heads: int, head_dim: int
) -> None:
    width = num_heads * head_dim
    query, key, value = (draw(seed, DType.BF16, rows, width) for seed, rows in enumerate((queries, keys, keys)))
    out = device.empty((queries, width), DType.BF16)
    attention.run(device.from_host(query), device.from_host(key), device.from_host(value), out, num_heads=num_heads)
    expected = reference(query, key, value, num_heads, DType.BF16)
    assert error_of(from_bits(device.to_host(out), DType.BF16), expected) < TOLERANCE[DType.BF16]


def test_operands_and_result_may_be_columns_of_wider_arrays(device: Device, attention: Attention) -> None:
    fused = draw(0, DType.BF16, 50, 3 * 256)
    array, wide = device.from_host(fused), device.zeros((50, 512), DType.BF16)
    q, k, v = (array.columns(start, start + 256) for start in (0, 256, 512))
    attention.run(q, k, v, wide.columns(128, 384), num_heads=2)
    query, key, value = np.split(fused, 3, axis=1)
    given = from_bits(device.to_host(wide), DType.BF16)
    assert error_of(given[:, 128:384], reference(query, key, value, 2, DType.BF16)) < TOLERANCE[DType.BF16]
    assert not given[:, :128].any() and not given[:, 384:].any()


@pytest.mark.parametrize("tokens", [37, 1024])
def test_fp8_attention_gives_the_mean_in_the_values_own_units(device: Device, attention: Attention, tokens: int) -> None:
    query, key = (draw(seed, DType.F8_E4M3, tokens, 256) for seed in range(2))
    value = draw(2, DType.F8_E4M3, tokens, 256, spread=80)
    out = device.empty((tokens, 256), DType.F8_E4M3)
    attention.run(device.from_host(query), device.from_host(key), device.from_host(value), out, num_heads=2)
    expected = reference(query, key, value, 2, DType.F8_E4M3)
    assert error_of(from_bits(device.to_host(out), DType.F8_E4M3), expected) < TOLERANCE[DType.F8_E4M3]


def test_fp8_scales_are_applied_to_their_tensors(device: Device, attention: Attention) -> None:
    query, key, value = (draw(seed, DType.F8_E4M3, 200, 256) for seed in range(3))
    scales = {"descale_q": 0.5, "descale_k": 1.5, "descale_v": 0.25, "scale_o": 300.0}
    on_device: dict[str, Any] = {name: device.from_host(np.array([scale], np.float32)) for name, scale in scales.items()}
    out = device.empty((200, 256), DType.F8_E4M3)
    attention.run(device.from_host(query), device.from_host(key), device.from_host(value), out, num_heads=2, **on_device)
    expected = reference(query, key, value, 2, DType.F8_E4M3, factors=(0.5, 1.5, 0.25))
    given = from_bits(device.to_host(out), DType.F8_E4M3) / scales["scale_o"]
    assert error_of(given, expected) < TOLERANCE[DType.F8_E4M3]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F8_E4M3])
@pytest.mark.parametrize(("keys", "counted"), [(256, 37), (1024, 1023), (512, 512)])
def test_keys_that_do_not_count_change_nothing(
    device: Device, attention: Attention, dtype: DType, keys: int, counted: int
) -> None:
    query, key, value = (draw(seed, dtype, rows, 256) for seed, rows in enumerate((100, keys, keys)))
    out = device.empty((100, 256), dtype)
    sent = [device.from_host(array, dtype) for array in (query, key, value)]
    attention.run(sent[0], sent[1], sent[2], out, num_heads=2, num_keys=counted)
    expected = reference(query, key[:counted], value[:counted], 2, dtype)
    assert error_of(from_bits(device.to_host(out), dtype), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F8_E4M3])
def test_same_operands_give_the_same_bits(device: Device, attention: Attention, dtype: DType) -> None:
    query, key, value = (device.from_host(draw(seed, dtype, 1500, 256)) for seed in range(3))
    outs = [device.empty((1500, 256), dtype) for _ in range(2)]
    for out in outs:
        attention.run(query, key, value, out, num_heads=2)
    np.testing.assert_array_equal(device.to_host(outs[0]), device.to_host(outs[1]))


def test_what_does_not_fit_is_refused_by_name(device: Device, attention: Attention) -> None:
    x, narrow = device.zeros((16, 48), DType.BF16), device.zeros((16, 64), DType.BF16)
    with pytest.raises(EngineError, match="multiples of 8 up to 256 for BF16, got 12"):
        attention.run(x, x, x, x, num_heads=4)
    with pytest.raises(EngineError, match="do not fit"):
        attention.run(x, narrow, narrow, x, num_heads=2)
    with pytest.raises(EngineError, match="value does not start on 16-byte words"):
        attention.run(x, x, narrow.columns(4, 52), x, num_heads=2)
    fp8 = device.zeros((16, 64), DType.F8_E4M3)
    with pytest.raises(EngineError, match="fp8 gives fp8"):
        attention.run(fp8, fp8, fp8, narrow, num_heads=2)
