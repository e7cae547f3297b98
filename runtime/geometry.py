"""Sizes and their arithmetic: pixels ↔ latents ↔ tokens, patches, and the rotary tables of a token grid."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RequestError
from runtime.variants import TransformerArch, VaeArch

Float32 = NDArray[np.float32]
MAX_POSITIONS = 1024
"""Rotary positions per axis in every peer (`rope_max_seq_len`)."""
MAX_SIDE = 16 * MAX_POSITIONS
MAX_FRAMES = 4 * (MAX_POSITIONS - 1) + 1
"""What those positions reach with Wan's strides and patches, in pixels and frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSize:
    """A video's extent in pixels and frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRange:
    """The sizes engines were built for; both ends included, and both orientations."""

    smallest: VideoSize
    largest: VideoSize

    def __str__(self) -> str:
        return f"{self.smallest}..{self.largest}"

    def contains(self, size: VideoSize) -> bool:
        """Whether `size`, or the same turned by 90 degrees, lies inside."""
        return any(
            self.smallest.width <= width <= self.largest.width
            and self.smallest.height <= height <= self.largest.height
            and self.smallest.num_frames <= size.num_frames <= self.largest.num_frames
            for width, height in ((size.width, size.height), (size.height, size.width))
        )


def check_size(size: VideoSize, *, vae: VaeArch, transformer: TransformerArch) -> None:
    """Check that a size maps to whole latents and patches.

    Raises:
        RequestError: with the nearest sizes that do.
    """
    stride = vae.temporal_stride
    if size.num_frames < 1 or (size.num_frames - 1) % stride:
        below = max(1, (size.num_frames - 1) // stride * stride + 1)
        raise RequestError(f"num_frames={size.num_frames}: need {stride}n+1", hint=f"try {below} or {below + stride}")
    for name, pixels, patch in (
        ("width", size.width, transformer.patch_size[2]),
        ("height", size.height, transformer.patch_size[1]),
    ):
        step = vae.spatial_stride * patch
        if pixels < 1 or pixels % step:
            below = max(step, pixels // step * step)
            raise RequestError(f"{name}={pixels}: need a multiple of {step}", hint=f"try {below} or {below + step}")
        if pixels // step > MAX_POSITIONS:
            raise RequestError(f"{name}={pixels}: at most {MAX_POSITIONS * step}", hint="lower it")
    if (size.num_frames - 1) // stride + 1 > MAX_POSITIONS:
        raise RequestError(f"num_frames={size.num_frames}: at most {(MAX_POSITIONS - 1) * stride + 1}", hint="lower it")


def token_pixels(vae: VaeArch, transformer: TransformerArch) -> int:
    """Side of the square of pixels that one token stands for."""
    return vae.spatial_stride * transformer.patch_size[1]


def latent_shape(size: VideoSize, *, vae: VaeArch) -> tuple[int, int, int, int]:
    """Shape [z_dim, T, h, w] of the latents of a video."""
    frames = (size.num_frames - 1) // vae.temporal_stride + 1
    return vae.z_dim, frames, size.height // vae.spatial_stride, size.width // vae.spatial_stride


def token_grid(latents_shape: tuple[int, ...], arch: TransformerArch) -> tuple[int, int, int]:
    """Tokens along time, height and width of latents [C, T, h, w]."""
    _, frames, height, width = latents_shape
    return frames // arch.patch_size[0], height // arch.patch_size[1], width // arch.patch_size[2]


def patchify(latents: Float32, arch: TransformerArch) -> Float32:
    """Latents [C, T, h, w] → patches [N, C·pt·ph·pw], tokens in row-major (time, height, width) order."""
    (frames, height, width), (pt, ph, pw) = token_grid(latents.shape, arch), arch.patch_size
    patch_row = np.dtype((np.void, pw * latents.itemsize))  # moved as one: a third of the time
    rows = np.ascontiguousarray(latents).view(patch_row)
    cut = rows.reshape(-1, frames, pt, height, ph, width).transpose(1, 3, 5, 0, 2, 4)
    return np.ascontiguousarray(cut).view(latents.dtype).reshape(frames * height * width, -1)


def unpatchify(patches: Float32, grid: tuple[int, int, int], arch: TransformerArch) -> Float32:
    """Patches [N, pt·ph·pw·C], channel fastest, → [C, T, h, w]; the inverse layout of the head, not of `patchify`."""
    (frames, height, width), (pt, ph, pw) = grid, arch.patch_size
    cut = patches.reshape(frames, height, width, pt, ph, pw, -1)
    latents = np.empty((cut.shape[-1], frames, pt, height, ph, width, pw), patches.dtype)
    for x in range(pw):  # column by column of a patch: half the time of one transposition
        latents[..., x] = cut[..., x, :].transpose(5, 0, 3, 1, 4, 2)
    return latents.reshape(-1, frames * pt, height * ph, width * pw)


def rope_tables(grid: tuple[int, int, int], head_dim: int) -> tuple[Float32, Float32]:
    """Cosines and sines of the rotary angles, [N, head_dim / 2] each.

    The pairs of a head are split over time, height and width as (rest, head_dim // 6, head_dim // 6); an axis of `d` elements
    turns its pair j by position · 10000^(-2j/d). Float64 angles, as every peer has them (Wan2.2 `rope_params`, 42bf4cfa).
    """
    spatial = 2 * (head_dim // 6)
    axis_dims = (head_dim - 2 * spatial, spatial, spatial)
    angles = [
        np.multiply.outer(np.arange(extent), 10000.0 ** (-np.arange(0, dim, 2) / dim))
        for extent, dim in zip(grid, axis_dims, strict=True)
    ]
    full: NDArray[Any] = np.concatenate(
        [
            np.broadcast_to(
                angle.reshape([-1 if axis == i else 1 for i in range(3)] + [angle.shape[1]]), (*grid, angle.shape[1])
            )
            for axis, angle in enumerate(angles)
        ],
        axis=-1,
    ).reshape(-1, head_dim // 2)
    return np.cos(full).astype(np.float32), np.sin(full).astype(np.float32)
