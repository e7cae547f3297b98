"""The text encoder on the GPU: each of its kernels against its formula in float64, and whole encoders against the fp32 modules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import text_encoder_tensors
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.text_kernels import TextKernels
from runtime.component import Component
from runtime.errors import EngineError
from runtime.specs import DType
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.text_encoder import encode_prompts, relative_position_buckets
from runtime.variants import VARIANTS, TextEncoderArch
from tests.gpu.bits import Array
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.networks import open_cuda
from tests.gpu.references import EPS, Bench, assert_rounded, bf16_noise, f32_noise
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

MARGINS = {"contiguous": (0, 0), "columns of a wider array": (16, 32), "unaligned": (3, 2)}
ROWS = [(1, 24), (5, 40), (3, 1536), (33, 4096), (2, 8192)]
ARCHS = {
    "toy": TextEncoderArch(dim=256, attention_dim=256, ffn_dim=640, num_heads=4, num_layers=3, vocab_size=300),
    "narrow heads, few buckets": TextEncoderArch(
        dim=64, attention_dim=120, ffn_dim=176, num_heads=5, num_layers=2, vocab_size=300, num_buckets=8
    ),
}
LENGTHS = (1, 3, 37, 512)  # tokens


@pytest.fixture(scope="module")
def kernels(device: Device) -> TextKernels:
    return TextKernels(device, kernels_for_this_gpu()[device.arch])


@pytest.fixture(params=list(MARGINS.values()), ids=list(MARGINS))
def bench(device: Device, request: pytest.FixtureRequest) -> Bench:
    return Bench(device, kernels=None, margins=request.param)  # type: ignore[arg-type]  # arrays only


@pytest.mark.parametrize(("rows", "columns"), ROWS)
def test_rms_norm_divides_by_the_root_mean_square(bench: Bench, kernels: TextKernels, rows: int, columns: int) -> None:
    x, weight = 30 * f32_noise(rows * columns, seed=0).reshape(rows, columns), f32_noise(columns, seed=1, offset=1.0)
    for dtype in (DType.BF16, DType.F32):
        out = bench.blank(rows, columns, dtype)
        kernels.rms_norm(bench.put(x, DType.F32), vector(bench, weight), out, eps=EPS)
        assert_rounded(bench.get(out), rms_norm(x, weight), dtype)


@pytest.mark.parametrize(("rows", "columns"), ROWS)
@pytest.mark.parametrize("in_place", [True, False])
def test_residual_rms_norm_writes_the_sum_and_its_norm(
    bench: Bench, kernels: TextKernels, rows: int, columns: int, in_place: bool
) -> None:
    residual, x = (f32_noise(rows * columns, seed=seed).reshape(rows, columns) for seed in (0, 1))
    weight = f32_noise(columns, seed=2, offset=1.0)
    stream = bench.put(residual, DType.F32)
    total = stream if in_place else bench.blank(rows, columns, DType.F32)
    out = bench.blank(rows, columns, DType.BF16)
    sent = bench.put(x, DType.F32), vector(bench, weight)
    kernels.residual_rms_norm(stream, *sent, residual_out=total, out=out, eps=EPS)
    np.testing.assert_array_equal(bench.get(total), (residual.astype(np.float32) + x.astype(np.float32)))
    assert_rounded(bench.get(out), rms_norm(residual + x, weight), DType.BF16)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 48), (3, 10240)])
def test_gated_gelu_multiplies_by_the_gelu_of_the_gate(bench: Bench, kernels: TextKernels, rows: int, columns: int) -> None:
    gate, x = bf16_noise((rows, columns), seed=0, spread=3.0), bf16_noise((rows, columns), seed=1)
    gate[0, :4] = 0.0, -1e30, 1e4, -20.0
    x[0, 2] = 1.0
    out = bench.blank(rows, columns, DType.BF16)
    kernels.gated_gelu(bench.put(gate, DType.BF16), bench.put(x, DType.BF16), out)
    with np.errstate(over="ignore"):
        expected = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * x
    given = bench.get(out)
    assert given[0, 0] == 0 and given[0, 1] == 0 and given[0, 2] == 9984  # 1e4 in bf16
    given[0, 2] = expected[0, 2] = 0  # its magnitude would hide errors of the others
    assert_rounded(given, expected, DType.BF16)


@pytest.mark.parametrize("num_tokens", [1, 3, 37, 64, 65, 200])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(2, 64), (3, 8), (1, 40)])
def test_biased_attention_adds_a_bias_by_position_and_does_not_scale(
    bench: Bench, kernels: TextKernels, num_tokens: int, num_heads: int, head_dim: int
) -> None:
    shape = num_tokens, num_heads * head_dim
    query, key, value = (
        bf16_noise(shape, seed=0, spread=2 * head_dim**-0.5),
        bf16_noise(shape, seed=1),
        bf16_noise(shape, seed=2),
    )
    table, buckets = f32_noise(32 * num_heads, seed=3).reshape(32, num_heads), position_buckets(num_tokens)
    out = bench.blank(num_tokens, num_heads * head_dim, DType.BF16)
    query_rows, key_rows, value_rows = (bench.put(array, DType.BF16) for array in (query, key, value))
    tables = bench.device.from_host(table.astype(np.float32)), bench.device.from_host(buckets)
    runs = []
    for _ in range(2):
        kernels.biased_attention(query_rows, key_rows, value_rows, *tables, out, num_heads=num_heads)
        runs.append(bench.get(out))
    np.testing.assert_array_equal(runs[0], runs[1])
    expected = attend(query, key, value, table[buckets], num_heads)
    assert relative_error(runs[0], expected) < TOLERANCES["biased attention, bf16"]
    np.testing.assert_allclose(runs[0], expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_scores_far_apart_neither_overflow_nor_leak(bench: Bench, kernels: TextKernels) -> None:
    """Query i is 64 times as near to key 69 - i as to any other: only that key's value comes out."""
    query = 64.0 * np.eye(70, 64, dtype=np.float64)
    key, value = np.eye(70, 64)[::-1], bf16_noise((70, 64), seed=0)
    out = bench.blank(70, 64, DType.BF16)
    tables = bench.device.zeros((32, 1), DType.F32), bench.device.from_host(position_buckets(70))
    query_rows, key_rows, value_rows = (bench.put(array, DType.BF16) for array in (query, key, value))
    kernels.biased_attention(query_rows, key_rows, value_rows, *tables, out, num_heads=1)
    np.testing.assert_array_equal(bench.get(out)[:64], value[::-1][:64])
    assert_rounded(bench.get(out)[64:], np.broadcast_to(value.mean(axis=0), (6, 64)), DType.BF16)


