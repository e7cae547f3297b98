"""Tiled encoding and decoding against diffusers' `AutoencoderKLWan.tiled_encode` and `tiled_decode`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from export.layouts import vae_diffusers_names
from runtime.component import Component
from runtime.errors import RequestError
from runtime.stages.vae import vae_encoder_stages, vae_stages
from runtime.tiling import TileSpec, decode_tiled, encode_tiled
from runtime.vae import decode_stream, encode_stream, normalise, unnormalise
from runtime.variants import VAE_2_2, VaeArch
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import ToyConfig, make_vae, original_tensors
from tests.vaes import EagerVae, random_frames, random_latents

TOLERANCE = TOLERANCES["stage, fp32"]
FEW_LEVELS = ToyConfig(vae_base_dim=6, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True))
CONFIGS = {"2.1": FEW_LEVELS, "2.2": replace(FEW_LEVELS, vae_2_2=True)}  # 4 and 8 pixels a position
CASES = {
    # in latent positions: tile height, tile width, stride height, stride width; frames, height, width
    "landscape": ((6, 6, 4, 4), (3, 9, 14)),
    "portrait": ((6, 4, 5, 3), (2, 15, 6)),
    "only columns are cut": ((16, 4, 12, 2), (2, 5, 11)),
    "only rows are cut": ((4, 16, 2, 12), (2, 11, 5)),
    "last tiles are slivers": ((6, 6, 4, 4), (2, 9, 9)),
    "overlap wider than the stride": ((8, 8, 2, 2), (2, 11, 13)),
    "no overlap": ((4, 4, 4, 4), (2, 6, 7)),
    "one video frame": ((6, 6, 4, 4), (1, 8, 10)),
}
SOME_CASES = ("landscape", "last tiles are slivers", "overlap wider than the stride", "one video frame")

Opened = tuple[VaeArch, Any, Component, Component]
"""Numbers, the oracle, encoder, decoder."""


def cases(*kinds: tuple[str, Iterable[str]]) -> pytest.MarkDecorator:
    """Parametrises over a VAE and the cases named for it."""
    rows = [pytest.param(kind, *CASES[case], id=f"{kind} {case}") for kind, names in kinds for case in names]
    return pytest.mark.parametrize(("kind", "tile", "shape"), rows)


@pytest.fixture(scope="module")
def opened() -> dict[str, Opened]:
    torch.set_num_threads(1)
    networks = {}
    for kind, config in CONFIGS.items():
        arch, oracle = config.vae, make_vae(config, seed=3)
        tensors = original_tensors(oracle, vae_diffusers_names(arch))
        networks[kind] = (
            arch,
            oracle,
            cast(Component, EagerVae(arch, vae_encoder_stages(arch), tensors)),
            cast(Component, EagerVae(arch, vae_stages(arch), tensors)),
        )
    return networks


def pixels(arch: VaeArch, tile: tuple[int, ...]) -> TileSpec:
    tile_height, tile_width, stride_height, stride_width = (extent * arch.spatial_stride for extent in tile)
    return TileSpec(tile_height=tile_height, tile_width=tile_width, stride_height=stride_height, stride_width=stride_width)


def set_up_oracle(network: Any, tiles: TileSpec, *, side: int = 1) -> None:
    """Tiles as diffusers takes them, in squares of `side` pixels."""
    extents = (tiles.tile_height, tiles.tile_width, tiles.stride_height, tiles.stride_width)
    network.enable_tiling(*(extent // side for extent in extents))


@cases(("2.1", tuple(CASES)), ("2.2", SOME_CASES))
def test_tiled_decode_matches_diffusers(
    opened: dict[str, Opened], kind: str, tile: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    arch, network, _, decoder = opened[kind]
    latents = random_latents(arch, shape[0], shape[1:]).numpy()
    tiles = pixels(arch, tile)
    ours = np.concatenate(list(decode_tiled(decoder, latents, arch, tiles)), axis=1)
    set_up_oracle(network, tiles)
    theirs = network.decode(torch.from_numpy(unnormalise(latents, arch))[None]).sample[0]
    assert relative_error(ours.clip(-1, 1), theirs) < TOLERANCE
    assert np.abs(ours.clip(-1, 1) - theirs.numpy()).max() < 1e-4  # no single pixel of a seam is off; measured 5e-6


@cases(("2.1", SOME_CASES), ("2.2", SOME_CASES))
def test_tiled_encode_matches_diffusers(
    opened: dict[str, Opened], kind: str, tile: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    arch, network, encoder, _ = opened[kind]
    frames = random_frames(arch, 1 if shape[0] == 1 else 5, shape[1:])  # 4n+1 frames, as diffusers' chunks want them
    tiles = pixels(arch, tile)
    ours = encode_tiled(encoder, frames.numpy(), arch, tiles)
    set_up_oracle(network, tiles, side=arch.patch_size)
    theirs = normalise(network.encode(frames[None]).latent_dist.mode()[0].numpy(), arch)
    assert relative_error(ours, theirs) < TOLERANCE
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", CONFIGS)
def test_tiling_changes_a_frame_that_exceeds_the_tile_and_no_other(opened: dict[str, Opened], kind: str) -> None:
    arch, _, encoder, decoder = opened[kind]
    latents = random_latents(arch, 2, (6, 7)).numpy()
    frames = random_frames(arch, 2, (6, 7)).numpy()
    fits, cuts = pixels(arch, (6, 7, 4, 4)), pixels(arch, (6, 6, 4, 4))

    def decoded(tiles: TileSpec) -> Any:
        return np.concatenate(list(decode_tiled(decoder, latents, arch, tiles)), axis=1)

    assert np.array_equal(decoded(fits), np.concatenate(list(decode_stream(decoder, latents, arch)), axis=1))
    assert not np.array_equal(decoded(cuts), decoded(fits))
    assert np.array_equal(encode_tiled(encoder, frames, arch, fits), encode_stream(encoder, frames, arch))
    assert not np.array_equal(encode_tiled(encoder, frames, arch, cuts), encode_tiled(encoder, frames, arch, fits))


def test_tiled_frames_come_in_the_same_chunks_as_the_stream(opened: dict[str, Opened]) -> None:
    arch, _, _, decoder = opened["2.1"]
    latents = random_latents(arch, 3, (9, 5)).numpy()
    tiled = [chunk.shape for chunk in decode_tiled(decoder, latents, arch, TileSpec.square(16, 12))]
    assert tiled == [chunk.shape for chunk in decode_stream(decoder, latents, arch)]


def test_default_tiles_are_those_of_diffusers() -> None:
    network = make_vae(FEW_LEVELS, seed=0)
    sizes = (network.tile_sample_min_height, network.tile_sample_min_width)
    strides = (network.tile_sample_stride_height, network.tile_sample_stride_width)
    tiles = TileSpec()
    assert (tiles.tile_height, tiles.tile_width, tiles.stride_height, tiles.stride_width) == (*sizes, *strides)


@pytest.mark.parametrize(("tile", "stride"), [(256, 257), (256, 0), (0, 0), (-8, -8)])
def test_tiles_that_leave_gaps_are_refused(tile: int, stride: int) -> None:
    with pytest.raises(RequestError, match="distance must be between 1 and the tile's size"):
        TileSpec.square(tile, stride)


@pytest.mark.parametrize(("tile", "stride", "hint"), [(250, 192, "248 or 256"), (256, 100, "96 or 104"), (256, 3, "try 8")])
def test_tiles_between_latent_positions_are_refused_with_the_nearest(tile: int, stride: int, hint: str) -> None:
    with pytest.raises(RequestError, match="multiple of 8") as caught:
        TileSpec.square(tile, stride).check(VaeArch())
    assert hint in caught.value.hint


def test_tiles_of_the_2_2_vae_are_multiples_of_sixteen_pixels() -> None:
    TileSpec.square(256, 192).check(VAE_2_2)
    with pytest.raises(RequestError, match="need a multiple of 16 pixels"):
        TileSpec.square(256, 200).check(VAE_2_2)
