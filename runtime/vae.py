"""Drives the VAE, one latent frame at a time: the encoder from video frames to latents, the decoder back.

The caches go from step to step without being looked at, so memory does not grow with the length of the video. `runtime.tiling` cuts
frames that are too large; `runtime.video` writes them.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.component import Component
from runtime.geometry import Float32
from runtime.stages.vae import DECODE_FIRST, DECODE_STEP, ENCODE_FIRST, ENCODE_STEP
from runtime.variants import VaeArch

Frames = NDArray[np.uint8]


class Rounding(StrEnum):
    """How a colour in 0..1 becomes one of 256 levels."""

    TRUNCATE = "truncate"
    """Wan's `save_video` and diffusers' `export_to_video`."""
    NEAREST = "nearest"
    """diffusers' PIL output (`VaeImageProcessor.numpy_to_pil`), half to even."""


def encode_stream(component: Component, frames: Float32, arch: VaeArch) -> Float32:
    """Encode a video.

    Args:
        component: the opened VAE encoder.
        frames: float32 [3, T, H, W] in -1..1, T one more than a multiple of `temporal_stride`.

    Returns:
        The posterior's mean [z_dim, t, h, w], normalised as the transformer takes it.

    Raises:
        ValueError: another number of frames.
        EngineError: an engine failed, or the size is not a multiple of the VAE's stride.
    """
    return normalise(np.concatenate(list(encode_chunks(component, frame_chunks(frames, arch))), axis=1), arch)


def encode_chunks(component: Component, chunks: Iterable[Float32]) -> Iterator[Float32]:
    """Encode a video that comes in chunks [3, t, H, W], one frame and then `temporal_stride` each.

    Yields:
        For each chunk its latent frame [z_dim, 1, h, w], not normalised.

    Raises:
        EngineError: an engine failed, or the frames' size is not a multiple of the VAE's stride.
    """
    return _stream(component, (ENCODE_FIRST, ENCODE_STEP), chunks, given="frames", made="latents")


def frame_chunks(frames: Float32, arch: VaeArch) -> Iterator[Float32]:
    """Cut a video [3, T, H, W] into the chunks that make one latent frame each.

    Raises:
        ValueError: T is not one more than a multiple of `temporal_stride`.
    """
    num_frames, stride = frames.shape[1], arch.temporal_stride
    if num_frames % stride != 1 % stride:
        raise ValueError(f"{num_frames} frames: the VAE encodes {stride}n+1")
    yield frames[:, :1]
    for start in range(1, num_frames, stride):
        yield frames[:, start : start + stride]


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
    chunks = (latents[:, index : index + 1] for index in range(latents.shape[1]))
    return _stream(component, (DECODE_FIRST, DECODE_STEP), chunks, given="latents", made="frames")


def normalise(latents: Float32, arch: VaeArch) -> Float32:
    """Bring the posterior's mean to the transformer's scale: `(mu - mean) * (1 / std)` in float32, as both peers compute it."""
    mean, inverse_std = _statistics(arch)
    return (latents - mean) * inverse_std


def unnormalise(latents: Float32, arch: VaeArch) -> Float32:
    """Give latents their own scale back: `z / (1 / std) + mean` in float32, as both peers compute it."""
    mean, inverse_std = _statistics(arch)
    return latents / inverse_std + mean


def to_uint8(chunk: Float32, *, rounding: Rounding = Rounding.TRUNCATE) -> Frames:
    """Decoded colours [3, t, H, W], clamped to -1..1, as uint8 [t, H, W, 3]."""
    levels = np.clip(chunk.transpose(1, 2, 3, 0) / 2 + np.float32(0.5), 0, 1) * np.float32(255)
    if rounding is Rounding.NEAREST:
        np.rint(levels, out=levels)
    return levels.astype(np.uint8, order="C")


def _stream(
    component: Component, stages: tuple[str, str], chunks: Iterable[Float32], *, given: str, made: str
) -> Iterator[Float32]:
    """Run the first of two stages on the first chunk and the second on the others, each with the caches of the one before."""
    backend = component.backend
    caches: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        inputs = {given: backend.to_device(np.ascontiguousarray(chunk)), **caches}
        outputs = component.run(stages[min(index, 1)], inputs)
        result = backend.to_host(outputs.pop(made))
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
        yield result


def _statistics(arch: VaeArch) -> tuple[Float32, Float32]:
    """The latents' mean and one over their deviation, [z_dim, 1, 1, 1]."""
    shape = (arch.z_dim, 1, 1, 1)
    mean = np.array(arch.latents_mean, np.float32).reshape(shape)
    return mean, np.float32(1) / np.array(arch.latents_std, np.float32).reshape(shape)
