"""The kernels around self-attention against float64: values centred and narrowed, what comes out put back, spare rows filled."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.backends.cuda.array import Unit
from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.kernels import Kernels
from runtime.specs import DType
from tests.gpu.bits import Array, from_bits, to_bits
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.references import FP8_MAX, Bench, assert_rounded, bf16_noise, f32_noise

pytestmark = pytest.mark.gpu

SHAPES = [(1, 8), (37, 40), (700, 1536), (1500, 24), (64, 5120)]
MARGINS = {"contiguous": (0, 0), "columns of a wider array": (16, 32)}


@pytest.fixture(scope="module")
def kernels(device: Device) -> AttentionKernels:
    return AttentionKernels(device, kernels_for_this_gpu()[device.arch])


@pytest.fixture(params=list(MARGINS.values()), ids=list(MARGINS))
def bench(device: Device, request: pytest.FixtureRequest) -> Bench:
    return Bench(device, Kernels(device, kernels_for_this_gpu()[device.arch]), request.param)


def uneven_columns(rows: int, columns: int) -> Array:
    """Columns of different means, and one number far from its column's."""
    values = bf16_noise((rows, columns), seed=0) + 3 * bf16_noise((columns,), seed=1)
    values[rows // 2, columns - 1] -= 20
    return from_bits(to_bits(values, DType.BF16), DType.BF16)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_centred_numbers_are_distances_from_their_columns_mean(
    bench: Bench, kernels: AttentionKernels, rows: int, columns: int
) -> None:
    x = uneven_columns(rows, columns)
    out, scale, offset = bench.blank(rows, columns, DType.F8_E4M3), bench.scales(1), bench.scales(columns)
    kernels.quantize_centred(bench.put(x, DType.BF16), out, scale, offset)
    mean = x.mean(axis=0)
    np.testing.assert_allclose(bench.get_vector(offset), mean, atol=2e-5)
    furthest = np.abs(x - mean).max()
    if rows == 1:
        assert not bench.get(out).any() and bench.get_vector(scale) > 0
        return
    np.testing.assert_allclose(bench.get_vector(scale), furthest / FP8_MAX, rtol=1e-4)
    assert_rounded(bench.get(out), x - bench.get_vector(offset), DType.F8_E4M3, float(bench.get_vector(scale)[0]))
    assert np.abs(bench.get(out)).max() == FP8_MAX


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_restoring_gives_what_was_centred(bench: Bench, kernels: AttentionKernels, rows: int, columns: int) -> None:
    codes = from_bits(to_bits(100 * bf16_noise((rows, columns), seed=2), DType.F8_E4M3), DType.F8_E4M3)
    scale, offset = 0.03125, f32_noise(columns, seed=3)
    unit = Unit(bench.device.from_host(np.array([scale], np.float32)), bench.device.from_host(offset.astype(np.float32)))
    out = bench.blank(rows, columns, DType.BF16)
    kernels.restore(with_unit(bench.put(codes, DType.F8_E4M3), unit), out)
    assert_rounded(bench.get(out), codes * scale + offset, DType.BF16)


@pytest.mark.parametrize(("outputs", "features"), [(1, 8), (37, 264), (130, 5120)])
def test_folded_bias_makes_up_for_the_offset(bench: Bench, kernels: AttentionKernels, outputs: int, features: int) -> None:
    weight = from_bits(to_bits(100 * bf16_noise((outputs, features), seed=0), DType.F8_E4M3), DType.F8_E4M3)
    weight_scale, offset, bias = (
        1e-3 * np.abs(f32_noise(outputs, seed=1)),
        f32_noise(features, seed=2),
        bf16_noise((outputs,), seed=3),
    )
    weight_scale = weight_scale.astype(np.float32).astype(np.float64)
    device = bench.device
    unit = Unit(bench.scales(1), device.from_host(offset.astype(np.float32)))
    x, out = with_unit(device.zeros((2, features), DType.F8_E4M3), unit), device.empty((outputs,), DType.BF16)
    given = (
        bench.put(weight, DType.F8_E4M3),
        device.from_host(weight_scale.astype(np.float32)),
        device.from_host(to_bits(bias, DType.BF16)),
    )
    kernels.fold_offset(x, *given, out)
    assert_rounded(bench.get_vector(out), bias + weight_scale * (weight @ offset), DType.BF16)


@pytest.mark.parametrize(("rows", "columns", "spare"), [(1, 8, 3), (37, 40, 5), (700, 1536, 2)])
def test_spare_rows_become_the_mean_row(bench: Bench, kernels: AttentionKernels, rows: int, columns: int, spare: int) -> None:
    x = uneven_columns(rows + spare + 1, columns)
    whole = bench.put(x, DType.BF16)
    kernels.fill_spare_rows(whole.sparing_rows(spare + 1), spare)
    given = bench.get(whole)
    np.testing.assert_array_equal(given[:rows], x[:rows])
    np.testing.assert_array_equal(given[rows + spare :], x[rows + spare :])
    assert_rounded(given[rows : rows + spare], np.repeat(x[:rows].mean(axis=0)[None], spare, axis=0), DType.BF16)


def test_cleared_spare_rows_are_zeros_and_the_others_stay(bench: Bench, kernels: AttentionKernels) -> None:
    codes = np.full((9, 48), 7, np.uint8)
    whole = bench.device.from_host(codes)
    kernels.clear_spare_rows(whole.sparing_rows(4), 3)
    codes[5:8] = 0
    np.testing.assert_array_equal(bench.device.to_host(whole), codes)


def test_same_values_give_the_same_bits(bench: Bench, kernels: AttentionKernels) -> None:
    x = bench.put(uneven_columns(700, 1536), DType.BF16)
    runs = []
    for _ in range(2):
        out, scale, offset = bench.blank(700, 1536, DType.F8_E4M3), bench.scales(1), bench.scales(1536)
        kernels.quantize_centred(x, out, scale, offset)
        runs.append([bench.device.to_host(array).tobytes() for array in (out, scale, offset)])
    assert runs[0] == runs[1]


def test_rows_that_are_no_spare_rows_are_not_written(bench: Bench, kernels: AttentionKernels) -> None:
    whole = bench.put(uneven_columns(8, 16), DType.BF16)
    with pytest.raises(ValueError, match="2 spare rows of 0"):
        kernels.fill_spare_rows(whole.rows(0, 4), 2)


def with_unit(array: DeviceArray, unit: Unit) -> DeviceArray:
    return replace(array, unit=unit)
