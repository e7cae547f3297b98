"""Every fused kernel against its formula in float64, on odd sizes, views and unaligned arrays."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.device import Device
from runtime.backends.cuda.kernels import Kernels
from runtime.errors import EngineError
from runtime.specs import DType
from tests.gpu.bits import from_bits, to_bits
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.references import (
    EPS,
    Bench,
    assert_quantized,
    assert_rounded,
    bf16_noise,
    f32_noise,
    layer_norm,
    rms_norm_rope,
)

pytestmark = pytest.mark.gpu

SIZES = [
    (1, 24, 2),
    (5, 40, 5),
    (3, 48, 2),
    (7, 1536, 12),
    (4, 3072, 24),
    (33, 5120, 40),
    (2, 8192, 64),
]  # rows, columns, heads
MARGINS = {"contiguous": (0, 0), "columns of a wider array": (16, 32), "unaligned": (3, 2)}


@pytest.fixture(scope="module")
def kernels(device: Device) -> Kernels:
    return Kernels(device, kernels_for_this_gpu()[device.arch])


@pytest.fixture
def bench(device: Device, kernels: Kernels) -> Bench:
    return Bench(device, kernels)


@pytest.fixture(params=list(MARGINS.values()), ids=list(MARGINS))
def any_layout(device: Device, kernels: Kernels, request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield Bench(device, kernels, request.param)


@pytest.mark.parametrize(("rows", "columns", "_heads"), SIZES)
@pytest.mark.parametrize("add_one", [True, False])
def test_norm_is_layer_norm_with_gain_and_shift(any_layout: Bench, rows: int, columns: int, _heads: int, add_one: bool) -> None:
    x = bf16_noise((rows, columns), seed=0, offset=5.0, spread=2.0)
    gain, shift = f32_noise(columns, seed=1), f32_noise(columns, seed=2)
    expected = layer_norm(x, gain + add_one, shift)
    sent = any_layout.put(x, DType.BF16), any_layout.vector(gain), any_layout.vector(shift)
    out, quantized = (any_layout.blank(rows, columns, dtype) for dtype in (DType.BF16, DType.F8_E4M3))
    scale = any_layout.scales(rows)
    any_layout.kernels.norm(*sent, out, add_one=add_one, eps=EPS)
    any_layout.kernels.norm(*sent, quantized, out_scale=scale, add_one=add_one, eps=EPS)
    assert_rounded(any_layout.get(out), expected, DType.BF16)
    assert_quantized(any_layout.get(quantized), any_layout.get_vector(scale), expected)


@pytest.mark.parametrize(("rows", "columns", "_heads"), SIZES)
@pytest.mark.parametrize("gated", [True, False])
def test_residual_norm_writes_the_sum_and_norms_what_it_wrote(
    any_layout: Bench, rows: int, columns: int, _heads: int, gated: bool
) -> None:
    residual, x = bf16_noise((rows, columns), seed=0, spread=3.0), bf16_noise((rows, columns), seed=1)
    gate, gain, shift = (f32_noise(columns, seed=seed) for seed in (2, 3, 4))
    sent, factor = any_layout.put(x, DType.BF16), any_layout.vector(gate) if gated else None
    vectors = {"gain": any_layout.vector(gain), "shift": any_layout.vector(shift)}
    for dtype in (DType.BF16, DType.F8_E4M3):
        hidden, out, scale = (
            any_layout.put(residual, DType.BF16),
            any_layout.blank(rows, columns, dtype),
            any_layout.scales(rows),
        )
        any_layout.kernels.residual_norm(
            hidden, sent, factor, **vectors, residual_out=hidden, out=out, out_scale=scale, add_one=True, eps=EPS
        )
        written = any_layout.get(hidden)
        assert_rounded(written, residual + x * (gate if gated else 1.0), DType.BF16)
        expected = layer_norm(written, gain + 1, shift)
        if dtype is DType.BF16:
            assert_rounded(any_layout.get(out), expected, DType.BF16)
        else:
            assert_quantized(any_layout.get(out), any_layout.get_vector(scale), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_gated_residual_adds_x_times_gate(any_layout: Bench, gated: bool) -> None:
    residual, x, gate = bf16_noise((5, 1544), seed=0), bf16_noise((5, 1544), seed=1), f32_noise(1544, seed=2)
    out = any_layout.blank(5, 1544, DType.BF16)
    factor = any_layout.vector(gate) if gated else None
    any_layout.kernels.gated_residual(any_layout.put(residual, DType.BF16), any_layout.put(x, DType.BF16), factor, out=out)
    assert_rounded(any_layout.get(out), residual + x * (gate if gated else 1.0), DType.BF16)


@pytest.mark.parametrize(("rows", "columns", "heads"), SIZES)
@pytest.mark.parametrize("rotated", [True, False])
def test_qk_norm_rope_turns_adjacent_pairs_of_the_normed_row(
    any_layout: Bench, rows: int, columns: int, heads: int, rotated: bool
) -> None:
    x, weight = bf16_noise((rows, columns), seed=0, spread=4.0), f32_noise(columns, seed=1, offset=1.0)
    angles = np.random.default_rng(2).uniform(-3, 3, (rows, columns // heads // 2))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    expected = rms_norm_rope(x, weight, cos if rotated else None, sin if rotated else None, num_heads=heads)
    rope_cos, rope_sin = (any_layout.device.from_host(table) if rotated else None for table in (cos, sin))
    for dtype in (DType.BF16, DType.F8_E4M3):
        out = any_layout.blank(rows, columns, dtype)
        sent = any_layout.put(x, DType.BF16), any_layout.vector(weight)
        any_layout.kernels.qk_norm_rope(*sent, rope_cos, rope_sin, out=out, num_heads=heads, eps=EPS)
        assert_rounded(any_layout.get(out), expected, dtype)


def test_qk_norm_rope_saturates_fp8_at_448(bench: Bench) -> None:
    x = np.zeros((1, 64))
    x[0, :2] = 8.0, -8.0  # normed: 8 / sqrt(128 / 64) = ±5.66, times a weight of 100 beyond ±448
    out = bench.blank(1, 64, DType.F8_E4M3)
    hundreds = bench.vector(np.full(64, 100.0))
    bench.kernels.qk_norm_rope(bench.put(x, DType.BF16), hundreds, out=out, num_heads=4, eps=EPS)
    np.testing.assert_array_equal(bench.get(out)[0], [448, -448, *[0] * 62])


@pytest.mark.parametrize(("rows", "columns", "_heads"), SIZES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_first_rows_take_the_first_row_of_each_vector_and_the_rest_the_second(
    any_layout: Bench, rows: int, columns: int, _heads: int, share: float
) -> None:
    residual, x = bf16_noise((rows, columns), seed=0, spread=3.0), bf16_noise((rows, columns), seed=1)
    gate, gain, shift = (f32_noise(2 * columns, seed=seed).reshape(2, columns) for seed in (2, 3, 4))
    count = round(share * rows)
    chosen = (np.arange(rows) >= count).astype(int)
    num_clean = any_layout.device.from_host(np.array([count]))
    sent, given = any_layout.put(x, DType.BF16), any_layout.put(residual, DType.BF16)
    vectors: dict[str, Any] = {
        "gain": any_layout.put(gain, DType.F32),
        "shift": any_layout.put(shift, DType.F32),
        "num_clean": num_clean,
    }
    gates = any_layout.put(gate, DType.F32)
    summed = any_layout.blank(rows, columns, DType.BF16)
    any_layout.kernels.gated_residual(given, sent, gates, out=summed, num_clean=num_clean)
    assert_rounded(any_layout.get(summed), residual + x * gate[chosen], DType.BF16)
    for dtype in (DType.BF16, DType.F8_E4M3):
        outs = [any_layout.blank(rows, columns, dtype) for _ in range(2)]
        scales = [any_layout.scales(rows) for _ in range(2)]
        hidden = any_layout.blank(rows, columns, DType.BF16)
        numbers: dict[str, Any] = {"add_one": True, "eps": EPS}
        any_layout.kernels.norm(sent, out=outs[0], out_scale=scales[0], **vectors, **numbers)
        any_layout.kernels.residual_norm(
            given, sent, gates, residual_out=hidden, out=outs[1], out_scale=scales[1], **vectors, **numbers
        )
        for normed, out, scale in zip((x, any_layout.get(hidden)), outs, scales, strict=True):
            expected = layer_norm(normed, gain[chosen] + 1, shift[chosen])
            if dtype is DType.BF16:
                assert_rounded(any_layout.get(out), expected, dtype)
            else:
                assert_quantized(any_layout.get(out), any_layout.get_vector(scale), expected)


def test_a_single_row_serves_all_beside_vectors_of_two(bench: Bench) -> None:
    residual, x = bf16_noise((5, 48), seed=0), bf16_noise((5, 48), seed=1)
    gate, gain, shift = f32_noise(96, seed=2).reshape(2, 48), f32_noise(48, seed=3), f32_noise(48, seed=4)
    hidden, out = (bench.blank(5, 48, DType.BF16) for _ in range(2))
    vectors: dict[str, Any] = {
        "gain": bench.vector(gain),
        "shift": bench.vector(shift),
        "num_clean": bench.device.from_host(np.array([2])),
    }
    bench.kernels.residual_norm(
        bench.put(residual, DType.BF16), bench.put(x, DType.BF16), bench.put(gate, DType.F32), **vectors,
        residual_out=hidden, out=out, add_one=False, eps=EPS,
    )  # fmt: skip
    assert_rounded(bench.get(hidden), residual + x * gate[[0, 0, 1, 1, 1]], DType.BF16)
    assert_rounded(bench.get(out), layer_norm(bench.get(hidden), gain, shift), DType.BF16)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 264), (5, 8960), (3, 13824), (2, 16384)])
def test_quantize_rows_scales_each_row_by_its_greatest_magnitude(any_layout: Bench, rows: int, columns: int) -> None:
    x = bf16_noise((rows, columns), seed=0) * np.array([1e-3, 1.0, 300.0, 1e-8, 1e4])[:rows, None]
    x = from_bits(to_bits(x, DType.BF16), DType.BF16)
    out, scale = any_layout.blank(rows, columns, DType.F8_E4M3), any_layout.scales(rows)
    any_layout.kernels.quantize_rows(any_layout.put(x, DType.BF16), out, scale)
    assert_quantized(any_layout.get(out), any_layout.get_vector(scale), x)


def test_a_row_of_zeros_becomes_zeros_with_a_finite_scale(bench: Bench) -> None:
    out, scale = bench.blank(3, 40, DType.F8_E4M3), bench.scales(3)
    bench.kernels.quantize_rows(bench.put(np.zeros((3, 40)), DType.BF16), out, scale)
    assert not bench.get(out).any()
    assert (bench.get_vector(scale) > 0).all() and (bench.get_vector(scale) < 1e-30).all()


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 8), (1, 37, 256), (2, 16, 5120), (3, 5, 8200), (4, 33, 5120)])
@pytest.mark.parametrize("weight_dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("silu", [True, False])
def test_gemv_is_a_linear_layer_after_silu_or_nothing(
    any_layout: Bench, rows: int, outputs: int, inputs: int, weight_dtype: DType, silu: bool
) -> None:
    x = f32_noise(rows * inputs, seed=0).reshape(rows, inputs)
    weight, bias = bf16_noise((outputs, inputs), seed=1, spread=inputs**-0.5), f32_noise(outputs, seed=2)
    activated = x / (1 + np.exp(-x)) if silu else x
    given = any_layout.put(x, DType.F32), any_layout.put(weight, weight_dtype)
    for offset, sent in ((bias, any_layout.device.from_host(bias.astype(np.float32))), (0.0, None)):
        out = any_layout.blank(rows, outputs, DType.F32)
        any_layout.kernels.gemv(*given, sent, out=out, silu_input=silu)
        np.testing.assert_allclose(any_layout.get(out), activated @ weight.T + offset, rtol=0, atol=5e-6)


@pytest.mark.parametrize("columns", [40, 18432])
def test_add_repeats_a_single_row(any_layout: Bench, columns: int) -> None:
    a, b = f32_noise(6 * columns, seed=0).reshape(6, columns), f32_noise(columns, seed=1)[None]
    for first, second in ((a, b), (b, a), (a, a)):
        out = any_layout.blank(6, columns, DType.F32)
        any_layout.kernels.add(any_layout.put(first, DType.F32), any_layout.put(second, DType.F32), out)
        np.testing.assert_array_equal(any_layout.get(out), (first.astype(np.float32) + second.astype(np.float32)))


def test_gelu_is_the_exact_one(any_layout: Bench) -> None:
    x = bf16_noise((3, 1288), seed=0, spread=2.0)
    out = any_layout.blank(3, 1288, DType.BF16)
    any_layout.kernels.gelu(any_layout.put(x, DType.BF16), out)
    assert_rounded(any_layout.get(out), x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2, DType.BF16)


def test_convert_rounds_to_bf16_and_back_exactly(any_layout: Bench) -> None:
    x = f32_noise(3 * 5128, seed=0).reshape(3, 5128)
    narrow, wide = any_layout.blank(3, 5128, DType.BF16), any_layout.blank(3, 5128, DType.F32)
    any_layout.kernels.convert(any_layout.put(x, DType.F32), narrow)
    any_layout.kernels.convert(narrow, wide)
    np.testing.assert_array_equal(any_layout.get(narrow), from_bits(to_bits(x, DType.BF16), DType.BF16))
    np.testing.assert_array_equal(any_layout.get(wide), any_layout.get(narrow))


def test_the_same_input_gives_the_same_bits(bench: Bench) -> None:
    x, gain = bench.put(bf16_noise((2000, 1536), seed=0), DType.BF16), bench.vector(f32_noise(1536, seed=1))
    runs = []
    for _ in range(3):
        out, scale = bench.blank(2000, 1536, DType.F8_E4M3), bench.scales(2000)
        bench.kernels.norm(x, gain, gain, out, out_scale=scale, add_one=True, eps=EPS)
        runs.append((bench.device.to_host(out).tobytes(), bench.device.to_host(scale).tobytes()))
    assert runs[0] == runs[1] == runs[2]


def test_no_rows_are_no_work(bench: Bench) -> None:
    empty = bench.device.empty((0, 64), DType.BF16)
    bench.kernels.gated_residual(empty, empty, out=empty)
    bench.device.synchronize()


def test_rows_that_no_kernel_takes_are_refused(bench: Bench) -> None:
    odd, wide = bench.device.empty((2, 12), DType.BF16), bench.device.empty((2, 8200), DType.BF16)
    for array in (odd, wide):
        with pytest.raises(EngineError, match="multiple of 8 columns, up to 8192"):
            bench.kernels.gated_residual(array, array, out=array)


def test_shapes_and_dtypes_that_do_not_fit_are_named(bench: Bench) -> None:
    x, other = bench.blank(2, 16, DType.BF16), bench.blank(2, 24, DType.BF16)
    ones = bench.vector(np.ones(16))
    with pytest.raises(ValueError, match=r"expected BF16 \[2, 16\], got BF16 \[2, 24\]"):
        bench.kernels.gated_residual(other, x, out=x)
    with pytest.raises(ValueError, match="fp8 rows need out_scale"):
        bench.kernels.norm(x, ones, ones, bench.blank(2, 16, DType.F8_E4M3), add_one=True, eps=EPS)
    with pytest.raises(ValueError, match="3 heads of 16 columns"):
        bench.kernels.qk_norm_rope(x, ones, out=x, num_heads=3, eps=EPS)
    with pytest.raises(ValueError, match="up to 4 rows"):
        bench.kernels.gemv(bench.blank(5, 16, DType.F32), x, out=bench.blank(5, 2, DType.F32))
