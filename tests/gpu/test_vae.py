"""The VAE on the GPU: its kernels against their formulas in float64, and whole streams against the fp32 engines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import vae_diffusers_names
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.linear import Linear
from runtime.backends.cuda.vae_kernels import VaeKernels
from runtime.component import Component
from runtime.specs import DType
from runtime.stages.vae import vae_encoder_stages, vae_stages
from runtime.vae import decode_colours, decode_stream, decoder_margin, encode_stream, encoder_margin, to_uint8
from runtime.variants import VaeArch
from tests.gpu.bits import Array
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.networks import open_cuda
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import EagerVae, random_frames, random_latents, toy_variant

pytestmark = pytest.mark.gpu

CONFIGS = {
    "wan 2.1's levels": ToyConfig(num_res_blocks=1),
    "wan 2.2's levels": ToyConfig(vae_2_2=True, vae_base_dim=16, num_res_blocks=1),
}
SIZES = {"landscape": (4, 6), "odd": (5, 7), "one position": (1, 1)}
SLACK = 4e-6  # fp32 arithmetic, of the output's greatest magnitude


@pytest.fixture(scope="module")
def kernels(device: Device) -> Iterator[VaeKernels]:
    with Linear(device) as linear:
        yield VaeKernels(device, kernels_for_this_gpu()[device.arch], linear)


@dataclass(frozen=True)
class Opened:
    """A toy VAE: its weights, and both its networks on the GPU."""

    arch: VaeArch
    tensors: dict[str, torch.Tensor]
    decoder: Component
    encoder: Component


@pytest.fixture(scope="module", params=list(CONFIGS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    config = CONFIGS[request.param]
    tensors = original_tensors(make_vae(config, seed=3), vae_diffusers_names(config.vae))
    variant, folder = toy_variant(config.vae), tmp_path_factory.mktemp("vae")
    with (
        open_cuda(variant, "vae", tensors, folder) as decoder,
        open_cuda(variant, "vae_encoder", tensors, folder) as encoder,
    ):
        yield Opened(config.vae, tensors, decoder, encoder)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_every_decoded_chunk_matches_the_fp32_modules(opened: Opened, size: tuple[int, int], record_property: Any) -> None:
    latents = random_latents(opened.arch, 4, size)
    reference: Any = EagerVae(opened.arch, vae_stages(opened.arch), opened.tensors)
    expected = decode_stream(reference, latents.numpy(), opened.arch)
    for index, (ours, theirs) in enumerate(
        zip(decode_stream(opened.decoder, latents.numpy(), opened.arch), expected, strict=True)
    ):
        error = relative_error(ours, theirs)
        record_property(f"decoded chunk {index}", error)
        assert error < TOLERANCES["vae, cuda bf16"]


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_encoded_latents_match_the_fp32_modules(opened: Opened, size: tuple[int, int], record_property: Any) -> None:
    frames = random_frames(opened.arch, 3, size)
    reference: Any = EagerVae(opened.arch, vae_encoder_stages(opened.arch), opened.tensors)
    expected = encode_stream(reference, frames.numpy(), opened.arch)
    error = relative_error(encode_stream(opened.encoder, frames.numpy(), opened.arch), expected)
    record_property("encoded", error)
    assert error < TOLERANCES["vae, cuda bf16"]


def test_decoding_twice_gives_the_same_bits(opened: Opened) -> None:
    latents = random_latents(opened.arch, 3, (3, 5)).numpy()
    once, twice = (np.concatenate(list(decode_stream(opened.decoder, latents, opened.arch)), axis=1) for _ in range(2))
    np.testing.assert_array_equal(once, twice)


def test_colours_are_those_the_host_makes_of_the_frames(opened: Opened) -> None:
    latents = 40 * random_latents(opened.arch, 4, (3, 5)).numpy()  # so that some colours are clamped
    expected = [to_uint8(chunk) for chunk in decode_stream(opened.decoder, latents, opened.arch)]
    assert {0, 255} <= set(np.unique(np.concatenate(expected)))
    for ours, theirs in zip(decode_colours(opened.decoder, latents, opened.arch), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("upright", [False, True], ids=["columns", "rows"])
def test_strips_give_the_whole_frames_and_latents(opened: Opened, upright: bool, record_property: Any) -> None:
    """As near as a convolution's other tiles of other shapes: they may sum in another order, and bf16 rounds what they sum."""
    arch, short = opened.arch, 2

    def size(margin: int) -> tuple[int, int]:
        return (2 * margin + 5, short) if upright else (short, 2 * margin + 5)

    latents = random_latents(arch, 3, size(decoder_margin(arch))).numpy()
    frames = random_frames(arch, 3, size(encoder_margin(arch))).numpy()
    whole = np.concatenate(list(decode_stream(opened.decoder, latents, arch)), axis=1)
    encoded = encode_stream(opened.encoder, frames, arch)
    for num_strips in (2, 3):
        chunks = list(decode_stream(opened.decoder, latents, arch, num_strips=num_strips))
        errors = {
            "decoded": relative_error(np.concatenate(chunks, axis=1), whole),
            "encoded": relative_error(encode_stream(opened.encoder, frames, arch, num_strips=num_strips), encoded),
        }
        for name, error in errors.items():
            record_property(f"{name} in {num_strips} strips", error)
            assert error < TOLERANCES["vae, cuda bf16"]


