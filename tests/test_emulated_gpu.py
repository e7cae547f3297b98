"""The `cuda` target's own code on the emulated GPU, with the smallest of networks; and what the emulator is there to notice.

All of `tests/gpu` on it: `make test-emulated`.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.layouts import vae_diffusers_names
from runtime.backends.cuda.array import Buffer, contiguous
from runtime.backends.cuda.convolution import Convolution
from runtime.backends.cuda.cudnn import GraphCall
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.launch import Clearing
from runtime.backends.cuda.linear import Linear
from runtime.backends.cuda.patch_kernels import PatchKernels
from runtime.errors import CudaError
from runtime.geometry import patchify, token_grid, unpatchify
from runtime.specs import DType, Precision
from runtime.stages.vae import vae_stages
from runtime.vae import decode_stream
from runtime.variants import TransformerArch
from tests.emulator import emulated_gpu, nvrtc
from tests.emulator.driver import Driver
from tests.emulator.memory import Memory
from tests.emulator.streams import Event, Streams
from tests.gpu.bits import from_bits, to_bits
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.networks import open_cuda
from tests.gpu.test_transformer import errors_around_fp8_attention
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import EagerVae, random_latents, toy_variant

ARCH = TransformerArch(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    if obstacle := nvrtc.obstacle():
        pytest.skip(obstacle)
    kernels_for_this_gpu.cache_clear()
    with emulated_gpu() as driver:
        yield driver
    kernels_for_this_gpu.cache_clear()


def test_stages_around_fp8_attention_match_their_fp32_modules(driver: Driver, tmp_path: Path) -> None:
    """A plan that gives memory away which a later step still reads shows here: the scale of an FP8 array became NaN."""
    for name, error in errors_around_fp8_attention(ARCH, tmp_path, Precision.FP8, tokens=13):
        assert error < TOLERANCES["stage, cuda fp8"], name


def test_a_decoded_frame_matches_the_fp32_modules(driver: Driver, tmp_path: Path) -> None:
    config = ToyConfig(vae_base_dim=16, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,))
    tensors = original_tensors(make_vae(config, seed=3), vae_diffusers_names(config.vae))
    latents = random_latents(config.vae, 1, (1, 3))
    reference: Any = EagerVae(config.vae, vae_stages(config.vae), tensors)
    only = ("vae.decode_low_first", "vae.decode_high_first")
    with open_cuda(toy_variant(config.vae), "vae", tensors, tmp_path, only=only) as gpu:
        (given,), (expected,) = (list(decode_stream(network, latents.numpy(), config.vae)) for network in (gpu, reference))
    assert relative_error(given, expected) < TOLERANCES["vae, cuda bf16"]


def test_a_convolution_that_reads_a_residual_stands_behind_a_fence(driver: Driver) -> None:
    """What the fence is for does not happen here: the emulated GPU ends each kernel before it begins the next of its stream."""
    with Device() as device, Convolution(device) as convolution:
        x, out = device.zeros((1, 4, 4, 8), DType.BF16), device.zeros((1, 4, 4, 8), DType.BF16)
        weight, bias = device.zeros((8, 1, 1, 8), DType.BF16), device.zeros((8,), DType.BF16)
        with device.calls.noting() as calls:
            convolution.run(x, weight, bias, out)
            convolution.run(x, weight, bias, out, residual=x)
        assert [type(call) for call in calls] == [GraphCall, Clearing, GraphCall]


def test_patches_are_those_of_the_host_and_back(driver: Driver) -> None:
    arch: Any = SimpleNamespace(patch_size=(2, 3, 1))
    latents = np.random.default_rng(0).standard_normal((8, 4, 6, 9), np.float32)
    expected = patchify(latents, arch)
    with Device() as device:
        kernels = PatchKernels(device, kernels_for_this_gpu()[device.arch])
        patches, joined = device.empty(expected.shape, DType.F32), device.empty(latents.shape, DType.F32)
        kernels.cut(device.from_host(latents), patches, arch.patch_size)
        kernels.join(patches, joined, arch.patch_size)
        assert (device.to_host(patches) == expected).all()
        assert (device.to_host(joined) == unpatchify(expected, token_grid(latents.shape, arch), arch)).all()


def test_a_scale_that_only_the_product_knows_of_lives_until_it_is_queued(driver: Driver) -> None:
    ones = to_bits(np.ones((16, 16)), DType.F8_E4M3)
    with Device() as device, Linear(device) as linear:
        x, out = device.from_host(ones), device.empty((16, 16), DType.BF16)
        scales = device.from_host(np.ones(16, np.float32))
        linear.run(x, x, None, out, x_scale=device.from_host(np.full(1, 0.25, np.float32)), weight_scale=scales)
        assert (from_bits(device.to_host(out), DType.BF16) == 4).all()


def test_there_is_one_device(driver: Driver) -> None:
    with pytest.raises(CudaError, match="cuDeviceGet failed with 101: CUDA_ERROR_INVALID_DEVICE"):
        Device(ordinal=1)


def test_memory_that_was_given_back_or_never_written_is_nan(driver: Driver) -> None:
    with Device() as device:
        array = device.from_host(np.ones(1000, np.float32))
        view = contiguous(array.pointer, array.shape, array.dtype, Buffer(array.pointer, lambda pointer: None))
        assert (device.to_host(view) == 1).all()
        array.free()
        assert np.isnan(device.to_host(view)).all()
        assert np.isnan(device.to_host(device.empty((1 << 20,), DType.F32))).all()


def test_what_is_written_beside_memory_is_noticed() -> None:
    memory = Memory(total_bytes=1 << 20)
    address = memory.allocate(1000)
    assert address is not None
    with pytest.raises(AssertionError, match="no device memory"):
        memory.check(address, 1001)
    ctypes.c_uint8.from_address(address + 1000).value = 0
    with pytest.raises(AssertionError, match="written beside 1000 bytes"):
        memory.free(address)


def test_streams_part_unless_an_event_holds_them_together() -> None:
    def order(seed: int, *, event: Event | None) -> str:
        streams, done = Streams(seed=seed), list[str]()
        first, second = streams.create(), streams.create()
        streams.put(first, lambda: done.append("a"))
        if event is not None:
            streams.record(event, first)
            streams.wait_for(event, second)
        streams.put(second, lambda: done.append("b"))
        streams.finish()
        return "".join(done)

    assert {order(seed, event=None) for seed in range(20)} == {"ab", "ba"}
    assert {order(seed, event=Event()) for seed in range(20)} == {"ab"}


def test_waiting_for_what_nothing_will_bring_is_an_error() -> None:
    streams, event = Streams(seed=0), Event(asked=1)
    stream = streams.create()
    streams.wait_for(event, stream)
    with pytest.raises(AssertionError, match="nothing queued will bring"):
        streams.finish(stream)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('asm("mul.wide.u32 %0, %1, %2;" : "=l"(a) : "r"(b), "r"(c));', "the instruction: .*mul.wide.u32"),
        ('extern "C" __global__ void lonely(int a) {}', "this kernel is declared: .*lonely"),
    ],
)
def test_what_the_emulator_does_not_know_is_refused(source: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        nvrtc.translate(source)


def test_an_instruction_becomes_a_call() -> None:
    source = 'u32 f(float* x) { u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x[g(1)]), "f"((x)[0])); return y; }'
    assert nvrtc.translate(source) == "u32 f(float* x) { u32 y; ptx_bf16_pair(y, x[g(1)], (x)[0]); return y; }"
