"""How close the fused CUDA kernels come to the memory's speed: bytes they must move over time, beside a copy in the same run.

`python -m benchmarks.cuda_kernels [--json FILE]`, on a machine with a GPU. Every launch works on other arrays than the one before,
over more memory than any cache holds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.device import Device, DeviceArray, check
from runtime.backends.cuda.kernels import Kernels
from runtime.specs import DType

TOKENS = 32760  # 832x480, 81 frames
SHAPES = ((1536, 12, 8960), (5120, 40, 13824))  # dim, heads, ffn_dim of the 1.3B and the 14B
PASSES, LAUNCHES = 5, 24
BEYOND_CACHES = 1 << 30  # bytes
EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    name: str
    shape: tuple[int, int]
    moved_bytes: int
    ms: float
    gb_per_s: float
    share_of_copy: float
    host_us: float  # the host's time for one launch


def measure_all(device: Device, kernels: Kernels, around_attention: AttentionKernels) -> list[Measured]:
    """The copy first, then every kernel at every shape; the median of some passes."""
    rows: list[Measured] = []
    for name, shape, moved_bytes, launches in (_copy(device), *_cases(device, kernels, around_attention)):
        for launch in launches:
            launch()  # warm up: loads the kernel, settles the clocks
        passes = [_pass(device, launches) for _ in range(PASSES)]
        ms, host_us = (median(values) for values in zip(*passes, strict=True))
        speed = moved_bytes / ms / 1e6
        share = speed / rows[0].gb_per_s if rows else 1.0
        row = Measured(
            name=name, shape=shape, moved_bytes=moved_bytes, ms=ms, gb_per_s=speed, share_of_copy=share, host_us=host_us
        )
        rows.append(row)
    return rows


Launch = Callable[[], object]
Case = tuple[str, tuple[int, int], int, list[Launch]]


def _pass(device: Device, launches: list[Launch]) -> tuple[float, float]:
    """Milliseconds on the device and microseconds on the host, for one launch."""
    host_s = 0.0

    def queue() -> None:
        nonlocal host_s
        started = time.perf_counter()
        for index in range(LAUNCHES):
            launches[index % len(launches)]()
        host_s = time.perf_counter() - started

    return device.elapsed_ms(queue) / LAUNCHES, host_s / LAUNCHES * 1e6


def _copy(device: Device) -> Case:
    from cuda.bindings import driver

    source, target = (device.zeros((BEYOND_CACHES,), DType.F8_E4M3) for _ in range(2))

    def launch() -> None:
        call = driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, BEYOND_CACHES, device.stream)
        check("cuMemcpyDtoDAsync", call)

    return "copy", (1, BEYOND_CACHES), 2 * BEYOND_CACHES, [launch]


def _cases(device: Device, kernels: Kernels, around_attention: AttentionKernels) -> Iterator[Case]:
    for dim, heads, ffn_dim in SHAPES:
        vector = device.from_host(np.linspace(0.5, 1.5, dim, dtype=np.float32))
        tables = [
            device.from_host(f(np.arange(TOKENS)[:, None] * np.ones(dim // heads // 2)).astype(np.float32))
            for f in (np.cos, np.sin)
        ]
        scales = device.empty((TOKENS,), DType.F32)
        bf16, fp8 = (partial(_arrays, device, columns=dim, dtype=dtype) for dtype in (DType.BF16, DType.F8_E4M3))
        norm = partial(kernels.norm, gain=vector, shift=vector, add_one=True, eps=EPS)
        residual_norm = partial(kernels.residual_norm, gate=vector, gain=vector, shift=vector, add_one=True, eps=EPS)
        rope = partial(kernels.qk_norm_rope, weight=vector, rope_cos=tables[0], rope_sin=tables[1], num_heads=heads, eps=EPS)
        columns = {"x": bf16(), "out": bf16()}
        yield _case("norm bf16", norm, columns)
        yield _case("norm fp8", partial(norm, out_scale=scales), {"x": bf16(), "out": fp8()})
        fused = {"residual": bf16(), "x": bf16(), "residual_out": bf16()}
        yield _case("residual_norm bf16", residual_norm, {**fused, "out": bf16()})
        yield _case("residual_norm fp8", partial(residual_norm, out_scale=scales), {**fused, "out": fp8()})
        yield _case(
            "gated_residual", partial(kernels.gated_residual, gate=vector), {"residual": bf16(), "x": bf16(), "out": bf16()}
        )
        yield _case("qk_norm_rope bf16", rope, columns, also=2 * tables[0].nbytes)
        yield _case("qk_norm_rope fp8", rope, {"x": bf16(), "out": fp8()}, also=2 * tables[0].nbytes)
        wide = {
            name: _arrays(device, columns=ffn_dim, dtype=dtype) for name, dtype in (("x", DType.BF16), ("out", DType.F8_E4M3))
        }
        yield _case("quantize_rows", partial(kernels.quantize_rows, out_scale=scales), {"x": bf16(), "out": fp8()})
        yield _case("quantize_rows", partial(kernels.quantize_rows, out_scale=scales), wide)
        qkv = [array.columns(2 * dim, 3 * dim) for array in _arrays(device, columns=3 * dim, dtype=DType.BF16)]
        centred = partial(around_attention.quantize_centred, scale=scales.rows(0, 1), offset=device.empty((dim,), DType.F32))
        yield _case("quantize_centred of v", centred, {"x": qkv, "out": fp8()}, also=qkv[0].nbytes)  # reads v twice
        spared = [array.sparing_rows(8) for array in bf16()]
        yield _case("fill_spare_rows", partial(around_attention.fill_spare_rows, count=8), {"x": spared})
        rows = {"num_clean": device.from_host(np.array([TOKENS // 31])), "gain": device.zeros((2, dim), DType.F32)}
        by_row = partial(kernels.norm, shift=rows["gain"], out_scale=scales, add_one=True, eps=EPS, **rows)
        yield _case("norm by row fp8", by_row, {"x": bf16(), "out": fp8()})
        for dtype in (DType.F32, DType.BF16):
            weights = _arrays(device, columns=dim, dtype=dtype, rows=6 * dim)
            small, out = device.zeros((1, dim), DType.F32), device.empty((1, 6 * dim), DType.F32)
            yield _case(f"gemv {dtype.lower()}", partial(kernels.gemv, small, out=out, silu_input=True), {"weight": weights})


def _arrays(device: Device, *, columns: int, dtype: DType, rows: int = TOKENS) -> list[DeviceArray]:
    """Enough arrays of zeros that a round over them finds nothing in the caches."""
    count = max(1, -(-BEYOND_CACHES // 4 // (rows * columns * dtype.itemsize)))
    return [device.zeros((rows, columns), dtype) for _ in range(count)]


def _case(name: str, kernel: Callable[..., object], arrays: dict[str, list[DeviceArray]], *, also: int = 0) -> Case:
    rounds = max(len(several) for several in arrays.values())
    launches: list[Launch] = [
        partial(kernel, **{argument: several[index % len(several)] for argument, several in arrays.items()})
        for index in range(rounds)
    ]
    first = next(iter(arrays.values()))[0]
    moved = also + sum(several[0].nbytes for several in arrays.values())
    return name, (first.shape[0], first.shape[1]), moved, launches


def main() -> None:
    from engines.targets.cuda.compile import compile_kernels

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    with Device() as device:
        cubin = compile_kernels(device.arch)
        rows = measure_all(device, Kernels(device, cubin), AttentionKernels(device, cubin))
        name = device.name
    print(f"{name}\n{'kernel':22} {'shape':>16} {'ms':>8} {'GB/s':>7} {'of copy':>8} {'host us':>8}")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        print(f"{row.name:22} {shape:>16} {row.ms:8.4f} {row.gb_per_s:7.0f} {row.share_of_copy:8.1%} {row.host_us:8.1f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": name, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
