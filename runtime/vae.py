"""Drives the VAE decoder: latents in, video frames out, one latent frame at a time.

The caches go from step to step without being looked at, so memory does not grow with the length of the video. `runtime.tiling` cuts
frames that are too large; `runtime.video` writes them.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.component import Component
from runtime.stages.vae import DECODE_FIRST, DECODE_STEP
from runtime.variants import VaeArch

Float32 = NDArray[np.float32]
Frames = NDArray[np.uint8]


class Rounding(StrEnum):
    """How a colour in 0..1 becomes one of 256 levels."""

    TRUNCATE = "truncate"
    """Wan's `save_video` and diffusers' `export_to_video`."""
    NEAREST = "nearest"
    """diffusers' PIL output (`VaeImageProcessor.numpy_to_pil`), half to even."""


def decode_stream(component: Component, latents: Float32, arch: VaeArch) -> Iterator[Float32]:
    """Decode latents as a stream.

    Args:
        component: the opened VAE.
        latents: float32 [z_dim, T, h, w], normalised as the transformer leaves them.

    Yields:
        Chunks [3, t, H, W] in about -1..1, not clamped: one frame, then `temporal_stride` frames per latent frame.

    Raises:
        EngineError: an engine failed.
    """
    return decode_unnormalised(component, unnormalise(latents, arch))


def decode_unnormalised(component: Component, latents: Float32) -> Iterator[Float32]:
    """`decode_stream` for latents that have their own scale back."""
    backend = component.backend
    caches: dict[str, Any] = {}
    for index in range(latents.shape[1]):
        frame = backend.to_device(np.ascontiguousarray(latents[:, index : index + 1]))
        outputs = component.run(DECODE_STEP if index else DECODE_FIRST, {"latents": frame, **caches})
        frames = backend.to_host(outputs.pop("frames"))
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
        yield frames


def unnormalise(latents: Float32, arch: VaeArch) -> Float32:
    """Give latents their own scale back: `z / (1 / std) + mean` in float32, as both peers compute it."""
    statistics = (arch.z_dim, 1, 1, 1)
    mean = np.array(arch.latents_mean, np.float32).reshape(statistics)
    inverse_std = np.float32(1) / np.array(arch.latents_std, np.float32).reshape(statistics)
    return latents / inverse_std + mean


def to_uint8(chunk: Float32, *, rounding: Rounding = Rounding.TRUNCATE) -> Frames:
    """Decoded colours [3, t, H, W], clamped to -1..1, as uint8 [t, H, W, 3]."""
    levels = np.clip(chunk.transpose(1, 2, 3, 0) / 2 + np.float32(0.5), 0, 1) * np.float32(255)
    if rounding is Rounding.NEAREST:
        np.rint(levels, out=levels)
    return levels.astype(np.uint8, order="C")
