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
from runtime.stages.vae import DECODE_FIRST, DECODE_STEP, vae_stages
from runtime.vae import Rounding, decode_stream, to_uint8, unnormalise
from runtime.variants import VAE_2_2, VaeArch
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import CONFIGS, diffusers_decoded, eager_stages, random_latents, toy_variant

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
    first, step = eager_stages(config.vae, vae_stages(config.vae), original_tensors(network, vae_diffusers_names(config.vae)))
    latents = random_latents(config.vae, 4, size)
    caches: list[torch.Tensor] = []
    for index, expected in enumerate(diffusers_decoded(network, latents)):
        frames, *caches = (step if index else first)(latents[:, index : index + 1], *caches)
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


def test_frames_come_out_before_the_next_latent_frame_is_decoded(
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
    assert ran == [DECODE_FIRST]
    next(stream)
    assert ran == [DECODE_FIRST, DECODE_STEP]


def test_first_frame_leaves_a_zero_frame_in_every_cache_and_two_where_time_doubles(
    opened: tuple[VaeArch, Any, Component],
) -> None:
    arch, _, component = opened
    outputs = component.run(DECODE_FIRST, {"latents": random_latents(arch, 1, (2, 3)).numpy()})
    caches = [outputs[name] for name in sorted(outputs) if name.startswith("next_cache")]
    assert not any(cache[:, 0].any() for cache in caches)
    assert sum(not cache[:, 1].any() for cache in caches) == sum(arch.temporal_downsample)


def test_wan21_decoder_has_32_caches_in_the_order_of_its_layers() -> None:
    first, step = vae_stages(VaeArch())
    shapes = [cache.shape for cache in step.inputs[1:]]
    assert len(shapes) == 32
    assert shapes[0] == (16, 2, "height", "width")
    assert shapes[11] == (384, 2, "height", "width")  # the first doubling of time
    assert shapes[12] == (192, 2, "2*height", "2*width")
    assert shapes[18] == (384, 2, "2*height", "2*width")  # the second
    assert shapes[19] == (192, 2, "4*height", "4*width")
    assert shapes[31] == (96, 2, "8*height", "8*width")
    assert step.outputs[0].shape == (3, 4, "8*height", "8*width")
    for stage in (first, step):
        assert [cache.shape for cache in stage.outputs[1:]] == shapes


def test_wan22_decoder_has_32_caches_and_gives_sixteen_pixels_a_position() -> None:
    step = vae_stages(VAE_2_2)[1]
    shapes = [cache.shape for cache in step.inputs[1:]]
    assert len(shapes) == 32
    assert shapes[0] == (48, 2, "height", "width")
    assert shapes[11] == (1024, 2, "height", "width")  # the first doubling of time
    assert shapes[18] == (1024, 2, "2*height", "2*width")  # the second
    assert shapes[25] == (512, 2, "8*height", "8*width")
    assert shapes[31] == (256, 2, "8*height", "8*width")
    assert step.outputs[0].shape == (3, 4, "16*height", "16*width")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_stages_take_the_decoders_weights_as_the_checkpoint_has_them(config: ToyConfig) -> None:
    table = vae_tensors(config.vae)
    first, step = ({weight.name: weight.shape for weight in stage.weights} for stage in vae_stages(config.vae))
    assert step == {name: tuple(shape) for name, shape in table.items() if name.startswith(("decoder.", "conv2."))}
    assert first == {name: shape for name, shape in step.items() if ".time_conv." not in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "stage"), [(VaeArch(), vae_stages(VaeArch())[0]), (VAE_2_2, vae_stages(VAE_2_2)[1])], ids=["2.1", "2.2"]
)
def test_graphs_at_true_dimensions_agree_with_their_specs(arch: VaeArch, stage: StageSpec) -> None:
    graph = stage_graph(toy_variant(arch), stage)
    assert graph.ByteSize() < 1 << 20
    attention = [node for node in graph.graph.node if node.op_type == "Attention"]
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
