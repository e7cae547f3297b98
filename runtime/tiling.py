"""Spatial tiling of the VAE decoder: tiles with overlap, decoded one after the other and blended into whole frames.

The result is that of diffusers' `AutoencoderKLWan.tiled_decode` (0.42.1): same tiles, same order, same arithmetic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from runtime.component import Component
from runtime.errors import RequestError
from runtime.vae import Float32, decode_unnormalised, unnormalise
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
    if height <= tiles.tile_height and width <= tiles.tile_width:
        yield from decode_unnormalised(component, latents)
        return
    num_frames = 1 + (latents.shape[1] - 1) * arch.temporal_stride
    video = np.empty((3, num_frames, height, width), np.float32)
    above: dict[int, Float32] = {}  # bottom rows of the previous row's tiles, by left edge
    for top in range(0, height, tiles.stride_height):
        left_neighbour: Float32 | None = None
        for left in range(0, width, tiles.stride_width):
            rows, columns = (
                slice(top // unit, (top + tiles.tile_height) // unit),
                slice(left // unit, (left + tiles.tile_width) // unit),
            )
            tile = np.concatenate(list(decode_unnormalised(component, latents[:, :, rows, columns])), axis=1)
            # diffusers blends in place: both neighbours are already blended themselves
            _blend(above.get(left), tile, axis=2, overlap=tiles.tile_height - tiles.stride_height)
            _blend(left_neighbour, tile, axis=3, overlap=tiles.tile_width - tiles.stride_width)
            kept = tile[:, :, : tiles.stride_height, : tiles.stride_width]
            video[:, :, top : top + kept.shape[2], left : left + kept.shape[3]] = kept
            above[left] = tile[:, :, tiles.stride_height :].copy()
            left_neighbour = tile[:, :, :, tiles.stride_width :].copy()
    yield video[:, :1]
    for start in range(1, num_frames, arch.temporal_stride):
        yield video[:, start : start + arch.temporal_stride]


def _blend(neighbour: Float32 | None, tile: Float32, *, axis: int, overlap: int) -> None:
    """Fade from the end of `neighbour` into the beginning of `tile`, in place; weights i/E for the i-th of E positions."""
    if neighbour is None:
        return
    extent = min(neighbour.shape[axis], tile.shape[axis], overlap)
    if not extent:
        return
    weight = (np.arange(extent) / extent).reshape(-1, 1, 1, 1)  # float64 until here, as in the original
    end = np.moveaxis(neighbour, axis, 0)[-extent:]
    start = np.moveaxis(tile, axis, 0)[:extent]  # a view: writing it writes the tile
    start[:] = end * (1 - weight).astype(np.float32) + start * weight.astype(np.float32)
