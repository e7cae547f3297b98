"""How fast this GPU multiplies and attends at the transformer's own sizes, through `runtime.backends.cuda`, and how exactly.

    python -m benchmarks.cuda_libraries [--seconds 2] [--json FILE]

Each line runs for at least `--seconds`, because short bursts flatter a GPU whose clock falls under load. Errors are of a few rows
against float64 NumPy.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.linear import Linear
from runtime.specs import DType

TOKENS = 32_760  # 832x480, 81 frames
LINEARS = {  # name → features, outputs, GELU
    "14B qkv": (5120, 15360, False),
    "14B out": (5120, 5120, False),
    "14B ffn in": (5120, 13824, True),
    "14B ffn out": (13824, 5120, False),
    "1.3B qkv": (1536, 4608, False),
    "1.3B out": (1536, 1536, False),
    "1.3B ffn in": (1536, 8960, True),
    "1.3B ffn out": (8960, 1536, False),
}
HEADS = {"14B": 40, "1.3B": 12}
HEAD_DIM = 128
TEXT_TOKENS = 512
WHOLE_TILES = 32_768
PRECISIONS = (DType.BF16, DType.F8_E4M3)

FP8_SPREAD = 100.0  # of numbers scaled so that the greatest of a row is near 448

Array = np.ndarray[Any, Any]

_CODES = np.arange(127)
E4M3 = np.where(_CODES < 8, _CODES / 8 * 2.0**-6, (1 + (_CODES & 7) / 8) * 2.0 ** ((_CODES >> 3) - 7.0))
"""Value of each finite positive code."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with Device() as device:
        for line in chain(attention_lines(device, args.seconds), linear_lines(device, args.seconds)):
            lines.append(line)
            print(
                "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())
            )
        result = {"device": device.name, "arch": device.arch, "tokens": TOKENS, "lines": lines}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def linear_lines(device: Device, seconds: float) -> Iterator[dict[str, Any]]:
    """Every linear layer: the library's favourite kernel, then the best of its candidates."""
    with Linear(device) as linear:
        for fast in (False, True):
            for name, (features, outputs, gelu) in list(LINEARS.items())[: 4 if fast else None]:
                for dtype in PRECISIONS[int(fast) :]:
                    flags = {"gelu": gelu, "fast_accumulation": fast}
                    yield linear_line(device, linear, name, features, outputs, dtype, seconds, flags) | {"fast_sums": fast}


def linear_line(
    device: Device,
    linear: Linear,
    name: str,
    features: int,
    outputs: int,
    dtype: DType,
    seconds: float,
    flags: dict[str, bool],
) -> dict[str, Any]:
    spread = FP8_SPREAD if dtype is DType.F8_E4M3 else 1.0
    x = random_array(device, 0, dtype, TOKENS, features, spread=spread)
    weight = random_array(device, 1, dtype, outputs, features, spread=spread)
    bias, out = random_array(device, 2, DType.BF16, outputs), device.empty((TOKENS, outputs), DType.BF16)
    scales: dict[str, Any] = {}
    if dtype is DType.F8_E4M3:
        scales = {
            "x_scale": device.from_host(np.full(TOKENS, features**-0.5 / spread**2, np.float32)),
            "weight_scale": device.from_host(np.linspace(0.5, 1.5, outputs, dtype=np.float32)),
        }
    flops = 2.0 * TOKENS * features * outputs
    given: dict[str, Any] = {**scales, **flags}
    choices = linear.num_choices(x, weight, bias, out, **given)
    bursts = [
        sustained_ms(device, lambda choice=choice: linear.run(x, weight, bias, out, choice=choice, **given), 0.15)  # type: ignore[misc]
        for choice in range(choices)
    ]
    ms = sustained_ms(device, lambda: linear.run(x, weight, bias, out, **given), seconds)
    return {
        "linear": name,
        "dtype": str(dtype),
        "ms": ms,
        "tflops": flops / ms / 1e9,
        "favourite_burst": bursts[0],
        "best_burst": min(bursts),
        "best_choice": int(np.argmin(bursts)),
        "error": linear_error(device, x, weight, bias, out, flags["gelu"], scales),
    }