def test_heads_and_tables_too_large_are_refused(device: Device, kernels: TextKernels) -> None:
    x, buckets = device.zeros((2, 256), DType.BF16), device.zeros((2, 2), DType.I64)
    for num_heads, num_buckets in ((2, 32), (64, 32), (4, 136)):
        table = device.zeros((num_buckets, num_heads), DType.F32)
        with pytest.raises(EngineError, match="multiple of 8 columns up to 64, buckets are 128 at most"):
            kernels.biased_attention(x, x, x, table, buckets, x, num_heads=num_heads)


@pytest.fixture(scope="module", params=list(ARCHS))
def networks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TextEncoderArch, Array, Component, Component]]:
    arch = ARCHS[request.param]
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], text_encoder=arch)
    tensors = random_weights(arch, seed=3)
    folder = tmp_path_factory.mktemp("text_encoder")
    with (
        open_network(variant, "text_encoder", tensors, folder / "cpu") as cpu,
        open_cuda(variant, "text_encoder", tensors, folder) as gpu,
    ):
        yield arch, tensors[TOKEN_EMBEDDING].numpy(), cpu, gpu


def test_embeddings_match_the_fp32_modules(
    networks: tuple[TextEncoderArch, Array, Component, Component], record_property: Any
) -> None:
    arch, table, cpu, gpu = networks
    prompts = [np.random.default_rng(length).integers(0, arch.vocab_size, length) for length in LENGTHS]
    expected = encode_prompts(cpu, table, prompts, arch)
    given = encode_prompts(gpu, table, prompts, arch)
    for ids, ours, theirs in zip(prompts, given, expected, strict=True):
        assert ours.dtype == np.float32 and ours.shape == (len(ids), arch.dim)
        error = relative_error(ours, theirs)
        record_property(f"{len(ids)} tokens", error)
        assert error < TOLERANCES["text encoder, cuda bf16"], (len(ids), error)


def test_a_prompt_gives_the_same_bits_again_and_beside_others(
    networks: tuple[TextEncoderArch, Array, Component, Component],
) -> None:
    arch, table, _, gpu = networks
    prompts = [np.arange(length) % arch.vocab_size for length in (37, 130)]
    together, again = (encode_prompts(gpu, table, prompts, arch) for _ in range(2))
    alone = encode_prompts(gpu, table, prompts[:1], arch)
    np.testing.assert_array_equal(together[0], alone[0])
    for first, second in zip(together, again, strict=True):
        np.testing.assert_array_equal(first, second)


def random_weights(arch: TextEncoderArch, *, seed: int) -> dict[str, torch.Tensor]:
    """Numbers that bf16 holds, as a checkpoint's; queries small enough that unscaled attention does not harden."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in text_encoder_tensors(arch).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif name != TOKEN_EMBEDDING and "pos_embedding" not in name:
            noise *= shape[1] ** -0.5
        if name.endswith("attn.q.weight"):
            noise *= (arch.attention_dim // arch.num_heads) ** -0.5
        tensors[name] = noise.bfloat16().float()
    return tensors


def vector(bench: Bench, values: Array) -> Any:
    """An f32 vector, at an address that is aligned only where the layout is."""
    return bench.vector(values).rows(0, 1).reshape(len(values))


def position_buckets(num_tokens: int) -> Array:
    return relative_position_buckets(num_tokens, num_buckets=32, max_distance=128)


def rms_norm(x: Array, weight: Array) -> Array:
    normed: Array = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * weight
    return normed


def attend(query: Array, key: Array, value: Array, bias: Array, num_heads: int) -> Array:
    """`bias`: [S, S, heads]."""
    query, key, value = (x.reshape(len(x), num_heads, -1) for x in (query, key, value))
    scores = np.einsum("ihd,jhd->hij", query, key) + bias.transpose(2, 0, 1)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    out: Array = np.einsum("hij,jhd->ihd", weights, value).reshape(len(query), -1)
    return out
