"""Both VAEs' encoder stages and stream against diffusers' `AutoencoderKLWan`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from export.graphs import stage_graph
from export.layouts import vae_diffusers_names, vae_tensors
from runtime.component import Component
from runtime.errors import EngineError
from runtime.specs import TensorSpec
from runtime.stages.vae import ENCODE_HIGH, ENCODE_LOW, vae_encoder_stages, vae_stages
from runtime.stages.vae_layers import check_levels
from runtime.vae import encode_chunks, encode_stream, frame_chunks, normalise
from runtime.variants import VAE_2_2, VaeArch
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import CONFIGS, EagerVae, diffusers_encoded, frame_groups, random_frames, random_latents, toy_variant

TOLERANCE = TOLERANCES["stage, fp32"]
SIZES = {"landscape": (2, 4), "portrait": (4, 1), "odd": (3, 5), "one position": (1, 1)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["few levels", "few 2.2 levels"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VaeArch, Any, Component]]:
    config = CONFIGS[request.param]
    network = make_vae(config, seed=5)
    tensors = original_tensors(network, vae_diffusers_names(config.vae))
    with open_network(toy_variant(config.vae), "vae_encoder", tensors, tmp_path_factory.mktemp("engines")) as component:
        yield config.vae, network, component


@pytest.mark.parametrize("size", ["landscape", "odd"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_every_chunk_of_the_modules_matches_diffusers(config: ToyConfig, size: str) -> None:
    network = make_vae(config, seed=2)
    tensors = original_tensors(network, vae_diffusers_names(config.vae))
    ours: Any = EagerVae(config.vae, vae_encoder_stages(config.vae), tensors)
    groups = frame_groups(random_frames(config.vae, 4, SIZES[size]), config.vae)
    given = (group.numpy() for group in groups)
    for latents, expected in zip(encode_chunks(ours, given), diffusers_encoded(network, groups), strict=True):
        assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize(("num_frames", "size"), [(1, "landscape"), (5, "portrait"), (9, "one position"), (13, "odd")])
def test_whole_encodings_match_diffusers(opened: tuple[VaeArch, Any, Component], num_frames: int, size: str) -> None:
    arch, network, component = opened
    frames = random_frames(arch, (num_frames - 1) // arch.temporal_stride + 1, SIZES[size])
    assert frames.shape[1] == num_frames
    ours = encode_stream(component, frames.numpy(), arch)
    theirs = network.encode(frames[None]).latent_dist.mode()[0]
    assert relative_error(ours, normalise(theirs.numpy(), arch)) < TOLERANCE


def test_latents_come_out_once_the_next_frames_are_queued_and_before_those_after_are_asked_for(
    opened: tuple[VaeArch, Any, Component],
) -> None:
    arch, _, component = opened
    asked: list[int] = []

    def note(chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            asked.append(chunk.shape[1])
            yield chunk

    stream = encode_chunks(component, note(frame_chunks(random_frames(arch, 3, (1, 2)).numpy(), arch)))
    assert asked == []
    assert next(stream).shape == (arch.z_dim, 1, 1, 2)
    assert asked == [1, arch.temporal_stride]
    next(stream)
    assert asked == [1, arch.temporal_stride, arch.temporal_stride]


def test_first_frame_leaves_itself_where_time_halves_and_a_zero_frame_before_it_elsewhere(
    opened: tuple[VaeArch, Any, Component],
) -> None:
    arch, _, component = opened
    high = component.run(ENCODE_HIGH[0], {"frames": random_frames(arch, 1, (2, 3)).numpy()})
    low = component.run(ENCODE_LOW[0], {"hidden": high["hidden"]})
    caches = [np.asarray(part[name]) for part in (high, low) for name in sorted(part) if name.startswith("next_cache")]
    single = [cache for cache in caches if cache.shape[1] == 1]
    assert len(single) == sum(arch.temporal_downsample)
    assert all(cache.any() for cache in single)
    assert all(not cache[:, 0].any() and cache[:, 1].any() for cache in caches if cache.shape[1] == 2)


@pytest.mark.parametrize("num_frames", [0, 2, 4, 6])
def test_frames_that_do_not_fill_a_group_are_refused(num_frames: int) -> None:
    with pytest.raises(ValueError, match=f"{num_frames} frames: the VAE encodes 4n\\+1"):
        list(frame_chunks(np.zeros((3, num_frames, 8, 8), np.float32), VaeArch()))


def test_frames_between_latent_positions_are_refused(opened: tuple[VaeArch, Any, Component]) -> None:
    arch, _, component = opened
    with pytest.raises(EngineError, match="frames has shape"):
        encode_stream(component, np.zeros((3, 1, arch.spatial_stride + 1, arch.spatial_stride), np.float32), arch)


@pytest.mark.parametrize("arch", [VaeArch(), VAE_2_2], ids=["2.1", "2.2"])
def test_encoders_have_24_caches_of_which_those_that_halve_time_keep_one_frame(arch: VaeArch) -> None:
    high_first, high_step, low_first, low_step = vae_encoder_stages(arch)
    shapes = [cache.shape for step in (high_step, low_step) for cache in step.inputs[1:]]
    assert len(shapes) == 24
    assert shapes[0] == (3 * arch.patch_size**2, 2, "8*height", "8*width")
    assert [index for index, shape in enumerate(shapes) if shape[1] == 1] == [9, 14]
    assert shapes[23] == (4 * arch.base_dim, 2, "height", "width")
    assert high_step.inputs[0].shape == (3, 4, f"{arch.spatial_stride}*height", f"{arch.spatial_stride}*width")
    assert high_step.outputs[0] == low_step.inputs[0] == TensorSpec("hidden", (4 * arch.base_dim, 1, "height", "width"))
    for high, low in ((high_first, low_first), (high_step, low_step)):
        assert [cache.shape for stage in (high, low) for cache in stage.outputs[1:]] == shapes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_encoder_and_decoder_take_all_of_the_checkpoints_weights_and_share_none(config: ToyConfig) -> None:
    taken = [
        {weight.name for stage in stages(config.vae) for weight in stage.weights} for stages in (vae_encoder_stages, vae_stages)
    ]
    assert taken[0] | taken[1] == vae_tensors(config.vae).keys()
    assert not taken[0] & taken[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "index"), [(VaeArch(), 1), (VAE_2_2, 0), (VAE_2_2, 1)], ids=["2.1, step", "2.2, first", "2.2, step"]
)
def test_graphs_at_true_dimensions_agree_with_their_specs(arch: VaeArch, index: int) -> None:
    shortcuts = []
    for stage in vae_encoder_stages(arch)[index::2]:
        graph = stage_graph(toy_variant(arch), stage)
        assert graph.ByteSize() < 1 << 20
        shortcuts += [node for node in graph.graph.node if node.op_type == "AddAverageDown"]
    assert len(shortcuts) == 4 * arch.residual_levels


@pytest.mark.parametrize("arch", [VaeArch(), VAE_2_2], ids=["2.1", "2.2"])
def test_normalising_is_bit_equal_to_both_peers(arch: VaeArch) -> None:
    latents = random_latents(arch, 2, (3, 5))
    mean = torch.tensor(arch.latents_mean).view(-1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(arch.latents_std).view(-1, 1, 1, 1)
    assert np.array_equal(normalise(latents.numpy(), arch), ((latents - mean) * inverse_std).numpy())


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (VaeArch(temporal_downsample=(True,)), "4 levels with 1 flags"),
        (VaeArch(residual_levels=True, dim_mult=(1, 2), temporal_downsample=(True,)), "no average over 1 places leads from 96 to 192"),
        (VaeArch(residual_levels=True, dim_mult=(1, 1, 3), temporal_downsample=(True, True)), "from 96 to 288"),
        (VaeArch(residual_levels=True, dim_mult=(1, 1, 8, 8), temporal_downsample=(False, False, True)), "no repetition over 4 places"),
    ],
)  # fmt: skip
def test_levels_that_do_not_fit_together_are_refused(arch: VaeArch, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_levels(arch)
