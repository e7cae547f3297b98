"""Tiled decoding against diffusers' `AutoencoderKLWan.tiled_decode`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import vae_diffusers_names
from runtime.component import Component
from runtime.errors import RequestError
from runtime.tiling import TileSpec, decode_tiled
from runtime.vae import decode_stream, unnormalise
from runtime.variants import VARIANTS, VaeArch
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors

TOLERANCE = TOLERANCES["stage, fp32"]
CONFIG = ToyConfig(
    vae_base_dim=6, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True)
)  # 4 pixels a position
CASES = {
    # tile height, tile width, stride height, stride width; latent frames, height, width
    "landscape": ((24, 24, 16, 16), (3, 9, 14)),
    "portrait": ((24, 16, 20, 12), (2, 15, 6)),
    "only columns are cut": ((64, 16, 48, 8), (2, 5, 11)),
    "only rows are cut": ((16, 64, 8, 48), (2, 11, 5)),
    "last tiles are slivers": ((24, 24, 16, 16), (2, 9, 9)),
    "overlap wider than the stride": ((32, 32, 8, 8), (2, 11, 13)),
    "no overlap": ((16, 16, 16, 16), (2, 6, 7)),
    "one video frame": ((24, 24, 16, 16), (1, 8, 10)),
    "the defaults": ((256, 256, 192, 192), (1, 70, 66)),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VaeArch, Any, Component]]:
    torch.set_num_threads(1)
    network = make_vae(CONFIG, seed=3)
    tensors = original_tensors(network, vae_diffusers_names(CONFIG.vae))
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], vae=CONFIG.vae)
    with open_network(variant, "vae", tensors, tmp_path_factory.mktemp("engines")) as component:
        yield CONFIG.vae, network, component


def random_latents(shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(sum(shape)).standard_normal((16, *shape), np.float32)


@pytest.mark.parametrize(("tile", "shape"), CASES.values(), ids=list(CASES))
def test_tiled_decode_matches_diffusers(
    opened: tuple[VaeArch, Any, Component], tile: tuple[int, int, int, int], shape: tuple[int, int, int]
) -> None:
    arch, network, component = opened
    latents = random_latents(shape)
    tiles = TileSpec(tile_height=tile[0], tile_width=tile[1], stride_height=tile[2], stride_width=tile[3])
    ours = np.concatenate(list(decode_tiled(component, latents, arch, tiles)), axis=1)
    network.enable_tiling(*tile)
    theirs = network.decode(torch.from_numpy(unnormalise(latents, arch))[None]).sample[0]
    assert relative_error(ours.clip(-1, 1), theirs) < TOLERANCE
    assert np.abs(ours.clip(-1, 1) - theirs.numpy()).max() < 1e-4  # no single pixel of a seam is off; measured 5e-6


def test_tiling_changes_a_frame_that_exceeds_the_tile_and_no_other(opened: tuple[VaeArch, Any, Component]) -> None:
    arch, _, component = opened
    latents = random_latents((2, 6, 7))  # 24 x 28 pixels
    whole = np.concatenate(list(decode_stream(component, latents, arch)), axis=1)
    fits = TileSpec(tile_height=24, tile_width=28, stride_height=16, stride_width=16)
    assert np.array_equal(np.concatenate(list(decode_tiled(component, latents, arch, fits)), axis=1), whole)
    cuts = replace(fits, tile_width=24)
    assert not np.array_equal(np.concatenate(list(decode_tiled(component, latents, arch, cuts)), axis=1), whole)


def test_tiled_frames_come_in_the_same_chunks_as_the_stream(opened: tuple[VaeArch, Any, Component]) -> None:
    arch, _, component = opened
    latents = random_latents((3, 9, 5))
    tiled = [chunk.shape for chunk in decode_tiled(component, latents, arch, TileSpec.square(16, 12))]
    assert tiled == [chunk.shape for chunk in decode_stream(component, latents, arch)]


@pytest.mark.parametrize(("tile", "stride"), [(256, 257), (256, 0), (0, 0), (-8, -8)])
def test_tiles_that_leave_gaps_are_refused(tile: int, stride: int) -> None:
    with pytest.raises(RequestError, match="distance must be between 1 and the tile's size"):
        TileSpec.square(tile, stride)


@pytest.mark.parametrize(("tile", "stride", "hint"), [(250, 192, "248 or 256"), (256, 100, "96 or 104"), (256, 3, "try 8")])
def test_tiles_between_latent_positions_are_refused_with_the_nearest(tile: int, stride: int, hint: str) -> None:
    with pytest.raises(RequestError, match="multiple of 8") as caught:
        TileSpec.square(tile, stride).check(VaeArch())
    assert hint in caught.value.hint
