"""Matrix products against float64 NumPy, on operands that are exact in the dtype."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.device import Device
from runtime.backends.cuda.linear import Linear
from runtime.errors import EngineError
from runtime.specs import DType
from tests.gpu.bits import Array, from_bits, to_bits

pytestmark = pytest.mark.gpu

TOLERANCE = {DType.BF16: 2.5e-3, DType.F8_E4M3: 3e-3, DType.F32: 2e-6}
"""Relative error (2-norm); rounding the result to bf16 alone costs 1.7e-3. benchmarks/cuda_libraries.py measures them at full size."""


@pytest.fixture(scope="module")
def linear(device: Device) -> Iterator[Linear]:
    with Linear(device) as opened:
        yield opened


def draw(seed: int, dtype: DType, *shape: int) -> Array:
    return to_bits(np.random.default_rng(seed).standard_normal(shape), dtype)


def gelu(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result


def error_of(given: Array, expected: Array) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 24, 72), (33, 40, 8), (100, 1536, 1536), (517, 256, 768)])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_product_matches_float64(
    device: Device, linear: Linear, dtype: DType, shape: tuple[int, int, int], with_gelu: bool, with_bias: bool
) -> None:
    tokens, features, outputs = shape
    x, weight, bias = draw(0, dtype, tokens, features), draw(1, dtype, outputs, features), draw(2, dtype, outputs)
    out = device.empty((tokens, outputs), dtype)
    given_bias = device.from_host(bias, dtype) if with_bias else None
    linear.run(device.from_host(x, dtype), device.from_host(weight, dtype), given_bias, out, gelu=with_gelu)
    expected = from_bits(x, dtype) @ from_bits(weight, dtype).T + with_bias * from_bits(bias, dtype)
    error = error_of(from_bits(device.to_host(out), dtype), gelu(expected) if with_gelu else expected)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("shape", [(1, 256, 768), (37, 1536, 1536), (513, 8960, 256), (256, 16, 16)])
def test_fp8_product_matches_float64(
    device: Device, linear: Linear, shape: tuple[int, int, int], scalar: bool, with_gelu: bool
) -> None:
    tokens, features, outputs = shape
    x, weight = draw(0, DType.F8_E4M3, tokens, features), draw(1, DType.F8_E4M3, outputs, features)
    bias = draw(2, DType.BF16, outputs)
    generator = np.random.default_rng(3)
    x_scale = generator.uniform(0.01, 0.1, 1 if scalar else tokens).astype(np.float32)
    weight_scale = generator.uniform(0.1, 1, outputs).astype(np.float32)
    out = device.empty((tokens, outputs), DType.BF16)
    linear.run(
        device.from_host(x),
        device.from_host(weight),
        device.from_host(bias),
        out,
        x_scale=device.from_host(x_scale),
        weight_scale=device.from_host(weight_scale),
        gelu=with_gelu,
    )
    expected = from_bits(x, DType.F8_E4M3) @ from_bits(weight, DType.F8_E4M3).T
    expected = expected * x_scale[:, None] * weight_scale + from_bits(bias, DType.BF16)
    error = error_of(from_bits(device.to_host(out), DType.BF16), gelu(expected) if with_gelu else expected)
    assert error < TOLERANCE[DType.F8_E4M3]


def test_operands_and_result_may_be_columns_of_wider_arrays(device: Device, linear: Linear) -> None:
    x, weight = draw(0, DType.BF16, 19, 3 * 24), draw(1, DType.BF16, 40, 24)
    wide = device.zeros((19, 100), DType.BF16)
    linear.run(device.from_host(x).columns(24, 48), device.from_host(weight), None, wide.columns(20, 60))
    expected = from_bits(x, DType.BF16)[:, 24:48] @ from_bits(weight, DType.BF16).T
    given = from_bits(device.to_host(wide), DType.BF16)
    assert error_of(given[:, 20:60], expected) < TOLERANCE[DType.BF16]
    assert not given[:, :20].any() and not given[:, 60:].any()


def test_same_operands_give_the_same_bits(device: Device, linear: Linear) -> None:
    x, weight = (device.from_host(draw(seed, DType.BF16, 300, 1536)) for seed in (0, 1))
    outs = [device.empty((300, 300), DType.BF16) for _ in range(2)]
    for out in outs:
        linear.run(x, weight, None, out)
    np.testing.assert_array_equal(device.to_host(outs[0]), device.to_host(outs[1]))


def test_every_choice_computes_the_same_product(device: Device, linear: Linear) -> None:
    x, weight = draw(0, DType.BF16, 300, 512), draw(1, DType.BF16, 256, 512)
    arrays = device.from_host(x), device.from_host(weight), None, device.empty((300, 256), DType.BF16)
    expected = from_bits(x, DType.BF16) @ from_bits(weight, DType.BF16).T
    assert linear.num_choices(*arrays) > 1
    for choice in range(linear.num_choices(*arrays)):
        linear.run(*arrays, choice=choice)
        assert error_of(from_bits(device.to_host(arrays[3]), DType.BF16), expected) < TOLERANCE[DType.BF16]
    with pytest.raises(EngineError, match="choice 99"):
        linear.run(*arrays, choice=99)


def test_what_does_not_fit_is_refused_by_name(device: Device, linear: Linear) -> None:
    x, out = device.zeros((4, 32), DType.BF16), device.zeros((4, 16), DType.BF16)
    with pytest.raises(EngineError, match="do not fit"):
        linear.run(x, device.zeros((16, 24), DType.BF16), None, out)
    with pytest.raises(EngineError, match=r"bias \[8\], expected \[16\]"):
        linear.run(x, device.zeros((16, 32), DType.BF16), device.zeros((8,), DType.BF16), out)
    fp8, weight = device.zeros((4, 24), DType.F8_E4M3), device.zeros((16, 24), DType.F8_E4M3)
    with pytest.raises(EngineError, match="x_scale is none"):
        linear.run(fp8, weight, None, out)
    scales: dict[str, Any] = {"x_scale": device.zeros((4,), DType.F32), "weight_scale": device.zeros((16,), DType.F32)}
    with pytest.raises(EngineError, match="multiples of 16, got K=24"):
        linear.run(fp8, weight, None, out, **scales)