def attention_lines(device: Device, seconds: float) -> Iterator[dict[str, Any]]:
    """Self-attention over all tokens, and over as many as fill whole tiles; cross-attention to the text."""
    with Attention(device) as attention:
        for name, heads in HEADS.items():
            for keys in (TOKENS, WHOLE_TILES, TEXT_TOKENS):
                for dtype in PRECISIONS:
                    yield attention_line(device, attention, f"{name}, {keys} keys", heads, keys, dtype, seconds)


def attention_line(
    device: Device, attention: Attention, name: str, heads: int, keys: int, dtype: DType, seconds: float
) -> dict[str, Any]:
    width = heads * HEAD_DIM
    bits = (
        random_bits(0, dtype, WHOLE_TILES, 2 * width, spread=1.0),
        random_bits(1, dtype, WHOLE_TILES, width, spread=FP8_SPREAD),
    )
    fused = device.from_host(np.concatenate(bits, axis=1), dtype)
    query, key, value = (fused.columns(i * width, (i + 1) * width) for i in range(3))
    query, key, value = query.rows(0, TOKENS), key.rows(0, keys), value.rows(0, keys)
    out = device.empty((TOKENS, width), dtype)
    ms = sustained_ms(device, lambda: attention.run(query, key, value, out, num_heads=heads), seconds)
    return {
        "attention": name,
        "dtype": str(dtype),
        "ms": ms,
        "tflops": 4.0 * TOKENS * keys * width / ms / 1e9,
        "error": attention_error(device, query, key, value, out),
    }


def sustained_ms(device: Device, work: Callable[[], None], seconds: float) -> float:
    """Milliseconds of one call, over at least `seconds` of calls."""
    work()
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    repeats = max(2, round(seconds / max(time.perf_counter() - started, 1e-6)))

    def repeated() -> None:
        for _ in range(repeats):
            work()

    return device.elapsed_ms(repeated) / repeats


def random_array(device: Device, seed: int, dtype: DType, *shape: int, spread: float = 1.0) -> DeviceArray:
    """Normal numbers in the dtype; a block of a few million, repeated. Power, and with it speed, depends on the bits."""
    return device.from_host(random_bits(seed, dtype, *shape, spread=spread), dtype)


def random_bits(seed: int, dtype: DType, *shape: int, spread: float) -> Array:
    values = np.random.default_rng(seed).standard_normal(4_000_037, np.float32) * np.float32(spread)
    if dtype is DType.BF16:
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        codes = np.searchsorted((E4M3[:126] + E4M3[1:127]) / 2, np.abs(values)).astype(np.uint8)
        bits = np.where(values < 0, codes | 128, codes)
    return np.resize(bits, shape)


def decoded(device: Device, array: DeviceArray) -> Array:
    bits = device.to_host(array)
    if array.dtype is DType.BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if array.dtype is DType.F32:
        return bits.astype(np.float64)
    table: Array = np.concatenate([E4M3, [np.nan], -E4M3, [np.nan]])
    return table[bits]


def linear_error(
    device: Device,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray,
    out: DeviceArray,
    gelu: bool,
    scales: dict[str, DeviceArray],
) -> float:
    rows = slice(TOKENS - 8, TOKENS)
    expected = decoded(device, x.rows(rows.start, rows.stop)) @ decoded(device, weight).T
    if scales:
        expected *= decoded(device, scales["x_scale"])[rows, None] * decoded(device, scales["weight_scale"])
    expected += decoded(device, bias)
    if gelu:
        expected = 0.5 * expected * (1 + np.tanh(np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)))
    return relative(decoded(device, out.rows(rows.start, rows.stop)), expected)


def attention_error(device: Device, query: DeviceArray, key: DeviceArray, value: DeviceArray, out: DeviceArray) -> float:
    first = slice(TOKENS - 8, TOKENS)
    q, k, v, o = (
        decoded(device, array.columns(0, HEAD_DIM).rows(*rows))
        for array, rows in (
            (query, (first.start, first.stop)),
            (key, (0, key.shape[0])),
            (value, (0, key.shape[0])),
            (out, (first.start, first.stop)),
        )
    )
    scores = q @ k.T / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return relative(o, weights @ v / weights.sum(-1, keepdims=True))


def relative(given: Array, expected: Array) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
