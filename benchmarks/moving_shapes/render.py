"""Draws scenes, anti-aliased, many clips at once; one implementation for NumPy arrays and torch tensors on any device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.moving_shapes.world import SHAPES, ClipSize, Scene

_MAX_THINGS = 2
_HIDDEN = -9.0  # radius of a thing that is not there
_SIDE = math.sqrt(math.pi) / 2  # half a square's side, over the radius of the circle of its area; the others likewise
_HALF_DIAGONAL = math.sqrt(math.pi / 2)
_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
_ARM = math.sqrt(9 * math.pi / 20)  # half an arm's length of the cross, whose arms are a third as wide as long


@dataclass(frozen=True, slots=True)
class SceneArrays:
    """Scenes as arrays, the farthest thing first; of NumPy, or of torch."""

    background: Any  # [B, 3], of 255
    rgb: Any  # [B, K, 3], of 255
    shape: Any  # [B, K], index into `SHAPES`
    radius: Any  # [B, K], in shorter sides
    track: Any  # [B, K, T, 2], x and y in shorter sides

    def to_torch(self, device: Any) -> "SceneArrays":
        """The same as torch tensors on a device."""
        import torch

        return SceneArrays(*(torch.from_numpy(getattr(self, f.name)).to(device, non_blocking=True) for f in fields(self)))


def scene_arrays(scenes: Sequence[Scene]) -> SceneArrays:
    """Scenes of clips of one size, as float32 arrays."""
    num_frames = len(scenes[0].things[0].track)
    arrays = SceneArrays(
        background=np.array([scene.background_rgb for scene in scenes], np.float32),
        rgb=np.zeros((len(scenes), _MAX_THINGS, 3), np.float32),
        shape=np.zeros((len(scenes), _MAX_THINGS), np.float32),
        radius=np.full((len(scenes), _MAX_THINGS), _HIDDEN, np.float32),
        track=np.zeros((len(scenes), _MAX_THINGS, num_frames, 2), np.float32),
    )
    for b, scene in enumerate(scenes):
        for k, thing in enumerate(scene.painted):
            arrays.rgb[b, k], arrays.radius[b, k], arrays.track[b, k] = thing.rgb, thing.radius, thing.track
            arrays.shape[b, k] = SHAPES.index(thing.shape)
    return arrays


def draw(arrays: SceneArrays, size: ClipSize, *, xp: Any = np) -> Any:
    """Frames in [-1, 1], channels first: [B, 3, T, H, W].

    Args:
        xp: the arrays' module, numpy or torch.
    """
    frames = arrays.background[:, :, None, None, None] / 127.5 - 1
    for k in range(arrays.radius.shape[1]):
        alpha = coverage(arrays.shape[:, k], arrays.radius[:, k], arrays.track[:, k], size, xp=xp)[:, None]
        colour = arrays.rgb[:, k, :, None, None, None] / 127.5 - 1
        frames = frames + alpha * (colour - frames)
    return frames


def coverage(shape: Any, radius: Any, track: Any, size: ClipSize, *, xp: Any = np) -> Any:
    """How much of each pixel one thing covers, 0 to 1: [B], [B], [B, T, 2] → [B, T, H, W]."""
    side = min(size.width, size.height)
    like = {"device": track.device} if hasattr(xp, "inference_mode") else {}  # NumPy before 2.0 arrays have no such argument
    x = xp.arange(size.width, dtype=xp.float32, **like) + 0.5
    y = xp.arange(size.height, dtype=xp.float32, **like) + 0.5
    x = x - side * track[:, :, 0, None]  # [B, T, W]
    y = y - side * track[:, :, 1, None]
    distance = _distance(shape[:, None, None, None], side * radius[:, None, None, None], x[:, :, None, :], y[:, :, :, None], xp)
    return (0.5 - distance).clip(0, 1)


def _distance(shape: Any, r: Any, x: Any, y: Any, xp: Any) -> Any:
    """Pixels from a point to the shape's outline, negative inside; near the outline, which is where it counts."""
    across, along = xp.abs(x), xp.abs(y)
    arm, width = _ARM * r, _ARM * r / 3
    outlines = (
        xp.sqrt(across * across + along * along) - r,
        xp.maximum(across, along) - _SIDE * r,
        xp.maximum(0.5 * math.sqrt(3) * across - 0.5 * y, y + 0 * across) - _INRADIUS * r,
        (across + along - _HALF_DIAGONAL * r) * math.sqrt(0.5),
        xp.minimum(xp.maximum(across - arm, along - width), xp.maximum(across - width, along - arm)),
    )
    distance = outlines[0]
    for index, outline in enumerate(outlines[1:], start=1):
        distance = xp.where(shape == index, outline, distance)
    return distance


def to_uint8(frames: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Clips [B, 3, T, H, W] in [-1, 1] → [B, T, H, W, 3] as a video file has them."""
    return (np.moveaxis(frames, 1, -1).clip(-1, 1) * 127.5 + 128).clip(0, 255).astype(np.uint8)
