"""Spatial tiling of the VAE: tiles with overlap, encoded or decoded one after the other and blended into whole latents or frames.

The result is that of diffusers' `AutoencoderKLWan.tiled_encode` and `tiled_decode` (0.42.1): same tiles, same order, same arithmetic. Tiles
are always counted in pixels of the video. diffusers counts those of Wan2.2's encoder in folded pixels, so its encoder tile of 256 is one
of 512 here; its decoder's are pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from runtime.component import Component
from runtime.errors import RequestError
from runtime.geometry import Float32
from runtime.vae import decode_unnormalised, encode_chunks, encode_stream, frame_chunks, normalise, unnormalise
from runtime.variants import VaeArch


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec:
    """Size and distance of tiles in pixels; tiles overlap by the difference. Frames no larger than a tile are not cut.

    Raises:
        RequestError: an extent is not positive, or tiles leave gaps.
    """

    tile_height: int = 256
    tile_width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    def __post_init__(self) -> None:
        for tile, stride in ((self.tile_height, self.stride_height), (self.tile_width, self.stride_width)):
            if not 0 < stride <= tile:
                raise RequestError(
                    f"tile of {tile} pixels every {stride}: the distance must be between 1 and the tile's size",
                    hint="tiles of 256 every 192 are usual",
                )

    @classmethod
    def square(cls, tile: int, stride: int) -> Self:
        """The same size and distance in both directions."""
        return cls(tile_height=tile, tile_width=tile, stride_height=stride, stride_width=stride)

    def check(self, arch: VaeArch) -> None:
        """Check that tiles begin and end between latent positions.

        Raises:
            RequestError: an extent is no multiple of the VAE's spatial stride; names the nearest ones.
        """
        unit = arch.spatial_stride
        for name, pixels in (
            ("size", self.tile_height),
            ("size", self.tile_width),
            ("distance", self.stride_height),
            ("distance", self.stride_width),
        ):
            if pixels % unit:
                below = pixels // unit * unit
                nearest = f"{below} or {below + unit}" if below else str(unit)
                raise RequestError(f"tile {name} {pixels}: need a multiple of {unit} pixels", hint=f"try {nearest}")

    def in_latents(self, arch: VaeArch, *, fold: int = 1) -> Self:
        """The same tiles, or `fold` times as large ones, counted in latent positions."""
        unit = arch.spatial_stride
        return replace(
            self,
            tile_height=self.tile_height * fold // unit,
            tile_width=self.tile_width * fold // unit,
            stride_height=self.stride_height * fold // unit,
            stride_width=self.stride_width * fold // unit,
        )

    def covers(self, height: int, width: int) -> bool:
        """Whether frames of this size are no larger than a tile."""
        return height <= self.tile_height and width <= self.tile_width


def encode_tiled(component: Component, frames: Float32, arch: VaeArch, tiles: TileSpec, *, fold: int = 1) -> Float32:
    """`runtime.vae.encode_stream` in tiles, so that the encoder's memory is bounded by a tile and not by the frame.

    Args:
        fold: how many times as large as `tiles` says the tiles are. diffusers counts them in what is left of the frames after folding
            (VAE 2.2: 2), and decides by the frames' own size whether to cut at all.

    Returns:
        The same latents as `encode_stream` in shape; tiles do not see past their edges, so values differ.

    Raises:
        ValueError: a number of frames that the VAE does not encode.
        RequestError: the tiles do not fit the VAE's grid.
        EngineError: an engine failed.
    """
    tiles.check(arch)
    num_frames, height, width = frames.shape[1:]
    if tiles.covers(height, width):
        return encode_stream(component, frames, arch)
    unit = arch.spatial_stride
    num_latents = 1 + (num_frames - 1) // arch.temporal_stride
    latents = np.empty((arch.z_dim, num_latents, height // unit, width // unit), np.float32)

    def encode(rows: slice, columns: slice) -> Float32:
        tile = frames[:, :, rows.start * unit : rows.stop * unit, columns.start * unit : columns.stop * unit]
        return np.concatenate(list(encode_chunks(component, frame_chunks(tile, arch))), axis=1)

    _merge_tiles(latents, encode, tiles.in_latents(arch, fold=fold), scale=1)
    return normalise(latents, arch)


def decode_tiled(component: Component, latents: Float32, arch: VaeArch, tiles: TileSpec) -> Iterator[Float32]:
    """`runtime.vae.decode_stream` in tiles, so that the decoder's memory is bounded by a tile and not by the frame.

    Each tile runs over the whole length before the next begins, so only one tile's caches and activations exist at a time. The
    price: frames leave when the last tile is done, and until then all of them are kept, 12 bytes a pixel. Keeping every tile's
    caches instead would let frames out at once, but at Wan2.1's widths they take 9.2 KiB a pixel, as much as 790 frames do, and with
    the overlap more than the untiled decoder's: tiling would cost memory instead of saving it.

    Yields:
        The same chunks as `decode_stream`.

    Raises:
        RequestError: the tiles do not fit the VAE's grid.
        EngineError: an engine failed.
    """
    tiles.check(arch)
    unit = arch.spatial_stride
    height, width = (extent * unit for extent in latents.shape[2:])
    latents = unnormalise(latents, arch)
    if tiles.covers(height, width):
        yield from decode_unnormalised(component, latents)
        return
    num_frames = 1 + (latents.shape[1] - 1) * arch.temporal_stride
    video = np.empty((3, num_frames, height, width), np.float32)

    def decode(rows: slice, columns: slice) -> Float32:
        return np.concatenate(list(decode_unnormalised(component, latents[:, :, rows, columns])), axis=1)

    _merge_tiles(video, decode, tiles.in_latents(arch), scale=unit, patch=arch.patch_size)
    yield from frame_chunks(video, arch)


def _merge_tiles(
    whole: Float32, make: Callable[[slice, slice], Float32], grid: TileSpec, *, scale: int, patch: int = 1
) -> None:
    """Make every tile and blend it into `whole` [C, T, H, W].

    Args:
        make: a tile's result from the latent positions of its rows and columns.
        grid: the tiles in latent positions.
        scale: rows of `whole` per latent position.
        patch: rows that get the same weight when tiles are blended.
    """
    stride_rows, stride_columns = grid.stride_height * scale, grid.stride_width * scale
    overlap_rows, overlap_columns = grid.tile_height * scale - stride_rows, grid.tile_width * scale - stride_columns
    above: dict[int, Float32] = {}  # bottom rows of the previous row's tiles, by left edge
    for top in range(0, whole.shape[2] // scale, grid.stride_height):
        left_neighbour: Float32 | None = None
        for left in range(0, whole.shape[3] // scale, grid.stride_width):
            tile = make(slice(top, top + grid.tile_height), slice(left, left + grid.tile_width))
            # diffusers blends in place: both neighbours are already blended themselves
            _blend(above.get(left), tile, axis=2, overlap=overlap_rows, patch=patch)
            _blend(left_neighbour, tile, axis=3, overlap=overlap_columns, patch=patch)
            kept = tile[:, :, :stride_rows, :stride_columns]
            y, x = top * scale, left * scale
            whole[:, :, y : y + kept.shape[2], x : x + kept.shape[3]] = kept
            above[left] = tile[:, :, stride_rows:].copy()
            left_neighbour = tile[:, :, :, stride_columns:].copy()


def _blend(neighbour: Float32 | None, tile: Float32, *, axis: int, overlap: int, patch: int) -> None:
    """Fade from the end of `neighbour` into the beginning of `tile`, in place; weight i/E for the i-th of E patches."""
    if neighbour is None:
        return
    extent = min(neighbour.shape[axis], tile.shape[axis], overlap)
    if not extent:
        return
    steps = np.arange(extent) // patch / (extent // patch)  # float64 until below, as in the original
    weight = steps.reshape(-1, 1, 1, 1)
    end = np.moveaxis(neighbour, axis, 0)[-extent:]
    start = np.moveaxis(tile, axis, 0)[:extent]  # a view: writing it writes the tile
    start[:] = end * (1 - weight).astype(np.float32) + start * weight.astype(np.float32)
