"""Both VAEs' decoder stages and stream against diffusers' `AutoencoderKLWan`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from export.graphs import stage_graph
from export.layouts import vae_diffusers_names, vae_tensors
from runtime.component import Component
from runtime.specs import StageSpec
from runtime.stages.vae import COLOURS, DECODE_HIGH, DECODE_LOW, vae_stages
from runtime.vae import Rounding, decode_colours, decode_stream, decode_unnormalised, to_uint8, unnormalise
from runtime.variants import VAE_2_2, VaeArch
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import CONFIGS, EagerVae, diffusers_decoded, random_latents, toy_variant

TOLERANCE = TOLERANCES["stage, fp32"]
SIZES = {"landscape": (4, 6), "portrait": (6, 3), "odd": (5, 7), "one position": (1, 1)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["few levels", "few 2.2 levels"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VaeArch, Any, Component]]:
    config = CONFIGS[request.param]
    network = make_vae(config, seed=3)
    tensors = original_tensors(network, vae_diffusers_names(config.vae))
    with open_network(toy_variant(config.vae), "vae", tensors, tmp_path_factory.mktemp("engines")) as component:
        yield config.vae, network, component


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_chunk_of_the_modules_matches_diffusers(config: ToyConfig, size: tuple[int, int]) -> None:
    network = make_vae(config, seed=1)
    ours: Any = EagerVae(config.vae, vae_stages(config.vae), original_tensors(network, vae_diffusers_names(config.vae)))
    latents = random_latents(config.vae, 4, size)
    for frames, expected in zip(decode_unnormalised(ours, latents.numpy()), diffusers_decoded(network, latents), strict=True):
        assert relative_error(frames, expected) < TOLERANCE


@pytest.mark.parametrize(("num_frames", "size"), [(1, "landscape"), (2, "portrait"), (3, "one position"), (6, "odd")])
def test_every_chunk_of_the_engines_matches_diffusers(
    opened: tuple[VaeArch, Any, Component], num_frames: int, size: str
) -> None:
    arch, network, component = opened
    latents = random_latents(arch, num_frames, SIZES[size])
    chunks = list(decode_stream(component, latents.numpy(), arch))
    expected = diffusers_decoded(network, torch.from_numpy(unnormalise(latents.numpy(), arch)))
    assert len(chunks) == len(expected) == num_frames
    for ours, theirs in zip(chunks, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE


def test_first_latent_frame_decodes_to_one_video_frame(opened: tuple[VaeArch, Any, Component]) -> None:
    arch, _, component = opened
    shapes = [chunk.shape for chunk in decode_stream(component, random_latents(arch, 3, (2, 3)).numpy(), arch)]
    height, width = 2 * arch.spatial_stride, 3 * arch.spatial_stride
    step = (3, arch.temporal_stride, height, width)
    assert shapes == [(3, 1, height, width), step, step]


def test_frames_come_out_once_the_next_latent_frame_is_queued_and_before_the_one_after(
    opened: tuple[VaeArch, Any, Component], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, _, component = opened
    ran: list[str] = []
    run = component.run

    def note_and_run(stage: str, inputs: Any) -> Any:
        ran.append(stage)
        return run(stage, inputs)

    monkeypatch.setattr(component, "run", note_and_run)
    stream = decode_stream(component, random_latents(arch, 3, (1, 1)).numpy(), arch)
    assert ran == []
    next(stream)
    assert ran == [DECODE_LOW[0], DECODE_HIGH[0], DECODE_LOW[1], DECODE_HIGH[1]]
    next(stream)
    assert len(ran) == 6
    next(stream)
    assert len(ran) == 6


def test_first_frame_leaves_a_zero_frame_in_every_cache_and_two_where_time_doubles(
    opened: tuple[VaeArch, Any, Component],
) -> None:
    arch, _, component = opened
    low = component.run(DECODE_LOW[0], {"latents": random_latents(arch, 1, (2, 3)).numpy()})
    high = component.run(DECODE_HIGH[0], {name: low[name] for name in low if not name.startswith("next_cache")})
    caches = [outputs[name] for outputs in (low, high) for name in sorted(outputs) if name.startswith("next_cache")]
    assert not any(cache[:, 0].any() for cache in caches)
    assert sum(not cache[:, 1].any() for cache in caches) == sum(arch.temporal_downsample)


def stages_of(arch: VaeArch) -> dict[str, StageSpec]:
    return {stage.name: stage for stage in vae_stages(arch)}


def decoder_caches(arch: VaeArch) -> list[tuple[int | str, ...]]:
    """Shapes of the caches of both parts; a first pass gives those that the next takes, which gives the same again."""
    shapes = []
    for pair in (DECODE_LOW, DECODE_HIGH):
        first, step = (stages_of(arch)[name] for name in pair)
        own = [tensor.shape for tensor in step.inputs if tensor.name.startswith("cache_")]
        for stage in (first, step):
            assert [tensor.shape for tensor in stage.outputs if tensor.name.startswith("next_cache_")] == own
        shapes += own
    return shapes


def test_the_parts_meet_at_the_size_of_the_latents_before_the_first_upsampling() -> None:
    for arch, given in ((VaeArch(), ("hidden",)), (VAE_2_2, ("hidden", "level_input"))):
        low, high = (stages_of(arch)[pair[1]] for pair in (DECODE_LOW, DECODE_HIGH))
        assert low.outputs[: len(given)] == high.inputs[: len(given)]
        width = arch.decoder_dim * arch.dim_mult[-1]
        assert [(tensor.name, tensor.shape) for tensor in high.inputs[: len(given)]] == [
            (name, (width, 1, "height", "width")) for name in given
        ]


def test_wan21_decoder_has_32_caches_in_the_order_of_its_layers() -> None:
    shapes = decoder_caches(VaeArch())
    assert len(shapes) == 32
    assert shapes[0] == (16, 2, "height", "width")
    assert shapes[11] == (384, 2, "height", "width")  # the first doubling of time
    assert shapes[12] == (192, 2, "2*height", "2*width")
    assert shapes[18] == (384, 2, "2*height", "2*width")  # the second
    assert shapes[19] == (192, 2, "4*height", "4*width")
    assert shapes[31] == (96, 2, "8*height", "8*width")


def test_wan22_decoder_has_32_caches_and_gives_sixteen_pixels_a_position() -> None:
    shapes = decoder_caches(VAE_2_2)
    assert len(shapes) == 32
    assert shapes[0] == (48, 2, "height", "width")
    assert shapes[11] == (1024, 2, "height", "width")  # the first doubling of time
    assert shapes[18] == (1024, 2, "2*height", "2*width")  # the second
    assert shapes[25] == (512, 2, "8*height", "8*width")
    assert shapes[31] == (256, 2, "8*height", "8*width")
    assert stages_of(VAE_2_2)[DECODE_HIGH[1]].outputs[0].shape == (3, 4, "16*height", "16*width")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_stages_take_the_decoders_weights_as_the_checkpoint_has_them(config: ToyConfig) -> None:
    table = vae_tensors(config.vae)
    first, step = (
        {weight.name: weight.shape for pair in (DECODE_LOW, DECODE_HIGH) for weight in stages_of(config.vae)[pair[i]].weights}
        for i in range(2)
    )
    assert step == {name: tuple(shape) for name, shape in table.items() if name.startswith(("decoder.", "conv2."))}
    assert first == {name: shape for name, shape in step.items() if ".time_conv." not in name}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "index"), [(VaeArch(), 0), (VAE_2_2, 1)], ids=["2.1", "2.2"])
def test_graphs_at_true_dimensions_agree_with_their_specs(arch: VaeArch, index: int) -> None:
    attention = []
    for pair in (DECODE_LOW, DECODE_HIGH):
        graph = stage_graph(toy_variant(arch), stages_of(arch)[pair[index]])
        assert graph.ByteSize() < 1 << 20
        attention += [node for node in graph.graph.node if node.op_type == "Attention"]
    assert [node.domain for node in attention] == ["wanrt"]


@pytest.mark.parametrize("arch", [VaeArch(), VAE_2_2], ids=["2.1", "2.2"])
def test_unnormalising_is_bit_equal_to_both_peers(arch: VaeArch) -> None:
    latents = random_latents(arch, 2, (3, 5))
    mean = torch.tensor(arch.latents_mean).view(-1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(arch.latents_std).view(-1, 1, 1, 1)
    assert np.array_equal(unnormalise(latents.numpy(), arch), (latents / inverse_std + mean).numpy())


def test_uint8_frames_are_equal_to_those_diffusers_saves() -> None:
    values = torch.linspace(-1.3, 1.3, 3 * 2 * 50 * 70).view(3, 2, 50, 70)
    processor = VideoProcessor(vae_scale_factor=8)
    saved = (processor.postprocess_video(values[None], output_type="np")[0] * 255).astype(np.uint8)  # as export_to_video does
    assert np.array_equal(to_uint8(values.numpy()), saved)
    pictures = np.stack([np.asarray(picture) for picture in processor.postprocess_video(values[None], output_type="pil")[0]])
    assert np.array_equal(to_uint8(values.numpy(), rounding=Rounding.NEAREST), pictures)
    assert to_uint8(values.numpy()).flags["C_CONTIGUOUS"]


def test_colours_that_leave_the_decoder_are_those_the_host_makes_of_its_frames(opened: tuple[VaeArch, Any, Component]) -> None:
    arch, _, component = opened
    latents = 40 * random_latents(arch, 3, (2, 5)).numpy()  # so that some colours are clamped
    on_host = [to_uint8(chunk) for chunk in decode_stream(component, latents, arch)]
    assert {0, 255} <= set(np.unique(np.concatenate(on_host)))
    for ours, expected in zip(decode_colours(component, latents, arch), on_host, strict=True):
        assert ours.dtype == np.uint8 and ours.flags["C_CONTIGUOUS"]
        assert np.array_equal(ours, expected)


def test_every_level_of_colour_begins_where_the_hosts_does(opened: tuple[VaeArch, Any, Component]) -> None:
    _, _, component = opened
    edges = np.arange(257, dtype=np.float32) / np.float32(127.5) - 1
    values = np.sort(np.concatenate([edges, np.nextafter(edges, np.float32(-2)), np.nextafter(edges, np.float32(2))]))
    frames = np.stack([values, values[::-1], np.roll(values, 100)]).reshape(3, 1, 1, -1)
    colours = component.run(COLOURS, {"frames": np.ascontiguousarray(frames)})["colours"]
    assert np.array_equal(colours, to_uint8(frames))