def test_a_decoding_that_was_given_up_leaves_its_memory_to_the_next(opened: Opened) -> None:
    latents = random_latents(opened.arch, 4, (3, 5)).numpy()
    expected = np.concatenate(list(decode_colours(opened.decoder, latents, opened.arch)))
    for _ in range(5):
        stream = decode_colours(opened.decoder, latents, opened.arch)
        next(stream)
        del stream
    np.testing.assert_array_equal(np.concatenate(list(decode_colours(opened.decoder, latents, opened.arch))), expected)


def noise(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Array:
    values = torch.from_numpy(spread * np.random.default_rng(seed).standard_normal(shape)).bfloat16()
    return values.double().numpy()


def put(device: Device, values: Array) -> DeviceArray:
    return device.from_host(torch.from_numpy(values).bfloat16().view(torch.uint16).numpy(), DType.BF16)


def get(device: Device, array: DeviceArray) -> Array:
    return torch.from_numpy(device.to_host(array)).view(torch.bfloat16).double().numpy()


def assert_rounded(values: Array, expected: Array) -> None:
    """Each value is `expected` rounded once to bf16, but for fp32 arithmetic before it."""
    assert (np.abs(values - expected) <= 2.0**-8 * np.abs(expected) + SLACK * np.abs(expected).max()).all()


def channel_norm(x: Array, gamma: Array, *, silu: bool) -> Array:
    normed: Array = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) * np.sqrt(x.shape[-1]) * gamma
    return normed / (1 + np.exp(-normed)) if silu else normed


@pytest.mark.parametrize("channels", [8, 24, 96, 384, 1024])
@pytest.mark.parametrize(("num_frames", "past_frames"), [(1, 2), (4, 2), (4, 1), (1, 1)])
def test_norm_writes_the_window_and_leaves_its_end_as_the_past(
    device: Device, kernels: VaeKernels, channels: int, num_frames: int, past_frames: int
) -> None:
    shape = (3, 5, channels)
    x, past = noise((num_frames, *shape), 0, spread=5.0), noise((past_frames, *shape), 1)
    x[0, 1, 2] = 0  # a position without length
    gamma = np.random.default_rng(2).uniform(0.5, 1.5, channels).astype(np.float32)
    out, kept = device.empty((past_frames + num_frames, *shape), DType.BF16), put(device, past)
    kernels.channel_norm(put(device, x), out, gamma=device.from_host(gamma), past=kept, silu=True)
    window = get(device, out)
    np.testing.assert_array_equal(window[:past_frames], past)
    assert_rounded(window[past_frames:], channel_norm(x, gamma, silu=True))
    np.testing.assert_array_equal(get(device, kept), window[-past_frames:])


