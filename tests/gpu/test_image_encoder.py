"""The image encoder on the GPU: its norms against their formula in float64, stages and whole encoders against the fp32 modules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from export.layouts import image_encoder_tensors
from runtime.backends.cuda.clip_kernels import ClipKernels
from runtime.backends.cuda.device import Device
from runtime.component import Component
from runtime.errors import EngineError
from runtime.image_encoder import encode_images
from runtime.specs import DType
from runtime.variants import VARIANTS, ImageEncoderArch
from tests.gpu.bits import Array
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.networks import open_cuda
from tests.gpu.references import EPS, Bench, assert_rounded, f32_noise, layer_norm
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

MARGINS = {"contiguous": (0, 0), "columns of a wider array": (16, 32), "unaligned": (3, 2)}
ROWS = [(1, 24), (5, 40), (4, 1280), (33, 4096), (3, 8192)]
ARCHS = {
    "toy": ImageEncoderArch(dim=48, ffn_dim=104, num_heads=3, num_layers=4, image_size=20, patch_size=5),
    "heads of 80, cut edges": ImageEncoderArch(dim=240, ffn_dim=328, num_heads=3, num_layers=3, image_size=31, patch_size=14),
    "true width": ImageEncoderArch(num_layers=3),
}


class Networks(NamedTuple):
    arch: ImageEncoderArch
    cpu: Component
    gpu: Component


@pytest.fixture(scope="module")
def kernels(device: Device) -> ClipKernels:
    return ClipKernels(device, kernels_for_this_gpu()[device.arch])


@pytest.fixture(params=list(MARGINS.values()), ids=list(MARGINS))
def bench(device: Device, request: pytest.FixtureRequest) -> Bench:
    return Bench(device, kernels=None, margins=request.param)  # type: ignore[arg-type]  # arrays only


@pytest.mark.parametrize(("rows", "columns"), ROWS)
def test_layer_norm_centres_and_divides_by_the_deviation(bench: Bench, kernels: ClipKernels, rows: int, columns: int) -> None:
    x, weight, bias = noise(rows, columns, seed=0, offset=20.0), vector_noise(columns, seed=1), vector_noise(columns, seed=2)
    out = bench.blank(rows, columns, DType.BF16)
    kernels.layer_norm(bench.put(x, DType.F32), vector(bench, weight), vector(bench, bias), out, eps=EPS)
    assert_rounded(bench.get(out), layer_norm(x, weight, bias), DType.BF16)


@pytest.mark.parametrize(("rows", "columns"), ROWS)
@pytest.mark.parametrize("in_place", [True, False])
def test_residual_layer_norm_writes_the_sum_and_its_norm(
    bench: Bench, kernels: ClipKernels, rows: int, columns: int, in_place: bool
) -> None:
    residual, x = noise(rows, columns, seed=0), noise(rows, columns, seed=1)
    weight, bias = vector_noise(columns, seed=2), vector_noise(columns, seed=3)
    stream = bench.put(residual, DType.F32)
    total = stream if in_place else bench.blank(rows, columns, DType.F32)
    out = bench.blank(rows, columns, DType.BF16)
    sent = bench.put(x, DType.F32), vector(bench, weight), vector(bench, bias)
    kernels.residual_layer_norm(stream, *sent, residual_out=total, out=out, eps=EPS)
    np.testing.assert_array_equal(bench.get(total), residual.astype(np.float32) + x.astype(np.float32))
    assert_rounded(bench.get(out), layer_norm(residual + x, weight, bias), DType.BF16)


@pytest.mark.parametrize(("rows", "columns"), ROWS)
def test_tokens_are_the_class_and_the_patches_with_positions_added(
    bench: Bench, kernels: ClipKernels, rows: int, columns: int
) -> None:
    first, patches, positions = noise(1, columns, seed=0), noise(rows, columns, seed=1), noise(rows + 1, columns, seed=2)
    weight, bias = vector_noise(columns, seed=3), vector_noise(columns, seed=4)
    out = bench.blank(rows + 1, columns, DType.F32)
    given = bench.put(first, DType.F32), bench.put(patches, DType.F32), bench.put(positions, DType.F32)
    kernels.embed_tokens(*given, vector(bench, weight), vector(bench, bias), out, eps=EPS)
    assert_rounded(bench.get(out), layer_norm(np.concatenate((first, patches)) + positions, weight, bias), DType.F32)


def test_rows_that_no_kernel_takes_are_refused(device: Device, kernels: ClipKernels) -> None:
    for columns in (12, 8200):
        x, out, vector = (
            device.zeros((2, columns), DType.F32),
            device.zeros((2, columns), DType.BF16),
            device.zeros((columns,), DType.F32),
        )
        with pytest.raises(EngineError, match="a multiple of 8 columns, up to 8192"):
            kernels.layer_norm(x, vector, vector, out, eps=EPS)


@pytest.fixture(scope="module", params=list(ARCHS))
def networks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    arch = ARCHS[request.param]
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], image_encoder=arch)
    tensors = random_weights(arch, seed=3)
    folder = tmp_path_factory.mktemp("image_encoder")
    with (
        open_network(variant, "image_encoder", tensors, folder / "cpu") as cpu,
        open_cuda(variant, "image_encoder", tensors, folder) as gpu,
    ):
        yield Networks(arch, cpu, gpu)


def test_every_stage_matches_the_fp32_module(networks: Networks, record_property: Any) -> None:
    arch, cpu, gpu = networks
    patches = np.random.default_rng(1).standard_normal((arch.num_tokens - 1, 3 * arch.patch_size**2)).astype(np.float32)
    hidden = cpu.run("image_encoder.embed", {"patches": patches})["hidden_states"]
    given = gpu.run("image_encoder.embed", {"patches": gpu.backend.to_device(patches)})["hidden_states"]
    error = relative_error(gpu.backend.to_host(given), hidden)
    record_property("embed", error)
    assert error < TOLERANCES["stage, fp32"]
    for block in range(arch.num_blocks):
        sent = {"hidden_states": gpu.backend.to_device(hidden)}
        given = gpu.run("image_encoder.block", sent, block=block)["next_hidden_states"]
        hidden = cpu.run("image_encoder.block", {"hidden_states": hidden}, block=block)["next_hidden_states"]
        error = relative_error(gpu.backend.to_host(given), hidden)
        record_property(f"block {block}", error)
        assert error < TOLERANCES["stage, cuda bf16"], (block, error)


@pytest.mark.parametrize("num_images", [1, 2])
def test_features_match_the_fp32_modules(networks: Networks, num_images: int, record_property: Any) -> None:
    arch, cpu, gpu = networks
    pixels = random_pixels(arch, num_images)
    expected, given = (encode_images(component, pixels, arch) for component in (cpu, gpu))
    assert given.dtype == np.float32 and given.shape == (num_images * arch.num_tokens, arch.dim)
    error = relative_error(given, expected)
    record_property(f"{num_images} images", error)
    assert error < TOLERANCES["image encoder, cuda bf16"], error


def test_an_image_gives_the_same_bits_again_and_beside_another(networks: Networks) -> None:
    arch, _, gpu = networks
    pixels = random_pixels(arch, 2)
    together, again = (encode_images(gpu, pixels, arch) for _ in range(2))
    np.testing.assert_array_equal(together, again)
    np.testing.assert_array_equal(together[: arch.num_tokens], encode_images(gpu, pixels[:1], arch))


def random_weights(arch: ImageEncoderArch, *, seed: int) -> dict[str, torch.Tensor]:
    """Numbers that bf16 holds; products keep their operand's size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in image_encoder_tensors(arch, original=False).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            noise = 0.2 * noise + name.endswith("weight")
        elif name.endswith("bias"):
            noise *= 0.2
        elif name.endswith("weight"):
            noise *= noise[0].numel() ** -0.5
        tensors[name] = noise.bfloat16().float()
    return tensors


def random_pixels(arch: ImageEncoderArch, num_images: int) -> Array:
    shape = num_images, 3, arch.image_size, arch.image_size
    return np.random.default_rng(num_images).standard_normal(shape).astype(np.float32)


def noise(rows: int, columns: int, *, seed: int, offset: float = 0.0) -> Array:
    return f32_noise(rows * columns, seed=seed, offset=offset).reshape(rows, columns)


def vector_noise(columns: int, *, seed: int) -> Array:
    return f32_noise(columns, seed=seed, offset=1.0)


def vector(bench: Bench, values: Array) -> Any:
    """An f32 vector, at an address that is aligned only where the layout is."""
    return bench.vector(values).rows(0, 1).reshape(len(values))