def test_first_window_begins_with_zeros(device: Device, kernels: VaeKernels) -> None:
    x = noise((1, 2, 3, 16), 0)
    out, kept = device.empty((3, 2, 3, 16), DType.BF16), device.empty((2, 2, 3, 16), DType.BF16)
    kernels.channel_norm(put(device, x), out, next_past=kept)
    np.testing.assert_array_equal(get(device, out), np.concatenate([np.zeros((2, 2, 3, 16)), x]))
    np.testing.assert_array_equal(get(device, kept), np.concatenate([np.zeros((1, 2, 3, 16)), x]))


def test_norm_without_past_or_silu_keeps_its_frames(device: Device, kernels: VaeKernels) -> None:
    x, gamma = noise((2, 3, 3, 40), 0), np.full(40, 1.5, np.float32)
    out = device.empty(x.shape, DType.BF16)
    kernels.channel_norm(put(device, x), out, gamma=device.from_host(gamma))
    assert_rounded(get(device, out), channel_norm(x, gamma, silu=False))


def test_upsampling_repeats_positions_and_interleaves_halves_of_the_channels(device: Device, kernels: VaeKernels) -> None:
    x = noise((3, 2, 5, 48), 0)
    halves = np.stack((x[..., :24], x[..., 24:]), axis=1).reshape(6, 2, 5, 24)
    for expected, interleave in (
        (x.repeat(2, axis=1).repeat(2, axis=2), False),
        (halves, True),
        (halves.repeat(2, axis=1).repeat(2, axis=2), True),
    ):
        out = device.empty(expected.shape, DType.BF16)
        kernels.upsample(put(device, x), out, interleave=interleave)
        np.testing.assert_array_equal(get(device, out), expected)


def test_layouts_turn_and_pad_channels_with_zeros(device: Device, kernels: VaeKernels) -> None:
    planes = noise((3, 2, 4, 5), 0)
    rows = device.empty((2, 4, 5, 8), DType.BF16)
    kernels.channels_last(device.from_host(planes.astype(np.float32)), rows)
    expected = np.concatenate([planes.transpose(1, 2, 3, 0), np.zeros((2, 4, 5, 5))], axis=-1)
    np.testing.assert_array_equal(get(device, rows), expected)
    back = device.empty(planes.shape, DType.F32)
    kernels.planes(rows, back)
    np.testing.assert_array_equal(device.to_host(back), planes)
    kernels.zeros(rows)
    assert not get(device, rows).any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 16, 24), (3, 40, 72)])
def test_colours_are_truncated_as_the_host_truncates_them(
    device: Device, kernels: VaeKernels, shape: tuple[int, int, int]
) -> None:
    edges = np.arange(257, dtype=np.float32) / np.float32(127.5) - 1
    values = np.concatenate([edges, np.nextafter(edges, np.float32(-2)), np.nextafter(edges, np.float32(2)), [-3, 3]])
    frames = np.random.default_rng(0).choice(values.astype(np.float32), (3, *shape))
    out = device.empty((*shape, 3), DType.U8)
    kernels.colours(device.from_host(frames), out)
    np.testing.assert_array_equal(device.to_host(out), to_uint8(frames))


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 8), (5, 7, 32), (33, 35, 384)])
def test_frame_attention_is_softmax_over_all_positions(
    device: Device, kernels: VaeKernels, height: int, width: int, channels: int
) -> None:
    qkv = noise((1, height, width, 3 * channels), 0, spread=1.5)
    query, key, value = np.split(qkv.reshape(-1, 3 * channels), 3, axis=1)
    scores = query @ key.T / np.sqrt(channels)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = (weights / weights.sum(axis=1, keepdims=True)) @ value
    out = device.empty((1, height, width, channels), DType.BF16)
    kernels.frame_attention(put(device, qkv), out)
    assert relative_error(get(device, out).reshape(-1, channels), expected) < TOLERANCES["frame attention, bf16"]
